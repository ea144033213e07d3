"""Measure on the toy that DreamBooth works: teach it the robot with the two real scripts, then look at samples.

    python tests/tools/measure_dreambooth.py --output_dir /tmp/robot --seeds 0 1 2
    python tests/tools/measure_dreambooth.py --output_dir /tmp/robot --variant="--precondition_outputs 1" --variant=...

Each --variant is a run of the toy's long settings (toy/embeddings.txt, toy/train_long.txt) with these flags added, for
each seed; without any they are run as they are. --settings tests/toy/train.txt takes those of README's first command
instead. Samples are drawn with the base as it is on disk, whatever --quantize_base a variant has. Prints a Markdown
table, a row before any training and a row per run, and writes results.json and a before_after.png per run.

The columns, all with fixed seeds of their own:

- fidelity: how much 32 samples of "a photo of sks robot" are like unseen renderings of it, a real one being 1
- fidelity on new backgrounds: the same on three backgrounds that no image of the robot has
- background correct: how often these samples have the background that was asked for
- shapes correct: how often shape, color and background are right in samples of the world that the toy knew before
- leak: how much samples of the class prompt are like the robot
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(TOY))
from measure_toy import generate, random_captions, shape_prompts, what_is_right  # noqa: E402
from score import background_correct, subject_fidelity  # noqa: E402
from world import NEW_BACKGROUNDS, contact_sheet  # noqa: E402

PROMPT = "a photo of sks robot"
CLASS_PROMPT = "a photo of a shape"
PLACED = [f"{PROMPT} on a {background} background" for background in NEW_BACKGROUNDS]
SAMPLES = 32


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder, where everything goes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training")
    parser.add_argument("--settings", type=Path, default=TOY / "train_long.txt", help="file with the trainer's flags")
    parser.add_argument("--variant", action="append", default=[], help="flags to add to the trainer's; several times")
    parser.add_argument("--guidance_scale", type=float, default=1.25, help="of the samples that are measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the training")
    args = parser.parse_args()
    args.variant = args.variant or [""]
    return args


def train(args: argparse.Namespace, output_dir: Path, embeddings: Path, flags: list[str]) -> float:
    """Run the trainer as a user does; the seconds it took."""
    started = time.monotonic()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    is_quantized = any(flag.startswith("--quantize_base") for flag in flags)
    name = "tests/tools/quantized_on_cpu.py" if is_quantized else "train_dreambooth_sd3_lora_miniature.py"
    script = [name, f"@{args.settings.resolve()}"]
    where = [f"--data_df_path={embeddings.resolve()}", f"--output_dir={output_dir.resolve()}"]
    pinned = ["taskset", "-c", ",".join(map(str, range(args.threads)))] if args.threads < os.cpu_count() else []
    subprocess.run([*pinned, *launch, *script, *where, *flags], cwd=ROOT, check=True)
    return time.monotonic() - started


def measure(pipe: StableDiffusion3Pipeline, guidance_scale: float) -> tuple[dict[str, float], list[list[Image.Image]]]:
    """The table's columns, and three rows of samples: the prompt, on new backgrounds, and the world's shapes."""
    plain = generate(pipe, [PROMPT] * SAMPLES, guidance_scale=guidance_scale)
    prompts = [PLACED[i % len(PLACED)] for i in range(SAMPLES)]
    placed = generate(pipe, prompts, guidance_scale=guidance_scale)
    right = [background_correct(image, NEW_BACKGROUNDS[i % len(PLACED)]) for i, image in enumerate(placed)]
    asked = random_captions(3 * SAMPLES, seed=4)
    shapes = generate(pipe, shape_prompts(asked), guidance_scale=guidance_scale)
    columns = {
        "fidelity": subject_fidelity(plain),
        "fidelity on new backgrounds": subject_fidelity(placed),
        "background correct": float(np.mean(right)),
        "shapes correct": float(what_is_right(shapes, asked).all(axis=1).mean()),
        "leak": subject_fidelity(generate(pipe, [CLASS_PROMPT] * SAMPLES, guidance_scale=guidance_scale)),
    }
    return columns, [plain[:9], placed[:9], shapes[:9]]


def print_table(results: dict[str, dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for values in results.values() for name in values))
    print("\n| run | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for run, values in results.items():
        print(f"| {run} | " + " | ".join(f"{values[name]:.3f}" if name in values else "" for name in names) + " |")


def main() -> None:
    args = parse_args()
    if args.output_dir.exists():  # the trainer starts no new run in a folder with checkpoints
        raise SystemExit(f"--output_dir {args.output_dir} exists. Name a new folder.")
    args.output_dir.mkdir(parents=True)
    embeddings = args.output_dir / "embeddings.parquet"
    flags = [
        "@tests/toy/embeddings.txt",
        f"--output_path={embeddings.resolve()}",
        "--validation_prompt",
        PROMPT,
        *PLACED,
    ]
    subprocess.run([sys.executable, "compute_embeddings.py", *flags], cwd=ROOT, check=True)

    pipe = StableDiffusion3Pipeline.from_pretrained(TOY / "model", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    columns, before = measure(pipe, args.guidance_scale)
    results = {"before": columns}
    for variant, seed in itertools.product(args.variant, args.seeds):
        name = f"{variant or args.settings.stem}, seed {seed}"
        folder = args.output_dir / f"run-{len(results)}"
        seconds = train(args, folder, embeddings, [f"--seed={seed}", *shlex.split(variant)])
        pipe.load_lora_weights(folder)
        columns, after = measure(pipe, args.guidance_scale)
        results[name] = columns | {"seconds": seconds}
        rows = [row for pair in zip(before, after, strict=True) for row in pair]
        contact_sheet(rows, zoom=2).save(folder / "before_after.png")
        pipe.unload_lora_weights()
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))
    print_table(results)
    print(f"\nwrote {args.output_dir}/results.json and run-*/before_after.png: before, after; three prompts")


if __name__ == "__main__":
    main()
