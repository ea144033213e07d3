"""Try everything on a GPU with random weights of the real sizes, and write a table of what it took.

    python tests/tools/gpu_report.py --output_dir /tmp/gpu_report --minutes 10
    python tests/tools/gpu_report.py --output_dir /tmp/gpu_report --only "ten steps"   # what makes a step shorter
    python tests/tools/gpu_report.py --output_dir /tmp/gpu_report --tiny       # tiny models, also on a CPU

Needs an NVIDIA GPU, 17 GB of free disk for SD3-medium (41 GB with both SD3.5), and nothing to be downloaded. Each run
of a script is a process of its own with a time limit; its row is printed and written to report.md and report.json at
once, so nothing is lost when a later one fails, hangs, or is interrupted. The parts:

    a  the machine, and tests/test_gpu.py
    b  both scripts: embeddings, precisions, resolutions, recomputation, an nf4 base, previews, class images, resume
    c  the same card limited to 15 and to 8 GB, and to less than training needs
    d  our training step beside the reference's
    e  ten steps as they are, with compiled blocks, with 8-bit products, and with both
    f  SD3.5-medium, SD3.5-large, and the kernels that take most of a step
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import psutil
import torch

from full_size import (
    CLASS_PROMPT,
    LORA_NAME,
    PREVIEW_PROMPT,
    Inputs,
    Row,
    as_flags,
    cell,
    embeddings_command,
    measured,
    new_logs,
    table,
    tensor_sizes,
    training_cells,
    training_command,
    versions,
)
from measuring import GIB, draw_images, measure

ADAM_BYTES = 4 + 4 + 2  # a LoRA's parameter: itself and its gradient in fp32, two states in 8 bit
NF4_BYTES = 0.5625  # a weight and its share of the scales
SHORTEST_S = 15  # with less time left nothing is begun


@dataclass(frozen=True)
class Sizes:
    """What differs between a report and a rehearsal of it on tiny models."""

    model: str
    larger: tuple[str, ...]
    resolutions: tuple[int, int]
    rank: int
    steps: int
    limits_gb: tuple[float, float]  # of VRAM, that training fits into
    too_little_gb: float
    flags_under_limits: tuple[str, ...] = ()


REAL = Sizes("sd3-medium", ("sd3.5-medium", "sd3.5-large"), (1024, 512), 4, 8, (15, 8), 4.5)
# Rank 64 is the smallest at which bitsandbytes keeps the tiny transformer's states in 8 bit. Under limits the batch is
# larger, so that activations, and not the VAE, take the most; an attention without fused kernels takes more still.
TINY = Sizes("tiny", ("tiny35", "tiny35"), (64, 32), 64, 6, (0.02, 0.008), 0.005, ("--train_batch_size=8",))
TINY_ON_GPU = replace(TINY, limits_gb=(0.03, 0.018))

# ------------------------------------------------------------------------------------------------------ what is shown

COLUMNS = {  # the name in a row: the title in the table
    "part": "",
    "what": "what",
    "result": "result",
    "recomputed": "blocks recomputed",
    "s/step": "s/step",
    "TFLOP": "TFLOP, counted",
    "GB moved": "GB moved, counted",
    "VRAM allocated": "peak VRAM GiB",
    "counted peak": "counted",
    "VRAM reserved": "reserved GiB",
    "VRAM in use": "whole card GiB",
    "held": "held after a step GiB",
    "counted held": "counted",
    "growth": "growth MiB/step",
    "kept": "kept by previews MiB",
    "losses": "finite losses",
    "mean loss": "mean loss",
    "anonymous RAM": "RAM GiB",
    "seconds": "seconds",
}
NOTES = """Random weights of the real shapes, batch 1, rank 4, 8-bit Adam. "s/step" is a median. "Counted" is what
tests/tools/step_cost.py says without a GPU, at rank 4 with AdamW in 32 bit; of what is held after a step, it is what
the weights, the LoRA, its gradients and its 8-bit states must take. "Reserved" is PyTorch's cache, "whole card" the
driver's account."""


