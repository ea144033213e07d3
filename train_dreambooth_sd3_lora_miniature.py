"""Train a DreamBooth LoRA of Stable Diffusion 3 on a few images, from embeddings that compute_embeddings.py wrote.

    accelerate launch --quiet train_dreambooth_sd3_lora_miniature.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --instance_data_dir dog --data_df_path sample_embeddings.parquet --instance_prompt "a photo of sks dog" \
        --mixed_precision fp16 --resolution 1024 --train_batch_size 1 --gradient_accumulation_steps 4 \
        --use_8bit_adam --max_train_steps 500 --seed 0

Counted for SD3-medium at 1024 x 1024: 7.2 GiB of VRAM, 4.4 with --gradient_checkpointing (tests/step_cost.py).
No text encoder is ever loaded. Everything random about a training sample is a function of the seed and the sample's
number, so a resumed run continues exactly and any number of processes sees the same samples.
"The reference" is diffusers' examples/research_projects/sd3_lora_colab, whose command line still runs.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import diffusers  # it loads its parts on first use, so that a wrong command line is answered soon
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import AutocastKwargs, broadcast_object_list, gather_object, send_to_device, tqdm
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelCardData
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

T = TypeVar("T")
STARTED = time.monotonic()
FORMATS = ["BMP", "JPEG", "PNG", "TIFF", "WEBP"]  # no others are tried: Pillow would start Ghostscript for one
with suppress(ImportError):  # for the photos of phones
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")
# What Pillow raises for a file that is no image, or a broken one.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, Image.DecompressionBombError)
CROPS_PER_IMAGE = 4  # random cropping chooses among this many places, since latents are encoded ahead
LORA_NAME, STATE_NAME = "pytorch_lora_weights.safetensors", "training_state.pt"
CARD_MARK = "<!-- written by train_dreambooth_sd3_lora_miniature.py -->"
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
END_SIGNALS = signal.valid_signals() & {1, 2, 15}  # SIGHUP, which Windows has not, SIGINT and SIGTERM
STOPPED = (
    "Stopped after step {}; a checkpoint is saved. To go on: the same command with --resume_from_checkpoint latest"
)
MAX_SKIPPED_STEPS = 20  # fp16's loss scale starts too high and needs a few
NOT_FINITE = (
    f"The gradients of {MAX_SKIPPED_STEPS} steps in a row were not finite; none was applied. Usual causes: a learning "
    "rate that is too high, fp16 where the model needs bf16, embeddings of another model. The checkpoints are good. "
    "Start again with a lower --learning_rate or another --mixed_precision."
)
LIMITS = {  # of flags that are numbers, both ends included; others: integers from 1 to 10 million, reals above 0
    (0, 10_000_000): "lr_warmup_steps dataloader_num_workers precondition_outputs adam_weight_decay "
    "prior_loss_weight guidance_scale",
    (0, 0.999999): "caption_dropout lora_dropout adam_beta1 adam_beta2",
    (0, 2**63 - 1): "seed",
    (1, 4096): "rank",
    (-100, 100): "logit_mean",
    (-1, 1.75): "mode_scale",
}
# On resume these may have other values in silence; every other flag that differs is named in a note and followed,
MAY_CHANGE = set(
    "pretrained_model_name_or_path pretrained_lora_path cache_dir output_dir instance_data_dir data_df_path dry_run "
    "max_sequence_length dataloader_num_workers class_data_dir sample_batch_size train_batch_size report_to "
    "gradient_accumulation_steps gradient_checkpointing prior_generation_precision local_rank logging_dir "
    "validation_prompt negative_prompt num_validation_images validation_epochs validation_steps num_inference_steps "
    "guidance_scale checkpointing_steps checkpoints_total_limit resume_from_checkpoint push_to_hub hub_private_repo "
    "hub_model_id hub_token".split()
)
# but these are refused: with them the optimizer's state or the order of the samples would mean something else.
MUST_NOT_CHANGE = set(
    "seed, variant, rank, lora_alpha, lora_layers, optimizer, use_8bit_adam, resolution, aspect_ratio_buckets, "
    "center_crop, random_flip, alpha_mask, with_prior_preservation, num_class_images, images and captions, "
    "embeddings, base model, samples per step, samples per micro-batch".split(", ")
)


class Tolerant:
    """A stream whose reader, a pipe or a terminal, may go away: that costs the output, not the LoRA."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 - None: it was closed from the start

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(text)
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        """Nothing is left to be flushed."""


