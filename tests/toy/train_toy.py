"""Train the toy: a Stable Diffusion 3 of 4 million parameters that knows a world of coloured shapes.

    python train_toy.py --output_dir model

Draws the world, trains the VAE on random drawings, then the transformer on captioned pictures, and saves a complete
StableDiffusion3Pipeline in fp16 (9 MB). The text encoders stay random: different words only have to differ. The robot
of world.py is in no training picture. Nearly two hours on two CPU cores that other work shared; killed, it goes on
from the last saved state. Every step draws its randomness from its own number, so nothing random has to be saved.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from world import COLORS, SHAPES, SIZE, captioned_picture, random_sample, render_scene, render_shape

OTHER_WORDS = "a an the photo picture drawing of on in with and background shape toy sks robot dog cat"
WORDS = (*COLORS, *SHAPES, *OTHER_WORDS.split())  # order decides the tokens' numbers
TEXT_LENGTH = 16  # tokens: the longest caption has 12
SECONDS_BETWEEN_SAVES = 120


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("model"), help="where the pipeline goes")
    parser.add_argument("--state_dir", type=Path, help="where a killed run goes on from (default: OUTPUT_DIR-state)")
    parser.add_argument("--vae_steps", type=int, default=2_700, help="steps of 16 pictures")
    parser.add_argument("--decoder_steps", type=int, default=800, help="more such steps for the decoder alone")
    parser.add_argument("--vae_pictures", type=int, default=24_000, help="drawings the VAE sees")
    parser.add_argument("--transformer_steps", type=int, default=8_000, help="steps of 64 pictures")
    parser.add_argument("--transformer_pictures", type=int, default=24_000, help="pictures the transformer sees")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------- text


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's byte-pair encoding, merged by hand until each of WORDS is one token: the library's trainer breaks ties at
    random."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in WORDS}
    merges = []
    while pairs := Counter(pair for parts in split.values() for pair in pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in split.values():
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # "!" comes first, so it is id 0 as in CLIP
    tokens = dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges)])
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> T5TokenizerFast:
    """T5's unigrams: WORDS whole, and single characters for everything else."""
    pieces = {"▁" + word: -3.0 for word in sorted(WORDS)}
    for character in ["▁", *map(chr, range(33, 127))]:
        pieces.setdefault(character, -12.0)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces.items()]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def random_clip(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextModelWithProjection:
    """A CLIP text encoder that has learnt nothing, but says different things about different words."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width,
        num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = CLIPTextModelWithProjection(config)
    embeddings = encoder.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight)  # the stock 0.02 leaves the penultimate layer near zero
    nn.init.normal_(embeddings.position_embedding.weight, std=0.5)
    with torch.no_grad():  # the end token is pooled: silent itself, it passes on the mean of the words
        embeddings.token_embedding.weight[tokenizer.eos_token_id] = 0
    for layer in encoder.text_model.encoder.layers:
        for linear in (layer.self_attn.v_proj, layer.self_attn.out_proj):
            nn.init.orthogonal_(linear.weight, gain=1.5)
    return encoder


def random_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A T5 encoder that has learnt nothing, with widths that bitsandbytes can quantize (multiples of 64)."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=16, d_ff=256, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config)


# ---------------------------------------------------------------------------------------------------------- models


def build_vae() -> AutoencoderKL:
    """Eight times smaller, 16 channels, as SD3's: (B, 3, 64, 64) to (B, 16, 8, 8)."""
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(16, 32, 64, 64), layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=8,
        sample_size=SIZE, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    nn.init.constant_(vae.encoder.conv_out.bias.data[16:], -6.0)  # log variance: unit noise would hide all at first
    return vae


def build_transformer() -> SD3Transformer2DModel:
    """An MMDiT of five layers and width 128: 16 picture tokens and 32 text tokens."""
    return SD3Transformer2DModel(
        sample_size=SIZE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=5, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=96,
        pos_embed_max_size=16,
    )  # fmt: skip


def build_pipeline(seed: int) -> StableDiffusion3Pipeline:
    """The whole toy before any training. Shift 1: SD3's 3 is for 1024 pixels, where noise hides less."""
    torch.manual_seed(seed)
    clips, t5 = (clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")), t5_tokenizer()
    return StableDiffusion3Pipeline(
        text_encoder=random_clip(clips[0], 32, "quick_gelu").requires_grad_(False), tokenizer=clips[0],
        text_encoder_2=random_clip(clips[1], 64, "gelu").requires_grad_(False), tokenizer_2=clips[1],
        text_encoder_3=random_t5(t5).requires_grad_(False), tokenizer_3=t5,
        vae=build_vae(), transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- data


def to_pixel_values(images: list[Image.Image]) -> Tensor:
    """Pictures as the VAE takes them, (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_vae_pictures(count: int, seed: int) -> Tensor:
    """Two drawings of random parts for every picture of the world, (count, 3, 64, 64) bytes."""
    rng = random.Random(seed)
    pictures = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    for i in range(count):
        shape, color, background, _ = random_sample(rng)
        image = render_shape(shape, COLORS[color], COLORS[background], rng) if i % 3 == 0 else render_scene(rng)
        pictures[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pictures


@torch.no_grad()
def encode_world(vae: AutoencoderKL, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Latents of captioned pictures as the VAE gives them, (count, 16, 8, 8), and their captions."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    latents, captions = [], []
    for start in range(0, count, 100):
        images = []
        for _ in range(min(100, count - start)):
            image, caption = captioned_picture(rng)
            images.append(image)
            captions.append(caption)
        latents.append(vae.encode(to_pixel_values(images)).latent_dist.sample(generator))
    return torch.cat(latents), captions


@torch.no_grad()
def encode_captions(pipe: StableDiffusion3Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of each caption, (N, 32, 128), and pooled, (N, 96)."""
    embeds, pooled = [], []
    for start in range(0, len(captions), 100):
        batch = captions[start : start + 100]
        prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(
            batch, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
        )
        embeds.append(prompt_embeds)
        pooled.append(pooled_prompt_embeds)
    return torch.cat(embeds), torch.cat(pooled)


# ---------------------------------------------------------------------------------------------------------- training


def vae_loss(
    vae: AutoencoderKL, pixel_values: Tensor, generator: torch.Generator, decoder_only: bool = False
) -> Tensor:
    """Error of pixels and of their differences (edges stay sharp), and a little KL. Squares mind small details."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(pixel_values).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
    error = decoded.float() - pixel_values
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 4 * error.square().mean() + edges + 2e-6 * posterior.kl().mean()


def flow_matching_loss(
    transformer: SD3Transformer2DModel, latents: Tensor, embeds: Tensor, pooled: Tensor, generator: torch.Generator
) -> Tensor:
    """Velocity error at logit-normal noise levels. Rectified flow, arXiv 2403.03206 §3.1."""
    sigmas = torch.randn(len(latents), 1, 1, 1, generator=generator).sigmoid()
    noise = torch.randn(latents.shape, generator=generator)
    velocity_pred = transformer(
        hidden_states=(1 - sigmas) * latents + sigmas * noise,
        timestep=1000 * sigmas.flatten(),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
    ).sample
    return F.mse_loss(velocity_pred, noise - latents)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal steps (Keller Jordan), as large as AdamW's: an hour of CPU has few steps to spend.
    torch.optim.Muon refuses convolutions; here a kernel is a matrix of (out, in * k * k)."""

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 0.05)
                update = orthogonalize(param.grad.lerp(momentum, 0.95).flatten(1))
                param.mul_(1 - 0.01 * group["lr"])
                param.add_(update.view_as(param), alpha=-0.2 * group["lr"] * max(update.shape) ** 0.5)


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix with its singular values near 1, (M, N): five Newton-Schulz iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).contiguous()


def train(
    model: nn.Module, loss_at: Callable[[torch.Generator], Tensor], steps: int, learning_rate: float, state_file: Path
) -> None:
    """Minimise loss_at(generator of the step) from the last saved state on; leave the averaged weights in model."""
    muon = Muon([p for p in model.parameters() if p.ndim > 1], learning_rate)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2], learning_rate / 2.5, betas=(0.9, 0.98))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    parts = {"model": model, "muon": muon, "adam": adam, "average": average}
    step = restore(state_file, parts)
    saved = time.monotonic()
    while step < steps:
        muon.param_groups[0]["lr"] = learning_rate * learning_rate_factor(step / steps)
        adam.param_groups[0]["lr"] = muon.param_groups[0]["lr"] / 2.5
        loss = loss_at(torch.Generator().manual_seed(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        step += 1
        if step % 100 == 0:
            now = time.strftime("%H:%M:%S")
            print(f"{now} {state_file.stem} step {step}/{steps}: loss {loss.item():.4f}", flush=True)
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES or step == steps:
            save(state_file, parts, step)
            saved = time.monotonic()
    model.load_state_dict(average.module.state_dict())


def learning_rate_factor(progress: float) -> float:
    """A short warm-up, then half a cosine down to zero."""
    return min(1.0, progress / 0.05) * (1 + math.cos(math.pi * progress)) / 2


def save(state_file: Path, parts: dict[str, nn.Module | torch.optim.Optimizer], step: int) -> None:
    """Write the state of a training at once or not at all."""
    state_file.parent.mkdir(parents=True, exist_ok=True)
    partial = state_file.with_suffix(".partial")
    torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, partial)
    os.replace(partial, state_file)


def restore(state_file: Path, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> int:
    """Read the state of a training, if there is one, and the step it is at."""
    if not state_file.exists():
        return 0
    state = torch.load(state_file, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def train_vae(vae: AutoencoderKL, args: argparse.Namespace) -> None:
    """Teach the VAE to see, on pictures that are drawn first (a minute), and then its decoder some more."""
    pictures = draw_vae_pictures(args.vae_pictures, args.seed)

    def loss_at(generator: torch.Generator, decoder_only: bool = False) -> Tensor:
        chosen = pictures[torch.randint(len(pictures), (16,), generator=generator)]
        return vae_loss(vae, chosen.float() / 127.5 - 1, generator, decoder_only)

    train(vae.train(), loss_at, args.vae_steps, 5e-3, args.state_dir / "vae.pt")
    decoder_loss = partial(loss_at, decoder_only=True)
    train(vae.decoder, decoder_loss, args.decoder_steps, 1e-3, args.state_dir / "decoder.pt")
    vae.eval()


def train_transformer(pipe: StableDiffusion3Pipeline, args: argparse.Namespace) -> None:
    """Teach the transformer which words mean which shapes, and measure the VAE's scaling on the way."""
    latents, captions = encode_world(pipe.vae, args.transformer_pictures, args.seed + 1)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    pipe.vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    latents = (latents - shift) * scale
    distinct = ["", *sorted(set(captions))]
    embeds, pooled = encode_captions(pipe, distinct)
    number = {caption: i for i, caption in enumerate(distinct)}
    caption_numbers = torch.tensor([number[caption] for caption in captions])

    def loss_at(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (64,), generator=generator)
        dropped = torch.rand(64, generator=generator) < 0.1
        texts = caption_numbers[chosen].masked_fill(dropped, 0)
        return flow_matching_loss(pipe.transformer, latents[chosen], embeds[texts], pooled[texts], generator)

    train(pipe.transformer.train(), loss_at, args.transformer_steps, 3e-3, args.state_dir / "transformer.pt")
    pipe.transformer.eval()


def main() -> None:
    args = parse_args()
    args.state_dir = args.state_dir or args.output_dir.with_name(args.output_dir.name + "-state")
    pipe = build_pipeline(args.seed)
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        print(f"{name}: {sum(p.numel() for p in pipe.components[name].parameters()):,} parameters")
    train_vae(pipe.vae, args)
    train_transformer(pipe, args)
    pipe.to(torch.float16).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
