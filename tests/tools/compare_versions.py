"""Show that another checkout of this project computes the same embeddings and trains the same LoRA, bit for bit.

    python tests/tools/compare_versions.py --other_dir /path/to/checkout

Both versions get a tiny pipeline, five photos and the same flags, and train for four steps in each configuration, on
the CPU. Compared are all tensors of the LoRA and of the checkpoints, the optimizer's hyperparameters, and every PNG.
Each version runs in a process of its own, which imports the libraries once for all configurations. Exits with 1 if
anything differs.
"""

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType

# Threads would only slow tiny models down, and no file is to appear in the other checkout, not even a __pycache__.
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # of a launcher: the flags alone set the precision

import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
TRAINER = "train_dreambooth_sd3_lora_miniature"
LORA_NAME, STATE_NAME = "pytorch_lora_weights.safetensors", "training_state.pt"
PROMPT, CLASS_PROMPT, NEGATIVE_PROMPT = "a photo of sks dog", "a photo of a dog", "blurry"
PREVIEW_PROMPTS = ("sks dog in a bucket", "a painting of sks dog")

COMMON = (
    "--resolution 64 --train_batch_size 1 --max_train_steps 4 --checkpointing_steps 2 --seed 1 --report_to none "
    "--learning_rate 1e-3 --lr_warmup_steps 0 --rank 8 --num_inference_steps 2 --num_validation_images 1"
)
# Flags by configuration; they override COMMON. {own} is the folder of the version's own runs, {sd35} a pipeline like
# SD3.5. A run may use what an earlier one has written.
CONFIGURATIONS = {
    "rank-alpha-cosine-accumulation": "--lora_alpha 4 --lr_scheduler cosine --gradient_accumulation_steps 2",
    "resume": (
        "--lora_alpha 4 --lr_scheduler cosine --gradient_accumulation_steps 2 "
        "--resume_from_checkpoint {own}/rank-alpha-cosine-accumulation/checkpoint-2"
    ),
    "pretrained-lora": "--lora_alpha 16 --pretrained_lora_path {own}/rank-alpha-cosine-accumulation",
    "four-layers-weighting-mode": "--lora_layers to_k,to_q,to_v,to_out.0 --weighting_scheme mode",
    "layer-pattern-precondition": "--lora_layers transformer_blocks.1.attn.* --precondition_outputs",
    "buckets-batch-2": "--aspect_ratio_buckets 64,64;48,80;80,48 --train_batch_size 2",
    "masks-center-crop": "--alpha_mask --center_crop --train_batch_size 2",
    "random-flip-cosmap-warmup": "--random_flip --weighting_scheme cosmap --lr_scheduler linear --lr_warmup_steps 2",
    "dropout": "--lora_dropout 0.3 --caption_dropout 0.5",
    "prior-preservation": (
        f"--with_prior_preservation --class_prompt '{CLASS_PROMPT}' --num_class_images 3 --sample_batch_size 2 "
        "--prior_loss_weight 0.5"
    ),
    "previews": (
        f"--validation_prompt {shlex.join(PREVIEW_PROMPTS)} --negative_prompt {NEGATIVE_PROMPT} --validation_steps 2"
    ),
    "8bit-adam": "--use_8bit_adam --rank 64",  # the smallest rank at which bitsandbytes keeps these states in 8 bit
    "paged-8bit-adam": "--optimizer paged_adamw_8bit --rank 64 --adam_beta1 0.8 --adam_weight_decay 0.1",
    "fp16": "--mixed_precision fp16",
    "bf16-gradient-checkpointing": "--mixed_precision bf16 --gradient_checkpointing",
    "sd35": "--pretrained_model_name_or_path {sd35} --weighting_scheme sigma_sqrt",
    "nf4": "--quantize_base nf4 --mixed_precision bf16",  # last: what lets it run on a CPU stays patched
}


# ------------------------------------------------------------------------------------------------------------ inputs


def make_photos(folder: Path) -> Path:
    """Write five photos of different shapes: one with an alpha channel, one with a mask, one with a caption."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = [("a.jpg", 96, 128), ("b.png", 128, 96), ("c.png", 80, 80), ("d.webp", 100, 75), ("e.bmp", 64, 64)]
    for name, height, width in shapes:
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        mask = Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8))
        if name == "a.jpg":
            mask.save(folder / "a.mask.png")
        if name == "b.png":
            photo.putalpha(mask)
        photo.save(folder / name)
    (folder / "c.txt").write_text("sks dog asleep")
    return folder


def make_pipelines(folder: Path) -> None:
    """Write folder/sd3 and folder/sd35, tiny pipelines with random weights."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import tiny_pipeline

    tiny_pipeline.save(folder / "sd3", "sd3")
    tiny_pipeline.save(folder / "sd35", "sd35")