# ---------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse that reads flags from @FILE, a flag and its value a line, and repeats no token in its messages."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"hf_\w+", "hf_...", message))


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The reference's flags keep their names and meaning; the others are named as in diffusers' training scripts."""
    # fmt: off
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False, fromfile_prefix_chars="@",
                    epilog="Flags may stand in a file, one with its value a line: @FILE.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def flag(name: str, default: object, help_text: str, **kwargs: Any) -> None:
        """A flag whose default also gives its type; where there is no default, the type stands in its place."""
        if default is False:
            kwargs["action"] = "store_true"
        elif callable(default):
            kwargs = {"type": default} | kwargs
        else:
            kwargs = {"type": type(default), "default": default} | kwargs
        group.add_argument(name, help=help_text, **kwargs)

    group = parser.add_argument_group("model")
    flag("--pretrained_model_name_or_path", str, "SD3 or SD3.5: Hub repository, or diffusers' folder", required=True)
    flag("--revision", str, "branch, tag or commit of the repository; unset: its main branch")
    flag("--variant", str, "variant of the weight files, such as fp16; unset: the plain files")
    flag("--cache_dir", str, "where downloads are kept; unset: the Hugging Face cache")
    group = parser.add_argument_group("data")
    flag("--instance_data_dir", Path, "folder with the images of the subject", required=True)
    flag("--data_df_path", Path, "Parquet file that compute_embeddings.py wrote", required=True)
    flag("--instance_prompt", str, "prompt of the images, such as 'a photo of sks dog'", required=True)
    flag("--resolution", 512, "training resolution: side of a square in pixels, a multiple of 16")
    flag("--aspect_ratio_buckets", str, "shapes to train on instead of the square; no value: common ones of its area",
         nargs="?", const="auto", metavar="H,W;H,W")
    flag("--center_crop", False, "crop the middle of an image instead of a random part")
    flag("--random_flip", False, "mirror images at random")
    flag("--caption_dropout", 0.0, "probability of training a sample with the empty prompt")
    flag("--alpha_mask", False, "weight the loss by alpha channels or NAME.mask.png: backgrounds are not learned")
    flag("--max_sequence_length", int, "T5 tokens that the embeddings must have; unset: what they have")
    flag("--dataloader_num_workers", 0, "worker processes; 0: read in the main process")
    group = parser.add_argument_group("prior preservation")
    flag("--with_prior_preservation", False, "make every second sample an image of the class, which stays as it is")
    flag("--class_prompt", str, "prompt of the class, such as 'a photo of a dog'")
    flag("--class_data_dir", Path, "folder of class images; unset: one under --output_dir")
    flag("--num_class_images", 100, "class images; those that are missing are generated")
    flag("--sample_batch_size", 4, "class images to generate at once")
    flag("--prior_loss_weight", 1.0, "weight of a class image in the loss; half of the samples are of the class, "
         "where diffusers' scripts add a second half to each batch")
    group = parser.add_argument_group("LoRA")
    flag("--pretrained_lora_path", str, "LoRA to start from, a file, folder or repository; unset: a new one")
    flag("--rank", 4, "rank of the update matrices")
    flag("--lora_alpha", float, "LoRA scale times rank: updates are scaled by alpha / rank; unset: the rank")
    flag("--lora_dropout", 0.0, "dropout probability of the LoRA's input; above 0 a step is slower")
    flag("--lora_layers", "to_k,to_q,to_v,to_out.0,add_k_proj,add_q_proj,add_v_proj,to_add_out",
         "linear layers to train, by the ends of their names, or patterns such as transformer_blocks.12.attn.*")
    group = parser.add_argument_group("training")
    flag("--output_dir", Path("sd3-dreambooth-lora"), "folder for everything that is written")
    flag("--dry_run", False, "check all that takes seconds, say what would be done, and stop")
    flag("--seed", int, "makes the run repeatable; unset: one is drawn and printed")
    flag("--train_batch_size", 4, "images per device and forward pass")
    flag("--gradient_accumulation_steps", 1, "forward passes per optimizer step")
    flag("--num_train_epochs", 1, "epochs over the images, unless --max_train_steps is given")
    flag("--max_train_steps", int, "optimizer steps; unset: from --num_train_epochs")
    flag("--learning_rate", 1e-4, "peak learning rate")
    flag("--scale_lr", False, "multiply the learning rate by the images per optimizer step")
    flag("--lr_scheduler", "constant", "learning rate schedule",
         choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
    flag("--lr_warmup_steps", 500, "optimizer steps of warm-up, where the schedule has one")
    flag("--lr_num_cycles", 1, "restarts of cosine_with_restarts")
    flag("--lr_power", 1.0, "power of polynomial")
    flag("--weighting_scheme", "logit_normal", "which noise levels count how much",
         choices=["logit_normal", "sigma_sqrt", "mode", "cosmap", "none"])
    flag("--logit_mean", 0.0, "mean of logit_normal; below 0: more of the high noise levels")
    flag("--logit_std", 1.0, "standard deviation of logit_normal")
    flag("--mode_scale", 1.29, "scale of mode")
    flag("--precondition_outputs", 0, "1: the reference's loss on the clean latents, sigma² times the velocity loss",
         nargs="?", const=1, choices=[0, 1])
    flag("--optimizer", "adamw", "8-bit states are bitsandbytes'; paged ones move to RAM when the GPU is full",
         type=str.lower, choices=["adamw", "adamw_8bit", "paged_adamw_8bit"])
    flag("--use_8bit_adam", False, "the same as --optimizer adamw_8bit")
    flag("--adam_beta1", 0.9, "decay of the first moment")
    flag("--adam_beta2", 0.999, "decay of the second moment")
    flag("--adam_weight_decay", 1e-4, "weight decay")
    flag("--adam_epsilon", 1e-8, "epsilon")
    flag("--max_grad_norm", 1.0, "gradients are clipped to this norm")
    group = parser.add_argument_group("memory and speed")
    flag("--mixed_precision", str, "precision; unset: what accelerate is set to", choices=WEIGHT_DTYPES)
    flag("--quantize_base", str, "4 bit for the frozen weights; needs a GPU", choices=["nf4"])
    flag("--gradient_checkpointing", False, "recompute the activations of all blocks; unset: of as few as must be")
    flag("--allow_tf32", False, "TF32 matrix products on Ampere GPUs and later")
    flag("--prior_generation_precision", str, argparse.SUPPRESS)
    flag("--local_rank", str, argparse.SUPPRESS)
    group = parser.add_argument_group("previews")
    flag("--validation_prompt", (), "prompts of previews", nargs="+", type=str, metavar="PROMPT")
    flag("--negative_prompt", "", "negative prompt of the previews")
    flag("--num_validation_images", 4, "images per prompt")
    flag("--validation_epochs", 50, "preview after every so many epochs")
    flag("--validation_steps", int, "preview after every so many optimizer steps instead")
    flag("--num_inference_steps", 28, "denoising steps of a preview or class image")
    flag("--guidance_scale", 7.0, "classifier-free guidance of a preview or class image")
    group = parser.add_argument_group("checkpoints and logs")
    flag("--checkpointing_steps", 100, "save a checkpoint every so many optimizer steps")
    flag("--checkpoints_total_limit", int, "how many checkpoints to keep; unset: all")
    flag("--resume_from_checkpoint", str, "continue from the newest or from this one", metavar="latest|PATH")
    flag("--report_to", "tensorboard", "tracker of losses and previews that accelerate knows, or all, or none")
    flag("--logging_dir", "logs", "folder of TensorBoard's files, under --output_dir")
    group = parser.add_argument_group("Hub")
    flag("--push_to_hub", False, "upload the LoRA, its card and its samples at the end")
    flag("--hub_private_repo", False, "make the repository private, if it is new")
    flag("--hub_model_id", str, "repository to upload to; unset: the name of --output_dir")
    flag("--hub_token", str.strip, "token; `hf auth login` or HF_TOKEN is safer: command lines are seen and logged")
    # fmt: on
    try:
        args = parser.parse_args(argv)
    except ValueError as error:  # --flag=--, or a file of flags with an open quote
        parser.error(f"cannot be read: {error}")
    if problems := list(command_line_problems(args)):
        parser.error("\n  ".join(problems))
    return args


def command_line_problems(args: Namespace) -> Iterator[str]:
    """Everything that is wrong with the flags whatever the folders hold."""
    for name, value in vars(args).items():
        usual = (1, 10_000_000) if type(value) is int else (1e-30, 1e30)
        low, high = next((limits for limits, names in LIMITS.items() if name in names.split()), usual)
        if type(value) in (int, float) and not low <= value <= high:  # nor is nan
            yield f"--{name} {value} is not between {low} and {high}"
        if "\\udc" in repr(value) or value == []:  # argparse makes [] of --flag=--
            yield f"--{name} is not UTF-8, or empty"
    try:
        training_shapes(args)
    except ValueError:
        given = f"--resolution {args.resolution}, --aspect_ratio_buckets {args.aspect_ratio_buckets}"
        yield f"{given}: sides are multiples of 16, and shapes are given as height,width;height,width"
    if args.hub_token and args.report_to in ("wandb", "all"):
        yield "--hub_token with --report_to wandb could expose the token; use `hf auth login` instead"
    if len(args.validation_prompt) > 2 and " " not in "".join(args.validation_prompt):
        yield "--validation_prompt: prompts of several words need quotes, such as 'a photo of sks dog'"
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        yield f"--lr_scheduler polynomial ends at 1e-07, which --learning_rate {args.learning_rate} is not above"
    if args.with_prior_preservation and not args.class_prompt:
        yield "--with_prior_preservation needs --class_prompt, such as 'a photo of a dog'"
    if args.with_prior_preservation and class_folder(args).resolve() == args.instance_data_dir.resolve():
        yield f"--class_data_dir {args.class_data_dir} is the folder of the subject"


def training_shapes(args: Namespace) -> list[tuple[int, int]]:
    """The shapes that images are trained in, (height, width) in pixels: the square, or aspect-ratio buckets."""
    shapes = [(args.resolution, args.resolution)]
    if args.aspect_ratio_buckets == "auto":
        shapes = diffusers.training_utils.generate_aspect_ratio_buckets(args.resolution)
    elif args.aspect_ratio_buckets:
        shapes = diffusers.training_utils.parse_buckets_string(args.aspect_ratio_buckets)
    if any(side < 16 or side % 16 for side in itertools.chain([args.resolution], *shapes)):
        raise ValueError
    return shapes


def digest(value: object) -> str:
    """A short name for the contents of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def class_folder(args: Namespace) -> Path:
    """--class_data_dir, or a folder that class images of another model, prompt or resolution do not share."""
    made_by = [args.pretrained_model_name_or_path, args.revision, args.class_prompt, args.resolution]
    return args.class_data_dir or args.output_dir / f"class_images-{digest(made_by)}"


