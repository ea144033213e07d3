"""The report on a GPU, rehearsed on a CPU: it is complete, loses nothing, and shows memory that a trainer wastes."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import full_size
import measuring

TOOL = ROOT / "tests" / "tools" / "gpu_report.py"
PREVIEWS = "training, previews, class images"
MIB = 2**20


def run(folder: Path, *flags: object) -> dict[str, dict]:
    """A rehearsal's rows by their names."""
    log = folder.with_suffix(".log")
    command = [TOOL, "--tiny", f"--output_dir={folder}", *flags]
    taken = measuring.measure(list(map(str, command)), log, launcher=(), limit_s=1200)  # () forks this process
    assert taken["code"] == 0, log.read_text()
    return {row["what"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    """All goes well, and a table has a row for everything, with what was counted beside what was measured."""
    rows = run(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert {row["part"] for row in rows.values()} == set("abcdef")
    assert all(f"| {row['part']} | {what} | " in page for what, row in rows.items())
    trainings = [row for row in rows.values() if "s/step" in row and row["part"] != "d"]
    assert len(trainings) == 19 and all(row["losses"] and row["s/step"] > 0 for row in trainings)
    assert [rows[f"training, limited to {limit} GB"]["recomputed"] for limit in ("0.02", "0.008")] == ["none", "half"]
    assert rows["training, resumed"]["first step"] == 7
    assert rows["the reference's / ours"]["s/step"] > 1 and rows["the reference's / ours"]["TFLOP"] > 1.5
    assert all("TFLOP" in row for row in trainings if row["recomputed"] != "half" and "int8" not in row["what"])
    plain, *faster = (row["mean loss"] for row in trainings if "ten steps" in row["what"])
    assert faster == pytest.approx([plain] * 3, rel=0.01)
    assert len(json.loads((tmp_path / "report.json").read_text())["kernels"]) == 10
    assert not (tmp_path / "pipelines").exists()


def mutated(folder: Path, patch: str) -> Path:
    """A copy of both scripts, the trainer with a few lines more before it starts."""
    folder.mkdir()
    shutil.copy(ROOT / full_size.EMBEDDER, folder)
    source = (ROOT / full_size.TRAINER).read_text()
    start = 'if __name__ == "__main__":'
    assert source.count(start) == 1
    (folder / full_size.TRAINER).write_text(source.replace(start, f"{patch}\n\n{start}"))
    return folder


LEAK = """
KEPT, LOSS = [], training_loss

def training_loss(*args):
    KEPT.append(torch.zeros(2**18, device=args[1]["latents"].device))  # 1 MiB
    return LOSS(*args)
"""
PREVIEW_THAT_STAYS = """
import functools
KEPT, MAKE = [], diffusers.StableDiffusion3Pipeline.__init__

@functools.wraps(MAKE)
def make_and_keep(self, *args, **kwargs):
    MAKE(self, *args, **kwargs)
    KEPT.append(self)

diffusers.StableDiffusion3Pipeline.__init__ = make_and_keep
"""
COPY_IN_FP32 = """
ADD_LORA = add_lora

def add_lora(transformer, *args):  # the model is where it is trained by now
    transformer.copies = [parameter.float() for parameter in transformer.parameters()]
    ADD_LORA(transformer, *args)
"""


def test_a_sound_trainer_wastes_nothing(tmp_path: Path) -> None:
    """Steps and previews leave nothing behind; beside what must be held there is a batch, 0.3 MiB."""
    row = run(tmp_path, f"--only={PREVIEWS}")[PREVIEWS]
    assert row["growth"] == pytest.approx(0, abs=0.01) and row["kept"] == pytest.approx(0, abs=0.01)
    assert row["held"] == pytest.approx(row["counted held"], abs=0.3 / 1024)


@pytest.mark.parametrize(
    ("patch", "column", "mib"), [(LEAK, "growth", 1.0), (PREVIEW_THAT_STAYS, "kept", 0.1), (COPY_IN_FP32, "held", 1.1)]
)
def test_a_wasteful_trainer_shows(tmp_path: Path, patch: str, column: str, mib: float) -> None:
    """A tensor that each step keeps, a preview whose VAE stays, a copy of the frozen weights in fp32."""
    folder = tmp_path / "report"
    row = run(folder, f"--only={PREVIEWS}", f"--scripts_dir={mutated(tmp_path / 'scripts', patch)}")[PREVIEWS]
    excess = {"growth": row["growth"], "kept": row["kept"], "held": 1024 * (row["held"] - row["counted held"])}
    assert excess[column] > 0.99 * mib
    assert full_size.cell(row[column]) in (folder / "report.md").read_text()


def test_the_script_cannot_lift_a_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer sets a limit of its own, for the whole card; the smaller one counts."""
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda fraction, _: fractions.append(fraction))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    measuring.GpuMemory(limit=8e9)
    for fraction in (0.95, 0.05):
        torch.cuda.set_per_process_memory_fraction(fraction)
    assert fractions == [0.1, 0.1, 0.05]


def test_a_hanging_process_is_killed_with_its_children(tmp_path: Path) -> None:
    """Also a child that its parent has left behind."""
    script = tmp_path / "hang.py"
    child = [sys.executable, "-c", "import time; time.sleep(100)"]
    script.write_text(f"import subprocess, time\nprint(subprocess.Popen({child}).pid, flush=True)\ntime.sleep(100)\n")
    started = time.time()
    taken = measuring.measure([str(script)], tmp_path / "hang.log", launcher=(), limit_s=1)
    assert taken["code"] is None and time.time() - started < 10
    pid = int((tmp_path / "hang.log").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_loses_no_row(tmp_path: Path) -> None:
    """What was done is in the report, and no process is left."""
    log = tmp_path / "log.txt"
    command = [str(TOOL), "--tiny", f"--output_dir={tmp_path}"]
    process = measuring.fork(tmp_path / "measured.json", 0, command, log)
    deadline = time.monotonic() + 120
    while not (tmp_path / "logs" / "b embeddings-t5-int8.log").exists():  # while it forks, it could lose the signal
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 1 and "interrupted" in log.read_text()
    results = {row["what"]: row["result"] for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert results["embeddings, T5 exact"] == "ok" and results["everything else"] == "**interrupted**"
    assert not any(str(tmp_path) in " ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"]))


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """In one line, and ends with 2."""
    command = [sys.executable, str(TOOL), f"--output_dir={tmp_path / 'report'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--tiny" in result.stderr
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("gradient checkpointing: off, peak RAM 1.00 GiB", "none"),
        ("gradient checkpointing: 12 of 24 blocks, peak RAM 1.00 GiB", "half"),
        ("gradient checkpointing: all 24 blocks, peak RAM 1.00 GiB", "all"),
        ("it said nothing", None),
    ],
)
def test_the_recomputation_is_read_from_what_the_trainer_says(said: str, chosen: str | None) -> None:
    """None, half or all of the blocks."""
    assert full_size.chosen_recomputation(said) == chosen


def test_time_that_is_over_is_a_row(tmp_path: Path) -> None:
    """Each run that was not begun has its reason in the table."""
    run(tmp_path / "report", "--minutes=0.01")
    assert (tmp_path / "report/report.md").read_text().count("not run: no time was left") > 15
