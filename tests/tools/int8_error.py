"""How far 8-bit products lead away: blocks at SD3-medium's width, random weights, fp32 beside --quantize_base int8.

    python tests/tools/int8_error.py                                # the first blocks at 512 x 512, minutes on a core
    python tests/tools/int8_error.py --layers 24 --resolution 256   # all of them; 10 GB of RAM

Prints a Markdown table: relative L2 errors of what the first and the last block add to the image's tokens and of the
gradients of a LoRA of rank 4 in diffusers' eight layers, and the cosine between both gradients. Real models have
channels that are much larger than the others, which random weights have not, so it is repeated with eight channels of
the image's tokens 30 times as large. Products of integers are made of fp64 numbers here, which gives the same sums,
since an old CPU is slow at them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import quantized_on_cpu
import step_cost
import train_dreambooth_sd3_lora_miniature as trainer


def draw_model(layers: int, quantized: bool) -> SD3Transformer2DModel:
    """SD3-medium with so many blocks, the same in each call, and with a LoRA of which no gradient is zero."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**step_cost.MODELS["sd3-medium"] | {"num_layers": layers})
    if quantized:
        trainer.quantize_linear_layers(transformer)
    transformer.requires_grad_(False)
    required = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e"]
    trainer.add_lora(transformer, trainer.parse_args([*required, "--instance_prompt=p"]), seed=0)
    for parameter in trainer.trainable_parameters(transformer):
        parameter.data = torch.randn_like(parameter) / 100
    return transformer


def answers_and_gradients(transformer: SD3Transformer2DModel, resolution: int, outliers: float) -> list[list[Tensor]]:
    """What each block adds to the image's tokens, and the gradients of the LoRA's parameters."""
    generator = torch.Generator().manual_seed(1)
    side = resolution // 8
    latents = torch.randn(1, 16, side, side, generator=generator)
    noise = torch.randn(1, 16, side, side, generator=generator)
    text = torch.randn(1, step_cost.TEXT_TOKENS, 4096, generator=generator)
    pooled = torch.randn(1, 2048, generator=generator)
    answers: list[Tensor] = []

    def enlarge(module: object, inputs: object, tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        tokens[..., :8] *= outliers
        return tokens

    def keep(module: object, inputs: object, named: dict[str, Tensor], found: tuple[Tensor, Tensor]) -> None:
        answers.append(found[1].detach() - named["hidden_states"].detach())

    hooks = [transformer.pos_embed.register_forward_hook(enlarge)]
    for block in transformer.transformer_blocks:
        hooks.append(block.register_forward_hook(keep, with_kwargs=True))
    velocity = transformer(latents, text, pooled, torch.tensor([500.0])).sample
    (velocity - noise).square().mean().backward()
    parameters = trainer.trainable_parameters(transformer)
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    for hook in hooks:
        hook.remove()
    return [answers, gradients]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=512)
    args = parser.parse_args()
    quantized_on_cpu.multiply_in_floats()
    strengths = (1.0, 30.0)
    transformer = draw_model(args.layers, quantized=False)
    exact = [answers_and_gradients(transformer, args.resolution, outliers) for outliers in strengths]
    del transformer
    transformer = draw_model(args.layers, quantized=True)
    step_cost.print_row("channels", "first block", "last block", "gradients", "worst gradient", "cosine")
    print("|---" * 6 + "|")
    for outliers, (answers, gradients) in zip(strengths, exact, strict=True):
        rounded, rounded_gradients = answers_and_gradients(transformer, args.resolution, outliers)
        errors = [relative_error(*pair) for pair in zip(rounded, answers, strict=True)]
        worst = max(relative_error(*pair) for pair in zip(rounded_gradients, gradients, strict=True))
        whole, whole_exact = flat(rounded_gradients), flat(gradients)
        cells = [errors[0], errors[-1], relative_error(whole, whole_exact), worst]
        cosine = torch.cosine_similarity(whole, whole_exact, dim=0).item()
        name = "alike" if outliers == 1 else f"8 channels {outliers:g} times as large"
        step_cost.print_row(name, *(f"{value:.2%}" for value in cells), f"{cosine:.5f}")


if __name__ == "__main__":
    main()
