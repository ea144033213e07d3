"""Nothing is lost: interruptions, torn files, full disks, vanished readers, numbers that are not finite."""

import importlib.util
import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import peft
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, compute, equal, logged, lora, names, state
from kill import AIMS, survive

Train = Callable[..., Path]
LATEST = "--resume_from_checkpoint=latest"
PREVIEWS = [f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=1", "--checkpointing_steps=1"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sigkill_loses_nothing() -> None:
    """Killed at random moments, and while each kind of file is written. tools/kill.py does it more often."""
    cut, completed = survive(kills=3, rounds=1)
    assert cut == 3 + len(AIMS) and completed >= 1


def test_a_checkpoint_without_its_state_is_none(train: Train) -> None:
    """The state is written last, so it was being saved when the machine vanished; the one before it is taken."""
    output = train("--checkpointing_steps=1")
    expected = lora(output)
    (output / "checkpoint-4" / trainer.STATE_NAME).unlink()
    assert trainer.list_checkpoints(output)[-1].name == "checkpoint-3"
    train("--checkpointing_steps=1", LATEST)
    assert equal(lora(output), expected)


class Evil:
    """What a pickle can do when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("kind", ["empty", "half", "pickle", "flipped bit", "code", "pipe"])
def test_a_state_that_is_not_whole_is_one_message(train: Train, tmp_path: Path, kind: str) -> None:
    """Whatever stands in training_state.pt, no code in it runs and nobody waits; the message has the other ones."""
    state = train("--checkpointing_steps=2") / "checkpoint-4" / trainer.STATE_NAME
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    contents = {"empty": b"", "half": content[: len(content) // 2], "pickle": pickle.dumps([]), "flipped bit": content}
    state.unlink()
    if kind == "code":
        torch.save(Evil(tmp_path / "ran"), state)
    elif kind == "pipe":
        os.mkfifo(state)
    else:
        state.write_bytes(contents[kind])
    with pytest.raises(SystemExit, match="checkpoint-4/training_state.pt cannot be read.*checkpoint-2"):
        train(LATEST)
    train("--resume_from_checkpoint=checkpoint-2")
    assert not (tmp_path / "ran").exists()


def at_step(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal in the middle of a step."""
    loss, steps = trainer.training_loss, iter(range(1, 1000))

    def training_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
        if not measuring and next(steps) == step:
            os.kill(os.getpid(), number)
        return loss(model, batch, *rest)

    measuring: list[bool] = []
    choose = trainer.choose_recomputation

    def choose_recomputation(*args: object) -> float:
        measuring.append(True)
        seconds = choose(*args)
        measuring.clear()
        return seconds

    monkeypatch.setattr(trainer, "choose_recomputation", choose_recomputation)
    monkeypatch.setattr(trainer, "training_loss", training_loss)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step(train: Train, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """With a checkpoint of that very step, and word of how to go on; the end is that of a run without it."""
    expected = lora(train(output="whole"))
    with monkeypatch.context() as patch:
        at_step(2, number, patch)
        with pytest.raises(SystemExit, match="after step 2; .*--resume_from_checkpoint latest"):
            train()
    assert equal(lora(train(LATEST)), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_data_worker_survives_what_reaches_the_whole_terminal(
    train: Train, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The step that a signal waits for needs its samples. A spawned worker would die of the first one."""
    get = trainer.SampleDataset.__getitem__

    def get_after_signals(dataset: trainer.SampleDataset, index: int) -> dict:
        if torch.utils.data.get_worker_info() and index == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a forked one has inherited the handler that notes the first
        return get(dataset, index)

    monkeypatch.setattr(trainer.SampleDataset, "__getitem__", get_after_signals)
    assert len(logged(train("--dataloader_num_workers=1"))) == 4
    assert pickle.loads(pickle.dumps(trainer.ignore_end_signals)) is trainer.ignore_end_signals  # as spawning does


def test_ctrl_break_of_windows_ends_a_run_like_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it exists; its number means something else on Linux."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    spec = importlib.util.spec_from_file_location("on_windows", trainer.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "on_windows", module)
    spec.loader.exec_module(module)
    assert signal.SIGUSR1 in module.END_SIGNALS


def test_sighup_is_ignored_where_nohup_says_so(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the run goes on to its end."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(2, signal.SIGHUP, monkeypatch)
    assert len(logged(train())) == 4


def test_a_repeated_signal_within_two_seconds_is_the_same_one(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal, a shell and a launcher each send it; the second one ended the run without a checkpoint."""
    flags = ["--gradient_accumulation_steps=2"]
    expected = lora(train(*flags, output="whole"))
    loss = trainer.training_loss

    def slow_loss(*args: object) -> torch.Tensor:
        time.sleep(0.1)
        return loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_loss", slow_loss)
        at_step(3, signal.SIGINT, patch)
        at_step(4, signal.SIGINT, patch)  # the next micro-batch of the same step, 0.1 s later
        with pytest.raises(SystemExit, match="after step 2; "):
            train(*flags)
    assert equal(lora(train(LATEST, *flags)), expected)


def test_a_later_signal_ends_at_once() -> None:
    """The first is noted, the next within two seconds too, one after that kills."""
    child = os.fork()
    if child == 0:
        stop = trainer.StopRequest()
        stop.saves_first = True
        stop.listen()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        stop.first_signal -= 2.1
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_a_run_whose_launcher_is_gone_saves_and_ends(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orphan would hold the GPU and the folder. A shell that nohup outlives is no launcher."""
    expected = lora(train(output="whole"))
    step = []

    def log(*args: object, **kwargs: object) -> None:
        step.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Accelerator, "log", log)
        patch.setattr(trainer, "PARENT", 1000)
        patch.setattr(os, "getppid", lambda: 1 if step else 1000)
        assert equal(lora(train(output="not launched")), expected)
        step.clear()
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        with pytest.raises(SystemExit, match="Stopped after step 2; "):
            train()
    assert equal(lora(train(LATEST)), expected)


def test_a_preview_comes_after_a_checkpoint(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal while it is drawn lets the run end after the next step; whoever has no patience loses nothing."""
    expected = lora(train(output="whole"))
    make, found = trainer.make_previews, []

    def make_previews(args: trainer.Args, plan: trainer.Plan, state: trainer.TrainState, *rest: object) -> list:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            found.extend(names(trainer.list_checkpoints(args.output_dir)))
        return make(args, plan, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_previews", make_previews)
        with pytest.raises(SystemExit, match="Stopped after step 3; a checkpoint is saved."):
            train(PREVIEWS[0], "--validation_steps=2")
    assert found == ["checkpoint-2"]
    assert equal(lora(train(LATEST)), expected)


def test_a_signal_in_the_last_previews_comes_after_the_lora(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is written, and it is the one of a run without the signal."""
    expected = lora(train(output="whole"))

    def make_previews(args: trainer.Args, plan: trainer.Plan, state: trainer.TrainState, *rest: object) -> list:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return []

    monkeypatch.setattr(trainer, "make_previews", make_previews)
    with pytest.raises(SystemExit, match="^Interrupted"):
        train(PREVIEWS[0])
    assert equal(lora(tmp_path / "out"), expected)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Make the losses of some samples infinite."""

    def spoil(samples: range) -> None:
        loss = trainer.training_loss

        def training_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
            value = loss(model, batch, *rest)
            return value * float("inf") if int(batch["sample_number"][0]) in samples else value

        monkeypatch.setattr(trainer, "training_loss", training_loss)

    return spoil


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_step_that_is_not_finite_is_skipped(train: Train, spoiled: Callable[[range], None], precision: str) -> None:
    """The LoRA stays finite; fp16's loss scale is halved."""
    spoiled(range(1, 2))
    output = train(f"--mixed_precision={precision}", "--checkpointing_steps=1", "--checkpoints_total_limit=0")
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert all(value.isfinite().all() for value in lora(output).values())
    assert not equal(lora(output / "checkpoint-1"), lora(output / "checkpoint-3"))
    if precision == "fp16":
        states = [torch.load(output / f"checkpoint-{step}" / trainer.STATE_NAME) for step in (1, 3)]
        assert states[0]["scaler"]["scale"] == 2 * states[1]["scaler"]["scale"]


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_schedule_free_averages_no_skipped_step(
    train: Train, spoiled: Callable[[range], None], precision: str
) -> None:
    """It counts what it averages; three of four steps are that."""
    spoiled(range(1, 2))
    output = train(f"--mixed_precision={precision}", "--optimizer=adamw_schedulefree")
    assert state(output / "checkpoint-4")["optimizer"]["param_groups"][0]["k"] == 3


@pytest.mark.parametrize(("precision", "skipped"), [("no", 1), ("fp16", 2)])
def test_a_run_that_ends_in_such_steps_is_no_success(
    train: Train, spoiled: Callable[[range], None], precision: str, skipped: int
) -> None:
    """The last good checkpoint is named, and no LoRA written; one step is what fp16's scaler costs now and then."""
    spoiled(range(4 - skipped, 4))
    with pytest.raises(SystemExit, match="(?s)diverged.*checkpoint-2.*--learning_rate"):
        train(f"--mixed_precision={precision}", "--checkpointing_steps=2")
    output = train("--mixed_precision=fp16", output="one step", max_train_steps=4 if skipped == 1 else 3)
    assert trainer.list_checkpoints(output)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_many_such_steps_in_a_row_end_the_run(train: Train, spoiled: Callable[[range], None], precision: str) -> None:
    """With the usual causes; the checkpoint before them is whole."""
    spoiled(range(2, 1000))
    with pytest.raises(SystemExit, match="(?s)last (20|17) steps were not finite.*checkpoint-2.*--learning_rate"):
        train(f"--mixed_precision={precision}", "--checkpointing_steps=2", max_train_steps=30)


def test_a_loss_scale_below_one_ends_the_run(train: Train, spoiled: Callable[[range], None]) -> None:
    """One bad photo in two halves it again and again, until gradients are zero while the loss looks well."""
    spoiled(range(0, 1000, 2))
    with pytest.raises(SystemExit, match="loss scale .*--learning_rate"):
        train("--mixed_precision=fp16", max_train_steps=60)


def test_a_lora_that_is_not_finite_is_not_saved(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older file stays."""
    output = train()
    before, state_dict = lora(output), peft.get_peft_model_state_dict

    def infinite(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: value / 0 for name, value in state_dict(model).items()}

    monkeypatch.setattr(peft, "get_peft_model_state_dict", infinite)
    with pytest.raises(SystemExit, match="not finite"):
        train(LATEST, max_train_steps=5)
    assert equal(lora(output), before)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond so many bytes, as a full disk would not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10_000, 100_000, 270_000, 900_000])
def test_a_full_disk_is_one_message(train: Train, small_files: Callable[[int], None], size: int) -> None:
    """Whichever file it hits, latents, LoRA or state: only unfinished files of this run go, and none is taken."""
    output = train("--checkpointing_steps=2")
    (output / "mine.partial").mkdir()
    (output / "mine.partial" / "notes.txt").write_text("of the user")
    before = {path: content for path, content in contents(output).items() if not {"logs", "latents"} & set(path.parts)}
    shutil.rmtree(output / "latents")
    small_files(size)
    with pytest.raises(SystemExit, match="The disk is full"):
        train("--checkpointing_steps=2", LATEST, max_train_steps=6)
    after = contents(output)
    assert {path: after.get(path) for path in before} == before
    new = [path for path in after.keys() - before.keys() if "logs" not in path.parts]
    assert all(load_file(path) for path in new) and all(
        path.parent.name == "latents" or path.name == trainer.LORA_NAME for path in new
    )


@pytest.mark.parametrize("size", [0, 200])
def test_a_disk_that_is_full_before_the_first_event_is_one_message(
    train: Train, small_files: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], size: int,
) -> None:  # fmt: skip
    """TensorBoard's thread prints no traceback beside it; another error of a thread is printed."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    small_files(size)
    with pytest.raises(SystemExit, match="The disk is full"):
        train()
    assert "Traceback" not in capsys.readouterr().err
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_full_disk_while_a_preview_is_written_is_one_message(
    train: Train, small_files: Callable[[int], None]
) -> None:
    """Of step 0, before anything is trained; nothing half is left."""
    output = train("--resolution=128", max_train_steps=1)
    shutil.rmtree(output / "checkpoint-1")
    small_files(20_000)
    with pytest.raises(SystemExit, match="The disk is full"):
        train(PREVIEWS[0], "--resolution=128")
    assert contents(output / "samples") == {}


def test_latents_that_were_cut_short_are_encoded_again(train: Train) -> None:
    """An archive or a drive in the cloud can end early; the LoRA is the same."""
    output = train()
    expected = lora(output)
    for path in (output / "latents").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    shutil.rmtree(output / "checkpoint-4")
    assert equal(lora(train()), expected)


def test_out_of_gpu_memory_says_what_to_change(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest first; a run that meets it late resumes from its checkpoint."""
    loss = trainer.training_loss

    def fail(model: torch.nn.Module, batch: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
        if int(batch["sample_number"][0]) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(model, batch, *rest)

    expected = lora(train(output="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_loss", fail)
        cures = "--gradient_checkpointing, --train_batch_size 1, a lower --resolution"
        with pytest.raises(SystemExit, match=cures):
            train("--checkpointing_steps=2")
    assert equal(lora(train(LATEST)), expected)


def test_a_preview_that_was_cut_off_is_left_out_of_the_sheet(train: Train) -> None:
    """By kill -9, of an earlier version of this script; a later resume goes on."""
    samples = train(*PREVIEWS, max_train_steps=2) / "samples"
    torn = samples / "step-000001-prompt-0-0.png"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    train(*PREVIEWS, LATEST)
    left, top = trainer.PROGRESS_MARGINS
    assert Image.open(samples / "progress.png").size == (left + 4 * 256, top + 256)  # of steps 0, 2, 3 and 4


def test_what_somebody_else_wrote_is_not_replaced(train: Train, tmp_path: Path) -> None:
    """A card, a LoRA and pictures stop the run before it begins; a card of ours is written anew."""
    output = train(max_train_steps=2)
    card, before = output / "README.md", (output / "README.md").read_text()
    train(LATEST)
    assert card.read_text() != before
    card.write_text("my notes")
    with pytest.raises(SystemExit, match=f"{card} would be replaced"):
        train(LATEST)
    for name in (trainer.LORA_NAME, "samples/mine.png"):
        file = tmp_path / "another" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        with pytest.raises(SystemExit, match=f"{file} would be replaced"):
            train(output="another")
        assert file.read_text() == "mine"
        file.unlink()


def test_a_lora_to_start_from_is_not_replaced(train: Train) -> None:
    """It was, by the one that is trained from it."""
    start = train() / trainer.LORA_NAME
    shutil.rmtree(start.parent / "checkpoint-4")
    for given in (start, start.parent):
        with pytest.raises(SystemExit, match=f"{start} would be replaced"):
            train(f"--pretrained_lora_path={given}")


def test_a_second_training_in_the_same_folder_is_one_message(train: Train) -> None:
    """It changes nothing there; when the process that owns the folder is killed, the folder is free."""
    output = train("--checkpointing_steps=2")
    code = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1])"
    code += "; lock.acquire(); print(flush=True); time.sleep(30)"
    with subprocess.Popen([sys.executable, "-c", code, output / ".lock"], stdout=subprocess.PIPE) as owner:
        owner.stdout.readline()
        before = contents(output)
        with pytest.raises(SystemExit, match=f"Another run is writing to {output}.* {output / '.lock'}"):
            train("--checkpointing_steps=1", LATEST, max_train_steps=6)
        assert contents(output) == before
        owner.kill()
        owner.wait()
    assert len(logged(train("--checkpointing_steps=1", LATEST))) == 4


def test_what_another_process_is_writing_stays(train: Train, tmp_path: Path) -> None:
    """A start tidies up after killed runs in its own folder, not below it, where another run may be at work."""
    output, shared = tmp_path / "out", tmp_path / "class"
    for folder in (output, output / "latents", output / "class_images-abc", output / "another run", shared):
        (folder / ".unfinished-abc" / "checkpoint-2").mkdir(parents=True)
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=1"]
    train(*flags, f"--class_data_dir={shared}", max_train_steps=1)
    assert {path.parent for path in tmp_path.rglob(".unfinished-*")} == {output / "another run", shared}


@pytest.mark.parametrize("stdout", [True, False], ids=["reader gone", "closed"])
def test_an_output_that_cannot_be_written_costs_no_lora(train: Train, tmp_path: Path, stdout: bool) -> None:
    """A pipe whose other end is closed after the first words, or no stdout at all: everything is made."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        sys.stderr = io.TextIOWrapper(io.FileIO(writer, "w"), line_buffering=True)
        sys.stdout = sys.stderr if stdout else None
        try:
            train(PREVIEWS[0], "--report_to=none")
        finally:
            os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    os.waitpid(child, 0)
    output = tmp_path / "out"
    assert len(lora(output)) == 30 and (output / "README.md").exists()
    left, top = trainer.PROGRESS_MARGINS
    assert Image.open(output / "samples" / "progress.png").size == (left + 512, top + 256)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_file_names_that_the_terminal_cannot_show_change_nothing(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """A note about a Japanese name ended compute_embeddings.py; now it is shown as far as possible."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "犬.pdf").touch()
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    output = compute(tiny, folder, tmp_path / "embeddings.parquet", "--no_t5")
    assert pq.ParquetFile(output).metadata.num_rows == 2
    name = "犬.pdf" if encoding == "utf-8" else "\\u72ac.pdf"
    assert f"note: skipped {folder / name}" in shown.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_trainer_shows_captions_as_far_as_the_terminal_can(
    train: Train, tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """A line that could not be encoded was lost altogether."""
    embeddings = compute(tiny, photos, tmp_path / "e.parquet", "--no_t5", "--prompt=犬")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    train("--dry_run", instance_prompt="犬", data_df_path=embeddings)
    assert "\\u72ac" in shown.getvalue().decode(encoding)


def test_the_name_of_a_file_commands_no_terminal(
    tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its control characters are shown as escapes, in a note and in the message at the end."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "\x1b[2J.pdf").touch()
    (folder / "\x1b[2J.png").touch()
    with pytest.raises(SystemExit) as stop:
        compute(tiny, folder, tmp_path / "e.parquet")
    said = capsys.readouterr().out + str(stop.value.code)
    assert "\x1b" not in said and said.count("\\x1b[2J") >= 2


@pytest.mark.parametrize("stdout", ["reader gone", "closed"])
def test_compute_embeddings_needs_no_output(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdout: str
) -> None:
    """`python compute_embeddings.py | head` ended in a message about the folder of the images."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream if stdout == "reader gone" else None)
        output = compute(tiny, photos, tmp_path / "embeddings.parquet", "--no_t5")
        monkeypatch.undo()
        with suppress(BrokenPipeError):
            stream.close()
    assert pq.ParquetFile(output).metadata.num_rows == 2


def test_a_killed_data_worker_is_one_message(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved before is whole."""
    get = trainer.SampleDataset.__getitem__

    def get_or_die(dataset: trainer.SampleDataset, number: int) -> dict:
        if torch.utils.data.get_worker_info() and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(dataset, number)

    expected = lora(train(output="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.SampleDataset, "__getitem__", get_or_die)
        with pytest.raises(SystemExit, match="DataLoader worker .*--dataloader_num_workers 0"):
            train("--dataloader_num_workers=1", "--checkpointing_steps=1")
    assert equal(lora(train(LATEST)), expected)
