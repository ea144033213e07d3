"""The benchmark runs both scripts and says what they took."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_benchmark_measures_both_scripts(tiny: Path, tmp_path: Path) -> None:
    """A row per precision of T5 and two runs of training; a table, and the same as JSON."""
    flags = {"pipeline_dir": tiny, "output_dir": tmp_path, "resolution": 64, "mixed_precision": "no", "threads": 1}
    command = [sys.executable, ROOT / "tests" / "tools" / "benchmark.py", "--t5_precision", "exact", "--images", "3"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["embeddings, exact", "training, 3 images", "training, 3 images again"]
    for row in rows:
        assert f"| {row['what']} |" in result.stdout
        assert 0.1 < row["anonymous RAM"] < row["RAM"] < 2 and row["seconds"] > 0
    assert all(0 < row["s/step"] < row["to first step"] < row["seconds"] for row in rows[1:])
