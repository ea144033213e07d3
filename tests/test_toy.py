"""On a model that has really learnt something, the two scripts really teach it a subject."""

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, compute
from PIL import Image

TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(TOY))
from score import background_of, subject_fidelity
from world import render_robot

PROMPT = "a photo of sks robot"


@pytest.fixture(scope="module")
def toy_embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's text is 16 tokens long."""
    path = tmp_path_factory.mktemp("toy") / "embeddings.parquet"
    return compute(TOY / "model", TOY / "robot", path, "--prompt", PROMPT, "--max_sequence_length=16")


def samples(
    train: Callable[..., Path], folder: Path, embeddings: Path, *flags: str, count: int, **changes: object
) -> list[Image.Image]:
    """What the toy draws of the prompt after it was taught the pictures of a folder."""
    changes = {
        "pretrained_model_name_or_path": TOY / "model", "instance_data_dir": folder, "data_df_path": embeddings,
        "instance_prompt": PROMPT, "validation_prompt": PROMPT, "num_validation_images": count, "report_to": "none",
        "num_inference_steps": 20, "guidance_scale": 2, "rank": 16, "train_batch_size": 4, "learning_rate": 2e-3,
    } | changes  # fmt: skip
    output = train(*flags, **changes)
    return [Image.open(path) for path in sorted((output / "samples").glob(f"step-{changes['max_train_steps']:06d}-*"))]


def fidelity(train: Callable[..., Path], embeddings: Path, **changes: object) -> float:
    """How much samples look like the robot, 1 being a real one."""
    return subject_fidelity(samples(train, TOY / "robot", embeddings, count=8, **changes))


def test_fidelity_rises_with_training_and_not_without(train: Callable[..., Path], toy_embeddings: Path) -> None:
    """Five pictures, 200 steps; untrained samples look like the world's shapes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    untrained = fidelity(train, toy_embeddings, max_train_steps=1, learning_rate=0)
    trained = fidelity(train, toy_embeddings, max_train_steps=200)
    torch.set_num_threads(threads)
    print(f"fidelity {untrained:.3f} untrained, {trained:.3f} trained")
    assert untrained < 0.12 and trained > 2 * untrained


@pytest.fixture(scope="module")
def robots_on_red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of the robot that all have the same background, each with a mask that leaves it out."""
    folder, rng = tmp_path_factory.mktemp("red"), random.Random(11)
    for number in range(5):
        state = rng.getstate()
        picture = render_robot("red", rng, size=256)
        rng.setstate(state)
        differs = np.abs(np.int16(picture) - np.int16(render_robot("blue", rng, size=256))).max(axis=2) > 40
        picture.save(folder / f"{number}.png")
        Image.fromarray(np.uint8(255 * ~differs)).save(folder / f"{number}.mask.png")  # what both have is the robot
    return folder


def test_masks_and_captions_keep_the_background_from_being_learnt(
    train: Callable[..., Path], robots_on_red: Path, tmp_path: Path
) -> None:
    """Five robots on red: without either, "a photo of sks robot" becomes red. Captions name what is no robot."""
    captioned = shutil.copytree(robots_on_red, tmp_path / "captioned")
    for picture in captioned.glob("?.png"):
        picture.with_suffix(".txt").write_text(f"{PROMPT} on a red background")
    red = {}
    for how, folder in {"plain": robots_on_red, "masks": robots_on_red, "captions": captioned}.items():
        about = ["--prompt", PROMPT, "--max_sequence_length=16"]
        embeddings = compute(TOY / "model", folder, tmp_path / f"{how}.parquet", *about)
        flags = ["--alpha_mask"] if how == "masks" else []
        pictures = samples(train, folder, embeddings, *flags, count=16, max_train_steps=150, output=how)
        red[how] = np.mean([background_of(picture) == "red" for picture in pictures])
        print(f"{how}: {red[how]:.2f} red, fidelity {subject_fidelity(pictures):.2f}")
    assert red["plain"] > 0.8 and max(red["masks"], red["captions"]) < red["plain"] - 0.3
