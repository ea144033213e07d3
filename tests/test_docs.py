"""README and notebook tell the truth: their flags exist, the README's commands parse, the notebook runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import papermill
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import FileLink
from PIL import Image
from traitlets.config import Config

import compute_embeddings as embed
import measuring
import toy_notebook
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import ROOT, names

TRAINER = "train_dreambooth_sd3_lora_miniature.py"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / name for name in ("README.md", "tests/README.md", "tests/MEASURED.md", "tests/toy/README.md")]
NOTEBOOK = json.loads((ROOT / "notebook.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
COMMANDS = [
    shlex.split(command, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("&&")
    if command.strip()
]
OF_OTHERS = {"quiet", "multi_gpu", "num_processes", "num_machines", "machine_rank", "main_process_ip"}  # accelerate's
OF_OTHERS |= {"check", "help", "cache_latents", "logdir", "mixed_precision", "dynamo_backend", "main_process_port"}
OF_OTHERS |= {"torch-backend", "type", "private", "local-dir", "flavor", "timeout", "secrets"}  # uv's and hf's


def flags_of(script: object, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


def known_flags(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Of our scripts, of those for measuring, and of uv, ruff, accelerate and hf."""
    known = flags_of(embed, capsys) | flags_of(trainer, capsys) | {f"--{name}" for name in OF_OTHERS}
    for path in (ROOT / "tests").rglob("*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', path.read_text()))
    return known


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_flag_in_a_page_exists(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No page names a flag that is gone."""
    assert set(re.findall(r"--[\w-]+", page.read_text())) - known_flags(capsys) - {"---"} == set()


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """Files exist, and contents name headings of the page."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    assert targets or page.name != "README.md"
    for target in targets:
        file, _, anchor = target.partition("#")
        assert (page.parent / file).exists() and (not anchor or anchor in anchors), target


def test_the_readmes_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's two, whose flags stand in files, and SD3's and SD3.5's; each pair agrees about what both must know."""
    monkeypatch.chdir(ROOT)
    file = tmp_path / "sd35.txt"
    [settings] = re.findall(r"```text\n(--.*?)```", README, re.S)
    file.write_text(settings)
    embedding = [embed.parse_args(command[2:]) for command in COMMANDS if command[1:2] == ["compute_embeddings.py"]]
    [new_prompt] = [args for args in embedding if args.output_path == Path("new.parquet")]  # which is not trained on
    embedding.remove(new_prompt)
    training = []
    for command in COMMANDS:
        if TRAINER in command:
            flags = command[command.index(TRAINER) + 1 :]
            training.append(trainer.parse_args([flag.replace("@sd35.txt", f"@{file}") for flag in flags]))
    assert len(training) == len(embedding) == 3
    for one, other in zip(embedding, training, strict=True):
        assert (one.prompt, one.validation_prompt) == (other.instance_prompt, other.validation_prompt)
        assert (one.local_data_dir, one.output_path) == (other.instance_data_dir, other.data_df_path)
        assert one.pretrained_model_name_or_path == other.pretrained_model_name_or_path
        assert one.class_prompt == other.class_prompt


def test_the_readmes_file_of_settings_parses(tmp_path: Path) -> None:
    """With the line that SD3.5-large adds; a flag after the file wins."""
    [text] = re.findall(r"```text\n(--.*?)```", README, re.S)
    (tmp_path / "settings.txt").write_text(f"{text}--quantize_base nf4\n")
    required = ["--instance_data_dir=d", "--data_df_path=e", "--instance_prompt=p"]
    args = trainer.parse_args([*required, f"@{tmp_path / 'settings.txt'}", "--rank=7"])
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-3.5-medium"
    assert (args.rank, args.quantize_base, args.resolution) == (7, "nf4", (1024,))


def test_the_first_command_trains_the_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """try.sh installs nothing in an active environment that lacks nothing, and hands flags on to the trainer."""
    toy_notebook.copy_scripts(ROOT, tmp_path)
    shutil.copytree(toy_notebook.TOY, tmp_path / "tests" / "toy")
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    for name in ("PIP_NO_INDEX", "UV_OFFLINE"):
        monkeypatch.setenv(name, "1")
    small = ["--max_train_steps=1", "--num_class_images=2", "--num_inference_steps=1", "--num_validation_images=1"]
    command = ["bash", tmp_path / "tests" / "toy" / "try.sh", *small]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    picture = re.search(r"wrote (\S+progress\.png)", said)
    assert picture and "1 step to train" in said
    assert Image.open(tmp_path / picture[1]).width > 2 * 256  # columns of steps 0 and 1


def test_the_first_command_runs_what_is_shown_below_it() -> None:
    """Each of the toy's commands is a line of try.sh, or its beginning."""
    script = (ROOT / "tests" / "toy" / "try.sh").read_text()
    start = COMMANDS.index(["bash", "tests/toy/try.sh"])
    shown = [shlex.join(command) for command in COMMANDS[start + 1 : start + 7]]
    assert "@tests/toy/train.txt" in shown[-1]
    assert [command for command in shown if command not in script] == []


def test_ci_runs_the_readmes_test_commands() -> None:
    """Each of them is a line of .ci/run."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [shlex.join(command) for command in COMMANDS if command[0] in ("ruff", "mypy") or "pytest" in command]
    assert len(commands) == 5 and [command for command in commands if command not in lines] == []


# What is said in one cell alone.
INSTALL, LOG_IN, LOOK = "!pip install", "import get_token", "def show"
EMBED, TRAIN, DOWNLOAD = '"embeddings.parquet"]\n', "!accelerate launch", "FileLink"
DRAW = "StableDiffusion3Pipeline"


def run_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> list[dict]:
    """Execute the notebook in a folder, in a kernel of its own; return its cells afterwards."""
    pip = folder / "bin" / "pip"  # tests change no environment: nothing is uninstalled, and what is installed is there
    pip.parent.mkdir(exist_ok=True)
    pip.write_text(f'#!/bin/sh\n[ "$1" = uninstall ] || exec {shlex.quote(sys.executable)} -m pip "$@"\n')
    pip.chmod(0o755)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for programs in (Path(sys.executable).parent, pip.parent):
        monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    return toy_notebook.execute(NOTEBOOK, folder, settings)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A Git repository with what a clone of this checkout would have, whether it is committed yet or not."""
    folder = tmp_path / "repository"
    folder.mkdir()
    toy_notebook.copy_scripts(ROOT, folder)
    git = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=m"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with five photos in a sub-folder, each of another format and one on its side, and nothing else."""
    folder = tmp_path / "workplace"
    toy_notebook.write_photos(folder / "robot")
    return folder


def test_a_failing_command_ends_the_notebook(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell command's exit code is looked at, in a real kernel."""
    with pytest.raises(papermill.PapermillExecutionError, match="SystemExit: The scripts were not cloned"):
        run_notebook(workplace, monkeypatch, REPOSITORY=str(workplace / "missing"))


class Notebook(InteractiveShell):
    """Runs the notebook's cells in this process and records its shell commands, which end with exit_code.

    A training with an exit code of 0 leaves a LoRA behind unless interrupted.
    """

    def __init__(self) -> None:
        config = Config(HistoryManager={"enabled": False})
        super().__init__(config=config, user_module=ModuleType("notebook"))
        self.commands: list[str] = []
        self.exit_code = 0
        self.interrupted = False

    def system(self, command: str) -> None:
        self.commands.append(self.var_expand(command, depth=1))
        self.user_ns["_exit_code"] = self.exit_code
        if command.startswith("accelerate launch") and not self.exit_code and not self.interrupted:
            lora = Path(self.user_ns["OUTPUT_DIR"], trainer.LORA_NAME)
            lora.parent.mkdir(exist_ok=True)
            lora.write_text("LoRA")

    def run(self, *texts: str) -> None:
        """Run the cells that contain these texts; raise what a cell raises."""
        for text in texts:
            [source] = [source for source in CELLS if text in source]
            self.run_cell(source).raise_error()


class ColabNotebook(Notebook):
    """It looks as if it ran on Colab."""


ColabNotebook.__module__ = "google.colab._shell"


class NotebookThatForks(Notebook):
    """Its two scripts run, each in a process that is forked from this one; other commands do nothing."""

    def system(self, command: str) -> None:
        words = shlex.split(self.var_expand(command, depth=1))
        script = [number for number, word in enumerate(words) if word.endswith(".py")]
        self.user_ns["_exit_code"] = 0
        if script:
            taken = measuring.measure(words[script[0] :], Path("log.txt").absolute(), launcher=())
            self.user_ns["_exit_code"] = taken["code"]


@pytest.fixture
def start(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Notebook]:
    """A notebook beside the scripts and the photos, after its first cell, with other settings."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("HF_TOKEN", "")
    toy_notebook.copy_scripts(ROOT, workplace)

    def run(kind: type[Notebook] = Notebook, **settings: object) -> Notebook:
        notebook = kind()
        notebook.run("MODEL =")
        notebook.user_ns |= toy_notebook.SETTINGS | settings
        return notebook

    return run


def test_the_notebook_runs_for_a_new_user(
    workplace: Path, repository: Path, start: Callable[..., Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From top to bottom on the toy, over what a first try has left that got as far as training; training goes on."""
    start(NotebookThatForks, STEPS=2).run(INSTALL, LOOK, EMBED, TRAIN)
    lora = workplace / "sd3-dreambooth-lora"
    assert names(trainer.list_checkpoints(lora)) == ["checkpoint-2"]
    cells = run_notebook(workplace, monkeypatch, STEPS=3, REPOSITORY=str(repository))
    assert names(trainer.list_checkpoints(lora)) == ["checkpoint-2", "checkpoint-3"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    assert "1 step to train, from step 2" in said and "No LoRA keys" not in said
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) == 4
    assert (lora / trainer.LORA_NAME).exists() and len(list(lora.glob("new-*.png"))) == 2


def test_the_install_cell_can_be_run_twice(start: Callable[..., Notebook], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Google Drive, the second run put a path into the path, and no checkpoint was found there."""
    drive = SimpleNamespace(mount=lambda folder: None)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(drive=drive))
    notebook = start(ColabNotebook, DRIVE=True)
    notebook.run(INSTALL, INSTALL)
    assert notebook.user_ns["OUTPUT_DIR"] == "/content/drive/MyDrive/sd3-dreambooth-lora"


def test_the_install_cell_removes_torchao(start: Callable[..., Notebook]) -> None:
    """Colab and Kaggle have one that PEFT refused after the embeddings, the downloads and the encoding."""
    notebook = start()
    notebook.run(INSTALL)
    first, second = (shlex.split(command) for command in notebook.commands)
    assert first[:2] == ["pip", "uninstall"] and "-y" in first and first[-1] == "torchao"
    assert second[:2] == ["pip", "install"]


def test_a_drive_elsewhere_than_on_colab_is_one_message(start: Callable[..., Notebook]) -> None:
    """Also where google.colab can be imported, as on Kaggle."""
    with pytest.raises(SystemExit, match="Set DRIVE = False"):
        start(DRIVE=True).run(INSTALL)


def test_missing_scripts_are_one_message(start: Callable[..., Notebook], workplace: Path) -> None:
    """With the names of the files and the folder."""
    notebook = start()
    (workplace / TRAINER).unlink()
    with pytest.raises(SystemExit, match=f"Put {TRAINER} into {workplace}, or set REPOSITORY"):
        notebook.run(INSTALL)


def test_the_sheet_shows_what_the_training_sees(
    start: Callable[..., Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEIC, AVIF, TIFF and BMP too, and upright; they alone were an empty sheet and a ValueError."""
    shown: list[Image.Image] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    start().run(INSTALL, LOOK)
    [sheet] = shown
    assert sheet.size == (4 * 256, 2 * 256)
    for number, path in enumerate(sorted((ROOT / "tests" / "toy" / "robot").glob("*.png"))):
        row, column = divmod(number, 4)
        tile = sheet.crop((column * 256, row * 256 + 32, (column + 1) * 256, row * 256 + 224))  # without its border
        difference = np.asarray(tile.resize((64, 48)), int) - np.asarray(Image.open(path).resize((64, 48)), int)
        assert abs(difference).mean() < 20


def test_missing_photos_are_one_message(
    start: Callable[..., Notebook], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else's dog was fetched in their place."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("photos were fetched"))
    with pytest.raises(SystemExit, match=f"dog does not exist. Put photos into {workplace / 'dog'}, or set EXAMPLE"):
        start(PHOTOS="dog").run(INSTALL, LOOK)
    (workplace / "dog").mkdir()
    with pytest.raises(SystemExit, match="dog has no images"):
        start(PHOTOS="dog").run(INSTALL, LOOK)


def test_a_broken_photo_is_one_message(start: Callable[..., Notebook], workplace: Path) -> None:
    """The script's own."""
    (workplace / "robot" / "5.png").write_text("no image")
    with pytest.raises(SystemExit, match="5.png cannot be read"):
        start().run(INSTALL, LOOK)


def test_example_photos_never_mix_with_yours(
    start: Callable[..., Notebook], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have a folder of their own, which both scripts are told to read."""

    def snapshot_download(name: str, local_dir: Path, **_: object) -> None:
        shutil.copytree(workplace / "robot", local_dir, dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    notebook = start(EXAMPLE_PHOTOS=True)
    notebook.run(INSTALL, LOOK, LOOK, EMBED, TRAIN)
    assert "--local_data_dir example-photos " in notebook.commands[-2]
    assert "--instance_data_dir example-photos " in notebook.commands[-1]


def test_example_photos_without_a_network_are_one_message(start: Callable[..., Notebook]) -> None:
    """Instead of the traceback of a library."""
    with pytest.raises(SystemExit, match="The example photos cannot be fetched"):
        start(EXAMPLE_PHOTOS=True).run(INSTALL, LOOK)


@pytest.mark.parametrize("text", [INSTALL, EMBED, TRAIN, DRAW])
def test_a_failing_command_is_one_message(start: Callable[..., Notebook], text: str) -> None:
    """Each cell looks at the exit code of its command."""
    notebook = start()
    cells = [INSTALL, LOOK, EMBED, TRAIN, DRAW]
    notebook.run(*cells[: cells.index(text)])
    notebook.exit_code = 1
    with pytest.raises(SystemExit, match="see the message above"):
        notebook.run(text)


def test_an_interrupted_training_is_noticed(start: Callable[..., Notebook]) -> None:
    """Also with an exit code of 0, which an interrupt can leave; a LoRA of an earlier training does not count."""
    notebook = start()
    notebook.run(INSTALL, LOOK, EMBED)
    notebook.interrupted = True
    with pytest.raises(SystemExit, match="Run this cell again"):
        notebook.run(TRAIN)
    notebook.interrupted = False
    notebook.run(TRAIN, TRAIN)
    notebook.interrupted = True
    with pytest.raises(SystemExit, match="Run this cell again"):
        notebook.run(TRAIN)


def test_the_lora_is_downloaded(
    start: Callable[..., Notebook], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Colab's own means there, and elsewhere by a link."""
    shown: list[FileLink] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    start().run(INSTALL, LOG_IN, LOOK, EMBED, TRAIN, DOWNLOAD)
    assert shown[-1].path == f"sd3-dreambooth-lora/{trainer.LORA_NAME}"
    downloaded: list[str] = []
    colab = SimpleNamespace(files=SimpleNamespace(download=downloaded.append))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    start(ColabNotebook).run(INSTALL, LOG_IN, LOOK, EMBED, TRAIN, DOWNLOAD)
    assert downloaded == [str(workplace / "sd3-dreambooth-lora" / trainer.LORA_NAME)]


def test_secrets_of_colab_and_kaggle_reach_the_scripts(
    start: Callable[..., Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As HF_TOKEN: a process that the notebook starts cannot read them. Nobody is asked to log in."""
    monkeypatch.setattr("huggingface_hub.login", lambda: pytest.fail("asked to log in"))
    colab = SimpleNamespace(userdata=SimpleNamespace(get={"HF_TOKEN": "hf_colab"}.get))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    start(ColabNotebook, MODEL="owner/name").run(INSTALL, LOG_IN)
    assert os.environ["HF_TOKEN"] == "hf_colab"
    kaggle = SimpleNamespace(UserSecretsClient=lambda: SimpleNamespace(get_secret={"HF_TOKEN": "hf_kaggle"}.get))
    monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle)
    start(MODEL="owner/name").run(INSTALL, LOG_IN)
    assert os.environ["HF_TOKEN"] == "hf_kaggle"


def test_without_a_secret_the_notebook_asks(start: Callable[..., Notebook], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, where a login is needed: for a model of the Hub or to upload; and a failed one is one message."""
    asked = []
    monkeypatch.setattr("huggingface_hub.login", lambda: asked.append("login"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    start().run(INSTALL, LOG_IN)
    assert asked == []
    for settings in ({"MODEL": "owner/name"}, {"PUSH_TO_HUB": True}):
        with pytest.raises(SystemExit, match="You are not logged in"):
            start(**settings).run(INSTALL, LOG_IN)
    assert asked == ["login", "login"]


@pytest.mark.parametrize(("gpus", "accumulation"), [(0, 4), (1, 4), (2, 2)])
def test_gpus_share_the_images_of_a_step(
    start: Callable[..., Notebook], monkeypatch: pytest.MonkeyPatch, gpus: int, accumulation: int
) -> None:
    """Kaggle's two train what Colab's one trains, so that either can continue what the other began."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    notebook = start()
    notebook.run(INSTALL, LOOK, EMBED, TRAIN)
    command = notebook.commands[-1]
    several = "--multi_gpu --main_process_port 0 "  # a launcher that was left over may hold the usual port
    assert f"--num_processes {max(1, gpus)} " in command and (several in command) == (gpus > 1)
    assert f"--train_batch_size 1 --gradient_accumulation_steps {accumulation} " in command


def parsed_commands(notebook: Notebook, **settings: object) -> tuple[embed.Args, trainer.Args]:
    """Return what the scripts make of the notebook's commands, with the settings as they stand but for these."""
    notebook.run("MODEL =")
    notebook.user_ns |= {"PHOTOS": "robot"} | settings
    notebook.run(INSTALL, LOOK, EMBED, TRAIN)
    embedding, training = (shlex.split(command) for command in notebook.commands[-2:])
    return embed.parse_args(embedding[2:]), trainer.parse_args(training[training.index(f"./{TRAINER}") + 1 :])


def test_the_notebooks_commands_parse(start: Callable[..., Notebook]) -> None:
    """With the settings as they stand, but for the photos; also without previews, and with an upload."""
    for settings in ({}, {"VALIDATION_PROMPTS": [], "PUSH_TO_HUB": True}):
        one, other = parsed_commands(start(), **settings)
        assert (one.prompt, one.validation_prompt) == (other.instance_prompt, other.validation_prompt)
        assert (one.local_data_dir, one.output_path) == (other.instance_data_dir, other.data_df_path)
        assert other.push_to_hub == bool(settings) and other.max_train_steps == 400
        assert one.class_prompt is None and not other.with_prior_preservation


def test_a_class_prompt_reaches_both_scripts(start: Callable[..., Notebook]) -> None:
    """The embeddings have it, and the trainer uses it."""
    one, other = parsed_commands(start(), CLASS_PROMPT="a photo of a 'robot'")
    assert one.class_prompt == other.class_prompt == "a photo of a 'robot'"
    assert other.with_prior_preservation


def test_more_flags_come_last(start: Callable[..., Notebook]) -> None:
    """As they stand, so that they win over the notebook's own."""
    _, other = parsed_commands(start(), MORE_FLAGS="--seed 1 --negative_prompt 'too dark' --center_crop")
    assert (other.seed, other.negative_prompt, other.center_crop) == (1, "too dark", True)


def test_the_notebook_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """At most 14 cells, no outputs, no widgets, and only flags that exist."""
    cells = NOTEBOOK["cells"]
    assert len(cells) <= 14 and "widgets" not in NOTEBOOK["metadata"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    text = "".join("".join(cell["source"]) for cell in cells)
    assert set(re.findall(r"--\w+", text)) - known_flags(capsys) == set()


def test_a_new_prompts_embeddings_go_where_the_transformer_is(
    start: Callable[..., Notebook], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they were left on the CPU, and the second denoising step failed. Here "meta" stands for the GPU."""
    notebook = start()
    notebook.run(INSTALL, LOOK, EMBED, TRAIN)
    model, prompt = toy_notebook.SETTINGS["MODEL"], toy_notebook.SETTINGS["NEW_PROMPT"]
    flags = [f"--pretrained_model_name_or_path={model}", f"--prompt={prompt}", "--max_sequence_length=16"]
    embed.main(embed.parse_args([*flags, "--local_data_dir=robot", "--output_path=new.parquet"]))
    pipeline = MagicMock()
    draw = pipeline.from_pretrained.return_value
    draw.return_value.images = [Image.new("RGB", (64, 64))]
    move = torch.Tensor.to

    def move_to_meta(tensor: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
        assert device == "cuda"
        return move(tensor, "meta", dtype)

    monkeypatch.setattr("diffusers.StableDiffusion3Pipeline", pipeline)
    monkeypatch.setattr("diffusers.training_utils.free_memory", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.Tensor.to", move_to_meta)
    notebook.run(DRAW)
    [given] = draw.call_args_list
    embeds = [value for name, value in given.kwargs.items() if "embeds" in name]
    assert [(each.device.type, each.dtype) for each in embeds] == [("meta", torch.float16)] * 4
