"""The notebook on the toy: its settings, five photos, and its execution; for test_docs.py and hosted.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import papermill
import pillow_heif
from PIL import ExifTags, Image

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
SCRIPTS = [
    "compute_embeddings.py",
    "train_dreambooth_sd3_lora_miniature.py",
    "requirements.txt",
]  # beside the notebook
SETTINGS = {
    "MODEL": str(TOY / "model"),
    "PHOTOS": "robot",
    "INSTANCE_PROMPT": "a photo of sks robot",
    "VALIDATION_PROMPTS": ["a photo of sks robot", "it's a toy"],
    "NEW_PROMPT": "sks robot on a green background",
    "MAX_SEQUENCE_LENGTH": 16,
    "RESOLUTION": 64,
    "MIXED_PRECISION": "no",
    "INFERENCE_STEPS": 2,
}


def write_photos(folder: Path) -> None:
    """Write the toy's five photos into a new folder, each in another format and one on its side."""
    folder.mkdir(parents=True)
    pillow_heif.register_heif_opener()
    names = ["0.heic", "1.avif", "2.tiff", "3.bmp", "4.jpg"]
    for name, source in zip(names, sorted((TOY / "robot").glob("*.png")), strict=True):
        image = Image.open(source).convert("RGB").resize((64, 48))
        exif = Image.Exif()
        if name == "4.jpg":
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[ExifTags.Base.Orientation] = 6  # to be turned back, clockwise
        image.save(folder / name, exif=exif)


def copy_scripts(checkout: Path, folder: Path) -> None:
    """Copy what the notebook needs beside it."""
    for name in SCRIPTS:
        shutil.copy(checkout / name, folder)


def execute(notebook: dict, folder: Path, settings: dict[str, object], kernel: str | None = None) -> list[Any]:
    """Execute a notebook in a folder, in a kernel of its own; return its cells, which out.ipynb there has as well.

    A cell that fails raises papermill.PapermillExecutionError.
    """
    (folder / "notebook.ipynb").write_text(json.dumps(notebook))
    executed = papermill.execute_notebook(
        folder / "notebook.ipynb",
        folder / "out.ipynb",
        SETTINGS | settings,
        cwd=folder,
        kernel_name=kernel,
        progress_bar=False,
    )
    return executed.cells
