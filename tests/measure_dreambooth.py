"""Measure on the toy that DreamBooth works: teach it the robot with the two real scripts, then look at samples.

    python tests/measure_dreambooth.py --output_dir /tmp/robot
    python tests/measure_dreambooth.py --output_dir /tmp/robot --variant="--precondition_outputs 1" --variant=...

Each --variant is a run of README's first command with these flags added; without any it is run as it is. Prints a
Markdown table, a row before any training and a row per variant, and writes results.json and a before_after.png per
variant. The columns, all with fixed seeds:

- fidelity: how much 32 samples of "a photo of sks robot" are like unseen renderings of it, a real one being 1
- new backgrounds: the same on three backgrounds that no picture of the robot has, and how often they are right
- shapes: how often shape, color and background are right in samples of the world that the toy knew before
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "tests" / "toy"
sys.path.insert(0, str(TOY))
from measure_toy import generate, random_captions, shape_prompts, what_is_right
from score import background_correct, subject_fidelity
from world import NEW_BACKGROUNDS, contact_sheet

PROMPT, CLASS_PROMPT = "a photo of sks robot", "a photo of a shape"
PLACED = [f"{PROMPT} on a {background} background" for background in NEW_BACKGROUNDS]
SAMPLES = 32
EMBEDDING_FLAGS = {
    "pretrained_model_name_or_path": TOY / "model", "local_data_dir": TOY / "robot", "prompt": PROMPT,
    "class_prompt": CLASS_PROMPT, "max_sequence_length": 16,
}  # fmt: skip
LAYERS = "to_k,to_q,to_v,to_out.0,add_k_proj,add_q_proj,add_v_proj,to_add_out,net.0.proj,net.2"
TRAINING_FLAGS = {  # README's first command, as a test asserts
    "pretrained_model_name_or_path": "tests/toy/model", "instance_data_dir": "tests/toy/robot", "seed": 0,
    "instance_prompt": PROMPT, "class_prompt": CLASS_PROMPT, "num_class_images": 64, "sample_batch_size": 32,
    "resolution": 64, "rank": 16, "lora_layers": LAYERS, "learning_rate": 3e-3, "lr_scheduler": "cosine",
    "lr_warmup_steps": 0, "train_batch_size": 8, "max_train_steps": 1800, "logit_mean": -0.5,
    "guidance_scale": 1.25, "num_inference_steps": 20,
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True, help="where everything goes")
    parser.add_argument("--variant", action="append", default=[], help="flags to add to the trainer's; several times")
    parser.add_argument("--without_prior_preservation", action="store_true", help="all variants without it")
    guidance_scale = TRAINING_FLAGS["guidance_scale"]
    parser.add_argument("--guidance_scale", type=float, default=guidance_scale, help="of class pictures and samples")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of the training")
    args = parser.parse_args()
    args.variant = args.variant or [""]
    return args


def command_line(flags: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def train(args: argparse.Namespace, output_dir: Path, embeddings: Path, variant: str) -> float:
    """Run the trainer as a user does; the seconds it took."""
    started = time.monotonic()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    script = [f"--num_cpu_threads_per_process={args.threads}", "train_dreambooth_sd3_lora_miniature.py"]
    flags = TRAINING_FLAGS | {"data_df_path": embeddings.resolve(), "output_dir": output_dir.resolve()}
    flags |= {"guidance_scale": args.guidance_scale}
    prior = [] if args.without_prior_preservation else ["--with_prior_preservation"]
    command = [*launch, *script, *prior, *command_line(flags), *shlex.split(variant)]
    subprocess.run(command, cwd=ROOT, check=True)
    return time.monotonic() - started


def measure(pipe: StableDiffusion3Pipeline, guidance_scale: float) -> tuple[dict[str, float], list[list[Image.Image]]]:
    """The table's columns, and two rows of samples: the prompt, and on new backgrounds."""
    plain = generate(pipe, [PROMPT] * SAMPLES, guidance_scale=guidance_scale)
    prompts = [PLACED[i % len(PLACED)] for i in range(SAMPLES)]
    placed = generate(pipe, prompts, guidance_scale=guidance_scale)
    right = [background_correct(image, NEW_BACKGROUNDS[i % len(PLACED)]) for i, image in enumerate(placed)]
    asked = random_captions(3 * SAMPLES, seed=4)
    shapes = generate(pipe, shape_prompts(asked), guidance_scale=guidance_scale)
    columns = {
        "fidelity": subject_fidelity(plain),
        "fidelity on new backgrounds": subject_fidelity(placed),
        "new backgrounds right": float(np.mean(right)),
        "shapes right": float(what_is_right(shapes, asked).all(axis=1).mean()),
    }
    return columns, [plain[:9], placed[:9], shapes[:9]]


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    embeddings = args.output_dir / "embeddings.parquet"
    started = time.monotonic()
    flags = [*command_line(EMBEDDING_FLAGS | {"output_path": embeddings}), "--validation_prompt", *PLACED]
    subprocess.run([sys.executable, ROOT / "compute_embeddings.py", *flags], check=True)
    print(f"embeddings: {time.monotonic() - started:.0f} s")

    pipe = StableDiffusion3Pipeline.from_pretrained(TOY / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    columns, before = measure(pipe, args.guidance_scale)
    results = {"before": columns}
    for number, variant in enumerate(args.variant):
        folder = args.output_dir / f"variant-{number}"
        seconds = train(args, folder, embeddings, variant)
        pipe.load_lora_weights(folder)
        columns, after = measure(pipe, args.guidance_scale)
        results[variant or "README's first command"] = columns | {"seconds": seconds}
        rows = [row for pair in zip(before, after, strict=True) for row in pair]
        contact_sheet(rows, zoom=2).save(folder / "before_after.png")
        pipe.unload_lora_weights()
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=2))

    names = [*columns, "seconds"]
    print("\n| run | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for run, values in results.items():
        print(f"| {run} | " + " | ".join(f"{values[name]:.2f}" if name in values else "" for name in names) + " |")
    print(f"\nwrote {args.output_dir}/results.json and variant-*/before_after.png: before, after; three prompts")


if __name__ == "__main__":
    main()