class Run:
    """What the checks find out, and then the model as it is trained."""

    state: dict  # of the checkpoint to resume from, or {}
    noise_scheduler: diffusers.FlowMatchEulerDiscreteScheduler
    base_model: str  # what identifies its weights
    start: dict[str, Tensor]  # the LoRA to start from, or {}
    embeddings: PromptEmbeddings
    examples: list[Example]  # of the subject
    class_examples: list[Example]
    seed: int
    max_train_steps: int
    samples_per_step: int
    preview_steps: set[int]  # after which previews are made; the end has its own
    settings: dict[str, object]  # what a run that resumes this one is compared with
    lora_params: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler

    def __init__(self, args: Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        repository = args.hub_model_id if args.push_to_hub else None
        self.name = repository or args.output_dir.resolve().name  # of the LoRA
        self.weight_dtype = WEIGHT_DTYPES.get(accelerator.mixed_precision, torch.float32)
        self.transformer: Any = None  # without weights while checks run, then the model inside the prepared one
        self.signals: list[int] = []  # that came in while training
        self.global_step = 0


# ------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class Example:
    """One training image, its latents' file, its shape in training, its prompt and its weight in the loss."""

    path: Path
    sha256: str  # by which the Parquet file names it
    latents: Path
    shape: tuple[int, int]  # (height, width) in pixels
    prompt: str = ""
    loss_weight: float = 1.0


def find_images(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name; masks and hidden files are none."""
    format_of = Image.registered_extensions()
    files = sorted(path for path in folder.glob("[!.]*") if format_of.get(path.suffix.lower()) in FORMATS)
    return [path for path in files if not path.is_dir() and not path.stem.endswith(".mask")]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex: how a row of the Parquet file names an image."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_image(path: Path) -> Image.Image:
    """An image as the file has it, its pixels not yet read; an error if it is none that can be used."""
    path.name.encode()  # what is not UTF-8 is a ValueError
    if not path.is_file():  # a pipe would be waited for forever
        raise OSError("it is not a regular file")
    image = Image.open(path, formats=FORMATS)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a channel; save it with 8 or 16")
    return image


def upright(path: Path, mode: str) -> Image.Image:
    """An image as it is to be seen, with 8 bits a channel."""
    image = ImageOps.exif_transpose(open_image(path))
    if image.mode.startswith("I;16"):  # convert would cut values off
        image = Image.fromarray((np.asarray(image) / 256).astype(np.uint8))
    return image.convert(mode)


def read_image(path: Path) -> tuple[Image.Image, Image.Image]:
    """An upright RGB image, white where it is transparent, and its mask: NAME.mask.png, or else its alpha channel."""
    image, mask_path = upright(path, "RGBA"), path.with_suffix(".mask.png")
    mask = upright(mask_path, "L") if mask_path.exists() else image.getchannel("A")
    if mask.size != image.size:
        raise ValueError(f"its mask has {mask.size} pixels, not {image.size}")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"), mask


class PromptEmbeddings:
    """Prompt embeddings by prompt, read from the Parquet file a row at a time: row number = row group."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():  # a pipe would be waited for forever
            raise OSError("it is not a regular file")
        self.path, self.file = path, pq.ParquetFile(path, memory_map=True)
        rows = self.file.read(["prompt", "image_hashes"]).to_pylist()
        self.row_of_prompt = {row["prompt"]: number for number, row in enumerate(rows)}
        self.prompt_of_image = {sha256: row["prompt"] for row in rows for sha256 in row["image_hashes"]}
        about = json.loads((self.file.schema_arrow.metadata or {}).get(b"sd3_embeddings", b"[]"))
        if self.file.num_row_groups != len(rows) or not isinstance(about, dict):
            raise ValueError("compute_embeddings.py has not written it")
        self.about = about

    def __reduce__(self) -> tuple:
        return PromptEmbeddings, (self.path,)  # worker processes open the file themselves

    @functools.lru_cache(maxsize=64)  # noqa: B019 - reading takes 14 ms; the object lives as long as the program
    def __getitem__(self, prompt: str) -> dict[str, Tensor]:
        """prompt_embeds (L, D) and pooled_prompt_embeds (P,), fp16."""
        names = ["prompt_embeds", "pooled_prompt_embeds"]
        row = self.file.read_row_group(self.row_of_prompt[prompt], names, use_threads=False)
        embeds = {name: torch.from_numpy(row[name].chunk(0).to_numpy_ndarray()[0].copy()) for name in names}
        if not all(tensor.isfinite().all() for tensor in embeds.values()):
            raise ValueError(f"the embeddings of {prompt!r} are not finite")
        return embeds


@contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which appears as `final`, whole and on disk, when the block ends well."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=final.parent, ignore_cleanup_errors=True) as folder:
        partial = Path(folder, final.name)
        yield partial
        for path in [partial, *partial.rglob("*")]:
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if final.is_dir():
            shutil.rmtree(final)
        os.replace(partial, final)


def first_line(error: Exception) -> str:
    """What an error says, in one line: the Hub's own words, where there are some."""
    said = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    return said.splitlines()[0].rstrip(".")


def load_part(load: Callable[..., T], args: Namespace, subfolder: str, **kwargs: object) -> T:
    """What `load`, a from_pretrained, gives for one part of the pipeline; exits in one message if it cannot be had."""
    name = args.pretrained_model_name_or_path
    kwargs |= {"subfolder": subfolder, "revision": args.revision, "cache_dir": args.cache_dir}
    try:
        return load(name, token=getattr(args, "hub_token", None), **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the file system, safetensors, the Hub or the network: they share no class
        raise SystemExit(
            f"Cannot load {subfolder} of {name}: {first_line(error)}\n"
            "A folder needs diffusers' layout. A repository may be restricted: accept its license on "
            f"https://huggingface.co/{name} and run: hf auth login\n"
            "Without a network, HF_HUB_OFFLINE=1 takes what is downloaded already."
        ) from error


def load_vae(args: Namespace, dtype: torch.dtype) -> diffusers.AutoencoderKL:
    load = diffusers.AutoencoderKL.from_pretrained
    return load_part(load, args, "vae", variant=args.variant, dtype=dtype, use_safetensors=True)


@torch.inference_mode()
def encode_image(vae: diffusers.AutoencoderKL, example: Example, args: Namespace) -> dict[str, Tensor]:
    """The posterior of an image's latents, normalized for SD3: mean and std (V, 16, h, w); and its mask (V, 1, h, w).

    V variants: crops, and their mirror images; h and w are an eighth of the shape in pixels; fp16.
    """
    image, mask = read_image(example.path)
    if not args.alpha_mask:
        mask = Image.new("L", image.size, "white")
    height, width = example.shape
    ratio = image.width * height / (image.height * width)
    slack = max(width * (ratio - 1), height * (1 / ratio - 1))  # of the side that is too long, in pixels
    varied = slack >= 8 and not args.center_crop  # a latent pixel is 8 wide
    variants = []
    centers = np.linspace(0, 1, CROPS_PER_IMAGE) if varied else [0.5]
    for center, mirrored in itertools.product(centers, sorted({False, args.random_flip})):
        place = (center, center)
        crops = [ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=place)]
        crops += [ImageOps.fit(mask, (width // 8, height // 8), Image.Resampling.BOX, centering=place)]
        pixels, weights = (torch.from_numpy(np.array(ImageOps.mirror(crop) if mirrored else crop)) for crop in crops)
        pixel_values = pixels.permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W)
        posterior = vae.encode(pixel_values.to(vae.device)).latent_dist  # of (1, 16, H/8, W/8)
        mean = (posterior.mean[0] - vae.config.shift_factor) * vae.config.scaling_factor
        std = posterior.std[0] * vae.config.scaling_factor
        variants.append({"mean": mean, "std": std, "mask": weights[None] / 255})
    return {name: tensor.half().cpu() for name, tensor in default_collate(variants).items()}


def encode_latents(run: Run, examples: list[Example]) -> Iterator[str]:
    """Write the latents that are not there yet, a safetensors file an image; every process encodes its share.

    In fp32, as `force_upcast` in the VAE's config asks, and untiled: tiles move latents by 11 to 34 % of their std.
    """
    accelerator = run.accelerator
    share = examples[accelerator.process_index :: accelerator.num_processes]
    if missing := [example for example in share if not example.latents.exists()]:
        vae = load_vae(run.args, torch.float32)
        del vae.decoder  # 0.2 GB that encoding does not need
        vae.to(accelerator.device)
        for example in tqdm(missing, "Encoding images", unit="image"):
            try:
                latents = encode_image(vae, example, run.args)
            except UNREADABLE as error:
                yield f"{example.path} is not a readable image ({error}). Repair it or take it out."
                continue
            with appearing(example.latents) as partial:
                save_file(latents, partial)


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers and on nothing else."""
    return torch.Generator().manual_seed(int(digest(numbers), 16) >> 1)


def sample_order(kinds: list[list[Example]], seed: int, micro_batch: int, length: int) -> list[Example]:
    """Which image each sample of the run shows: every one once an epoch of its shape, in an order drawn each time.

    kinds: the subject's images and perhaps its class's, which take turns by the sample, or, where shapes differ, by
    the micro-batch, which then holds one shape: as many turns for a shape as it has images.
    """
    numbers = random.Random(seed)

    def endless(items: list[T]) -> Iterator[T]:
        while True:
            yield from numbers.sample(items, len(items))

    shapes = {example.shape for kind in kinds for example in kind}
    together = micro_batch if len(shapes) > 1 else 1
    turns = []
    for kind in kinds:
        of_shape = {shape: endless([each for each in kind if each.shape == shape]) for shape in shapes}
        turns.append(endless([of_shape[each.shape] for each in kind]))
    order = (itertools.islice(next(turn), together) for turn in itertools.cycle(turns))
    return list(itertools.islice(itertools.chain.from_iterable(order), length))


@dataclass
class SampleDataset(Dataset):
    """Training samples by number; every random choice about one is a function of (seed, sample number)."""

    order: list[Example]
    embeddings: PromptEmbeddings
    sigmas: Tensor  # of the noise schedule, from 1 down
    args: Namespace
    seed: int

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Latents and noise (16, H/8, W/8), mask (1, H/8, W/8), sigma (), loss_weight (), the prompt's embeddings."""
        args, example, generator = self.args, self.order[number], seeded_generator(self.seed, 1, number)
        variants = load_file(example.latents)  # mapped: of what is not used nothing is read
        variant = int(torch.randint(len(variants["mean"]), (), generator=generator))
        mean, std, mask = (variants[name][variant].float() for name in ("mean", "std", "mask"))
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        density = diffusers.training_utils.compute_density_for_timestep_sampling(
            args.weighting_scheme, 1, args.logit_mean, args.logit_std, args.mode_scale, generator=generator
        )
        sigma = self.sigmas[min(int(density * len(self.sigmas)), len(self.sigmas) - 1)]  # `mode` can reach the end
        dropped = torch.rand((), generator=generator) < args.caption_dropout
        sample = {"latents": latents, "noise": noise, "mask": mask, "sigma": sigma}
        sample |= {"sample_number": torch.tensor(number), "loss_weight": torch.tensor(example.loss_weight)}
        return sample | self.embeddings["" if dropped else example.prompt]


# ------------------------------------------------------------------------------------------------ model and objective


def lora_targets(transformer: nn.Module, layers: str) -> list[str]:
    """Full names of the linear layers whose names end with one of `layers`, or with what such a pattern matches."""
    linear = [f".{name}" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    found = [fnmatch.filter(linear, f"*.{layer.strip()}") for layer in layers.split(",")]
    return sorted(name[1:] for name in set().union(*found))


def load_transformer(args: Namespace, weight_dtype: torch.dtype) -> diffusers.SD3Transformer2DModel:
    """The frozen transformer, straight in the training dtype."""
    kwargs = {"variant": args.variant, "dtype": weight_dtype, "use_safetensors": True}
    if args.quantize_base:  # what is not a linear layer stays in weight_dtype
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": weight_dtype}
        kwargs["quantization_config"] = diffusers.BitsAndBytesConfig(**nf4)
    transformer = load_part(diffusers.SD3Transformer2DModel.from_pretrained, args, "transformer", **kwargs)
    return transformer.requires_grad_(False).train()


def add_lora(transformer: diffusers.SD3Transformer2DModel, args: Namespace, seed: int) -> None:
    """Give the transformer a new LoRA in fp32, whatever its own dtype is."""
    from peft import LoraConfig  # 2 s, not spent on a wrong command line
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(seed)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha or args.rank,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(transformer, args.lora_layers),
        init_lora_weights="gaussian",
    )
    transformer.add_adapter(config)
    diffusers.training_utils.cast_training_params(transformer)  # to fp32
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer) and not args.lora_dropout:
            layer.forward = fused_forward(layer, layer.forward)


def fused_forward(layer: Any, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A LoRA layer's forward in two products, base(x) + (x Aᵀ)(scale · Bᵀ), all in the dtype of x.

    PEFT's own (`plain`) makes six passes over the activations and keeps an fp32 copy of x for the backward pass.
    x is (..., in), the result (..., out).
    """

    def forward(x: Tensor) -> Tensor:
        if layer.disable_adapters:
            return plain(x)
        down = layer.lora_A["default"].weight.to(x.dtype)  # (rank, in)
        up = (layer.lora_B["default"].weight * layer.scaling["default"]).to(x.dtype)  # (out, rank)
        rows = x.flatten(0, -2)
        result = layer.base_layer(rows).addmm_(rows @ down.T, up.T)  # in place: a copy less
        return result.view(*x.shape[:-1], -1)

    return forward


def recompute_blocks(transformer: diffusers.SD3Transformer2DModel, count: int) -> None:
    """Let the first `count` blocks recompute their activations in the backward pass instead of keeping them."""
    recomputed = set(transformer.transformer_blocks[:count])

    def call(block: nn.Module, *inputs: object) -> object:
        return checkpoint(block, *inputs, use_reentrant=False) if block in recomputed else block(*inputs)

    transformer.enable_gradient_checkpointing(call)


def make_optimizer(lora_params: list[nn.Parameter], args: Namespace, samples_per_step: int) -> torch.optim.Optimizer:
    """AdamW, fused, or with its states in 8 bit."""
    learning_rate = args.learning_rate * (samples_per_step if args.scale_lr else 1)
    kwargs = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    kwargs["weight_decay"] = args.adam_weight_decay
    if args.optimizer == "adamw" and not args.use_8bit_adam:
        return torch.optim.AdamW(lora_params, fused=True, **kwargs)
    from bitsandbytes import optim

    kind = optim.PagedAdamW8bit if args.optimizer == "paged_adamw_8bit" else optim.AdamW8bit
    return kind(lora_params, **kwargs)


def flow_matching_loss(error: Tensor, sigmas: Tensor, mask: Tensor, scheme: str, precondition: bool) -> Tensor:
    """Per-sample weighted squared error of the velocity, (B,). Rectified flow, arXiv 2403.03206 §3.1.

    error (B, 16, H, W), sigmas (B, 1, 1, 1). mask (B, 1, H, W) multiplies the error; the mean is a plain one over all
    pixels, so that a small subject counts less. With precondition it is the reference's error of the latents that the
    velocity implies, noisy - sigma * velocity: sigma² times ours.
    """
    weighting = diffusers.training_utils.compute_loss_weighting_for_sd3(scheme, sigmas)
    if precondition:
        weighting = weighting * sigmas**2
    return (weighting * mask * error**2).mean(dim=(1, 2, 3))


def training_loss(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype, args: Namespace) -> Tensor:
    """The mean loss of one micro-batch, ()."""
    latents, noise = batch["latents"], batch["noise"]  # (B, 16, H/8, W/8)
    sigmas = batch["sigma"].view(-1, 1, 1, 1)
    noisy_latents = (1 - sigmas) * latents + sigmas * noise
    velocity_pred = model(
        hidden_states=noisy_latents.to(dtype),
        timestep=1000 * batch["sigma"],
        encoder_hidden_states=batch["prompt_embeds"].to(dtype),  # (B, L, D)
        pooled_projections=batch["pooled_prompt_embeds"].to(dtype),  # (B, P)
    ).sample
    error = velocity_pred.float() - (noise - latents)
    losses = flow_matching_loss(error, sigmas, batch["mask"], args.weighting_scheme, args.precondition_outputs)
    return (batch["loss_weight"] * losses).mean()


def start_or_resume(run: Run) -> None:
    """The LoRA, the optimizer and the learning rate schedule, new or where a checkpoint left them."""
    from peft import set_peft_model_state_dict

    args, state, scaler = run.args, run.state, run.accelerator.scaler
    set_peft_model_state_dict(run.transformer, state.get("lora", run.start))
    run.lora_params = [parameter for parameter in run.transformer.parameters() if parameter.requires_grad]
    run.accelerator.print(f"{sum(map(Tensor.numel, run.lora_params)):,} parameters to train")
    run.optimizer = make_optimizer(run.lora_params, args, run.samples_per_step)
    run.lr_scheduler = diffusers.optimization.get_scheduler(
        args.lr_scheduler,
        run.optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=run.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    if state:
        run.global_step = state["global_step"]
        groups = run.optimizer.state_dict()["param_groups"]  # those of this run: a lower learning rate is followed
        run.optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        run.lr_scheduler.last_epoch = run.global_step - 1  # every schedule is a function of the step
        run.lr_scheduler.step()
        if scaler and state["scaler"]:
            scaler.load_state_dict(state["scaler"])


# ------------------------------------------------------------------------------------------------------- checkpoints


def architecture(run: Run) -> str:
    """The base model's name in Stability's ModelSpec."""
    config = run.transformer.config
    model = "3.5-large" if config.num_layers > 30 else "3.5-medium" if config.dual_attention_layers else "3-medium"
    return f"stable-diffusion-v{model}"


def write_lora(path: Path, run: Run) -> None:
    """Write the LoRA in diffusers' layout, with alpha / rank folded into lora_B and alpha = rank.

    Programs disagree about where alpha stands, ComfyUI knows none in this layout; so all apply the same strength. Of
    PEFT's config only what every PEFT knows is written: a field that an older one lacks is a TypeError there.
    """
    from peft import get_peft_model_state_dict

    config, lora = run.transformer.peft_config["default"], get_peft_model_state_dict(run.transformer)
    if not all(value.isfinite().all() for value in lora.values()):
        raise SystemExit(f"The LoRA has weights that are not finite: not saved. Older files beside {path} are good.")
    scale = config.lora_alpha / config.r
    lora = {f"transformer.{name}": value * scale if "lora_B" in name else value for name, value in lora.items()}
    adapter = {
        "transformer.r": config.r,
        "transformer.lora_alpha": config.r,
        "transformer.target_modules": sorted(config.target_modules),
        "transformer.rank_pattern": {},
        "transformer.alpha_pattern": {},
    }
    about = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, indent=2),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture(run)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": run.name,
        "modelspec.trigger_phrase": run.args.instance_prompt,
        "modelspec.resolution": f"{run.args.resolution}x{run.args.resolution}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    save_file(lora, path, about)
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def save_checkpoint(run: Run) -> None:
    """checkpoint-N: a LoRA that can be used as it is, and training_state.pt with all that training needs to go on."""
    from peft import get_peft_model_state_dict

    final, scaler = run.args.output_dir / f"checkpoint-{run.global_step}", run.accelerator.scaler
    state = {"global_step": run.global_step, "settings": run.settings, "optimizer": run.optimizer.state_dict()}
    state["lora"] = get_peft_model_state_dict(run.transformer)  # exact: nothing is folded in
    state["scaler"] = scaler and scaler.state_dict()
    with appearing(final) as partial:
        partial.mkdir()
        write_lora(partial / LORA_NAME, run)
        torch.save(state, partial / STATE_NAME)
    if run.args.checkpoints_total_limit:
        for old in list_checkpoints(run.args.output_dir)[: -run.args.checkpoints_total_limit]:
            if old != final:  # whatever a clock that was set back says
                shutil.rmtree(old)


def read_state(folder: Path) -> dict:
    """training_state.pt of a checkpoint, or {} if it is not there, not whole, or not ours; it cannot run code."""
    try:
        state = torch.load(folder / STATE_NAME, map_location="cpu", weights_only=True)
        return state if {"global_step", "settings", "lora", "optimizer", "scaler"} <= state.keys() else {}
    except Exception:  # a file that is cut short, or no pickle of tensors, fails in many ways
        return {}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder in the order in which they were saved; an earlier run may have left higher ones."""
    states = sorted(folder.glob(f"checkpoint-*/{STATE_NAME}"), key=lambda path: path.stat().st_mtime_ns)
    return [path.parent for path in states if re.fullmatch(r"checkpoint-[0-9]+", path.parent.name)]


# ------------------------------------------------------------------------------------------ previews and publishing


def make_pipeline(run: Run) -> diffusers.StableDiffusion3Pipeline:
    """The transformer as it is, with the VAE and without text encoders."""
    parts = "text_encoder tokenizer text_encoder_2 tokenizer_2 text_encoder_3 tokenizer_3".split()
    vae = load_vae(run.args, run.weight_dtype).to(run.accelerator.device)
    vae.enable_slicing()  # decodes images one by one
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(run.noise_scheduler.config)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=run.transformer, vae=vae, scheduler=scheduler, **dict.fromkeys(parts)
    )
    pipeline.set_progress_bar_config(desc="Generating", leave=False)
    return pipeline


def generate_images(run: Run, pipeline: Any, prompts: list[str], seeds: dict[Path, tuple]) -> list[Image.Image]:
    """Write an image to each path, from the noise that its numbers seed, all at once; [] after a signal.

    prompts: what to show and the negative prompt.
    """

    def end_early(pipeline: Any, step: int, timestep: Tensor, tensors: dict) -> dict:
        pipeline._interrupt = bool(run.signals)
        return tensors

    args, device = run.args, run.accelerator.device
    inputs = {
        f"{role}{name}": torch.stack([embeds] * len(seeds)).to(device, run.weight_dtype)
        for role, prompt in zip(("", "negative_"), prompts, strict=True)
        for name, embeds in run.embeddings[prompt].items()
    }
    run.transformer.eval()
    images = pipeline(
        height=args.resolution,
        width=args.resolution,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        generator=[seeded_generator(run.seed, *numbers) for numbers in seeds.values()],
        callback_on_step_end=end_early,
        **inputs,
    ).images
    run.transformer.train()
    if run.signals:
        return []
    for path, image in zip(seeds, images, strict=True):
        with appearing(path) as partial:
            image.save(partial)
    return images


def make_class_images(run: Run) -> Iterator[str]:
    """The class's images; those that are missing are generated, by the transformer that has no LoRA yet."""
    args, accelerator, folder = run.args, run.accelerator, class_folder(run.args)
    folder.mkdir(parents=True, exist_ok=True)
    lacking = max(0, args.num_class_images - len(find_images(folder)))
    seeds = {folder / f"class-{number:05}.png": (3, number) for number in range(args.num_class_images)}
    missing = [path for path in seeds if not path.exists()][:lacking]
    batches = [missing[i : i + args.sample_batch_size] for i in range(0, len(missing), args.sample_batch_size)]
    accelerator.wait_for_everyone()  # until all have counted
    if share := batches[accelerator.process_index :: accelerator.num_processes]:
        pipeline = make_pipeline(run)
        for batch in tqdm(share, "Class images", unit="batch"):
            generate_images(run, pipeline, [args.class_prompt, ""], {path: seeds[path] for path in batch})
    accelerator.wait_for_everyone()
    found = yield from read_examples(run, folder)
    prior = {"prompt": args.class_prompt, "loss_weight": args.prior_loss_weight}
    run.class_examples = [replace(example, **prior) for example in found[: args.num_class_images]]


def make_previews(run: Run) -> list[tuple[str, Path]]:
    """Write samples/*.png and progress.png; the prompt and the file of each sample. A signal ends it early."""
    folder, pipeline, written = run.args.output_dir / "samples", make_pipeline(run), []
    shown: dict[str, list[Image.Image]] = defaultdict(list)
    for row, prompt in enumerate(run.args.validation_prompt):
        for number in range(run.args.num_validation_images if run.global_step else 1):  # untrained, one is enough
            path = folder / f"step-{run.global_step:06d}-prompt-{row}-{number}.png"
            shown[prompt] += generate_images(run, pipeline, [prompt, run.args.negative_prompt], {path: (2, number)})
            if run.signals:
                return []
            written.append((prompt, path))
    sheet = draw_progress(run, folder)
    with appearing(folder / "progress.png") as partial:
        sheet.save(partial)
    if run.global_step >= run.max_train_steps:
        shown["progress"].append(sheet)
    for tracker in run.accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            values = {title: np.array(images) for title, images in shown.items()}
            tracker.log_images(values, step=run.global_step, **layout)
    return written


def draw_progress(run: Run, folder: Path) -> Image.Image:
    """A row per prompt and a column per preview so far, up to 16 of them; unreadable ones are left out."""
    rows, columns = range(len(run.args.validation_prompt)), list[np.ndarray]()
    found = [int(path.name.split("-")[1]) for path in folder.glob("step-[0-9]*-prompt-0-0.png")]
    steps = sorted(step for step in found if step <= run.global_step)  # later ones are of an earlier run
    for step in [*steps[: -1 : 1 + len(steps) // 15], run.global_step]:
        with suppress(*UNREADABLE):
            images = [read_image(folder / f"step-{step:06d}-prompt-{row}-0.png")[0] for row in rows]
            columns.append(np.vstack([np.asarray(image.resize((256, 256))) for image in images]))
    return Image.fromarray(np.hstack(columns))


def write_model_card(run: Run, previews: list[tuple[str, Path]]) -> None:
    """README.md for the Hub: base model, trigger words, gallery, how to load it, license and settings."""
    path, base = run.args.output_dir / "README.md", run.args.pretrained_model_name_or_path
    if path.exists() and CARD_MARK not in path.read_text("utf-8", errors="replace"):
        print(f"note: {path} was written by somebody else and stays as it is")
        return
    family, repository = "sd3.5" if "v3.5" in architecture(run) else "sd3", None if Path(base).is_dir() else base
    data = ModelCardData(
        license="other",
        license_name="stabilityai-ai-community" if base.startswith("stabilityai/") else "license-of-the-base-model",
        license_link=repository and f"https://huggingface.co/{base}/blob/main/LICENSE.md",
        base_model=repository,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=run.args.instance_prompt,
        tags=["text-to-image", "diffusers-training", "diffusers", "lora", family, f"{family}-diffusers"],
        widget=[{"text": prompt, "output": {"url": f"samples/{file.name}"}} for prompt, file in previews],
    )
    with appearing(path) as partial:
        partial.write_text(card_text(run, data), "utf-8")


def card_text(run: Run, data: ModelCardData) -> str:
    """The card with its data; a base model that is a folder is named without its path."""
    prompt, settings = run.args.instance_prompt, json.dumps(run.settings, indent=2, ensure_ascii=False)
    base = data.base_model or Path(run.args.pretrained_model_name_or_path).name
    source = data.base_model or "FOLDER OR REPOSITORY OF THE BASE MODEL"
    return f"""---
{data.to_yaml()}
---

{CARD_MARK}
# {run.name}

<Gallery />

A LoRA of {base} that knows what **{prompt}** looks like, trained with DreamBooth.

## Trigger words

You should use `{prompt}` to trigger the image generation.

## Use it

With diffusers 0.33 or later and peft 0.17 or later (0.18 with transformers 5), or in ComfyUI at strength 1:

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{source}", torch_dtype=torch.float16)
pipeline.load_lora_weights("{run.name}", weight_name="{LORA_NAME}")
pipeline.enable_model_cpu_offload()
image = pipeline({json.dumps(prompt, ensure_ascii=False)}).images[0]
```

The license is that of the base model. Trained for {run.global_step} steps with:

```json
{settings}
```
"""


def reach_hub(run: Run, create: bool = False) -> Iterator[str]:
    """Whether the Hub knows the token; with `create` the repository to push to is made if it is new."""
    args, api = run.args, HfApi(token=run.args.hub_token)
    if args.push_to_hub and run.accelerator.is_main_process:
        try:
            if create:
                run.name = api.create_repo(run.name, private=args.hub_private_repo or None, exist_ok=True).repo_id
            else:
                api.whoami()
        except Exception as error:  # the Hub's, or the network's
            yield f"--push_to_hub: {first_line(error)}. With a token that may write, run: hf auth login"


def push_to_hub(run: Run, previews: list[tuple[str, Path]]) -> None:
    """Upload the LoRA, its card and its samples, and nothing else."""
    folder, name = run.args.output_dir, run.name
    files = [LORA_NAME, "README.md", *(f"samples/{file.name}" for _, file in previews)]
    files += ["samples/progress.png"] if previews else []
    try:
        api = HfApi(token=run.args.hub_token)
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message="Add a LoRA")
    except Exception as error:  # whatever it was, the LoRA is on disk
        command = ["hf", "upload", name, str(folder), ".", *(f"--include={file}" for file in files)]
        raise SystemExit(
            f"The upload failed: {first_line(error)}\nNothing is lost. To send it: {shlex.join(command)}"
        ) from error
    print(f"pushed to {name}")


# ---------------------------------------------------------------------------------------------------------- checks
# A check yields problems, and notes, which begin with "note: "; it creates nothing, prints nothing, raises nothing.
# What it finds out goes into the Run.


def check_machine(run: Run) -> Iterator[str]:
    """Whether this machine can do it: the precision, the tracker, writing the folders."""
    args, accelerator = run.args, run.accelerator
    precision = accelerator.mixed_precision
    if precision not in WEIGHT_DTYPES:
        yield f"Precision {precision} is not available: use fp16 or bf16."
    on_cuda = accelerator.device.type == "cuda"
    if precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield f"{torch.cuda.get_device_name()} only emulates bf16; use --mixed_precision fp16."
    if args.quantize_base and not on_cuda:
        yield "--quantize_base needs a GPU."
    if args.report_to not in ("none", "all") and not accelerator.log_with:
        yield f"--report_to {args.report_to} is not installed. Run: pip install {args.report_to}"
    for folder in filter(None, (args.output_dir, args.class_data_dir)):
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            yield f"{folder} cannot be written: {nearest} is not a folder, or may not be changed."


def check_checkpoint(run: Run) -> Iterator[str]:
    """The state to resume from."""
    folder, wanted, run.state = run.args.output_dir, run.args.resume_from_checkpoint, {}
    if not wanted:
        return
    found = list_checkpoints(folder)
    for path in reversed(found) if wanted == "latest" else [Path(wanted), folder / wanted]:
        if state := read_state(path):
            run.state = state
            return
        if path.exists():
            yield f"note: skipped, not a complete checkpoint: {path}"
    if wanted == "latest":
        yield f"note: no checkpoint in {folder} yet: starting from the beginning"
    else:
        names = ", ".join(path.name for path in found) or "none"
        yield f"--resume_from_checkpoint {wanted} is not a complete checkpoint. {folder} has: {names}."


def check_model(run: Run) -> Iterator[str]:
    """The transformer without its weights, the noise scheduler, and what identifies the weights."""
    args, run.base_model, model_class = run.args, "", diffusers.SD3Transformer2DModel
    try:
        config, commit = load_part(model_class.load_config, args, "transformer", return_commit_hash=True)
        with torch.device("meta"):
            transformer = load_part(lambda *_, **__: model_class.from_config(config), args, "transformer")
        run.noise_scheduler = load_part(diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained, args, "scheduler")
    except SystemExit as message:
        yield str(message)
        return
    # Of a folder the first MiB of each file, which tells when others come in their place.
    files = sorted(Path(args.pretrained_model_name_or_path).glob("*/diffusion_pytorch_model*.safetensors"))
    files = [path for path in files if ("." in path.stem) == bool(args.variant)]
    run.base_model = commit or digest([np.fromfile(path, np.uint8, 2**20).tobytes().hex() for path in files])
    run.transformer, config = transformer, transformer.config
    largest = config.pos_embed_max_size * config.patch_size * 8  # the VAE makes one latent of 8 x 8 pixels
    if (side := max(args.resolution, *map(max, training_shapes(args)))) > largest:
        yield f"--resolution {args.resolution} has a side of {side} pixels, above the model's {largest}."
    for layer in args.lora_layers.split(","):
        if not lora_targets(transformer, layer):
            yield f"--lora_layers: the transformer has no linear layer {layer}."


def check_lora(run: Run) -> Iterator[str]:
    """The weights of --pretrained_lora_path, at their strength, if they fit the LoRA that is to be trained."""
    args, path, run.start = run.args, run.args.pretrained_lora_path, {}
    if not (path and run.transformer and lora_targets(run.transformer, args.lora_layers)):
        return
    from peft import get_peft_model_state_dict

    try:
        file, metadata = diffusers.StableDiffusion3Pipeline.lora_state_dict(
            path, cache_dir=args.cache_dir, token=args.hub_token, use_safetensors=True, return_lora_metadata=True
        )
        add_lora(run.transformer, args, seed=0)
    except Exception as error:  # of the file system, safetensors, the Hub, or PEFT without layers to train
        yield f"The LoRA {path} cannot be loaded: {first_line(error)}."
        return
    lora = get_peft_model_state_dict(run.transformer)
    given = {(name, *tensor.shape) for name, tensor in file.items()}
    wanted = {(f"transformer.{name}", *tensor.shape) for name, tensor in lora.items()}
    if others := sorted(given ^ wanted):
        yield f"{path} is no LoRA in diffusers' layout, --rank {args.rank} and these --lora_layers: see {others[0][0]}"
    alpha = (metadata or {}).get("transformer.lora_alpha", args.rank)  # without metadata, alpha is the rank
    factor = alpha / (args.lora_alpha or args.rank)
    for name, tensor in file.items():
        run.start[name.removeprefix("transformer.")] = tensor.float() * (factor if "lora_B" in name else 1)


def read_examples(run: Run, folder: Path) -> Generator[str, None, list[Example]]:
    """The images of a folder, without their prompts; every process reads its share.

    The latents' file is named by a digest of everything that the latents depend on.
    """
    args, accelerator, shapes = run.args, run.accelerator, training_shapes(run.args)
    found, masked = [], False
    for path in find_images(folder)[accelerator.process_index :: accelerator.num_processes]:
        mask_path = path.with_suffix(".mask.png")
        try:
            with open_image(path) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
                size = image.size if turned else image.size[::-1]  # (height, width)
                masked |= mask_path.exists() or image.has_transparency_data
            mask = sha256_of(mask_path) if args.alpha_mask and mask_path.exists() else args.alpha_mask
            sha256 = sha256_of(path)
        except UNREADABLE as error:
            yield f"{path} is not a readable image ({error}). Repair it or take it out of the folder."
            continue
        shape = shapes[diffusers.training_utils.find_nearest_bucket(*size, shapes)]
        name = digest([sha256, mask, run.base_model, shape, args.center_crop or CROPS_PER_IMAGE, args.random_flip])
        found.append(Example(path, sha256, args.output_dir / "latents" / f"{name}.safetensors", shape))
    if args.alpha_mask and folder == args.instance_data_dir and not any(gather_object([masked])):
        yield f"--alpha_mask: no image in {folder} has an alpha channel or a NAME.mask.png."
    return sorted(gather_object(found), key=lambda example: example.path)


def embeddings_command(args: Namespace, about: dict) -> str:
    """The command line that writes the embeddings this run needs."""
    flags = vars(args) | {"prompt": args.instance_prompt, "local_data_dir": args.instance_data_dir}
    flags["output_path"] = args.data_df_path
    flags["max_sequence_length"] = args.max_sequence_length or about.get("max_sequence_length")
    flags["t5_precision"] = about.get("t5")
    names = "prompt local_data_dir output_path pretrained_model_name_or_path variant revision cache_dir t5_precision "
    names += "max_sequence_length class_prompt validation_prompt negative_prompt"
    given = [[f"--{name}", *map(str, np.ravel(flags[name]))] for name in names.split() if flags[name]]
    return shlex.join(["python", "compute_embeddings.py", *itertools.chain(*given)])


def check_embeddings(run: Run) -> Iterator[str]:
    """The embeddings, and the images with their prompts; what is missing is said with the command that mends it."""
    args, path, folder = run.args, run.args.data_df_path, run.args.instance_data_dir
    examples = yield from read_examples(run, folder)
    if not examples:
        yield f"--instance_data_dir {folder} has no images ({', '.join(FORMATS)})."
    class_prompt = args.class_prompt if args.with_prior_preservation else ""
    wanted = {"", args.instance_prompt, *args.validation_prompt, args.negative_prompt, class_prompt}
    try:
        embeddings = PromptEmbeddings(path)
        unknown = sorted(wanted - embeddings.row_of_prompt.keys())
        embeds = [embeddings[prompt] for prompt in wanted.difference(unknown) or embeddings.row_of_prompt]
        widths = [tensor.shape[-1] for tensor in embeds[0].values()]
    except Exception as error:  # of the file system, of Arrow, or of another form than ours
        yield f"--data_df_path {path} cannot be read ({first_line(error)}). Run: {embeddings_command(args, {})}"
        return
    run.embeddings, prompt_of = embeddings, embeddings.prompt_of_image
    run.examples = [replace(example, prompt=prompt_of.get(example.sha256, "")) for example in examples]
    about, cure = embeddings.about, f"Run: {embeddings_command(args, embeddings.about)}"
    config = run.transformer and run.transformer.config
    if config and widths != [config.joint_attention_dim, config.pooled_projection_dim]:
        yield f"{path} was computed with another kind of model. {cure}"
    if args.max_sequence_length not in (None, length := about.get("max_sequence_length")):
        yield f"{path} has {length} T5 tokens, not --max_sequence_length {args.max_sequence_length}. {cure}"
    if missing := [example.path.name for example in examples if example.sha256 not in prompt_of]:
        count = f"{len(missing)} of {len(examples)} images in {folder}"
        yield f"{count} have no embeddings in {path} (first: {missing[0]}). {cure}"
    captions = [example.prompt for example in run.examples]
    if args.instance_prompt not in [about.get("prompt"), *captions, *unknown]:
        yield f"In {path} --instance_prompt {args.instance_prompt!r} captions none of the images. {cure}"
    if unknown:
        yield f"{path} has no embeddings of {', '.join(map(repr, unknown))}. {cure}"


def plan(run: Run) -> Iterator[str]:
    """Steps, seed and settings, whether a checkpoint may be continued with them, and what --dry_run says of images."""
    args, accelerator = run.args, run.accelerator
    [drawn] = broadcast_object_list([random.randrange(2**31)])
    if not (run.transformer and getattr(run, "examples", None)):
        return
    saved, about = run.state.get("settings", {}), run.embeddings.about
    run.seed = saved.get("seed", drawn) if args.seed is None else args.seed
    per_micro_batch = args.train_batch_size * accelerator.num_processes
    run.samples_per_step = per_step = per_micro_batch * args.gradient_accumulation_steps
    per_epoch = len(run.examples) * (2 if args.with_prior_preservation else 1)  # every image of the subject once
    run.max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * per_epoch / per_step)
    period = args.validation_steps * per_step if args.validation_steps else args.validation_epochs * per_epoch
    steps = range(1, run.max_train_steps if args.validation_prompt else 1)
    run.preview_steps = {step for step in steps if step * per_step % period < per_step}
    run.settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE} | {
        "seed": run.seed,
        "max_train_steps": run.max_train_steps,
        "mixed_precision": accelerator.mixed_precision,
        "samples per step": per_step,
        "samples per micro-batch": per_micro_batch if args.aspect_ratio_buckets else None,  # of one shape
        "images and captions": digest([(example.latents.name, example.prompt) for example in run.examples]),
        "embeddings": f"T5 {about.get('t5')}, {about.get('max_sequence_length')} tokens",
        "base model": run.base_model,
    }
    differing = {
        name: f"{name} {saved[name]}, this run has {value}"
        for name, value in run.settings.items()
        if saved.get(name, value) != value
    }
    for name in sorted(differing.keys() & MUST_NOT_CHANGE):
        yield f"The checkpoint was trained with {differing[name]}."
    if followed := [differing[name] for name in differing if name not in MUST_NOT_CHANGE]:
        yield f"note: the checkpoint was trained with {'; '.join(followed)}, which is followed"
    for example in run.examples if args.dry_run else []:
        height, width = example.shape
        yield f"note: {example.path.name}: trained as {width} x {height}, {example.prompt!r}"
    size = f"{len(run.examples)} images, {run.max_train_steps} steps of {per_step} samples"
    yield f"note: {size}: {run.max_train_steps * per_step / per_epoch:.1f} epochs, seed {run.seed}"


def stop_at_problems(run: Run, checks: Iterable[str]) -> None:
    """Print what checks note; if they found a problem in any process, end the run in one message."""
    problems = []
    for said in checks:
        if said.startswith("note: "):
            run.accelerator.print(said)
        else:
            problems.append(said)
    if problems := list(dict.fromkeys(gather_object(problems))):
        message = "".join(f"\n- {problem}" for problem in problems)
        raise SystemExit(f"Cannot start:{message}" if run.accelerator.is_main_process else 1)


# ----------------------------------------------------------------------------------------------------- training loop


def choose_recomputation(run: Run, dataset: SampleDataset) -> float:
    """Recompute the activations of as few blocks as the memory demands: none, half, all; seconds of a micro-batch.

    Tried on a micro-batch of the largest shape, its gradients dropped, beside room for the optimizer's states. Which
    blocks recompute changes no bit of the result, so every process decides for itself.
    """
    largest = int(np.argmax([math.prod(example.shape) for example in dataset.order]))
    batch = default_collate([dataset[largest]] * run.args.train_batch_size)
    batch = send_to_device(batch, run.accelerator.device)
    states = [torch.empty_like(parameter) for parameter in run.lora_params * 2]
    blocks = len(run.transformer.transformer_blocks)
    for count in [blocks] if run.args.gradient_checkpointing else [0, blocks // 2, blocks]:
        recompute_blocks(run.transformer, count)
        try:
            for _ in range(2):  # the first pass loads kernels
                started = time.monotonic()
                training_loss(run.transformer, batch, run.weight_dtype, run.args).backward()
                states[0].sum().item()  # waits for the GPU
                seconds = time.monotonic() - started
            break
        except torch.OutOfMemoryError:
            if count == blocks:
                raise
        finally:
            run.transformer.zero_grad()
            diffusers.training_utils.free_memory()
    run.accelerator.print(f"{count} of {blocks} blocks recompute their activations, {peak_memory()}")
    return seconds


def train(run: Run, model: nn.Module, dataloader: DataLoader) -> None:
    """Every micro-batch of `dataloader` once, with checkpoints and previews; after a signal it saves and ends."""
    note_signals(run.signals)
    args, accelerator = run.args, run.accelerator
    loss_sum, skipped, is_main = torch.zeros((), device=accelerator.device), 0, accelerator.is_main_process
    progress = tqdm(None, "Training", run.max_train_steps, initial=run.global_step, unit="step")
    for batch in dataloader:
        with accelerator.accumulate(model):
            if args.lora_dropout:  # the one random thing that happens inside the model
                torch.manual_seed(run.seed + int(batch["sample_number"][0]))
            loss = training_loss(model, batch, run.weight_dtype, args)
            accelerator.backward(loss)
            loss_sum += loss.detach() / args.gradient_accumulation_steps
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.lora_params, args.max_grad_norm)
                values = torch.stack([norm.isfinite().float(), loss_sum, loss_sum.new_tensor(len(run.signals))])
                finite, loss_mean, signaled = accelerator.reduce(values, "mean").tolist()  # the step's only wait
                loss_sum.zero_()
                skipped = 0 if finite else skipped + 1
                if not finite:
                    run.optimizer.zero_grad()  # without gradients nothing is stepped; fp16's scale goes down
                if skipped == MAX_SKIPPED_STEPS:
                    raise SystemExit(NOT_FINITE if is_main else 1)
            run.optimizer.step()
            run.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        run.global_step += 1
        accelerator.log({"loss": loss_mean, "lr": run.lr_scheduler.get_last_lr()[0]}, step=run.global_step)
        run.lr_scheduler.step()  # not prepared by accelerate, which would step it once per process
        progress.set_postfix_str(f"loss {loss_mean:.4f}, {peak_memory()}")
        progress.update()
        if is_main and (signaled or run.global_step % args.checkpointing_steps == 0):
            save_checkpoint(run)
        if signaled:
            accelerator.wait_for_everyone()  # until the checkpoint is saved
            raise SystemExit(STOPPED.format(run.global_step) if is_main else 1)
        if is_main and run.global_step in run.preview_steps:
            make_previews(run)
    progress.close()


# -------------------------------------------------------------------------------------------------------------- main


def peak_memory() -> str:
    """Peak VRAM and RAM of this process so far; RAM counts mapped files, such as weights, too."""
    vram = f"peak VRAM {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB, " if torch.cuda.is_available() else ""
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # on Windows
        ram = psutil.Process().memory_info().peak_wset
    return f"{vram}peak RAM {ram / 2**30:.2f} GiB"


def make_accelerator(args: Namespace) -> Accelerator:
    """accelerate's engine, at the precision of --mixed_precision or else of the launcher."""
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir / args.logging_dir,
            dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),  # on a Mac: wrong data
            kwargs_handlers=[
                AutocastKwargs(enabled=False),  # all has the training dtype, the LoRA casts for itself
                DistributedDataParallelKwargs(broadcast_buffers=False),  # they never change
                InitProcessGroupKwargs(timeout=timedelta(hours=12)),  # the others wait for previews and the upload
            ],
        )
    except ValueError as error:  # a precision that this device or this torch cannot do, or an unknown tracker
        raise SystemExit(f"Cannot start: {error}") from error
    if "ACCELERATE_MIXED_PRECISION" in os.environ and accelerator.num_processes == 1:
        torch.set_num_threads(os.cpu_count() or 1)  # the launcher gives it one
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


