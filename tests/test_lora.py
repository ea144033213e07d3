"""The LoRA: what is trained and how, and that every program applies its file at the strength it was trained with."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantized_on_cpu
import step_cost
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, RANK, ROOT, compute, logged, parse

Train = Callable[..., Path]
FOUR = {"to_q", "to_k", "to_v", "to_out.0"}


def load_base(model: Path, *flags: str, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """The transformer without a LoRA."""
    return trainer.load_transformer(trainer.LocalModel(str(model), model, None, None), parse(*flags), dtype)


def load(model: Path, *flags: str, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """The transformer as it begins its training."""
    transformer = load_base(model, *flags, dtype=dtype)
    trainer.add_lora(transformer, parse(*flags), 0)
    return transformer


def spread(transformer: nn.Module) -> nn.Module:
    """The same with a LoRA that does something."""
    torch.manual_seed(2)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return transformer


@torch.no_grad()
def answer(transformer: SD3Transformer2DModel) -> Tensor:
    """What the transformer makes of the same inputs each time, (1, 16, 8, 8)."""
    torch.manual_seed(1)
    shapes = {"hidden_states": (1, 16, 8, 8), "encoder_hidden_states": (1, 154, 128), "pooled_projections": (1, 80)}
    inputs = {name: torch.randn(shape).to(transformer.dtype) for name, shape in shapes.items()}
    return transformer(**inputs, timestep=torch.tensor([500.0]), return_dict=False)[0]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[SD3Transformer2DModel]:
    """The transformers of the LoRA files that a run writes, right after they were written."""
    transformers, write_lora = [], trainer.write_lora

    def write_and_keep(path: Path, transformer: SD3Transformer2DModel, *rest: object) -> None:
        write_lora(path, transformer, *rest)
        transformers.append(transformer)

    monkeypatch.setattr(trainer, "write_lora", write_and_keep)
    return transformers


def pipeline_with(lora: Path, model: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(model)
    pipeline.load_lora_weights(lora)
    return pipeline


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_lora_is_fp32_and_the_base_in_the_training_dtype(tiny: Path, dtype: torch.dtype) -> None:
    """add_adapter gives the LoRA the base's dtype, in which its updates would vanish."""
    transformer = load(tiny, dtype=dtype)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in transformer.parameters()}
    assert dtypes == {True: torch.float32, False: dtype}
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in transformer.named_parameters())


