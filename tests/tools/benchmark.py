"""Memory and speed of both scripts at a model's real size, with random weights.

    python tests/tools/benchmark.py --pipeline_dir /tmp/sd3 --output_dir /tmp/benchmark
    python tests/tools/benchmark.py --pipeline_dir /tmp/sd3 --output_dir /tmp/benchmark --vram_limit_gb 15 \
        --training_flags "--quantize_base nf4 --use_8bit_adam"
    python tests/tools/benchmark.py --pipeline_dir tiny --output_dir /tmp/growth --resolution 64 --images 5 50 500 5000

Writes a pipeline of the model's shapes into --pipeline_dir unless there is one (16 GB for SD3-medium), runs both
scripts as processes of their own, those of another checkout with --scripts_dir, and prints a Markdown table;
benchmark.json has the same, with versions and commit.
RAM is that of the largest process, sampled ten times a second; VRAM is PyTorch's own account.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import numpy as np
import pyarrow.parquet as pq
import torch

from measuring import draw_images, measure_or_exit
from random_pipeline import write_pipeline

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a photo of sks dog"
PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "accelerate", "peft")


def embeddings_row(args: argparse.Namespace, precision: str, images: Path) -> dict[str, object]:
    """compute_embeddings.py, two prompts."""
    path = args.output_dir / f"{precision}.parquet"
    flags = {"pretrained_model_name_or_path": args.pipeline_dir, "local_data_dir": images, "prompt": PROMPT}
    flags |= {"output_path": path, "t5_precision": precision}
    script = [args.scripts_dir / "compute_embeddings.py", *(f"--{name}={value}" for name, value in flags.items())]
    log = args.output_dir / f"{precision}.log"
    row = measure_or_exit([str(part) for part in script], log, vram_limit_gb=args.vram_limit_gb)
    return {"what": f"embeddings, {precision}"} | row | {"Parquet MB": path.stat().st_size / 1e6}


def training_row(args: argparse.Namespace, images: Path, name: str) -> dict[str, object]:
    """The trainer through accelerate launch; seconds come from the wall times of TensorBoard's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = args.output_dir / f"run-{name}"
    flags = {
        "pretrained_model_name_or_path": args.pipeline_dir, "instance_data_dir": images, "instance_prompt": PROMPT,
        "data_df_path": args.output_dir / f"{args.t5_precision[0]}.parquet", "output_dir": folder, "seed": 0,
        "resolution": args.resolution, "train_batch_size": 1, "max_train_steps": args.max_train_steps,
        "lr_warmup_steps": 0, "mixed_precision": args.mixed_precision, "logging_dir": f"logs-{time.time():.0f}",
    }  # fmt: skip
    script = [f"--{flag}={value}" for flag, value in flags.items()]
    script += ["--center_crop", *shlex.split(args.training_flags)]
    launch = ["-m", "accelerate.commands.launch", "--quiet", f"--num_cpu_threads_per_process={args.threads}"]
    command = [str(args.scripts_dir / "train_dreambooth_sd3_lora_miniature.py"), *script]
    log = args.output_dir / f"run-{name}.log"
    row = measure_or_exit(command, log, launcher=(sys.executable, *launch), vram_limit_gb=args.vram_limit_gb)
    logs = folder / flags["logging_dir"]
    logs = [EventAccumulator(str(file)).Reload() for file in logs.rglob("events.out*")]
    [losses] = [log.Scalars("loss") for log in logs if "loss" in log.Tags()["scalars"]]
    times = [event.wall_time for event in losses]
    row |= {"to first step": times[0] - row["started"], "s/step": (times[-1] - times[0]) / max(1, len(times) - 1)}
    recomputed = re.findall(r"gradient checkpointing: ([^,]+),", log.read_text())
    return {"what": f"training, {name}"} | row | {"recomputed": "".join(recomputed[:1])}


def t5_error(some: Path, exact: Path) -> float:
    """Relative L2 distance of T5's part of the embeddings, which follows CLIP's 77 tokens."""
    some, exact = (
        pq.read_table(path)["prompt_embeds"].combine_chunks().to_numpy_ndarray()[:, 77:].astype(np.float32)
        for path in (some, exact)
    )
    return float(np.linalg.norm(some - exact) / np.linalg.norm(exact))


def print_table(rows: list[dict[str, object]]) -> None:
    names = ["what", "VRAM allocated", "VRAM reserved", "anonymous RAM", "RAM", "seconds", "to first step", "s/step",
             "recomputed", "Parquet MB", "T5 error"]  # fmt: skip
    names = [name for name in names if any(name in row for row in rows)]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        cells = [row.get(name, "") for name in names]
        print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")


def parse_args() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("--model", default="sd3-medium", choices=["sd3-medium", "sd3.5-medium", "sd3.5-large"])
    parser.add_argument("--pipeline_dir", type=Path, required=True, help="pipeline; written if it is not there")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--scripts_dir", type=Path, default=ROOT, help="folder of the two scripts to measure")
    parser.add_argument("--t5_precision", nargs="+", default=["int8", "exact"], choices=["int8", "exact"])
    parser.add_argument("--resolution", type=int, default=1024 if on_gpu else 256)
    parser.add_argument("--max_train_steps", type=int, default=20 if on_gpu else 3)
    parser.add_argument("--mixed_precision", default="fp16" if on_gpu else "bf16")
    parser.add_argument("--training_flags", default="--use_8bit_adam", help="more flags of the trainer")
    parser.add_argument("--vram_limit_gb", type=float, default=0, help="imitate a small GPU; 0: the whole one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads, each pinned")
    parser.add_argument("--images", type=int, nargs="+", default=[5], help="numbers of images; each trains twice")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # alone on a CPU, the trainer takes all
    if not (args.pipeline_dir / "model_index.json").exists():
        write_pipeline(args.pipeline_dir, args.model)
    everything = draw_images(args.output_dir / "images", max(args.images))
    rows = [embeddings_row(args, precision, everything) for precision in args.t5_precision]
    if {"int8", "exact"} <= {*args.t5_precision}:
        int8, exact = args.output_dir / "int8.parquet", args.output_dir / "exact.parquet"
        rows[args.t5_precision.index("int8")]["T5 error"] = t5_error(int8, exact)
    for count in args.images:
        images = everything if count == max(args.images) else draw_images(args.output_dir / f"{count}", count)
        rows += [training_row(args, images, f"{count} images{again}") for again in ("", " again")]
    print_table(rows)
    commit = ["git", "-C", args.scripts_dir, "rev-parse", "--short", "HEAD"]
    about = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, 
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "cpu": platform.processor() or platform.machine(), "threads": args.threads,
        "versions": {name: version(name) for name in PACKAGES},
        "settings": {name: str(value) for name, value in vars(args).items() if not name.endswith("_dir")},
    }  # fmt: skip
    print(json.dumps(about))
    (args.output_dir / "benchmark.json").write_text(json.dumps(about | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
