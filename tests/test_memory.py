"""What training costs, counted without a GPU: SD3-medium at its real size on torch's meta device."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextModelWithProjection

import compute_embeddings as embed
import quantized_on_cpu
import step_cost
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import parse

GIB = 2**30


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own forward in the LoRA's layers."""
    monkeypatch.setattr(trainer, "fused_forward", lambda layer, plain: plain)


def test_a_step_stays_within_its_budget() -> None:
    """At 1024 x 1024 in fp16, batch 1, rank 4, four layers: what a T4 has room for and does in a second."""
    cost = step_cost.count_step("sd3-medium", 1024)
    assert 20 < cost.tflop <= 21 and 50 < cost.gb_moved <= 62 and 7 < cost.peak_gib <= 7.4


def test_the_budget_sees_pefts_own_forward(plain: None) -> None:
    """It moves and keeps more for the same FLOP."""
    cost = step_cost.count_step("sd3-medium", 1024)
    assert cost.tflop <= 21 and cost.gb_moved > 62 and cost.peak_gib > 7.4


def test_recomputed_it_fits_on_a_small_card() -> None:
    """4.4 GiB, for 1.4 times the FLOP; an nf4 base takes 2.7 less."""
    cost = step_cost.count_step("sd3-medium", 1024, checkpointing=True)
    assert 29 < cost.tflop < 29.5 and 4.2 < cost.peak_gib <= 4.5
    assert 1.5 < cost.peak_gib - cost.nf4_saves_gib < 2


def test_8_bit_products_are_counted_apart() -> None:
    """More than half of a step's TFLOP; what they move halves if what is done around them is fused."""
    cost = step_cost.count_step("sd3-medium", 1024, int8=True)
    assert 20 < cost.tflop <= 21 and 11 < cost.int8_tflop < 12 and 9 < cost.attention_tflop < 9.5
    assert 200 < cost.gb_moved < 240 and 95 < cost.fused_gb_moved < 110 and 5.9 < cost.peak_gib < 6.2


@pytest.mark.parametrize(("decode", "low", "high"), [(False, 2.5, 2.7), (True, 1.6, 1.8)])
def test_the_vae_takes_less_than_the_training(decode: bool, low: float, high: float) -> None:
    """An image of 1024 x 1024: encoded in fp32 by a VAE without its decoder, decoded in fp16."""
    assert low < step_cost.count_vae(1024, decode).peak_gib < high


def test_the_vae_is_gone_before_the_transformer_loads(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it encodes without its decoder."""
    load_vae, load_transformer, vaes = trainer.load_vae, trainer.load_transformer, []

    def load_and_watch(*args: object) -> AutoencoderKL:
        vae = load_vae(*args)
        vaes.append(weakref.ref(vae))
        vae.encoder.register_forward_hook(lambda *_: seen.append(hasattr(vaes[0](), "decoder")))
        return vae

    def load_afterwards(*args: object) -> torch.nn.Module:
        assert [reference() for reference in vaes] == [None]
        return load_transformer(*args)

    seen: list[bool] = []
    monkeypatch.setattr(trainer, "load_vae", load_and_watch)
    monkeypatch.setattr(trainer, "load_transformer", load_afterwards)
    train(max_train_steps=1)
    assert seen and not any(seen)


def kept_share(tiny: Path, flags: list[str]) -> float:
    """Bytes that a LoRA layer in fp16 adds to those of its input until the backward pass, over those of its result."""
    args = parse("--lora_layers=attn.to_q", *flags)
    model = trainer.LocalModel(str(tiny), tiny, None, None)
    transformer = trainer.load_transformer(model, args, torch.float16)
    trainer.add_lora(transformer, args, 0)
    layer = next(module for module in transformer.modules() if isinstance(module, LoraLayer))
    tokens = torch.randn(1, 4096, 64, dtype=torch.float16, requires_grad=True)
    with step_cost.CostCounter() as counter:
        counter.note(tokens.untyped_storage())
        result = layer(tokens)
    return (counter.live - tokens.nbytes) / result.nbytes


@pytest.mark.parametrize("flags", [[], ["--quantize_base=nf4"], ["--quantize_base=int8"]])
def test_a_layer_keeps_nothing_but_its_result(tiny: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    """And what has the rank for a width: no copy of its input, no weights that were made of 4 bits."""
    quantized_on_cpu.allow(monkeypatch.setattr)
    assert 1 < kept_share(tiny, flags) < 1.1


def test_pefts_own_forward_keeps_its_input_in_fp32(plain: None, tiny: Path) -> None:
    """Which is twice the result."""
    assert kept_share(tiny, []) > 3


def test_the_text_encoders_fit_where_the_training_fits() -> None:
    """CLIP in fp16 and a streamed T5 take 2 GB at most; T5 in 8 bit takes 7.4 GiB."""
    assert step_cost.clip_gib() <= 2e9 / GIB
    assert all(step_cost.streamed_t5_gib(tokens, embed.CHUNK_TOKENS // tokens) <= 2e9 / GIB for tokens in (77, 512))
    assert step_cost.int8_t5_gib() == pytest.approx(7.4, abs=0.05)


def test_on_a_gpu_clip_is_in_fp16(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read straight into it."""

    def refuse(*_: object, dtype: torch.dtype, **__: object) -> None:
        raise SystemExit(str(dtype))

    monkeypatch.setattr(CLIPTextModelWithProjection, "from_pretrained", refuse)
    model = embed.LocalModel(str(tiny), tiny, commit=None, variant=None)
    for device, dtype in (("cuda", "float16"), ("cpu", "float32")):
        with pytest.raises(SystemExit, match=dtype):
            embed.load_clip(model, torch.device(device))