def test_the_transformer_is_never_in_fp32_first(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is read straight into the training dtype."""
    asked, from_pretrained = [], SD3Transformer2DModel.from_pretrained

    def record(*args: object, **kwargs: object) -> SD3Transformer2DModel:
        asked.append(kwargs["dtype"])
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "from_pretrained", record)
    load_base(tiny, dtype=torch.float16)
    assert asked == [torch.float16]


@pytest.mark.parametrize(
    ("flags", "layers", "blocks"),
    [
        ([f"--lora_layers={','.join(FOUR)}"], FOUR, {0, 1}),
        (["--lora_layers=attn.to_q,add_k_proj"], {"to_q", "add_k_proj"}, {0, 1}),
        (["--lora_layers=transformer_blocks.1.attn.to_*"], FOUR, {1}),
        (["--lora_layers=0.attn.add_*"], {"add_q_proj", "add_k_proj", "add_v_proj"}, {0}),
    ],
)
def test_layers_and_blocks_choose_what_is_trained(tiny: Path, flags: list[str], layers: set, blocks: set) -> None:
    """By the ends of the layers' names, or by patterns with the numbers of blocks."""
    trained = {name.split(".lora_A")[0] for name, _ in load(tiny, *flags).named_parameters() if "lora_A" in name}
    assert trained == {f"transformer_blocks.{block}.attn.{layer}" for block in blocks for layer in layers}


def test_on_sd35_both_attentions_are_trained(tiny35: Path) -> None:
    """SD3.5-medium's dual layers have a second attention with the same names; a pattern chooses it alone."""
    second = load(tiny35, "--lora_layers=attn2.*")
    trained = {name.split(".lora_A")[0] for name, _ in second.named_parameters() if "lora_A" in name}
    assert trained == {f"transformer_blocks.0.attn2.{layer}" for layer in FOUR}
    both = load(tiny35, f"--lora_layers={','.join(FOUR)}")
    names = [name for name, _ in both.named_parameters() if "lora_A" in name]
    assert sum("attn2." in name for name in names) == 4 and sum("attn." in name for name in names) == 8


@pytest.mark.parametrize("model", ["sd3-medium", "sd3.5-medium"])
def test_by_default_the_layers_are_diffusers(model: str) -> None:
    """Of the real shapes 191: in each of 24 blocks the first attention's eight, of which the last block lacks one."""
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**step_cost.MODELS[model])
    layers = trainer.lora_targets(transformer, trainer.Args.lora_layers)
    assert len(layers) == 191 and not any("attn2." in layer for layer in layers)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_leaves_the_base_as_it_was(
    train: Train, tiny: Path, trained: list[SD3Transformer2DModel], precision: str
) -> None:
    """Bit for bit, and still in its dtype after the LoRA was saved: the reference made it fp32 to save 5 MB."""
    train(f"--mixed_precision={precision}")
    dtype = trainer.WEIGHT_DTYPES[precision]
    expected = SD3Transformer2DModel.from_pretrained(tiny, subfolder="transformer", dtype=dtype).state_dict()
    state = {name.replace(".base_layer", ""): value for name, value in trained[0].state_dict().items()}
    assert all(torch.equal(state[name], value) and state[name].dtype == dtype for name, value in expected.items())


