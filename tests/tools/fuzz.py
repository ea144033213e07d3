"""Give both scripts random command lines, and count those that end in a traceback instead of one message.

    python tests/tools/fuzz.py --count 500 --seed 0

Flags are those of the scripts' own parsers; values are good ones, borderline ones and absurd ones. Each command line
runs in this process as `python SCRIPT ...` would, on a tiny project.
"""

import argparse
import contextlib
import io
import os
import random
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import compute_embeddings as embed
import tiny_pipeline
import train_dreambooth_sd3_lora_miniature as trainer

PROMPT, CLASS_PROMPT, PREVIEW_PROMPT = "a photo of sks dog", "a dog", "sks dog in a bucket"
SCRIPTS = {"compute_embeddings": embed, "train": trainer}
REQUIRED = {
    "compute_embeddings": [
        "--pretrained_model_name_or_path=model",
        "--local_data_dir=photos",
        "--output_path=e.parquet",
    ],
    "train": [
        "--pretrained_model_name_or_path=model",
        "--instance_data_dir=photos",
        "--data_df_path=embeddings.parquet",
        f"--instance_prompt={PROMPT}",
        "--resolution=64",
        "--max_train_steps=1",
    ],
}
INTEGERS = [
    "0",
    "-1",
    "1",
    "2",
    "16",
    "64",
    "77",
    "512",
    "513",
    "1000",
    str(10**7),
    str(10**9),
    str(2**63),
    str(2**64),
]
INTEGERS += ["²", "٣", "1e3", "1.5", "ten", "", " 7", "1_0", "0x10", "nan", "9" * 5000, "True"]
FLOATS = ["0", "1", "0.5", "-1", "1e-4", "0.999", "1.0000001", "nan", "inf", "-inf", "1e30", "1e31", "1e308", "1e400"]
FLOATS += ["1e-30", "1e-320", "-0.0", "½", "", "1,5", "9" * 5000]
TEXTS = [
    PROMPT,
    CLASS_PROMPT,
    PREVIEW_PROMPT,
    "",
    " ",
    "a zebra",
    "犬 ä б",
    "a\nb",
    "\udcff",
    "--",
    "-",
    "@",
    "%s %(x)s",
]
TEXTS += ["{}", "'", '"', "\x1b[31m", "x" * 5000, "hf_secret", "0", "None", "a,b", ",", "*", "[", "..", "../..", "\\"]
PATHS = ["photos", "model", "embeddings.parquet", "out", "missing", "missing/deep", "photos/a.png", "empty", "lora"]
PATHS += [
    "/dev/null",
    "/proc/self",
    "/dev/null/x",
    "ä б犬",
    "a b",
    "x" * 300,
    "\udcff",
    "~",
    "*",
    "pipe",
    "loop",
    "text",
]
SPECIAL = {  # values that mean something to a flag that takes any text
    "pretrained_model_name_or_path": ["model", "owner/name", "owner", "a/b/c", "model/", "./model", "photos", "lora"],
    "pretrained_lora_path": ["lora", "lora/pytorch_lora_weights.safetensors", "owner/name", "photos/a.png", "missing"],
    "lora_layers": ["to_q", "attn2.*", "ff.*", "*", "to_q,to_q", "to_q,", "[", "to_x", "attn.to_k,add_k_proj"],
    "aspect_ratio_buckets": ["64,64", "64,96;96,64", "64,96;", "0,64", "-64,64", "64", "63,64", "auto", "64,9999999"],
    "resume_from_checkpoint": ["latest", "checkpoint-1", "out/checkpoint-1", "checkpoint-²", "checkpoint-9", "torn"],
    "variant": ["fp16", "fp32", "*", "../x"],
    "revision": ["main", "v1", "refs/pr/1"],
    "hub_token": ["hf_secret", " hf_secret\r\n", "ä"],
}
SMALL = ["1", "2", "3"]
CAPPED = {  # what would take long, in a run that is not dry
    "resolution": ["16", "32", "64", "96"], "train_batch_size": SMALL, "gradient_accumulation_steps": SMALL,
    "num_train_epochs": ["1"], "max_train_steps": SMALL, "num_class_images": SMALL, "sample_batch_size": SMALL,
    "num_inference_steps": SMALL, "num_validation_images": ["0", "1", "2"], "dataloader_num_workers": ["0", "1"],
    "aspect_ratio_buckets": ["64,64", "64,96;96,64", "32,64;", "63,64"], "validation_prompt": [PREVIEW_PROMPT, PROMPT],
    "rank": ["1", "4", "64"],
}  # fmt: skip


class Hangs(BaseException):
    """It took more than a minute."""


def make_project(folder: Path) -> None:
    """A tiny pipeline, photos, embeddings, a LoRA, a checkpoint, and things that are none of these."""
    tiny_pipeline.save(folder / "model")
    for name in ("photos", "empty", "out", "torn"):
        (folder / name).mkdir()
    for i, name in enumerate(["a.png", "b.jpg"]):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / name)
    (folder / "text").write_text("hello")
    (folder / "torn" / "training_state.pt").write_bytes(b"PK")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    flags = ["--output_path=embeddings.parquet", f"--class_prompt={CLASS_PROMPT}", "--no_t5"]
    for name, extra in (
        ("compute_embeddings", [*flags, f"--validation_prompt={PREVIEW_PROMPT}"]),
        ("train", ["--output_dir=lora"]),
        ("train", ["--output_dir=out"]),
    ):
        outcome = run(name, [*REQUIRED[name], *extra])
        assert outcome == "success", outcome