@dataclass
class Report:
    """What is known so far; every addition is printed and written at once."""

    folder: Path
    counts: Path  # that a process beside us writes, a line for each
    about: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    kernels: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        shown = {title or name: row[name] for name, title in COLUMNS.items() if row.get(name) is not None}
        print("; ".join(f"{title} {cell(value)}" for title, value in shown.items()), flush=True)
        self.write()

    def write(self) -> None:
        rows = [row | self.counted(row) for row in self.rows]
        found = {"about": self.about, "rows": rows, "kernels": self.kernels}
        (self.folder / "report.json").write_text(json.dumps(found, indent=2, default=str))
        (self.folder / "report.md").write_text(self.markdown(rows))

    def markdown(self, rows: list[Row]) -> str:
        about = "".join(f"{name}: {value}  \n" for name, value in self.about.items())
        parts = [about, table(rows, COLUMNS), NOTES]
        if self.kernels:
            columns = {"kernel": "kernel", "calls": "calls", "ms": "ms", "share": "share"}
            parts.append(table(self.kernels, columns))
        return "\n\n".join(parts) + "\n"

    def counted(self, row: Row) -> Row:
        """What was counted for a row so far: by its key, or by the key for the recomputation that was chosen."""
        counts: dict[str, Row] = {}
        with suppress(FileNotFoundError):
            for line in self.counts.read_text().splitlines():
                with suppress(ValueError):  # a line that is being written
                    counts |= json.loads(line)
        count = dict(counts.get(f"{row.get('count')} {row.get('recomputed', '')}".strip(), {}))
        saved = count.pop("saved by nf4", 0)
        if row.get("nf4") and "counted peak" in count:
            count["counted peak"] -= saved
        return count


# ------------------------------------------------------------------------------------------------ what a run has shown


def counted_held(transformer: Path, lora: Path, nf4: bool) -> float:
    """GiB that must be held after a step: the frozen weights, and the LoRA with its gradients and 8-bit states."""
    held = sum(ADAM_BYTES * math.prod(shape) for shape in tensor_sizes(lora).values())
    for file in transformer.glob("*.safetensors"):
        for name, shape in tensor_sizes(file).items():
            quantized = nf4 and len(shape) == 2 and name.endswith(".weight")
            held += math.prod(shape) * (NF4_BYTES if quantized else 2)  # in fp16 and in bf16
    return held / GIB


def last_words(log: Path) -> str:
    """The last line of a log, which is the error if there was one."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].split("\r")[-1][:200] if lines else "it said nothing"


# ------------------------------------------------------------------------------------------------------ running things


@dataclass
class Session:
    """One report in the making."""

    args: argparse.Namespace
    sizes: Sizes
    report: Report
    launcher: tuple[str, ...]  # what starts Python scripts; () forks this process
    part: str = ""
    until: float = 0  # when this part's time is over

    @property
    def folder(self) -> Path:
        return self.args.output_dir

    @property
    def pipelines(self) -> Path:
        return self.folder / "pipelines"

    def inputs(self, model: str = "") -> Inputs:
        """What the scripts work on, with the model of parts b to d or another one."""
        return Inputs(self.args.scripts_dir, self.pipelines / (model or self.sizes.model), self.folder / "images")

    def add(self, what: str, result: str, **cells: object) -> None:
        self.report.add({"part": self.part, "what": what, "result": result, **cells})

    def wanted(self, what: str) -> bool:
        return self.args.only in what

    def run(
        self, what: str, command: list[object], limit_s: float, vram_limit_gb: float = 0
    ) -> tuple[Row, Path] | None:
        """Run a command within its limit and the part's; what it took and its log. A row says if no time was left."""
        limit_s = min(limit_s * self.args.minutes / 10, self.until - time.time())
        if limit_s < SHORTEST_S:
            self.add(what, "not run: no time was left")
            return None
        log = self.folder / "logs" / f"{self.part} {re.sub('[^a-z0-9.]+', '-', what.lower())}.log"
        taken = measure([str(word) for word in command], log, self.launcher, limit_s, vram_limit_gb)
        taken["killed after"] = limit_s if taken["code"] is None else None
        return taken, log

    def result(self, taken: Row, log: Path, expected: str = "") -> str:
        """ok, or how it went wrong; `expected` is part of the message that a run has to fail with."""
        if taken["killed after"]:
            return f"**killed** after {taken['killed after']:.0f} s"
        if expected and expected in log.read_text(errors="replace") and taken["code"] == 1:
            return f"ok: {expected!r}"
        if expected:
            return f"**no {expected!r}**"
        return "ok" if taken["code"] == 0 else f"**failed**: {last_words(log)}"


