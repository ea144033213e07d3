"""Folders that are not a Linux disk: Windows drives, network shares, drives in the cloud. Each is pretended here."""

import errno
import itertools
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.compat.tensorflow_stub.io import gfile

import compute_embeddings as embed
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import LATEST, PREVIEWS, Train, compute, equal, lora, names


def refuse(number: int, when: Callable[..., bool] = lambda *_: True) -> Callable[[Callable], Callable]:
    """Make a function of the system fail with this error, for those arguments that `when` says yes to."""

    def wrap(function: Callable) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            if when(*args):
                raise OSError(number, os.strerror(number), str(args[0]))
            return function(*args, **kwargs)

        return wrapped

    return wrap


def is_folder(source: Path, *_: object) -> bool:
    return Path(source).is_dir()


@pytest.mark.parametrize(("module", "name", "failing"), [
    (Path, "chmod", refuse(errno.EPERM)),
    (os, "fsync", refuse(errno.EINVAL)),
    (os, "fsync", refuse(errno.EACCES)),
    (os, "replace", refuse(errno.EACCES, is_folder)),
    (trainer.FileLock, "acquire", refuse(errno.ENOLCK)),
], ids=["chmod", "fsync", "fsync of Windows", "rename of folders", "lock"])  # fmt: skip
def test_what_a_file_system_cannot_do_ends_no_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, module: object, name: str, failing: Callable
) -> None:
    """The files are whole without it: the same LoRA, and checkpoints that resume."""
    expected = lora(train(output="whole", max_train_steps=3))
    monkeypatch.setattr(module, name, failing(getattr(module, name)))
    train("--checkpointing_steps=1", PREVIEWS, max_train_steps=2)
    output = train("--checkpointing_steps=1", "--checkpoints_total_limit=2", LATEST, max_train_steps=3)
    assert equal(lora(output), expected)
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-2", "checkpoint-3"]
    assert {path.name for path in (output / "checkpoint-3").iterdir()} == {trainer.LORA_NAME, trainer.STATE_NAME}


def test_a_disk_that_cannot_write_is_still_an_error(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync is where a share tells that it is full."""
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC)(os.fsync))
    with pytest.raises(SystemExit, match="The disk is full"):
        train()


def test_without_fsync_the_embeddings_are_written(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first script too."""
    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL)(os.fsync))
    assert embed.pq.read_table(compute(tiny, photos, tmp_path / "e.parquet", "--no_t5")).num_rows == 2


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let nothing get a name that `when` says yes to, for so many tries; waiting takes no time. What was tried."""
    waited: list[float] = []
    monkeypatch.setattr(trainer.time, "sleep", waited.append)
    real = os.replace

    def refuse_moves(when: Callable[[Path], bool], times: int = 1000) -> list[str]:
        tried: list[str] = []

        def guarded(source: Path, target: Path) -> None:
            if when(Path(target)) and len(tried) < times:
                tried.append(str(target))
                raise PermissionError(errno.EACCES, "it is in use", str(source), None, str(target))
            real(source, target)

        monkeypatch.setattr(os, "replace", guarded)
        return tried

    return refuse_moves


def test_a_file_that_is_in_use_for_a_moment_is_replaced_after_it(train: Train, in_use: Callable[..., list]) -> None:
    """By a virus scanner, say: each move is tried for 2 s."""
    tried = in_use(lambda target: target.suffix in (".safetensors", ".png", ".md"), times=15)
    train(PREVIEWS, "--validation_steps=1", max_train_steps=2)
    assert len(tried) == 15


def test_previews_and_card_in_use_end_no_run(
    train: Train, in_use: Callable[..., list], capsys: pytest.CaptureFixture[str]
) -> None:
    """In an image viewer, say; each is a note. The LoRA is the same."""
    expected = lora(train(PREVIEWS, output="whole"))
    in_use(lambda target: target.suffix in (".png", ".md"))
    output = train(PREVIEWS, output="in use")
    said = capsys.readouterr().out
    for name in ("step-000000-prompt-0-0.png", "step-000004-prompt-0-0.png", "README.md"):
        assert re.search(f"note: .*{name}", said), name
    in_use(lambda target: target.name == "progress.png")
    assert equal(lora(train(PREVIEWS, output="sheet")), expected) and equal(lora(output), expected)
    assert "progress.png is not written" in capsys.readouterr().out


def test_a_samples_folder_that_is_gone_ends_no_run(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has tidied up."""
    choose = trainer.choose_recomputation

    def tidy(args: trainer.Args, *rest: object) -> float:
        shutil.rmtree(args.output_dir / "samples")
        return choose(args, *rest)

    monkeypatch.setattr(trainer, "choose_recomputation", tidy)
    assert lora(train(PREVIEWS))


def test_a_lora_in_use_is_written_by_a_resumed_run(train: Train, tmp_path: Path, in_use: Callable[..., list]) -> None:
    """The checkpoint of the last step has it."""
    path = tmp_path / "out" / trainer.LORA_NAME
    tried = in_use(lambda target: target == path, times=21)
    with pytest.raises(SystemExit, match=f"{path}.*--resume_from_checkpoint latest"):
        train()
    assert len(tried) == 21 and not path.exists()
    output = train(LATEST)
    assert equal(lora(output), lora(output / "checkpoint-4"))


