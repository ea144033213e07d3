"""Nothing is lost: interruptions, torn files, full disks, numbers that are not finite."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import ROOT, logged
from kill_test import survive
from safetensors.torch import load_file

Train = Callable[..., Path]


def lora(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(folder / trainer.LORA_NAME).items()}


def test_sigkill_loses_nothing() -> None:
    """Killed at random moments and resumed, it ends with the same LoRA. The long version is kill_test.py."""
    cut, completed = survive(kills=5)
    assert cut >= 5 and completed >= 1


def test_a_torn_checkpoint_is_passed_over(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest whole one is taken, and the end is the same."""
    output = train("--checkpointing_steps=1")
    expected = lora(output)
    state = output / "checkpoint-4" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    (output / "checkpoint-3" / trainer.LORA_NAME).unlink()
    train("--checkpointing_steps=1", "--resume_from_checkpoint=latest")
    said = capsys.readouterr().out
    assert "not a whole checkpoint" in said and "2 steps of 1 samples, from step 2" in said
    assert lora(output) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(train: Train, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """With a checkpoint of that very step and the command that goes on, which has no token in it."""
    expected, loss = lora(train(output="whole")), trainer.training_loss
    monkeypatch.setattr(trainer, "estimate_step_seconds", lambda *_: 1)
    monkeypatch.setattr(trainer, "training_loss", lambda *args: os.kill(os.getpid(), number) or loss(*args))
    monkeypatch.setattr("sys.argv", ["train.py", "--seed=0", "--hub_token", "hf_secret"])
    command = "train.py --seed=0 --resume_from_checkpoint=latest"
    with pytest.raises(SystemExit, match=f"after step 1.*{command}") as exit_info:
        train("--hub_token=hf_secret")
    assert "hf_secret" not in str(exit_info.value)
    monkeypatch.setattr(trainer, "training_loss", loss)
    assert lora(train("--resume_from_checkpoint=latest")) == expected


def test_a_second_signal_ends_at_once() -> None:
    """The first is noted, the second kills."""
    child = os.fork()
    if child == 0:
        with trainer.noted_signals():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Make the losses of some micro-steps infinite."""

    def spoil(steps: range) -> None:
        count, loss = iter(range(1000)), trainer.training_loss

        def training_loss(*args: object) -> torch.Tensor:
            value = loss(*args)
            return value * float("inf") if torch.is_grad_enabled() and next(count) in steps else value

        monkeypatch.setattr(trainer, "training_loss", training_loss)

    return spoil


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_step_that_is_not_finite_is_skipped(train: Train, spoiled: Callable[[range], None], precision: str) -> None:
    """The LoRA stays finite; fp16's loss scale is halved."""
    spoiled(range(1, 2))
    output = train(f"--mixed_precision={precision}", "--checkpointing_steps=1")
    assert all(value.isfinite().all() for value in load_file(output / trainer.LORA_NAME).values())
    assert lora(output / "checkpoint-2") == lora(output / "checkpoint-1") != lora(output / "checkpoint-3")
    if precision == "fp16":
        states = [torch.load(output / f"checkpoint-{step}" / "training_state.pt") for step in (1, 2)]
        assert states[0]["scaler"]["scale"] == 2 * states[1]["scaler"]["scale"]


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_many_such_steps_in_a_row_end_the_run(train: Train, spoiled: Callable[[range], None], precision: str) -> None:
    """With the usual causes; the checkpoint before them is whole."""
    spoiled(range(2, 1000))
    with pytest.raises(SystemExit, match="20 steps in a row were not finite.*--learning_rate"):
        train(f"--mixed_precision={precision}", "--checkpointing_steps=2", max_train_steps=30)


def test_a_lora_that_is_not_finite_is_not_saved(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older file stays."""
    output = train()
    before, state_dict = lora(output), trainer.get_peft_model_state_dict
    def infinite(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: value / 0 for name, value in state_dict(model).items()}

    monkeypatch.setattr(trainer, "get_peft_model_state_dict", infinite)
    with pytest.raises(SystemExit, match="not finite: not saved"):
        train()
    assert lora(output) == before and not list(output.glob("*.partial"))


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond so many bytes, as a full disk would not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10_000, 100_000, 270_000])
def test_a_full_disk_is_one_message(train: Train, small_files: Callable[[int], None], size: int) -> None:
    """Whichever file it hits: latents, LoRA or state; what was there before stays whole, and no half file is taken."""
    output = train("--checkpointing_steps=2")
    before = lora(output)
    small_files(size)
    with pytest.raises(SystemExit, match="The disk is full"):
        train("--checkpointing_steps=2", "--resolution=128", max_train_steps=6)
    assert lora(output) == before and all(trainer.read_checkpoint(path) for path in trainer.list_checkpoints(output))
    assert not list(output.rglob("*.partial"))


def test_out_of_gpu_memory_says_what_to_change(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest first."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "training_loss", fail)
    with pytest.raises(SystemExit, match="--gradient_checkpointing, --train_batch_size 1, a lower --resolution"):
        train()


class Evil:
    """What a pickle can do when it is loaded."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/evil_was_here",)


def test_a_checkpoint_cannot_run_code(train: Train, tmp_path: Path) -> None:
    """Its state is read with weights_only."""
    checkpoint = train("--checkpointing_steps=2") / "checkpoint-2"
    (checkpoint / "training_state.pt").write_bytes(pickle.dumps(Evil()))
    about = json.loads((checkpoint / "trainer_state.json").read_text())
    about["files"]["training_state.pt"] = trainer.hash_image(checkpoint / "training_state.pt")
    (checkpoint / "trainer_state.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match="not a checkpoint of this script"):
        train(f"--resume_from_checkpoint={checkpoint}", output="other")
    assert not Path("/tmp/evil_was_here").exists() and logged(tmp_path / "other") == []


def test_ctrl_c_before_the_training_is_one_message(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """While pictures are encoded nothing is noted for later: the run ends there, and the next one starts anew."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "encode_image", interrupted)
    with pytest.raises(SystemExit, match="Interrupted. What was saved is whole: run the same command again."):
        train()
    monkeypatch.undo()
    assert (train() / trainer.LORA_NAME).exists()


def test_ctrl_c_in_compute_embeddings_leaves_the_older_file(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """One line, no traceback, no scratch file."""
    output = tmp_path / "embeddings.parquet"
    pq.write_table(pa.table({"older": [1]}), output)
    before = output.read_bytes()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    script = [sys.executable, "-u", ROOT / "compute_embeddings.py", f"--output_path={output}"]
    flags = [f"--pretrained_model_name_or_path={tiny}", f"--local_data_dir={photos}"]
    environment = os.environ | {"TMPDIR": str(scratch)}

    def heed() -> None:  # what a shell starts in the background ignores Ctrl-C, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    started = {"stdout": -1, "stderr": -1, "text": True, "env": environment, "preexec_fn": heed}
    process = subprocess.Popen([*script, *flags], **started)
    assert "pictures in" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and said.strip().endswith("Interrupted; nothing was written.")
    assert "Traceback" not in said and output.read_bytes() == before and list(scratch.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["embeddings.parquet"]
