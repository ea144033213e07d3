"""The path of a GPU where a mistake shows without one: what moves between devices, and what a device cannot do."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from peft.tuners.lora import LoraLayer
from torch import nn

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, parse

# -------------------------------------------------------------------------------------------------------- what moves


def test_once_it_is_prepared_nothing_moves_a_module_with_a_lora_inside(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by .to, .cpu, .half or any other that gives parameters new tensors: not in training, previews or the end."""
    apply, prepare, applied = nn.Module._apply, Accelerator.prepare, []

    def record(module: nn.Module, *args: object, **kwargs: object) -> nn.Module:
        if any(isinstance(inside, LoraLayer) for inside in module.modules()):
            applied.append(type(module).__name__)
        return apply(module, *args, **kwargs)

    def prepare_and_watch(*args: object, **kwargs: object) -> object:
        prepared = prepare(*args, **kwargs)
        applied.clear()
        return prepared

    monkeypatch.setattr(nn.Module, "_apply", record)
    monkeypatch.setattr(Accelerator, "prepare", prepare_and_watch)
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=1"]
    train(*flags, f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=2", "--checkpointing_steps=2")
    assert not applied


@pytest.mark.parametrize("on_gpu", [False, True])
def test_batches_are_copied_without_waiting_on_cuda_alone(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """On a Mac's GPU the copy may come after the original was overwritten: wrong data, in silence."""

    def report(*, dataloader_config: object, **_: object) -> None:
        raise SystemExit(str(dataloader_config.non_blocking))

    monkeypatch.setattr(trainer, "Accelerator", report)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    with pytest.raises(SystemExit, match=str(on_gpu)):
        trainer.make_accelerator(parse())


# --------------------------------------------------------------------------------------------- what a device cannot do


def problems_on(device: str, *flags: str) -> list[str]:
    accelerator = Namespace(device=torch.device(device), mixed_precision="no", is_main_process=True, log_with=[])
    problems = trainer.Problems(accelerator)
    trainer.check_machine(parse("--report_to=none", *flags), accelerator, problems)
    return problems.problems


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_4_bit_weights_are_refused_without_a_gpu_of_nvidia(device: str) -> None:
    """And allowed with one."""
    assert problems_on(device, "--quantize_base=nf4") == ["--quantize_base nf4 needs a GPU."]
    assert problems_on("cuda", "--quantize_base=nf4") == []


def test_a_tpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what makes accelerate take the GPU beside it."""
    monkeypatch.setattr(trainer, "Accelerator", lambda **_: Namespace(distributed_type=DistributedType.XLA))
    with pytest.raises(SystemExit, match="USE_TORCH_XLA=0"):
        trainer.make_accelerator(parse())


def test_a_precision_that_accelerate_refuses_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 on a Mac with an older torch, for one."""

    def refuse(**_: object) -> None:
        raise ValueError("fp16 mixed precision with MPS device requires a Pytorch >= 2.8.0")

    monkeypatch.setattr(trainer, "Accelerator", refuse)
    with pytest.raises(SystemExit, match="Cannot start: fp16 mixed precision with MPS"):
        trainer.main(parse())
