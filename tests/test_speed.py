"""What makes a step shorter: products of 8-bit integers, and compiled blocks."""

import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import LATEST, PREVIEW_PROMPT, PREVIEWS, Train, equal, logged, lora, parse

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


# ---------------------------------------------------------------------------------------------------- compiled blocks


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was compiled: blocks are traced as for a compiler, and then run by Python, which takes a second."""
    traced: list[object] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable:
        traced.append(graph)
        return graph.forward

    compile_module = nn.Module.compile

    def compile_for_python(module: nn.Module, **options: object) -> None:
        compile_module(module, backend=keep, **options)

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", compile_for_python)
    monkeypatch.setattr(trainer, "check_kernels", lambda *_: None)
    return traced


def test_what_is_compiled_trains_the_same_lora(train: Train, graphs: list[object], tmp_path: Path) -> None:
    """Python runs the graphs here, so to the bit; names are those of a LoRA, and a resumed run ends with the same."""
    plain = train("--checkpointing_steps=2", output="plain")
    compiled = train("--checkpointing_steps=2", "--compile", output="compiled")
    assert equal(lora(plain), lora(compiled)) and logged(plain) == logged(compiled) and graphs
    shutil.rmtree(compiled / "checkpoint-4")
    (compiled / trainer.LORA_NAME).unlink()
    assert equal(lora(train("--compile", LATEST, output="compiled")), lora(plain))


def test_a_kind_of_block_is_compiled_once_a_shape(
    train: Train, graphs: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two blocks, the first and the last, and five shapes, beyond torch's own limit of eight; whatever recomputes."""
    shapes = "64,64;80,48;48,80;96,48;48,96"
    flags = ["--compile", f"--aspect_ratio_buckets={shapes}", "--gradient_checkpointing", "--resolution=64"]
    train(*flags, max_train_steps=20)
    used = len(graphs) // 2
    assert len(graphs) == 2 * used and 2 <= used <= 5
    said = capsys.readouterr().out
    assert "compiling the blocks" in said and "compiled the blocks and tried a micro-batch in" in said


def test_torch_2_6_can_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its limit of recompilations has its first name alone; an unknown one is an AttributeError."""

    class OldConfig:
        __slots__ = ("cache_size_limit",)

    config = OldConfig()
    monkeypatch.setattr(torch._dynamo, "config", config)
    trainer.compile_blocks(SimpleNamespace(transformer_blocks=[]), 1)
    assert config.cache_size_limit >= 8


def test_previews_and_class_images_are_not_compiled(train: Train, graphs: list[object]) -> None:
    """Their batches are others than those of the training."""
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=2"]
    train("--compile", PREVIEWS, "--validation_steps=1", *flags, max_train_steps=2)
    assert len(graphs) == 2


def test_compiled_with_8_bit_products_there_is_no_break(train: Train, graphs: list[object], tiny35: Path) -> None:
    """fullgraph=True would end the run; a model like SD3.5-medium, with dropout, in fp16."""
    flags = [INT8, "--compile", "--mixed_precision=fp16", "--lora_dropout=0.1", "--resolution=80"]
    output = train(*flags, pretrained_model_name_or_path=tiny35)
    assert graphs and all(value.isfinite().all() for value in lora(output).values())


has_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or sys.platform != "linux", reason="torch compiles for a CPU with g++"
)


def results(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """A module's answers, and the gradients of what is trained."""
    answers = [answer for answer in module(*inputs) if answer is not None]
    torch.cat(answers, dim=-2).square().sum().backward()
    parameters = trainer.trainable_parameters(module)
    found = [*(answer.detach() for answer in answers), *(parameter.grad for parameter in parameters)]
    for parameter in parameters:
        parameter.grad = None
    return found


@has_compiler
def test_a_compiled_block_computes_the_same(tiny: Path) -> None:
    """Really compiled, the last one: its output and its LoRA's gradients in fp32, within 1e-4."""
    torch._dynamo.reset()
    transformer = load(tiny)
    trainer.add_lora(transformer, parse("--lora_layers=1.attn.to_q"), 0)
    block = transformer.transformer_blocks[1]
    torch.manual_seed(1)
    for parameter in trainer.trainable_parameters(block):
        parameter.data = torch.randn_like(parameter) / 10
    inputs = [torch.randn(1, 25, 64), torch.randn(1, 30, 64), torch.randn(1, 64)]
    plain = results(block, *inputs)
    block.compile(fullgraph=True, dynamic=False)
    fast = results(block, *inputs)
    assert len(plain) == 3 and all(relative_error(*pair) < 1e-4 for pair in zip(fast, plain, strict=True))


@has_compiler
def test_a_compiled_8_bit_layer_computes_the_same(linear: nn.Linear) -> None:
    """Really compiled, forward and backward, within 1e-3: a number may be rounded the other way."""
    torch._dynamo.reset()
    layer = nn.Sequential(nn.Linear(64, 64), trainer.Int8Linear(linear))
    tokens = torch.randn(1, 25, 64)
    plain = results(layer, tokens)
    layer.compile(fullgraph=True, dynamic=False)
    fast = results(layer, tokens)
    assert len(plain) == 3 and all(relative_error(*pair) < 1e-3 for pair in zip(fast, plain, strict=True))


def test_without_a_compiler_there_is_one_message(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out by compiling a line, before a model is loaded."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(SystemExit, match=r"--compile: .*(\n.*)*leave out --compile"):
        train("--compile")
