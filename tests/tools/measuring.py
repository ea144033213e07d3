"""Run a script as a process of its own, and say what it took: time, RAM, and its tensors' memory step by step.

    python tests/tools/measuring.py RESULT.json VRAM_LIMIT_GB SCRIPT FLAGS...    # what the measured process runs

Nothing of the script is changed. PyTorch calls back after every step of an optimizer, diffusers' pipeline after every
image; then the memory that tensors hold is noted. On a GPU that is PyTorch's own account. On a CPU, where there is
none, a dispatch mode adds up what operators make: right to the byte, but slow, so only where $METER_CPU is set.
"""

import importlib
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
import traceback
import weakref
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import numpy as np
import psutil
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB, GIB = 2**20, 2**30

# ------------------------------------------------------------------------------------------ in the measured process


class CpuMemory(TorchDispatchMode):
    """The memory of the tensors that operators made on the CPU, with a limit, as if the CPU were a GPU."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.sizes: dict[int, int] = {}
        self.allocated = self.peak = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.note(leaf.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        self.allocated += storage.nbytes()
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self.forget, storage._cdata)
        if self.allocated > self.limit:
            raise torch.OutOfMemoryError(f"more than {self.limit:.0f} bytes are allocated")

    def forget(self, key: int) -> None:
        self.allocated -= self.sizes.pop(key)

    def report(self) -> dict[str, float]:
        return {"VRAM allocated": self.peak / GIB}


class GpuMemory(nullcontext):
    """PyTorch's account of the GPU, with a limit, and how much of the card is in use by the driver's account."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.card = 0
        if limit < float("inf"):
            limit_for_good(limit / torch.cuda.get_device_properties(0).total_memory)

    @property
    def allocated(self) -> int:
        self.look_at_card()
        return torch.cuda.memory_allocated()

    def look_at_card(self) -> None:
        """The driver's account, at the peak of PyTorch's cache so far: kernels and libraries take their share too."""
        free, whole = torch.cuda.mem_get_info()
        given_back = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
        self.card = max(self.card, whole - free + given_back)

    def report(self) -> dict[str, float]:
        self.look_at_card()
        return {
            "VRAM allocated": torch.cuda.max_memory_allocated() / GIB,
            "VRAM reserved": torch.cuda.max_memory_reserved() / GIB,
            "VRAM in use": self.card / GIB,
        }


def limit_for_good(largest: float) -> None:
    """Let PyTorch have at most this fraction of the GPU's memory, also where the script sets a fraction of its own."""
    set_fraction = torch.cuda.set_per_process_memory_fraction

    def set_smaller_fraction(fraction: float, device: object = None) -> None:
        set_fraction(min(fraction, largest), device)

    torch.cuda.set_per_process_memory_fraction = set_smaller_fraction
    set_smaller_fraction(1.0)


def watch_memory(limit_gb: float, command: list[str]) -> CpuMemory | GpuMemory | None:
    """The account of this process's tensors, or None on a CPU where nobody asked for the slow one."""
    limit = limit_gb * 1e9 or float("inf")
    if torch.cuda.is_available():
        return GpuMemory(limit)
    is_metered = "METER_CPU" in os.environ and "--compile" not in command  # a compiler bypasses operators
    return CpuMemory(limit) if is_metered else None


def note_events(memory: CpuMemory | GpuMemory, command: list[str]) -> list[tuple[str, int]]:
    """A list that grows while the script runs: "step" or "image", and the bytes that tensors hold right after it."""
    events: list[tuple[str, int]] = []

    def after_step(*_: object) -> None:
        events.append(("step", memory.allocated))

    register_optimizer_step_post_hook(after_step)
    if not any(flag.startswith("--validation_prompt") for flag in command):
        return events
    from diffusers import StableDiffusion3Pipeline  # it takes a second, and only previews need it

    generate = StableDiffusion3Pipeline.__call__

    def generate_and_note(*args: object, **kwargs: object) -> object:
        images = generate(*args, **kwargs)
        events.append(("image", memory.allocated))
        return images

    StableDiffusion3Pipeline.__call__ = generate_and_note
    return events


def run_measured(result: Path, limit_gb: float, command: list[str]) -> None:
    """Run a script with its flags, or `-m MODULE FLAGS`, in this process, and write what its tensors took."""
    memory = watch_memory(limit_gb, command)
    if memory is None:
        run_script(command)
        return
    events = note_events(memory, command)
    try:
        with memory:
            run_script(command)
    finally:
        result.write_text(json.dumps({"events": events, **memory.report()}))


