"""On a model that has really learned something, the two scripts really teach it a subject."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, compute

TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(TOY))
from score import background_of, subject_fidelity  # noqa: E402
from world import save_robots_on_red  # noqa: E402

PROMPT = "a photo of sks robot"
ALL_LAYERS = "to_k,to_q,to_v,to_out.0,add_k_proj,add_q_proj,add_v_proj,to_add_out,net.0.proj,net.2"


@pytest.fixture(scope="module")
def toy_embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's text is 16 tokens long."""
    path = tmp_path_factory.mktemp("toy") / "embeddings.parquet"
    return compute(TOY / "model", TOY / "robot", path, "--prompt", PROMPT, "--max_sequence_length=16")


def samples(
    train: Callable[..., Path], folder: Path, embeddings: Path, *flags: str, count: int, **changes: object
) -> list[Image.Image]:
    """What the toy draws of the prompt after it was taught the images of a folder."""
    changes = {
        "pretrained_model_name_or_path": TOY / "model", "instance_data_dir": folder, "data_df_path": embeddings,
        "instance_prompt": PROMPT, "validation_prompt": PROMPT, "num_validation_images": count, "report_to": "none",
        "num_inference_steps": 20, "guidance_scale": 2, "rank": 16, "train_batch_size": 4, "learning_rate": 2e-3,
        "lora_layers": ALL_LAYERS,
    } | changes  # fmt: skip
    output = train(*flags, **changes)
    return [Image.open(path) for path in sorted((output / "samples").glob(f"step-{changes['max_train_steps']:06d}-*"))]


def fidelity(train: Callable[..., Path], embeddings: Path, **changes: object) -> float:
    """How much samples look like the robot, 1 being a real one."""
    return subject_fidelity(samples(train, TOY / "robot", embeddings, count=8, **changes))


def test_fidelity_rises_with_training_and_not_without(train: Callable[..., Path], toy_embeddings: Path) -> None:
    """Five images, 150 steps; untrained samples look like the world's shapes."""
    untrained = fidelity(train, toy_embeddings, max_train_steps=1, learning_rate=1e-30, output="untrained")
    trained = fidelity(train, toy_embeddings, max_train_steps=150)
    print(f"fidelity {untrained:.3f} untrained, {trained:.3f} trained")
    assert untrained < 0.12 and trained > 2 * untrained


@pytest.fixture(scope="module")
def robots_on_red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of the robot that all have the same background, each with a mask that leaves it out."""
    folder = tmp_path_factory.mktemp("red")
    save_robots_on_red(folder)
    return folder


def test_masks_and_captions_keep_the_background_from_being_learned(
    train: Callable[..., Path], robots_on_red: Path, tmp_path: Path
) -> None:
    """Five robots on red: without either, "a photo of sks robot" becomes red. Captions name what is no robot."""
    captioned = shutil.copytree(robots_on_red, tmp_path / "captioned")
    for image in captioned.glob("?.png"):
        image.with_suffix(".txt").write_text(f"{PROMPT} on a red background")
    red = {}
    for how, folder in {"plain": robots_on_red, "masks": robots_on_red, "captions": captioned}.items():
        about = ["--prompt", PROMPT, "--max_sequence_length=16"]
        embeddings = compute(TOY / "model", folder, tmp_path / f"{how}.parquet", *about)
        flags = ["--alpha_mask"] if how == "masks" else []
        images = samples(train, folder, embeddings, *flags, count=16, max_train_steps=150, output=how)
        red[how] = np.mean([background_of(image) == "red" for image in images])
        print(f"{how}: {red[how]:.2f} red, fidelity {subject_fidelity(images):.2f}")
    assert red["plain"] > 0.7 and red["masks"] < red["plain"] - 0.15 and red["captions"] < red["plain"] - 0.5
