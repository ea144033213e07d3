"""Kill the trainer with SIGKILL, resume it each time, and compare what it leaves with that of an undisturbed run.

    python tests/tools/kill.py --kills 50 --rounds 5

At random moments, and while each kind of file is being written. Each attempt is a process forked from this one, which
has the libraries loaded, so that it starts at once.
"""
# ruff: noqa: E402 - the libraries read the environment when they are imported

import argparse
import gc
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # with threads no process forks
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image
from safetensors import safe_open
from tqdm.auto import tqdm

import compute_embeddings as embed
import tiny_pipeline
import train_dreambooth_sd3_lora_miniature as trainer

CLASS_PROMPT, PREVIEW_PROMPT = "a photo of a dog", "sks dog in a bucket"
AIMS = {  # what is to be seen in the output folder when the kill comes
    "latents": "latents/.unfinished-*/*.safetensors",
    "class image": "class_images-*/.unfinished-*/*.png",
    "preview": "samples/.unfinished-*/step-*.png",
    "sheet of previews": "samples/.unfinished-*/progress.png",
    "LoRA of a checkpoint": f"checkpoint-*/.unfinished-*/{trainer.LORA_NAME}",
    "state of a checkpoint": f"checkpoint-*/.unfinished-*/{trainer.STATE_NAME}",
    "LoRA": f".unfinished-*/{trainer.LORA_NAME}",
    "card": ".unfinished-*/README.md",
}
LAST_STEP = 8
HANGS_AFTER = 120  # seconds
SLOW_SYNC = 0.02  # seconds that a disk takes, so that what is being written is seen


def make_inputs(folder: Path) -> list[str]:
    """A tiny pipeline, three images and their embeddings; the trainer's flags for them."""
    model, photos = tiny_pipeline.save(folder / "model"), folder / "photos"
    photos.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    shared = [f"--pretrained_model_name_or_path={model}", f"--class_prompt={CLASS_PROMPT}"]
    shared += [f"--validation_prompt={PREVIEW_PROMPT}"]
    table = folder / "embeddings.parquet"
    embed.main(embed.parse_args([*shared, f"--local_data_dir={photos}", f"--output_path={table}", "--no_t5"]))
    flags = ["--instance_prompt=a photo of sks dog", f"--instance_data_dir={photos}", f"--data_df_path={table}"]
    flags += ["--resolution=64", "--train_batch_size=1", f"--max_train_steps={LAST_STEP}", "--rank=64"]
    flags += ["--use_8bit_adam", "--seed=0", "--report_to=none", "--checkpointing_steps=2"]
    flags += ["--checkpoints_total_limit=2", "--with_prior_preservation", "--num_class_images=2"]
    flags += ["--sample_batch_size=1", "--validation_steps=4", "--num_validation_images=1", "--num_inference_steps=1"]
    return [*shared, *flags, "--resume_from_checkpoint=latest"]