def test_a_quantized_base_trains(
    train: Train, trained: list[SD3Transformer2DModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real bitsandbytes layers, also after a preview; everything else stays in the precision of the training."""
    quantized_on_cpu.allow(monkeypatch.setattr)
    flags = [f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=1", "--use_8bit_adam"]
    output = train("--quantize_base=nf4", "--mixed_precision=bf16", f"--lora_layers={','.join(FOUR)}", *flags)
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in trained[0].modules()) > 20
    frozen = {parameter.dtype for parameter in trained[0].parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16, torch.uint8}
    weights = load_file(output / trainer.LORA_NAME)
    assert all(value.isfinite().all() and value.any() for value in weights.values())


# --------------------------------------------------------------------------------------------------- the fused forward


@pytest.fixture
def with_peft(train: Train, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the trainer with PEFT's own forward in its LoRA layers."""

    def run(*flags: str, **changes: object) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "fused_forward", lambda layer, plain: plain)
            return train(*flags, **changes)

    return run


@pytest.mark.parametrize("flags", [[], ["--quantize_base=nf4", "--lora_alpha=16"]])
def test_the_fused_forward_trains_the_same_lora(
    train: Train, with_peft: Train, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """As PEFT's own, within rounding: in fp32 1e-5 after 20 steps, of weights that went 2e-2 far."""
    quantized_on_cpu.allow(monkeypatch.setattr)
    fused = load_file(train(*flags, max_train_steps=20) / trainer.LORA_NAME)
    plain = load_file(with_peft(*flags, max_train_steps=20, output="plain") / trainer.LORA_NAME)
    assert fused.keys() == plain.keys() and max(value.abs().max() for value in fused.values()) > 0.01
    for name, value in fused.items():
        assert torch.allclose(value, plain[name], rtol=0, atol=1e-5), name


def test_in_bf16_the_losses_are_those_of_peft(train: Train, with_peft: Train) -> None:
    """Of 20 steps, within 1 %."""
    fused = logged(train("--mixed_precision=bf16", max_train_steps=20))
    plain = logged(with_peft("--mixed_precision=bf16", max_train_steps=20, output="plain"))
    assert len(fused) == 20 and fused == pytest.approx(plain, rel=0.01) and fused != plain


@pytest.mark.parametrize(("flags", "dtype"), [([], torch.float32), ([], torch.bfloat16),
                                              (["--quantize_base=nf4"], torch.bfloat16),
                                              (["--quantize_base=int8"], torch.bfloat16)])  # fmt: skip
def test_switched_off_the_lora_is_not_there(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], dtype: torch.dtype
) -> None:
    """To the bit; and switched on it is as before."""
    quantized_on_cpu.allow(monkeypatch.setattr)
    bare = answer(load_base(tiny, *flags, dtype=dtype))
    transformer = spread(load(tiny, *flags, dtype=dtype))
    trained = answer(transformer)
    transformer.disable_adapters()
    assert torch.equal(answer(transformer), bare)
    transformer.enable_adapters()
    assert torch.equal(answer(transformer), trained) and not torch.allclose(trained, bare, atol=0.1)


def test_dropout_is_pefts_own(tiny: Path) -> None:
    """In training it is random, in previews it is off."""
    plain, dropping = spread(load(tiny)), spread(load(tiny, "--lora_dropout=0.5"))
    assert torch.allclose(answer(dropping.eval()), answer(plain.eval()), atol=1e-5)
    torch.manual_seed(0)
    assert not torch.allclose(answer(dropping.train()), answer(plain.train()), atol=0.01)


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("flags", [[], ["--lora_alpha=16"], ["--lora_layers=0.attn.*", "--lora_alpha=100"]])
def test_diffusers_applies_the_trained_strength(
    train: Train, tiny: Path, trained: list[SD3Transformer2DModel], flags: list[str]
) -> None:
    """The final file and the last checkpoint, loaded by the pipeline, give what the trained model gave."""
    output = train("--checkpointing_steps=4", *flags, learning_rate=0.01)
    bare = answer(SD3Transformer2DModel.from_pretrained(tiny, subfolder="transformer"))
    expected = answer(trained[-1])
    assert not torch.allclose(expected, bare, atol=1e-3)
    for folder in (output, output / "checkpoint-4"):
        assert torch.allclose(answer(pipeline_with(folder, tiny).transformer), expected, atol=1e-5)


def test_programs_that_know_no_alpha_apply_the_trained_strength(
    train: Train, tiny: Path, trained: list[SD3Transformer2DModel]
) -> None:
    """ComfyUI takes W + B A where a file has no .alpha tensors: checkpoints and the final file hold it."""
    output = train("--checkpointing_steps=4", "--lora_alpha=16", learning_rate=0.01)
    layers = {name: module for name, module in trained[-1].named_modules() if isinstance(module, LoraLayer)}
    for folder in (output, output / "checkpoint-4"):
        file = load_file(folder / trainer.LORA_NAME)
        expected = {f"transformer.{name}.lora_{side}.weight" for name in layers for side in "AB"}
        assert file.keys() == expected
        for name, layer in layers.items():
            applied = file[f"transformer.{name}.lora_B.weight"] @ file[f"transformer.{name}.lora_A.weight"]
            assert torch.allclose(applied, layer.get_delta_weight("default"), atol=1e-6)


def read_metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / trainer.LORA_NAME, "np") as file:
        return file.metadata()


def test_the_file_names_only_what_every_peft_knows(train: Train) -> None:
    """Any other field of LoraConfig is a TypeError in a PEFT that lacks it; without rank_pattern it is a KeyError."""
    output = train("--checkpointing_steps=4", "--lora_alpha=16", "--lora_layers=attn.to_q", max_train_steps=4)
    for folder in (output, output / "checkpoint-4"):
        about = read_metadata(folder)
        assert json.loads(about["lora_adapter_metadata"]) == {
            "transformer.r": RANK,
            "transformer.lora_alpha": RANK,
            "transformer.target_modules": [f"transformer_blocks.{block}.attn.to_q" for block in (0, 1)],
            "transformer.rank_pattern": {},
            "transformer.alpha_pattern": {},
        }
        assert not any(key.startswith("ss_") for key in about)


