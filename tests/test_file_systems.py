"""Folders that are not a Linux disk: Windows drives, network shares, drives in the cloud. Each is pretended here."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

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
    (os, "replace", refuse(errno.EACCES, is_folder)),
    (trainer.FileLock, "acquire", refuse(errno.ENOLCK)),
], ids=["chmod", "fsync", "rename of folders", "lock"])  # fmt: skip
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
    """Latents, checkpoints, previews and LoRA, also those of an earlier run."""
    flags = ["--checkpointing_steps=1", "--checkpoints_total_limit=1", PREVIEWS, "--validation_steps=1"]
    train(*flags, max_train_steps=2)
    train(*flags, LATEST, max_train_steps=3)
    train(*flags, f"--pretrained_lora_path={train(*flags, max_train_steps=2)}", max_train_steps=2)
    assert not windows
