"""Stable Diffusion 3 pipelines with the real classes and random weights, small enough to build in under a second."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

CLIP_WIDTHS = (32, 48)
T5_WIDTH = 128


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's byte-level tokenizer without a merge: a token per letter."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """T5's unigram tokenizer with a piece per letter; <pad> is 0, </s> is 1."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5TokenizerFast(vocab=pieces + [(f"<extra_id_{i}>", 0.0) for i in range(100)], model_max_length=512)


def clip(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, projection_dim=width, num_hidden_layers=3,
        num_attention_heads=4, hidden_act=activation, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def build(kind: str = "sd3") -> StableDiffusion3Pipeline:
    """kind sd3: as SD3-medium; kind sd35: as SD3.5-medium, with RMS norm of Q and K and a dual attention layer."""
    torch.manual_seed(0)
    tokenizers = [clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer()]
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(tokenizers[2]), d_model=T5_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ))  # fmt: skip
    special = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if kind == "sd35" else {}
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=T5_WIDTH,
        caption_projection_dim=64, pooled_projection_dim=sum(CLIP_WIDTHS), pos_embed_max_size=64, **special,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 16, 16, 16), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=4, sample_size=64, scaling_factor=1.5305,
        shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(tokenizers[0], CLIP_WIDTHS[0], "quick_gelu"), tokenizer=tokenizers[0],
        text_encoder_2=clip(tokenizers[1], CLIP_WIDTHS[1], "gelu"), tokenizer_2=tokenizers[1],
        text_encoder_3=t5, tokenizer_3=tokenizers[2],
    )  # fmt: skip


def save(folder: Path, kind: str = "sd3") -> Path:
    """Write the pipeline in diffusers' layout."""
    build(kind).save_pretrained(folder)
    return folder