@pytest.fixture(scope="session")
def older_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a PEFT that is older than the one that writes the files."""
    folder = tmp_path_factory.mktemp("older_peft")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--target", folder, "peft==0.18.0"], check=True, timeout=300)
    return folder


def test_an_older_peft_loads_the_file(
    train: Train, tiny: Path, trained: list[SD3Transformer2DModel], older_peft: Path, tmp_path: Path
) -> None:
    """diffusers beside PEFT 0.18, in a process of its own, gives what the trained model gave."""
    output = train("--lora_alpha=16", learning_rate=0.01)
    code = (
        "import sys, peft, torch; from test_lora import answer, pipeline_with; assert peft.__version__ == '0.18.0'\n"
        "torch.save(answer(pipeline_with(*sys.argv[1:3]).transformer), sys.argv[3])"
    )
    path = os.pathsep.join(map(str, [older_peft, ROOT, ROOT / "tests", ROOT / "tests" / "tools"]))
    command = [sys.executable, "-c", code, output, tiny, tmp_path / "answer.pt"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=120)
    assert peft.__version__ != "0.18.0"
    assert torch.allclose(torch.load(tmp_path / "answer.pt"), answer(trained[-1]), atol=1e-5)


@pytest.fixture(scope="session")
def tiny_large(tiny35: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with as many blocks as SD3.5-large, but no second attention."""
    folder = tmp_path_factory.mktemp("tiny_large") / "stabilityai" / "large"
    pipeline = StableDiffusion3Pipeline.from_pretrained(tiny35)
    config = dict(pipeline.transformer.config) | {"num_layers": 38, "dual_attention_layers": ()}
    pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("model", "name"), [
    ("tiny", "v3-medium"), ("tiny35", "v3.5-medium"), ("tiny_large", "v3.5-large"),
])  # fmt: skip
def test_other_programs_see_what_it_is(
    train: Train, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, model: str, name: str
) -> None:
    """ModelSpec's keys, in checkpoints and in the final file, and no path."""
    folder = request.getfixturevalue(model)
    monkeypatch.chdir(folder.parents[1])
    base = folder.relative_to(folder.parents[1])
    output = train("--checkpointing_steps=1", pretrained_model_name_or_path=base, max_train_steps=1)
    for about in (read_metadata(output), read_metadata(output / "checkpoint-1")):
        assert about["modelspec.architecture"] == f"stable-diffusion-{name}/lora"
        assert about["modelspec.trigger_phrase"] == PROMPT and about["modelspec.title"] == "out"
        assert about["modelspec.resolution"] == "64x64"
        age = datetime.now().astimezone() - datetime.fromisoformat(about["modelspec.date"])
        assert 0 <= age.total_seconds() < 300
        assert str(output.parent) not in str(about)


# --------------------------------------------------------------------------------------------- a LoRA to start from


def write_other(path: Path, *names: str) -> Path:
    save_file({name: torch.zeros(4, 4) for name in names}, path)
    return path


