"""What a training step costs, counted without a GPU and without weights.

    python tests/tools/step_cost.py            # tables in Markdown, three minutes
    python tests/tools/step_cost.py --int8     # those about --quantize_base int8 alone

Models of the real sizes run on torch's meta device, where tensors have shapes but no contents, while a dispatch mode
adds up the FLOP, the bytes that operators read and write, and the storages that are alive. Attention takes the
memory-efficient kernel's path, as on a T4. CUDA's own half a gigabyte and the workspaces of its kernels come on top.
"""

import argparse
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import compute_embeddings as embed
import train_dreambooth_sd3_lora_miniature as trainer

COMMON = {"sample_size": 128, "patch_size": 2, "attention_head_dim": 64, "joint_attention_dim": 4096}
MEDIUM = COMMON | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
LARGE = COMMON | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
DUAL = {"pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))}
MODELS = {
    "sd3-medium": MEDIUM | {"pooled_projection_dim": 2048, "pos_embed_max_size": 192},
    "sd3.5-medium": MEDIUM | {"pooled_projection_dim": 2048, "qk_norm": "rms_norm"} | DUAL,
    "sd3.5-large": LARGE | {"pooled_projection_dim": 2048, "qk_norm": "rms_norm", "pos_embed_max_size": 192},
}
VAE = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAE |= {"use_quant_conv": False, "use_post_quant_conv": False, "norm_num_groups": 32, "force_upcast": True}
VAE |= {"scaling_factor": 1.5305, "shift_factor": 0.0609}
CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
CLIP_L.projection_dim = 768
CLIP_G = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
CLIP_G.projection_dim = 1280
T5_BLOCK = T5Config(d_model=4096, num_layers=1, num_heads=64, d_ff=10240, feed_forward_proj="gated-gelu")
T5_BLOCK._attn_implementation = "eager"  # the upper bound: SDPA, which newer versions take, needs less
T5_BLOCKS = 24
FOUR = "to_k,to_q,to_v,to_out.0"  # the reference's
EIGHT = trainer.Args.lora_layers  # the default, diffusers' own
LAYERS = {"four": FOUR, "eight": EIGHT, "all": f"{EIGHT},net.0.proj,net.2"}
LATER = {  # diffusers' eight in the later blocks of the 24 of a medium model
    "eight, last 18 blocks": "transformer_blocks.[6-9].attn.*,transformer_blocks.[12]?.attn.*",
    "eight, last 12 blocks": "transformer_blocks.1[2-9].attn.*,transformer_blocks.2?.attn.*",
}
TEXT_TOKENS = 154  # 77 of CLIP and 77 of T5
PROMPTS_AT_ONCE = embed.CHUNK_TOKENS // 77
NF4_BYTES = 0.5625  # a weight and its share of the scales


@dataclass(frozen=True)
class Card:
    """A GPU's peaks: dense products per second in fp16 (summed in fp32) and in int8, and its memory's bandwidth."""

    fp16_tflop: float
    int8_tflop: float
    gb: float


# T4: NVIDIA's data sheet. RTX 3090 and 4090: NVIDIA's papers on the architectures GA102 and Ada. RTX 3060: its 28
# multiprocessors at 1.777 GHz, each doing what one of the 3090's does in a cycle. See tests/README.md.
CARDS = {
    "T4": Card(65, 130, 320),
    "RTX 3060": Card(25.5, 102, 360),
    "RTX 3090": Card(71, 284, 936),
    "RTX 4090": Card(165, 661, 1008),
}
SHARE_OF_TFLOP, SHARE_OF_GB = 28 / 65, 250 / 320  # of the peaks, in practice: a T4's in fp16, assumed for all of them


@dataclass(frozen=True)
class StepCost:
    tflop: float  # a multiplication and an addition are two
    gb_moved: float  # read and written by all operators, in 10⁹ bytes
    peak_gib: float  # weights included
    nf4_saves_gib: float = 0.0  # by arithmetic: bitsandbytes' layers refuse the meta device
    int8_tflop: float = 0.0  # those of tflop that are products of 8-bit integers
    attention_tflop: float = 0.0  # those inside of attention, in fp16
    fused_gb_moved: float = 0.0  # if all that is done around 8-bit products is fused: see fused_bytes

    def seconds(self, card: Card, fused: bool = False) -> float:
        """How long a card takes, by addition."""
        fp16 = (self.tflop - self.int8_tflop) / card.fp16_tflop
        moved = self.fused_gb_moved if fused else self.gb_moved
        return (fp16 + self.int8_tflop / card.int8_tflop) / SHARE_OF_TFLOP + moved / card.gb / SHARE_OF_GB


class CostCounter(TorchDispatchMode):
    """Adds up FLOP and bytes moved by operators, and the bytes of the storages that nobody has dropped yet."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.flop = self.moved = self.live = self.peak = 0
        self.int8_flop = self.attention_flop = self.saved_by_fusing = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.moved += bytes_moved(function, tensors_in((args, kwargs)), tensors_in(result))
        operator = function.overloadpacket
        if operator is torch.ops.aten._int_mm:  # the registry does not know it
            flop = 2 * math.prod(args[0].shape) * args[1].shape[1]
            self.flop += flop
            self.int8_flop += flop
        elif operator in flop_registry:
            flop = flop_registry[operator](*args, **kwargs, out_val=result)
            self.flop += flop
            if "attention" in function.name():
                self.attention_flop += flop
        for tensor in tensors_in(result):
            self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def cost(self) -> StepCost:
        return StepCost(
            self.flop / 1e12,
            self.moved / 1e9,
            self.peak / 2**30,
            int8_tflop=self.int8_flop / 1e12,
            attention_tflop=self.attention_flop / 1e12,
            fused_gb_moved=(self.moved - self.saved_by_fusing) / 1e9,
        )


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_moved(function: torch._ops.OpOverload, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """What an operator reads and writes; nothing if it only makes a view or an empty tensor."""
    known = {tensor.untyped_storage()._cdata for tensor in inputs}
    makes_views = known.issuperset(tensor.untyped_storage()._cdata for tensor in outputs)
    if "empty" in function.name() or (makes_views and not function._schema.is_mutable):
        return 0
    # an expanded tensor is read from a storage that is smaller than itself
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in [*inputs, *outputs])


def fused_bytes(rows: Tensor, result: Tensor) -> int:
    """What an 8-bit product with a weight moves if one kernel rounds the rows, and one scales the sums.

    Rows are read and written as bytes, rows and weight multiplied to 32-bit sums, the sums made the result.
    """
    rounding = rows.nbytes + rows.numel()
    product = rows.numel() + rows.shape[-1] * result.shape[-1] + 4 * result.numel()
    return rounding + product + 4 * result.numel() + result.nbytes


@contextmanager
def fusing(counter: CostCounter) -> Iterator[None]:
    """Let the counter note what would not be moved if all around 8-bit products were fused."""
    forward, backward = trainer.Int8Linear.forward, trainer.Int8Product.backward

    def forward_and_note(layer: trainer.Int8Linear, x: Tensor) -> Tensor:
        before = counter.moved
        result = forward(layer, x)
        counter.saved_by_fusing += counter.moved - before - fused_bytes(x, result)
        return result

    def backward_and_note(ctx: object, grad: Tensor) -> tuple:
        before = counter.moved
        found = backward(ctx, grad)
        turned = 2 * grad.shape[-1] * found[0].shape[-1]  # the weight, read and written the other way around
        counter.saved_by_fusing += counter.moved - before - fused_bytes(grad, found[0]) - turned
        return found

    layer = patch.object(trainer.Int8Linear, "forward", forward_and_note)
    with layer, patch.object(trainer.Int8Product, "backward", staticmethod(backward_and_note)):
        yield


def efficient_attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """SDPA by the kernel that never holds the attention matrix; (B, heads, L, head_dim)."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]


def plain_adamw(parameters: list[nn.Parameter], fused: bool = True, **kwargs: object) -> Optimizer:
    """AdamW a tensor at a time: the fused one, which needs no more memory, refuses meta."""
    return AdamW(parameters, foreach=False, **kwargs)


@contextmanager
def counting() -> Iterator[CostCounter]:
    """Count what happens on the meta device, with a GPU's attention."""
    attention = patch.object(F, "scaled_dot_product_attention", efficient_attention)
    with attention, patch.object(torch.optim, "AdamW", plain_adamw), CostCounter() as counter, fusing(counter):
        yield counter


def on_meta(make: Callable[[], nn.Module], dtype: torch.dtype, counter: CostCounter) -> nn.Module:
    """A frozen model without contents, which appears in its dtype at once, as from_pretrained makes it."""
    with _disable_current_modes(), torch.device("meta"):
        model = make().to(dtype).requires_grad_(False)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        counter.note(tensor.untyped_storage())
    return model


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def emulated_autocast() -> Iterator[None]:
    """What CUDA's autocast in fp16 does to the operators of SD3, for a device that has no autocast.

    Linear layers, convolutions and attention cast what they are given to fp16, LayerNorm casts it to fp32, and the
    others follow their inputs. Functions are replaced because checkpointing recomputes outside of function modes.
    """

    def casting(name: str, dtype: torch.dtype) -> Callable:
        function = getattr(F, name)

        def cast(leaf: object) -> object:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return lambda *args, **kwargs: function(*tree_map(cast, args), **tree_map(cast, kwargs))

    dtypes = dict.fromkeys(["linear", "conv2d", "scaled_dot_product_attention"], torch.float16)
    dtypes["layer_norm"] = torch.float32
    with patch.multiple(F, **{name: casting(name, dtype) for name, dtype in dtypes.items()}):
        yield


def prepare_trainer(
    model: str, resolution: int, layers: str, checkpointing: bool, int8: bool, counter: CostCounter
) -> tuple[SD3Transformer2DModel, Optimizer, Callable[[], Tensor]]:
    """All that is asked of the trainer: its transformer, its optimizer, and its loss of a micro-batch of one image."""

    def from_pretrained(*_: object, dtype: torch.dtype = torch.float32, **__: object) -> tuple[nn.Module, dict]:
        nothing_differs = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return on_meta(partial(SD3Transformer2DModel, **MODELS[model]), dtype, counter), nothing_differs

    required = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e"]
    targets = (LAYERS | LATER)[layers]
    flags = ["--instance_prompt=p", "--seed=0", f"--resolution={resolution}", f"--lora_layers={targets}"]
    if int8:
        flags.append("--quantize_base=int8")
    args = trainer.parse_args([*required, *flags, "--rank=4", "--optimizer=adamw", "--train_batch_size=1"])
    with patch.object(SD3Transformer2DModel, "from_pretrained", from_pretrained):
        files = trainer.LocalModel("m", Path("m"), commit=None, variant=None)
        with _disable_current_modes():  # 8-bit weights are made on the CPU, a layer at a time
            transformer = trainer.load_transformer(files, args, torch.float16).train()
    for tensor in itertools.chain(transformer.parameters(), transformer.buffers()):
        counter.note(tensor.untyped_storage())
    counter.peak = counter.live
    with torch.device("meta"):
        trainer.add_lora(transformer, args, seed=0)
    trainer.recompute_blocks(transformer, len(transformer.transformer_blocks) if checkpointing else 0)
    optimizer = trainer.make_optimizer([each for each in transformer.parameters() if each.requires_grad], args, 1)
    latents_shape = (1, 16, resolution // 8, resolution // 8)
    batch = {name: empty(*latents_shape) for name in ("latents", "noise")}
    batch |= {"mask": empty(1, 1, *latents_shape[2:]), "sigma": empty(1), "loss_weight": empty(1)}
    config = transformer.config
    batch["prompt_embeds"] = empty(1, TEXT_TOKENS, config.joint_attention_dim, dtype=torch.float16)
    batch["pooled_prompt_embeds"] = empty(1, config.pooled_projection_dim, dtype=torch.float16)
    return transformer, optimizer, lambda: trainer.training_loss(transformer, batch, torch.float16, args)


def cost_of_step(
    counter: CostCounter, transformer: nn.Module, optimizer: Optimizer, micro_step: Callable[[], None]
) -> StepCost:
    """FLOP and bytes of one forward and backward pass, and the peak from loading to the optimizer's second step."""
    for parameter in transformer.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # makes its states
    optimizer.zero_grad()
    counter.flop = counter.int8_flop = counter.attention_flop = counter.moved = counter.saved_by_fusing = 0
    micro_step()
    cost = counter.cost()
    optimizer.step()
    linear = [module.weight for module in transformer.modules() if isinstance(module, nn.Linear)]
    saved = sum(weight.numel() * (2 - NF4_BYTES) for weight in linear if not weight.requires_grad)
    return replace(cost, peak_gib=counter.peak / 2**30, nf4_saves_gib=saved / 2**30)


def count_step(
    model: str, resolution: int, layers: str = "four", checkpointing: bool = False, int8: bool = False
) -> StepCost:
    """The trainer's step at batch 1, rank 4, in fp16; `layers` is one of LAYERS or LATER; int8: an 8-bit base."""
    with counting() as counter:
        transformer, optimizer, loss = prepare_trainer(model, resolution, layers, checkpointing, int8, counter)
        return cost_of_step(counter, transformer, optimizer, lambda: loss().backward())


def count_peft_step(model: str, resolution: int, layers: str, checkpointing: bool, encode: bool) -> StepCost:
    """The same as diffusers' scripts do it: PEFT's LoRA under autocast; encode: the VAE, in fp32, in each step."""
    with counting() as counter:
        vae = on_meta(partial(AutoencoderKL, **VAE), torch.float32, counter) if encode else None
        transformer = on_meta(partial(SD3Transformer2DModel, **MODELS[model]), torch.float16, counter).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS[layers].split(",")))
        cast_training_params(transformer, dtype=torch.float32)
        optimizer = plain_adamw([each for each in transformer.parameters() if each.requires_grad])
        config = transformer.config
        prompt_embeds = empty(1, TEXT_TOKENS, config.joint_attention_dim, dtype=torch.float16)
        pooled_prompt_embeds = empty(1, config.pooled_projection_dim, dtype=torch.float16)
        sigmas = empty(1, 1, 1, 1, dtype=torch.float16)
        cached_latents = empty(1, 16, resolution // 8, resolution // 8)

        def micro_step() -> None:
            latents = cached_latents
            if vae is not None:
                latents = vae.encode(empty(1, 3, resolution, resolution)).latent_dist.sample()  # (1, 16, H/8, W/8)
            latents = (latents * VAE["scaling_factor"]).half()
            noisy_latents = sigmas * torch.randn_like(latents) + (1 - sigmas) * latents
            with emulated_autocast():
                pred = transformer(noisy_latents, prompt_embeds, pooled_prompt_embeds, empty(1)).sample.float()
                loss = ((noisy_latents - sigmas * pred - latents.float()) ** 2).mean()
                loss.backward()  # what it recomputes is under autocast too

        return cost_of_step(counter, transformer, optimizer, micro_step)


def count_reference_step(model: str, resolution: int) -> StepCost:
    """The same by the reference's rules: four layers, all blocks recomputed, and the VAE in every step."""
    return count_peft_step(model, resolution, "four", checkpointing=True, encode=True)


def count_diffusers_step(model: str, resolution: int, checkpointing: bool) -> StepCost:
    """The same by train_dreambooth_lora_sd3.py of diffusers at c56add8081 (July 2026), with --cache_latents."""
    return count_peft_step(model, resolution, "eight", checkpointing, encode=False)


@torch.no_grad()
def count_vae(resolution: int, decode: bool) -> StepCost:
    """Latents to one image in fp16 by the whole VAE, or an image to latents in fp32 by one without its decoder."""
    with counting() as counter:
        vae = on_meta(partial(AutoencoderKL, **VAE), torch.float16 if decode else torch.float32, counter)
        if decode:
            vae.decode(empty(1, 16, resolution // 8, resolution // 8, dtype=torch.float16))
        else:
            del vae.decoder
            vae.encode(empty(1, 3, resolution, resolution))
    return counter.cost()


@torch.no_grad()
def clip_gib(prompts: int = PROMPTS_AT_ONCE) -> float:
    """Peak of CLIP-L and CLIP-G, both resident in fp16 and with their outputs kept, for so many prompts at once."""
    with counting() as counter:
        make = [partial(CLIPTextModelWithProjection, config) for config in (CLIP_L, CLIP_G)]
        encoders = [on_meta(each, torch.float16, counter) for each in make]
        input_ids = empty(prompts, 77, dtype=torch.int64)
        _outputs = [encoder(input_ids, output_hidden_states=True) for encoder in encoders]
    return counter.cost().peak_gib


@torch.no_grad()
def streamed_t5_gib(tokens: int = 77, prompts: int = PROMPTS_AT_ONCE) -> float:
    """Peak of `--t5_precision exact`: fp32, with the token embedding and one block at a time resident."""
    with counting() as counter:
        t5 = on_meta(partial(T5EncoderModel, T5_BLOCK), torch.float32, counter)
        t5(empty(prompts, tokens, dtype=torch.int64))
    return counter.cost().peak_gib


def int8_t5_gib() -> float:
    """Weights of T5 in 8 bit, by arithmetic: a byte in linear layers, but `wo` stays in fp32, the rest in fp16."""
    t5 = on_meta(partial(T5EncoderModel, T5_BLOCK), torch.float16, CostCounter())
    linear = {name: module for name, module in t5.named_modules() if isinstance(module, nn.Linear)}
    block = sum(layer.weight.numel() * (4 if name.endswith("wo") else 1) for name, layer in linear.items())
    return (t5.shared.weight.nbytes + T5_BLOCKS * block) / 2**30


def print_row(*cells: object) -> None:
    print("|", " | ".join(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells), "|", flush=True)


def print_steps() -> None:
    print_row("model", "resolution", "LoRA layers", "recomputed", "TFLOP", "GB moved", "peak GiB", "with an nf4 base")
    print("|---" * 8 + "|")
    for model, resolution in itertools.product(MODELS, (512, 1024)):
        reference = count_reference_step(model, resolution)
        cells = reference.tflop, round(reference.gb_moved), reference.peak_gib, ""
        print_row(model, f"{resolution}²", "the reference's step", "all blocks", *cells)
        for layers, checkpointing in itertools.product(LAYERS, (False, True)):
            cost = count_step(model, resolution, layers, checkpointing)
            cells = cost.tflop, round(cost.gb_moved), cost.peak_gib, cost.peak_gib - cost.nf4_saves_gib
            print_row(model, f"{resolution}²", layers, "all blocks" if checkpointing else "none", *cells)
    print_compared_steps("sd3-medium", 1024)


def print_compared_steps(model: str, resolution: int) -> None:
    """Diffusers' maintained script, and a LoRA in the later blocks alone."""
    for checkpointing in (False, True):
        recomputed = "all blocks" if checkpointing else "none"
        for layers in LATER:
            cost = count_step(model, resolution, layers, checkpointing)
            cells = cost.tflop, round(cost.gb_moved), cost.peak_gib, cost.peak_gib - cost.nf4_saves_gib
            print_row(model, f"{resolution}²", layers, recomputed, *cells)
        cost = count_diffusers_step(model, resolution, checkpointing)
        cells = cost.tflop, round(cost.gb_moved), cost.peak_gib, ""
        print_row(model, f"{resolution}²", "the step of diffusers' maintained script", recomputed, *cells)


def print_int8() -> None:
    """What --quantize_base int8 changes, and how long cards take by addition."""
    titles = ["TFLOP in 8 bits", "in fp16", "in attention", "GB moved", "around 8-bit products fused", "peak GiB"]
    print_row("model", "resolution", "base", "recomputed", *titles, *(f"{name}, s" for name in CARDS))
    print("|---" * (4 + len(titles) + len(CARDS)) + "|")
    for model, checkpointing in itertools.product(MODELS, (False, True)):
        for int8 in (False, True):
            cost = count_step(model, 1024, "eight", checkpointing, int8)
            cells = [cost.int8_tflop, cost.tflop - cost.int8_tflop - cost.attention_tflop, cost.attention_tflop]
            cells += [round(cost.gb_moved), round(cost.fused_gb_moved), cost.peak_gib]
            seconds = []
            for card in CARDS.values():
                unfused, fused = cost.seconds(card), cost.seconds(card, fused=True)
                seconds.append(f"{unfused:.2f}, {fused:.2f}" if int8 else f"{unfused:.2f}")
            recomputed = "all blocks" if checkpointing else "none"
            print_row(model, "1024²", "int8" if int8 else "fp16", recomputed, *cells, *seconds)


def print_the_rest() -> None:
    print_row("besides", "TFLOP", "GB moved", "peak GiB")
    print("|---" * 4 + "|")
    for resolution in (512, 1024):
        for decode, what in enumerate(["encode one image, fp32", "decode one image, fp16"]):
            cost = count_vae(resolution, bool(decode))
            print_row(f"{what}, {resolution}²", cost.tflop, round(cost.gb_moved), cost.peak_gib)
    print_row(f"CLIP-L and CLIP-G, fp16, {PROMPTS_AT_ONCE} prompts at once", "", "", clip_gib())
    print_row("T5, int8, its weights", "", "", int8_t5_gib())
    for tokens in (77, 512):
        prompts = embed.CHUNK_TOKENS // tokens
        what = f"T5, fp32, a block at a time, {prompts} prompts of {tokens} tokens at once"
        print_row(what, "", "", streamed_t5_gib(tokens, prompts))


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--int8", action="store_true", help="only what an 8-bit base changes")
    if not parser.parse_args().int8:
        print_steps()
        print()
        print_the_rest()
        print()
    print_int8()
