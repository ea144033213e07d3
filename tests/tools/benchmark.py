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
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import numpy as np
import pyarrow.parquet as pq
import torch

from full_size import (
    Inputs,
    Row,
    embeddings_command,
    measured,
    new_logs,
    table,
    training_cells,
    training_command,
    versions,
)
from measuring import draw_images, measure_or_exit
from random_pipeline import write_pipeline

ROOT = HERE.parents[1]


COLUMNS = {  # the name in a row: the title in the table
    "what": "what",
    "VRAM allocated": "peak VRAM GiB",
    "VRAM reserved": "reserved GiB",
    "anonymous RAM": "anonymous RAM GiB",
    "RAM": "RAM GiB",
    "seconds": "seconds",
    "to first step": "seconds to the first step",
    "s/step": "s/step",
    "recomputed": "blocks recomputed",
    "Parquet MB": "Parquet MB",
    "T5 error": "T5 error",
}


def embeddings_row(args: argparse.Namespace, precision: str, images: Path) -> Row:
    """compute_embeddings.py, four prompts."""
    path = args.output_dir / f"{precision}.parquet"
    command = embeddings_command(Inputs(args.scripts_dir, args.pipeline_dir, images), path, precision)
    taken = measure_or_exit(command, args.output_dir / f"{precision}.log", vram_limit_gb=args.vram_limit_gb)
    return {"what": f"embeddings, {precision}", **measured(taken), "Parquet MB": path.stat().st_size / 1e6}


def training_row(args: argparse.Namespace, images: Path, name: str) -> Row:
    """The trainer, started by accelerate launch."""
    log = args.output_dir / f"run-{name}.log"
    logs = new_logs(args.output_dir / f"run-{name}")
    shutil.rmtree(logs.parent, ignore_errors=True)  # of an earlier benchmark: a new run wants a new folder
    settings = {
        "resolution": args.resolution,
        "max_train_steps": args.max_train_steps,
        "mixed_precision": args.mixed_precision,
    }
    embeddings = args.output_dir / f"{args.t5_precision[0]}.parquet"
    inputs = Inputs(args.scripts_dir, args.pipeline_dir, images)
    command = training_command(inputs, embeddings, logs, settings, shlex.split(args.training_flags))
    launch = ["-m", "accelerate.commands.launch", "--quiet", f"--num_cpu_threads_per_process={args.threads}"]
    taken = measure_or_exit(command, log, launcher=(sys.executable, *launch), vram_limit_gb=args.vram_limit_gb)
    return {"what": f"training, {name}", **training_cells(taken, log, logs)}


def t5_error(some: Path, exact: Path) -> float:
    """Relative L2 distance of T5's part of the embeddings, which follows CLIP's 77 tokens."""
    some, exact = (
        pq.read_table(path)["prompt_embeds"].combine_chunks().to_numpy_ndarray()[:, 77:].astype(np.float32)
        for path in (some, exact)
    )
    return float(np.linalg.norm(some - exact) / np.linalg.norm(exact))


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
    print(table(rows, COLUMNS))
    commit = ["git", "-C", args.scripts_dir, "rev-parse", "--short", "HEAD"]
    about = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "cpu": platform.processor() or platform.machine(), "threads": args.threads,
        "versions": versions(),
        "settings": {name: str(value) for name, value in vars(args).items() if not name.endswith("_dir")},
    }  # fmt: skip
    print(json.dumps(about))
    (args.output_dir / "benchmark.json").write_text(json.dumps(about | {"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
