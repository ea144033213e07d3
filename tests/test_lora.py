"""The LoRA: what is trained in which precision, and that every program applies it at the same strength."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import quantised_on_cpu
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor


def make_args(model: Path, *flags: str) -> object:
    values = {"pretrained_model_name_or_path": model, "instance_data_dir": "d", "data_df_path": "e", "seed": 0}
    values["instance_prompt"] = "p"
    return trainer.parse_args([*(f"--{name}={value}" for name, value in values.items()), *flags])


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {"hidden_states": (1, 16, 8, 8), "encoder_hidden_states": (1, 154, 128), "pooled_projections": (1, 80)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} | {"timestep": torch.tensor([500.0])}


def answer(transformer: SD3Transformer2DModel) -> Tensor:
    with torch.no_grad():
        return transformer.eval()(**inputs(transformer.dtype), return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_lora_is_fp32_and_the_base_in_the_training_dtype(tiny: Path, dtype: torch.dtype) -> None:
    """add_adapter gives the LoRA the base's dtype, in which its updates would vanish."""
    transformer = trainer.load_transformer(make_args(tiny), dtype)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in transformer.parameters()}
    assert dtypes == {True: torch.float32, False: dtype}
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in transformer.named_parameters())


def test_the_transformer_is_never_in_fp32_first(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is read straight into the training dtype."""
    asked, load = [], SD3Transformer2DModel.from_pretrained

    def record(*args: object, **kwargs: object) -> SD3Transformer2DModel:
        asked.append(kwargs["dtype"])
        return load(*args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "from_pretrained", record)
    trainer.load_transformer(make_args(tiny), torch.float16)
    assert asked == [torch.float16]


@pytest.mark.parametrize(
    ("flags", "layers", "blocks"),
    [
        ([], {"to_q", "to_k", "to_v", "to_out.0"}, {0, 1}),
        (["--lora_layers=attn.to_q,add_k_proj"], {"to_q", "add_k_proj"}, {0, 1}),
        (["--lora_blocks=1"], {"to_q", "to_k", "to_v", "to_out.0"}, {1}),
        (["--lora_layers=attn.add_*", "--lora_blocks=0"], {"add_q_proj", "add_k_proj", "add_v_proj"}, {0}),
    ],
)
def test_layers_and_blocks_choose_what_is_trained(tiny: Path, flags: list[str], layers: set, blocks: set) -> None:
    """By the ends of the layers' names, and by the numbers of the blocks."""
    transformer = trainer.load_transformer(make_args(tiny, *flags), torch.float32)
    trained = {name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if "lora_A" in name}
    assert trained == {f"transformer_blocks.{block}.attn.{layer}" for block in blocks for layer in layers}


def test_on_sd35_both_attentions_are_trained(tiny35: Path) -> None:
    """SD3.5-medium's dual layers have a second attention with the same names; a pattern chooses it alone."""
    second = trainer.load_transformer(make_args(tiny35, "--lora_layers=attn2.*"), torch.float32)
    trained = {name.split(".lora_A")[0] for name, _ in second.named_parameters() if "lora_A" in name}
    assert trained == {f"transformer_blocks.0.attn2.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    transformer = trainer.load_transformer(make_args(tiny35), torch.float32)
    names = [name for name, _ in transformer.named_parameters() if "lora_A" in name]
    assert sum("attn2" in name for name in names) == 4 and sum("attn." in name for name in names) == 8


@pytest.mark.parametrize("flags", [[], ["--lora_alpha=16"], ["--lora_blocks=0", "--lora_alpha=100"]])
def test_a_fresh_process_of_diffusers_applies_the_trained_strength(
    train: Callable[..., Path], tiny: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """The final file and the last checkpoint, loaded by the pipeline, give what the trained model gave."""
    trained, save_lora = [], trainer.save_lora

    def keep_and_save(folder: Path, transformer: SD3Transformer2DModel, *rest: object, **options: object) -> None:
        trained.append(answer(transformer))
        save_lora(folder, transformer, *rest, **options)

    monkeypatch.setattr(trainer, "save_lora", keep_and_save)
    output = train("--checkpointing_steps=4", "--learning_rate=0.01", *flags)
    bare = answer(SD3Transformer2DModel.from_pretrained(tiny, subfolder="transformer"))
    assert not torch.allclose(trained[-1], bare, atol=1e-3)
    for folder in (output, output / "checkpoint-4"):
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny)
        pipeline.load_lora_weights(folder)
        assert torch.allclose(answer(pipeline.transformer), trained[-1], atol=1e-5)


@pytest.mark.parametrize(("model", "architecture"), [("tiny", "m"), ("tiny35", "5-medium")])
def test_other_programs_see_what_it_is(
    train: Callable[..., Path], request: pytest.FixtureRequest, model: str, architecture: str
) -> None:
    """ModelSpec's and kohya's keys, in checkpoints and in the final file, whose alpha is the rank; and no path."""
    folder = request.getfixturevalue(model)
    output = train("--checkpointing_steps=4", "--lora_alpha=16", pretrained_model_name_or_path=folder)
    for file, alpha in ((output, "64"), (output / "checkpoint-4", "16.0")):
        with safe_open(file / trainer.LORA_NAME, "np") as opened:
            about = opened.metadata()
        assert about["modelspec.architecture"] == f"stable-diffusion-3-{architecture}/lora"
        assert about["modelspec.trigger_phrase"] == PROMPT and about["modelspec.title"] == "out"
        assert about["ss_base_model_version"] == f"sd3_{architecture}" and about["ss_steps"] == "4"
        assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("64", alpha)
        assert about["ss_learning_rate"] == "0.001" and str(folder) not in str(about)


def test_alpha_is_folded_so_that_programs_without_metadata_agree(train: Callable[..., Path]) -> None:
    """ComfyUI knows no alpha in this layout and takes strength 1: lora_B holds alpha / rank times the trained one."""
    output = train("--checkpointing_steps=4", "--lora_alpha=16")
    final, checkpoint = (load_file(folder / trainer.LORA_NAME) for folder in (output, output / "checkpoint-4"))
    assert final.keys() == checkpoint.keys() and not any("alpha" in name for name in final)
    for name, value in final.items():
        assert torch.equal(value, checkpoint[name] * 0.25 if "lora_B" in name else checkpoint[name])


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_leaves_the_base_as_it_was(
    train: Callable[..., Path], tiny: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Bit for bit, and still in its dtype after the LoRA was saved: the reference made it fp32 to save 5 MB."""
    kept, save_lora = [], trainer.save_lora

    def save_and_keep(folder: Path, transformer: SD3Transformer2DModel, *rest: object, **options: object) -> None:
        save_lora(folder, transformer, *rest, **options)
        kept.append(transformer)

    monkeypatch.setattr(trainer, "save_lora", save_and_keep)
    train(f"--mixed_precision={precision}")
    dtype = trainer.WEIGHT_DTYPES[precision]
    expected = SD3Transformer2DModel.from_pretrained(tiny, subfolder="transformer", dtype=dtype).state_dict()
    state = {name.replace(".base_layer", ""): value for name, value in kept[-1].state_dict().items()}
    assert all(torch.equal(state[name], value) and state[name].dtype == dtype for name, value in expected.items())


def test_the_loaded_lora_changes_the_picture(train: Callable[..., Path], tiny: Path) -> None:
    """Same prompt, same noise: another picture."""
    output, pictures = train("--learning_rate=0.01"), []
    for lora in (None, output):
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny)
        pipeline.set_progress_bar_config(disable=True)
        if lora:
            pipeline.load_lora_weights(lora)
        generator = torch.Generator().manual_seed(0)
        options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
        pictures.append(pipeline(PROMPT, generator=generator, **options).images)
    assert (pictures[0] - pictures[1]).abs().max() > 0.01


@pytest.mark.parametrize(("quantization", "precision"), [("nf4", "fp16"), ("nf4", "bf16"), ("int8", "fp16")])
def test_a_quantised_base_trains(
    quantization: str, precision: str, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real bitsandbytes layers, also after a preview; everything else stays in the precision of the training."""
    quantised_on_cpu.allow(monkeypatch.setattr)
    runs: list[trainer.Run] = []
    load_run = trainer.load_run
    monkeypatch.setattr(trainer, "load_run", lambda *args: runs.append(load_run(*args)) or runs[-1])
    flags = [f"--quantize_base={quantization}", f"--mixed_precision={precision}", "--gradient_checkpointing"]
    flags += [f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=1", "--use_8bit_adam"]
    output = train(*flags, output="quantised")
    transformer = runs[0].transformer
    layer = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}[quantization]
    assert sum(isinstance(module, layer) for module in transformer.modules()) > 20
    dtype = trainer.WEIGHT_DTYPES[precision]
    frozen = [parameter.dtype for parameter in transformer.parameters() if not parameter.requires_grad]
    assert set(frozen) == {dtype, {"nf4": torch.uint8, "int8": torch.int8}[quantization]}
    weights = load_file(output / trainer.LORA_NAME)
    changed = [name for name, value in weights.items() if "lora_B" in name and value.abs().max() > 0]
    assert changed and all(value.isfinite().all() for value in weights.values())
