"""Time our training step and the reference's in one process, taking turns, on one copy of the frozen weights.

    python tests/tools/compared_steps.py --pipeline_dir O/sd3-medium --resolution 1024 --output_path O/steps.json

The reference's step: PEFT's LoRA under autocast, all blocks recomputed, the VAE's encoder in every step. Then a
profile of one step of ours: the kernels that take most of its time.
"""

import argparse
import copy
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import cast_training_params
from torch import Tensor, nn
from torch.autograd import DeviceType

FOUR_LAYERS = "to_k,to_q,to_v,to_out.0"  # the reference's
TEXT_TOKENS = 154  # 77 of CLIP and 77 of T5
Step = Callable[[], None]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pipeline_dir", type=Path, required=True, help="pipeline in diffusers' layout")
    parser.add_argument("--output_path", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--scripts_dir", type=Path, default=ROOT, help="folder of the trainer")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8, help="steps of each to time")
    return parser.parse_args()


def random_batch(config: dict, resolution: int, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch of one image, as the trainer's data loader gives it."""
    latents_shape = (1, 16, resolution // 8, resolution // 8)
    batch = {
        "latents": torch.randn(latents_shape),
        "noise": torch.randn(latents_shape),
        "mask": torch.ones(1, 1, *latents_shape[2:]),
        "sigma": torch.full((1,), 0.5),
        "loss_weight": torch.ones(1),
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, config["joint_attention_dim"]).half(),
        "pooled_prompt_embeds": torch.randn(1, config["pooled_projection_dim"]).half(),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def our_step(transformer: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace, dtype: torch.dtype) -> Step:
    """The trainer's own: its LoRA, its loss, its optimizer."""
    import train_dreambooth_sd3_lora_miniature as trainer

    trainer.add_lora(transformer, args, seed=0)
    trainer.recompute_blocks(transformer, 0)
    optimizer = trainer.make_optimizer(trainable(transformer), args, 1)

    def step() -> None:
        trainer.training_loss(transformer, batch, dtype, args).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def reference_step(
    transformer: nn.Module, vae: AutoencoderKL, batch: dict[str, Tensor], args: argparse.Namespace, dtype: torch.dtype
) -> Step:
    """What diffusers' sd3_lora_colab does for each image."""
    from peft import LoraConfig

    device = batch["latents"].device
    transformer.enable_gradient_checkpointing()
    transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=FOUR_LAYERS.split(",")))
    cast_training_params(transformer)
    optimizer = torch.optim.AdamW(trainable(transformer))
    side = 8 * batch["latents"].shape[-1]
    pixel_values = torch.randn(1, 3, side, side, device=device)
    prompt_embeds = batch["prompt_embeds"].to(dtype)
    pooled_prompt_embeds = batch["pooled_prompt_embeds"].to(dtype)
    sigmas = batch["sigma"].view(-1, 1, 1, 1).to(dtype)

    def step() -> None:
        latents = vae.encode(pixel_values).latent_dist.sample()  # (1, 16, H/8, W/8)
        latents = (latents * vae.config.scaling_factor).to(dtype)
        noisy_latents = sigmas * torch.randn_like(latents) + (1 - sigmas) * latents
        with torch.autocast(device.type, torch.bfloat16 if device.type == "cpu" else dtype):
            pred = transformer(noisy_latents, prompt_embeds, pooled_prompt_embeds, 1000 * batch["sigma"]).sample
        loss = ((noisy_latents - sigmas * pred.float() - latents.float()) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def load_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """The frozen VAE, in fp32 as the reference has it."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    return vae.requires_grad_(False).to(device)


def seconds_of(step: Step, device: torch.device) -> float:
    """How long a step takes, until the GPU has done all of it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - started


def top_kernels(step: Step, count: int = 10) -> list[dict[str, object]]:
    """The kernels that take most of a step's time; on a CPU its operators."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        step()
    events = [event for event in profile.key_averages() if event.device_type == DeviceType.CUDA]
    seconds = {event.key: event.self_device_time_total for event in events}
    if not events:
        events = list(profile.key_averages())
        seconds = {event.key: event.self_cpu_time_total for event in events}
    whole = sum(seconds.values())
    events.sort(key=lambda event: -seconds[event.key])
    return [
        {
            "kernel": event.key,
            "calls": event.count,
            "ms": seconds[event.key] / 1e3,
            "share": seconds[event.key] / whole,
        }
        for event in events[:count]
    ]


def take_turns(steps: dict[str, Step], rounds: int, seconds: Callable[[Step], float]) -> dict[str, list[float]]:
    """The seconds of each step in each round, after one round that loads kernels."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    options = parse_args()
    sys.path.insert(0, str(options.scripts_dir))
    import train_dreambooth_sd3_lora_miniature as trainer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    required = [f"--pretrained_model_name_or_path={options.pipeline_dir}", "--instance_data_dir=d", "--data_df_path=e"]
    settings = ["--instance_prompt=p", f"--resolution={options.resolution}", f"--lora_layers={FOUR_LAYERS}"]
    args = trainer.parse_args([*required, *settings])
    # One set of frozen weights for both, since not every card has room for two.
    files = trainer.resolve_model(args, trainer.WEIGHTS, token=None)
    frozen = trainer.load_transformer(files, args, dtype).to(device)
    shared = {id(tensor): tensor for tensor in itertools.chain(frozen.parameters(), frozen.buffers())}
    beside = copy.deepcopy(frozen, shared)  # other modules, the same weights
    batch = random_batch(frozen.config, options.resolution, device)
    ours = our_step(frozen, batch, args, dtype)
    recomputed = "none"
    try:
        ours()
    except torch.OutOfMemoryError:
        trainer.recompute_blocks(frozen, len(frozen.transformer_blocks))
        recomputed = "all"
    reference = reference_step(beside, load_vae(options.pipeline_dir, device), batch, args, dtype)
    steps = {"ours": ours, "reference": reference}
    times = take_turns(steps, options.rounds, functools.partial(seconds_of, device=device))
    found = {"recomputed": recomputed} | {name: statistics.median(values) for name, values in times.items()}
    options.output_path.write_text(json.dumps(found))  # at once: profiling may fail
    options.output_path.write_text(json.dumps(found | {"kernels": top_kernels(ours)}))


if __name__ == "__main__":
    main()
