"""README and notebook tell the truth: their flags exist, the README's commands parse, the notebook runs."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import papermill
import pytest

import compute_embeddings as embed
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import ROOT

TRAINER = "train_dreambooth_sd3_lora_miniature.py"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "tests/README.md", "tests/toy/README.md")]
NOTEBOOK = json.loads((ROOT / "notebook.ipynb").read_text())
COMMANDS = [
    shlex.split(command, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if command.strip()
]
OF_OTHERS = (
    "quiet multi_gpu num_processes num_machines machine_rank main_process_ip check help extra-index-url".split()
)


def flags_of(script: object, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


def known_flags(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Of our scripts, of those for measuring, and of pip, ruff and accelerate."""
    known = flags_of(embed, capsys) | flags_of(trainer, capsys) | {f"--{name}" for name in OF_OTHERS}
    for path in (ROOT / "tests").rglob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text()))
    return known


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_flag_in_a_page_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No page names a flag that is gone."""
    assert set(re.findall(r"--[\w-]+", page.read_text())) - known_flags(capsys) - {"---"} == set()


def test_the_readmes_commands_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's two, whose flags stand in files, and SD3's two; each pair agrees about model, prompts and files."""
    monkeypatch.chdir(ROOT)
    embedding = [embed.parse_args(command[2:]) for command in COMMANDS if command[1:2] == ["compute_embeddings.py"]]
    commands = [command[command.index(TRAINER) + 1 :] for command in COMMANDS if TRAINER in command]
    training = [trainer.parse_args(command) for command in commands]
    assert len(training) == len(embedding) == 2
    for one, other in zip(embedding, training, strict=True):
        assert (one.prompt, one.validation_prompt) == (other.instance_prompt, other.validation_prompt)
        assert (one.local_data_dir, one.output_path) == (other.instance_data_dir, other.data_df_path)
        assert one.pretrained_model_name_or_path == other.pretrained_model_name_or_path
        assert one.class_prompt == other.class_prompt


def test_the_readmes_files_of_settings_parse(tmp_path: Path) -> None:
    """For SD3.5-medium and SD3.5-large; a flag after the file wins."""
    files = re.findall(r"```text\n(--.*?)```", README, re.S)
    required = ["--instance_data_dir=d", "--data_df_path=e", "--instance_prompt=p"]
    models = []
    for text in files:
        (tmp_path / "settings.txt").write_text(text)
        args = trainer.parse_args([*required, f"@{tmp_path / 'settings.txt'}", "--rank=7"])
        models.append(args.pretrained_model_name_or_path.rsplit("/", 1)[1])
        assert args.rank == 7 and args.resolution == 1024
    assert models == ["stable-diffusion-3.5-medium", "stable-diffusion-3.5-large"]


def test_ci_runs_the_readmes_test_commands() -> None:
    """Each of them is a line of .ci/run."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [shlex.join(command) for command in COMMANDS if command[0] in ("ruff", "mypy") or "pytest" in command]
    tests = [command for command in commands if not command.startswith("pip")]
    assert len(tests) == 4 and [command for command in tests if command not in lines] == []


def run_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> list[dict]:
    """Execute the notebook on the toy in a folder; its cells afterwards."""
    toy = ROOT / "tests" / "toy"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    small = {
        "MODEL": str(toy / "model"),
        "PHOTOS": str(toy / "robot"),
        "INSTANCE_PROMPT": "a photo of sks robot",
        "VALIDATION_PROMPTS": ["a photo of sks robot", "it's a toy"],
        "NEW_PROMPT": "sks robot on a green background",
        "MAX_SEQUENCE_LENGTH": 16,
        "RESOLUTION": 64,
        "STEPS": 4,
        "MIXED_PRECISION": "no",
        "INFERENCE_STEPS": 2,
    }
    notebook = papermill.execute_notebook(
        ROOT / "notebook.ipynb", folder / "out.ipynb", small | parameters, cwd=folder, progress_bar=False
    )
    return notebook.cells


@pytest.fixture
def beside_scripts(tmp_path: Path) -> Path:
    """A folder with the scripts only."""
    for name in ("compute_embeddings.py", TRAINER, "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_notebook_runs(beside_scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom on the toy: it shows photos, previews and new images."""
    cells = run_notebook(beside_scripts, monkeypatch)
    shown = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(shown) == 3
    lora = beside_scripts / "sd3-dreambooth-lora"
    assert (lora / trainer.LORA_NAME).exists() and len(list(lora.glob("new-*.png"))) == 2


def test_the_notebook_alone_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of Colab, without the scripts beside it."""
    with pytest.raises(papermill.PapermillExecutionError, match=r"Put compute_embeddings.py, .* or set REPOSITORY"):
        run_notebook(tmp_path, monkeypatch)


def test_a_failing_script_fails_the_notebook(beside_scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell command's exit code is looked at."""
    with pytest.raises(papermill.PapermillExecutionError, match="no embeddings: see the message above"):
        run_notebook(beside_scripts, monkeypatch, T5_PRECISION="int3")


def test_the_notebook_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """At most 14 cells, no outputs, no widgets, and only flags that exist."""
    cells = NOTEBOOK["cells"]
    assert len(cells) <= 14 and "widgets" not in NOTEBOOK["metadata"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    text = "".join("".join(cell["source"]) for cell in cells)
    assert set(re.findall(r"--\w+", text)) - known_flags(capsys) == set()


def test_the_notebooks_embeddings_go_where_the_transformer_is() -> None:
    """On a GPU they were left on the CPU, and the second denoising step failed."""
    [cell] = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if "load_lora_weights" in "".join(cell["source"])]
    assert re.search(r"to_numpy_ndarray\(\)\[rows\]\)\.to\(device, dtype\)", cell)