@pytest.mark.parametrize(("program", "name"), [
    ("kohya", "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"),
    ("OneTrainer", "lora_transformer_transformer_blocks_0_attn_to_k.lora_down.weight"),
    ("text encoder", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"),
])  # fmt: skip
def test_a_lora_in_another_form_is_refused(train: Train, tmp_path: Path, program: str, name: str) -> None:
    """By the first of them, or of those that it lacks."""
    lora = write_other(tmp_path / "other.safetensors", name)
    with pytest.raises(SystemExit, match="other.safetensors is not a LoRA"):
        train(f"--pretrained_lora_path={lora}")


def test_a_lora_without_the_prefix_is_refused(train: Train, tiny: Path, tmp_path: Path) -> None:
    """Such as save_lora_adapter writes: where its alpha stands, we would not look."""
    spread(load(tiny, f"--rank={RANK}", "--lora_alpha=16")).save_lora_adapter(tmp_path / "adapter")
    with pytest.raises(SystemExit, match="is not a LoRA"):
        train(f"--pretrained_lora_path={tmp_path / 'adapter'}")


def test_a_lora_of_a_model_of_another_width_is_refused(train: Train, tmp_path: Path) -> None:
    """Though its layers have the same names and its rank is right."""
    weights = load_file(train(max_train_steps=1) / trainer.LORA_NAME)
    wide = {name: torch.cat([value] * 2, int("lora_A" in name)) for name, value in weights.items()}
    save_file(wide, tmp_path / "wide")
    with pytest.raises(SystemExit, match="is not a LoRA .* see "):
        train(f"--pretrained_lora_path={tmp_path / 'wide'}", output="other")


@pytest.mark.parametrize("metadata", [
    [1, 2], {"transformer.lora_alpha": "strong"}, {"transformer.lora_alpha": float("nan")},
    {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"attn.to_q": 2}},
])  # fmt: skip
def test_a_lora_whose_strength_is_unclear_is_refused(train: Train, tmp_path: Path, metadata: object) -> None:
    """By the flag and its file."""
    weights = load_file(train(max_train_steps=1) / trainer.LORA_NAME)
    about = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    save_file(weights, tmp_path / "start.safetensors", about)
    with pytest.raises(SystemExit, match="--pretrained_lora_path .*start.safetensors cannot be used"):
        train(f"--pretrained_lora_path={tmp_path / 'start.safetensors'}", "--dry_run", output="other")


def test_a_lora_that_is_not_finite_is_refused(train: Train, tmp_path: Path) -> None:
    """By the name of the weight."""
    weights = load_file(train(max_train_steps=1) / trainer.LORA_NAME)
    name = list(weights)[3]
    weights[name][0, 0] = torch.nan
    save_file(weights, tmp_path / "start.safetensors")
    with pytest.raises(SystemExit, match=f"start.safetensors .*{name} is not finite"):
        train(f"--pretrained_lora_path={tmp_path / 'start.safetensors'}", "--dry_run", output="other")


# ------------------------------------------------------------------------------------------------------------ the card


@pytest.mark.parametrize(("model", "tag"), [("tiny", "sd3"), ("tiny35", "sd3.5")])
def test_the_card_says_what_it_is_and_how_to_use_it(
    train: Train, request: pytest.FixtureRequest, model: str, tag: str
) -> None:
    """Tags of the base's family, trigger words, diffusers with its lowest version, ComfyUI, and what to fill in."""
    output = train(pretrained_model_name_or_path=request.getfixturevalue(model), max_train_steps=1)
    card = ModelCard.load(output / "README.md")
    other = {"sd3": "sd3.5", "sd3.5": "sd3"}[tag]
    assert {tag, f"{tag}-diffusers", "lora", "text-to-image"} <= set(card.data.tags)
    assert not {other, f"{other}-diffusers"} & set(card.data.tags)
    assert f"## Trigger words\n\nYou should use `{PROMPT}` to trigger" in card.text
    assert "diffusers 0.40 or later" in card.text and "ComfyUI" in card.text and trainer.LORA_NAME in card.text
    assert 'from_pretrained(\n    "FOLDER OR REPOSITORY OF THE BASE MODEL"' in card.text  # it was a folder
    assert "base_model" not in card.data.to_dict()


def test_the_card_holds_any_prompt(train: Train, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """As it is, in the card's data and in the snippet."""
    prompt = "a 'photo' of: \"sks\" 🐕 {dog} #1"
    embeddings = compute(tiny, photos, tmp_path / "e.parquet", f"--prompt={prompt}", "--no_t5")
    output = train(data_df_path=embeddings, instance_prompt=prompt, max_train_steps=1)
    card = ModelCard.load(output / "README.md")
    snippet = card.text.split("```python")[1].split("```")[0]
    strings = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert card.data.instance_prompt == prompt and prompt in strings
