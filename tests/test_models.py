"""What is loaded is what the part has: a model that differs is one message, before anything is encoded or trained."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

import compute_embeddings as embed
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import Train, compute, equal, lora

Weights = dict[str, Tensor]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline, to be spoiled; its files are links, which are replaced and never written into."""
    return Path(shutil.copytree(tiny, tmp_path / "model", copy_function=os.link))


def change_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    """Change the tensors in the one weight file of a part."""
    [path] = folder.glob("*.safetensors")
    weights = load_file(path)
    change(weights)
    path.unlink()
    save_file(weights, path, {"format": "pt"})


def without(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.pop(name)


def with_another(name: str) -> Callable[[Weights], object]:
    """One more tensor, as the scales in files that are stored in fp8."""
    return lambda weights: weights.update({name: torch.ones(())})


def with_half_of(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: weights[name][: len(weights[name]) // 2].clone()})


T5_QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"
T5_SCALE = "encoder.block.0.layer.0.SelfAttention.q.scale_weight"
FEED_FORWARD = "transformer_blocks.1.ff.net.2.weight"


@pytest.mark.parametrize(
    ("part", "change", "tensor"),
    [
        ("text_encoder", without("text_projection.weight"), "text_projection.weight"),
        ("text_encoder_2", with_half_of("text_projection.weight"), "text_projection.weight"),
        ("text_encoder_3", without(T5_QUERY), T5_QUERY),
        ("text_encoder_3", with_another(T5_SCALE), T5_SCALE),
    ],
)
def test_text_encoders_that_differ_from_their_files_are_refused(
    model: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    change: Callable[[Weights], object],
    tensor: str,
) -> None:
    """Missing, of another shape, or too many: before any prompt is encoded, where random numbers took their place."""
    change_weights(model / part, change)
    monkeypatch.setattr(embed, "encode_prompts", lambda *_: pytest.fail("encoded"))
    with pytest.raises(SystemExit, match=rf"{part} of {model}: .*{re.escape(tensor)}"):
        compute(model, photos, tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()


@pytest.mark.parametrize(
    ("part", "change", "tensor"),
    [
        ("transformer", without(FEED_FORWARD), FEED_FORWARD),
        ("transformer", with_half_of("proj_out.weight"), "proj_out.weight"),
        ("transformer", with_another("proj_out.scale_weight"), "proj_out.scale_weight"),
        ("vae", without("encoder.conv_in.weight"), "encoder.conv_in.weight"),
    ],
)
def test_a_transformer_or_vae_that_differs_from_its_files_is_refused(
    train: Train,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    change: Callable[[Weights], object],
    tensor: str,
) -> None:
    """Missing, of another shape, or too many: before anything is trained."""
    change_weights(model / part, change)
    monkeypatch.setattr(trainer, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match=rf"{part} of {model}: .*{re.escape(tensor)}"):
        train(pretrained_model_name_or_path=model)


def test_parts_in_several_files_are_as_good_as_in_one(train: Train, model: Path, photos: Path, tmp_path: Path) -> None:
    """As save_pretrained writes large parts. Tensors lie otherwise in memory, which may change a sum's last bit."""
    classes = {
        "transformer": SD3Transformer2DModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    whole_embeddings = compute(model, photos, tmp_path / "whole.parquet")
    whole = train(data_df_path=whole_embeddings, output="whole")
    for part, model_class in classes.items():
        loaded = model_class.from_pretrained(model / part)
        [path] = (model / part).glob("*.safetensors")
        path.unlink()
        loaded.save_pretrained(model / part, max_shard_size="100KB")
        assert len(list((model / part).glob("*-of-*.safetensors"))) > 1
    embeddings = compute(model, photos, tmp_path / "sharded.parquet")
    sharded = train(pretrained_model_name_or_path=model, data_df_path=embeddings, output="sharded")
    assert pq.read_table(embeddings)["prompt_embeds"].equals(pq.read_table(whole_embeddings)["prompt_embeds"])
    expected = lora(whole)
    for name, weight in lora(sharded).items():
        assert torch.allclose(weight, expected[name], atol=1e-4), name


def test_a_pipeline_like_sd35_is_whole(train: Train, tiny35: Path, photos: Path, tmp_path: Path) -> None:
    """Its dual attention and its norms of queries and keys are in its files."""
    embeddings = compute(tiny35, photos, tmp_path / "e.parquet")
    assert lora(train(pretrained_model_name_or_path=tiny35, data_df_path=embeddings, max_train_steps=1))


def test_a_single_file_is_told_how_it_is_converted(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of ComfyUI is no folder in diffusers' layout; the message has the line of Python, once."""
    monkeypatch.chdir(tmp_path)
    save_file({"weight": torch.ones(1)}, "sd3_medium.safetensors")
    conversion = r"sd3_medium.safetensors is a file.*from_single_file\('sd3_medium.safetensors'\).save_pretrained\("
    with pytest.raises(SystemExit, match=f"(?s){conversion}"):
        compute(Path("sd3_medium.safetensors"), photos, tmp_path / "e.parquet")
    with pytest.raises(SystemExit, match=f"(?s)Cannot start:\n- {conversion}"):
        train(pretrained_model_name_or_path="sd3_medium.safetensors")


@pytest.mark.parametrize("gone", ["text_encoder_3", "tokenizer_3"])
def test_a_model_without_t5_is_told_how_it_is_used(model: Path, photos: Path, tmp_path: Path, gone: str) -> None:
    """As some repositories leave it out; with the flag, it works."""
    shutil.rmtree(model / gone)
    with pytest.raises(SystemExit, match=f"(?s){gone} of {model}.*--t5_precision none"):
        compute(model, photos, tmp_path / "e.parquet")
    assert compute(model, photos, tmp_path / "e.parquet", "--t5_precision=none").exists()


# ----------------------------------------------------------------------------------------------- LoRAs to start from


def start_lora(folder: Path, weights: Weights, metadata: dict[str, str] | None = None) -> Path:
    """A file for --pretrained_lora_path."""
    path = folder / "start.safetensors"
    save_file(weights, path, {"format": "pt"} | (metadata or {}))
    return path


def test_a_dora_is_refused_as_a_start(train: Train, tmp_path: Path) -> None:
    """Its magnitudes have no place in a LoRA; the message names one of them."""
    weights = lora(train(output="first"))
    for name in list(weights):
        if "lora_B" in name:
            weights[name.replace("lora_B", "lora_magnitude_vector")] = torch.ones(64)
    path = start_lora(tmp_path, weights)
    with pytest.raises(SystemExit, match=f"--pretrained_lora_path {path}"):
        train(f"--pretrained_lora_path={path}")


def test_a_lora_in_fp8_is_a_start(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are those numbers in fp32."""
    small = {name: weight.to(torch.float8_e4m3fn) for name, weight in lora(train(output="first")).items()}
    path = start_lora(tmp_path, small)
    monkeypatch.setattr(trainer, "train", lambda *_: None)
    begun = lora(train(f"--pretrained_lora_path={path}"))
    assert equal(begun, {name: weight.float() for name, weight in small.items()})


def test_an_alpha_that_no_float_can_hold_is_one_message(train: Train, tmp_path: Path) -> None:
    """10**400 in the metadata of a LoRA was an OverflowError."""
    alpha = f'{{"transformer.r": 64, "transformer.lora_alpha": 1{"0" * 400}}}'
    path = start_lora(tmp_path, lora(train(output="first")), {"lora_adapter_metadata": alpha})
    with pytest.raises(SystemExit, match=f"--pretrained_lora_path {path}"):
        train(f"--pretrained_lora_path={path}")
