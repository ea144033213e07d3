"""The benchmark runs both scripts and says what they took."""

import json
import os
import sys
from pathlib import Path

import pytest

import benchmark
import measuring


def test_the_benchmark_measures_both_scripts(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row per precision of T5 and two runs of training; a table, and the same as JSON.

    The trainer is started by accelerate; the other script runs in a process that is forked from this one.
    """

    def fork(command: list[str], log: Path, **options: object) -> dict[str, object]:
        return measuring.measure_or_exit(command, log, **{"launcher": ()} | options)

    monkeypatch.setattr(benchmark, "measure_or_exit", fork)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)  # tests after this one may use all CPUs
    flags = {"pipeline_dir": tiny, "output_dir": tmp_path, "resolution": 64, "mixed_precision": "no", "threads": 1}
    command = ["benchmark.py", "--t5_precision", "exact", "--images", "3"]
    monkeypatch.setattr(sys, "argv", [*command, *(f"--{name}={value}" for name, value in flags.items())])
    benchmark.main()
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["embeddings, exact", "training, 3 images", "training, 3 images again"]
    for row in rows:
        assert f"| {row['what']} |" in shown
        assert 0.1 < row["anonymous RAM"] < row["RAM"] < 2 and row["seconds"] > 0
    assert all(0 < row["s/step"] < row["to first step"] < row["seconds"] for row in rows[1:])
