"""Stable Diffusion 3 in its real shapes with random fp16 weights, written straight to disk: 16 GB in under a minute.

No weights need to be downloaded, and none are ever held in RAM: a block of 8 MB of random numbers is written over and
over, scaled for each layer as PyTorch would initialize it. Speed and memory do not depend on what the weights are.
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import tiny_pipeline

BLOCK_LENGTH = 4_194_301  # a prime, so that no row of a matrix repeats another
SHARD_BYTES = 5_000_000_000  # as in the files of the real models
TINY_KINDS = {"tiny": "sd3", "tiny35": "sd35"}


@dataclass(frozen=True)
class Weights:
    """One tensor of a file, and the block of numbers that it repeats."""

    name: str
    shape: tuple[int, ...]
    block: Tensor

    @property
    def nbytes(self) -> int:
        return 2 * torch.Size(self.shape).numel()


def clip(width: int, layers: int, heads: int, activation: str) -> CLIPTextModelWithProjection:
    """CLIP-L or CLIP-G; the tokens at the ends are those of the tiny tokenizers, which are written beside it."""
    tokenizer = tiny_pipeline.clip_tokenizer("!")
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        pad_token_id=0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModelWithProjection(config)


def t5_xxl() -> T5EncoderModel:
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def part_builders(model: str) -> dict[str, Callable[[], nn.Module]]:
    """How to build each part of a model: of one of step_cost.MODELS in its real shapes, or of a tiny pipeline."""
    if model in TINY_KINDS:
        components = tiny_pipeline.build(TINY_KINDS[model]).components
        modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        return {name: functools.partial(modules.get, name) for name in modules}
    from step_cost import MODELS, VAE  # it imports both scripts, which takes seconds

    return {
        "text_encoder": lambda: clip(768, 12, 12, "quick_gelu"),
        "text_encoder_2": lambda: clip(1280, 32, 20, "gelu"),
        "text_encoder_3": t5_xxl,
        "vae": lambda: AutoencoderKL(**VAE),
        "transformer": lambda: SD3Transformer2DModel(**MODELS[model]),
    }


def write_pipeline(folder: Path, model: str, only: tuple[str, ...] = ()) -> Path:
    """Write a pipeline in diffusers' layout, or `only` some of its parts, and return its folder."""
    pipeline = tiny_pipeline.build()
    for name in ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"):
        getattr(pipeline, name).save_pretrained(folder / name)
    for name, build in part_builders(model).items():
        if only and name not in only:
            continue
        print(f"writing {folder / name}", flush=True)
        with torch.device("meta"):
            part = build()
        write_part(folder / name, part)
    pipeline.register_to_config(_name_or_path=None)
    (folder / "model_index.json").write_text(pipeline.to_json_string())  # last: it says that all is there
    return folder


def write_part(folder: Path, part: nn.Module) -> None:
    """Write a model's configuration and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(part, (AutoencoderKL, SD3Transformer2DModel)):
        part.save_config(folder)
        stem = "diffusion_pytorch_model"
    else:
        part.config.save_pretrained(folder)
        stem = "model"
    shards = divide(list(random_weights(part)))
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", shards[0])
        return
    file_of_weights = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard)
        file_of_weights |= {weights.name: file for weights in shard}
    total = sum(weights.nbytes for shard in shards for weights in shard)
    index = {"metadata": {"total_size": total}, "weight_map": file_of_weights}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def random_weights(part: nn.Module) -> Iterator[Weights]:
    """Every parameter, and the position table, which is zero; what two modules share comes once."""
    persistent = part.state_dict().keys()
    for prefix, module in part.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield Weights(name, tuple(parameter.shape), block_for(module, name, parameter))
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name in persistent:
                yield Weights(name, tuple(buffer.shape), constant(0.0))


def block_for(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """Random numbers as large as PyTorch begins with; ones for the weights of norms, zeros for biases."""
    if parameter.dim() == 1:
        return constant(float(name.endswith("weight")))
    variance = 1.0 if isinstance(module, nn.Embedding) else 1 / (3 * parameter[0].numel())
    return uniform((3 * variance) ** 0.5)


@functools.cache
def constant(value: float) -> Tensor:
    return torch.full((BLOCK_LENGTH,), value, dtype=torch.float16)


@functools.cache
def uniform(bound: float) -> Tensor:
    """The same random numbers for every bound, between -bound and bound; models have a dozen bounds."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(BLOCK_LENGTH).uniform_(-bound, bound, generator=generator).half()


def divide(weights: list[Weights]) -> list[list[Weights]]:
    """The tensors in their order, in files of at most SHARD_BYTES."""
    shards: list[list[Weights]] = [[]]
    size = 0
    for each in weights:
        if size + each.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.nbytes
    return shards


def write_safetensors(path: Path, weights: list[Weights]) -> None:
    """Write the format by hand (the length of a JSON header, the header, the bytes): the library wants all in RAM."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in weights:
        header[each.name] = {"dtype": "F16", "shape": each.shape, "data_offsets": [end, end + each.nbytes]}
        end += each.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, each in enumerate(weights):
            write_repeated(file, each, first=number * 7919 % BLOCK_LENGTH)


def write_repeated(file: BinaryIO, weights: Weights, first: int) -> None:
    """Write a tensor's block, from its number `first` on, as often as it takes."""
    block = memoryview(weights.block.numpy()).cast("B")
    left = weights.nbytes
    for start in itertools.chain([2 * first], itertools.repeat(0)):
        if left == 0:
            break
        left -= file.write(block[start : start + left])
