"""Memory and speed of both scripts at a model's real size, with random weights.

    python tests/tools/benchmark.py --pipeline_dir /tmp/sd3 --output_dir /tmp/benchmark
    python tests/tools/benchmark.py --pipeline_dir /tmp/sd3 --output_dir /tmp/benchmark --vram_limit_gb 15 \
        --training_flags "--quantize_base nf4 --use_8bit_adam"
    python tests/tools/benchmark.py --pipeline_dir tiny --output_dir /tmp/growth --resolution 64 --images 5 50 500 5000

Writes a pipeline of the model's shapes into --pipeline_dir unless there is one (16 GB for SD3-medium), runs both
scripts as processes of their own, those of another checkout with --scripts_dir, and prints a Markdown table;
benchmark.json has the same, with versions and commit.
RAM is that of the largest process, sampled 20 times a second from /proc; VRAM is PyTorch's own account.
"""

import argparse
import atexit
import json
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a photo of sks dog"
PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "accelerate", "peft")


def run_script(vram_limit_gb: str, *command: str) -> None:
    """What the measured processes do: the script, with a part of the GPU, and at the end PyTorch's peaks."""
    sys.path.insert(0, str(Path(command[0]).parent))
    if torch.cuda.is_available():
        if float(vram_limit_gb):
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, float(vram_limit_gb) * 1e9 / whole))

        def report() -> None:
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            print(f"\nVRAM {allocated / 2**30:.2f} {reserved / 2**30:.2f}", flush=True)

        atexit.register(report)
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


def write_pipeline(folder: Path, model: str) -> None:
    """A Stable Diffusion 3 of real shapes with random fp16 weights, without ever holding more than one part of it."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    import tiny_pipeline
    from step_cost import MODELS, VAE

    pipeline = tiny_pipeline.build()
    index = folder / "model_index.json"
    for name in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        getattr(pipeline, name).save_pretrained(folder / name)

    def clip(width: int, layers: int, heads: int, activation: str) -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=49408, hidden_size=width, intermediate_size=4 * width, projection_dim=width,
            num_hidden_layers=layers, num_attention_heads=heads, hidden_act=activation, pad_token_id=0,
            bos_token_id=pipeline.tokenizer.bos_token_id, eos_token_id=pipeline.tokenizer.eos_token_id,
        ))  # fmt: skip

    t5 = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    t5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1}
    parts = {
        "text_encoder": lambda: clip(768, 12, 12, "quick_gelu"), "text_encoder_2": lambda: clip(1280, 32, 20, "gelu"),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(**t5)), "vae": lambda: AutoencoderKL(**VAE),
        "transformer": lambda: SD3Transformer2DModel(**MODELS[model]),
    }  # fmt: skip
    for name, build in parts.items():
        print(f"writing {folder / name}", flush=True)
        with torch.device("meta"):
            part = build()
        part = part.half().to_empty(device="cpu")
        fill(part)
        part.save_pretrained(folder / name, max_shard_size="5GB")
    pipeline.register_to_config(_name_or_path=None)
    index.write_text(pipeline.to_json_string())


@torch.no_grad()
def fill(part: torch.nn.Module) -> None:
    """Random numbers of the size that PyTorch begins with, ones for norms, zeros for biases."""
    generator = torch.Generator().manual_seed(0)
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.fill_(float(name == "weight"))
            else:
                bound = 3 if isinstance(module, torch.nn.Embedding) else 1 / parameter[0].numel()
                parameter.uniform_(-(bound**0.5), bound**0.5, generator=generator)
    for name, buffer in part.named_buffers():
        if "position_ids" in name:
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
        else:
            buffer.zero_()


def measure(command: list[str], log: Path) -> dict[str, float]:
    """Run a command; its seconds, and the peaks of the largest process below it in GiB."""
    started, peaks = time.time(), {"RssAnon": 0, "VmRSS": 0}
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    lines = Path(f"/proc/{each.pid}/status").read_text().splitlines()
                except (OSError, psutil.Error):
                    continue
                found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(tuple(peaks))}
                peaks = {name: max(peak, int(found.get(name, 0))) for name, peak in peaks.items()}
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)}\nended with {process.returncode}:\n{log.read_text()[-3000:]}")
    vram = [line.split()[1:] for line in log.read_text().splitlines() if line.startswith("VRAM ")]
    numbers = dict(zip(("VRAM allocated", "VRAM reserved"), map(float, vram[-1]), strict=True)) if vram else {}
    ram = {"anonymous RAM": peaks["RssAnon"] / 2**20, "RAM": peaks["VmRSS"] / 2**20}
    return numbers | ram | {"started": started, "seconds": time.time() - started}


def embeddings_row(args: argparse.Namespace, precision: str, images: Path) -> dict[str, object]:
    """compute_embeddings.py, two prompts."""
    path = args.output_dir / f"{precision}.parquet"
    flags = {"pretrained_model_name_or_path": args.pipeline_dir, "local_data_dir": images, "prompt": PROMPT}
    flags |= {"output_path": path, "t5_precision": precision}
    script = [args.scripts_dir / "compute_embeddings.py", *(f"--{name}={value}" for name, value in flags.items())]
    command = [sys.executable, __file__, "--run", args.vram_limit_gb, *script]
    row = measure([str(part) for part in command], args.output_dir / f"{precision}.log")
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
    command = [sys.executable, *launch, __file__, "--run", args.vram_limit_gb]
    command += [args.scripts_dir / "train_dreambooth_sd3_lora_miniature.py", *script]
    row = measure([str(part) for part in command], args.output_dir / f"run-{name}.log")
    logs = folder / flags["logging_dir"]
    logs = [EventAccumulator(str(file)).Reload() for file in logs.rglob("events.out*")]
    [losses] = [log.Scalars("loss") for log in logs if "loss" in log.Tags()["scalars"]]
    times = [event.wall_time for event in losses]
    row |= {"to first step": times[0] - row["started"], "s/step": (times[-1] - times[0]) / max(1, len(times) - 1)}
    recomputed = re.findall(r"(\d+ of \d+) blocks", (args.output_dir / f"run-{name}.log").read_text())
    return {"what": f"training, {name}"} | row | {"recomputed": "".join(recomputed[:1])}


def t5_error(some: Path, exact: Path) -> float:
    """Relative L2 distance of T5's part of the embeddings, which follows CLIP's 77 tokens."""
    some, exact = (
        pq.read_table(path)["prompt_embeds"].combine_chunks().to_numpy_ndarray()[:, 77:].astype(np.float32)
        for path in (some, exact)
    )
    return float(np.linalg.norm(some - exact) / np.linalg.norm(exact))


def draw_images(folder: Path, count: int) -> Path:
    """Images of 64 x 64 pixels, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number:05}.png")
    return folder


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
    if sys.argv[1:2] == ["--run"]:
        run_script(*sys.argv[2:])
    else:
        main()