def make_jobs(version: str, output_dir: Path) -> list[dict]:
    """Return one dictionary per training run of a version, "this" or "other": its flags and its output folder."""
    own = output_dir / version
    places = {"own": own, "sd35": output_dir / "sd35"}
    inputs = ["--pretrained_model_name_or_path", str(output_dir / "sd3"), "--instance_prompt", PROMPT]
    inputs += ["--instance_data_dir", str(output_dir / "photos"), "--data_df_path", str(own / "embeddings.parquet")]
    jobs = []
    for name, text in CONFIGURATIONS.items():
        flags = [flag.format(**places) for flag in shlex.split(f"{COMMON} {text}")]
        jobs.append({"folder": str(own / name), "flags": [*inputs, *flags, "--output_dir", str(own / name)]})
    return jobs


# ---------------------------------------------------------------------------------- running a version, in a process


def run_jobs(checkout: Path, jobs: list[dict]) -> None:
    """Train every job in this process with the trainer of a checkout; a job that ended well has a file `finished`."""
    sys.path[:1] = [str(checkout), str(checkout / "tests" / "tools"), str(checkout / "tests")]  # in place of HERE
    trainer = importlib.import_module(TRAINER)
    assert Path(trainer.__file__).parent == checkout, f"{trainer.__file__} is not in {checkout}"
    for job in jobs:
        if "--quantize_base" in job["flags"]:
            importlib.import_module("quantized_on_cpu").allow()
        run_job(trainer, Path(job["folder"]), job["flags"])


def run_job(trainer: ModuleType, folder: Path, flags: list[str]) -> None:
    """Train once, as in a new process: accelerate and the trainer leave state and signal handlers behind."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals() & {1, 2, 15}}
    with open(f"{folder}.log", "w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            trainer.main(trainer.parse_args(flags))
            (folder / "finished").touch()
        except (Exception, SystemExit):  # the other jobs go on
            traceback.print_exc()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_version(checkout: Path, version: str, output_dir: Path) -> None:
    """Compute the embeddings and train all configurations with the scripts of a checkout, in its folder."""
    own = output_dir / version
    own.mkdir()
    table, jobs = own / "embeddings.parquet", own / "jobs.json"
    jobs.write_text(json.dumps(make_jobs(version, output_dir)))
    command = ["compute_embeddings.py", "--pretrained_model_name_or_path", output_dir / "sd3", "--prompt", PROMPT]
    command += ["--local_data_dir", output_dir / "photos", "--output_path", table, "--t5_precision", "exact"]
    command += ["--class_prompt", CLASS_PROMPT, "--negative_prompt", NEGATIVE_PROMPT]
    command += ["--validation_prompt", *PREVIEW_PROMPTS]
    run_python(command, checkout, Path(f"{table}.log"))
    run_python([HERE / "compare_versions.py", "--run", checkout, jobs], checkout, own / "process.log")


def run_python(command: list[str | Path], folder: Path, log: Path) -> None:
    """Run Python in a folder, with its output in a log. A failure shows when the results are read."""
    with open(log, "w") as file:
        subprocess.run([sys.executable, *map(str, command)], cwd=folder, stdout=file, stderr=file, check=False)


# -------------------------------------------------------------------------------------------------------- comparison


def flatten(name: str, value: object, values: dict[str, object]) -> None:
    """Add everything in a nested state to `values`, by its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            flatten(f"{name}/{key}", item, values)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            flatten(f"{name}/{number}", item, values)
    else:
        values[name] = value


def read_run(folder: Path, steps: tuple[int, ...]) -> dict[str, object]:
    """Return the tensors and hyperparameters in the LoRA and the checkpoints of these steps, and the PNGs' bytes."""
    if not (folder / "finished").exists():
        raise FileNotFoundError(f"the training in {folder} did not end well")
    values: dict[str, object] = {}
    flatten(LORA_NAME, load_file(folder / LORA_NAME), values)
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        flatten(f"{checkpoint.name}/{LORA_NAME}", load_file(checkpoint / LORA_NAME), values)
        state = torch.load(checkpoint / STATE_NAME, weights_only=True)
        for part in ("lora", "optimizer", "scaler"):
            flatten(f"{checkpoint.name}/{part}", state[part], values)
    for path in folder.rglob("*.png"):
        values[path.name] = path.read_bytes()
    return values


