"""Measure a trained toy: does its VAE draw the robot it has never seen, do its samples follow their prompts?

    python measure_toy.py --model model

Prints README.md's numbers and writes reconstructions.png and samples.png. A few minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image

from score import background_correct, color_correct, color_of, shape_correct, shape_of, subject_fidelity
from train_toy import TEXT_LENGTH, to_pixel_values
from world import COLORS, NEW_BACKGROUNDS, SHAPES, contact_sheet, held_out_robots, render_robot, render_shape

HERE = Path(__file__).parent


def generate(
    pipe: StableDiffusion3Pipeline, prompts: list[str], seed: int = 0, guidance_scale: float = 2.5, steps: int = 20
) -> list[Image.Image]:
    """One 64 x 64 picture a prompt."""
    images = []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(prompts), 64):
        images += pipe(
            prompts[start : start + 64], num_inference_steps=steps, guidance_scale=guidance_scale, height=64, width=64,
            max_sequence_length=TEXT_LENGTH, generator=generator,
        ).images  # fmt: skip
    return images


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: list[Image.Image]) -> list[Image.Image]:
    """What the VAE makes of pictures."""
    decoded = vae.decode(vae.encode(to_pixel_values(images)).latent_dist.mode()).sample
    pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(p) for p in pixels]


def random_captions(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Shapes, colors and backgrounds to ask for."""
    rng = random.Random(seed)
    return [(rng.choice(SHAPES), *rng.sample(list(COLORS), 2)) for _ in range(count)]


def measure_vae(vae: AutoencoderKL) -> None:
    """Print and draw what the VAE keeps of the robot and of shapes."""
    robots = held_out_robots()
    decoded = reconstruct(vae, robots)
    asked = random_captions(300, seed=2)
    rng = random.Random(3)
    shapes = [render_shape(shape, COLORS[color], COLORS[background], rng) for shape, color, background in asked]
    seen = reconstruct(vae, shapes)
    error = np.mean([np.abs(np.float32(a) - np.float32(b)).mean() for a, b in zip(robots, decoded, strict=True)])
    print(f"robots through the VAE: fidelity {subject_fidelity(decoded):.3f}, mean error {error:.1f} of 255")
    bodies = reconstruct(vae, [render_robot(b, rng, details=False) for b in COLORS])
    print(f"teal bodies through the VAE: fidelity {subject_fidelity(bodies):.3f}")
    print("shapes through the VAE:", right_fractions(seen, asked))
    contact_sheet([robots[:12], decoded[:12], shapes[:12], seen[:12]], zoom=2).save(HERE / "reconstructions.png")


def shape_prompts(asked: list[tuple[str, str, str]]) -> list[str]:
    """What to ask for, in words."""
    return [f"a photo of a {color} {shape} on a {background} background" for shape, color, background in asked]


def what_is_right(images: list[Image.Image], asked: list[tuple[str, str, str]]) -> np.ndarray:
    """Whether each picture has the shape, color and background that was asked for, (N, 3)."""
    return np.array(
        [
            (shape_correct(image, shape), color_correct(image, color), background_correct(image, background))
            for image, (shape, color, background) in zip(images, asked, strict=True)
        ]
    )


def right_fractions(images: list[Image.Image], asked: list[tuple[str, str, str]]) -> str:
    """Fractions of pictures with the shape, color and background that was asked for, and with all three."""
    right = what_is_right(images, asked)
    shape, color, background = right.mean(axis=0)
    return f"shape {shape:.3f} color {color:.3f} background {background:.3f} all {right.all(axis=1).mean():.3f}"


def measure_samples(pipe: StableDiffusion3Pipeline, count: int, guidance_scale: float) -> list[Image.Image]:
    """Print how well samples follow their prompts."""
    asked = random_captions(count, seed=4)
    images = generate(pipe, shape_prompts(asked), guidance_scale=guidance_scale)
    print(f"samples, guidance {guidance_scale}:", right_fractions(images, asked), flush=True)
    wrong = [(a, shape_of(i), color_of(i)) for i, a in zip(images, asked, strict=True) if shape_of(i) != a[0]]
    print("  wrong shapes, first:", wrong[:6])
    return images


def measure_unseen_subject(pipe: StableDiffusion3Pipeline) -> list[Image.Image]:
    """Print what the toy makes of the robot's prompt before it has been taught."""
    images = generate(pipe, ["a photo of sks robot"] * 24)
    print(f"'a photo of sks robot' before DreamBooth: fidelity {subject_fidelity(images):.3f}")
    placed = generate(pipe, [f"a photo of sks robot on a {b} background" for b in NEW_BACKGROUNDS for _ in range(8)])
    backgrounds = [b for b in NEW_BACKGROUNDS for _ in range(8)]
    right = np.mean([background_correct(i, b) for i, b in zip(placed, backgrounds, strict=True)])
    print(f"  on new backgrounds: fidelity {subject_fidelity(placed):.3f}, background right {right:.3f}")
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--count", type=int, default=300, help="samples for the prompt following")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[2.0, 3.0])
    args = parser.parse_args()
    pipe = StableDiffusion3Pipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    measure_vae(pipe.vae)
    samples = [measure_samples(pipe, args.count, scale)[:36] for scale in args.guidance_scales][-1]
    unseen = measure_unseen_subject(pipe)
    rows = [samples[i : i + 12] for i in range(0, len(samples), 12)]
    contact_sheet([*rows, unseen[:12]], zoom=2).save(HERE / "samples.png")


if __name__ == "__main__":
    main()
