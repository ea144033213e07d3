"""What a launcher, accelerate's configuration and the environment ask for: followed, or told in one message."""

import os
import subprocess
import sys

import pytest

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import ROOT, Train, lora, parse


def test_a_configured_compiler_is_ignored(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compiled model's names begin with `_orig_mod.`, in which no program finds a LoRA; a note says so."""
    expected = lora(train(output="plain"))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    output = train("--checkpointing_steps=4")
    assert "--dynamo_backend eager" in capsys.readouterr().out
    assert lora(output).keys() == lora(output / "checkpoint-4").keys() == expected.keys()


def test_a_launch_that_replaces_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP, DeepSpeed and their like: accelerate says which it is."""
    monkeypatch.setattr(trainer.Accelerator, "distributed_type", property(lambda _: "FSDP"))
    with pytest.raises(SystemExit, match="Cannot start: .*FSDP"):
        trainer.make_accelerator(parse("--report_to=none"))


def test_deepspeed_without_its_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SystemExit, match="(?i)Cannot start: .*deepspeed"):
        trainer.make_accelerator(parse("--report_to=none"))


def test_the_flag_wins_over_the_accumulation_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the steps would have other sizes than the plan says."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = trainer.make_accelerator(parse("--report_to=none", "--gradient_accumulation_steps=2"))
    assert accelerator.gradient_accumulation_steps == 2


@pytest.mark.parametrize("script", ["compute_embeddings.py", "train_dreambooth_sd3_lora_miniature.py"])
@pytest.mark.parametrize(("options", "environment", "name"), [
    (["-OO"], {}, "python -OO"),
    ([], {"ACCELERATE_LOG_LEVEL": "x"}, "ACCELERATE_LOG_LEVEL=x"),
])  # fmt: skip
def test_what_ends_an_import_is_one_line(
    script: str, options: list[str], environment: dict[str, str], name: str
) -> None:
    """Before the libraries are imported, whose tracebacks would not say what to change."""
    command = [sys.executable, *options, ROOT / script, "--help"]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and run.stderr.startswith(name) and run.stderr.count("\n") == 1


def test_the_threads_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """taskset, a job scheduler or a container can leave it fewer CPUs than there are; the launcher allows one."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5}, raising=False)
    trainer.make_accelerator(parse("--report_to=none"))
    assert trainer.torch.get_num_threads() == 2


def test_where_no_system_tells_all_cpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows and on a Mac."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert trainer.usable_cpus() == 3


def test_cudnns_attention_is_off() -> None:
    """On an H100 it comes first, and its backward pass has given NaN."""
    trainer.torch.backends.cuda.enable_cudnn_sdp(True)
    trainer.make_accelerator(parse("--report_to=none"))
    assert not trainer.torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(sys.platform != "linux", reason="torch knows no expandable segments elsewhere")
def test_the_allocator_grows_its_segments() -> None:
    """Unless the environment says otherwise."""
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