def embed(session: Session, precision: str) -> None:
    """A run of compute_embeddings.py."""
    what = f"embeddings, T5 {precision}"
    if precision != "exact" and not session.wanted(what):  # the trainings need one of them
        return
    command = embeddings_command(session.inputs(), session.folder / f"{precision}.parquet", precision)
    if done := session.run(what, command, limit_s=120):
        session.add(what, session.result(*done), count=f"T5 {precision}", **measured(done[0]))


@dataclass(frozen=True)
class Training:
    """A run of the trainer."""

    what: str
    flags: tuple[str, ...] = ()
    resolution: int = 0  # 0: the larger
    precision: str = "fp16"
    model: str = ""
    vram_limit_gb: float = 0
    expected: str = ""
    folder: str = ""  # that another one goes on in
    max_steps: int = 0
    limit_s: float = 90


def train(session: Session, training: Training) -> None:
    """Run the trainer; a row with all that it took and showed."""
    if not session.wanted(training.what):
        return
    model = training.model or session.sizes.model
    resolution = training.resolution or session.sizes.resolutions[0]
    output = session.folder / "runs" / (training.folder or f"{session.part} {training.what}")
    logs = new_logs(output)
    settings = {
        "resolution": resolution,
        "mixed_precision": training.precision,
        "max_train_steps": training.max_steps or session.sizes.steps,
        "rank": session.sizes.rank,
    }
    flags = ["--use_8bit_adam", *training.flags]
    command = training_command(session.inputs(model), session.folder / "exact.parquet", logs, settings, flags)
    if done := session.run(training.what, command, training.limit_s, training.vram_limit_gb):
        cells = training_cells(*done, logs)
        cells |= {"nf4": "--quantize_base=nf4" in training.flags}
        if "--quantize_base=int8" not in training.flags:  # of which nothing is counted here
            cells["count"] = f"{model} {resolution}"
        result = session.result(*done, training.expected)
        if cells.get("first step") == 1 and "--resume_from_checkpoint=latest" in training.flags:
            result = "**failed**: it began at step 1"
        if cells.get("losses") is False:
            result = "**failed**: a loss is not finite"
        if "held" in cells and "count" in cells and done[0]["code"] == 0:
            transformer = session.pipelines / model / "transformer"
            cells["counted held"] = counted_held(transformer, output / LORA_NAME, cells["nf4"])
        session.add(training.what, result, **cells)


# ----------------------------------------------------------------------------------------------------------- the parts