@contextmanager
def explained_errors() -> Iterator[None]:
    """End with one message on what no check can foresee; what was saved before stays."""
    good = "What was saved is whole"
    try:
        yield
    except KeyboardInterrupt:  # while training, a signal saves a checkpoint first
        raise SystemExit(f"Interrupted. {good}: run the same command again.") from None
    except torch.OutOfMemoryError as error:
        cures = "--gradient_checkpointing, --train_batch_size 1, a lower --resolution, --quantize_base nf4"
        raise SystemExit(f"Out of GPU memory, {peak_memory()}. What helps, cheapest first: {cures}.") from error
    except Exception as error:
        if re.search("No space left|File too large|quota exceeded|PytorchStreamWriter|inline_container", str(error)):
            raise SystemExit(f"The disk is full ({error}). {good}: make room and resume.") from error
        if isinstance(error, OSError):
            raise SystemExit(f"{error}. {good}: mend that and run the same command again.") from error
        if "DataLoader worker (pid" in str(error):  # killed; what one raises says so itself
            raise SystemExit(f"{error} Usually RAM is short: use --dataloader_num_workers 0.") from error
        raise


@contextmanager
def owned_folder(run: Run) -> Iterator[None]:
    """Make the output folder for this run alone; the system frees the lock when a process dies."""
    folder, lock, problems = run.args.output_dir, FileLock(run.args.output_dir / ".lock", timeout=0), []
    for name in ("latents", "samples"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        if run.accelerator.is_main_process:
            lock.acquire()
    except Timeout:
        problems.append(f"Another training is writing to {folder}: wait for it, or use another --output_dir.")
    stop_at_problems(run, problems)
    try:
        for part in (".", "latents", "samples", "class_images-*") if lock.is_locked else ():
            for unfinished in folder.glob(f"{part}/.unfinished-*"):  # of a run that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
        yield
    finally:
        lock.release()


def note_signals(noted: list[int]) -> None:
    """Note signals for the loop, which ends after its step; a second one ends at once. nohup's choice is respected."""

    def note(number: int, _: object) -> None:
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in END_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)


