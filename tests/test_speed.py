"""What makes a step shorter: products of 8-bit integers."""

import weakref
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEWS, Train, equal, logged, lora, parse

INT8 = "--quantize_base=int8"


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def load(model: Path, *flags: str, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    files = trainer.LocalModel(str(model), model, None, None)
    return trainer.load_transformer(files, parse(*flags), dtype)


# ----------------------------------------------------------------------------------------------------- 8-bit products


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 128).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_8_bit_layer_is_near_the_one_that_it_replaces(linear: nn.Linear, dtype: torch.dtype) -> None:
    """Its answer and the gradient of its input, within 1 %, in their dtype."""
    found = []
    for layer in (linear.to(dtype), trainer.Int8Linear(linear.to(dtype))):
        torch.manual_seed(1)
        tokens = torch.randn(2, 30, 64, dtype=dtype, requires_grad=True)
        answer = layer(tokens)
        answer.backward(torch.randn_like(answer))
        found.append((answer.detach(), tokens.grad))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == dtype and rounded.shape == exact.shape
        assert 1e-4 < relative_error(rounded.float(), exact.float()) < 0.01


def test_a_few_rows_take_the_weight_as_it_is_held(linear: nn.Linear) -> None:
    """Torch multiplies 17 rows of integers or more; fewer are not rounded."""
    layer = trainer.Int8Linear(linear)
    rows = torch.randn(16, 64)
    exact = rows @ (layer.weight * layer.scale).T + layer.bias
    assert torch.allclose(layer(rows), exact, atol=1e-6)
    assert not torch.allclose(layer(rows.repeat(2, 1))[:16], exact, atol=1e-3)


def test_a_row_does_not_depend_on_the_others(linear: nn.Linear) -> None:
    """To the bit, so that a batch of two is two batches of one."""
    layer = trainer.Int8Linear(linear)
    rows = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    assert torch.equal(layer(rows)[20:], layer(rows[20:]))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(linear: nn.Linear, value: float) -> None:
    """Answers and gradients: the step is then skipped, and fp16's loss scale halved."""
    layer = trainer.Int8Linear(linear)
    tokens = torch.randn(20, 64)
    tokens[3, 5] = value
    assert not layer(tokens)[3].isfinite().any() and layer(tokens)[4].isfinite().all()
    tokens = torch.randn(20, 64, requires_grad=True)
    layer(tokens).backward(torch.full((20, 128), value))
    assert not tokens.grad.isfinite().any()


def test_a_row_of_zeros_is_zero(linear: nn.Linear) -> None:
    """Nothing is divided by its largest number."""
    layer = trainer.Int8Linear(linear)
    assert torch.equal(layer(torch.zeros(20, 64)), layer.bias.expand(20, -1))


def test_attention_and_feed_forward_are_in_8_bits(tiny35: Path) -> None:
    """In all blocks; norms and embedders stay as they are, in the training dtype."""
    model = load(tiny35, INT8, dtype=torch.bfloat16)
    exact = load(tiny35, dtype=torch.bfloat16)
    quantized = {name for name, module in model.named_modules() if isinstance(module, trainer.Int8Linear)}
    linear = {name for name, module in exact.named_modules() if isinstance(module, nn.Linear)}
    assert quantized == {name for name in linear if ".attn" in name or ".ff" in name}
    assert any(".attn2." in name for name in quantized)
    state = model.state_dict()
    for name, value in exact.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in quantized:
            held = state[name] * state[f"{layer}.scale"]
            assert state[name].dtype == torch.int8
            assert ((held - value.float()).abs() <= 0.501 * state[f"{layer}.scale"]).all()
        else:
            assert torch.equal(state[name], value)


def test_layers_are_replaced_one_at_a_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's weight is gone before the next one is quantized."""
    replaced: list[weakref.ref] = []
    make = trainer.Int8Linear.__init__

    def make_and_watch(self: nn.Module, layer: nn.Linear) -> None:
        assert [layer() for layer in replaced[:-1]] == [None] * len(replaced[:-1])
        replaced.append(weakref.ref(layer.weight))
        make(self, layer)

    monkeypatch.setattr(trainer.Int8Linear, "__init__", make_and_watch)
    load(tiny, INT8)
    assert len(replaced) > 20 and replaced[0]() is None


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_an_8_bit_base_trains(train: Train, precision: str) -> None:
    """With previews, to losses that are within 2 % of the exact base's, and to another LoRA."""
    flags = [f"--mixed_precision={precision}", PREVIEWS, "--validation_steps=1", "--resolution=80"]
    exact, rounded = train(*flags, output="exact"), train(INT8, *flags)
    assert logged(rounded) == pytest.approx(logged(exact), rel=0.02) and logged(rounded) != logged(exact)
    weights = lora(rounded)
    assert weights.keys() == lora(exact).keys() and not equal(weights, lora(exact))
    assert all(value.isfinite().all() for value in weights.values())


def test_an_8_bit_base_goes_on_from_another_lora(train: Train) -> None:
    """With layers of the feed-forward and dropout, which PEFT's own forward computes."""
    flags = [INT8, "--lora_dropout=0.1", "--lora_layers=attn.to_q,ff.net.2,ff_context.net.0.proj"]
    first = train(*flags, output="first")
    second = train(*flags, f"--pretrained_lora_path={first}", output="second", learning_rate=1e-9)
    for name, weight in lora(second).items():
        assert torch.allclose(weight, lora(first)[name], atol=1e-5)


def test_a_device_without_8_bit_products_is_one_message(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out by trying one, before a model is loaded."""

    def refuse(*_: object) -> None:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    with pytest.raises(SystemExit, match="--quantize_base int8: CUBLAS_STATUS_NOT_SUPPORTED"):
        train(INT8)