def machine_and_tests(session: Session) -> None:
    """a: what this is, and the tests that need a GPU."""
    command = [__file__, "--describe", session.folder / "machine.json"]
    done = session.run("the machine", command, limit_s=60)
    if done is None:
        return
    with suppress(OSError, ValueError):
        session.report.about |= json.loads((session.folder / "machine.json").read_text())
    session.add("the machine", session.result(*done), seconds=done[0]["seconds"])
    if not session.wanted("tests/test_gpu.py"):
        return
    if importlib.util.find_spec("pytest") is None:
        session.add("tests/test_gpu.py", "not run: pip install pytest")
        return
    tests = ["-m", "pytest", HERE.parent / "test_gpu.py", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    if done := session.run("tests/test_gpu.py", tests, limit_s=120):
        said = done[1].read_text(errors="replace")
        summaries = re.findall(r"(\d+ (?:passed|failed|skipped|error).*) in [\d.]+s", said)
        result = " ".join([session.result(*done), *summaries[-1:]])
        session.add("tests/test_gpu.py", result, seconds=done[0]["seconds"])


def write_model(session: Session, model: str, only: tuple[str, ...] = ()) -> bool:
    """Write a pipeline unless there is one; False if the disk has no room."""
    from random_pipeline import write_pipeline  # diffusers: not needed to say that there is no GPU

    folder = session.pipelines / model
    if (folder / "model_index.json").exists():
        return True
    what = f"writing {model}"
    needed_gb = {"sd3-medium": 17, "sd3.5-medium": 6, "sd3.5-large": 18}.get(model, 1)
    if shutil.disk_usage(session.folder).free < needed_gb * 1e9:
        session.add(what, f"not run: {needed_gb} GB of free disk are needed in {session.folder}")
        return False
    started = time.time()
    write_pipeline(folder, model, only)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    session.add(what, f"ok: {size / 1e9:.3g} GB", seconds=time.time() - started)
    return True


def real_scripts(session: Session) -> None:
    """b: both scripts with everything that they can do on one GPU."""
    if not write_model(session, session.sizes.model):
        return
    embed(session, "exact")
    embed(session, "int8")
    for precision in ("fp16", "bf16"):
        if precision == "bf16" and session.report.about.get("bf16") is False:
            session.add("training, bf16", "not run: this GPU has no bf16")
            continue
        for resolution in session.sizes.resolutions:
            what = f"training, {precision}, {resolution}²"
            train(session, Training(what, resolution=resolution, precision=precision))
            more = ("--gradient_checkpointing",)
            train(session, Training(f"{what}, {more[0]}", more, resolution, precision))
        if precision == "fp16":
            features(session)


def features(session: Session) -> None:
    """An nf4 base, previews and class images, and a run that goes on."""
    train(session, Training("training, nf4 base", ("--quantize_base=nf4",)))
    flags = (
        f"--validation_prompt={PREVIEW_PROMPT}",
        "--validation_steps=3",
        "--num_inference_steps=4",
        "--num_validation_images=1",
        "--with_prior_preservation",
        f"--class_prompt={CLASS_PROMPT}",
        "--num_class_images=2",
        "--sample_batch_size=1",
        "--checkpointing_steps=3",
    )
    train(session, Training("training, previews, class images", flags, folder="whole", limit_s=120))
    if (session.folder / "runs" / "whole").exists():
        more = (*flags, "--resume_from_checkpoint=latest")
        steps = session.sizes.steps + 4
        train(session, Training("training, resumed", more, folder="whole", max_steps=steps, limit_s=120))


def limited_memory(session: Session) -> None:
    """c: smaller cards, imitated, and one that is too small."""
    if torch.cuda.is_available() and not hasattr(torch._C, "_cuda_setMemoryFraction"):
        session.add("training in less memory", "not run: this PyTorch cannot limit the memory of its device")
        return
    for limit in session.sizes.limits_gb:
        what = f"training, limited to {limit:g} GB"
        train(session, Training(what, session.sizes.flags_under_limits, vram_limit_gb=limit, max_steps=5))
    limit = session.sizes.too_little_gb
    what = f"training, limited to {limit:g} GB, too little"
    expected = "Out of GPU memory"
    train(session, Training(what, session.sizes.flags_under_limits, vram_limit_gb=limit, expected=expected))


def reference_beside_ours(session: Session) -> None:
    """d: our step and the reference's, alternating."""
    what = "our step beside the reference's"
    if not session.wanted(what):
        return
    path = session.folder / "steps.json"
    path.unlink(missing_ok=True)
    model, resolution = session.sizes.model, session.sizes.resolutions[0]
    settings = {
        "pipeline_dir": session.pipelines / model,
        "output_path": path,
        "scripts_dir": session.args.scripts_dir,
        "resolution": resolution,
    }
    done = session.run(what, [HERE / "compared_steps.py", *as_flags(settings)], limit_s=120)
    if done is None:
        return
    session.add(what, session.result(*done), **measured(done[0] | {"events": []}))  # of two optimizers
    if path.exists():
        add_compared_steps(session, json.loads(path.read_text()), f"{model} {resolution}")


def add_compared_steps(session: Session, found: dict, count: str) -> None:
    """A row for each of the two steps, and one for their ratio."""
    ours, reference, recomputed = found["ours"], found["reference"], found["recomputed"]
    rows = {
        "our step, four layers": {"s/step": ours, "recomputed": recomputed, "count": f"{count} four"},
        "the reference's step": {"s/step": reference, "count": f"{count} reference"},
        "the reference's / ours": {"s/step": reference / ours, "recomputed": recomputed, "count": "ratio"},
    }
    for what, cells in rows.items():
        session.add(what, "ok", **cells)
    session.report.kernels = found.get("kernels", [])


def faster_steps(session: Session) -> None:
    """e: the same ten steps, plain, compiled, in 8 bits and both; their losses have the same samples and noise."""
    combinations = {
        "plain": (),
        "compiled": ("--compile",),
        "int8": ("--quantize_base=int8",),
        "int8, compiled": ("--quantize_base=int8", "--compile"),
    }
    for name, flags in combinations.items():
        limit_s = 200 if "--compile" in flags else 60
        train(session, Training(f"training, ten steps, {name}", flags, max_steps=10, limit_s=limit_s))


def larger_models(session: Session) -> None:
    """f: SD3.5-medium, and SD3.5-large in 4 bit; and the most expensive kernels, which part d has found."""
    kernels = len(session.report.kernels)
    session.add("the most expensive kernels", f"ok: {kernels} are below" if kernels else "not run")
    for number, model in enumerate(session.sizes.larger):
        flags = ("--quantize_base=nf4",) if number == len(session.sizes.larger) - 1 else ()
        what = " ".join(["training,", model, *(flag.removeprefix("--quantize_base=") for flag in flags)])
        if not session.wanted(what):
            continue
        if session.until - time.time() < SHORTEST_S:
            session.add(what, "not run: no time was left")
        elif write_model(session, model, only=("vae", "transformer")):
            train(session, Training(what, flags, model=model, limit_s=300))


PARTS: list[tuple[str, Callable[[Session], None], float]] = [  # with the share of the time at which each has to end
    ("a", machine_and_tests, 0.12),
    ("b", real_scripts, 0.5),
    ("c", limited_memory, 0.6),
    ("d", reference_beside_ours, 0.68),
    ("e", faster_steps, 0.85),
    ("f", larger_models, 1.0),
]

# ------------------------------------------------------------------------------------------- processes of this program


def describe(path: Path) -> None:
    """Write what this machine is; a process of its own, since asking a GPU takes some of its memory."""
    about: Row = {"GPU": "none, on the CPU", "bf16": True}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        about["GPU"] = (
            f"{properties.name}, {properties.total_memory / GIB:.1f} GiB, sm_{properties.major}{properties.minor}"
        )
        about["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
        about["CUDA"] = torch.version.cuda
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    about["machine"] = (
        f"{os.cpu_count()} CPUs, {psutil.virtual_memory().total / GIB:.0f} GiB of RAM, {platform.platform()}"
    )
    about["Python"] = platform.python_version()
    about |= versions()
    path.write_text(json.dumps(about))


def count(path: Path, model: str, larger: list[str], resolutions: list[int]) -> None:
    """Write what steps cost by step_cost.py, a line each as soon as it is counted."""
    import diffusers

    import step_cost
    from random_pipeline import TINY_KINDS

    diffusers.utils.logging.set_verbosity_error()
    for name in {model, *larger} & TINY_KINDS.keys():
        let_count(name)
    with open(path, "a", buffering=1) as file:
        for key, cost in counts_of(step_cost, model, larger, resolutions):
            file.write(json.dumps({key: cost}) + "\n")


def counts_of(
    step_cost: ModuleType, model: str, larger: list[str], resolutions: list[int]
) -> Iterator[tuple[str, Row]]:
    """The keys by which rows are found, and their counted cells."""

    def cells(cost: Any) -> Row:
        flop_and_bytes = {"TFLOP": cost.tflop, "GB moved": cost.gb_moved}
        return flop_and_bytes | {"counted peak": cost.peak_gib, "saved by nf4": cost.nf4_saves_gib}

    configurations = [(model, resolution) for resolution in resolutions]
    configurations += [(other, resolutions[0]) for other in larger]
    for name, resolution in configurations:
        for recomputed in ("none", "all"):
            cost = step_cost.count_step(name, resolution, "eight", recomputed == "all")
            yield f"{name} {resolution} {recomputed}", cells(cost)
    reference = step_cost.count_reference_step(model, resolutions[0])
    yield f"{model} {resolutions[0]} reference", cells(reference)
    for recomputed in ("none", "all"):
        ours = step_cost.count_step(model, resolutions[0], "four", recomputed == "all")
        yield f"{model} {resolutions[0]} four {recomputed}", cells(ours)
        ratio = {"TFLOP": reference.tflop / ours.tflop, "GB moved": reference.gb_moved / ours.gb_moved}
        yield f"ratio {recomputed}", ratio
    if not model.startswith("tiny"):
        yield "T5 exact", {"counted peak": max(step_cost.clip_gib(), step_cost.streamed_t5_gib())}
        yield "T5 int8", {"counted peak": max(step_cost.clip_gib(), step_cost.int8_t5_gib())}


def let_count(tiny: str) -> None:
    """Add a tiny model to those of step_cost.py."""
    import step_cost
    import tiny_pipeline
    from random_pipeline import TINY_KINDS

    pipeline = tiny_pipeline.build(TINY_KINDS[tiny])
    step_cost.MODELS[tiny] = public(pipeline.transformer.config)
    step_cost.VAE = public(pipeline.vae.config)


def public(config: dict) -> dict:
    """The arguments that a model was built with."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


# ---------------------------------------------------------------------------------------------------------------- main


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder for the report, the logs and the models"
    )
    parser.add_argument(
        "--minutes", type=float, default=10, help="time for everything; limits grow with it (default: 10)"
    )
    parser.add_argument(
        "--model", default="sd3-medium", choices=["sd3-medium", "sd3.5-medium"], help="model of parts b to d"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models: a rehearsal, also on a CPU")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only runs whose name contains it, and what they need"
    )
    parser.add_argument("--scripts_dir", type=Path, default=ROOT, help="folder of the two scripts")
    parser.add_argument("--launcher", type=shlex.split, help="what starts Python scripts (default: this Python)")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    args.scripts_dir = args.scripts_dir.resolve()
    return args


def start_counting(sizes: Sizes, counts: Path) -> psutil.Process:
    """Count beside everything else, on a CPU and with the lowest priority."""
    what = [counts, sizes.model, json.dumps(sizes.larger), json.dumps(sizes.resolutions)]
    with open(counts.with_suffix(".log"), "w") as log:
        env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--count", *map(str, what)]
        process = psutil.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    process.nice(19 if os.name == "posix" else psutil.BELOW_NORMAL_PRIORITY_CLASS)
    return process


def prepare_to_fork() -> None:
    """Load the libraries for all processes that will be forked, and let them account for tensors on the CPU."""
    os.environ |= {"METER_CPU": "1"}
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="eager")  # Python runs the graphs: seconds instead of minutes
    sys.path.insert(0, str(ROOT))
    with suppress(ImportError):
        import pytest  # noqa: F401
    from diffusers import StableDiffusion3Pipeline  # noqa: F401
    from tensorboard.backend.event_processing import event_accumulator  # noqa: F401
    from transformers import T5EncoderModel  # noqa: F401

    import step_cost  # noqa: F401 - it imports both scripts, and they the libraries


def run_parts(session: Session) -> None:
    """Every part; an error in one costs what is left of it."""
    started = time.time()
    for letter, part, share in PARTS:
        session.part = letter
        session.until = started + 60 * session.args.minutes * share
        try:
            part(session)
        except Exception as error:
            traceback.print_exc()
            session.add(part.__name__.replace("_", " "), f"**failed**: {error!r}")


def prepare(args: argparse.Namespace) -> Session:
    """The folders, the images, and how processes are started."""
    shutil.rmtree(args.output_dir / "runs", ignore_errors=True)  # of an earlier report
    (args.output_dir / "logs").mkdir(parents=True, exist_ok=True)
    draw_images(args.output_dir / "images", 5)
    counts = args.output_dir / "logs" / "counts.jsonl"
    counts.unlink(missing_ok=True)
    larger = tuple(model for model in REAL.larger if model != args.model)
    sizes = replace(REAL, model=args.model, larger=larger)
    if args.tiny:
        sizes = TINY_ON_GPU if torch.cuda.is_available() else TINY
    launcher = tuple(args.launcher or [sys.executable])
    if args.tiny and not (args.launcher or torch.cuda.is_available()):
        prepare_to_fork()
        launcher = ()
    return Session(args, sizes, Report(args.output_dir, counts), launcher)


def main() -> int:
    args = parse_args()
    if not (args.tiny or args.launcher or torch.cuda.is_available()):
        print("There is no CUDA GPU here. To rehearse on a CPU: --tiny", file=sys.stderr)
        return 2
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for number in signal.valid_signals() & {1, 15}:  # SIGHUP, which Windows has not, and SIGTERM
        signal.signal(number, signal.default_int_handler)
    session = prepare(args)
    report, sizes = session.report, session.sizes
    counting = start_counting(sizes, report.counts) if session.launcher else None
    try:
        run_parts(session)
        if counting:
            print("waiting for what is counted", flush=True)
            counting.wait(timeout=120)
        elif not args.only:
            count(report.counts, sizes.model, list(sizes.larger), list(sizes.resolutions))
    except KeyboardInterrupt:
        session.add("everything else", "**interrupted**")
    except psutil.TimeoutExpired:
        pass  # cells of what is not counted yet stay empty
    finally:
        if counting:
            with suppress(psutil.Error):
                counting.kill()
        report.write()
        shutil.rmtree(session.pipelines, ignore_errors=True)
    print(f"\n{report.folder / 'report.md'}:\n\n{(report.folder / 'report.md').read_text()}")
    return 1 if any("**" in str(row["result"]) for row in report.rows) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--describe"]:
        describe(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["--count"]:
        count(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), json.loads(sys.argv[5]))
    else:
        sys.exit(main())
