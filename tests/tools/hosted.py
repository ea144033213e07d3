"""Rehearse the notebook on the package versions of a hosted service, such as Colab or Kaggle.

    python tests/tools/hosted.py colab.txt --output_dir O                          # on a machine with a GPU
    python tests/tools/hosted.py colab.txt --output_dir O --replace torch==2.13.0  # with the build that you have

The list is what `!pip freeze > colab.txt` in a cell of the service writes. This program makes a virtual environment
with those of its versions that matter, runs the notebook on the toy in it, from top to bottom, with a kernel of that
environment, and prints which versions could not be had, what the notebook changed, seconds, and RAM. The caller's own
environment needs papermill and pillow-heif.

What this leaves out: the service's Python (give one with --python), its GPU, its disk and network, and the hundreds of
packages of a list that nothing here imports. torchvision is among them: it must fit torch to the build.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import papermill
import psutil
from packaging.utils import canonicalize_name

import toy_notebook

# What the two scripts import, what these libraries import where it is installed, and what the kernel consists of.
NAMES = """
    torch torchao bitsandbytes accelerate diffusers peft transformers
    huggingface_hub hf-xet safetensors tokenizers sentencepiece regex fsspec httpx requests PyYAML
    numpy scipy scikit-learn pandas pyarrow pillow
    tensorboard tensorflow keras h5py ml_dtypes protobuf grpcio absl-py
    filelock packaging psutil tqdm typing_extensions
    pip ipykernel ipython traitlets jupyter_client jupyter_core pyzmq tornado debugpy nest-asyncio
""".split()
KERNEL = "hosted"
GIB = 2**30


# ------------------------------------------------------------------------------------------------------ environment


def read_pins(lines: Iterable[str]) -> dict[str, str]:
    """Return the versions of NAME==VERSION lines, by canonical name; others are passed over."""
    pins = {}
    for line in lines:
        name, equals, version = line.strip().partition("==")
        if equals:
            pins[canonicalize_name(name)] = version
    return pins


def pip(python: Path, *flags: str) -> subprocess.CompletedProcess:
    """Run an environment's pip, and return how that ended and what was said."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def pip_or_exit(python: Path, *flags: str) -> None:
    """The same, where a failure ends this program."""
    done = pip(python, *flags)
    if done.returncode:
        raise SystemExit(f"pip {' '.join(flags)} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")


def make_environment(pins: dict[str, str], python: str, folder: Path) -> Path:
    """Make a virtual environment with the versions that can be had, and return its Python.

    In place of a version that is not there for this Python or this machine comes the newest before it, or nothing.
    """
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if "pip" in pins:
        pip_or_exit(inside, "install", f"pip=={pins['pip']}")
    wanted = []
    for name, version in pins.items():
        for requirement in (f"{name}=={version}", f"{name}<={version}"):
            if pip(inside, "install", "--dry-run", "--no-deps", requirement).returncode == 0:
                wanted.append(requirement)
                break
    pip_or_exit(inside, "install", *wanted)
    return inside


def installed_in(python: Path) -> dict[str, str]:
    """Return the versions of all packages of an environment, by canonical name."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return {canonicalize_name(each.name): each.version for each in distributions(path=[folder])}


# --------------------------------------------------------------------------------------------------------- notebook


class Memory(threading.Thread):
    """Notes the peak of the RAM that this process's children hold together, without what they map from files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.2):
            anonymous = 0
            for each in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    memory = each.memory_info()
                    anonymous += memory.rss - getattr(memory, "shared", 0)
            self.peak = max(self.peak, anonymous)


