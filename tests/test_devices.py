"""The path of a GPU where a mistake shows without one: what moves between devices, and what a device cannot do."""

import weakref
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
from diffusers.image_processor import VaeImageProcessor
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import get_gradient_edge

import quantized_on_cpu
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT

ELSEWHERE = torch.float64  # stands for another device: .to takes both, and .data lets both in


def parse(*flags: str, model: Path = Path("m")) -> Namespace:
    required = [f"--pretrained_model_name_or_path={model}", "--instance_data_dir=d", "--data_df_path=e"]
    return trainer.parse_args([*required, "--instance_prompt=p", "--report_to=none", *flags])


@pytest.fixture
def transformer(tiny: Path) -> SD3Transformer2DModel:
    """With a LoRA, as it is trained."""
    args = parse(model=tiny)
    model = trainer.load_transformer(args, torch.float32)
    trainer.add_lora(model, trainer.lora_targets(model, "attn.to_q", None), args, 0)
    return model


def lora_params(transformer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


# -------------------------------------------------------------------------------------------------------- what moves


def test_moving_what_is_frozen_keeps_the_lora_and_its_gradient_accumulators(
    transformer: SD3Transformer2DModel,
) -> None:
    """DDP's hooks sit on them; without them two GPUs wait for each other for ever."""
    before, called = lora_params(transformer), []
    addresses = [parameter.data_ptr() for parameter in before]
    accumulators = [get_gradient_edge(parameter).node for parameter in before]
    for number, accumulator in enumerate(accumulators):
        accumulator.register_hook(lambda *_, number=number: called.append(number))
    trainer.move_frozen(transformer, ELSEWHERE)
    after = lora_params(transformer)
    assert [id(parameter) for parameter in after] == [id(parameter) for parameter in before]
    assert [parameter.data_ptr() for parameter in after] == addresses
    others = [*transformer.buffers(), *(each for each in transformer.parameters() if not each.requires_grad)]
    assert {tensor.dtype for tensor in others} == {ELSEWHERE}
    sum(parameter.sum() for parameter in before).backward()
    assert sorted(called) == list(range(len(before))) and len(before) == 4


def test_4_bit_weights_stay_where_they_are(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes keeps their scales beside them, where .data does not reach."""
    quantized_on_cpu.allow(monkeypatch.setattr)
    model = trainer.load_transformer(parse("--quantize_base=nf4", model=tiny), torch.float16)
    trainer.move_frozen(model, ELSEWHERE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, ELSEWHERE}


def test_while_images_are_decoded_the_frozen_part_is_on_the_cpu(
    transformer: SD3Transformer2DModel, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves before the VAE comes, and returns after it has gone."""
    moved, load_vae, gpu = [], trainer.load_vae, torch.device("meta")

    def load_and_record(*args: object) -> nn.Module:
        vae = load_vae(*args)
        moved.append("VAE comes")
        weakref.finalize(vae, moved.append, "VAE goes")
        return vae

    monkeypatch.setattr(trainer, "move_frozen", lambda module, device: moved.append((module, str(device))))
    monkeypatch.setattr(trainer, "load_vae", load_and_record)
    monkeypatch.setattr(VaeImageProcessor, "postprocess", lambda self, sample: [sample.shape])  # meta has no contents
    plan = Namespace(args=parse(model=tiny), accelerator=Namespace(device=gpu))
    images = trainer.decode_latents(plan, transformer, torch.zeros(2, 16, 8, 8, device=gpu))
    assert images == [(1, 3, 64, 64)] * 2
    assert moved == [(transformer, "cpu"), "VAE comes", "VAE goes", (transformer, "meta")]


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
    return list(trainer.check_machine(parse(*flags), accelerator))


@pytest.mark.parametrize("flags", [["--use_8bit_adam"], ["--optimizer=adamw_8bit"], ["--optimizer=paged_adamw_8bit"]])
def test_8_bit_optimizers_are_refused_on_a_mac(flags: list[str]) -> None:
    """bitsandbytes has no kernel for its GPU; it would be found out in the first step."""
    [problem] = problems_on("mps", *flags)
    assert "8-bit optimizers do not run on a Mac's GPU" in problem
    assert problems_on("mps") == problems_on("cuda", *flags) == problems_on("cpu", *flags) == []


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_4_bit_weights_are_refused_without_a_gpu_of_nvidia(device: str) -> None:
    """And allowed with one."""
    assert problems_on(device, "--quantize_base=nf4") == ["--quantize_base needs a GPU."]
    assert problems_on("cuda", "--quantize_base=nf4") == []


def test_a_precision_that_accelerate_refuses_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 on a Mac with an older torch, for one."""

    def refuse(**_: object) -> None:
        raise ValueError("fp16 mixed precision with MPS device requires a Pytorch >= 2.8.0")

    monkeypatch.setattr(trainer, "Accelerator", refuse)
    with pytest.raises(SystemExit, match="Cannot start: fp16 mixed precision with MPS"):
        trainer.main(parse())