def read_embeddings(path: Path) -> dict[str, object]:
    """Return the columns of the Parquet file, embeddings as tensors."""
    table = pq.read_table(path)
    values: dict[str, object] = {"prompt": table["prompt"].to_pylist(), "hashes": table["image_hashes"].to_pylist()}
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        rows = [chunk.to_numpy_ndarray() for chunk in table[name].chunks]
        values[name] = torch.from_numpy(np.concatenate(rows))  # (prompts, L, D) or (prompts, P)
    return values


def same(one: object, other: object) -> bool:
    """Return whether two values are equal, tensors to the bit: NaN equals NaN, and 0 is not -0."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype
        return alike and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    return type(one) is type(other) and one == other


def report(name: str, read: Callable[[Path], dict[str, object]], this: Path, other: Path) -> bool:
    """Print a line on whether both versions' results are equal, and return whether they are."""
    results = []
    for path in (this, other):
        try:
            results.append(read(path))
        except Exception as error:  # of the file system, safetensors, pickle or Arrow: they share no class
            print(f"{name:45} FAILED     {error!r}")
            print_log(path)
    if len(results) < 2:
        return False
    values, other_values = results
    differing = []
    for key in sorted(values.keys() | other_values.keys()):
        if key not in values or key not in other_values or not same(values[key], other_values[key]):
            differing.append(key)
    tensors = sum(isinstance(value, Tensor) for value in values.values())
    images = sum(isinstance(value, bytes) for value in values.values())
    line = f"{name:45} {'DIFFERENT' if differing else 'equal':10} {tensors} tensors, {images} PNGs"
    if differing:
        line += f"; {len(differing)} values differ, first: {differing[0]}"
    print(line, flush=True)
    return not differing


def print_log(path: Path) -> None:
    """Print the last lines that a run wrote, or else those of the process that never came to it."""
    log = Path(f"{path}.log")
    log = log if log.exists() else path.parent / "process.log"
    print(f"  {log}:")
    for line in log.read_text(errors="replace").splitlines()[-8:]:
        print(f"    {line}")


def compare(this_dir: Path, other_dir: Path, output_dir: Path) -> bool:
    """Run both versions, print a line per configuration, and return whether all are equal."""
    make_photos(output_dir / "photos")
    make_pipelines(output_dir)
    run_version(other_dir, "other", output_dir)
    run_version(this_dir, "this", output_dir)
    this, other = output_dir / "this", output_dir / "other"
    table = "embeddings.parquet"
    equal = [report("embeddings", read_embeddings, this / table, other / table)]
    for name, flags in CONFIGURATIONS.items():
        steps = (4,) if "--resume_from_checkpoint" in flags else (2, 4)
        equal.append(report(name, partial(read_run, steps=steps), this / name, other / name))
    print(f"{sum(equal)} of {len(equal)} are equal")
    return all(equal)


def parse_args() -> Namespace:
    """Return the command line; --run is how this script starts itself for one version."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--other_dir", type=Path, help="checkout to compare this one with")
    what.add_argument("--run", nargs=2, type=Path, metavar=("CHECKOUT", "JOBS"), help=argparse.SUPPRESS)
    parser.add_argument("--output_dir", type=Path, help="new folder to keep everything in; unset: a temporary one")
    return parser.parse_args()


def main() -> int:
    """Compare both versions, or run one of them."""
    args, started = parse_args(), time.monotonic()
    if args.run:
        run_jobs(args.run[0], json.loads(args.run[1].read_text()))
        return 0
    if not (args.other_dir / f"{TRAINER}.py").is_file():
        raise SystemExit(f"--other_dir {args.other_dir} has no {TRAINER}.py.")
    with tempfile.TemporaryDirectory() as temporary:
        output_dir = (args.output_dir or Path(temporary, "runs")).resolve()
        if output_dir.exists():  # results of an earlier comparison could pass for those of this one
            raise SystemExit(f"--output_dir {args.output_dir} exists. Name a new folder.")
        output_dir.mkdir(parents=True)
        equal = compare(HERE.parents[1], args.other_dir.resolve(), output_dir)
    print(f"{time.monotonic() - started:.0f} s")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
