"""Train a DreamBooth LoRA of Stable Diffusion 3 on a few pictures, from embeddings that compute_embeddings.py wrote.

    accelerate launch --quiet train_dreambooth_sd3_lora_miniature.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --instance_data_dir dog --data_df_path sample_embeddings.parquet --instance_prompt "a photo of sks dog" \
        --output_dir sd3-dreambooth-lora --mixed_precision fp16 --resolution 1024 --train_batch_size 1 \
        --gradient_accumulation_steps 4 --gradient_checkpointing --use_8bit_adam --max_train_steps 500 --seed 0

The order of work is the order of this file: the command line, a preflight that takes seconds, the VAE encodes every
picture once and leaves, the transformer gets its LoRA, the loop, previews, the LoRA file, its card, and the Hub.
No text encoder is ever loaded. Everything random about a training sample is a function of the seed and the sample's
number, so a resumed run continues exactly and any number of processes sees the same global batches.
"""

import argparse
import bisect
import fnmatch
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

logging.disable(logging.WARNING)  # the libraries have much to say at start-up; their errors still come through
warnings.simplefilter("ignore", FutureWarning)  # advice for who changes this file
import bitsandbytes as bnb
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import LoggerType, ProjectConfiguration, broadcast_object_list, gather_object
from diffusers import AutoencoderKL, BitsAndBytesConfig, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.image_processor import VaeImageProcessor
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    find_nearest_bucket,
    free_memory,
    generate_aspect_ratio_buckets,
    parse_buckets_string,
)
from diffusers.utils import make_image_grid
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
if importlib.util.find_spec("pillow_heif"):  # for the pictures of phones
    importlib.import_module("pillow_heif").register_heif_opener()
    IMAGE_SUFFIXES |= {".heic", ".heif"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # captions, as datasets' ImageFolder reads them
CROPS_PER_IMAGE = 4  # random cropping chooses among this many places, since latents are encoded ahead
LORA_NAME = "pytorch_lora_weights.safetensors"
MAX_SKIPPED_STEPS = 20  # fp16's loss scale starts too high and needs a few
NON_FINITE = (
    f"The gradients of {MAX_SKIPPED_STEPS} steps in a row were not finite; none was applied. Usual causes: a learning "
    "rate that is too high, fp16 where the model needs bf16, embeddings of another model. What {} holds is good. "
    "Start again with a lower --learning_rate or another --mixed_precision."
)
MAY_BE_ZERO = ["seed", "lr_warmup_steps", "num_validation_images", "dataloader_num_workers", "precondition_outputs"]
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a resumed run must share with the one that it continues, besides the pictures and the number of samples a step.
SETTINGS_THAT_MATTER = [
    "pretrained_model_name_or_path", "revision", "resolution", "aspect_ratio_buckets", "center_crop", "random_flip",
    "rank", "lora_alpha", "lora_dropout", "lora_layers", "lora_blocks", "weighting_scheme", "logit_mean", "logit_std",
    "mode_scale", "precondition_outputs", "learning_rate", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles",
    "lr_power", "scale_lr", "step_rules", "optimizer", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "max_grad_norm", "seed", "with_prior_preservation", "class_prompt", "prior_loss_weight", "caption_dropout",
    "alpha_mask", "pretrained_lora_path", "quantize_base",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The reference's flags keep their names and meaning; the others are named as in diffusers' training scripts."""
    about = {"description": __doc__.splitlines()[0], "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(allow_abbrev=False, **about)
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True,
        help="SD3 or SD3.5: Hub repository, or folder in diffusers' layout")
    add("--revision", help="branch, tag or commit of the repository; unset: its main branch")
    add("--variant", help="variant of the weight files, such as fp16; unset: the plain files")
    add("--cache_dir", help="where downloads are kept; unset: the Hugging Face cache")
    add = parser.add_argument_group("data").add_argument
    add("--instance_data_dir", type=Path, required=True, help="folder with the pictures of the subject")
    add("--data_df_path", type=Path, required=True, help="Parquet file that compute_embeddings.py wrote")
    add("--instance_prompt", required=True, help="prompt of the pictures, such as 'a photo of sks dog'")
    add("--resolution", type=int, default=512, help="side of the training square in pixels, a multiple of 16")
    add("--aspect_ratio_buckets", nargs="?", const="auto", metavar="H,W;H,W",
        help="shapes to train on instead of the square; without a value: common ones of the square's area")
    add("--center_crop", action="store_true", help="crop the middle of a picture instead of a random part")
    add("--random_flip", action="store_true", help="mirror pictures at random")
    add("--caption_dropout", type=float, default=0.0, help="probability of training a sample without its prompt")
    add("--alpha_mask", action="store_true",
        help="weight the loss by the pictures' alpha channels or NAME.mask.png, so that backgrounds are not learnt")
    add("--max_sequence_length", type=int, help="T5 tokens that the embeddings must have; unset: what they have")
    add("--dataloader_num_workers", type=int, default=0, help="worker processes; 0: read in the main process")
    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", action="store_true",
        help="let every second sample be a picture of the subject's class, so that the class stays as it is")
    add("--class_prompt", help="prompt of the class, such as 'a photo of a dog'")
    add("--class_data_dir", type=Path, help="folder of class pictures; unset: one under --output_dir")
    add("--num_class_images", type=int, default=100, help="class pictures; those that are missing are generated")
    add("--sample_batch_size", type=int, default=4, help="class pictures to generate at once")
    add("--prior_loss_weight", type=float, default=1.0, help="what a class picture counts in the loss")
    add = parser.add_argument_group("LoRA").add_argument
    add("--pretrained_lora_path", help="LoRA to start from, a file, folder or repository; unset: a new one")
    add("--rank", type=int, default=4, help="rank of the update matrices")
    add("--lora_alpha", type=float, help="strength: updates are scaled by alpha / rank; unset: the rank")
    add("--lora_dropout", type=float, default=0.0, help="dropout probability on the way into the LoRA")
    add("--lora_layers", default="to_k,to_q,to_v,to_out.0",
        help="linear layers to train, by the ends of their names; patterns such as attn2.* or ff.* too")
    add("--lora_blocks", help="transformer blocks to train, such as 12,13,14; unset: all")
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", type=Path, default=Path("sd3-dreambooth-lora"), help="folder for everything that is written")
    add("--dry_run", action="store_true", help="check everything, say what would be done and what it takes, and stop")
    add("--seed", type=int, help="makes the run repeatable; unset: one is drawn and printed")
    add("--train_batch_size", type=int, default=4, help="pictures per device and forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes per optimizer step")
    add("--num_train_epochs", type=int, default=1, help="passes over the pictures, unless --max_train_steps is given")
    add("--max_train_steps", type=int, help="optimizer steps; unset: from --num_train_epochs")
    add("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply the learning rate by the pictures per optimizer step")
    schedules = [schedule.value for schedule in SchedulerType]
    add("--lr_scheduler", default="constant", choices=schedules, help="course of the learning rate")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps of warm-up, where the schedule has one")
    add("--lr_num_cycles", type=int, default=1, help="restarts of cosine_with_restarts")
    add("--lr_power", type=float, default=1.0, help="power of polynomial")
    add("--step_rules", help="factors of piecewise_constant and the steps they end at, such as 1:100,0.1:200,0.01")
    schemes = ["logit_normal", "sigma_sqrt", "mode", "cosmap", "none"]
    add("--weighting_scheme", default="logit_normal", choices=schemes, help="which noise levels count how much")
    add("--logit_mean", type=float, default=0.0, help="mean of logit_normal")
    add("--logit_std", type=float, default=1.0, help="standard deviation of logit_normal")
    add("--mode_scale", type=float, default=1.29, help="scale of mode")
    add("--precondition_outputs", type=int, nargs="?", const=1, default=0, choices=[0, 1],
        help="1: the reference's loss on the clean latents, sigma² times the velocity loss")
    add("--optimizer", type=str.lower, default="adamw", choices=["adamw", "adamw_8bit", "paged_adamw_8bit"],
        help="AdamW; with states in 8 bit, from bitsandbytes; or with 8-bit states that a full GPU moves to RAM")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw_8bit")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=float, default=1e-4, help="weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision; unset: what accelerate is set to")
    add("--quantize_base", choices=["nf4", "int8"], help="4 or 8 bit for the frozen weights; needs a GPU")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, 1.4 times the FLOP")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere GPUs and later")
    add("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"], help=argparse.SUPPRESS)
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    add = parser.add_argument_group("previews").add_argument
    add("--validation_prompt", nargs="+", default=[], metavar="PROMPT", help="prompts of previews")
    add("--negative_prompt", default="", help="what previews are guided away from")
    add("--num_validation_images", type=int, default=4, help="pictures per prompt")
    add("--validation_epochs", type=int, default=50, help="preview after every so many passes over the pictures")
    add("--validation_steps", type=int, help="preview after every so many optimizer steps instead")
    add("--num_inference_steps", type=int, default=28, help="denoising steps of a preview")
    add("--guidance_scale", type=float, default=7.0, help="classifier-free guidance of a preview")
    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--checkpointing_steps", type=int, default=100, help="save a checkpoint every so many optimizer steps")
    add("--checkpoints_total_limit", type=int, help="how many checkpoints to keep; unset: all")
    add("--resume_from_checkpoint", metavar="latest|PATH", help="continue from the newest or from this one")
    trackers = ["none", *(str(tracker.value) for tracker in LoggerType)]
    add("--report_to", default="tensorboard", choices=trackers, help="where losses and previews are logged")
    add("--logging_dir", default="logs", help="folder of TensorBoard's files, under --output_dir")
    add = parser.add_argument_group("Hub").add_argument
    add("--push_to_hub", action="store_true", help="upload the LoRA, its card and its samples at the end")
    add("--hub_private_repo", action="store_true", help="make the repository private, if it is new")
    add("--hub_model_id", help="repository to upload to; unset: the name of --output_dir")
    add("--hub_token", help="token to use; `hf auth login` or HF_TOKEN is safer: command lines are seen and logged")
    args = parser.parse_args(argv)

    problems = []
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{name} {value} is not a finite number")
        elif type(value) in (int, float) and name not in ("logit_mean", "mode_scale", "local_rank"):
            least = 1 if type(value) is int and name not in MAY_BE_ZERO else 0
            if value < least:
                problems.append(f"--{name} {value} is below {least}")
    if args.resolution % 16:
        problems.append(f"--resolution {args.resolution} is not a multiple of 16")
    try:
        args.buckets = training_shapes(args.resolution, args.aspect_ratio_buckets)
    except ValueError as error:
        problems.append(f"--aspect_ratio_buckets {args.aspect_ratio_buckets}: {error}")
    if (args.lr_scheduler == "piecewise_constant") != bool(args.step_rules):
        problems.append("--lr_scheduler piecewise_constant and --step_rules need each other")
    elif args.step_rules and not re.fullmatch(r"(\d+(\.\d+)?:\d+,)*\d+(\.\d+)?", args.step_rules):
        problems.append(f"--step_rules {args.step_rules} is not a list such as 1:100,0.1:200,0.01")
    if args.hub_token and args.report_to in ("wandb", "all"):
        problems.append("--hub_token with --report_to wandb could expose the token; use `hf auth login` instead")
    for name in ("lora_dropout", "caption_dropout"):
        if getattr(args, name) >= 1:
            problems.append(f"--{name} {getattr(args, name)} is not below 1")
    if args.lora_blocks and not all(block.strip().isdigit() for block in args.lora_blocks.split(",")):
        problems.append(f"--lora_blocks {args.lora_blocks} is not a list of numbers such as 12,13,14")
    if args.with_prior_preservation and not args.class_prompt:
        problems.append("--with_prior_preservation needs --class_prompt, such as 'a photo of a dog'")
    if problems:
        parser.error("\n  ".join(problems))
    if args.use_8bit_adam and args.optimizer == "adamw":
        args.optimizer = "adamw_8bit"
    made_by = [args.pretrained_model_name_or_path, args.revision, args.class_prompt, args.resolution]
    args.class_data_dir = args.class_data_dir or args.output_dir / f"class_images-{digest(made_by)}"
    args.validation_prompt = args.validation_prompt if args.num_validation_images else []
    return args


# ------------------------------------------------------------------------------------------------------------ data


def find_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures in a folder, sorted by name, and files that are neither pictures nor belong to one."""
    files = sorted(path for path in folder.iterdir() if not path.is_dir() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and not path.stem.endswith(".mask")]
    ours = {*images, *(folder / name for name in METADATA)}
    ours |= {image.with_suffix(suffix) for image in images for suffix in (".txt", ".mask.png")}
    return images, [path for path in files if path not in ours]


def passed_over_note(passed_over: list[Path]) -> str:
    """One line that names the files that are no pictures, for whoever wonders where a picture went."""
    hint = " (for HEIC: pip install pillow-heif)" if any("hei" in path.suffix.lower() for path in passed_over) else ""
    return f"passed over, not a picture: {', '.join(path.name for path in passed_over)}{hint}"


def unreadable_images(images: list[Path]) -> dict[Path, str]:
    """What is wrong with every picture whose header cannot be read; pixels are read when they are encoded."""
    problems = {}
    for path in images:
        try:
            Image.open(path).close()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            problems[path] = f"{path} is not a readable picture ({error}). Repair it or take it out of the folder."
    return problems


def hash_image(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex: how a row of the Parquet file names a picture."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_image(path: Path) -> Image.Image:
    """An upright RGB picture; transparency becomes white."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert would cut off
        image = Image.fromarray((np.asarray(image) / 256).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it has floating-point pixels; save it with 8 or 16 bits")
    return image.convert("RGB")


def has_mask(path: Path) -> bool:
    """Whether open_mask will find one, by the picture's header."""
    return path.with_suffix(".mask.png").exists() or Image.open(path).has_transparency_data


def open_mask(path: Path) -> Image.Image | None:
    """What --alpha_mask makes of a picture: NAME.mask.png, or else its alpha channel, if it has either."""
    if not has_mask(path):
        return None
    if (mask_path := path.with_suffix(".mask.png")).exists():
        return ImageOps.exif_transpose(Image.open(mask_path)).convert("L")
    return ImageOps.exif_transpose(Image.open(path)).convert("RGBA").getchannel("A")


def training_shapes(resolution: int, aspect_ratio_buckets: str | None) -> list[tuple[int, int]]:
    """The shapes that pictures are trained in, (height, width) in pixels: the square, or --aspect_ratio_buckets."""
    if aspect_ratio_buckets == "auto":
        return generate_aspect_ratio_buckets(resolution)
    if aspect_ratio_buckets is None:
        return [(resolution, resolution)]
    with warnings.catch_warnings(action="ignore"):  # what it warns of is an error here
        shapes = parse_buckets_string(aspect_ratio_buckets)
    if any(side % 16 for shape in shapes for side in shape):
        raise ValueError("not all sides are multiples of 16")
    return shapes


def crop_boxes(
    size: tuple[int, int], shape: tuple[int, int], center_crop: bool
) -> list[tuple[float, float, float, float]]:
    """What to cut out of a picture of this (width, height) for the shape (height, width), as (left, top, right,
    bottom) in its pixels: the middle, or several places along the side that is too long."""
    scale = min(size[0] / shape[1], size[1] / shape[0])
    width, height = shape[1] * scale, shape[0] * scale
    slack = (size[0] - width, size[1] - height)
    varies = not center_crop and max(slack) / scale >= 8  # a latent pixel is 8 pixels wide
    places = np.linspace(0, 1, CROPS_PER_IMAGE) if varies else [0.5]
    corners = [(slack[0] * place, slack[1] * place) for place in places]
    return [(left, top, left + width, top + height) for left, top in corners]


class PromptEmbeddings:
    """Prompt embeddings by prompt, read from the Parquet file one row at a time.

    Files of the reference's script have no prompts but one row per picture; there the picture's hash is the name.
    """

    def __init__(self, path: Path, joint_attention_dim: int) -> None:
        self.path, self.joint_attention_dim = path, joint_attention_dim
        self.file = pq.ParquetFile(path, memory_map=True)
        names = self.file.schema_arrow.names
        self.has_prompts = "prompt" in names
        self.about = json.loads((self.file.schema_arrow.metadata or {}).get(b"sd3_embeddings", "{}"))
        row_counts = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.first_rows = [0, *itertools.accumulate(row_counts)]
        index = self.file.read(["prompt", "image_hashes"] if self.has_prompts else ["image_hash"]).to_pydict()
        prompts = index["prompt"] if self.has_prompts else index["image_hash"]
        hashes = index["image_hashes"] if self.has_prompts else [[image_hash] for image_hash in prompts]
        self.row_of_prompt = {prompt: row for row, prompt in enumerate(prompts)}
        self.prompt_of_image = {one: prompt for prompt, many in zip(prompts, hashes, strict=True) for one in many}

    def __reduce__(self) -> tuple:
        return PromptEmbeddings, (self.path, self.joint_attention_dim)  # worker processes open the file themselves

    @functools.lru_cache(maxsize=64)  # noqa: B019 - the object lives as long as the program
    def __getitem__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """prompt_embeds (L, D) and pooled_prompt_embeds (P,), fp16 as stored, or fp32 of the reference's doubles."""
        row = self.row_of_prompt[prompt]
        group = bisect.bisect_right(self.first_rows, row) - 1
        table = self.file.read_row_group(group, ["prompt_embeds", "pooled_prompt_embeds"], use_threads=False)
        table = table.slice(row - self.first_rows[group], 1)
        if self.has_prompts:
            arrays = [column.combine_chunks().to_numpy_ndarray()[0].copy() for column in table.columns]
        else:
            arrays = [column[0].values.to_numpy().astype(np.float32) for column in table.columns]
            arrays[0] = arrays[0].reshape(-1, self.joint_attention_dim)
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError(f"the embeddings of {prompt!r} are not finite")
        return tuple(map(torch.from_numpy, arrays))


LATENTS_SCHEMA = pa.schema([
    ("height", pa.int32()), ("width", pa.int32()),
    ("mean", pa.list_(pa.float16())), ("std", pa.list_(pa.float16())),  # the VAE's posterior, (16 · height · width,)
    ("mask", pa.list_(pa.float16())),  # what each latent pixel counts, (height · width,), or null: all of them 1
])  # fmt: skip


def model_file(name: str, *, subfolder: str, filename: str, **source: str | None) -> Path:
    """One file of the model: in its folder, or downloaded from the Hub."""
    path = Path(name, subfolder, filename)
    return path if path.exists() else Path(hf_hub_download(name, filename, subfolder=subfolder, **source))


def latents_key(args: argparse.Namespace, hash_of_image: dict[Path, str]) -> str:
    """Everything that the latents depend on; they are encoded anew when it changes."""
    filename = f"diffusion_pytorch_model{f'.{args.variant}' if args.variant else ''}.safetensors"
    vae_hash = hash_image(load_part(model_file, args, "vae", filename=filename, token=args.hub_token))
    masks = [path.with_suffix(".mask.png") for path in hash_of_image] if args.alpha_mask else None
    masks = masks and [hash_image(path) if path.exists() else None for path in masks]
    how = [vae_hash, args.buckets, args.center_crop, args.random_flip, CROPS_PER_IMAGE]
    return json.dumps([*how, list(hash_of_image.values()), masks])


def latents_are_current(path: Path, key: str) -> bool:
    """Whether an earlier run left these very latents; a file that was cut short has no footer and does not open."""
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).schema.metadata[b"key"].decode() == key
    except (OSError, pa.ArrowInvalid, TypeError, KeyError):
        return False


def load_part(load: Callable, args: argparse.Namespace, subfolder: str, **kwargs: object) -> object:
    """What `load` (a from_pretrained or load_config) gives for one part of the pipeline; exits if it cannot be had."""
    name, source = args.pretrained_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    try:
        return load(name, subfolder=subfolder, **source, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error)
        try:  # most loaders say of a gated repository that there is none; the Hub says what is the matter
            HfApi(token=kwargs.get("token")).auth_check(name)
        except (OSError, ValueError) as refusal:
            reason = str(refusal) if isinstance(refusal, HfHubHTTPError) else reason
        if name.count("/") != 1 and not Path(name).is_dir():
            reason = "it is not a folder, and not the name of a repository"
        raise SystemExit(
            f"Cannot load {subfolder} of {name}: {reason.strip().splitlines()[0]}\n"
            "A folder needs diffusers' layout. For a gated repository, accept the licence on "
            f"https://huggingface.co/{name} and run: hf auth login"
        ) from error


def load_vae(args: argparse.Namespace, device: torch.device, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The VAE, in fp32 for what is trained on, as `force_upcast` in its config asks."""
    kwargs = {"variant": args.variant, "token": args.hub_token, "dtype": dtype, "use_safetensors": True}
    return load_part(AutoencoderKL.from_pretrained, args, "vae", **kwargs).to(device)


def load_scheduler(args: argparse.Namespace) -> FlowMatchEulerDiscreteScheduler:
    """The noise levels of the model, with its shift."""
    return load_part(FlowMatchEulerDiscreteScheduler.from_pretrained, args, "scheduler", token=args.hub_token)


@torch.inference_mode()
def encode_image(
    vae: AutoencoderKL, image: Image.Image, mask: Image.Image | None, args: argparse.Namespace
) -> pa.RecordBatch:
    """The posterior of one picture's latents, normalised as SD3 wants them: a row per crop and mirror image."""
    rows, shape = [], args.buckets[find_nearest_bucket(image.height, image.width, args.buckets)]
    for box in crop_boxes(image.size, shape, args.center_crop):
        for turn in [Image.Image.copy, ImageOps.mirror] if args.random_flip else [Image.Image.copy]:
            picture = turn(image.resize(shape[::-1], Image.Resampling.LANCZOS, box))
            pixel_values = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W)
            posterior = vae.encode(pixel_values.to(vae.device)).latent_dist  # of (1, 16, H/8, W/8)
            mean = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
            std = posterior.std * vae.config.scaling_factor
            height, width = mean.shape[-2:]
            flat = [moment.flatten().half().cpu().numpy() for moment in (mean, std)]
            weights = mask and turn(mask.resize((width, height), Image.Resampling.BOX, box))
            weights = weights and np.float16(weights).flatten() / 255
            rows.append([height, width, *flat, weights])
    columns = zip(zip(*rows, strict=True), LATENTS_SCHEMA, strict=True)
    columns = [pa.array(values, field.type) for values, field in columns]
    return pa.RecordBatch.from_arrays(columns, schema=LATENTS_SCHEMA)


def write_latents(path: Path, key: str, images: list[Path], args: argparse.Namespace, device: torch.device) -> None:
    """Encode every picture, in fp32 and untiled, into an Arrow file with one record batch per picture."""
    variants = (2 if args.random_flip else 1) * (1 if args.center_crop else CROPS_PER_IMAGE)
    size = max(height * width for height, width in args.buckets)  # 64 bytes for 8 x 8 pixels: 16 means and deviations
    check_disk(path.parent, size * variants * len(images), "Latents", "use --center_crop or a lower --resolution")
    vae = load_vae(args, device)
    del vae.decoder  # 0.2 GB that encoding does not need
    partial, unreadable = path.with_name(f"{path.name}.partial"), []
    with open(partial, "wb") as file, pa.ipc.new_file(file, LATENTS_SCHEMA.with_metadata({"key": key})) as writer:
        for image_path in tqdm(images, desc="Encoding pictures", unit="picture"):
            try:
                image, mask = open_image(image_path), open_mask(image_path) if args.alpha_mask else None
                if mask and mask.size != image.size:
                    raise ValueError(f"its mask has {mask.size} pixels, not {image.size}")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                unreadable.append(f"{image_path} ({error})")
            else:
                writer.write_batch(encode_image(vae, image, mask, args))
    if unreadable:
        partial.unlink()
        raise SystemExit(f"Repair these pictures, or take them out of the folder: {', '.join(unreadable)}")
    sync_and_rename(partial, path)


@functools.lru_cache(maxsize=1)
def open_latents(path: Path) -> pa.ipc.RecordBatchFileReader:
    """The pictures' latents, mapped into memory; once in every process."""
    return pa.ipc.open_file(pa.memory_map(str(path)))


def latent_shapes(path: Path) -> list[tuple[int, int]]:
    """Height and width of every picture's latents."""
    latents = open_latents(path)
    first_rows = (latents.get_batch(i).slice(0, 1) for i in range(latents.num_record_batches))
    return [(row["height"][0].as_py(), row["width"][0].as_py()) for row in first_rows]


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers and on nothing else."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


@functools.lru_cache(maxsize=16)
def permutation(count: int, *numbers: int) -> Tensor:
    """The numbers below `count` in an order that depends on `numbers`; samples of the same epoch share it."""
    return torch.randperm(count, generator=seeded_generator(*numbers))


def picture_of_sample(buckets: list[list[int]], seed: int, group: int, place: int, group_size: int) -> int:
    """Which picture is at a place of a group of samples that all have one shape; a bucket holds the pictures of one.

    Every bucket has as many turns as pictures, in an order that is drawn for each round of turns. Its pictures follow
    each other in epochs: every one once, in an order that is drawn for each epoch.
    """
    owners = torch.repeat_interleave(torch.tensor(list(map(len, buckets))))
    turn_round, turn = divmod(group, len(owners))
    turns = owners[permutation(len(owners), seed, 0, turn_round)[: turn + 1]]
    bucket = int(turns[-1])
    pictures = buckets[bucket]
    groups_before = turn_round * len(pictures) + int((turns == bucket).sum()) - 1
    epoch, position = divmod(groups_before * group_size + place, len(pictures))
    return pictures[permutation(len(pictures), seed, 0, bucket, epoch)[position]]


class SampleDataset(Dataset):
    """Training samples by number; every random choice about one is a function of (seed, sample number).

    The subject and its class take turns by the sample, or, if the pictures have several shapes, by the micro-batch.
    """

    def __init__(
        self, args: argparse.Namespace, latents_path: Path, embeddings: PromptEmbeddings, prompts: list[str],
        sigmas: Tensor, sample_numbers: range, class_images: int = 0, micro_batch: int = 1,
    ) -> None:  # fmt: skip
        self.seed, self.latents_path, self.embeddings = args.seed, latents_path, embeddings
        self.sigmas, self.sample_numbers = sigmas, sample_numbers
        shapes = latent_shapes(latents_path)
        self.group_size = micro_batch if len(set(shapes)) > 1 else 1
        self.captions = [*prompts, *[args.class_prompt] * class_images]  # by a picture's number in the latents' file
        kinds = [(1.0, range(len(prompts))), (args.prior_loss_weight, range(len(prompts), len(self.captions)))]
        self.kinds = []  # of pictures: their weight, and their numbers by shape
        for loss_weight, pictures in kinds[: 2 if class_images else 1]:
            buckets: dict[tuple[int, int], list[int]] = {}
            for picture in pictures:
                buckets.setdefault(shapes[picture], []).append(picture)
            self.kinds.append((loss_weight, list(buckets.values())))
        self.caption_dropout = args.caption_dropout
        names = ("weighting_scheme", "logit_mean", "logit_std", "mode_scale")
        self.density = {name: getattr(args, name) for name in names}

    def __len__(self) -> int:
        return len(self.sample_numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        """Latents and noise (16, H/8, W/8), sigma (), the prompt's embeddings, the loss's weight () and mask."""
        sample_number = self.sample_numbers[index]
        group, place = divmod(sample_number, self.group_size)
        group, kind = divmod(group, len(self.kinds))
        loss_weight, buckets = self.kinds[kind]
        image = picture_of_sample(buckets, self.seed, group, place, self.group_size)
        generator = seeded_generator(self.seed, 1, sample_number)
        variants = open_latents(self.latents_path).get_batch(image)
        row = variants.slice(int(torch.randint(variants.num_rows, (), generator=generator)), 1)
        height, width = row["height"][0].as_py(), row["width"][0].as_py()
        mean, std = (torch.from_numpy(row[name].flatten().to_numpy().astype(np.float32)) for name in ("mean", "std"))
        latents = (mean + std * torch.randn(mean.shape, generator=generator)).view(-1, height, width)
        mask = torch.ones(1, height, width)
        if row["mask"][0].is_valid:
            mask = torch.from_numpy(row["mask"].flatten().to_numpy().astype(np.float32)).view(1, height, width)
        density = compute_density_for_timestep_sampling(batch_size=1, generator=generator, **self.density)[0]
        step = int(density * len(self.sigmas))
        noise = torch.randn(latents.shape, generator=generator)
        dropped = self.caption_dropout and torch.rand((), generator=generator) < self.caption_dropout
        prompt_embeds, pooled_prompt_embeds = self.embeddings["" if dropped else self.captions[image]]
        return {
            "sample_number": sample_number, "latents": latents, "mask": mask, "prompt_embeds": prompt_embeds,
            "noise": noise, "pooled_prompt_embeds": pooled_prompt_embeds,
            "sigma": self.sigmas[min(max(step, 0), len(self.sigmas) - 1)],  # `mode` can reach one past the end
            "loss_weight": torch.tensor(loss_weight),
        }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- preflight


def embeddings_command(args: argparse.Namespace, about: dict) -> str:
    """The command line that writes the embeddings this run needs."""
    command = ["python", "compute_embeddings.py", "--prompt", args.instance_prompt]
    command += ["--local_data_dir", args.instance_data_dir, "--output_path", args.data_df_path.with_suffix(".parquet")]
    command += ["--pretrained_model_name_or_path", args.pretrained_model_name_or_path]
    if args.with_prior_preservation:
        command += ["--class_prompt", args.class_prompt]
    if args.validation_prompt:
        command += ["--validation_prompt", *args.validation_prompt]
    for name in ("variant", "revision", "cache_dir"):
        command += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    if args.negative_prompt:
        command += ["--negative_prompt", args.negative_prompt]
    if length := args.max_sequence_length or about.get("max_sequence_length"):
        command += ["--max_sequence_length", length]
    command += {"exact": ["--t5_precision", "exact"], "none": ["--no_t5"]}.get(about.get("t5"), [])
    return shlex.join(map(str, command))


def check_images(args: argparse.Namespace, accelerator: Accelerator, problems: list[str]) -> list[Path]:
    """The pictures to train on; only their headers are read here, their pixels when they are encoded."""
    folder = args.instance_data_dir
    try:
        images, passed_over = find_images(folder) if folder.is_dir() else ([], [])
    except OSError as error:
        problems.append(f"--instance_data_dir {folder} cannot be read: {error.strerror}.")
        return []
    if passed_over:
        accelerator.print(passed_over_note(passed_over))
    if not images:
        what = f"has no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})" if folder.is_dir() else "is not a folder"
        problems.append(f"--instance_data_dir {folder} {what}.")
    unreadable = unreadable_images(images)
    problems += unreadable.values()
    images = [path for path in images if path not in unreadable]
    if images and args.alpha_mask and not any(map(has_mask, images)):
        problems.append(f"--alpha_mask: no picture in {folder} has an alpha channel or a NAME.mask.png.")
    return images


def check_weights(args: argparse.Namespace, problems: list[str]) -> None:
    """Whether the weight files of a model in a folder are there and whole; the Hub's are checked by their download."""
    model = Path(args.pretrained_model_name_or_path)
    for part in ("transformer", "vae") if model.is_dir() else ():
        files = sorted((model / part).glob(f"*.{args.variant}*.safetensors" if args.variant else "*.safetensors"))
        try:
            if not files:
                raise FileNotFoundError("there are none")
            for file in files:
                with safe_open(file, "np"):  # a file that was cut short does not open
                    pass
        except (OSError, SafetensorError) as error:
            problems.append(f"The weights in {model / part} cannot be read: {error}. Download them again.")


def check_model(args: argparse.Namespace, problems: list[str]) -> dict:
    """The transformer's config, or {} if it cannot be had."""
    try:
        config = load_part(SD3Transformer2DModel.load_config, args, "transformer", token=args.hub_token)
    except SystemExit as message:
        problems.append(str(message))
        return {}
    largest = config["pos_embed_max_size"] * config["patch_size"] * 8  # the VAE makes one latent of 8 x 8 pixels
    side = max(map(max, args.buckets))
    if side > largest:
        problems.append(f"--resolution {args.resolution} has a side of {side} pixels, above the model's {largest}.")
    check_weights(args, problems)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    for layer in args.lora_layers.split(","):
        if not lora_targets(transformer, layer, None):
            problems.append(f"--lora_layers: the transformer has no linear layer {layer}.")
    if max(int(block) for block in (args.lora_blocks or "0").split(",")) >= config["num_layers"]:
        problems.append(f"--lora_blocks {args.lora_blocks}: the last block is {config['num_layers'] - 1}.")
    if args.pretrained_lora_path and lora_targets(transformer, args.lora_layers, args.lora_blocks):
        add_lora(transformer, args)
        try:
            read_lora(transformer, args.pretrained_lora_path, args.hub_token)
        except SystemExit as message:
            problems.append(str(message))
    return config


def check_embeddings(
    args: argparse.Namespace, hash_of_image: dict[Path, str], config: dict, problems: list[str]
) -> PromptEmbeddings | None:
    """The embeddings, if they can be read; what they lack is reported with the command that mends it."""
    path = args.data_df_path
    try:
        embeddings = PromptEmbeddings(path, config.get("joint_attention_dim", 1))
        prompt_embeds, pooled_prompt_embeds = embeddings[next(iter(embeddings.row_of_prompt))]
        for prompt in [args.instance_prompt, args.class_prompt, *args.validation_prompt, args.negative_prompt]:
            _ = embeddings[prompt] if prompt in embeddings.row_of_prompt else None
    except (OSError, pa.ArrowException, KeyError, StopIteration, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problems.append(f"--data_df_path {path} cannot be read ({reason}). Run: {embeddings_command(args, {})}")
        return None
    cure = f"Run: {embeddings_command(args, embeddings.about)}"
    length = embeddings.about.get("max_sequence_length", 77)
    widths = [prompt_embeds.shape[-1], len(pooled_prompt_embeds)]
    if config and widths != [config["joint_attention_dim"], config["pooled_projection_dim"]]:
        problems.append(f"{path} was computed with another kind of model. {cure}")
    if args.max_sequence_length not in (None, length):
        problems.append(f"{path} has {length} T5 tokens, not --max_sequence_length {args.max_sequence_length}. {cure}")
    lacking = [image.name for image, one in hash_of_image.items() if one not in embeddings.prompt_of_image]
    if lacking:
        what = f"{len(lacking)} of {len(hash_of_image)} pictures in {args.instance_data_dir}"
        problems.append(f"{what} have no embeddings in {path} (first: {lacking[0]}). {cure}")
    wanted = [args.instance_prompt] if embeddings.has_prompts else []
    wanted += [args.class_prompt, ""] if args.with_prior_preservation else []
    wanted += [""] if args.caption_dropout else []
    wanted += [*args.validation_prompt, args.negative_prompt] if args.validation_prompt else []
    unknown = [prompt for prompt in dict.fromkeys(wanted) if prompt not in embeddings.row_of_prompt]
    if unknown:
        quotes = " Prompts of several words need quotes." if len(unknown) > 2 and " " not in "".join(unknown) else ""
        problems.append(f"{path} has no embeddings of {', '.join(map(repr, unknown))}.{quotes} {cure}")
    captions = {embeddings.prompt_of_image.get(one) for one in hash_of_image.values()} | {*unknown}
    captions |= {embeddings.about.get("prompt")}  # every picture may have a caption of its own
    if embeddings.has_prompts and hash_of_image and not lacking and args.instance_prompt not in captions:
        problems.append(f"In {path} --instance_prompt {args.instance_prompt!r} captions none of the pictures. {cure}")
    return embeddings


def seen_by_all(folder: Path, accelerator: Accelerator) -> bool:
    """Whether a file of the main process is seen by this one, which may run on another machine."""
    probe = folder / f".seen-{broadcast_object_list([os.getpid()])[0]}"
    if accelerator.is_main_process:
        with suppress(OSError):  # a folder that cannot be written is reported elsewhere
            probe.touch()
    accelerator.wait_for_everyone()
    seen = probe.exists()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with suppress(OSError):
            probe.unlink()
    return seen


def check_environment(args: argparse.Namespace, accelerator: Accelerator, problems: list[str]) -> None:
    """Whether this machine can do it: the precision, the tracker, writing the output folder, reaching the Hub."""
    if accelerator.mixed_precision not in WEIGHT_DTYPES:
        problems.append(f"Precision {accelerator.mixed_precision} is not available: use fp16 or bf16.")
    no_bf16 = accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator.mixed_precision == "bf16" and no_bf16:
        problems.append(f"{torch.cuda.get_device_name()} only emulates bf16; use --mixed_precision fp16.")
    if args.quantize_base and accelerator.device.type != "cuda":
        problems.append("--quantize_base needs a GPU.")
    if args.report_to not in ("none", "all") and not accelerator.log_with:
        problems.append(f"--report_to {args.report_to} is not installed. Run: pip install {args.report_to}")
    folders = {"output_dir": args.output_dir}
    folders |= {"class_data_dir": args.class_data_dir} if args.with_prior_preservation else {}
    folders |= {"output_dir: its folder": args.output_dir / "samples"} if args.validation_prompt else {}
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            problems.append(f"--{name} {folder} cannot be written: {error.strerror}.")
    if not seen_by_all(args.output_dir, accelerator) and not problems:
        problems.append(f"--output_dir {args.output_dir} is not the same folder on all machines: share it.")
    if args.push_to_hub and accelerator.is_main_process:
        try:
            api = HfApi(token=args.hub_token)
            api.whoami()
            if not problems and not args.dry_run:  # the repository is made when nothing else is in the way
                name = args.hub_model_id or args.output_dir.resolve().name
                args.hub_model_id = api.create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            problems.append(f"--push_to_hub: {reason}\n  With a token that may write, run: hf auth login")


def find_checkpoint(
    args: argparse.Namespace, accelerator: Accelerator, problems: list[str]
) -> tuple[Path | None, dict]:
    """The checkpoint to resume from, if any, and its trainer_state.json."""
    wanted, there = args.resume_from_checkpoint, list_checkpoints(args.output_dir)
    if not wanted:
        return None, {}
    for checkpoint in reversed(there) if wanted == "latest" else [Path(wanted), args.output_dir / wanted]:
        if state := read_checkpoint(checkpoint):
            return checkpoint, state
        if checkpoint.exists():
            accelerator.print(f"passed over, not a whole checkpoint: {checkpoint}")
    if wanted == "latest":
        accelerator.print(f"no checkpoint in {args.output_dir} yet: starting from the beginning")
    else:
        names = ", ".join(path.name for path in there) or "none"
        problems.append(f"--resume_from_checkpoint {wanted} is not a checkpoint. {args.output_dir} has: {names}.")
    return None, {}


def hash_class_images(args: argparse.Namespace) -> dict[Path, str]:
    """The pictures of prior preservation that are there, with their hashes."""
    images = find_images(args.class_data_dir)[0] if args.class_data_dir.is_dir() else []
    return {path: hash_image(path) for path in images[: args.num_class_images]}


def digest(what: object) -> str:
    """A short name for the contents of something."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:8]


def samples_per_epoch(args: argparse.Namespace, images: Collection) -> int:
    """Training samples until every picture of the subject was seen once."""
    return len(images) * (2 if args.with_prior_preservation else 1)


def preflight(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[dict[Path, str], PromptEmbeddings, Path | None, dict]:
    """Pictures with their hashes, embeddings, checkpoint, settings; or exit with all that is wrong in one message."""
    problems: list[str] = []
    checkpoint, state = find_checkpoint(args, accelerator, problems)
    if args.seed is None:
        args.seed = state.get("settings", {}).get("seed", random.SystemRandom().randrange(2**31))
        args.seed = broadcast_object_list([args.seed])[0]
    hash_of_image = {path: hash_image(path) for path in check_images(args, accelerator, problems)}
    embeddings = check_embeddings(args, hash_of_image, check_model(args, problems), problems)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    if args.max_train_steps is None:
        samples = args.num_train_epochs * samples_per_epoch(args, hash_of_image)
        args.max_train_steps = math.ceil(samples / samples_per_step)
    settings = {name: getattr(args, name) for name in SETTINGS_THAT_MATTER}
    settings |= {"mixed_precision": accelerator.mixed_precision, "samples_per_step": samples_per_step}
    captions = [(one, embeddings and embeddings.prompt_of_image.get(one)) for one in hash_of_image.values()]
    settings["pictures and captions"] = digest(captions)
    if args.with_prior_preservation:
        settings["class pictures"] = digest(list(hash_class_images(args).values()))
    if "constant" not in args.lr_scheduler:  # a longer run would have another course
        settings["max_train_steps"] = args.max_train_steps
    if args.aspect_ratio_buckets:  # decides which pictures meet in a micro-batch
        settings["samples_per_micro_batch"] = args.train_batch_size * accelerator.num_processes
    for name, saved in state.get("settings", {}).items():
        if settings.get(name) != saved:
            problems.append(f"{checkpoint} was trained with {name} {saved}, this run has {settings.get(name)}.")
    check_environment(args, accelerator, problems)
    if problems := list(dict.fromkeys(gather_object(problems))):  # another machine may see others
        message = "".join(f"\n- {problem}" for problem in problems)
        raise SystemExit(f"Cannot start:{message}" if accelerator.is_main_process else 1)
    return hash_of_image, embeddings, checkpoint, settings


def predicted_vram(args: argparse.Namespace, config: dict, text_tokens: int, itemsize: int) -> float:
    """Peak bytes on the GPU of SD3 with this config and weights of so many bytes.

    The formula is fitted to tests/predicted_memory.py, which counts what PyTorch allocates; CUDA itself takes about
    half a gigabyte more. Values per token and unit of width: a block keeps 36 for the backward pass, 12 more with a
    norm of Q and K, 35 more with a second attention; checkpointing keeps one in and out, and one block at a time.
    """
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    modules = dict(transformer.named_modules())
    linear = sum(module.weight.numel() for module in modules.values() if isinstance(module, nn.Linear))
    other = sum(tensor.numel() for tensor in [*transformer.parameters(), *transformer.buffers()]) - linear
    weights = linear * {"nf4": 0.5625, "int8": 1}.get(args.quantize_base, itemsize) + other * itemsize
    targets = [modules[name] for name in lora_targets(transformer, args.lora_layers, args.lora_blocks)]
    lora = args.rank * sum(layer.in_features + layer.out_features for layer in targets)
    lora *= 16 if args.optimizer == "adamw" else 10  # weight, gradient, two moments

    area = max(height * width for height, width in args.buckets)
    tokens = args.train_batch_size * (area / (8 * config["patch_size"]) ** 2 + text_tokens)
    layers, norm, dual = config["num_layers"], 12 * bool(config.get("qk_norm")), len(config["dual_attention_layers"])
    values = layers * (36 + norm) + 35 * dual
    if args.gradient_checkpointing:
        values = 2 * layers + 50 + norm + 16 * bool(dual)
    activations = tokens * config["num_attention_heads"] * config["attention_head_dim"] * values * itemsize / 2
    encoding = 0.13 * 2**30 + 2572 * area  # SD3's VAE in fp32
    decoding = (0.31 * 2**30 + 3073 * args.resolution**2) / 2  # in fp16
    decoding += lora + (weights if args.quantize_base else 0)
    draws = args.validation_prompt or args.with_prior_preservation
    return max(weights + lora + activations, encoding, decoding if draws else 0)


def print_plan(
    args: argparse.Namespace, accelerator: Accelerator, hash_of_image: dict[Path, str], embeddings: PromptEmbeddings,
    settings: dict,
) -> None:  # fmt: skip
    """What --dry_run says: pictures with their shapes and captions, steps, and GPU memory."""
    shown = list(hash_of_image.items())[:20]
    for path, image_hash in shown:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            width, height = image.size[::-1] if turned else image.size
        shape = args.buckets[find_nearest_bucket(height, width, args.buckets)]
        caption = embeddings.prompt_of_image[image_hash] if embeddings.has_prompts else args.instance_prompt
        print(f"{path.name}: {width} x {height}, trained as {shape[1]} x {shape[0]}, {caption!r}")
    if len(hash_of_image) > len(shown):
        print(f"and {len(hash_of_image) - len(shown)} more")
    samples_per_step, steps = settings["samples_per_step"], args.max_train_steps
    epochs = steps * samples_per_step / samples_per_epoch(args, hash_of_image)
    print(f"{steps} steps of {samples_per_step} samples: each picture {epochs:.1f} times, seed {args.seed}")
    config = load_part(SD3Transformer2DModel.load_config, args, "transformer", token=args.hub_token)
    text_tokens = len(embeddings[next(iter(embeddings.row_of_prompt))][0])
    itemsize = WEIGHT_DTYPES[accelerator.mixed_precision].itemsize
    needed = predicted_vram(args, config, text_tokens, itemsize) / 2**30
    print(f"predicted peak VRAM {needed:.1f} GiB", end="")
    if accelerator.device.type == "cuda":
        there = (torch.cuda.get_device_properties(accelerator.device).total_memory) / 2**30
        verdict = "fits" if needed + 0.5 < there else "does not fit"
        print(f"; {torch.cuda.get_device_name()} has {there:.1f} GiB: it {verdict}")
    else:
        print("; there is no GPU")


# ----------------------------------------------------------------------------------------------- model and objective


def lora_targets(transformer: nn.Module, layers: str, blocks: str | None) -> list[str]:
    """Full names of the linear layers whose names end with one of `layers`, in the given transformer blocks."""
    patterns = [f"*.{layer.strip()}" for layer in layers.split(",")]
    starts = tuple(f"transformer_blocks.{int(block)}." for block in blocks.split(",")) if blocks else ("",)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    wanted = [name for name in linear if any(fnmatch.fnmatchcase(f".{name}", pattern) for pattern in patterns)]
    return [name for name in wanted if name.startswith(starts)]


def load_transformer(args: argparse.Namespace, weight_dtype: torch.dtype) -> SD3Transformer2DModel:
    """The frozen transformer, straight in the training dtype, with a LoRA that is always trained in fp32."""
    kwargs = {"variant": args.variant, "token": args.hub_token, "dtype": weight_dtype, "use_safetensors": True}
    if args.quantize_base == "nf4":  # what is not a linear layer stays in weight_dtype
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": weight_dtype}
        kwargs["quantization_config"] = BitsAndBytesConfig(**nf4)
    elif args.quantize_base == "int8":
        kwargs["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    transformer = load_part(SD3Transformer2DModel.from_pretrained, args, "transformer", **kwargs)
    transformer.requires_grad_(False)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    add_lora(transformer, args)
    if args.pretrained_lora_path:
        load_lora(transformer, args.pretrained_lora_path, args.hub_token)
    return transformer


def add_lora(transformer: SD3Transformer2DModel, args: argparse.Namespace) -> None:
    """Give the transformer a new LoRA, which is trained in fp32."""
    torch.manual_seed(args.seed)
    transformer.add_adapter(LoraConfig(
        r=args.rank, lora_alpha=args.rank if args.lora_alpha is None else args.lora_alpha,
        lora_dropout=args.lora_dropout, init_lora_weights="gaussian",
        target_modules=lora_targets(transformer, args.lora_layers, args.lora_blocks),
    ))  # fmt: skip
    cast_training_params(transformer, dtype=torch.float32)  # add_adapter gives it the base's dtype


def read_lora(transformer: SD3Transformer2DModel, path: str | Path, token: str | None) -> dict[str, Tensor]:
    """Saved LoRA weights for the transformer's LoRA, which must have the same layers and rank, at their strength."""
    kwargs = {"token": token, "use_safetensors": True, "return_lora_metadata": True}
    try:
        state_dict, metadata = StableDiffusion3Pipeline.lora_state_dict(path, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise SystemExit(f"The LoRA {path} cannot be loaded: {str(error).splitlines()[0]}.") from error
    state_dict = {name.removeprefix("transformer."): value for name, value in state_dict.items()}
    config = transformer.peft_config["default"]
    alpha = (metadata or {}).get("transformer.lora_alpha", config.r)  # without metadata, alpha is the rank
    if alpha != config.lora_alpha:
        state_dict = {n: v * alpha / config.lora_alpha if "lora_B" in n else v for n, v in state_dict.items()}
    wanted = {name: value.shape for name, value in get_peft_model_state_dict(transformer).items()}
    if {name: value.shape for name, value in state_dict.items()} != wanted:
        raise SystemExit(f"The layers or rank of {path} are others than --lora_layers, --lora_blocks and --rank say.")
    return state_dict


def load_lora(transformer: SD3Transformer2DModel, path: str | Path, token: str | None = None) -> None:
    """Put saved LoRA weights into the transformer's LoRA."""
    set_peft_model_state_dict(transformer, read_lora(transformer, path, token))


def make_optimizer(transformer: nn.Module, args: argparse.Namespace, samples_per_step: int) -> Optimizer:
    """AdamW over the LoRA, fused, or with its states in 8 bit."""
    lora_params = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer, extra = {
        "adamw": (torch.optim.AdamW, {"fused": True}),
        "adamw_8bit": (bnb.optim.AdamW8bit, {}),
        "paged_adamw_8bit": (bnb.optim.PagedAdamW8bit, {}),
    }[args.optimizer]
    learning_rate = args.learning_rate * (samples_per_step if args.scale_lr else 1)
    betas, decay = (args.adam_beta1, args.adam_beta2), args.adam_weight_decay
    return optimizer(lora_params, lr=learning_rate, betas=betas, weight_decay=decay, eps=args.adam_epsilon, **extra)


def flow_matching_loss(
    velocity_pred: Tensor, latents: Tensor, noise: Tensor, sigmas: Tensor, mask: Tensor,
    weighting_scheme: str, precondition_outputs: bool,
) -> Tensor:  # fmt: skip
    """Per-sample weighted velocity error, (B,). Rectified flow, arXiv 2403.03206 §3.1.

    velocity_pred, latents, noise (B, 16, H, W); sigmas (B, 1, 1, 1); mask (B, 1, H, W). With precondition_outputs it
    is the reference's error of the latents that the velocity implies, noisy - sigma * velocity: sigma² times ours.
    """
    velocity = noise - latents
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas)
    if precondition_outputs:
        weighting = weighting * sigmas**2
    return (weighting * mask * (velocity_pred.float() - velocity) ** 2).mean(dim=(1, 2, 3))


def training_loss(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype, args: argparse.Namespace) -> Tensor:
    """The mean loss of one micro-batch, ()."""
    latents, noise = batch["latents"], batch["noise"]  # (B, 16, H/8, W/8)
    sigmas = batch["sigma"].view(-1, 1, 1, 1)
    noisy_latents = (1 - sigmas) * latents + sigmas * noise
    velocity_pred = model(
        hidden_states=noisy_latents.to(dtype),
        timestep=1000 * batch["sigma"],
        encoder_hidden_states=batch["prompt_embeds"].to(dtype),  # (B, L, D)
        pooled_projections=batch["pooled_prompt_embeds"].to(dtype),  # (B, P)
        return_dict=False,
    )[0]
    scheme, precondition = args.weighting_scheme, bool(args.precondition_outputs)
    losses = flow_matching_loss(velocity_pred, latents, noise, sigmas, batch["mask"], scheme, precondition)
    return (batch["loss_weight"] * losses).mean()


@dataclass
class Run:
    """What the loop, the checkpoints and the previews share; `transformer` is the model inside the prepared one."""

    args: argparse.Namespace
    accelerator: Accelerator
    embeddings: PromptEmbeddings
    noise_scheduler: FlowMatchEulerDiscreteScheduler
    transformer: SD3Transformer2DModel
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    settings: dict[str, object]
    global_step: int = 0

    @property
    def weight_dtype(self) -> torch.dtype:
        return WEIGHT_DTYPES[self.accelerator.mixed_precision]


def training_steps(
    run: Run, model: nn.Module, dataloader: DataLoader, signals: list[int]
) -> Iterator[tuple[dict[str, float], bool]]:
    """Train; yield the loss, a mean over all samples, and learning rate of every optimizer step, and whether any
    process has noted a signal."""
    args, accelerator = run.args, run.accelerator
    lora_params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_sum, skipped_in_a_row = torch.zeros((), device=accelerator.device), 0
    model.train()
    for batch in dataloader:
        with accelerator.accumulate(model):
            if args.lora_dropout:  # the one random thing that happens inside the model
                torch.manual_seed(args.seed + int(batch["sample_number"][0]))
            loss = training_loss(model, batch, run.weight_dtype, args)
            accelerator.backward(loss)
            loss_sum += loss.detach() / args.gradient_accumulation_steps
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(lora_params, args.max_grad_norm)
                facts = torch.stack([norm.isfinite().float(), loss_sum, loss_sum.new_tensor(len(signals))])
                finite, loss_mean, signalled = accelerator.reduce(facts, "mean").tolist()  # the step's only wait
                skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
                if not finite and not accelerator.scaler:  # fp16's loss scaler skips such a step by itself
                    run.optimizer.zero_grad()
                if skipped_in_a_row == MAX_SKIPPED_STEPS:
                    raise SystemExit(NON_FINITE.format(args.output_dir) if accelerator.is_main_process else 1)
            run.optimizer.step()
            run.optimizer.zero_grad()
        if accelerator.sync_gradients:
            learning_rate = run.lr_scheduler.get_last_lr()[0]
            run.lr_scheduler.step()  # not prepared by accelerate, which would step it once per process
            run.global_step += 1
            yield {"loss": loss_mean, "lr": learning_rate}, signalled > 0
            loss_sum.zero_()


@torch.no_grad()
def estimate_step_seconds(run: Run, model: nn.Module, dataset: SampleDataset) -> float:
    """Seconds of an optimizer step, from those of a forward pass: counted in FLOP it is 2.5 of them, 3.5 with
    recomputing, as frozen weights get no gradients."""
    batch = torch.utils.data.default_collate([dataset[0]] * run.args.train_batch_size)
    batch = {name: value.to(run.accelerator.device) for name, value in batch.items()}
    for _ in range(2):  # the first pass loads kernels
        started = time.monotonic()
        training_loss(model, batch, run.weight_dtype, run.args).item()
    passes = 3.5 if run.args.gradient_checkpointing else 2.5
    return passes * run.args.gradient_accumulation_steps * (time.monotonic() - started)


# ------------------------------------------------------------------------------------------------------- checkpoints


def sync_and_rename(partial: Path, final: Path) -> None:
    """Make a written file or folder durable, then let it appear under its name."""

    def sync(path: Path) -> None:
        if os.name != "nt" or path.is_file():  # Windows cannot open a folder
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            os.fsync(descriptor)
            os.close(descriptor)

    for path in [partial, *partial.rglob("*")]:
        sync(path)
    if final.is_dir():
        shutil.rmtree(final)
    os.replace(partial, final)
    sync(final.parent)


def training_metadata(run: Run) -> dict[str, str]:
    """What other programs show about a LoRA: the ss_* keys of kohya's scripts and Stability's ModelSpec."""
    args, config = run.args, run.transformer.config
    kind = "5-large" if config.num_layers > 30 else "5-medium" if config.dual_attention_layers else "m"
    spec = {
        "sai_model_spec": "1.0.1", "architecture": f"stable-diffusion-3-{kind}/lora", "implementation": "diffusers",
        "title": args.output_dir.resolve().name, "trigger_phrase": args.instance_prompt,
        "resolution": f"{args.resolution}x{args.resolution}",
    }  # fmt: skip
    names = ["learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer", "max_grad_norm", "seed", "resolution"]
    training = {name: getattr(args, name) for name in [*names, "gradient_accumulation_steps"]}
    training |= {"base_model_version": f"sd3_{kind}", "sd_model_name": Path(args.pretrained_model_name_or_path).name}
    training |= {"steps": run.global_step, "mixed_precision": run.accelerator.mixed_precision}
    about = {f"modelspec.{name}": value for name, value in spec.items()}
    return about | {f"ss_{name}": str(value) for name, value in training.items()}


def save_lora(folder: Path, transformer: SD3Transformer2DModel, about: dict[str, str], fold_alpha: bool) -> None:
    """Write the LoRA in diffusers' layout, with the adapter's metadata and `about`, complete or not at all.

    Programs disagree about where alpha stands. With fold_alpha, alpha / rank goes into lora_B and alpha becomes the
    rank, so that all of them apply the same strength.
    """
    state_dict = get_peft_model_state_dict(transformer)
    if not all(value.isfinite().all() for value in state_dict.values()):
        raise SystemExit(f"The LoRA has weights that are not finite: not saved. Older files in {folder} are good.")
    metadata = transformer.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set's order would change with every run
    if fold_alpha:
        scale, metadata["lora_alpha"] = metadata["lora_alpha"] / metadata["r"], metadata["r"]
        state_dict = {name: value * scale if "lora_B" in name else value for name, value in state_dict.items()}
    partial = folder / f"{LORA_NAME}.partial"
    about = about | {"ss_network_dim": str(metadata["r"]), "ss_network_alpha": str(metadata["lora_alpha"])}
    adapter = json.dumps({f"transformer.{name}": value for name, value in metadata.items()}, indent=2, sort_keys=True)
    save = functools.partial(save_file, metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: adapter} | about)
    lora = {"transformer_lora_layers": state_dict, "save_function": save}
    StableDiffusion3Pipeline.save_lora_weights(folder, weight_name=partial.name, **lora)
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    written = load_file(partial)
    if not all(torch.equal(written[f"transformer.{name}"], value.cpu()) for name, value in state_dict.items()):
        raise SystemExit(f"What was written to {partial} reads back differently: is the disk of {folder} failing?")
    sync_and_rename(partial, folder / LORA_NAME)


def read_checkpoint(checkpoint: Path) -> dict:
    """trainer_state.json of a checkpoint, or {} if a file of it is missing or is not what was written."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        intact = all(hash_image(checkpoint / name) == sha256 for name, sha256 in state["files"].items())
        return state if intact else {}
    except (OSError, ValueError, KeyError):
        return {}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder in the order in which they were saved; an earlier run may have left higher ones."""

    def saved_at(path: Path) -> tuple[float, int]:
        number = int(path.name.removeprefix("checkpoint-"))
        try:
            return json.loads((path / "trainer_state.json").read_text())["saved_at"], number
        except (OSError, ValueError, KeyError):
            return path.stat().st_mtime, number  # not whole; whoever wants to resume from it will find out

    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=saved_at)


def save_checkpoint(run: Run) -> None:
    """checkpoint-N: a LoRA that can be used as it is, what the optimizer needs to go on, and the run's settings."""
    final = run.args.output_dir / f"checkpoint-{run.global_step}"
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_lora(partial, run.transformer, training_metadata(run), fold_alpha=False)
    state = {"optimizer": run.optimizer.state_dict(), "lr_scheduler": run.lr_scheduler.state_dict()}
    if run.accelerator.scaler:
        state["scaler"] = run.accelerator.scaler.state_dict()
    buffer = io.BytesIO()  # torch.save to a file hides why it failed
    torch.save(state, buffer)
    (partial / "training_state.pt").write_bytes(buffer.getbuffer())
    files = {path.name: hash_image(path) for path in sorted(partial.iterdir())}
    about = {"global_step": run.global_step, "saved_at": time.time(), "settings": run.settings, "files": files}
    (partial / "trainer_state.json").write_text(json.dumps(about, indent=2))
    sync_and_rename(partial, final)
    if limit := run.args.checkpoints_total_limit:
        for old in list_checkpoints(run.args.output_dir)[:-limit]:
            if old != final:  # whatever a clock that was set back says
                shutil.rmtree(old)


def load_checkpoint(run: Run, checkpoint: Path) -> None:
    """Put the LoRA, optimizer, schedule and loss scale back to where they were; what is read cannot run code."""
    load_lora(run.transformer, checkpoint)
    try:
        state = torch.load(checkpoint / "training_state.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SystemExit(f"{checkpoint} is not a checkpoint of this script: {str(error).splitlines()[0]}") from error
    run.optimizer.load_state_dict(state["optimizer"])
    run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if run.accelerator.scaler:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.global_step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]


# ------------------------------------------------------------------------------------------ previews and publishing


def preview_due(run: Run, epoch: int) -> bool:
    """Whether previews are to be made after this step, and not by the end of training anyway; epoch: its samples."""
    args, step, samples = run.args, run.global_step, run.settings["samples_per_step"]
    if not args.validation_prompt or step >= args.max_train_steps:
        return False
    if args.validation_steps:
        return step % args.validation_steps == 0
    period = args.validation_epochs * epoch  # in samples
    return step * samples // period > (step - 1) * samples // period


@torch.no_grad()
def generate_latents(
    transformer: SD3Transformer2DModel, noise_scheduler: FlowMatchEulerDiscreteScheduler, args: argparse.Namespace,
    accelerator: Accelerator, embeddings: list[Tensor], generators: list[torch.Generator],
) -> Tensor:  # fmt: skip
    """Latents of a picture per generator, (B, 16, H/8, W/8), by the pipeline without text encoders and VAE.

    embeddings: (L, D) and (P,) of the prompt, then of the prompt to guide away from.
    """
    missing = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(noise_scheduler.config)
    pipeline = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **dict.fromkeys(missing))
    pipeline.set_progress_bar_config(desc="Generating", leave=False)
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    where = accelerator.device, WEIGHT_DTYPES[accelerator.mixed_precision]
    repeated = [torch.stack([tensor.to(*where)] * len(generators)) for tensor in embeddings]
    options = dict(zip(names, repeated, strict=True))
    options |= {"height": args.resolution, "width": args.resolution, "output_type": "latent"}
    options |= {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    with accelerator.autocast():
        return pipeline(generator=generators, **options).images


@torch.no_grad()
def decode_latents(transformer: SD3Transformer2DModel, args: argparse.Namespace, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents, by a VAE that comes while the transformer makes room, and leaves.

    On a GPU it decodes in fp16, as SD3's pipelines do: at 1024 x 1024 that takes 1.7 GiB instead of 3.3.
    """
    device, dtype = transformer.device, torch.float16 if transformer.device.type == "cuda" else torch.float32
    if not args.quantize_base:  # bitsandbytes' layers stay where they are
        transformer.to("cpu")
    free_memory()
    vae, pictures = load_vae(args, device, dtype), []
    for sample in tqdm(latents.split(1), desc="Decoding", unit="picture", leave=False):
        sample = sample.float() / vae.config.scaling_factor + vae.config.shift_factor
        pictures += VaeImageProcessor().postprocess(vae.decode(sample.to(dtype)).sample)
    del vae
    free_memory()
    transformer.to(device)
    return pictures


def make_class_images(args: argparse.Namespace, accelerator: Accelerator, embeddings: PromptEmbeddings) -> None:
    """Generate the class pictures that prior preservation lacks; each is written as soon as it is there."""
    folder = args.class_data_dir
    lacking = max(0, args.num_class_images - len(find_images(folder)[0]))
    numbered = [(number, folder / f"class-{number:05}.png") for number in range(args.num_class_images)]
    missing = [(number, path) for number, path in numbered if not path.exists()][:lacking]
    batches = [missing[i : i + args.sample_batch_size] for i in range(0, len(missing), args.sample_batch_size)]
    accelerator.wait_for_everyone()  # until all have counted
    if batches := batches[accelerator.process_index :: accelerator.num_processes]:
        untrained = argparse.Namespace(**vars(args) | {"pretrained_lora_path": None})
        transformer = load_transformer(untrained, WEIGHT_DTYPES[accelerator.mixed_precision]).to(accelerator.device)
        tools = transformer, load_scheduler(args), args, accelerator
        prompts = [*embeddings[args.class_prompt], *embeddings[""]]
        for batch in tqdm(batches, desc="Class pictures", unit="batch", disable=not accelerator.is_main_process):
            generators = [seeded_generator(args.seed, 3, number) for number, _ in batch]
            latents = generate_latents(*tools, prompts, generators)
            for (_, path), picture in zip(batch, decode_latents(transformer, args, latents), strict=True):
                partial = path.with_suffix(".partial")
                picture.save(partial, "png")
                sync_and_rename(partial, path)
        del transformer, tools
        free_memory()
    accelerator.wait_for_everyone()


def make_previews(run: Run, count: int) -> list[tuple[str, Path]]:
    """Write samples/*.png, `count` a prompt, and hand them to the trackers: (prompt, file) of each."""
    args, accelerator, latents = run.args, run.accelerator, []
    run.transformer.eval()
    tools = run.transformer, run.noise_scheduler, args, accelerator
    for prompt in args.validation_prompt:
        prompts = [*run.embeddings[prompt], *run.embeddings[args.negative_prompt]]
        for number in range(count):
            latents.append(generate_latents(*tools, prompts, [seeded_generator(args.seed, 2, number)]))
    pictures = decode_latents(run.transformer, args, torch.cat(latents))
    run.transformer.train()
    folder = args.output_dir / "samples"
    written = []
    for i, prompt in enumerate(args.validation_prompt):
        group = pictures[i * count : (i + 1) * count]
        for number, picture in enumerate(group):
            path = folder / f"step-{run.global_step:06d}-prompt-{i}-{number}.png"
            picture.save(path)
            written.append((prompt, path))
        log_images(run, prompt, group)
    progress = draw_progress(run, folder)
    progress.save(folder / "progress.png")
    log_images(run, "progress", [progress])
    return written


def log_images(run: Run, title: str, pictures: list[Image.Image]) -> None:
    """Hand pictures to the trackers that show some."""
    for tracker in run.accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({title: np.stack(pictures)}, step=run.global_step, **layout)


def draw_progress(run: Run, folder: Path) -> Image.Image:
    """A row per prompt and a column per preview so far, from step 0 on."""
    prompts = range(len(run.args.validation_prompt))
    steps = sorted({path.name.split("-")[1] for path in folder.glob("step-*-prompt-*-0.png")})
    steps = [step for step in steps if int(step) <= run.global_step]  # later ones are left from an earlier run
    columns = [[folder / f"step-{step}-prompt-{i}-0.png" for i in prompts] for step in steps]
    columns = [column for column in columns if all(path.exists() for path in column)]
    pictures = [Image.open(column[i]) for i in prompts for column in columns]
    return make_image_grid(pictures, len(prompts), len(columns), resize=256)


def write_model_card(run: Run, previews: list[tuple[str, Path]]) -> None:
    """README.md for the Hub: base model, trigger, gallery, how to load it, licence and training settings."""
    args, name = run.args, run.args.hub_model_id or run.args.output_dir.resolve().name
    is_folder = Path(args.pretrained_model_name_or_path).is_dir()
    base = Path(args.pretrained_model_name_or_path).name if is_folder else args.pretrained_model_name_or_path
    licence = "stabilityai-ai-community" if base.startswith("stabilityai/") else "license-of-the-base-model"
    link = {} if is_folder else {"base_model": base, "license_link": f"https://huggingface.co/{base}"}
    data = ModelCardData(
        license="other", license_name=licence, library_name="diffusers", instance_prompt=args.instance_prompt, **link,
        tags=["text-to-image", "diffusers-training", "diffusers", "lora", "sd3", "sd3-diffusers", "template:sd-lora"],
        widget=[{"text": prompt, "output": {"url": f"samples/{path.name}"}} for prompt, path in previews] or None,
        pipeline_tag="text-to-image",
    )  # fmt: skip
    hidden = {"pictures and captions", "class pictures", "pretrained_model_name_or_path"}
    shown = {name: value for name, value in run.settings.items() if name not in hidden and value is not None}
    progress = "![from before the training to its end](samples/progress.png)\n\n" if previews else ""
    text = f"""
# {name}

<Gallery />

A LoRA of {base} that knows what **{args.instance_prompt}** looks like, trained with DreamBooth.

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{base}", dtype=torch.float16)
pipeline.load_lora_weights("{name}")
pipeline.enable_model_cpu_offload()
image = pipeline({json.dumps(args.instance_prompt)}).images[0]
```

{progress}The licence is that of the base model, {base}. Trained for {run.global_step} steps with:

```json
{json.dumps(shown, indent=2)}
```
"""
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(args.output_dir / "README.md")


def push_to_hub(args: argparse.Namespace, previews: list[tuple[str, Path]]) -> None:
    """Upload the LoRA, its card and the card's samples, and nothing else."""
    samples = [*(path.name for _, path in previews), "progress.png"] if previews else []
    files = [LORA_NAME, "README.md", *(f"samples/{name}" for name in samples)]
    upload = {"repo_id": args.hub_model_id, "folder_path": args.output_dir, "allow_patterns": files}
    includes = [part for file in files for part in ("--include", file)]
    command = shlex.join(["hf", "upload", args.hub_model_id, str(args.output_dir), ".", *includes])
    for wait in (2, 8, 32, 0):  # seconds
        try:
            HfApi(token=args.hub_token).upload_folder(**upload, commit_message="Add a DreamBooth LoRA")
            print(f"pushed to {args.hub_model_id}")
            return
        except Exception as error:  # whatever it was, the LoRA is on disk
            reason = str(error).strip().splitlines()[0]
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if not wait or (status < 500 and status not in (408, 429)):
                raise SystemExit(f"The upload failed: {reason}\nNothing is lost. To send it: {command}") from error
            print(f"the upload failed ({reason}); trying again in {wait} s")
            time.sleep(wait)


# ------------------------------------------------------------------------------------------------------------- main


def peak_memory() -> str:
    """Peak VRAM and RAM of this process so far; RAM counts mapped files, such as weights, too."""
    vram = f"peak VRAM {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB, " if torch.cuda.is_available() else ""
    if resource is None:
        return f"{vram}peak RAM {psutil.Process().memory_info().peak_wset / 2**30:.2f} GiB"
    return f"{vram}peak RAM {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate's engine, at the precision of --mixed_precision or else of the launcher."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # they never change
            InitProcessGroupKwargs(timeout=timedelta(hours=12)),  # the others wait while one encodes pictures
        ],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate leaves fp16 to GPUs
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.prior_generation_precision:
        accelerator.print("note: --prior_generation_precision does nothing; previews use the training's precision")
    return accelerator


def check_disk(folder: Path, needed: float, what: str, cure: str) -> None:
    """Stop now rather than in the middle, if so many bytes will not fit."""
    if (free := shutil.disk_usage(folder).free) < needed:
        sizes = f"{what} need {needed / 1e9:.1f} GB in {folder}, which has {free / 1e9:.1f} GB free"
        raise SystemExit(f"{sizes}. Make room, or {cure}.")


def size_of_checkpoints(run: Run, lora_size: int) -> float:
    """Bytes that the checkpoints still to come take, of a LoRA of so many parameters."""
    args = run.args
    saves = max(0, args.max_train_steps - run.global_step) // args.checkpointing_steps
    kept = min(saves, (args.checkpoints_total_limit or saves) + 1)
    return (4 + kept * (12 if args.optimizer == "adamw" else 6)) * lora_size  # a weight, and AdamW's two states


def load_run(args: argparse.Namespace, accelerator: Accelerator, embeddings: PromptEmbeddings, settings: dict) -> Run:
    """The transformer with its LoRA, and what trains it."""
    transformer = load_transformer(args, WEIGHT_DTYPES[accelerator.mixed_precision])
    optimizer = make_optimizer(transformer, args, settings["samples_per_step"])
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles, power=args.lr_power, step_rules=args.step_rules,
    )  # fmt: skip
    return Run(args, accelerator, embeddings, load_scheduler(args), transformer, optimizer, lr_scheduler, settings)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are noted in, for the loop to end after its step; a second one ends at once."""
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        noted.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def resume_command(args: argparse.Namespace, accelerator: Accelerator) -> str:
    """This process's command line, to continue with; without the token."""
    token, processes = args.hub_token or "--hub_token", accelerator.num_processes
    launch = ["accelerate", "launch", "--quiet", f"--mixed_precision={accelerator.mixed_precision}"]
    launch += ["--multi_gpu", f"--num_processes={processes}"] if processes > 1 else []
    flags = [flag for flag in sys.argv[1:] if token not in flag and flag != "--hub_token"]
    return shlex.join([*launch, sys.argv[0], *flags, "--resume_from_checkpoint=latest"])


def explain_errors(main: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Let main end with one message when GPU memory or the disk runs out; what was saved before stays."""

    @functools.wraps(main)
    def explained(args: argparse.Namespace) -> None:
        try:
            main(args)
        except KeyboardInterrupt:  # while training, Ctrl-C saves a checkpoint first
            raise SystemExit("Interrupted. What was saved is whole: run the same command again.") from None
        except torch.OutOfMemoryError as error:
            cures = "--gradient_checkpointing, --train_batch_size 1, a lower --resolution, --quantize_base nf4"
            raise SystemExit(f"Out of GPU memory, {peak_memory()}. What helps, cheapest first: {cures}.") from error
        except (OSError, SafetensorError) as error:
            if not any(cause in str(error) for cause in ("No space left", "File too large", "quota exceeded")):
                raise
            for partial in args.output_dir.rglob("*.partial"):
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
            message = f"The disk is full ({error}). What was saved before is whole: make room and resume."
            raise SystemExit(message) from error

    return explained


def prepare_latents(args: argparse.Namespace, accelerator: Accelerator, hash_of_image: dict[Path, str]) -> Path:
    """The file of the pictures' latents, which the main process writes if it is not there already."""
    path, key = args.output_dir / "latents.arrow", latents_key(args, hash_of_image)
    if accelerator.is_main_process and not latents_are_current(path, key):
        write_latents(path, key, list(hash_of_image), args, accelerator.device)
        free_memory()
    accelerator.wait_for_everyone()
    return path


def announce(run: Run, model: nn.Module, dataset: SampleDataset, pictures: str) -> None:
    """Say what is about to be done and how long it may take; to the trackers too."""
    args, accelerator, samples_per_step = run.args, run.accelerator, run.settings["samples_per_step"]
    lora_size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    check_disk(args.output_dir, size_of_checkpoints(run, lora_size), "Checkpoints", "use --checkpoints_total_limit")
    accelerator.print(f"{pictures}, {lora_size:,} parameters to train, seed {args.seed}")
    steps = len(dataset) // samples_per_step
    accelerator.print(f"{steps} steps of {samples_per_step} samples, from step {run.global_step}", end="")
    if steps:
        seconds = estimate_step_seconds(run, model, dataset)
        accelerator.print(f"; about {seconds:.2g} s a step, {steps * seconds / 60:.0f} minutes in all")
    if accelerator.log_with:
        shown = {name: value if isinstance(value, int | float) else str(value) for name, value in run.settings.items()}
        accelerator.init_trackers("dreambooth-sd3-lora-miniature", config=shown)


def train_and_save(run: Run, model: nn.Module, dataloader: DataLoader, epoch: int) -> None:
    """The loop, with its progress bar, checkpoints, previews and signals; an epoch is so many samples."""
    args, accelerator = run.args, run.accelerator
    bar = {"total": args.max_train_steps, "initial": run.global_step, "disable": not accelerator.is_main_process}
    if accelerator.is_main_process and args.validation_prompt and len(dataloader) and not run.global_step:
        for earlier in (args.output_dir / "samples").glob("step-*-prompt-*.png"):  # of another run
            earlier.unlink()
        make_previews(run, count=1)  # what the model makes of the prompts before it is trained
    with tqdm(desc="Training", unit="step", **bar) as progress_bar, noted_signals() as noted:
        for logs, interrupted in training_steps(run, model, dataloader, noted):
            progress_bar.set_postfix_str(f"loss {logs['loss']:.4f}, {peak_memory()}")
            progress_bar.update()
            accelerator.log(logs, step=run.global_step)
            if accelerator.is_main_process and (interrupted or run.global_step % args.checkpointing_steps == 0):
                save_checkpoint(run)
            if interrupted:
                message = f"Stopped after step {run.global_step}. To go on: {resume_command(args, accelerator)}"
                raise SystemExit(message if accelerator.is_main_process else 1)
            if accelerator.is_main_process and preview_due(run, epoch):
                make_previews(run, args.num_validation_images)


def publish(run: Run, started: float) -> None:
    """Write the LoRA, its samples and its card, say so, and upload them if that is wanted."""
    args = run.args
    save_lora(args.output_dir, run.transformer, training_metadata(run), fold_alpha=True)
    previews = make_previews(run, args.num_validation_images) if args.validation_prompt else []
    write_model_card(run, previews)
    size = (args.output_dir / LORA_NAME).stat().st_size / 1e6
    print(f"wrote {args.output_dir / LORA_NAME}: {size:.1f} MB; README.md and {len(previews)} samples beside it")
    print(f"{peak_memory()}, {time.monotonic() - started:.0f} s")
    if args.push_to_hub:
        push_to_hub(args, previews)


def train(
    args: argparse.Namespace, accelerator: Accelerator, hash_of_image: dict[Path, str], embeddings: PromptEmbeddings,
    checkpoint: Path | None, settings: dict, started: float,
) -> None:  # fmt: skip
    """Everything that costs time, on what the preflight has found to be good."""
    prompts = [embeddings.prompt_of_image[image_hash] for image_hash in hash_of_image.values()]
    if args.with_prior_preservation:
        make_class_images(args, accelerator, embeddings)
        hash_of_class_image = hash_class_images(args)
        settings["class pictures"] = digest(list(hash_of_class_image.values()))
        hash_of_image |= hash_of_class_image
    latents_path = prepare_latents(args, accelerator, hash_of_image)

    run = load_run(args, accelerator, embeddings, settings)
    if checkpoint:
        load_checkpoint(run, checkpoint)
    samples_per_step, steps_left = settings["samples_per_step"], max(0, args.max_train_steps - run.global_step)
    sample_numbers = range(run.global_step * samples_per_step, (run.global_step + steps_left) * samples_per_step)
    sigmas, class_images = run.noise_scheduler.sigmas, len(hash_of_image) - len(prompts)
    what = args, latents_path, embeddings, prompts, sigmas, sample_numbers, class_images
    dataset = SampleDataset(*what, micro_batch=args.train_batch_size * accelerator.num_processes)
    loading = {"num_workers": args.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
    dataloader = DataLoader(dataset, args.train_batch_size, **loading)
    model, run.optimizer, dataloader = accelerator.prepare(run.transformer, run.optimizer, dataloader)

    of_class = f" and {class_images} of the class" if class_images else ""
    announce(run, model, dataset, f"{len(prompts)} pictures{of_class}")
    train_and_save(run, model, dataloader, samples_per_epoch(args, prompts))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish(run, started)


@explain_errors
def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    accelerator = make_accelerator(args)
    hash_of_image, embeddings, checkpoint, settings = preflight(args, accelerator)
    if not args.dry_run:
        train(args, accelerator, hash_of_image, embeddings, checkpoint, settings, started)
    elif accelerator.is_main_process:
        print_plan(args, accelerator, hash_of_image, embeddings, settings)
    accelerator.end_training()
    if accelerator.num_processes > 1:  # gloo's threads may crash a Python that ends in the usual way
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main(parse_args())