@pytest.mark.parametrize("flags", [[LATEST], ["--resume_from_checkpoint=checkpoint-4"]])
def test_a_checkpoint_that_cannot_be_read_now_stops_the_start(
    train: Train, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """Taken for incomplete, it would be trained anew and overwritten."""
    states = list(train("--checkpointing_steps=2").rglob(trainer.STATE_NAME))
    before = [path.read_bytes() for path in states]
    offline = refuse(errno.EACCES, lambda path, *_: Path(path).parent.name == "checkpoint-4")
    monkeypatch.setattr(torch, "load", offline(torch.load))
    with pytest.raises(
        SystemExit, match="Cannot start:\n- --resume_from_checkpoint .*checkpoint-4/training_state.pt cannot be read"
    ):
        train("--checkpointing_steps=2", *flags)
    assert [path.read_bytes() for path in states] == before


@pytest.mark.parametrize(("first", "last"), [(2, 3), (4, 5), (4, 99)], ids=["at the start", "once", "from then on"])
def test_a_log_that_cannot_be_written_ends_no_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first: int, last: int
) -> None:
    """TensorBoard's thread ends with the first refusal: one note, no traceback, and the same LoRA."""
    expected = lora(train("--report_to=none", output="whole"))
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest has its own
    calls = itertools.count()
    append = refuse(errno.EACCES, lambda *_: first <= next(calls) < last)(gfile.LocalFileSystem.append)
    monkeypatch.setattr(gfile.LocalFileSystem, "append", append)
    assert equal(lora(train(PREVIEWS)), expected)
    said = capsys.readouterr()
    assert said.out.count("note: logging stops: [Errno 13]") == 1 and "Traceback" not in said.err


def test_a_refused_write_is_one_message(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the file and what is safe; any other error keeps its traceback."""
    broken = refuse(errno.EIO, lambda file: "checkpoint-4" in file.name)
    monkeypatch.setattr(trainer, "flush_to_disk", broken(trainer.flush_to_disk))
    with pytest.raises(SystemExit, match=f"{tmp_path}.*checkpoint-4.*Saved files are intact"):
        train()
    monkeypatch.setattr(trainer, "write_file", lambda *_: {}["of an extender"])
    with pytest.raises(KeyError):
        train(output="other")


@pytest.mark.parametrize("workers", [0, 1])
def test_latents_that_are_gone_are_one_message(train: Train, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Somebody has tidied up; the next run encodes them again."""
    choose = trainer.choose_recomputation

    def tidy(args: trainer.Args, *rest: object) -> float:
        seconds = choose(args, *rest)
        shutil.rmtree(args.output_dir / "latents")
        return seconds

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "choose_recomputation", tidy)
        with pytest.raises(SystemExit) as ended:
            train(f"--dataloader_num_workers={workers}")
    assert re.fullmatch(".*latents/.*safetensors.* Saved files are intact.*", str(ended.value))  # one line
    assert lora(train())


def mapped(path: object, *_: object, **__: object) -> bool:
    """Whether this process maps a file that is, or lies in, this path."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.endswith(os.fspath(path)) or f"{os.fspath(path)}/" in line for line in lines)


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let nothing remove or replace a file that is mapped; what was tried."""
    tried: list[str] = []

    def guard(module: object, name: str, which: int) -> None:
        function = getattr(module, name)

        def guarded(*args: object, **kwargs: object) -> object:
            if isinstance(args[which], str | Path) and mapped(args[which]):
                tried.append(f"{name} {args[which]}")
                raise PermissionError(errno.EACCES, "it is mapped", str(args[which]))
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, guarded)

    guard(os, "replace", 1)
    guard(os, "unlink", 0)
    guard(shutil, "rmtree", 0)
    cleanup = tempfile.TemporaryDirectory.cleanup

    def guarded_cleanup(folder: tempfile.TemporaryDirectory) -> None:
        tried.extend([folder.name] if mapped(folder.name) else [])
        cleanup(folder)

    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", guarded_cleanup)
    return tried


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it lists what is mapped")
@pytest.mark.parametrize("t5", ["exact", "none"])
def test_the_scratch_folder_goes_when_nothing_in_it_is_mapped(
    tiny: Path, photos: Path, tmp_path: Path, windows: list[str], t5: str
) -> None:
    """Windows would refuse to remove it, after the Parquet file is written."""
    compute(tiny, photos, tmp_path / "e.parquet", f"--t5_precision={t5}")
    compute(tiny, photos, tmp_path / "e.parquet", f"--t5_precision={t5}")
    assert not windows and [path.name for path in tmp_path.iterdir()] == ["e.parquet"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it lists what is mapped")
def test_training_replaces_and_removes_no_mapped_file(train: Train, windows: list[str]) -> None:
    """Latents, checkpoints, previews and LoRA, also where a run resumes or starts from another one's LoRA."""
    flags = ["--checkpointing_steps=1", "--checkpoints_total_limit=1", PREVIEWS, "--validation_steps=1"]
    train(*flags, max_train_steps=2)
    first = train(*flags, LATEST, max_train_steps=3)
    train(*flags, f"--pretrained_lora_path={first}", output="second", max_train_steps=2)
    assert not windows