def run_notebook(checkout: Path, python: Path, folder: Path) -> str:
    """Run a checkout's notebook on the toy with an environment's kernel and commands; return "" or what failed."""
    spec = folder / "jupyter" / "kernels" / KERNEL / "kernel.json"
    spec.parent.mkdir(parents=True)
    command = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": command, "display_name": KERNEL, "language": "python"}))
    os.environ["JUPYTER_PATH"] = str(folder / "jupyter")
    os.environ["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # older kernels warn of it
    workplace = folder / "workplace"
    toy_notebook.write_photos(workplace / "robot")
    toy_notebook.copy_scripts(checkout, workplace)
    notebook = json.loads((checkout / "notebook.ipynb").read_text())
    try:
        toy_notebook.execute(notebook, workplace, {"STEPS": 4}, KERNEL)
    except papermill.PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    return ""


def text_of(cell: dict[str, Any]) -> str:
    """Return what a cell printed."""
    return "".join(line for output in cell["outputs"] for line in output.get("text", []))


def seconds_of_cells(cells: Iterable[dict[str, Any]]) -> list[str]:
    """Return a row of a Markdown table for each cell that took a second."""
    rows = []
    for cell in cells:
        seconds = cell["metadata"].get("papermill", {}).get("duration") or 0
        if cell["cell_type"] == "code" and seconds >= 1:
            command = [line for line in cell["source"] if line.startswith("!")] or [""]
            rows.append(f"| {cell['id']} | `{command[-1].strip()[:60]}` | {seconds:.0f} |")
    return rows


# ----------------------------------------------------------------------------------------------------------- report


def print_changes(pins: dict[str, str], before: dict[str, str], after: dict[str, str]) -> None:
    """Print a table of what is not as listed, and of what the notebook installed or removed."""
    print("\n| package | listed | before the notebook | after it |\n|---|---|---|---|")
    for name in sorted(pins.keys() | before.keys() | after.keys()):
        versions = [pins.get(name, ""), before.get(name, ""), after.get(name, "")]
        as_listed = name not in pins or versions[0] == versions[1]
        if not as_listed or versions[1] != versions[2]:
            print(f"| {name} | {' | '.join(versions)} |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, metavar="LIST", help="file with NAME==VERSION lines, from pip freeze")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder, for all that is written")
    parser.add_argument("--python", default=sys.executable, help="the Python to make the environment with")
    parser.add_argument(
        "--replace", nargs="*", default=[], metavar="NAME==VERSION", help="install these in place of the list's"
    )
    parser.add_argument(
        "--scripts_dir",
        type=Path,
        default=toy_notebook.ROOT,
        help="another checkout, whose notebook and scripts to run",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    folder = args.output_dir.resolve()
    folder.mkdir(parents=True)
    listed = read_pins(args.list.read_text().splitlines())
    pins = {name: listed[name] for name in map(canonicalize_name, NAMES) if name in listed}
    replaced = read_pins(args.replace)
    language = subprocess.run([args.python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    print(f"{args.list.name} on {language}: {len(pins)} of its versions matter", flush=True)
    python = make_environment(pins | replaced, args.python, folder / "environment")
    before = installed_in(python)
    for name, version in pins.items():
        if before.get(name) != version:
            reason = "replaced by request" if name in replaced else "could not be had"
            print(f"{reason}: {name} {version}; instead {before.get(name, 'none')}", flush=True)

    started = time.monotonic()
    memory = Memory()
    memory.start()
    failure = run_notebook(args.scripts_dir.resolve(), python, folder)
    memory.over.set()
    seconds = time.monotonic() - started

    cells = json.loads((folder / "workplace" / "out.ipynb").read_text())["cells"]
    print_changes(pins, before, installed_in(python))
    print("\n| cell | its command | seconds |\n|---|---|---|", *seconds_of_cells(cells), sep="\n")
    print(f"\n{seconds:.0f} s, {memory.peak / GIB:.2f} GiB of RAM at the most (the kernel and what it started)")
    if failure:
        last = [cell for cell in cells if cell.get("outputs")][-1]
        print(f"the notebook failed in {last['id']}: {failure}\n{text_of(last)[-3000:]}")
        return 1
    print("the notebook passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