def run_script(command: list[str]) -> None:
    """What `python SCRIPT FLAGS` does, or `python -m MODULE FLAGS`."""
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = command
    script = Path(command[0])
    sys.path.insert(0, str(script.parent))
    if "--quantize_base=nf4" in command and not torch.cuda.is_available() and script.parent != HERE:
        import quantized_on_cpu  # it changes the module, so the module is what runs; the tools beside this do so too

        quantized_on_cpu.allow()
        module = importlib.import_module(script.stem)
        module.main(module.parse_args(command[1:]))
    else:
        runpy.run_path(str(script), run_name="__main__")


# ---------------------------------------------------------------------------------------- in the process that measures


@dataclass
class Watched:
    """A running process with its children, and the peaks of the largest of them."""

    process: psutil.Process
    family: dict[int, psutil.Process] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=lambda: {"anonymous RAM": 0, "RAM": 0})

    def look(self) -> None:
        with suppress(psutil.Error):
            found = [self.process, *self.process.children(recursive=True)]
            self.family |= {each.pid: each for each in found}
        for each in self.family.values():
            with suppress(psutil.Error):
                memory = each.memory_info()
                anonymous = memory.rss - getattr(memory, "shared", 0)  # weights in mapped files are shared
                self.peaks["RAM"] = max(self.peaks["RAM"], memory.rss)
                self.peaks["anonymous RAM"] = max(self.peaks["anonymous RAM"], anonymous)

    def kill(self) -> None:
        """End every process of the family that is left, also one whose parent is gone."""
        for each in self.family.values():
            with suppress(psutil.Error):
                each.kill()
        with suppress(psutil.Error):
            self.process.wait(timeout=10)


def start(launcher: tuple[str, ...], result: Path, limit_gb: float, command: list[str], log: Path) -> psutil.Process:
    """Start a measured process whose output goes to a file. Ctrl-C does not reach it: whoever started it ends it."""
    with open(log, "w") as output:
        return psutil.Popen(
            [*launcher, str(HERE / "measuring.py"), str(result), str(limit_gb), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def fork(
    result: Path, limit_gb: float, command: list[str], log: Path, environment: dict[str, str] | None = None
) -> psutil.Process:
    """The same from this process, which has loaded the libraries: for tiny models, where loading them costs most."""
    pid = os.fork()
    if pid:
        return psutil.Process(pid)
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a new process; xdist's workers ignore it
        os.environ |= environment or {}
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 - open until the end
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        torch.set_num_threads(1)
        run_measured(result, limit_gb, command)
        code = 0
    except SystemExit as ending:
        code = exit_code(ending)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(ending: SystemExit) -> int:
    """What Python makes of a SystemExit: a message is printed, and means 1."""
    if ending.code is None or isinstance(ending.code, int):
        return ending.code or 0
    print(ending.code, file=sys.stderr)
    return 1


def measure(
    command: list[str],
    log: Path,
    launcher: tuple[str, ...] = (sys.executable,),
    limit_s: float = float("inf"),
    vram_limit_gb: float = 0,
) -> dict[str, object]:
    """Run a command with its children until it ends or its time is over; what it took, in seconds and GiB.

    `code` is its exit code, None if it was killed. `launcher` is what starts Python scripts; () forks this process.
    """
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    started = time.time()
    watched = Watched(
        start(launcher, result, vram_limit_gb, command, log) if launcher else fork(result, vram_limit_gb, command, log)
    )
    code = None
    try:
        while code is None and time.time() < started + limit_s:
            watched.look()
            with suppress(psutil.TimeoutExpired):
                code = watched.process.wait(timeout=0.1)
    finally:
        watched.kill()
    taken = {name: peak / GIB for name, peak in watched.peaks.items()}
    taken |= {"code": code, "started": started, "seconds": time.time() - started}
    if result.exists():
        taken |= json.loads(result.read_text())
    return taken


def measure_or_exit(command: list[str], log: Path, **options: Any) -> dict[str, object]:
    """The same, where a command that fails ends this program with the end of its output."""
    taken = measure(command, log, **options)
    if taken["code"] != 0:
        said = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{shlex.join(command)}\nended with {taken['code']}:\n{said}")
    return taken


def draw_images(folder: Path, count: int) -> Path:
    """Images of 64 x 64 pixels, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{number:05}.png")
    return folder


if __name__ == "__main__":
    run_measured(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
