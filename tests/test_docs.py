"""The README tells the truth: its flags exist, its commands parse."""

import re
import shlex

import compute_embeddings as embed
import pytest
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def flags_of(script: object, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


def test_every_flag_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    """Of our scripts, or of pip and accelerate."""
    known = flags_of(embed, capsys) | flags_of(trainer, capsys)
    known |= {"--help", "--quiet", "--num_cpu_threads_per_process", "--kills"}
    assert set(re.findall(r"--\w+", README)) - known == set()


def test_the_readmes_two_commands_parse() -> None:
    """And agree about the prompts, the folder and the file."""
    [first] = [command[2:] for command in COMMANDS if command[:2] == ["python", "compute_embeddings.py"]]
    [second] = [command[4:] for command in COMMANDS if command[:2] == ["accelerate", "launch"]]
    embedding, training = embed.parse_args(first), trainer.parse_args(second)
    assert (embedding.prompt, embedding.validation_prompt) == (training.instance_prompt, training.validation_prompt)
    assert (embedding.local_data_dir, embedding.output_path) == (training.instance_data_dir, training.data_df_path)
    assert embedding.pretrained_model_name_or_path == training.pretrained_model_name_or_path


def test_ci_runs_the_readmes_test_command() -> None:
    """The same words."""
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "python -m pytest" in script and ["python", "-m", "pytest"] in COMMANDS
