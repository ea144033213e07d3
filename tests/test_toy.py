"""On a model that has really learnt something, the two scripts really teach it a subject."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, compute
from PIL import Image

TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(TOY))
from score import subject_fidelity

PROMPT = "a photo of sks robot"


@pytest.fixture(scope="module")
def toy_embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's text is 16 tokens long."""
    path = tmp_path_factory.mktemp("toy") / "embeddings.parquet"
    return compute(TOY / "model", TOY / "robot", path, "--prompt", PROMPT, "--max_sequence_length=16")


def fidelity(train: Callable[..., Path], embeddings: Path, steps: int, learning_rate: float) -> float:
    """How much samples look like the robot, 1 being a real one, after so many steps."""
    changes = {
        "pretrained_model_name_or_path": TOY / "model", "instance_data_dir": TOY / "robot", "data_df_path": embeddings,
        "instance_prompt": PROMPT, "validation_prompt": PROMPT, "num_validation_images": 8, "num_inference_steps": 20,
        "guidance_scale": 2, "rank": 16, "train_batch_size": 4, "max_train_steps": steps,
        "learning_rate": learning_rate,
    }  # fmt: skip
    output = train("--report_to=none", output=f"{steps}", **changes)
    return subject_fidelity([Image.open(path) for path in sorted((output / "samples").iterdir())])


def test_fidelity_rises_with_training_and_not_without(train: Callable[..., Path], toy_embeddings: Path) -> None:
    """Five pictures, 200 steps; untrained samples look like the world's shapes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    untrained = fidelity(train, toy_embeddings, steps=1, learning_rate=0)
    trained = fidelity(train, toy_embeddings, steps=200, learning_rate=2e-3)
    torch.set_num_threads(threads)
    print(f"fidelity {untrained:.3f} untrained, {trained:.3f} trained")
    assert untrained < 0.12 and trained > 2 * untrained