def train_and_publish(run: Run) -> None:
    """Everything that costs time, on what the checks have found to be good."""
    args, accelerator = run.args, run.accelerator
    stop_at_problems(run, reach_hub(run, create=True))
    stop_at_problems(run, encode_latents(run, run.examples))
    diffusers.training_utils.free_memory()
    run.transformer = load_transformer(args, run.weight_dtype).to(accelerator.device)
    kinds = [run.examples]
    if args.with_prior_preservation:
        stop_at_problems(run, make_class_images(run))
        stop_at_problems(run, encode_latents(run, run.class_examples))
        kinds.append(run.class_examples)
    if not all(example.latents.exists() for kind in kinds for example in kind):
        raise SystemExit(f"The latents are not visible here: share --output_dir {args.output_dir}.")
    add_lora(run.transformer, args, run.seed)
    start_or_resume(run)
    length = run.max_train_steps * run.samples_per_step
    order = sample_order(kinds, run.seed, args.train_batch_size * accelerator.num_processes, length)
    dataset = SampleDataset(order, run.embeddings, run.noise_scheduler.sigmas, args, run.seed)
    left = range(run.global_step * run.samples_per_step, length)  # empty if the run is over
    steps = len(left) // run.samples_per_step
    accelerator.print(f"{steps} steps of {run.samples_per_step} samples, from step {run.global_step}")
    if steps > 0:
        seconds = choose_recomputation(run, dataset) * args.gradient_accumulation_steps
        accelerator.print(f"about {seconds:.2g} s a step, {steps * seconds / 60:.0f} minutes in all")
    accelerator.init_trackers("dreambooth-sd3-lora-miniature", config=run.settings)
    loading = {"num_workers": args.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
    dataloader = DataLoader(Subset(dataset, left), args.train_batch_size, **loading)
    model, run.optimizer, dataloader = accelerator.prepare(run.transformer, run.optimizer, dataloader)
    run.transformer = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # previews go on in weight_dtype
    if accelerator.is_main_process and args.validation_prompt and not run.global_step:
        for earlier in (args.output_dir / "samples").glob("step-*-prompt-*.png"):  # of another run
            earlier.unlink()
        make_previews(run)  # what the model makes of the prompts before it is trained
    train(run, model, dataloader)
    if accelerator.is_main_process:
        publish(run)
    accelerator.wait_for_everyone()  # a process that left would end the others' group


def publish(run: Run) -> None:
    """Write the LoRA, its samples and its card, say so, and upload them if that is wanted."""
    args, path = run.args, run.args.output_dir / LORA_NAME
    with appearing(path) as partial:
        write_lora(partial, run)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")
    previews = make_previews(run) if args.validation_prompt else []
    if run.signals:
        raise SystemExit(f"Interrupted. The LoRA is written: {path}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nothing is left to be saved
    write_model_card(run, previews)
    print(f"README.md and {len(previews)} samples beside it; {peak_memory()}, {time.monotonic() - STARTED:.0f} s")
    if args.push_to_hub:
        push_to_hub(run, previews)


def main(args: Namespace) -> None:
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Of a flag that accelerate passes to DDP, and of an optimizer without a step, since fp16 skips some.
    warnings.filterwarnings("ignore", r".*broadcast_buffers|Detected call of `lr_scheduler.step\(\)` before")
    run = Run(args, make_accelerator(args))
    checks = [check_machine, reach_hub, check_checkpoint, check_model, check_lora, check_embeddings, plan]
    with explained_errors(), redirect_stdout(Tolerant(sys.stdout)), redirect_stderr(Tolerant(sys.stderr)):
        stop_at_problems(run, itertools.chain.from_iterable(check(run) for check in checks))
        if not args.dry_run:
            with owned_folder(run):
                train_and_publish(run)
    run.accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
