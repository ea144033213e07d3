"""README and notebook tell the truth: their flags exist, the README's commands parse, the notebook runs."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import compute_embeddings as embed
import measure_dreambooth
import papermill
import pytest
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import ROOT

README = (ROOT / "README.md").read_text()
NOTEBOOK = json.loads((ROOT / "notebook.ipynb").read_text())
COMMANDS = [
    shlex.split(command, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if command.strip()
]
OF_ACCELERATE = ["quiet", "num_cpu_threads_per_process", "multi_gpu", "num_processes", "num_machines", "machine_rank"]


def flags_of(script: object, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


def test_every_flag_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Of our scripts, or of pip and accelerate."""
    known = flags_of(embed, capsys) | flags_of(trainer, capsys)
    known |= {f"--{name}" for name in [*OF_ACCELERATE, "main_process_ip", "help", "kills", "variant"]}
    known |= {"--without_prior_preservation", "--pipeline_dir", "--vram_limit_gb", "--pictures"}  # for measuring
    assert set(re.findall(r"--\w+", README)) - known == set()


def test_the_readmes_commands_parse() -> None:
    """The toy's two and SD3's two; each pair agrees about model, prompts, folder and file."""
    embedding = [embed.parse_args(command[2:]) for command in COMMANDS if command[1:2] == ["compute_embeddings.py"]]
    script = "train_dreambooth_sd3_lora_miniature.py"
    training = [trainer.parse_args(command[command.index(script) + 1 :]) for command in COMMANDS if script in command]
    assert len(training) == 2 and len(embedding) == 3
    for one, other in zip(embedding, training, strict=False):
        assert (one.prompt, one.validation_prompt) == (other.instance_prompt, other.validation_prompt)
        assert (one.local_data_dir, one.output_path) == (other.instance_data_dir, other.data_df_path)
        assert one.pretrained_model_name_or_path == other.pretrained_model_name_or_path


def test_what_is_measured_is_the_readmes_first_command() -> None:
    """Its flags and no others but for what is written where."""
    [command] = [command for command in COMMANDS if "accelerate" in command and "tests/toy/model" in command]
    told = vars(trainer.parse_args(command[command.index("train_dreambooth_sd3_lora_miniature.py") + 1 :]))
    fixed = measure_dreambooth.command_line(measure_dreambooth.TRAINING_FLAGS)
    where = ["--data_df_path=robot.parquet", "--output_dir=robot-lora", "--with_prior_preservation"]
    previews = ["--validation_prompt", *told["validation_prompt"], "--validation_steps=600"]
    assert told == vars(trainer.parse_args([*fixed, *where, *previews]))


def test_ci_runs_the_readmes_test_command() -> None:
    """The same words."""
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "python -m pytest" in script and ["python", "-m", "pytest"] in COMMANDS
    [install] = [command[2:] for command in COMMANDS if command[:2] == ["pip", "install"] and "pytest" in command]
    assert any(line.endswith(" ".join(install)) for line in script)


def run_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: object) -> list[dict]:
    """Execute the notebook on the toy, in a folder with the scripts only; its cells afterwards."""
    for name in ("compute_embeddings.py", "train_dreambooth_sd3_lora_miniature.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    toy = ROOT / "tests" / "toy"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    small = {
        "MODEL": str(toy / "model"), "PHOTOS": str(toy / "robot"), "INSTANCE_PROMPT": "a photo of sks robot",
        "VALIDATION_PROMPTS": ["a photo of sks robot", "it's a toy"], "NEW_PROMPT": "sks robot on a green background",
        "MAX_SEQUENCE_LENGTH": 16, "RESOLUTION": 64, "STEPS": 4, "MIXED_PRECISION": "no", "INFERENCE_STEPS": 2,
    }  # fmt: skip
    notebook = papermill.execute_notebook(
        ROOT / "notebook.ipynb", folder / "out.ipynb", small | parameters, cwd=folder, progress_bar=False
    )
    return notebook.cells


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom on the toy: it shows photos, previews and new pictures."""
    cells = run_notebook(tmp_path, monkeypatch)
    shown = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(shown) == 3
    lora = tmp_path / "sd3-dreambooth-lora"
    assert (lora / trainer.LORA_NAME).exists() and len(list(lora.glob("new-*.png"))) == 2


def test_a_failing_script_fails_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell command's exit code is looked at."""
    with pytest.raises(papermill.PapermillExecutionError, match="no embeddings: see the message above"):
        run_notebook(tmp_path, monkeypatch, T5_PRECISION="int3")


def test_the_notebook_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """At most 14 cells, no outputs, no widgets, and only flags that exist."""
    cells = NOTEBOOK["cells"]
    assert len(cells) <= 14 and "widgets" not in NOTEBOOK["metadata"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    text = "".join("".join(cell["source"]) for cell in cells)
    known = flags_of(embed, capsys) | flags_of(trainer, capsys) | {"--quiet"}
    assert set(re.findall(r"--\w+", text)) - known == set()