def flags_of(script: ModuleType) -> list[argparse.Action]:
    """Every flag but --help, from the parser that the script makes."""
    patch = mock.patch.object(script.Parser, "parse_args", autospec=True, side_effect=StopIteration)
    with patch as parse_args, contextlib.suppress(StopIteration):
        script.parse_args([])
    [parser, _] = parse_args.call_args.args
    return [action for action in parser._actions if action.dest != "help"]


def value_of(flag: argparse.Action, dry: bool, rng: random.Random) -> str:
    """A value for a flag, of the right kind or not."""
    if flag.dest in CAPPED and not dry:
        return rng.choice(CAPPED[flag.dest])
    if flag.choices and rng.random() < 0.9:
        return str(rng.choice(list(flag.choices)))
    if flag.dest in SPECIAL and rng.random() < 0.8:
        return rng.choice(SPECIAL[flag.dest])
    if rng.random() < 0.05:
        return rng.choice([*INTEGERS, *FLOATS, *TEXTS, *PATHS])
    return rng.choice({int: INTEGERS, float: FLOATS, Path: PATHS}.get(flag.type, TEXTS))


def command_line(name: str, flags: list[argparse.Action], rng: random.Random) -> list[str]:
    """Flags that work, and up to six that may not; some in a file."""
    dry = rng.random() < 0.75
    command = [flag for flag in REQUIRED[name] if rng.random() < 0.98]
    for flag in rng.sample(flags, rng.choice([0, 1, 1, 2, 2, 3, 4, 6])):
        option = flag.option_strings[0]
        if flag.dest == "dry_run":
            continue
        if flag.nargs == 0:
            command.append(option if rng.random() < 0.97 else f"{option}=1")
        elif flag.nargs in ("+", "?"):
            command += [option, *(value_of(flag, dry, rng) for _ in range(rng.choice([0, 1, 1, 1, 3])))]
        elif rng.random() < 0.8:
            command.append(f"{option}={value_of(flag, dry, rng)}")
        else:
            command += [option, value_of(flag, dry, rng)]
    if name == "train":  # `out` has a checkpoint, so it is for a run that resumes
        output = rng.choice(["new", "new", "out"])
        command = [f"--output_dir={output}", *command, "--dry_run" if dry else "--report_to=none"]
    if rng.random() < 0.15:
        command = in_a_file(command, rng)
    if rng.random() < 0.03:
        command.insert(
            0, rng.choice(["@missing", "@photos", "@photos/a.png", "@pipe/x", "@", "--", "word", "--=", "-x"])
        )
    return command


def in_a_file(command: list[str], rng: random.Random) -> list[str]:
    """The same flags in a file, which may be spoilt."""
    text = "# flags\n\n" + "\n".join(map(shlex.quote, command)) + "\n"
    data = text.encode(errors="surrogateescape")
    if rng.random() < 0.3:
        data += rng.choice([b"--seed '", b"\xff\xfe", b"\0", b"--seed 3 # and more", b"@missing\n", b"\\"])
    Path("flags.txt").write_bytes(data)
    return ["@flags.txt"]


@contextlib.contextmanager
def restored_process() -> Iterator[None]:
    """Signal handlers, accelerate's and torch's state, and the environment are as they were before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers, threads = {number: signal.getsignal(number) for number in numbers}, torch.get_num_threads()
    try:
        with mock.patch.dict(os.environ):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def run(name: str, command: list[str]) -> str:
    """How `python SCRIPT command` ends: "success", "message", or a traceback."""

    def alarm(*_: object) -> None:
        raise Hangs

    output, script = io.StringIO(), SCRIPTS[name].__file__
    streams = contextlib.redirect_stdout(output), contextlib.redirect_stderr(output)
    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(60)
    try:
        with restored_process(), streams[0], streams[1], mock.patch.object(sys, "argv", [script, *command]):
            runpy.run_path(script, run_name="__main__")
        end = "success"
    except SystemExit as stop:
        said = output.getvalue() if stop.code == 2 else stop.code if isinstance(stop.code, str) else ""
        end = "message" if said.strip() and "Traceback" not in said else f"Traceback: exit with {stop.code!r}"
    except BaseException:
        end = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return end if "Traceback" not in output.getvalue() else output.getvalue()


def fuzz(name: str, count: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Run so many command lines of a script; how many ended how, and each traceback with its command."""
    rng, flags, ends, tracebacks = random.Random(f"{name} {seed}"), flags_of(SCRIPTS[name]), Counter(), []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make_project(Path(folder))
        inputs = [path for name in ("model", "photos") for path in Path(folder, name).rglob("*") if path.is_file()]
        before = {path: path.read_bytes() for path in inputs}
        for _ in range(count):
            command = command_line(name, flags, rng)
            end = run(name, command)
            shutil.rmtree("new", ignore_errors=True)
            ends["traceback" if "Traceback" in end else end] += 1
            if "Traceback" in end:
                tracebacks.append(f"{name} {command!r}\n{end}")
        assert all(path.read_bytes() == content for path, content in before.items()), "an input was changed"
    return ends, tracebacks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="command lines a script")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other command lines")
    args, failed = parser.parse_args(), False
    for name in SCRIPTS:
        started = time.monotonic()
        ends, tracebacks = fuzz(name, args.count, args.seed)
        for each in tracebacks:
            print(each)
        print(f"{name}: {dict(ends)} in {time.monotonic() - started:.0f} s")
        failed |= bool(tracebacks)
    raise SystemExit(int(failed))