def train(flags: list[str], output: Path, sync: Callable[[int], None]) -> None:
    """Be a process that trains, on a disk that syncs so. What it says goes into a file beside the output folder."""
    signal.alarm(HANGS_AFTER)
    tqdm.set_lock(threading.RLock())  # tqdm's own is shared with forked processes, and one was killed with it
    log = os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.fsync = sync
    try:
        trainer.main(trainer.parse_args([*flags, f"--output_dir={output}"]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def attempt(flags: list[str], output: Path, kill_after: float | None = None, aim: str = "") -> bool:
    """Train, killed after so many seconds, or so many after a file like `aim` is seen; whether it came to the end."""
    fsync = os.fsync

    def slow_sync(descriptor: int) -> None:
        time.sleep(SLOW_SYNC)
        fsync(descriptor)

    child = os.fork()
    if child == 0:
        train(flags, output, slow_sync if aim else fsync)
    if kill_after is not None and (not aim or seen(output, aim, child)):
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    exit_code = os.waitstatus_to_exitcode(status)
    if exit_code not in (0, -signal.SIGKILL):
        said = Path(f"{output}.log").read_text(errors="replace")
        raise SystemExit(f"an attempt failed with exit code {exit_code}:\n{said[-3000:]}")
    return exit_code == 0


def seen(output: Path, aim: str, child: int) -> bool:
    """Wait for a file; False if the process ends without it."""
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        with suppress(FileNotFoundError):  # of a folder that is renamed or removed while it is searched
            if any(output.glob(aim)):
                return True
    return False


def read_tensors(path: Path) -> tuple[dict, dict]:
    """Metadata but for the title, the folder's name, and the date, and tensors; safetensors shuffles metadata."""
    with safe_open(path, "np") as file:
        varying = ("modelspec.title", "modelspec.date")
        metadata = {key: value for key, value in file.metadata().items() if key not in varying}
        return metadata, {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def check(output: Path, whole: Path, complete: bool) -> None:
    """Every file but checkpoints and unfinished ones is that of the undisturbed run, byte for byte.

    Every checkpoint that counts as one can be read. A run that is complete lacks no file but previews on the way.
    """
    for folder in trainer.list_checkpoints(output):
        assert trainer.read_state(folder)["global_step"] == trainer.step_of(folder), f"{folder} is of another step"
        assert read_tensors(folder / trainer.LORA_NAME)[1], f"{folder} has an empty LoRA"
    if complete:
        assert not list(output.rglob(".unfinished-*")), "something unfinished is left"
        assert lasting_files(whole) <= lasting_files(output), f"without {lasting_files(whole) - lasting_files(output)}"
    for path in output.rglob("*.*"):
        name = path.relative_to(output)
        if path.is_dir() or "checkpoint-" in str(name) or "/." in f"/{name}":
            continue
        if path.suffix == ".safetensors":
            assert read_tensors(path) == read_tensors(whole / name), f"another {name}"
        elif name.name == "README.md":
            assert path.read_text().replace(output.name, whole.name) == (whole / name).read_text(), "another card"
        elif name.name == "progress.png":
            Image.open(path).load()  # it lacks a preview that a kill has cost
        else:
            assert path.read_bytes() == (whole / name).read_bytes(), f"another {name}"


def lasting_files(output: Path) -> set[Path]:
    """The names of a complete run's files, without the previews that a kill can cost."""
    files = {path.relative_to(output) for path in output.rglob("*.*") if path.is_file()}
    previews = {path for path in files if path.name.startswith("step-")}
    last_previews = {path for path in previews if path.name.startswith(f"step-{LAST_STEP:06}")}
    return files - previews | last_previews


def survive(kills: int, rounds: int, seed: int = 0) -> tuple[int, int]:
    """Kill so often at random, and so often while each kind of file is written; (attempts cut short, runs ended)."""
    rng, cut, completed = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        flags, whole = make_inputs(Path(folder)), Path(folder, "whole")
        gc.freeze()  # what is loaded is not looked through in each attempt
        started = time.monotonic()
        attempt(flags, whole)
        length = time.monotonic() - started
        for aim in [""] * kills + [*AIMS.values()] * rounds:
            while attempt(flags, Path(folder, f"run-{completed}"), rng.uniform(0, SLOW_SYNC if aim else length), aim):
                check(Path(folder, f"run-{completed}"), whole, complete=True)
                completed += 1  # before the kill came: again, in another folder
            check(Path(folder, f"run-{completed}"), whole, complete=False)
            cut += 1
        attempt(flags, Path(folder, f"run-{completed}"))
        check(Path(folder, f"run-{completed}"), whole, complete=True)
    return cut, completed + 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how often to kill at random")
    parser.add_argument("--rounds", type=int, default=5, help="how often to kill while each kind of file is written")
    args = parser.parse_args()
    cut, completed = survive(args.kills, args.rounds)
    print(f"{cut} kills survived in {completed} runs: what they leave is that of an undisturbed run, to the byte")
