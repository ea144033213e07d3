"""Draw README's pictures: what a setting does to the LoRA, a strip each, on the toy.

    python tests/tools/draw_strips.py --output_dir /tmp/strips               # all of them, 20 minutes on one core
    python tests/tools/draw_strips.py --output_dir /tmp/strips --strip masks

Each column of a strip is a training by the two real scripts, each row a prompt; the samples of a row have the same
noise in every column. The settings are those of toy/train.txt, but for what the titles say, and in all strips but the
first a step has 8 samples; those of steps and masks train with AdamW at a falling rate, as README's command does.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(TOY))
from measure_toy import generate  # noqa: E402
from world import save_robots_on_red  # noqa: E402

ROBOT = "a photo of sks robot"
ON_GREEN = f"{ROBOT} on a green background"
SHAPE = "a photo of a red star on a white background"
CLASS_FLAGS = ("--with_prior_preservation", "--class_prompt", "--class_samples", "--sample_batch_size")
STEPS_OF_8 = "--train_batch_size 8 --learning_rate 4e-3"
ADAMW = f"{STEPS_OF_8} --optimizer adamw --lr_scheduler cosine"
CLASS_IMAGES = "--class_samples images --num_class_images 64 --sample_batch_size 32 --prior_loss_weight 2.5"
SIDE = 96  # of an image of 64 x 64 pixels in a strip
MARGIN = 8
FONT_SIZE = 15


@dataclass(frozen=True)
class Column:
    """One training: its title, the images (see make_images), and the flags that differ from toy/train.txt."""

    title: str
    images: str = "robot"
    flags: str = STEPS_OF_8
    steps: int = 300
    keeps_class: bool = True


@dataclass(frozen=True)
class Strip:
    """What is compared: a training per column, a prompt per row, so many samples of each."""

    columns: tuple[Column, ...]
    prompts: tuple[str, ...]
    samples: int = 4


UNTRAINED = Column("before", steps=0)
ON_RED = "five photos on red"
STRIPS = {
    "before_after": Strip((UNTRAINED, Column("after", flags="", steps=200)), (ROBOT, ON_GREEN, SHAPE)),
    "steps": Strip(
        (
            Column("too few: 50 steps", flags=ADAMW, steps=50, keeps_class=False),
            Column("300 steps", flags=ADAMW, steps=300, keeps_class=False),
            Column("too many: 3,000 steps", flags=ADAMW, steps=3000, keeps_class=False),
        ),
        (ROBOT, ON_GREEN, SHAPE),
        samples=3,
    ),
    "class_images": Strip(
        (
            Column("neither", keeps_class=False),
            Column("class images", flags=f"{STEPS_OF_8} {CLASS_IMAGES}"),
            Column("velocities"),
        ),
        (ROBOT, SHAPE),
        samples=3,
    ),
    "masks": Strip(
        (
            Column(ON_RED, "red", f"{CLASS_IMAGES} {ADAMW}"),
            Column("the same, with masks", "red", f"--alpha_mask {CLASS_IMAGES} {ADAMW}"),
        ),
        (ROBOT,),
        samples=6,
    ),
    "captions": Strip(
        (Column(ON_RED, "red"), Column("the same, with captions", "red, captioned")), (ROBOT,), samples=6
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="where pictures and trainings go")
    parser.add_argument("--strip", nargs="+", choices=STRIPS, default=list(STRIPS), help="pictures to draw")
    return parser.parse_args()


def make_images(kind: str, output_dir: Path) -> Path:
    """Return a folder of training images: the robot's own five, or five on red, with captions that say so or not."""
    if kind == "robot":
        return TOY / "robot"
    folder = output_dir / kind.replace(", ", "-")
    folder.mkdir(exist_ok=True)
    save_robots_on_red(folder)
    if kind == "red, captioned":
        for number in range(5):
            (folder / f"{number}.txt").write_text(f"{ROBOT} on a red background")
    return folder


def settings_of(column: Column) -> list[str]:
    """Return the flags of toy/train.txt, without those of the class where a column has none."""
    flags = []
    for line in (TOY / "train.txt").read_text().splitlines():
        is_of_class = line.split(" ")[0] in CLASS_FLAGS
        if column.keeps_class or not is_of_class:
            flags += shlex.split(line, comments=True)
    return flags


def train(column: Column, output_dir: Path) -> Path:
    """Run both scripts as a user does, unless it has been done; return the folder of the LoRA."""
    name = "-".join([column.images, str(column.steps), column.flags, "class" if column.keeps_class else ""])
    folder = output_dir / "".join(letter if letter.isalnum() else "-" for letter in name)
    images = make_images(column.images, output_dir).resolve()
    embeddings = (folder / "embeddings.parquet").resolve()
    compute = [sys.executable, "compute_embeddings.py", "@tests/toy/embeddings.txt"]
    subprocess.run([*compute, f"--local_data_dir={images}", f"--output_path={embeddings}"], cwd=ROOT, check=True)
    command = [sys.executable, "train_dreambooth_sd3_lora_miniature.py", *settings_of(column)]
    command += [f"--instance_data_dir={images}", f"--data_df_path={embeddings}", f"--output_dir={folder.resolve()}"]
    command += [f"--max_train_steps={column.steps}", "--validation_steps=100000", "--resume_from_checkpoint=latest"]
    subprocess.run([*command, *shlex.split(column.flags)], cwd=ROOT, check=True)
    return folder


def draw_samples(strip: Strip, output_dir: Path, pipeline: StableDiffusion3Pipeline) -> list[list[list[Image.Image]]]:
    """Return the samples of each column and prompt."""
    columns = []
    for column in strip.columns:
        if column.steps:
            pipeline.load_lora_weights(train(column, output_dir))
        rows = []
        for prompt in strip.prompts:
            rows.append(generate(pipeline, [prompt] * strip.samples, guidance_scale=1.25))
        columns.append(rows)
        if column.steps:
            pipeline.unload_lora_weights()
    return columns


def draw_strip(strip: Strip, samples: list[list[list[Image.Image]]]) -> Image.Image:
    """Lay samples out: titles above the columns, prompts above the rows."""
    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + MARGIN
    column_width = strip.samples * SIDE + MARGIN
    row_height = SIDE + line
    size = (len(strip.columns) * column_width + MARGIN, len(strip.prompts) * row_height + line + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, column in enumerate(strip.columns):
        left = MARGIN + number * column_width
        draw.text((left, MARGIN // 2), column.title, "black", font, stroke_width=0.4)
        for row, prompt in enumerate(strip.prompts):
            top = line + row * row_height
            if number == 0:
                draw.text((left, top), f'"{prompt}"', "dimgray", font)
            for place, image in enumerate(samples[number][row]):
                large = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(large, (left + place * SIDE, top + line - MARGIN // 2))
    return sheet


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipeline = StableDiffusion3Pipeline.from_pretrained(TOY / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for name in args.strip:
        samples = draw_samples(STRIPS[name], args.output_dir, pipeline)
        path = args.output_dir / f"{name}.png"
        draw_strip(STRIPS[name], samples).save(path, optimize=True)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
