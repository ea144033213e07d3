"""Train a DreamBooth LoRA for Stable Diffusion 3 on a few images, with embeddings from compute_embeddings.py.

    accelerate launch --quiet train_dreambooth_sd3_lora_miniature.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-3-medium-diffusers \
        --instance_data_dir dog --data_df_path sample_embeddings.parquet --instance_prompt "a photo of sks dog" \
        --mixed_precision fp16 --resolution 1024 --train_batch_size 1 --gradient_accumulation_steps 4 \
        --use_8bit_adam --max_train_steps 500 --seed 0

Memory for SD3-medium at 1024 x 1024 and rank 4, as counted by tests/tools/step_cost.py: 7.2 GiB of VRAM, and 4.4 GiB
with --gradient_checkpointing. No text encoder is ever loaded. Which image sample n shows follows from the seed and the
list of images; its crop, noise and noise level follow from the seed and n. So a resumed run continues exactly, and any
number of processes sees the same samples (with several shapes of images, if processes times --train_batch_size is the
same). "The reference" is diffusers' examples/research_projects/sd3_lora_colab, whose command line still runs.

The file is read like a newspaper: what matters most comes first, and a name may be used before it is defined.

    main      the order in which everything happens
    part I    the job: records, data, model and LoRA, loss, training loop, checkpoints, memory. Stop here first.
    part II   what a run also makes: previews, class images, the model card, the upload. For users of those flags.
    part III  what can be asked of it: Args, where each flag is declared once, and the parser. For whoever adds a flag.
    part IV   what is checked before it begins. For whoever wonders where a message comes from.
    part V    what the world does to a run: input, files, signals, errors, launchers.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import errno
import fnmatch
import functools
import hashlib
import importlib
import io
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
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, get_args, get_type_hints

# Both would end an import below with a traceback of a library.
if sys.flags.optimize > 1:
    raise SystemExit("python -OO and PYTHONOPTIMIZE=2 strip the docstrings that transformers reads. Use python -O.")
if not isinstance(logging.getLevelName(os.environ.get("ACCELERATE_LOG_LEVEL", "INFO").upper()), int):
    raise SystemExit(
        f"ACCELERATE_LOG_LEVEL={os.environ['ACCELERATE_LOG_LEVEL']} is not a log level such as INFO or ERROR."
    )

PARENT = os.getppid()  # asked before the imports, during which a launcher may be killed
# Read when torch is imported; a setting of the user's stays. Segments that grow leave fewer holes.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a busy machine down

try:
    import diffusers  # loads its parts on first use, so that a mistyped command line fails fast
except ModuleNotFoundError as error:
    raise SystemExit(
        f"The package {error.name} is missing. Activate the environment into which you installed requirements.txt; if "
        "there is none, run: pip install -r requirements.txt"
    ) from error
import numpy as np
import psutil
import pyarrow.parquet as pq
import safetensors.torch
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    AutocastKwargs,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    send_to_device,
)
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

STARTED = time.monotonic()
LORA_NAME = "pytorch_lora_weights.safetensors"
STATE_NAME = "training_state.pt"
OTHER_SCRIPT = "compute_embeddings.py"

# -------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    """Train a LoRA and publish it: the order in which everything happens."""
    silence_libraries()
    accelerator = make_accelerator(args)
    stop = StopRequest()
    with (
        redirect_stdout(ForgivingStream(sys.stdout)),
        redirect_stderr(ForgivingStream(sys.stderr, has_bars=True)),
        explained_errors(),
    ):
        stop.listen()
        plan = preflight(args, accelerator)
        if args.dry_run:
            accelerator.end_training()
            return
        with lock_output_dir(args.output_dir, accelerator):
            plan = create_repository(args, plan, accelerator)
            download_weights(args)
            start_tracker(args, plan, accelerator)

            # Latents first: the VAE is gone before the transformer comes.
            encode_latents(plan.examples, args, plan.base_model.files, accelerator)
            transformer = load_transformer(plan.base_model.files, args, plan.weight_dtype).to(accelerator.device)

            # Samples of the class show what the model knew before, so they are made while it has no LoRA.
            groups = [plan.examples]
            if args.with_prior_preservation:
                make = make_class_velocities if args.class_samples == "velocities" else make_class_images
                class_examples = make(args, plan, transformer, accelerator)
                plan = with_class_examples(plan, class_examples, accelerator)
                groups.append(class_examples)

            add_lora(transformer, args, plan.seed)
            state = start_or_resume(args, plan, transformer, accelerator)

            # The whole run's samples, in order; a resumed run trains the rest of them.
            micro_batch = args.train_batch_size * accelerator.num_processes
            length = plan.max_train_steps * plan.samples_per_step
            order = sample_order(groups, args.class_every_n_samples, plan.seed, micro_batch, length)
            dataset = SampleDataset(order, plan.embeddings, plan.base_model.noise_scheduler.sigmas, args, plan.seed)
            model, dataloader = prepare_training(args, plan, state, dataset, accelerator)
            preview_untrained(args, plan, state, accelerator)

            # While there is something to save, a signal ends the training after its step, with a checkpoint.
            stop.saves_first = True
            train(args, plan, state, model, dataloader, accelerator, stop)

            if accelerator.is_main_process:
                publish(args, plan, state, accelerator, stop)
            accelerator.wait_for_everyone()  # a process that left would end the others' process group
        with noted_logging(accelerator):
            accelerator.end_training()


# --------------------------------------------------------------------------------------------------- part I: the job
# What a run is: photos become latents, latents and noise become samples, samples teach the LoRA, and a checkpoint
# keeps all of it. Whoever wants to learn how that is done needs only this part.

# ------------------------------------------------------------------------------------------ records, random numbers
# Two records carry a run. Preflight makes the Plan, to which main adds the repository's name and a digest of the
# samples of the class; the training loop changes the TrainState.


@dataclass(frozen=True)
class Example:
    """One training image at one training resolution."""

    path: Path
    sha256: str  # of the image file, by which the embeddings name it
    mask: Path | None  # the mask file beside it, with --alpha_mask
    latents: Path  # the safetensors file of its latents, which is written before training
    size: tuple[int, int]  # (height, width) in pixels
    shape: tuple[int, int]  # (height, width) in pixels that it is trained in
    has_alpha: bool  # whether it has an alpha channel, which --alpha_mask can use
    prompt: str = ""  # set by with_prompts to what the embeddings' file has for sha256, or else the class prompt
    loss_weight: float = 1.0


@dataclass(frozen=True)
class BaseModel:
    """What is known about the base model before its weights are loaded."""

    files: LocalModel
    skeleton: diffusers.SD3Transformer2DModel  # the transformer without weights, on the meta device
    identity: str  # the commit of a repository, or a digest of a folder's weight files
    noise_scheduler: diffusers.FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True)
class Plan:
    """Everything that is known before anything is written."""

    name: str  # of the LoRA: its repository, or its folder
    seed: int
    weight_dtype: torch.dtype  # of the frozen weights and the activations
    base_model: BaseModel
    embeddings: PromptEmbeddings
    examples: list[Example]  # of the subject
    start_lora: dict[str, Tensor]  # the weights of --pretrained_lora_path, or {}
    checkpoint: dict[str, Any]  # the saved state to resume from, or {}
    settings: dict[str, object]  # what a run that resumes this one is compared with
    samples_per_step: int
    max_train_steps: int
    preview_steps: set[int]  # steps that are followed by previews; publish() draws those of the last step


@dataclass
class TrainState:
    """Everything that training changes."""

    transformer: diffusers.SD3Transformer2DModel
    optimizer: AcceleratedOptimizer  # from prepare_training on
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    global_step: int  # optimizer steps that are done
    first_step: int  # those that were done when this run began
    has_saved: bool = False  # whether this run has saved a checkpoint


# Previews, class images and all choices about a sample are drawn from generators that are seeded by the run's seed,
# one of these streams, and a number; class velocities, which runs may share, by their stream and a file's name. The
# order of samples and the new LoRA use the run's seed itself, the LoRA's dropout the seed plus a sample's number.
SAMPLE_STREAM = 1
PREVIEW_STREAM = 2
CLASS_IMAGE_STREAM = 3


def seeded_generator(*values: int | str) -> torch.Generator:
    """Return a random generator that depends on these values and on nothing else."""
    seed = int(digest(values), 16) >> 1  # 63 bits: not negative as a signed integer
    return torch.Generator().manual_seed(seed)


def digest(value: object) -> str:
    """Return a short name for the contents of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- data
# From image files to training samples. Each image is encoded by the VAE once, before training, into a file of latents
# (with a few crops, since a random crop cannot be drawn afterwards). A SampleDataset then makes sample number n from
# the latents, the embeddings and a random generator that is seeded by n.


CROPS_PER_IMAGE = 4  # a random crop is one of this many places


@dataclass(frozen=True)
class Photos:
    """The images of the subject, and a digest of their caption files, to compare with the embeddings' file."""

    paths: list[Path]
    captions_digest: str


def find_photos(args: Args, problems: Problems) -> Photos:
    """Return the training photos. Another source of paths goes here.

    Captions come from the embeddings' file, by an image's SHA-256: see with_prompts and open_embeddings.
    """
    folder = args.instance_data_dir
    paths = find_images(folder)
    if not paths:
        problems.add(f"--instance_data_dir {why_no_images(folder)}")
    captions = ""
    try:
        captions = digest_of_captions(folder)
    except UserError as error:
        problems.add(str(error))
    return Photos(paths, captions)


def find_examples(
    images: list[Path], args: Args, base_model: BaseModel | None, accelerator: Accelerator, problems: Problems
) -> list[Example]:
    """Return an Example for each image and resolution; each process inspects its share. with_prompts adds prompts."""
    shapes_of = training_shapes(args)
    identity = base_model.identity if base_model else ""
    masks = masks_beside(images) if args.alpha_mask else {}
    examples = []
    for path in images[accelerator.process_index :: accelerator.num_processes]:
        try:
            examples += examples_of_image(path, masks.get(path), shapes_of, identity, args)
        except UserError as error:
            problems.add(str(error))
    return sorted(gather_object(examples), key=lambda example: example.path)


def examples_of_image(
    path: Path, mask: Path | None, shapes_of: dict[int, list[tuple[int, int]]], model_identity: str, args: Args
) -> list[Example]:
    """Return an image's Examples: at the smallest resolution, and at larger ones for which it need not be enlarged.

    The file of an Example's latents is named by a digest of all that the latents depend on. Raises UserError.
    """
    with opened_photo(path) as image:
        size = upright_size(image)
        has_alpha = image.has_transparency_data
    if max(size) < 64:
        raise UserError(f"{path} has {size[1]} x {size[0]} pixels, which is too small. Remove it from the folder.")
    sha256 = sha256_of(path)
    mask_sha256 = sha256_of(mask) if mask else None
    crops = 1 if args.center_crop else CROPS_PER_IMAGE
    examples = []
    for resolution, shapes in shapes_of.items():
        shape = shapes[diffusers.training_utils.find_nearest_bucket(*size, shapes)]
        if resolution > min(shapes_of) and enlargement(size, shape) > 1:
            continue
        name = digest([sha256, args.alpha_mask, mask_sha256, model_identity, shape, crops, args.random_flip])
        latents = args.output_dir / "latents" / f"{name}.safetensors"
        examples.append(Example(path, sha256, mask, latents, size, shape, has_alpha))
    return examples


def training_shapes(args: Args) -> dict[int, list[tuple[int, int]]]:
    """Return for each training resolution the shapes of images, (height, width) in pixels.

    It is the square or, with --aspect_ratio_buckets, several of the same area. Raises ValueError if a side is not a
    multiple of 16: the VAE divides it by 8, the transformer's patches by 2.
    """
    shapes_of = {}
    sides = list(args.resolution)  # the largest is that of previews and class images, whatever the buckets are
    for resolution in args.resolution:
        if args.aspect_ratio_buckets is None:
            shapes = [(resolution, resolution)]
        elif args.aspect_ratio_buckets == "auto":
            shapes = diffusers.training_utils.generate_aspect_ratio_buckets(resolution)
        else:
            shapes = diffusers.training_utils.parse_buckets_string(args.aspect_ratio_buckets)
        for height, width in shapes:
            sides += [height, width]
        shapes_of[resolution] = shapes
    if any(side < 16 or side % 16 for side in sides):
        raise ValueError(f"not all of {sides} are multiples of 16")
    return shapes_of


def enlargement(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """Return the factor by which an image is enlarged to fill a shape; both are (height, width)."""
    return max(shape[0] / size[0], shape[1] / size[1])


def load_vae(model: LocalModel, dtype: torch.dtype) -> diffusers.AutoencoderKL:
    """Load the VAE in a dtype."""
    return load_part(diffusers.AutoencoderKL.from_pretrained, model, "vae", dtype=dtype)


def encode_latents(examples: list[Example], args: Args, model: LocalModel, accelerator: Accelerator) -> None:
    """Write the latents that do not exist yet, one safetensors file per Example; each process encodes its share.

    A file that was cut short is written again. The VAE works in fp32, as `force_upcast` in its config demands, and
    untiled, since tiles change latents by 11 to 34 % of their standard deviation.
    """
    problems = Problems(accelerator)
    share = examples[accelerator.process_index :: accelerator.num_processes]
    missing = [example for example in share if not are_latents(example.latents)]
    if missing:
        vae = load_vae(model, torch.float32)
        del vae.decoder  # 0.2 GB that encoding does not need
        vae.to(accelerator.device)
        for example in tqdm(missing, "Encoding images", unit="image", disable=no_bar(accelerator)):
            try:
                latents = encode_image(vae, example, args)
            except UserError as error:
                problems.add(str(error))
                continue
            write_latents(example.latents, latents)
        del vae
    diffusers.training_utils.free_memory()
    problems.stop_if_any()
    check_visible(examples)


def check_visible(examples: list[Example]) -> None:
    """End the run if this process does not see the files that others have written."""
    for example in examples:
        if not example.latents.exists():
            folder = example.latents.parent
            raise SystemExit(
                f"The latents are not visible here: all machines must share {folder}, which is --class_data_dir or in "
                "--output_dir."
            )


@torch.inference_mode()
def encode_image(vae: diffusers.AutoencoderKL, example: Example, args: Args) -> dict[str, Tensor]:
    """Encode an image: mean and std (V, 16, H/8, W/8) and mask (V, 1, H/8, W/8), in fp16.

    The V variants are its crops and, with --random_flip, the mirror image of each.
    """
    image, mask = read_image(example.path, example.mask)
    if not args.alpha_mask:
        mask = Image.new("L", image.size, "white")
    height, width = example.shape
    variants = []
    for center in crop_centers(image, example.shape, args.center_crop):
        place = (center, center)  # across and down; only one of the two sides is too long
        crop = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=place)
        mask_crop = crop_mask(mask, example.shape, center)
        variants.append(encode_crop(vae, crop, mask_crop))
        if args.random_flip:
            variants.append(encode_crop(vae, ImageOps.mirror(crop), ImageOps.mirror(mask_crop)))
    return {name: tensor.half().cpu() for name, tensor in default_collate(variants).items()}


def crop_centers(image: Image.Image, shape: tuple[int, int], center_crop: bool) -> list[float]:
    """Return where an image is cropped to a shape, (height, width): 0 is its top or left end, 1 the other one."""
    height, width = shape
    ratio = image.width * height / (image.height * width)  # above 1: the image is wider than the shape
    surplus = max(width * (ratio - 1), height * (1 / ratio - 1))  # pixels of the side that is too long
    if center_crop or surplus < 8:  # a latent pixel is 8 pixels wide
        return [0.5]
    return list(np.linspace(0, 1, CROPS_PER_IMAGE))


def crop_mask(mask: Image.Image, shape: tuple[int, int], center: float) -> Image.Image:
    """Return a crop of a mask at the size of latents, an eighth of a shape, (height, width)."""
    size = (shape[1] // 8, shape[0] // 8)
    return ImageOps.fit(mask, size, Image.Resampling.BOX, centering=(center, center))


def encode_crop(vae: diffusers.AutoencoderKL, crop: Image.Image, mask: Image.Image) -> dict[str, Tensor]:
    """Return the posterior of a crop's latents, mean and std (16, H/8, W/8), as SD3 scales them, and the mask."""
    pixels = torch.from_numpy(np.array(crop))  # (H, W, 3), 0 to 255
    pixel_values = pixels.permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, H, W) in [-1, 1]
    posterior = vae.encode(pixel_values.to(vae.device)).latent_dist  # of (1, 16, H/8, W/8)
    return {
        "mean": (posterior.mean[0] - vae.config.shift_factor) * vae.config.scaling_factor,
        "std": posterior.std[0] * vae.config.scaling_factor,
        "mask": torch.from_numpy(np.array(mask))[None] / 255,  # (1, H/8, W/8) in [0, 1]
    }


def write_latents(path: Path, latents: dict[str, Tensor]) -> None:
    """Write a file of latents, which are_latents recognizes."""
    write_file(path, safetensors.torch.save(latents, checksum_of(path.stem, latents)))


def are_latents(path: Path) -> bool:
    """Whether a file of latents exists, is intact and matches its name."""
    try:
        with reading(path, ""), safe_open(path, "pt") as file:
            return file.metadata() == checksum_of(path.stem, load_file(path))
    except UserError:  # a missing, short or damaged file is written again
        return False


def checksum_of(name: str, latents: dict[str, Tensor]) -> dict[str, str]:
    """Return a digest of a name and of the names and bytes of tensors, as metadata of a file of latents.

    It is a single entry because safetensors does not fix the order of several, and the same photo gives the same file.
    """
    content = hashlib.sha256(name.encode())
    for tensor_name in sorted(latents):
        content.update(tensor_name.encode())
        content.update(latents[tensor_name].contiguous().numpy().tobytes())
    return {"sha256": content.hexdigest()}


FORMAT_VERSION = 2  # of the embeddings' file


class PromptEmbeddings:
    """Prompt embeddings by prompt, read from the Parquet file one row at a time: a row is a row group."""

    TENSORS = ("prompt_embeds", "pooled_prompt_embeds")

    def __init__(self, path: Path) -> None:
        """Open the file; raises UserError if it is damaged, or not what compute_embeddings.py writes."""
        self.path = path
        self.row_of_prompt: dict[str, int] = {}
        self.prompt_of_image: dict[str, str] = {}  # by SHA-256
        with reading(path, ""):
            self.file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
            metadata = self.file.schema_arrow.metadata or {}
            about = metadata.get(b"sd3_embeddings", b"{}")
            self.about = json.loads(about)
            if self.about.get("format_version") != FORMAT_VERSION:
                raise ValueError("it was not written by this version of compute_embeddings.py")
            if hashlib.sha256(about).hexdigest() != metadata[b"sha256"].decode():
                raise ValueError("it is damaged")
            for number, row in enumerate(self.file.read(["prompt", "image_hashes"]).to_pylist()):
                self.row_of_prompt[row["prompt"]] = number
                for sha256 in row["image_hashes"]:
                    self.prompt_of_image[sha256] = row["prompt"]

    def __reduce__(self) -> tuple:
        return PromptEmbeddings, (self.path,)  # worker processes open the file themselves

    @functools.lru_cache(maxsize=64)  # noqa: B019 - reading takes 14 ms; the object lives as long as the program
    def __getitem__(self, prompt: str) -> dict[str, Tensor]:
        """Return prompt_embeds (L, D) and pooled_prompt_embeds (P,) of a prompt, in fp16."""
        embeds = {}
        with reading(self.path, ""):  # the checksum of its page may be wrong
            row = self.file.read_row_group(self.row_of_prompt[prompt], list(self.TENSORS), use_threads=False)
            for name in self.TENSORS:
                embeds[name] = torch.from_numpy(row[name].chunk(0).to_numpy_ndarray()[0].copy())
        return embeds


def sample_order(
    groups: list[list[Example]], class_every: int, seed: int, micro_batch: int, length: int
) -> list[Example]:
    """Return which image each sample of the run shows: each image of a shape comes once before any comes again.

    groups: the images of the subject and perhaps those of its class. The subject takes class_every - 1 turns, then the
    class takes one. A turn is a sample or, where shapes differ, a micro-batch, which holds images of one shape. Shapes
    get turns in proportion to their images.
    """
    turns = [0] * (class_every - 1) + [1] if len(groups) > 1 else [0]  # of the groups, over and over
    rng = random.Random(seed)
    shapes = {example.shape for group in groups for example in group}
    samples_per_turn = micro_batch if len(shapes) > 1 else 1
    # For each group: a deck of its images' shapes, which says what shape comes next, and one of images for each shape.
    shape_decks = []
    image_decks = []
    for group in groups:
        shape_decks.append(Deck([example.shape for example in group], rng))
        image_decks.append({shape: Deck([each for each in group if each.shape == shape], rng) for shape in shapes})
    order: list[Example] = []
    while len(order) < length:
        for group_number in turns:
            shape = shape_decks[group_number].deal()
            deck = image_decks[group_number][shape]
            for _ in range(samples_per_turn):
                order.append(deck.deal())
    return order[:length]


class Deck:
    """Deals its items in a random order, each of them once, then all again in another order, and so on."""

    def __init__(self, items: Sequence[Any], rng: random.Random) -> None:
        self.items = items
        self.rng = rng
        self.left: deque[Any] = deque()

    def deal(self) -> Any:
        if not self.left:
            self.left.extend(self.rng.sample(self.items, len(self.items)))
        return self.left.popleft()


@dataclass
class SampleDataset(Dataset):
    """Training samples by number. Every random choice about a sample is a function of (seed, sample number)."""

    order: list[Example]
    embeddings: PromptEmbeddings
    sigmas: Tensor  # of the noise schedule, from 1 down, shifted as the scheduler's config says
    args: Args
    seed: int

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Return latents and noise (16, H/8, W/8), mask (1, H/8, W/8), sigma (), loss_weight () and embeddings."""
        args = self.args
        example = self.order[number]
        generator = seeded_generator(self.seed, SAMPLE_STREAM, number)

        # Draws come in a fixed order, so that old seeds keep their samples: add new ones at the end. They say which
        # variant of the image and where in the VAE's posterior, the noise, its level, and whether there is a prompt.
        variants = load_file(example.latents)  # memory-mapped: the other variants are not read
        variant = int(torch.randint(len(variants["mean"]), (), generator=generator))
        stored = {name: tensor[variant].float() for name, tensor in variants.items()}
        mean = stored["mean"]
        posterior_noise = torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        sigma = draw_sigmas(args, self.sigmas, 1, generator)[0]
        is_dropped = bool(torch.rand((), generator=generator) < args.caption_dropout)  # its prompt becomes empty
        if "noise" in stored:  # a velocity of the class, true for its own noise, noise level and prompt alone
            latents = mean
            noise = stored["noise"]
            mask = torch.ones_like(mean[:1])
            sigma = stored["sigma"]
            is_dropped = False
        else:
            latents = mean + stored["std"] * posterior_noise
            mask = stored["mask"]
        sample = {
            "latents": latents,
            "noise": noise,
            "mask": mask,
            "sigma": sigma,
            "sample_number": torch.tensor(number),
            "loss_weight": torch.tensor(example.loss_weight),
        }
        return sample | self.embeddings["" if is_dropped else example.prompt]


def draw_sigmas(args: Args, schedule: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels, (count,), from a schedule as --weighting_scheme says.

    Schemes other than logit_normal and mode draw them uniformly, and differ in the weighting of the loss.
    """
    quantiles = diffusers.training_utils.compute_density_for_timestep_sampling(
        args.weighting_scheme, count, args.logit_mean, args.logit_std, args.mode_scale, generator=generator
    )
    indices = (quantiles * len(schedule)).long().clamp(max=len(schedule) - 1)  # `mode` can give exactly 1
    return schedule[indices]


# ---------------------------------------------------------------------------------------------------- model and LoRA
# The frozen transformer is loaded straight in the training dtype. PEFT adds the LoRA, in fp32; its forward pass is
# replaced by one that makes fewer passes over memory. The LoRA's parameters are all that the optimizer sees.


WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_transformer(model: LocalModel, args: Args, weight_dtype: torch.dtype) -> diffusers.SD3Transformer2DModel:
    """Load the transformer, frozen and in the training dtype."""
    kwargs: dict[str, Any] = {"dtype": weight_dtype}
    if args.quantize_base == "nf4":  # linear layers in 4 bits, everything else in weight_dtype
        kwargs["quantization_config"] = diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=weight_dtype
        )
    transformer = load_part(diffusers.SD3Transformer2DModel.from_pretrained, model, "transformer", **kwargs)
    if args.quantize_base == "int8":
        quantize_linear_layers(transformer)
    return transformer.requires_grad_(False).train()


def quantize_linear_layers(transformer: diffusers.SD3Transformer2DModel) -> None:
    """Replace each linear layer of the blocks' attention and feed-forward by an Int8Linear.

    One at a time, and before the transformer moves to the GPU: neither RAM nor the GPU ever holds two copies.
    """
    for block in transformer.transformer_blocks:
        names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        for name in names:
            if name.startswith(("attn", "ff")):
                block.set_submodule(name, Int8Linear(block.get_submodule(name)))


class Int8Linear(nn.Linear):  # PEFT and lora_targets know a linear layer by this class
    """A frozen linear layer that holds its weight in 8 bits, with a scale per output, and multiplies in 8 bits."""

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight, scale = quantize_rows(layer.weight.detach())  # (out, in) and (out, 1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        rows = x.flatten(0, -2)  # (N, in)
        if len(rows) > 16:
            result = Int8Product.apply(rows, self.weight, self.scale)
        else:  # torch._int_mm takes 17 rows or more
            result = rows @ (self.weight * self.scale).to(x.dtype).T
        if self.bias is not None:
            result += self.bias
        return result.view(*x.shape[:-1], -1)


class Int8Product(torch.autograd.Function):
    """rows @ (scale * weight).T for a frozen 8-bit weight, (out, in), and its scales, (out, 1).

    The factor `rows` is rounded to 8 bits, and so is the gradient of the result.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:  # (N, in) -> (N, out)
        ctx.save_for_backward(weight, scale)
        return int8_product(rows, weight).mul_(scale.T).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # (N, out) -> (N, in)
        weight, scale = ctx.saved_tensors
        # The sum is over the outputs, each of which has its own scale, so the gradient is scaled before it. The weight
        # is copied, 1 byte a number, since cuBLASLt's 8-bit kernels want its rows to lie along the sum.
        return int8_product(grad * scale.T, weight.T.contiguous()).to(grad.dtype), None, None


def int8_product(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows @ weight.T in fp32, (N, out), from rows (N, in) rounded to 8 bits and an 8-bit weight (out, in)."""
    quantized, scale = quantize_rows(rows)
    return torch._int_mm(quantized, weight.T) * scale  # sums of integers are exact


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (N, K) rounded to 8 bits, and the scale by which each is to be multiplied, (N, 1) in fp32.

    A row that is not finite gets a scale that is not finite, so its product is not finite either.
    """
    scale = rows.abs().amax(-1, keepdim=True).float().clamp_min(1e-30) / 127
    return (rows / scale).round_().to(torch.int8), scale


def add_lora(transformer: diffusers.SD3Transformer2DModel, args: Args, seed: int) -> None:
    """Add a new LoRA to the transformer, in fp32, whatever the transformer's dtype is."""
    from peft import LoraConfig  # takes 2 s, which a wrong command line should not cost
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(seed)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(transformer, args.lora_layers),
        init_lora_weights="gaussian",
    )
    transformer.add_adapter(config)
    diffusers.training_utils.cast_training_params(transformer, dtype=torch.float32)
    if not args.lora_dropout:
        for layer in transformer.modules():
            if isinstance(layer, LoraLayer):
                layer.forward = fused_forward(layer, layer.forward)


def lora_targets(transformer: nn.Module, layers: str) -> list[str]:
    """Return the full names of the linear layers that --lora_layers means, by ends of names or by patterns."""
    linear = [f".{name}" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    targets: set[str] = set()
    for layer in layers.split(","):
        targets.update(fnmatch.filter(linear, f"*.{layer.strip()}"))
    return sorted(name.removeprefix(".") for name in targets)


def fused_forward(layer: Any, peft_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a forward pass for a LoRA layer: base(x) + (x Aᵀ)(scale · Bᵀ), two products in the dtype of x.

    PEFT's own makes six passes over the activations, and keeps a copy of x in fp32 for the backward pass.
    """

    def forward(x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if layer.disable_adapters:
            return peft_forward(x)
        down = layer.lora_A["default"].weight.to(x.dtype)  # (rank, in)
        up = (layer.lora_B["default"].weight * layer.scaling["default"]).to(x.dtype)  # (out, rank)
        rows = x.flatten(0, -2)  # (N, in)
        result = layer.base_layer(rows).addmm_(rows @ down.T, up.T)  # in place, which saves a copy
        return result.view(*x.shape[:-1], -1)

    return forward


def lora_shapes(transformer: nn.Module) -> dict[str, torch.Size]:
    """Return the names and shapes of the LoRA's weights, as PEFT stores them."""
    from peft import get_peft_model_state_dict

    return {name: weight.shape for name, weight in get_peft_model_state_dict(transformer).items()}


def set_lora(transformer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set all weights of the LoRA. PEFT says nothing of names that are missing or unknown; this raises ValueError."""
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(transformer, weights)
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        raise ValueError(f"the LoRA lacks {missing}, and the model has no {result.unexpected_keys}")


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the LoRA's parameters in a module."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class OptimizerKind:
    """Where an optimizer is imported from, its default rate, its numbers per parameter, and options of its own."""

    module: str  # where it is imported from, and what is to be installed
    name: str
    learning_rate: float = 1e-4  # if --learning_rate is not given
    states: int = 2  # numbers that it keeps per parameter, each of at most 32 bits
    options: dict[str, Any] = field(default_factory=dict)


# A new optimizer goes here: a class that takes lr, betas, eps and weight_decay, of this file (__name__) or another.
OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim", "AdamW", options={"fused": True}),
    "adamw_8bit": OptimizerKind("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw_8bit": OptimizerKind("bitsandbytes.optim", "PagedAdamW8bit"),
    "prodigy": OptimizerKind(  # as in diffusers' scripts; arXiv 2306.06101. It multiplies the rate by what it finds.
        "prodigyopt",
        "Prodigy",
        learning_rate=1.0,
        states=4,
        options={"use_bias_correction": True, "safeguard_warmup": True},
    ),
    "adamw_schedulefree": OptimizerKind("schedulefree", "AdamWScheduleFree"),  # arXiv 2405.15682
}


def make_optimizer(lora_params: list[nn.Parameter], args: Args, samples_per_step: int) -> torch.optim.Optimizer:
    """Return the --optimizer of these parameters."""
    kind = OPTIMIZERS[args.optimizer]
    constructor = getattr(importlib.import_module(kind.module), kind.name)
    with redirect_stdout(None):  # Prodigy prints what kind of weight decay it has
        return constructor(
            lora_params,
            lr=args.learning_rate * samples_per_step if args.scale_lr else args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.adam_weight_decay,
            **kind.options,
        )


@contextmanager
def weights_to_keep(state: TrainState) -> Iterator[None]:
    """Within, a schedule-free optimizer's LoRA has the average of its steps, which is what to save and to draw with.

    Afterwards it has, to the bit, the point at which gradients are taken: eval() moves to the average, but train()
    moves back only up to rounding, hence the copy. Other optimizers have neither, and nothing changes.
    """
    lora_params = trainable_parameters(state.transformer)
    trained = [parameter.detach().to("cpu", copy=True) for parameter in lora_params]
    state.optimizer.eval()
    try:
        yield
    finally:
        state.optimizer.train()
        for parameter, value in zip(lora_params, trained, strict=True):
            parameter.data.copy_(value)


# -------------------------------------------------------------------------------------------------------------- loss
# Rectified flow: noisy = (1 - sigma) * latents + sigma * noise, and the transformer learns the velocity along that
# line, noise - latents. To change the loss, replace error**2 in flow_matching_loss. To add a weighting, compute it
# there, and add its name to the choices of --weighting_scheme; its noise levels are then drawn uniformly.


def training_loss(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype, args: Args) -> Tensor:
    """Return the mean loss of one micro-batch, ()."""
    latents, noise = batch["latents"], batch["noise"]  # (B, 16, H/8, W/8)
    sigmas = batch["sigma"].view(-1, 1, 1, 1)
    noisy_latents = (1 - sigmas) * latents + sigmas * noise
    error = predict_velocity(model, noisy_latents, batch, dtype) - (noise - latents)
    precondition = bool(args.precondition_outputs)
    losses = flow_matching_loss(error, sigmas, batch["mask"], args.weighting_scheme, precondition)  # (B,)
    return (batch["loss_weight"] * losses).mean()


def predict_velocity(model: nn.Module, noisy_latents: Tensor, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Return the velocity at noisy latents, (B, 16, H/8, W/8), for the sigma (B,) and the embeddings of a batch."""
    return model(
        hidden_states=noisy_latents.to(dtype),
        timestep=1000 * batch["sigma"],  # the model takes it in thousandths
        encoder_hidden_states=batch["prompt_embeds"].to(dtype),  # (B, L, D)
        pooled_projections=batch["pooled_prompt_embeds"].to(dtype),  # (B, P)
    ).sample.float()


def flow_matching_loss(error: Tensor, sigmas: Tensor, mask: Tensor, scheme: str, precondition: bool) -> Tensor:
    """Return the per-sample weighted squared error of the velocity, (B,). Rectified flow, arXiv 2403.03206, §3.1.

    error (B, 16, H/8, W/8), sigmas (B, 1, 1, 1). mask (B, 1, H/8, W/8) multiplies the squared error; the mean is over
    all pixels, so a small subject counts less. With precondition it is the reference's loss, on the
    clean latents noisy - sigma * velocity, which equals sigma² times this one.
    """
    weighting = diffusers.training_utils.compute_loss_weighting_for_sd3(scheme, sigmas)
    if precondition:
        weighting = weighting * sigmas**2
    return (weighting * mask * error**2).mean(dim=(1, 2, 3))


# ----------------------------------------------------------------------------------------------------- training loop
# The loop knows no epochs: the data loader holds exactly the samples that are left, in order.


MAX_SKIPPED_STEPS = 20  # fp16's loss scale starts too high, which costs a few steps
STOPPED = "Stopped after step {}; a checkpoint is saved. To continue, add --resume_from_checkpoint latest."
AGAIN = "the same command again, with --resume_from_checkpoint latest"


def prepare_training(
    args: Args, plan: Plan, state: TrainState, dataset: SampleDataset, accelerator: Accelerator
) -> tuple[nn.Module, DataLoader]:
    """Choose the recomputation, say how long the rest takes, and prepare model, optimizer and a loader of the rest."""
    samples_left = range(state.global_step * plan.samples_per_step, len(dataset.order))  # empty if the run is over
    steps_left = len(samples_left) // plan.samples_per_step
    if not steps_left:
        accelerator.print(f"step {state.global_step} is the last; a higher --max_train_steps would train on")
    else:
        accelerator.print(f"{count_of(steps_left, 'step')} to train, from step {state.global_step}")
        if args.compile:
            accelerator.print("compiling the blocks, which takes minutes; another shape of images compiles them again")
            compile_blocks(state.transformer, len({example.shape for example in dataset.order}))
        seconds_per_micro_batch = choose_recomputation(args, plan, state, dataset, accelerator)
        seconds = seconds_per_micro_batch * args.gradient_accumulation_steps
        total = steps_left * seconds
        in_all = f"{math.ceil(total)} s" if total < 60 else count_of(math.ceil(total / 60), "minute")
        where = " on a CPU" if accelerator.device.type == "cpu" else ""
        accelerator.print(f"about {seconds:.3g} s per step{where}, {in_all} in all")
    dataloader = DataLoader(
        Subset(dataset, samples_left),  # a resumed run starts after the samples that it has seen
        args.train_batch_size,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_end_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    model, state.optimizer, dataloader = accelerator.prepare(state.transformer, state.optimizer, dataloader)
    # Previews and checkpoints use the transformer inside DDP's wrapper, in weight_dtype.
    state.transformer = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    state.optimizer.train()  # a schedule-free one refuses its first step otherwise
    return model, dataloader


def train(
    args: Args,
    plan: Plan,
    state: TrainState,
    model: nn.Module,
    dataloader: DataLoader,
    accelerator: Accelerator,
    stop: StopRequest,
) -> None:
    """Train on every micro-batch of the data loader once, and save checkpoints and previews on the way.

    model is the transformer as accelerate prepared it (DistributedDataParallel on several GPUs). A stop that is
    requested saves a checkpoint after the current step and ends the run.
    """
    is_main = accelerator.is_main_process
    lora_params = trainable_parameters(state.transformer)
    step_loss = torch.zeros((), device=accelerator.device)
    skipped_in_a_row = 0
    started = time.monotonic()
    progress = tqdm(
        desc="Training",
        total=plan.max_train_steps,
        initial=state.global_step,
        unit="step",
        disable=no_bar(accelerator),
    )
    for batch in dataloader:
        # A micro-batch. accumulate() knows which one completes an optimizer step; before it, gradients only add up.
        with accelerator.accumulate(model):
            if args.lora_dropout:  # the only randomness inside the model
                torch.manual_seed(plan.seed + int(batch["sample_number"][0]))
            loss = training_loss(model, batch, plan.weight_dtype, args)
            accelerator.backward(loss)
            step_loss += loss.detach() / args.gradient_accumulation_steps
            if accelerator.sync_gradients:
                report = finish_gradients(lora_params, step_loss, args, accelerator, stop)
                step_loss.zero_()
                skipped_in_a_row = 0 if report.is_finite else skipped_in_a_row + 1
                # A step that is not finite is skipped, and counts all the same: by the scaler, which then lowers its
                # scale, or without one by leaving out step().
                if not report.is_finite:
                    state.optimizer.zero_grad()
                    stop_if_diverged(args, plan, state, skipped_in_a_row, accelerator)
                if report.is_finite or accelerator.scaler:
                    state.optimizer.step()
                state.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        # An optimizer step is complete.
        state.global_step += 1
        prodigy_factor = state.optimizer.param_groups[0].get("d", 1)
        learning_rate = state.lr_scheduler.get_last_lr()[0] * prodigy_factor
        with noted_logging(accelerator):
            accelerator.log({"loss": report.loss, "lr": learning_rate}, step=state.global_step)
        state.lr_scheduler.step()  # not prepared by accelerate, which would step it once per process
        progress.set_postfix_str(f"loss {report.loss:.4f}{vram_in_use()}", refresh=False)
        progress.update()

        # Save when it is due, before previews, since they take long, and at the end, so that a run can be extended. A
        # step that was skipped is not worth an older checkpoint.
        has_previews = state.global_step in plan.preview_steps
        is_last = state.global_step == plan.max_train_steps
        is_due = args.checkpointing_steps > 0 and state.global_step % args.checkpointing_steps == 0
        is_worth_it = (has_previews or is_due) and report.is_finite
        if is_main and (report.stops or is_last or is_worth_it):
            save_checkpoint(args, plan, state, accelerator)
            seconds = (time.monotonic() - started) / (state.global_step - state.first_step)
            tqdm.write(f"step {state.global_step}: loss {report.loss:.4f}, {seconds:.3g} s per step, checkpoint saved")
        if report.stops:
            accelerator.wait_for_everyone()  # until the main process has saved the checkpoint
            raise SystemExit(STOPPED.format(state.global_step) if is_main else 1)
        if is_main and has_previews:
            drawing_since = time.monotonic()
            with weights_to_keep(state):
                make_previews(args, plan, state, accelerator)
            started += time.monotonic() - drawing_since  # so that the seconds per step are those of training
    progress.close()


def stop_if_diverged(args: Args, plan: Plan, state: TrainState, skipped: int, accelerator: Accelerator) -> None:
    """End the run after MAX_SKIPPED_STEPS skipped steps in a row, if its last were skipped, or at a scale of 1."""
    scale = accelerator.scaler.get_scale() if accelerator.scaler else math.inf  # each skipped step halves it
    tolerated = MAX_SKIPPED_STEPS - 1
    if state.global_step + 1 == plan.max_train_steps:
        tolerated = 1 if accelerator.scaler else 0  # the scaler doubles its scale now and then, which costs a step
    if skipped <= tolerated and scale > 1:
        return
    good = list_checkpoints(args.output_dir)
    where = f"The last good checkpoint is {good[-1]}." if good else "There is no checkpoint."
    message = (
        f"The training has diverged: the loss or gradients of the last {count_of(skipped, 'step')} were not finite, "
        "so these were skipped. In fp16, many of them also end a run because its loss scale falls to 1, below which "
        "small gradients become zero. Usual causes: a learning rate that is too high, fp16 where the model needs "
        f"bf16, embeddings of another model. {where} Start again with a lower --learning_rate or another "
        "--mixed_precision."
    )
    raise SystemExit(message if accelerator.is_main_process else 1)


@dataclass(frozen=True)
class StepReport:
    """What all processes agree on at the end of a step."""

    is_finite: bool  # the loss and all gradients, in every process
    loss: float  # the mean over the step's samples
    stops: bool  # whether some process has been asked to stop


def finish_gradients(
    lora_params: list[nn.Parameter], loss: Tensor, args: Args, accelerator: Accelerator, stop: StopRequest
) -> StepReport:
    """Clip the gradients, and let the processes agree.

    One reduce for all of it, the step's only wait for the GPU (but bitsandbytes' optimizers and Prodigy wait for each
    parameter).
    """
    norm = accelerator.clip_grad_norm_(lora_params, args.max_grad_norm or math.inf)
    is_finite = norm.isfinite() & loss.isfinite()
    values = torch.stack([is_finite.float(), loss, loss.new_tensor(stop.requested)])
    finite_share, mean_loss, stopping_share = accelerator.reduce(values, "mean").tolist()
    return StepReport(finite_share == 1, mean_loss, stopping_share > 0)


# ------------------------------------------------------------------------------------------------------- checkpoints
# A checkpoint is a folder checkpoint-N with two files: a LoRA that can be used as it is, and training_state.pt with
# all that training needs to continue to the same result. That one is written last: with it the checkpoint is complete.


def start_or_resume(
    args: Args, plan: Plan, transformer: diffusers.SD3Transformer2DModel, accelerator: Accelerator
) -> TrainState:
    """Load the LoRA's weights, and make optimizer and schedule: new, or as the checkpoint left them."""
    saved = plan.checkpoint
    if saved or plan.start_lora:
        set_lora(transformer, saved["lora"] if saved else plan.start_lora)
    lora_params = trainable_parameters(transformer)
    accelerator.print(f"{sum(parameter.numel() for parameter in lora_params):,} parameters to train")
    optimizer = make_optimizer(lora_params, args, plan.samples_per_step)
    lr_scheduler = diffusers.optimization.get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=plan.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    if not saved:
        return TrainState(transformer, optimizer, lr_scheduler, global_step=0, first_step=0)

    # The optimizer's state is the checkpoint's, with what Prodigy has found; what flags set is this run's. A new flag
    # that sets an option of an optimizer belongs among these names.
    [group] = optimizer.state_dict()["param_groups"]
    [saved_group] = saved["optimizer"]["param_groups"]
    from_flags = {"params", "lr", "initial_lr", "betas", "eps", "weight_decay"}
    group |= {name: value for name, value in saved_group.items() if name not in from_flags}
    optimizer.load_state_dict(saved["optimizer"] | {"param_groups": [group]})
    # Every schedule is a function of the step alone: set it one step back, and let it make that step.
    lr_scheduler.last_epoch = saved["global_step"] - 1
    lr_scheduler.step()
    if accelerator.scaler and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])
    return TrainState(transformer, optimizer, lr_scheduler, saved["global_step"], first_step=saved["global_step"])


def save_checkpoint(args: Args, plan: Plan, state: TrainState, accelerator: Accelerator) -> None:
    """Write checkpoint-N, then remove those that it replaces.

    These are the oldest ones beyond --checkpoints_total_limit and, if this run was resumed from an earlier one, those
    that came after it then.
    """
    from peft import get_peft_model_state_dict

    scaler = accelerator.scaler
    lora = {}  # exact: alpha is not multiplied in
    for name, weight in get_peft_model_state_dict(state.transformer).items():
        lora[name] = weight.detach().to("cpu", copy=True)
    saved = {
        "global_step": state.global_step,
        "settings": plan.settings,
        "lora": lora,
        "optimizer": state.optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
    }
    content = io.BytesIO()
    torch.save(saved, content)
    folder = args.output_dir / f"checkpoint-{state.global_step}"
    folder.mkdir(exist_ok=True)
    with weights_to_keep(state):
        write_lora(folder / LORA_NAME, state.transformer, plan.name, args)
    write_file(folder / STATE_NAME, content.getbuffer())

    if not state.has_saved:
        for other in list_checkpoints(args.output_dir):
            if step_of(other) > state.first_step and other != folder:
                remove_checkpoint(other)
    state.has_saved = True
    if args.checkpoints_total_limit:
        for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
            remove_checkpoint(old)


def is_sd35(config: Any) -> bool:
    """Whether the base model is one of SD3.5, from the transformer's config."""
    return "v3.5" in architecture(config)


def write_lora(path: Path, transformer: diffusers.SD3Transformer2DModel, name: str, args: Args) -> None:
    """Write the LoRA in diffusers' layout, with alpha / rank multiplied into lora_B and alpha set to the rank.

    Programs disagree about where alpha belongs, and ComfyUI knows none in this layout; this way they all apply the
    same strength. Of PEFT's config only those fields are written that every version knows: an older PEFT answers an
    unknown one with a TypeError.
    """
    from peft import get_peft_model_state_dict

    config = transformer.peft_config["default"]
    scale = config.lora_alpha / config.r
    lora = {}
    for key, value in get_peft_model_state_dict(transformer).items():
        if not value.isfinite().all():
            raise SystemExit(f"The LoRA has weights that are not finite and is not saved. {path} stays as it was.")
        lora[f"transformer.{key}"] = value * scale if "lora_B" in key else value
    adapter = {
        "transformer.r": config.r,
        "transformer.lora_alpha": config.r,
        "transformer.target_modules": sorted(config.target_modules),
        "transformer.rank_pattern": {},
        "transformer.alpha_pattern": {},
    }
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, indent=2),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture(transformer.config)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.trigger_phrase": args.instance_prompt,
        "modelspec.resolution": f"{max(args.resolution)}x{max(args.resolution)}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_file(path, safetensors.torch.save(lora, metadata))


def architecture(config: Any) -> str:
    """Return the base model's name in Stability's ModelSpec, from the transformer's config."""
    if config.num_layers > 30:
        return "stable-diffusion-v3.5-large"
    if config.dual_attention_layers:
        return "stable-diffusion-v3.5-medium"
    return "stable-diffusion-v3-medium"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, ordered by their step."""
    found = {}
    for path in folder.glob(f"checkpoint-*/{STATE_NAME}"):
        if re.fullmatch("checkpoint-[0-9]+", path.parent.name):
            found[step_of(path.parent)] = path.parent
    return [found[step] for step in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's training state. It cannot run code. Raises UserError if it is not whole."""
    path = checkpoint / STATE_NAME
    with reading(path, ""):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the archive's checksums
                raise ValueError("it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)


# -------------------------------------------------------------------------------------------------- memory and speed
# Gradients need activations, which fill most of a small card. How many blocks may keep theirs is found by trying.
# Compiled blocks fuse the operations between matrix products, which then move less memory.


def compile_blocks(transformer: diffusers.SD3Transformer2DModel, shapes: int) -> None:
    """Compile each block in place when it first runs, and again for each of `shapes` shapes of images.

    Blocks of one kind share the compiled code. A model has three or four kinds: the first block, whose input needs no
    gradient, the last, those with a second attention, and the rest.
    """
    blocks = list(transformer.transformer_blocks)
    # The limit of 8 recompilations, by the name that torch 2.6 knows as well; to reach it is an error.
    torch._dynamo.config.cache_size_limit = 8 + len(blocks) * shapes
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)


def choose_recomputation(
    args: Args, plan: Plan, state: TrainState, dataset: SampleDataset, accelerator: Accelerator
) -> float:
    """Let as few blocks as possible recompute activations: none, half or all. Return a micro-batch's mean seconds.

    Each choice is tried on a micro-batch of the largest shape, with room reserved for the optimizer's states; its
    gradients are dropped. Which blocks recompute does not change a bit of the result, so each process decides for
    itself.
    """
    areas = [math.prod(example.shape) for example in dataset.order]
    largest = int(np.argmax(areas))
    batch = default_collate([dataset[largest]] * args.train_batch_size)
    batch = send_to_device(batch, accelerator.device)
    lora_params = trainable_parameters(state.transformer)
    optimizer_states = []
    for _ in range(OPTIMIZERS[args.optimizer].states):
        optimizer_states += [torch.empty_like(parameter) for parameter in lora_params]
    blocks = len(blocks_in_backward(state.transformer))
    counts = [blocks] if args.gradient_checkpointing else sorted({0, blocks // 2, blocks})
    if accelerator.device.type == "cuda":
        limit_gpu_memory(accelerator.device, plan.weight_dtype)
    started = time.monotonic()
    for count in counts:
        recompute_blocks(state.transformer, count)
        if count != counts[0] and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # the try that failed had filled the card
        try:
            seconds = time_micro_batch(state.transformer, batch, plan.weight_dtype, args)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error) or count == blocks:
                raise
        finally:
            state.transformer.zero_grad()
            diffusers.training_utils.free_memory()
    del optimizer_states  # only their room was wanted
    if args.compile:
        accelerator.print(f"compiled the blocks and tried a micro-batch in {time.monotonic() - started:.0f} s")
    total = len(state.transformer.transformer_blocks)
    recomputed = {0: "off", total: f"all {total} blocks"}.get(count, f"{count} of {total} blocks")
    accelerator.print(f"gradient checkpointing: {recomputed}, {peak_memory()}")
    return seconds * float(np.mean(areas)) / max(areas)  # smaller shapes take less, roughly by their pixels


def recompute_blocks(transformer: diffusers.SD3Transformer2DModel, count: int) -> None:
    """Recompute activations in the backward pass instead of keeping them, in the first `count` of its blocks.

    enable_gradient_checkpointing hands every block to `call`, which decides.
    """
    recomputed = set(blocks_in_backward(transformer)[:count])

    def call(block: nn.Module, *inputs: object) -> object:
        if block in recomputed:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    transformer.enable_gradient_checkpointing(call)


def blocks_in_backward(transformer: diffusers.SD3Transformer2DModel) -> list[nn.Module]:
    """Return the blocks that the backward pass goes through, which keep activations: from the first LoRA on."""
    blocks = list(transformer.transformer_blocks)
    for embedder in (transformer.pos_embed, transformer.context_embedder, transformer.time_text_embed):
        if trainable_parameters(embedder):
            return blocks
    while blocks and not trainable_parameters(blocks[0]):
        blocks.pop(0)
    return blocks


def time_micro_batch(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype, args: Args) -> float:
    """Return the seconds that a forward and a backward pass take."""
    for _ in range(2 if batch["latents"].is_cuda or args.compile else 1):  # the first one loads kernels or compiles
        started = time.monotonic()
        loss = training_loss(model, batch, dtype, args)
        loss.backward()
        loss.item()  # waits for the GPU
    return time.monotonic() - started


# ------------------------------------------------------------------ on a first reading, stop here: the job is complete
# What follows serves it. Part II is what a run also makes, part III what can be asked of it, part IV what is checked
# before it begins, part V what the world does to it.

# ---------------------------------------------------------------------------------- part II: what a run also makes
# Previews and class images are drawn by diffusers' pipeline from stored embeddings, without text encoders: previews by
# the transformer as it is being trained, class images by the transformer before it has a LoRA. Class velocities take
# one pass of that transformer each, and no pipeline.


def make_previews(args: Args, plan: Plan, state: TrainState, accelerator: Accelerator) -> list[tuple[str, Path]]:
    """Write samples/*.png and progress.png; return the prompt and the file of each sample."""
    folder = args.output_dir / "samples"
    pipeline = make_pipeline(state.transformer, plan, accelerator.device)
    count = args.num_validation_images if state.global_step else 1  # of the untrained model one is enough
    negative_prompt = plan.embeddings[args.negative_prompt]
    written: list[tuple[str, Path]] = []
    shown: dict[str, list[Image.Image]] = defaultdict(list)
    for row, prompt in enumerate(args.validation_prompt):
        for number in range(count):
            generator = seeded_generator(plan.seed, PREVIEW_STREAM, number)  # the same noise in each preview
            try:
                images = generate_images(pipeline, plan.embeddings[prompt], negative_prompt, [generator], args)
            except FloatingPointError as error:
                print(f"note: no preview of {prompt!r} after step {state.global_step}: {error}")
                continue
            path = folder / f"step-{state.global_step:06d}-prompt-{row}-{number}.png"
            shown[prompt].append(images[0])
            with only_noted(f"{path} is not written"):
                save_image(images[0], path, prompt)
                written.append((prompt, path))
    if len(written) == count * len(args.validation_prompt):  # the sheet is drawn from the files
        sheet = draw_progress(folder, args.validation_prompt, last_step=state.global_step)
        sheet_path = folder / "progress.png"
        is_last = state.global_step >= plan.max_train_steps
        with only_noted(f"{sheet_path} is not written"):
            save_image(sheet, sheet_path)
            if is_last:
                print(f"wrote {sheet_path}: the previews side by side")
        if is_last:
            shown["progress"] = [sheet]
    with noted_logging(accelerator):
        log_images(shown, state.global_step, accelerator)
    return written


def preview_untrained(args: Args, plan: Plan, state: TrainState, accelerator: Accelerator) -> None:
    """Draw what the model makes of the prompts before it is trained."""
    if accelerator.is_main_process and args.validation_prompt and state.global_step == 0:
        make_previews(args, plan, state, accelerator)


def make_pipeline(
    transformer: diffusers.SD3Transformer2DModel, plan: Plan, device: torch.device
) -> diffusers.StableDiffusion3Pipeline:
    """Return a pipeline of the transformer as it is and the VAE, without text encoders."""
    vae = load_vae(plan.base_model.files, plan.weight_dtype).to(device)
    vae.enable_slicing()  # decodes images one by one
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(plan.base_model.noise_scheduler.config),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    # Its bar takes the line of the training's bar, since not every terminal can move the cursor up to a second line.
    pipeline.set_progress_bar_config(desc="Generating", leave=False, position=0, disable=not sys.stderr.isatty())
    return pipeline


def guidance_of(args: Args, config: Any) -> float:
    """Return --guidance_scale, or else what is published for the base model, from the transformer's config."""
    if args.guidance_scale is not None:
        return args.guidance_scale
    return 4.5 if is_sd35(config) else 7.0


def generate_images(
    pipeline: diffusers.StableDiffusion3Pipeline,
    prompt: dict[str, Tensor],
    negative_prompt: dict[str, Tensor],
    generators: list[torch.Generator],
    args: Args,
) -> list[Image.Image]:
    """Draw one image per generator, all at once. Raises FloatingPointError if pixels are not finite.

    prompt and negative_prompt are embeddings: prompt_embeds (L, D) and pooled_prompt_embeds (P,).
    """
    transformer = pipeline.transformer

    def for_each_image(embeds: Tensor) -> Tensor:
        return torch.stack([embeds] * len(generators)).to(pipeline.vae.device, pipeline.vae.dtype)

    transformer.eval()
    with torch.compiler.set_stance("force_eager"):  # compiling for this size of batch would take minutes
        pixels = pipeline(
            prompt_embeds=for_each_image(prompt["prompt_embeds"]),
            pooled_prompt_embeds=for_each_image(prompt["pooled_prompt_embeds"]),
            negative_prompt_embeds=for_each_image(negative_prompt["prompt_embeds"]),
            negative_pooled_prompt_embeds=for_each_image(negative_prompt["pooled_prompt_embeds"]),
            height=max(args.resolution),
            width=max(args.resolution),
            guidance_scale=guidance_of(args, transformer.config),
            num_inference_steps=args.num_inference_steps,
            generator=generators,
            output_type="np",
        ).images  # (N, H, W, 3) in [0, 1]
    transformer.train()
    if not np.isfinite(pixels).all():
        raise FloatingPointError("the image is not finite, so it would be black")
    return pipeline.image_processor.numpy_to_pil(pixels)


def save_image(image: Image.Image, path: Path, description: str = "") -> None:
    """Write a PNG; a description goes into its text."""
    text = PngImagePlugin.PngInfo()
    if description:
        text.add_itxt("Description", description)
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=text)
    write_file(path, content.getbuffer())


def log_images(shown: dict[str, list[Image.Image]], step: int, accelerator: Accelerator) -> None:
    """Log images under their titles to the trackers that support images."""
    values = {title: np.array(images) for title, images in shown.items()}
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images(values, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images(values, step=step)


PROGRESS_MARGINS = (192, 28)  # pixels at the left and at the top of the sheet, for its labels


def draw_progress(folder: Path, prompts: Sequence[str], last_step: int) -> Image.Image:
    """Draw a sheet with a row per prompt and a column per preview so far, at most 16.

    Previews that are unreadable, or of other prompts than those of this run, are left out.
    """
    found = [int(path.name.split("-")[1]) for path in folder.glob("step-[0-9]*-prompt-0-0.png")]
    steps = sorted(step for step in found if step <= last_step)  # later ones are those of a run that was resumed
    every = 1 + len(steps) // 15
    columns = {}  # step: (256 * rows, 256, 3)
    for step in [*steps[:-1:every], last_step]:
        with suppress(UserError):
            column = []
            for row, prompt in enumerate(prompts):
                with opened_photo(folder / f"step-{step:06d}-prompt-{row}-0.png") as image:
                    if image.info.get("Description", prompt) != prompt:
                        raise ValueError("it is of another prompt")
                    column.append(np.asarray(image.convert("RGB").resize((256, 256))))
            columns[step] = np.vstack(column)
    return label_progress(Image.fromarray(np.hstack(list(columns.values()))), list(columns), prompts)


def label_progress(images: Image.Image, steps: Sequence[int], prompts: Sequence[str]) -> Image.Image:
    """Return the images, 256 pixels wide and high each, with the steps above and the prompts beside them."""
    left, top = PROGRESS_MARGINS
    sheet = Image.new("RGB", (left + images.width, top + images.height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=16)
    for column, step in enumerate(steps):
        draw.text((left + 256 * column + 8, 6), f"step {step}", "black", font)
    for row, prompt in enumerate(prompts):
        lines = textwrap.wrap(prompt, width=20, max_lines=11)
        draw.multiline_text((8, top + 256 * row + 8), "\n".join(lines), "black", font)
    sheet.paste(images, (left, top))  # last, over a label that is too wide
    return sheet


MADE_BY = "generated_with.json"  # beside class images that this program has generated


def class_folder(args: Args) -> Path:
    """Return --class_data_dir, or a folder that another model, class prompt or resolution does not share."""
    made_by = [model_name(args), args.revision, args.class_prompt, max(args.resolution)]
    return args.class_data_dir or args.output_dir / f"class_{args.class_samples}-{digest(made_by)}"


def model_name(args: Args) -> str:
    """Return the base model's name without a slash at its end, as completion adds it."""
    return Path(args.pretrained_model_name_or_path).as_posix()


def class_images_made_by(args: Args) -> dict[str, object]:
    """Return what generated class images depend on, as it is stored beside them."""
    return {
        "model": model_name(args),
        "class_prompt": args.class_prompt,
        "resolution": max(args.resolution),
    }


def make_class_images(
    args: Args, plan: Plan, transformer: diffusers.SD3Transformer2DModel, accelerator: Accelerator
) -> list[Example]:
    """Generate the class images that are missing, and return all of them; the transformer must not have a LoRA yet."""
    folder = class_folder(args)
    folder.mkdir(parents=True, exist_ok=True)
    # A user's own images count as well; what is missing gets the names that are free.
    lacking = max(0, args.num_class_images - len(find_images(folder)))
    number_of = {folder / f"class-{number:05}.png": number for number in range(args.num_class_images)}
    missing = [path for path in number_of if not path.exists()][:lacking]
    accelerator.wait_for_everyone()  # until every process has counted

    # Each process makes its share of the batches.
    batches = [missing[i : i + args.sample_batch_size] for i in range(0, len(missing), args.sample_batch_size)]
    share = batches[accelerator.process_index :: accelerator.num_processes]
    if share:
        write_file(folder / MADE_BY, json.dumps(class_images_made_by(args), indent=2).encode())
        pipeline = make_pipeline(transformer, plan, accelerator.device)
        prompt = plan.embeddings[str(args.class_prompt)]
        for batch in tqdm(share, "Class images", unit="batch", disable=no_bar(accelerator)):
            generators = [seeded_generator(plan.seed, CLASS_IMAGE_STREAM, number_of[path]) for path in batch]
            try:
                images = generate_images(pipeline, prompt, plan.embeddings[""], generators, args)
            except FloatingPointError as error:
                fix = "Use another --mixed_precision, or images of your own."
                raise SystemExit(f"Class images cannot be made: {error}. {fix}") from error
            for path, image in zip(batch, images, strict=True):
                save_image(image, path)
        del pipeline
    accelerator.wait_for_everyone()

    problems = Problems(accelerator)
    paths = find_images(folder)[: args.num_class_images]
    examples = as_class_samples(find_examples(paths, args, plan.base_model, accelerator, problems), args)
    problems.stop_if_any()
    encode_latents(examples, args, plan.base_model.files, accelerator)
    return examples


def as_class_samples(examples: list[Example], args: Args) -> list[Example]:
    """Return the examples with the class prompt, and with the weight that samples of the class have."""
    prompt = str(args.class_prompt)
    return [replace(example, prompt=prompt, loss_weight=args.prior_loss_weight) for example in examples]


VERSIONS = 8  # noisy ones of a photo, in a file of velocities


def velocity_files(args: Args, plan: Plan) -> list[tuple[Path, Example]]:
    """Return the files of velocities, each with the photo that it starts from; photos of the subject take turns.

    A file is named by a digest of all that it depends on; the run's seed is not among it, so that runs share files.
    """
    prompt = str(args.class_prompt)
    depends_on = [
        plan.base_model.identity,
        str(plan.weight_dtype),
        args.quantize_base,
        checksum_of(prompt, plan.embeddings[prompt]),
        digest(plan.base_model.noise_scheduler.sigmas.tolist()),
        args.weighting_scheme,
        args.logit_mean,
        args.logit_std,
        args.mode_scale,
    ]
    photos = Deck(plan.examples, random.Random(0))
    files = []
    for number in range(math.ceil(args.num_class_images / VERSIONS)):
        photo = photos.deal()
        name = digest([*depends_on, photo.latents.name, number])
        files.append((class_folder(args) / f"{name}.safetensors", photo))
    return files


def make_class_velocities(
    args: Args, plan: Plan, transformer: diffusers.SD3Transformer2DModel, accelerator: Accelerator
) -> list[Example]:
    """Make the missing files of velocities; return an Example for each file. The transformer must not have a LoRA."""
    class_folder(args).mkdir(parents=True, exist_ok=True)
    files = velocity_files(args, plan)
    missing = [(path, photo) for path, photo in files if not are_latents(path)]
    accelerator.wait_for_everyone()  # until every process has counted

    share = missing[accelerator.process_index :: accelerator.num_processes]  # each process makes its own
    for path, photo in tqdm(share, "Class velocities", unit="file", disable=no_bar(accelerator)):
        generator = seeded_generator(CLASS_IMAGE_STREAM, path.stem)
        write_latents(path, class_velocities(photo, generator, args, plan, transformer))
    accelerator.wait_for_everyone()
    examples = as_class_samples([replace(photo, latents=path) for path, photo in files], args)
    check_visible(examples)
    return examples


@torch.no_grad()
def class_velocities(
    photo: Example, generator: torch.Generator, args: Args, plan: Plan, transformer: diffusers.SD3Transformer2DModel
) -> dict[str, Tensor]:
    """Return V samples whose target is what the model now predicts for the class prompt at noisy versions of a photo.

    Training mixes noisy latents x = (1 - sigma) * latents + sigma * noise, and its target is noise - latents. To give
    back x and the prediction v, the latents are x - sigma * v and the noise is x + (1 - sigma) * v, both
    (V, 16, H/8, W/8) in fp16, with their sigma (V,). Latents are stored as "mean", their name in other files.
    """
    crops = load_file(photo.latents)["mean"].float()
    latents = crops[torch.randint(len(crops), (VERSIONS,), generator=generator)]
    noise = torch.randn(latents.shape, generator=generator)
    sigma = draw_sigmas(args, plan.base_model.noise_scheduler.sigmas, VERSIONS, generator)
    sigmas = sigma.view(-1, 1, 1, 1)
    x = (1 - sigmas) * latents + sigmas * noise
    prompt = default_collate([plan.embeddings[str(args.class_prompt)]] * VERSIONS)
    inputs = prompt | {"x": x, "sigma": sigma}
    velocities = []
    for start in range(0, VERSIONS, args.sample_batch_size):
        part = {name: tensor[start : start + args.sample_batch_size] for name, tensor in inputs.items()}
        part = send_to_device(part, transformer.device)
        velocities.append(predict_velocity(transformer, part["x"], part, plan.weight_dtype).cpu())
    v = torch.cat(velocities)
    if not v.isfinite().all():
        raise SystemExit("Class velocities cannot be made: they are not finite. Use another --mixed_precision.")
    return {"mean": (x - sigmas * v).half(), "noise": (x + (1 - sigmas) * v).half(), "sigma": sigma}


def with_class_examples(plan: Plan, class_examples: list[Example], accelerator: Accelerator) -> Plan:
    """Return the plan with a digest of the class samples' files in its settings; note if the checkpoint has another.

    That is not refused: images that were lost are made again, the same but for a GPU's rounding.
    """
    found = digest([example.latents.name for example in class_examples])
    before = plan.checkpoint.get("settings", {}).get("class images", found)
    if before != found:
        accelerator.print("note: the samples of the class differ from those that the checkpoint was trained with")
    return replace(plan, settings=plan.settings | {"class images": found})


# ----------------------------------------------------------------------------------------------- model card and Hub
# The Hub is asked twice: preflight finds out whether the token is good, and before anything that takes long the
# repository is created. The upload comes last; if it fails, everything is on disk.


def publish(args: Args, plan: Plan, state: TrainState, accelerator: Accelerator, stop: StopRequest) -> None:
    """Write the LoRA, its last previews and its card, report them, and upload them with --push_to_hub."""
    path = args.output_dir / LORA_NAME
    with weights_to_keep(state):
        write_lora(path, state.transformer, plan.name, args)
        print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")
        stop.end_at_once()
        previews = make_previews(args, plan, state, accelerator) if args.validation_prompt else []
    with only_noted("README.md is not written"):
        write_model_card(args, plan, state, previews)
    samples = count_of(len(list(args.output_dir.glob("samples/step-*.png"))), "sample")
    print(f"README.md and {samples} beside it; {peak_memory()}, {time.monotonic() - STARTED:.0f} s")
    if args.push_to_hub:
        push_to_hub(args, plan, previews)


CARD_MARK = "<!-- written by train_dreambooth_sd3_lora_miniature.py -->"  # a card without it is somebody else's


def write_model_card(args: Args, plan: Plan, state: TrainState, previews: list[tuple[str, Path]]) -> None:
    """Write README.md for the Hub: base model, trigger words, gallery, how to load the LoRA, license and settings."""
    path = args.output_dir / "README.md"
    base = args.pretrained_model_name_or_path
    repository = None if Path(base).is_dir() else base
    family = "sd3.5" if is_sd35(state.transformer.config) else "sd3"
    data = ModelCardData(
        license="other",
        license_name="stabilityai-ai-community" if base.startswith("stabilityai/") else "license-of-the-base-model",
        license_link=f"https://huggingface.co/{base}/blob/main/LICENSE.md" if repository else None,
        base_model=repository,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=args.instance_prompt,
        tags=[
            "text-to-image",
            "diffusers-training",
            "diffusers",
            "lora",
            "template:sd-lora",  # diffusers' own cards have it
            family,
            f"{family}-diffusers",
        ],
        widget=[{"text": prompt, "output": {"url": f"samples/{file.name}"}} for prompt, file in previews],
    )
    write_file(path, card_text(args, plan, state.global_step, data).encode())


def card_text(args: Args, plan: Plan, steps: int, data: ModelCardData) -> str:
    """Return the card with its data; a base model that is a folder is named without its path."""
    prompt = args.instance_prompt
    settings = json.dumps(plan.settings, indent=2, ensure_ascii=False)
    source = args.pretrained_model_name_or_path
    base = f"[{source}](https://huggingface.co/{source})"
    if Path(source).is_dir():
        family = "Stable Diffusion 3.5" if is_sd35(plan.base_model.skeleton.config) else "Stable Diffusion 3"
        base = f"a local copy of {family} (`{Path(source).resolve().name}`)"
        source = "FOLDER OR REPOSITORY OF THE BASE MODEL"
    code = usage_code(args, plan, source)
    files = "Files & versions"
    if "/" in plan.name:  # a repository
        files = f"[{files}](/{plan.name}/tree/main)"
    return f"""---
{data.to_yaml()}
---

{CARD_MARK}
# {plan.name}

<Gallery />

This LoRA teaches {base} what **{prompt}** looks like. It was trained with DreamBooth.

## Trigger words

You should use `{prompt}` to trigger the image generation.

## Download it

`{LORA_NAME}` is under {files}.

## Use it

Load it in ComfyUI at strength 1, or in diffusers 0.40 or later (earlier, `dtype` was called `torch_dtype`). The file
was tested with diffusers 0.31 and peft 0.15, with diffusers 0.42.1 and peft 0.21.2, and with versions in between.

```python
{code}
```

The license of the base model applies. Trained for {steps} steps with:

```json
{settings}
```
"""


def usage_code(args: Args, plan: Plan, source: str) -> str:
    """Return Python code that draws --instance_prompt with the LoRA, with what training and previews had.

    That matters: diffusers pads a prompt to 256 T5 tokens unless it is told otherwise, and a LoRA that was trained on
    fewer of them loses its likeness.
    """
    about = plan.embeddings.about
    loading = [python_text(source), f"dtype={plan.weight_dtype}"]
    if args.revision:
        loading.append(f"revision={python_text(args.revision)}")
    if args.variant:
        loading.append(f"variant={python_text(args.variant)}")
    if about.get("t5") == "none":
        loading += ["text_encoder_3=None", "tokenizer_3=None"]

    drawing = [python_text(args.instance_prompt)]
    if args.negative_prompt:
        drawing.append(f"negative_prompt={python_text(args.negative_prompt)}")
    drawing += [
        f"max_sequence_length={about.get('max_sequence_length')}",
        f"guidance_scale={guidance_of(args, plan.base_model.skeleton.config)}",
        f"num_inference_steps={args.num_inference_steps}",
        f"height={max(args.resolution)}",
        f"width={max(args.resolution)}",
    ]
    return f"""import torch
from diffusers import StableDiffusion3Pipeline

pipeline = {python_call("StableDiffusion3Pipeline.from_pretrained", loading)}
pipeline.load_lora_weights({python_text(plan.name)}, weight_name="{LORA_NAME}")
pipeline.enable_model_cpu_offload()
image = {python_call("pipeline", drawing)}.images[0]"""


def python_call(name: str, arguments: list[str]) -> str:
    """Return the source of a call, with an argument a line."""
    return f"{name}(\n    " + ",\n    ".join(arguments) + ",\n)"


def python_text(text: str) -> str:
    """Return the source of a string, with its letters as they are."""
    return json.dumps(text, ensure_ascii=False)


def create_repository(args: Args, plan: Plan, accelerator: Accelerator) -> Plan:
    """Create the repository to push to, unless it exists; return the plan with its full name."""
    problems = Problems(accelerator)
    if args.push_to_hub and accelerator.is_main_process:
        try:
            api = HfApi(token=args.hub_token)
            created = api.create_repo(plan.name, private=args.hub_private_repo or None, exist_ok=True)
            plan = replace(plan, name=created.repo_id)
        except Exception as error:  # of the Hub or the network, which share no class
            problems.add(hub_problem(error))
    problems.stop_if_any()
    return plan


def check_hub_login(args: Args, accelerator: Accelerator, problems: Problems) -> None:
    """Check that the Hub knows the token, if the LoRA is to be pushed."""
    if args.push_to_hub and accelerator.is_main_process:
        try:
            HfApi(token=args.hub_token).whoami()
        except Exception as error:  # of the Hub or the network, which share no class
            problems.add(hub_problem(error))


def hub_problem(error: Exception) -> str:
    return f"--push_to_hub: {first_line(error)}. With a token that has write access, run: hf auth login"


def push_to_hub(args: Args, plan: Plan, previews: list[tuple[str, Path]]) -> None:
    """Upload the LoRA, its card and its samples, and nothing else."""
    files = [LORA_NAME, "README.md", *[f"samples/{file.name}" for _, file in previews]]
    if previews:
        files.append("samples/progress.png")
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=plan.name, folder_path=args.output_dir, allow_patterns=files, commit_message="Add a LoRA"
        )
    except Exception as error:  # whatever it was, the LoRA is on disk
        includes = [f"--include={file}" for file in files]
        command = shell_line(["hf", "upload", plan.name, str(args.output_dir), ".", *includes])
        raise SystemExit(
            f"The upload failed: {first_line(error)}\nNothing is lost. To upload it, run: {command}"
        ) from error
    print(f"pushed to {plan.name}")


# -------------------------------------------------------------------------------------- part III: what can be asked
# Each flag is declared once, as a field of Args: its group in --help, its default, its help, its limits, and what
# another value does to a run that resumes. The parser, the checks of limits, the settings that checkpoints store and
# compare, and the command line for compute_embeddings.py are all derived from these declarations.


# What another value of a flag does to a run that resumes. Would the stored latents, the order of the samples or the
# optimizer's state no longer fit? Refused. Is it only the objective from here on? Noted. tests/test_resume.py asks for
# a value to try a new flag with.
REFUSED = "refused"
NOTED = "noted"
FREE = "free"  # it does not change the LoRA; where the data are is free, what they are is compared by their contents
FLAG_DETAILS: dict[str, Any] = {  # what a flag can say about itself, and what holds if it says nothing
    "minimum": None,  # lowest value of a number; None: 1 for integers, 1e-30 for real numbers
    "maximum": None,  # highest value of a number; None: 10 million for integers, 1e30 for real numbers
    "choices": None,
    "metavar": None,  # what --help shows in place of a value
    "const": None,  # the value if the flag is given without one
    "parse": None,  # converts the text from the command line; None: the field's type does
    "aliases": (),  # its names in the other script, which are easily mixed up
    "on_resume": NOTED,
    "embeddings_flag": None,  # the flag of compute_embeddings.py that must agree with this one
}


def flag(group: str, default: Any, help_text: str, **details: Any) -> Any:
    """Declare a command-line flag as a field of a dataclass; FLAG_DETAILS lists the details.

    A default of MISSING makes the flag required.
    """
    if not details.keys() <= FLAG_DETAILS.keys():
        raise TypeError(f"a flag has no {details.keys() - FLAG_DETAILS.keys()}; see FLAG_DETAILS")
    metadata = {"group": group, "help": help_text, **FLAG_DETAILS, **details}
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


# fmt: off
@dataclass(frozen=True, kw_only=True)
class Args:
    """The command line. The reference's flags keep their names; the others are named as in diffusers' scripts."""

    # model
    pretrained_model_name_or_path: str = flag(
        "model", MISSING, "SD3 or SD3.5: a Hub repository, or a folder in diffusers' layout", metavar="MODEL",
        on_resume=FREE, embeddings_flag="pretrained_model_name_or_path")
    revision: str | None = flag(
        "model", None, "branch, tag or commit of the repository; unset: its main branch", embeddings_flag="revision")
    variant: str | None = flag(
        "model", None, "variant of the weight files, such as fp16; unset: the plain files",
        on_resume=REFUSED, embeddings_flag="variant")
    cache_dir: str | None = flag(
        "model", None, "where downloads are kept; unset: the Hugging Face cache", metavar="DIR",
        on_resume=FREE, embeddings_flag="cache_dir")

    # data
    instance_data_dir: Path = flag(
        "data", MISSING, "folder with the images of the subject", metavar="DIR",
        aliases=("local_data_dir",), on_resume=FREE, embeddings_flag="local_data_dir")
    data_df_path: Path = flag(
        "data", MISSING, "Parquet file that compute_embeddings.py wrote", metavar="FILE",
        aliases=("output_path",), on_resume=FREE, embeddings_flag="output_path")
    instance_prompt: str = flag(
        "data", MISSING, 'prompt of the images, such as "a photo of sks dog"', metavar="PROMPT",
        aliases=("prompt",), embeddings_flag="prompt")
    resolution: tuple[int, ...] = flag(
        "data", (512,), "training resolution: the side of a square in pixels, a multiple of 16; with several, such as "
        "512 1024, each image is used at every one that it is large enough for", on_resume=REFUSED)
    aspect_ratio_buckets: str | None = flag(
        "data", None, "shapes to train on instead of the square; without a value, common shapes of the same area",
        const="auto", metavar="H,W;H,W", on_resume=REFUSED)
    center_crop: bool = flag(
        "data", False, "crop the center of an image instead of a random part", on_resume=REFUSED)
    random_flip: bool = flag("data", False, "mirror images at random", on_resume=REFUSED)
    caption_dropout: float = flag(
        "data", 0.0, "probability that a sample is trained with the empty prompt", minimum=0, maximum=0.999999)
    alpha_mask: bool = flag(
        "data", False, "weight the loss by an image's alpha channel or its mask (NAME.mask.png, NAME_mask.png or "
        "NAME-masklabel.png), so that the background is learned less", on_resume=REFUSED)
    max_sequence_length: int | None = flag(
        "data", None, "number of T5 tokens that the embeddings must have; unset: any", on_resume=FREE,
        embeddings_flag="max_sequence_length")
    dataloader_num_workers: int = flag(
        "data", 0, "worker processes that read samples; 0: the main process reads them", minimum=0, on_resume=FREE)

    # prior preservation
    with_prior_preservation: bool = flag(
        "prior preservation", False, "mix in samples of the class, so that the model keeps it",
        on_resume=REFUSED)
    class_every_n_samples: int = flag(
        "prior preservation", None, "every Nth sample shows the class; a higher N teaches the subject sooner and "
        "keeps the class less; unset: 2 for images, 4 for velocities", minimum=2, on_resume=REFUSED)
    class_prompt: str | None = flag(
        "prior preservation", None, 'prompt of the class, such as "a photo of a dog"', metavar="PROMPT",
        embeddings_flag="class_prompt")
    class_samples: str = flag(
        "prior preservation", "images", "what shows the class: images that the model draws, or velocities that it "
        "predicts, which takes a twentieth of the time", choices=("images", "velocities"), on_resume=REFUSED)
    class_data_dir: Path | None = flag(
        "prior preservation", None, "folder of class images or velocities; unset: a folder in --output_dir",
        metavar="DIR", on_resume=FREE)
    num_class_images: int = flag(
        "prior preservation", None, "number of class images or velocities; missing ones are made; unset: 100 images, "
        "256 velocities, which are made in eights", on_resume=REFUSED)
    sample_batch_size: int = flag(
        "prior preservation", 4, "number of class images or velocities to make at once", on_resume=FREE)
    prior_loss_weight: float = flag(
        "prior preservation", None, "weight of a sample of the class in the loss; unset: 1 for images, 8 for "
        "velocities", minimum=0)

    # LoRA
    pretrained_lora_path: str | None = flag(
        "LoRA", None, "LoRA to start from: a file, a folder or a repository; unset: a new one", metavar="LORA",
        on_resume=FREE)
    rank: int = flag("LoRA", 4, "rank of the update matrices", maximum=4096, on_resume=REFUSED)
    lora_alpha: float = flag(
        "LoRA", None, "updates are scaled by alpha / rank; unset: the rank, for a scale of 1", on_resume=REFUSED)
    lora_dropout: float = flag(
        "LoRA", 0.0, "dropout probability of the LoRA's input; above 0, a step is slower", minimum=0, maximum=0.999999)
    lora_layers: str = flag(  # diffusers' eight; SD3.5-medium has a second attention, attn2, that they leave out
        "LoRA", "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,"
        "attn.to_add_out",
        "linear layers to train: the ends of their names, or patterns such as transformer_blocks.12.attn.* or attn2.*",
        metavar="LAYER,...", on_resume=REFUSED)

    # training
    output_dir: Path = flag(
        "training", Path("sd3-dreambooth-lora"), "folder for everything that is written", metavar="DIR",
        on_resume=FREE)
    dry_run: bool = flag(
        "training", False, "run the quick checks and print the plan without training", on_resume=FREE)
    seed: int | None = flag(
        "training", None, "makes the run repeatable; unset: a seed is drawn and printed", minimum=0,
        maximum=2**63 - 1, on_resume=REFUSED)
    train_batch_size: int = flag("training", 4, "images per device and forward pass", on_resume=FREE)
    gradient_accumulation_steps: int = flag("training", 1, "forward passes per optimizer step", on_resume=FREE)
    num_train_epochs: int = flag("training", 1, "epochs over the images, unless --max_train_steps is given")
    max_train_steps: int | None = flag("training", None, "optimizer steps; unset: from --num_train_epochs")
    learning_rate: float = flag(
        "training", None, "peak learning rate; unset: 1e-4, or 1 for prodigy, which scales it by its own estimate")
    scale_lr: bool = flag("training", False, "multiply the learning rate by the number of images per optimizer step")
    lr_scheduler: str = flag(
        "training", "constant", "learning rate schedule",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"))
    lr_warmup_steps: int = flag(
        "training", 0, "optimizer steps of warm-up, for schedules that have one", minimum=0)
    lr_num_cycles: int = flag("training", 1, "number of restarts of cosine_with_restarts")
    lr_power: float = flag("training", 1.0, "exponent of polynomial; above 1, the rate falls faster at first")
    weighting_scheme: str = flag(
        "training", "logit_normal", "how noise levels are drawn and weighted",
        choices=("logit_normal", "sigma_sqrt", "mode", "cosmap", "none"))
    logit_mean: float = flag(
        "training", 0.0, "mean of logit_normal; below 0: more of the high noise levels", minimum=-100, maximum=100)
    logit_std: float = flag("training", 1.0, "standard deviation of logit_normal")
    mode_scale: float = flag(
        "training", 1.29, "scale of mode: higher values draw more middle noise levels", minimum=-1, maximum=1.75)
    precondition_outputs: int = flag(
        "training", 0, "1: the reference's loss, on clean latents: sigma² times the loss on velocity",
        minimum=0, const=1, choices=(0, 1))
    optimizer: str = flag(
        "training", "adamw", "the 8-bit ones need bitsandbytes; the paged one can move its state to RAM when the GPU "
        "is full, but only at a --rank above 65; prodigy finds the learning rate itself and needs `pip install "
        "prodigyopt`; adamw_schedulefree keeps an average of its steps; both work best with a constant schedule",
        choices=tuple(OPTIMIZERS), parse=str.lower, on_resume=REFUSED)
    use_8bit_adam: bool = flag("training", False, "the same as --optimizer adamw_8bit", on_resume=FREE)
    adam_beta1: float = flag(
        "training", 0.9, "decay rate of the first moment", minimum=0, maximum=0.999999, on_resume=REFUSED)
    adam_beta2: float = flag("training", 0.999, "decay rate of the second moment", minimum=0, maximum=0.999999)
    adam_weight_decay: float = flag("training", 1e-4, "weight decay", minimum=0)
    adam_epsilon: float = flag("training", 1e-8, "added to the denominator of an update, against division by zero")
    max_grad_norm: float = flag("training", 1.0, "gradients are clipped to this norm; 0: they are not", minimum=0)

    # memory and speed
    mixed_precision: str | None = flag(
        "memory and speed", None, "precision of the frozen weights and the activations; unset: accelerate's "
        "setting", choices=("no", "fp16", "bf16"))
    quantize_base: str | None = flag(
        "memory and speed", None, "nf4: keep the frozen weights in 4 bits, which needs a GPU; int8: keep those of "
        "attention and feed-forward in 8 bits, and multiply in 8 bits as well", choices=("nf4", "int8"))
    compile: bool = flag(
        "memory and speed", False, "compile the transformer's blocks, which takes minutes at first; needs Triton on a "
        "GPU, a C++ compiler on a CPU")
    gradient_checkpointing: bool = flag(
        "memory and speed", False, "recompute the activations of all blocks; unset: only as many as memory "
        "requires", on_resume=FREE)
    allow_tf32: bool = flag("memory and speed", False, "use TF32 matrix products on Ampere GPUs and later")
    prior_generation_precision: str | None = flag(  # the reference's; nothing uses it
        "memory and speed", None, argparse.SUPPRESS, on_resume=FREE)
    local_rank: str | None = flag("memory and speed", None, argparse.SUPPRESS, on_resume=FREE)

    # previews
    validation_prompt: tuple[str, ...] = flag(
        "previews", (), "prompts of the previews", metavar="PROMPT", on_resume=FREE,
        embeddings_flag="validation_prompt")
    negative_prompt: str = flag(
        "previews", "", "negative prompt of the previews", metavar="PROMPT", on_resume=FREE,
        embeddings_flag="negative_prompt")
    num_validation_images: int = flag("previews", 4, "images per prompt", on_resume=FREE)
    validation_epochs: int = flag("previews", 50, "epochs between previews", on_resume=FREE)
    validation_steps: int | None = flag(
        "previews", None, "optimizer steps between previews, in place of --validation_epochs; 0: only before and "
        "after the training", minimum=0, on_resume=FREE)
    num_inference_steps: int = flag(
        "previews", None, "denoising steps of a preview or class image; unset: 28, or 4 for a turbo model",
        on_resume=FREE)
    guidance_scale: float | None = flag(
        "previews", None, "classifier-free guidance of a preview or class image; unset: 7 for SD3, 4.5 for SD3.5, "
        "none for a turbo model",
        minimum=0, on_resume=FREE)

    # checkpoints and logs
    checkpointing_steps: int = flag(
        "checkpoints and logs", 100, "optimizer steps between checkpoints; 0: one at the end alone", minimum=0,
        on_resume=FREE)
    checkpoints_total_limit: int = flag(
        "checkpoints and logs", 3, "number of checkpoints to keep, the newest ones; 0: all", minimum=0, on_resume=FREE)
    resume_from_checkpoint: str | None = flag(
        "checkpoints and logs", None, "checkpoint to continue from: the newest, or a path", metavar="latest|PATH",
        on_resume=FREE)
    report_to: str = flag(
        "checkpoints and logs", "tensorboard", "a tracker that accelerate supports, all, or none", metavar="TRACKER",
        on_resume=FREE)
    logging_dir: str = flag(
        "checkpoints and logs", "logs", "folder of TensorBoard's files, inside --output_dir", metavar="DIR",
        on_resume=FREE)

    # Hub
    push_to_hub: bool = flag(
        "Hub", False, "upload the LoRA, its card and its samples at the end", on_resume=FREE)
    hub_private_repo: bool = flag("Hub", False, "make the repository private, if it is new", on_resume=FREE)
    hub_model_id: str | None = flag(
        "Hub", None, "repository to upload to; unset: the name of --output_dir", metavar="REPOSITORY", on_resume=FREE)
    hub_token: str | None = flag(
        "Hub", None, "token; `hf auth login` or HF_TOKEN is safer, since command lines can be seen and logged",
        metavar="TOKEN", parse=str.strip, on_resume=FREE)
# fmt: on


def parse_args(argv: list[str] | None = None) -> Args:
    """Parse the command line; all mistakes that can be seen in it alone end the program in one message."""
    parser = Parser(Args, str(__doc__))
    values = parser.parse_values(argv)
    idle = idle_flags(values)
    values["resolution"] = tuple(sorted(set(values["resolution"])))
    for name, value in CLASS_DEFAULTS[values["class_samples"]].items():
        if values[name] is None:
            values[name] = value
    if values["use_8bit_adam"] and values["optimizer"] == "adamw":
        values["optimizer"] = "adamw_8bit"
    if values["learning_rate"] is None:
        values["learning_rate"] = OPTIMIZERS[values["optimizer"]].learning_rate
    if values["lora_alpha"] is None:
        values["lora_alpha"] = values["rank"]
    # Turbo models are made to draw in few steps, unguided.
    is_turbo = "turbo" in Path(values["pretrained_model_name_or_path"]).name.lower()
    if values["num_inference_steps"] is None:
        values["num_inference_steps"] = 4 if is_turbo else 28
    if values["guidance_scale"] is None and is_turbo:
        values["guidance_scale"] = 0.0
    args = Args(**values)
    problems = flag_problems(args) + combination_problems(args) + idle
    if problems:
        parser.error("\n  ".join(problems))
    return args


# What suits each kind of --class_samples. Velocities are what the model predicts with a new LoRA, so their loss begins
# at 0, and a larger weight holds it there.
CLASS_DEFAULTS = {
    "images": {"num_class_images": 100, "class_every_n_samples": 2, "prior_loss_weight": 1.0},
    "velocities": {"num_class_images": 256, "class_every_n_samples": 4, "prior_loss_weight": 8.0},
}

# Flags that do nothing without another one, and the values of that one which they need; (): any.
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "class_prompt": ("with_prior_preservation", ()),
    "class_samples": ("with_prior_preservation", ()),
    "class_data_dir": ("with_prior_preservation", ()),
    "num_class_images": ("with_prior_preservation", ()),
    "sample_batch_size": ("with_prior_preservation", ()),
    "class_every_n_samples": ("with_prior_preservation", ()),
    "prior_loss_weight": ("with_prior_preservation", ()),
    "validation_steps": ("validation_prompt", ()),
    "lr_num_cycles": ("lr_scheduler", ("cosine_with_restarts",)),
    "lr_power": ("lr_scheduler", ("polynomial",)),
    "lr_warmup_steps": (
        "lr_scheduler",
        ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    ),
    "logit_mean": ("weighting_scheme", ("logit_normal",)),
    "logit_std": ("weighting_scheme", ("logit_normal",)),
    "mode_scale": ("weighting_scheme", ("mode",)),
    "hub_private_repo": ("push_to_hub", ()),
}


def combination_problems(args: Args) -> list[str]:
    """Return what is wrong with flags that do not fit each other."""
    problems = []
    try:
        training_shapes(args)
    except ValueError:
        given = f"--resolution {listed(args.resolution)}"
        if args.aspect_ratio_buckets:
            given += f", --aspect_ratio_buckets {args.aspect_ratio_buckets}"
        problems.append(f"{given}: sides must be multiples of 16, and shapes have the form height,width;height,width")
    if len(args.resolution) > 1 and args.aspect_ratio_buckets not in (None, "auto"):
        problems.append("--aspect_ratio_buckets with custom shapes needs a single --resolution")
    if args.hub_token and args.report_to in ("wandb", "all"):
        problems.append("--hub_token with --report_to wandb could expose the token; use `hf auth login` instead")
    if len(args.validation_prompt) > 2 and " " not in "".join(args.validation_prompt):
        problems.append('--validation_prompt: prompts of several words need quotes, such as "a photo of sks dog"')
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        problems.append(
            f"--lr_scheduler polynomial ends at 1e-07; --learning_rate {args.learning_rate} must be higher"
        )
    if args.use_8bit_adam and not args.optimizer.endswith("8bit"):
        problems.append(f"--use_8bit_adam and --optimizer {args.optimizer} are two different optimizers: choose one")
    if args.optimizer == "adamw_schedulefree" and args.adam_beta1 < 0.01:
        problems.append("--optimizer adamw_schedulefree divides by --adam_beta1, which must be at least 0.01 for it")
    if args.scale_lr and args.optimizer == "prodigy":
        problems.append("--scale_lr scales a learning rate, but --optimizer prodigy finds it: drop one")
    if args.with_prior_preservation and not args.class_prompt:
        problems.append('--with_prior_preservation needs --class_prompt, such as "a photo of a dog"')
    if args.class_prompt == args.instance_prompt:
        problems.append("--class_prompt is --instance_prompt; it must name the class without the rare word")
    if args.push_to_hub:
        try:
            validate_repo_id(name_of_lora(args))
        except HFValidationError as error:
            problems.append(f"--push_to_hub: {first_line(error)}. Choose a name with --hub_model_id")
    if args.with_prior_preservation and os.path.realpath(class_folder(args)) == os.path.realpath(
        args.instance_data_dir
    ):
        problems.append(f"{class_folder(args)} holds the images of the subject; choose another --class_data_dir")
    return problems


def idle_flags(values: dict[str, Any]) -> list[str]:
    """Return a problem for each flag that is given but does nothing; unset flags must not have their values yet."""
    problems = []
    defaults = {each.name: each.default for each in fields(Args)}
    for name, (needed, choices) in NEEDS.items():
        has_it = values[needed] in choices if choices else bool(values[needed])
        if values[name] != defaults[name] and not has_it:
            choice = f" {' or '.join(choices)}" if choices else ""
            problems.append(f"--{name} does nothing without --{needed}{choice}")
    return problems


def flag_problems(args: Args) -> list[str]:
    """Return what is wrong with single flags: numbers outside of their limits, stray quotes, and no UTF-8."""
    problems = []
    for each in fields(args):
        given = getattr(args, each.name)
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, int | float) and not isinstance(value, bool):
                low, high = each.metadata["minimum"], each.metadata["maximum"]
                if low is None:
                    low = 1 if isinstance(value, int) else 1e-30
                if high is None:
                    high = 10_000_000 if isinstance(value, int) else 1e30
                if not low <= value <= high:  # this way around, since nan compares as False
                    problems.append(f"--{each.name} {value} is not between {low} and {high}")
            if re.fullmatch(r"['\u2018\u201c]\S*", str(value)):  # the first word of what such quotes were to hold
                problems.append(f'--{each.name} {value} begins with a quote; use "double quotes"')
            try:
                str(value).encode()
            except UnicodeEncodeError:
                problems.append(f"--{each.name} is not UTF-8")
    return problems


def listed(values: tuple[object, ...]) -> str:
    """Return several values of a flag as they are typed."""
    return " ".join(str(value) for value in values)


class Parser(argparse.ArgumentParser):
    """argparse for a dataclass of flags. It also reads flags from @FILE, and hides tokens in its messages."""

    def __init__(self, flags: type, docstring: str) -> None:
        """Take a script's docstring, whose second paragraph is an example."""
        description, example = docstring.split("\n\n")[:2]
        example = " ".join(example.split())  # in one line, as every shell takes it
        epilog = f"example:\n{example}\n\n@FILE reads flags from a file, one flag and its value per line."
        super().__init__(usage="%(prog)s [FLAGS]", description=description, allow_abbrev=False, epilog=epilog)
        self.formatter_class = argparse.RawDescriptionHelpFormatter  # no line breaks in the example
        types = get_type_hints(flags)
        groups: dict[str, Any] = {}
        for each in fields(flags):
            name = each.metadata["group"]
            if name not in groups:
                groups[name] = self.add_argument_group(name)
            names = [f"--{each_name}" for each_name in (each.name, *each.metadata["aliases"])]
            action = groups[name].add_argument(*names, **argparse_options(each, types[each.name]))
            action.option_strings = names[:1]  # --help leaves out the other script's names, which mislead

    def print_help(self, file: Any = None) -> None:
        super().print_help(file or ForgivingStream(sys.stdout))

    def error(self, message: str) -> NoReturn:
        """End the program with one message, where argparse would print its usage of all flags first."""
        message = re.sub(r"hf_\w+", "hf_...", message).translate(CONTROLS)
        if message.startswith("unrecognized arguments") and re.search("['\u201c\u201d]", message):
            message += '\nUse "double quotes": Windows treats other quotes as letters.'
        self.exit(2, f"{self.prog}: error: {message}\nSee --help for all flags.\n")

    def unknown_flags(self, argv: list[str]) -> list[str]:
        """Return a message for each flag that does not exist: which script has it, or which flag is the nearest."""
        known = self._option_string_actions.keys()
        of_other_script = flags_of_other_script()
        messages = []
        stray = [argument for argument in argv if argument and not argument.strip(" \\")]
        if stray:
            messages.append(
                f'"{stray[0]}" stands alone: a backslash continues a line only as its last character, and never on '
                "Windows or in an @FILE"
            )
        for argument in argv:
            given = argument.split("=")[0]
            if given in known or not re.fullmatch(r"[-\u2013\u2014]{1,2}[A-Za-z][\w-]*", given):
                continue  # a value; word processors make a dash of two hyphens
            name = given.lstrip("-\u2013\u2014").replace("-", "_")
            nearest = difflib.get_close_matches(f"--{name}", known, n=1)
            message = f"there is no flag {given}"
            if name in of_other_script and f"--{name}" not in known:
                message += f" here; {OTHER_SCRIPT} has it"
            elif nearest:
                message += f"; did you mean {nearest[0]}?"
            messages.append(message)
        return messages

    def parse_values(self, argv: list[str] | None) -> dict[str, Any]:
        """Parse a command line; flags that take several values get a tuple."""
        try:
            argv = with_flag_files(sys.argv[1:] if argv is None else argv, set())
            unknown = self.unknown_flags(argv)
            if unknown:  # first, since argparse would rather tell which required flags are missing
                self.error("\n  ".join(unknown))
            values = vars(self.parse_args(argv))
        except (UserError, ValueError) as error:  # a file of flags; --flag=-- in some versions of Python
            self.error(str(error))
        for name, value in values.items():
            if value == []:  # what argparse makes of --flag=--
                self.error(f"--{name} is empty")
            if isinstance(value, list):
                values[name] = tuple(value)
        return values


def argparse_options(each: Field, kind: Any) -> dict[str, Any]:
    """Return what add_argument needs for a flag: from its type, its default and its metadata."""
    details = each.metadata
    options: dict[str, Any] = {"help": details["help"]}
    if each.default is MISSING:
        options["required"] = True
        options["help"] += " (required)"
    else:
        options["default"] = each.default
        shown = " ".join(map(str, each.default)) if isinstance(each.default, tuple) else each.default
        if shown not in (None, "") and shown is not False:
            shown = str(shown).replace(",", ", ")  # so that a line ends between names
            options["help"] += f" (default: {shown})"
    if kind is bool:
        options["action"] = "store_true"
        return options
    inner_types = get_args(kind)  # (int, NoneType) of int | None, (str, ...) of tuple[str, ...], () of int
    value_type = inner_types[0] if inner_types else kind
    options["type"] = details["parse"] or value_type
    options["choices"] = details["choices"]
    if not details["choices"]:
        options["metavar"] = details["metavar"] or {int: "N", float: "X"}.get(value_type, "NAME")
    if Ellipsis in inner_types:
        options["nargs"] = "+"
    if details["const"] is not None:
        options["nargs"] = "?"
        options["const"] = details["const"]
    return options


def flags_of_other_script() -> list[str]:
    """Return the flags that the other script declares, if it lies beside this one: the two are easily mixed up."""
    path = Path(__file__).with_name(OTHER_SCRIPT)
    if not path.is_file():
        return []
    return re.findall(r"^    (\w+): .+ = flag\(", path.read_text("utf-8"), re.MULTILINE)


def with_flag_files(argv: list[str], seen: set[Path]) -> list[str]:
    """Return a command line with each @FILE replaced by the flags in that file, which may name others.

    seen: the files that were read already, to which these are added. None is read twice: they could name each other
    without end. Raises UserError.
    """
    expanded = []
    for argument in argv:
        if not argument.startswith("@"):
            expanded.append(argument)
            continue
        path = Path(argument[1:]).absolute()
        if path in seen:
            raise UserError(f"{argument} is named twice")
        seen.add(path)
        expanded += with_flag_files(read_flag_file(Path(argument[1:])), seen)
    return expanded


def read_flag_file(path: Path) -> list[str]:
    """Return the flags and values in a file: quotes and # as in a shell, but a backslash is part of a Windows path."""
    arguments = []
    with reading(path, "It must be text, with one flag per line. For a prompt that begins with @: --prompt=@..."):
        data = path.read_bytes()
        if b"\0" in data:
            raise ValueError("it is UTF-16 or not text; save it as UTF-8")
        text = data.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        for number, line in enumerate(text.splitlines(), start=1):
            inside_words = "\ue000"  # in place of a # in a word, such as C#, which shlex would take for a comment
            words = shlex.shlex(re.sub(r"(?<=\S)#", inside_words, line), posix=True)
            words.whitespace_split = True
            words.escape = ""
            try:
                arguments += [word.replace(inside_words, "#") for word in words]
            except ValueError as error:  # an open quote
                raise ValueError(f"line {number}: {error}") from error
    return arguments


# ----------------------------------------------------------------------------------- part IV: what is checked first
# Everything that can be checked in seconds is checked before anything is written. A check returns what it found out
# and adds what is wrong to the Problems; it writes nothing, prints nothing, and does not end the run. So all problems
# of a run, in all its processes, come in one message.


def preflight(args: Args, accelerator: Accelerator) -> Plan:
    """Check everything that can be checked in seconds, and return the plan; problems end the run in one message."""
    problems = Problems(accelerator)
    # Drawn by the first process for all of them; a process that has found a problem must take part in it as well.
    drawn_seed = broadcast_object_list([random.randrange(2**31)])[0]

    # What does not depend on anything else: the machine, the Hub, the checkpoint.
    check_machine(args, accelerator, problems)
    check_kernels(args, accelerator, problems)
    check_libraries(args, problems)
    check_hub_login(args, accelerator, problems)
    check_foreign_files(args, problems)
    checkpoint = find_checkpoint(args, problems)

    # The base model without its weights, and what must fit it: the LoRA to start from, the images, the embeddings.
    base_model = inspect_base_model(args, problems)
    start_lora = read_start_lora(args, base_model, problems)
    photos = find_photos(args, problems)
    examples = find_examples(photos.paths, args, base_model, accelerator, problems)
    check_masks(photos, examples, args, accelerator, problems)
    check_class_images(args, base_model, accelerator, problems)
    embeddings = open_embeddings(args, base_model, photos, problems)
    examples = with_prompts(examples, embeddings, args, problems)
    note_odd_sizes(examples, args, problems)
    note_captions_without_rare_word(examples, embeddings, problems)

    # All of it together: how many steps, of what, and whether the checkpoint may be continued with that.
    plan = None
    if base_model and embeddings and examples:
        samples_per_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        max_train_steps = count_steps(args, examples, samples_per_step)
        plan = Plan(
            name=name_of_lora(args),
            seed=choose_seed(args, checkpoint, drawn_seed),
            weight_dtype=WEIGHT_DTYPES.get(accelerator.mixed_precision, torch.float32),
            base_model=base_model,
            embeddings=embeddings,
            examples=examples,
            start_lora=start_lora,
            checkpoint=checkpoint,
            samples_per_step=samples_per_step,
            max_train_steps=max_train_steps,
            preview_steps=find_preview_steps(args, examples, samples_per_step, max_train_steps),
            settings={},  # they describe the plan, so they follow once it exists
        )
        plan = replace(plan, settings=comparable_settings(args, plan, accelerator))
        if args.lr_warmup_steps >= max_train_steps:
            problems.add(
                f"--lr_warmup_steps {args.lr_warmup_steps} is as long as the run of {max_train_steps} steps, which "
                "would never reach its learning rate. Use fewer, or 0: a LoRA starts at zero and needs none."
            )
        check_resume(plan, problems)
        if not problems.problems:  # the class prompt, which it looks up, may be what is missing
            describe_plan(args, plan, problems)
    problems.stop_if_any()
    assert plan is not None  # what was not found was a problem
    return plan


class Problems:
    """Notes from this process's checks, and problems that end the run."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.problems: list[str] = []
        self.notes: list[str] = []

    def add(self, problem: str) -> None:
        self.problems.append(problem)

    def note(self, note: str) -> None:
        self.notes.append(note)

    def stop_if_any(self) -> None:
        """Print the notes; if any process has a problem, end the run in all of them, with one message.

        Every process must call it, since it waits for all of them.
        """
        for note in self.notes:
            self.accelerator.print(f"note: {note}")
        self.notes.clear()
        problems = dict.fromkeys(gather_object(self.problems))  # each once, in the order they were found
        if problems:
            message = "".join(f"\n- {problem}" for problem in problems)
            raise SystemExit(f"Cannot start:{message}" if self.accelerator.is_main_process else 1)


def check_machine(args: Args, accelerator: Accelerator, problems: Problems) -> None:
    """Check the precision, the 4-bit weights, the tracker, and write access to the folders."""
    precision = accelerator.mixed_precision
    on_cuda = accelerator.device.type == "cuda"
    if precision not in WEIGHT_DTYPES:
        problems.add(f"Precision {precision} is not available: use fp16 or bf16.")
    if precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.add(f"{torch.cuda.get_device_name()} only emulates bf16; use --mixed_precision fp16.")
    if accelerator.device.type == "cpu":
        problems.note(
            f"no GPU: torch {torch.__version__} finds none, and SD3 would take days. For an NVIDIA GPU, run: "
            "pip install uv && uv pip install --reinstall torch --torch-backend=auto"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        problems.note(f"accelerate's --dynamo_backend {backend} is ignored: use --compile")
    if args.quantize_base == "nf4" and not on_cuda:
        problems.add("--quantize_base nf4 needs a GPU.")
    if args.report_to not in ("none", "all") and not accelerator.log_with:
        problems.add(f"--report_to {args.report_to} is not installed. Run: pip install {args.report_to}")
    for folder in (args.output_dir, args.class_data_dir):
        if folder is not None:
            # A link that leads nowhere, or to itself, counts as what is there.
            nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
            if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
                problems.add(f"{folder} cannot be written: {nearest} is not a folder, or is not writable.")


def check_kernels(args: Args, accelerator: Accelerator, problems: Problems) -> None:
    """Try on a small scale what --quantize_base int8 and --compile will do."""
    rows = torch.ones(32, 32, device=accelerator.device)
    if args.quantize_base == "int8":
        try:
            int8_product(rows, rows.to(torch.int8))
        except Exception as error:  # torch has no class for what a device cannot do
            problems.add(f"--quantize_base int8: {first_line(error)}. This device cannot do it: leave out the flag.")
    if args.compile:
        try:
            torch.compile(nn.GELU(), fullgraph=True)(rows)
        except Exception as error:  # of a compiler that is missing or broken
            needs = "Install Triton for a GPU, or g++ (on Windows cl) for a CPU, or leave out --compile"
            problems.add(f"--compile: {first_line(error)}. {needs}.")


def check_libraries(args: Args, problems: Problems) -> None:
    """Import what the training will need, before anything that takes long."""
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError as error:  # an old one, as on Colab and Kaggle, which PEFT refuses when it adds the LoRA
        problems.add(f"{first_line(error)}. Training does not need torchao. Run: pip uninstall -y torchao")
    try:
        make_optimizer([nn.Parameter(torch.zeros(1, 1))], args, samples_per_step=1)
    except ModuleNotFoundError as error:
        problems.add(f"--optimizer {args.optimizer} is not installed. Run: pip install {error.name}")


def check_foreign_files(args: Args, problems: Problems) -> None:
    """Check that nothing is replaced that this program has not written."""
    lora = args.output_dir / LORA_NAME
    card = args.output_dir / "README.md"
    foreign = []
    if args.pretrained_lora_path and lora.exists():
        start = Path(args.pretrained_lora_path)
        if start.exists() and (lora.samefile(start) or args.output_dir.samefile(start)):
            foreign.append(lora)
    if card.exists():
        try:
            with reading(card, ""):
                is_ours = CARD_MARK in card.read_text("utf-8", errors="replace")
        except UserError:
            is_ours = False
        if not is_ours:
            foreign.append(card)
    if not (args.output_dir / "latents").exists() and not list_checkpoints(args.output_dir):  # no run was here
        foreign += [path for path in (lora, *args.output_dir.glob("samples/*.png")) if path.exists()]
    if foreign:
        problems.add(f"{foreign[0]} would be replaced. Move it, or choose another --output_dir.")


def find_checkpoint(args: Args, problems: Problems) -> dict[str, Any]:
    """Return the training state to resume from, or {} to start from the beginning: in a folder without checkpoints."""
    wanted = args.resume_from_checkpoint
    existing = list_checkpoints(args.output_dir)
    if not wanted:
        if existing:
            problems.add(
                f"{args.output_dir} has checkpoints from an earlier run (last: {existing[-1].name}). To continue it, "
                "add --resume_from_checkpoint latest. For a new run, choose another --output_dir."
            )
        return {}
    if wanted != "latest":
        path = Path(wanted) if Path(wanted).exists() else args.output_dir / wanted
    elif existing:
        path = existing[-1]
    else:
        problems.note(f"no checkpoint in {args.output_dir} yet: starting from the beginning")
        return {}
    try:
        checkpoint = read_state(path)
    except UserError as error:
        names = ", ".join(each.name for each in existing) or "none"
        problems.add(
            f"--resume_from_checkpoint {wanted}: {first_line(error)}. Use another one; {args.output_dir} has: {names}."
        )
        return {}
    later = [each.name for each in existing if step_of(each) > checkpoint["global_step"]]
    if later:
        problems.note(f"the first new checkpoint replaces {', '.join(later)}; another --output_dir keeps them")
    return checkpoint


CONFIGS = {"transformer": "", "vae": "", "scheduler": ""}
WEIGHTS = CONFIGS | {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def inspect_base_model(args: Args, problems: Problems) -> BaseModel | None:
    """Return the base model without its weights, which a repository need not have sent yet; None if it has none."""
    model_class = diffusers.SD3Transformer2DModel
    is_folder = Path(args.pretrained_model_name_or_path).is_dir()
    try:
        files = resolve_model(args, WEIGHTS if is_folder else CONFIGS, args.hub_token)
        with loading(files, "transformer"), torch.device("meta"):
            skeleton = model_class.from_config(model_class.load_config(files.folder, subfolder="transformer"))
        with loading(files, "scheduler"):
            scheduler_class = diffusers.FlowMatchEulerDiscreteScheduler
            noise_scheduler = scheduler_class.from_pretrained(files.folder, subfolder="scheduler")
        if not is_folder:
            note_download(args, problems)
    except UserError as error:
        problems.add(str(error))
        return None
    largest = skeleton.config.pos_embed_max_size * skeleton.config.patch_size * 8  # a latent is 8 x 8 pixels
    side = max(args.resolution)
    for height, width in itertools.chain(*training_shapes(args).values()):
        side = max(side, height, width)
    if side > largest:
        problems.add(
            f"--resolution {listed(args.resolution)} or --aspect_ratio_buckets: a side of {side} pixels is above the "
            f"model's {largest}."
        )
    for layer in args.lora_layers.split(","):
        if not lora_targets(skeleton, layer):
            problems.add(f"--lora_layers: the transformer has no linear layer {layer}.")
    return BaseModel(files, skeleton, files.commit or digest_of_weights(files), noise_scheduler)


def download_weights(args: Args) -> None:
    """Download the weights that are not there yet; preflight has fetched the small files alone. Raises UserError."""
    resolve_model(args, WEIGHTS, args.hub_token)


def note_download(args: Args, problems: Problems) -> None:
    """Note how much of the weights the run will download first."""
    patterns = []
    for part, stem in WEIGHTS.items():
        patterns += weight_patterns(part, stem, args.variant)
    size = 0
    with suppress(UserError):  # offline nobody can tell, and what is in the cache may be enough
        for file in download(args, patterns, args.hub_token, dry_run=True):
            size += file.file_size if file.will_download else 0
    if size:
        problems.note(f"to download first: {size / 1e9:.1f} GB of {args.pretrained_model_name_or_path}")


def digest_of_weights(model: LocalModel) -> str:
    """Return a digest of 64 places in each weight file: it changes if others take their place."""
    contents = []
    for part, stem in WEIGHTS.items():
        for pattern in weight_patterns(part, stem, model.variant):
            for path in sorted(model.folder.glob(pattern)):
                size = path.stat().st_size
                with open(path, "rb") as file:
                    for place in range(64):
                        file.seek(place * size // 64)
                        contents.append(file.read(2**14).hex())
    return digest(contents)


def misfit_of_lora(weights: dict[str, Tensor], args: Args, base_model: BaseModel) -> str:
    """Return the name of a weight that is missing, unknown or of another shape in the LoRA to be trained, or ""."""
    transformer = copy.deepcopy(base_model.skeleton)  # without values, so the copy costs nothing
    add_lora(transformer, args, seed=0)
    expected = set(lora_shapes(transformer).items())
    given = {(name, weight.shape) for name, weight in weights.items()}
    different = sorted(given ^ expected)
    return different[0][0] if different else ""


def read_start_lora(args: Args, base_model: BaseModel | None, problems: Problems) -> dict[str, Tensor]:
    """Return the weights of --pretrained_lora_path at their strength, if they fit the LoRA that is to be trained."""
    path = args.pretrained_lora_path
    if not path or not base_model or not lora_targets(base_model.skeleton, args.lora_layers):
        return {}
    try:
        weights = load_lora_at_strength(path, args)
    except Exception as error:  # of the file system, safetensors, the Hub, or what the file says
        where = "" if Path(path).exists() else f" {Path(path).absolute()} does not exist."
        problems.add(f"--pretrained_lora_path {path} cannot be used: {first_line(error)}.{where}")
        return {}
    prefix = "transformer."
    others = [name for name in weights if not name.startswith(prefix)]  # their alpha would stand elsewhere as well
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    misfit = others[0] if others else misfit_of_lora(weights, args, base_model)
    if misfit:
        ranks = {weight.shape[0] for name, weight in weights.items() if "lora_A" in name and weight.ndim}
        problems.add(
            f"--pretrained_lora_path {path} is not a LoRA in diffusers' layout with --rank {args.rank} and these "
            f"--lora_layers: see {misfit}. Its rank is {listed(tuple(sorted(ranks))) or 'unknown'}."
        )
        return {}
    return weights


def load_lora_at_strength(path: str, args: Args) -> dict[str, Tensor]:
    """Return the weights of a LoRA in fp32, for a layer that scales lora_B by this run's alpha / rank.

    Raises an error of any class if the file cannot be read, is not finite, or does not say how strong it is.
    """
    if not Path(path).exists() and (path.count("/") != 1 or path.endswith(".safetensors")):
        raise ValueError("it is not the name of a repository, OWNER/NAME")
    if Path(path).exists() and not Path(path).is_dir():
        with reading(Path(path), ""):
            pass
    file, metadata = diffusers.StableDiffusion3Pipeline.lora_state_dict(
        path, cache_dir=args.cache_dir, token=args.hub_token, use_safetensors=True, return_lora_metadata=True
    )
    metadata = metadata or {}
    for name in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if metadata.get(f"transformer.{name}"):
            raise ValueError(f"its {name} is not supported")
    alpha = float(metadata.get("transformer.lora_alpha", args.rank))  # without metadata it is the rank
    if not 0 < alpha < 1e30:
        raise ValueError(f"its lora_alpha is {alpha}")
    weights = {}
    for name, weight in file.items():
        scaled = weight.float() * (alpha / args.lora_alpha if "lora_B" in name else 1)
        if not scaled.isfinite().all():
            raise ValueError(f"its {name} is not finite")
        weights[name] = scaled
    return weights


def open_embeddings(
    args: Args, base_model: BaseModel | None, photos: Photos, problems: Problems
) -> PromptEmbeddings | None:
    """Return the embeddings, if the file is whole and has every prompt; what is missing comes with the command."""
    path = args.data_df_path
    try:
        embeddings = PromptEmbeddings(path)
        unknown = sorted(wanted_prompts(args) - embeddings.row_of_prompt.keys())
        rows = [embeddings[prompt] for prompt in embeddings.row_of_prompt if prompt in wanted_prompts(args)]
    except UserError as error:
        fix = f"Run: {embeddings_command(args, {})}"
        if path.exists() and path.suffix.lower() != ".parquet":  # such as a photo, over which nothing may be written
            fix = "Name the .parquet file that compute_embeddings.py writes."
        problems.add(f"--data_df_path {error} {fix}")
        return None
    about = embeddings.about
    command = embeddings_command(args, about)
    fix = f"Run: {command}"
    if base_model and rows:
        config = base_model.skeleton.config
        widths = [rows[0][name].shape[-1] for name in PromptEmbeddings.TENSORS]
        if widths != [config.joint_attention_dim, config.pooled_projection_dim]:
            problems.add(f"{path} was computed with a different type of model. {fix}")
    length = about["max_sequence_length"]
    if args.max_sequence_length is not None and args.max_sequence_length != length:
        problems.add(f"{path} has {length} T5 tokens, not --max_sequence_length {args.max_sequence_length}. {fix}")
    if photos.paths and about["captions"] != photos.captions_digest:
        problems.add(f"Captions were added, changed or removed since {path} was computed. {fix}")
    if unknown:
        missing = ", ".join(repr(prompt) for prompt in unknown)
        present = ", ".join(repr(prompt) for prompt in itertools.islice(embeddings.row_of_prompt, 5) if prompt)
        problems.add(
            f"{path} has no embeddings for {missing}. It has: {present}. If you meant none of these, run: {command}"
        )
    return embeddings


def wanted_prompts(args: Args) -> set[str]:
    """Return the prompts that a run needs embeddings of, besides the captions of its images."""
    prompts = {"", args.instance_prompt, args.negative_prompt, *args.validation_prompt}
    if args.with_prior_preservation and args.class_prompt:
        prompts.add(args.class_prompt)
    return prompts


def embeddings_command(args: Args, about: dict[str, Any]) -> str:
    """Return the command line that computes the embeddings of this run; about is that of the existing file, or {}."""
    command = ["python", "compute_embeddings.py"]
    for each in fields(args):
        name = each.metadata["embeddings_flag"]
        value = getattr(args, each.name)
        if name == "max_sequence_length":
            value = value or about.get("max_sequence_length")
        if name and value:
            texts = [str(each_value) for each_value in (value if isinstance(value, tuple) else [value])]
            if len(texts) == 1 and texts[0].startswith(("@", "-")):  # else a file of flags, or a flag
                command.append(f"--{name}={texts[0]}")
            else:
                command += [f"--{name}", *texts]
    command += ["--t5_precision", about.get("t5", "exact")]  # which needs the least memory
    return shell_line(command)


def with_prompts(
    examples: list[Example], embeddings: PromptEmbeddings | None, args: Args, problems: Problems
) -> list[Example]:
    """Return the examples with the prompts that the embeddings' file has for their images."""
    path = args.data_df_path
    if not embeddings:
        return []
    fix = f"Run: {embeddings_command(args, embeddings.about)}"
    prompt_of = embeddings.prompt_of_image
    examples = [replace(example, prompt=prompt_of.get(example.sha256, "")) for example in examples]
    missing = paths_of([example for example in examples if example.sha256 not in prompt_of])
    if missing:
        count = f"{len(missing)} of {count_of(len(paths_of(examples)), 'image')}"
        problems.add(f"{count} have no embeddings in {path} (first: {missing[0]}). {fix}")
    # --instance_prompt must be what compute_embeddings.py was told, or at least the caption of an image.
    prompt = args.instance_prompt
    captions = {example.prompt for example in examples}
    if prompt in embeddings.row_of_prompt and prompt != embeddings.about.get("prompt") and prompt not in captions:
        problems.add(f"No image in {path} has --instance_prompt {prompt!r} as its caption. {fix}")
    return examples


def check_masks(
    photos: Photos, examples: list[Example], args: Args, accelerator: Accelerator, problems: Problems
) -> None:
    """Check that some image has a mask, if --alpha_mask is to mean something; note what may be meant as a mask."""
    masked = paths_of([example for example in examples if example.has_alpha or example.mask])
    count = f"{len(masked)} of {count_of(len(photos.paths), 'image')}"
    if args.alpha_mask and examples and not masked:
        problems.add(f"--alpha_mask: no image has an alpha channel or a mask: NAME{', NAME'.join(MASK_ENDINGS)}.")
    elif args.alpha_mask and len(masked) < len(photos.paths):
        problems.note(f"--alpha_mask: {count} have a mask; of the others all is learned")
    dark = []
    share = examples[accelerator.process_index :: accelerator.num_processes]
    for example in share if args.alpha_mask else []:
        try:
            if is_mask_dark(example, args):
                dark.append(example)
        except UserError as error:
            problems.add(str(error))
    dark = sorted(gather_object(dark), key=lambda example: example.path)
    if dark:
        report = problems.add if len(dark) == len(examples) else problems.note
        report(
            f"--alpha_mask: masks that are dark all over at an eighth of the size: {len(paths_of(dark))} (first: "
            f"{dark[0].path}); a mask must be white on the subject"
        )
    beside = masks_beside(photos.paths)
    if beside and not args.alpha_mask:
        problems.note(f"masks that are not used without --alpha_mask: {len(beside)} (first: {min(beside.values())})")
    stems = {comparable(path.stem) for path in photos.paths}
    likely = []
    for path in photos.paths:
        stem = comparable(path.stem)
        if stem.endswith("mask") and stem.removesuffix("mask").rstrip("-_. ") in stems:
            likely.append(path)
    if likely:
        problems.note(f"trained as photos, though named like masks: {len(likely)} (first: {likely[0]})")


def is_mask_dark(example: Example, args: Args) -> bool:
    """Whether a mask is dark all over at an eighth of the size, so that nothing is learned. Raises UserError."""
    if not (example.mask or example.has_alpha):
        return False
    image = load_upright_image(example.mask or example.path)
    mask = mask_in(image) if example.mask else image.getchannel("A")
    centers = crop_centers(mask, example.shape, args.center_crop)
    return all(np.asarray(crop_mask(mask, example.shape, center)).max() < 128 for center in centers)


def check_class_images(args: Args, base_model: BaseModel | None, accelerator: Accelerator, problems: Problems) -> None:
    """Read the class images that exist and have no latents yet, before the others are generated, which takes long."""
    if not args.with_prior_preservation:
        return
    found = find_images(class_folder(args))
    if args.class_samples == "velocities":
        if found:
            problems.note(f"--class_samples velocities does not use the images in {class_folder(args)}")
        return
    paths = found[: args.num_class_images]
    if len(paths) < len(found):
        problems.note(f"{len(paths)} of {len(found)} class images are used, as many as --num_class_images")
    if len(found) < args.num_class_images:
        lacking = count_of(args.num_class_images - len(found), "class image")
        problems.note(f"to generate first: {lacking}, {args.num_inference_steps} steps each; a bar shows how long")
    made_by = class_folder(args) / MADE_BY
    if made_by.exists():
        try:
            with reading(made_by, ""):
                before = json.loads(made_by.read_text("utf-8"))
                differences = [name for name, value in class_images_made_by(args).items() if before[name] != value]
        except UserError as error:
            problems.add(str(error))
        else:
            if differences:
                problems.add(
                    f"The images in {class_folder(args)} were generated with another {differences[0]} "
                    f"({before[differences[0]]}). Choose another --class_data_dir."
                )
    examples = find_examples(paths, args, base_model, accelerator, problems)
    for example in examples[accelerator.process_index :: accelerator.num_processes]:
        try:
            if not are_latents(example.latents):
                read_image(example.path, example.mask)
        except UserError as error:
            problems.add(str(error))


def note_odd_sizes(examples: list[Example], args: Args, problems: Problems) -> None:
    """Note images that are enlarged more than twice, those that a resolution leaves out, and those mostly cut off."""
    enlarged = paths_of([each for each in examples if enlargement(each.size, each.shape) > 2])
    if enlarged:
        problems.note(f"{count_of(len(enlarged), 'image')} enlarged more than 2x (first: {enlarged[0]})")
    counts = Counter(example.path for example in examples)
    small = [path for path, count in counts.items() if count < len(args.resolution)]
    if small:
        problems.note(
            f"{count_of(len(small), 'image')} too small for {max(args.resolution)} pixels, used only at lower "
            f"resolutions (first: {small[0]})"
        )
    oblong = paths_of([each for each in examples if shown_share(each.size, each.shape) < 0.5])
    if oblong:
        problems.note(
            f"a crop shows less than half of {count_of(len(oblong), 'image')} (first: {oblong[0]}); crop them to the "
            "subject, or use --aspect_ratio_buckets"
        )


def shown_share(size: tuple[int, int], shape: tuple[int, int]) -> float:
    """Return the share of an image that a crop to a shape shows; both are (height, width)."""
    scales = (shape[0] / size[0], shape[1] / size[1])
    return min(scales) / max(scales)


def paths_of(examples: list[Example]) -> list[Path]:
    """Return the files of examples, each of them once."""
    return list(dict.fromkeys(example.path for example in examples))


def note_captions_without_rare_word(
    examples: list[Example], embeddings: PromptEmbeddings | None, problems: Problems
) -> None:
    """Note captions without the word that stands for the subject, which is the rarest one of the prompt."""
    rare_word = embeddings.about["rare_word"] if embeddings else ""
    without = paths_of([each for each in examples if each.prompt and rare_word not in words_of(each.prompt)])
    if rare_word and without:
        problems.note(
            f"captions without the word {rare_word}: {len(without)} (first: that of {without[0]}); these images do "
            "not teach what --instance_prompt means"
        )


def words_of(prompt: str) -> set[str]:
    """Return the words of a prompt in lowercase."""
    return set(re.findall(r"\w+", prompt.lower()))


def name_of_lora(args: Args) -> str:
    """Return the repository that the LoRA is pushed to, or else the name of its folder."""
    if args.push_to_hub and args.hub_model_id:
        return args.hub_model_id
    return Path(os.path.abspath(args.output_dir)).name


def choose_seed(args: Args, checkpoint: dict[str, Any], drawn_seed: int) -> int:
    """Return --seed, or else the checkpoint's seed, or else the one that was drawn."""
    if args.seed is not None:
        return args.seed
    if checkpoint:
        return checkpoint["settings"]["seed"]
    return drawn_seed


def count_steps(args: Args, examples: list[Example], samples_per_step: int) -> int:
    """Return --max_train_steps, or the steps of --num_train_epochs."""
    samples = args.num_train_epochs * samples_per_epoch(args, examples)
    return args.max_train_steps or math.ceil(samples / samples_per_step)


def samples_per_epoch(args: Args, examples: list[Example]) -> int:
    """Return how many samples show every image of the subject once, at each resolution."""
    if not args.with_prior_preservation:
        return len(examples)
    every = args.class_every_n_samples
    return math.ceil(len(examples) * every / (every - 1))


def find_preview_steps(args: Args, examples: list[Example], samples_per_step: int, max_train_steps: int) -> set[int]:
    """Return the steps after which previews are drawn: each one that completes another period, counted in samples."""
    if not args.validation_prompt or args.validation_steps == 0:
        return set()
    if args.validation_steps:
        period = args.validation_steps * samples_per_step
    else:
        period = args.validation_epochs * samples_per_epoch(args, examples)
    return {step for step in range(1, max_train_steps) if step * samples_per_step % period < samples_per_step}


def comparable_settings(args: Args, plan: Plan, accelerator: Accelerator) -> dict[str, object]:
    """Return what a run that resumes this one is compared with: flags, and what was found out about the data."""
    settings: dict[str, object] = {}
    for each in fields(args):
        if each.metadata["on_resume"] != FREE:
            settings[each.name] = getattr(args, each.name)
    settings["resolution"] = listed(args.resolution)  # trackers take no tuple
    about = plan.embeddings.about
    per_micro_batch = args.train_batch_size * accelerator.num_processes
    one_shape_each = args.aspect_ratio_buckets or len(args.resolution) > 1  # of micro-batches
    return settings | {
        "seed": plan.seed,
        "max_train_steps": plan.max_train_steps,
        "mixed_precision": accelerator.mixed_precision,
        "samples per step": plan.samples_per_step,
        "samples per micro-batch": per_micro_batch if one_shape_each else None,
        "images and captions": digest([(example.latents.name, example.prompt) for example in plan.examples]),
        "embeddings": f"T5 {about.get('t5')}, {about.get('max_sequence_length')} tokens",
        "base model": plan.base_model.identity,
    }


def check_resume(plan: Plan, problems: Problems) -> None:
    """Compare the settings with those of the checkpoint: some must be the same, others are followed with a note."""
    if not plan.checkpoint:
        return
    on_resume = {each.name: each.metadata["on_resume"] for each in fields(Args)}
    before_settings = dict(plan.checkpoint["settings"])
    if "lora_layers" in before_settings:  # the same layers can be spelled in many ways
        skeleton = plan.base_model.skeleton
        layers = str(plan.settings["lora_layers"])
        if lora_targets(skeleton, before_settings["lora_layers"]) == lora_targets(skeleton, layers):
            before_settings["lora_layers"] = layers
    defaults = {each.name: each.default for each in fields(Args)}  # what a flag was before there was one
    refused = []
    changed = []
    for name, value in plan.settings.items():
        before = before_settings.get(name, defaults.get(name, value))
        if before == value:
            continue
        before = "unset" if before is None else before
        value = "unset" if value is None else value
        if name == "images and captions":
            refused.append(
                "The checkpoint was trained with other images and captions: photos, masks or captions were added, "
                "removed, renamed or changed. Restore them, or train into another --output_dir."
            )
        elif on_resume.get(name, REFUSED) == REFUSED:  # what is not a flag was found out about the data
            refused.append(
                f"The checkpoint was trained with {name} {before}, this run has {value}. Use the same, or train into "
                "another --output_dir."
            )
        else:
            changed.append(f"{name} {before} -> {value}")
    if changed:
        problems.note(f"continuing with changed settings: {', '.join(changed)}")
    for problem in refused:
        problems.add(problem)


def describe_plan(args: Args, plan: Plan, problems: Problems) -> None:
    """Note the size of the run, what it makes first and, in a dry run, what becomes of each image."""
    if args.dry_run:
        for example in plan.examples:
            height, width = example.shape
            problems.note(f"{example.path.name}: trained as {width} x {height}, {example.prompt!r}")
    epochs = plan.max_train_steps * plan.samples_per_step / samples_per_epoch(args, plan.examples)
    steps = f"{count_of(plan.max_train_steps, 'step')} of {count_of(plan.samples_per_step, 'sample')}"
    digits = 1 if epochs < 10 else 0
    start = f"from step {plan.checkpoint.get('global_step', 0)}"
    images = count_of(len(paths_of(plan.examples)), "image")
    if len(args.resolution) > 1:
        images += f" at the resolutions {listed(args.resolution)}"
    problems.note(f"{images}, {steps}: {epochs:.{digits}f} epochs, seed {plan.seed}, {start}")
    if not args.max_train_steps and plan.max_train_steps < 100:
        problems.note(
            f"--num_train_epochs {args.num_train_epochs} is {count_of(plan.max_train_steps, 'step')} here; "
            "--max_train_steps sets their number, a few hundred for a subject"
        )
    if args.optimizer == "prodigy" and args.learning_rate < 0.1:
        problems.note(
            f"--optimizer prodigy multiplies what it finds by --learning_rate {args.learning_rate}: leave that out"
        )
    class_samples = args.class_samples if args.with_prior_preservation else None
    if class_samples == "velocities":
        missing = sum(not path.exists() for path, _ in velocity_files(args, plan))
        if missing:
            problems.note(f"to make first: {missing * VERSIONS} class velocities, a pass of the model each")
    if args.validation_prompt or class_samples == "images":
        guidance = guidance_of(args, plan.base_model.skeleton.config)
        problems.note(f"images are drawn in {args.num_inference_steps} steps, with --guidance_scale {guidance:g}")


# ----------------------------------------------------------------------------- part V: what the world does to a run
# Images as people have them, files, models, and what surrounds a run: accelerate, signals, errors and output.

# ----------------------------------------------------------------------------------------------- images and masks

PHOTO_SUFFIXES = (
    ".avif", ".bmp", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
with suppress(ImportError):  # the photos of many phones
    import pillow_heif

    pillow_heif.register_heif_opener()
# Pillow's own limits are lower than what phones take and what image generators write into a PNG's text.
Image.MAX_IMAGE_PIXELS = 200_000_000  # as phones make them; it refuses twice as many
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
MASK_ENDINGS = (".mask.png", "-masklabel.png", "_mask.png")  # NAME.mask.png is ours, NAME-masklabel.png OneTrainer's
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as datasets' ImageFolder reads them
CAPTION_SUFFIXES = (".txt", ".caption")  # of the files beside their images


def find_images(folder: Path) -> list[Path]:
    """Return the photos directly in a folder, sorted by name, without masks and hidden files."""
    images = []
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix.lower() in PHOTO_SUFFIXES and not path.is_dir():
            images.append(path)
    stems = {comparable(image.stem) for image in images}
    return [image for image in images if not is_mask(image, stems)]


def comparable(name: object) -> str:
    """Return a file's name as names are compared: in lowercase, as on Windows, and in one Unicode form.

    A Mac may have written accents apart from their letters (NFD), where other systems have one character (NFC).
    """
    return unicodedata.normalize("NFC", str(name)).casefold()


def is_mask(path: Path, stems: set[str]) -> bool:
    """Whether an image file is named as the mask of another one, given the comparable stems of all of them."""
    name = comparable(path.name)
    if comparable(path.stem).endswith(".mask"):
        return True
    return any(name.endswith(ending) and name.removesuffix(ending) in stems for ending in MASK_ENDINGS)


def files_by_name(paths: list[Path]) -> dict[str, Path]:
    """Return files by their names, and by their comparable ones where no other file has that name."""
    return {comparable(path.name): path for path in paths} | {path.name: path for path in paths}


def sidecars_of(image: Path, files: dict[str, Path]) -> list[Path]:
    """Return the files with captions of an image, of files by name; an exact match of its letters wins."""
    sidecars = []
    for suffix in CAPTION_SUFFIXES:
        name = f"{image.stem}{suffix}"
        path = files.get(name) or files.get(comparable(name))
        if path:
            sidecars.append(path)
    return sidecars


def digest_of_captions(folder: Path) -> str:
    """Return a digest of the files with captions of the images in a folder, by their names and bytes."""
    files = files_by_name(sorted(folder.glob("[!.]*")))
    paths = {files[name] for name in METADATA_NAMES if name in files}
    for image in find_images(folder):
        paths.update(sidecars_of(image, files))
    entries = sorted([comparable(path.name), sha256_of(path)] for path in paths)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def why_no_images(folder: Path) -> str:
    """Say why no image was found in a folder."""
    try:
        subfolders = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and find_images(path)]
    except FileNotFoundError:
        return f"{folder.absolute()} does not exist."
    except OSError as error:  # it is a file, or may not be read
        return f"{folder} cannot be read: {error.strerror}."
    reason = f"{folder} has no images ({' '.join(PHOTO_SUFFIXES)})."
    if subfolders:
        reason += f" Its sub-folders have some: {', '.join(subfolders)}. Name one of them instead."
    return reason


@contextmanager
def opened_photo(path: Path) -> Iterator[Image.Image]:
    """Open a photo, whose pixels are decoded when they are first used. Keep the block to reading it.

    Whatever Pillow raises in the block becomes a UserError.
    """
    format_of = Image.registered_extensions()
    formats = {format_of[suffix] for suffix in PHOTO_SUFFIXES if suffix in format_of}
    advice = "Repair it or remove it from the folder."
    if "HEIF" not in formats:
        advice += " If it is a HEIC, whatever its name is, run: pip install pillow-heif"
    with reading(path, advice):
        path.name.encode()  # a ValueError if it is not UTF-8
        with Image.open(path, formats=sorted(formats)) as image:  # no others: Pillow would start Ghostscript for one
            if image.mode in ("I", "F"):
                raise ValueError("it has 32 bits per channel; save it with 8 or 16")
            yield image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (height, width) that an image will have when it is upright."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF that cannot be read turns nothing
        orientation = 1
    if orientation in (5, 6, 7, 8) and image.format != "TIFF":  # Pillow gives a turned TIFF's size as turned already
        return image.width, image.height
    return image.height, image.width


def load_upright_image(path: Path) -> Image.Image:
    """Load an image in RGBA with 8 bits per channel, turned as its EXIF orientation says."""
    with opened_photo(path) as image:
        image.load()  # Pillow turns a TIFF here
        image = turned_upright(image)
        if image.mode.startswith("I;16"):  # convert() would clip the values
            image = Image.fromarray((np.asarray(image) / 256).astype(np.uint8))
        return image.convert("RGBA")


def turned_upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF orientation says; EXIF that cannot be read turns nothing."""
    try:
        image.getexif()
        image.info.pop("exif", None)  # exif_transpose would write all of it anew, and fail on the odd tags of phones
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def srgb_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """Return what converts an image's RGBA pixels to sRGB; None without a profile, or if it is broken or sRGB itself.

    sRGB goes by many names, so it is known by what it does to 729 colors: nothing but rounding.
    """
    if "icc_profile" not in image.info:
        return None
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels, [255]), axis=-1).reshape(27, 27, 4).astype(np.uint8)
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGBA", "RGBA")
        converted = np.asarray(ImageCms.applyTransform(Image.fromarray(colors), transform))
    except Exception:  # it is broken, or of grays or inks
        return None
    is_srgb = np.abs(converted.astype(int) - colors).max() <= 3
    return None if is_srgb else transform


def masks_beside(images: list[Path]) -> dict[Path, Path]:
    """Return the mask file of each image that has one beside it; one in another image's own letters is not shared."""
    files_in: dict[Path, dict[str, Path]] = {}
    stems = {image.stem for image in images}
    masks = {}
    for image in images:
        folder = image.parent
        if folder not in files_in:
            files_in[folder] = files_by_name(sorted(folder.glob("[!.]*")))
        for ending in reversed(MASK_ENDINGS):  # the first one wins
            name = f"{image.stem}{ending}"
            mask = files_in[folder].get(name) or files_in[folder].get(comparable(name))
            if mask and (mask.name == name or mask.name.removesuffix(ending) not in stems):
                masks[image] = mask
    return masks


def mask_in(image: Image.Image) -> Image.Image:
    """Return what a mask file in RGBA shows, in L: its alpha channel if that has a shape, or else its brightness."""
    alpha = image.getchannel("A")
    return image.convert("L") if alpha.getextrema() == (255, 255) else alpha


def read_image(path: Path, mask_path: Path | None) -> tuple[Image.Image, Image.Image]:
    """Read an image in RGB, white where it is transparent, and its mask in L: a file or the alpha channel.

    Raises UserError.
    """
    image = load_upright_image(path)
    transform = srgb_transform(image)  # a phone's Display P3, taken for sRGB, is pale
    if transform:
        ImageCms.applyTransform(image, transform, inPlace=True)
    mask = mask_in(load_upright_image(mask_path)) if mask_path else image.getchannel("A")
    if mask_path and mask.size != image.size:
        raise UserError(f"{path} has {image.size} pixels, its mask {mask_path.name} has {mask.size}.")
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return on_white.convert("RGB"), mask


# ------------------------------------------------------------------------------------------------ files and models


class UserError(Exception):
    """A mistake that the user can fix; the message says what, where and how."""


@contextmanager
def reading(path: Path, advice: str) -> Iterator[None]:
    """Turn whatever reading a user's file raises into a UserError. Keep the block to reading, and to what is used.

    Only a regular file is read: reading a pipe could block forever.
    """
    try:
        if not path.exists():
            raise OSError(f"{path.absolute()} does not exist")
        if not path.is_file():
            raise OSError("it is not a regular file")
        yield
    except Exception as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}. {advice}".rstrip()) from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex: the embeddings name an image by it."""
    with reading(path, ""):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def flush_to_disk(file: Any) -> None:
    """Wait until an open file is on disk, if its file system can do that; some shares and FUSE mounts cannot."""
    cannot = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF)
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in cannot:  # the disk is full, or broken
            raise OSError(error.errno, error.strerror, str(file.name)) from error


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file that appears under its name whole and on disk, or not at all.

    The content is made in memory first: where Python writes it, an error says what is wrong; torch and safetensors
    only say that something is.
    """
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        partial = Path(folder, path.name)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                flush_to_disk(file)
        except OSError as error:  # the disk is full, or broken
            raise OSError(error.errno, error.strerror, str(path)) from error
        move_file(partial, path)


def move_file(source: Path, target: Path) -> None:
    """Replace a file, retrying for up to 2 s: Windows refuses while a virus scanner or a viewer has it open."""
    for _ in range(20):
        with suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(0.1)
    os.replace(source, target)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, or only the link to it; what another program holds open stays: it ends no run."""
    if folder.is_symlink():
        folder.unlink()
        return
    with suppress(OSError):
        (folder / STATE_NAME).unlink()  # first: without it, what is left counts as no checkpoint
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def only_noted(failure: str) -> Iterator[None]:
    """Turn an error of the file system into a note, for files that a run can do without. A full disk ends it."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise
        print(f"note: {failure}: {error}")


@dataclass(frozen=True)
class LocalModel:
    """A model whose files are on this machine."""

    name: str  # as the user gave it
    folder: Path
    commit: str | None  # of the repository; None: a folder of the user's own
    variant: str | None


def resolve_model(args: Args, parts: dict[str, str], token: str | None) -> LocalModel:
    """Find a model: the folder that is named, or a snapshot of a repository, which is downloaded as far as needed.

    parts: each part that is needed, with the stem of its weight files, or "" if its other files are enough. Without a
    network, what was downloaded before is used. Raises UserError.
    """
    name = args.pretrained_model_name_or_path
    if Path(name).is_file():
        raise UserError(
            f"{name} is a file, not a folder in diffusers' layout. Convert it in Python:\n"
            f"diffusers.StableDiffusion3Pipeline.from_single_file({name!r}).save_pretrained('FOLDER')"
        )
    if Path(name).is_dir():
        model = LocalModel(name, Path(name), None, args.variant)
    else:
        patterns = []
        for part, stem in parts.items():
            patterns += [f"{part}/*.{suffix}" for suffix in ("json", "txt", "model")]
            patterns += weight_patterns(part, stem, args.variant)
        folder = Path(download(args, patterns, token))
        model = LocalModel(name, folder, folder.name, args.variant)
    for part, stem in parts.items():
        has_weights = False
        for pattern in weight_patterns(part, stem, args.variant):
            has_weights = has_weights or any(model.folder.glob(pattern))
        if stem and not has_weights:
            raise UserError(no_weights(args, part, stem, token))
        for path in model.folder.glob(f"{part}/*"):
            if not path.is_dir():
                with reading(path, ""):  # by a library, which would wait for a pipe
                    pass
    return model


def weight_patterns(part: str, stem: str, variant: str | None) -> list[str]:
    """Return patterns of a part's weight files, in one file or several; none for a part without weights.

    Other formats than safetensors are not loaded, since they can run code.
    """
    if not stem:
        return []
    name = f"{part}/{stem}.{variant}" if variant else f"{part}/{stem}"
    return [f"{name}.safetensors", f"{name}-*.safetensors"]


def download(args: Args, patterns: list[str], token: str | None, **kwargs: Any) -> Any:
    """Call snapshot_download for the files that match the patterns; raise a UserError if it fails."""
    name = args.pretrained_model_name_or_path
    folder = Path(name).absolute()
    try:
        return snapshot_download(
            name, revision=args.revision, cache_dir=args.cache_dir, token=token, allow_patterns=patterns, **kwargs
        )
    except HFValidationError as error:
        raise UserError(f"There is no folder {folder}, and {name} is not a valid name of a repository.") from error
    except LocalEntryNotFoundError as error:
        reason = f"the Hub does not answer, and not all of it was downloaded before. {first_line(error)}"
        raise UserError(f"Cannot load {name}: {reason}. If a folder is meant: there is no {folder}.") from error
    except Exception as error:  # of the Hub, the network or the file system, which share no class
        raise UserError(
            f"Cannot load {name}: {first_line(error)}. There is no folder {folder}. If it is a repository, it may be "
            f"gated: accept its license on https://huggingface.co/{name} and run: hf auth login\n"
            "Without a network, HF_HUB_OFFLINE=1 uses what has been downloaded before."
        ) from error


def no_weights(args: Args, part: str, stem: str, token: str | None) -> str:
    """Return a message that a part has no weights of the variant, and which ones there are."""
    name = args.pretrained_model_name_or_path
    present = [path.name for path in Path(name).glob(f"{part}/{stem}*")]
    if not Path(name).is_dir():
        with suppress(UserError):  # without a network, nobody knows
            listed = download(args, [f"{part}/{stem}*"], token, dry_run=True)
            present = [Path(file.filename).name for file in listed]
    has = f" It has: {', '.join(sorted(present))}; see --variant." if present else ""
    return f"Cannot load {part} of {name}: there is no {weight_patterns(part, stem, args.variant)[0]}.{has}"


@contextmanager
def loading(model: LocalModel, part: str) -> Iterator[None]:
    """Turn whatever a library raises for a part of a model into a UserError. Keep the block to loading."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the file system, safetensors or the library, which share no class
        raise UserError(
            f"Cannot load {part} of {model.name}: {first_line(error)}. It must be laid out as diffusers' "
            "save_pretrained writes it, with complete weight files in the safetensors format."
        ) from error


def load_part(load: Callable[..., Any], model: LocalModel, part: str, **kwargs: Any) -> Any:
    """Call `load`, a from_pretrained, for one part of a model, and make sure that its files hold what the part has.

    The libraries would fill a tensor that is missing with random numbers. With device_map="meta" nothing is loaded,
    and only the names and shapes are compared: 0.2 s for T5. Raises UserError.
    """
    with loading(model, part):
        loaded, found = load(
            model.folder,
            subfolder=part,
            variant=model.variant,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in `found`, too
            **kwargs,
        )
        differences = []
        for kind in ("missing", "unexpected", "mismatched"):
            names = sorted(each if isinstance(each, str) else each[0] for each in found[f"{kind}_keys"])
            if names:
                differences.append(f"{len(names)} {kind} (first: {names[0]})")
        if differences:
            raise ValueError(f"its tensors do not match the model: {', '.join(differences)}")
    return loaded


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: the Hub's own words, where there are some."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8; save it as UTF-8"
    message = (getattr(error, "server_message", None) or str(error)).strip() or type(error).__name__
    return message.splitlines()[0].rstrip(".")


# ------------------------------------------------------------------------------------------- launch, signals, errors


def make_accelerator(args: Args) -> Accelerator:
    """Return accelerate's engine, with the precision of --mixed_precision or else the launcher's."""
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            # As a plugin: ACCELERATE_GRADIENT_ACCUMULATION_STEPS would win over the plain argument.
            gradient_accumulation_plugin=GradientAccumulationPlugin(args.gradient_accumulation_steps),
            dynamo_backend="no",  # the keys of a compiled model are not those that a LoRA file has
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=args.output_dir / args.logging_dir,
            # On a Mac, copies that do not block can deliver wrong data.
            dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
            kwargs_handlers=[
                AutocastKwargs(enabled=False),  # everything has the training dtype; the LoRA casts for itself
                DistributedDataParallelKwargs(broadcast_buffers=False),  # they never change
                InitProcessGroupKwargs(timeout=timedelta(hours=12)),  # others wait for previews and the upload
            ],
        )
    # A precision that this device or this torch cannot do, an unknown tracker, a broken environment.
    except (ValueError, ImportError, RuntimeError) as error:
        raise SystemExit(f"Cannot start: {first_line(error)}.") from error
    if accelerator.distributed_type not in SUPPORTED_LAUNCHES:
        raise SystemExit(
            f"Cannot start: accelerate is configured for {accelerator.distributed_type}, which this program does not "
            "support. Start it with `python` on one GPU, or with `accelerate launch --multi_gpu` on several; where "
            "torch_xla is installed, with USE_TORCH_XLA=0."
        )
    if "ACCELERATE_MIXED_PRECISION" in os.environ and accelerator.num_processes == 1:
        torch.set_num_threads(usable_cpus())  # the launcher allows one
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    torch.backends.cuda.enable_cudnn_sdp(False)  # on H100 its backward pass has given NaN (pytorch issue 196678)
    return accelerator


# Others put something else in the place of the model, its layers or the optimizer.
SUPPORTED_LAUNCHES = ("NO", "MULTI_GPU", "MULTI_CPU")


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use, of which taskset or a container can leave few."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def silence_libraries() -> None:
    """Hide what the libraries say at the start of a normal run; their errors stay."""
    import transformers  # takes 1 s, which --help and a wrong command line should not cost

    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*broadcast_buffers")  # a flag that accelerate passes on to DDP
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks")  # which diffusers passes on to huggingface_hub
    # fp16's loss scaler skips optimizer steps at first, so the schedule seems to come too early.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before")
    threading.excepthook = report_thread_error


def report_thread_error(failure: threading.ExceptHookArgs) -> None:
    """Report an error of a thread, but not of the file system: TensorBoard raises that again, in the main thread."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def start_tracker(args: Args, plan: Plan, accelerator: Accelerator) -> None:
    """Start the tracker, before anything that takes long: it may ask for a login."""
    # TensorBoard imports an installed TensorFlow, which takes a minute and 0.8 GiB, unless there is this module.
    sys.modules["tensorboard.compat.notf"] = ModuleType("tensorboard.compat.notf")
    problems = Problems(accelerator)
    with noted_logging(accelerator):
        try:
            accelerator.init_trackers("dreambooth-sd3-lora-miniature", config=plan.settings)
        except OSError:
            raise
        except Exception as error:  # trackers' errors share no class
            problems.add(f"--report_to {args.report_to}: {first_line(error)}. To train without it: --report_to none")
    problems.stop_if_any()


@contextmanager
def noted_logging(accelerator: Accelerator) -> Iterator[None]:
    """Log no more, with one note, if a tracker's file cannot be written. A full disk ends the run."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            raise
        print(f"note: logging stops: {error}")
        accelerator.trackers.clear()  # TensorBoard would raise the same error at each step


@contextmanager
def lock_output_dir(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Create the output folder and keep other runs out of it; the system frees the lock when a process dies."""
    for name in ("latents", "samples"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    problems = Problems(accelerator)
    try:
        if accelerator.is_main_process:
            lock.acquire()
    except Timeout:
        problems.add(
            f"Another run is writing to {folder}: wait for it, or use another --output_dir. If none is running, "
            f"another machine has left its lock: delete {lock.lock_file}."
        )
    except (OSError, NotImplementedError) as error:
        problems.note(f"{folder} cannot be locked ({error}): keep other runs out of it")
    problems.stop_if_any()
    try:
        if accelerator.is_main_process:
            for part in (".", "latents", "samples", "checkpoint-*", "class_*-*"):
                for unfinished in folder.glob(f"{part}/.unfinished-*"):  # of a run that was killed
                    shutil.rmtree(unfinished, ignore_errors=True)
        yield
    finally:
        lock.release()


SIGHUP = 1  # which Windows does not have
SIGBREAK = getattr(signal, "SIGBREAK", signal.SIGINT)  # Ctrl-Break, which only Windows has
END_SIGNALS = signal.valid_signals() & {SIGHUP, SIGBREAK, signal.SIGINT, signal.SIGTERM}
SAME_SIGNAL = 2.0  # seconds: a terminal, a shell and a launcher each send the signal that one Ctrl-C makes


class StopRequest:
    """Whether the run is to end: after Ctrl-C, SIGTERM or a lost terminal, or because its launcher is gone.

    While `saves_first` holds, the training loop looks at `requested` and ends after its step, with a checkpoint; else
    a signal ends the run as Ctrl-C does. What follows within two seconds is the same signal, sent by somebody else; a
    later one ends the process at once.
    """

    def __init__(self) -> None:
        self.saves_first = False
        self.first_signal: float | None = None  # when it came
        is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ  # accelerate launch always sets it
        self.launcher = PARENT if is_launched else None

    @property
    def requested(self) -> bool:
        """Whether a signal has come, or the launcher is gone: an orphan would keep the GPU, out of anybody's reach."""
        is_orphan = self.launcher is not None and os.getppid() != self.launcher
        return self.first_signal is not None or is_orphan

    def listen(self) -> None:
        """Take the signals from here on, but for those that are ignored, as nohup ignores SIGHUP."""
        for number in END_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def end_at_once(self) -> None:
        """From here on there is nothing that a signal should save first; one that has come already ends the run."""
        self.saves_first = False
        if self.requested:
            raise KeyboardInterrupt

    def note(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.first_signal is None:
            self.first_signal = now
            if not self.saves_first:
                raise KeyboardInterrupt
            with suppress(OSError):  # os.write, since print may be at work already
                os.write(2, b"\nStopping after this step. Ctrl-C once more, in two seconds, ends the run at once.\n")
        elif now - self.first_signal > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def ignore_end_signals(_: int) -> None:
    """Keep a data worker alive through Ctrl-C, which reaches it too: the last step before the end needs its samples.

    A worker that Python spawns, as on Windows, does not inherit what StopRequest has set. SIGTERM ends it as before.
    """
    for number in END_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)


LATER_KERNELS = 256 * 2**20  # bytes of GPU memory: bitsandbytes' are loaded in the first optimizer step


def limit_gpu_memory(device: torch.device, dtype: torch.dtype) -> None:
    """Let torch allocate what is free on the GPU, less a reserve for kernels that are loaded later.

    The driver of Windows and WSL2 would go on in RAM, where every try fits and a step takes minutes.
    """
    ones = torch.ones(32, 32, device=device, dtype=dtype, requires_grad=True)
    (ones @ ones).sum().backward()  # creates cuBLAS's handles, which live outside of torch's allocator
    free, total = torch.cuda.mem_get_info()
    limit = (free + torch.cuda.memory_reserved() - LATER_KERNELS) / total
    with suppress(AttributeError):  # a device that only answers for CUDA may have no limit to set
        torch.cuda.set_per_process_memory_fraction(max(limit, 0.0))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that the GPU is full; what is allocated beside torch's allocator has other errors."""
    pattern = "CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDNN_STATUS_ALLOC_FAILED|out of memory"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(pattern, str(error)))


@contextmanager
def explained_errors() -> Iterator[None]:
    """Turn errors that preflight cannot foresee into one message; an unexpected error keeps its traceback."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.code, str):  # a message, which may show the name of a file
            raise SystemExit(end.code.translate(CONTROLS)) from end.__cause__
        raise
    except KeyboardInterrupt:  # before or after training; during training, a signal saves a checkpoint
        raise SystemExit(f"Interrupted. {NOTHING_LOST}: run {AGAIN} if training had begun.") from None
    except Exception as error:
        message = explanation(error)
        if message:
            raise SystemExit(message.translate(CONTROLS)) from error
        print(f"{NOTHING_LOST}. Unexpected error:", file=sys.stderr)
        raise


NOTHING_LOST = "Saved files are intact"


def explanation(error: Exception) -> str:
    """Return what to tell the user about an error of the machine or of a file; "" for any other one."""
    if isinstance(error, UserError):
        return f"{error} {NOTHING_LOST}."
    has_peers = torch.distributed.is_available() and torch.distributed.is_initialized()
    if has_peers and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
        return "Another process of this run has ended: see its message."
    if is_out_of_memory(error):
        fixes = "--gradient_checkpointing, --train_batch_size 1, a lower --resolution, --quantize_base nf4"
        return f"Out of GPU memory, {peak_memory()}. Try, cheapest first: {fixes}."
    if is_full_disk(error):
        return f"The disk is full ({error}). {NOTHING_LOST}: make room and resume."
    names_file = isinstance(error, OSError) and error.filename is not None
    if names_file or isinstance(error, FileNotFoundError | PermissionError):  # a user's file or folder
        reason = str(error).rstrip().rpartition("\n")[2]  # a data worker's has its traceback above it
        return f"{reason}. {NOTHING_LOST}: fix this and run {AGAIN} if training had begun."
    if "DataLoader worker (pid" in str(error):  # it was killed; an error inside a worker speaks for itself
        return f"{error} The usual cause is too little RAM: use --dataloader_num_workers 0."
    return ""


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error means that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class ForgivingStream:
    """An output stream for which printing never fails.

    Its reader, a pipe or a terminal, may go away, and its encoding, such as cp1252 on Windows, may lack characters:
    that costs the output, or shows escapes such as \\u72ac, but not the result of the program. Control characters
    are escaped, too, since the name of a file could command the terminal; with has_bars they stay, since bars do.
    """

    def __init__(self, stream: Any, has_bars: bool = False) -> None:
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 - None: it was closed from the start
        self.escapes = {} if has_bars else CONTROLS

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        printable = text.translate(self.escapes).encode(encoding, "backslashreplace").decode(encoding)
        with suppress(OSError, ValueError):
            self.stream.write(printable)
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        """Do nothing: write() has flushed."""


def no_bar(accelerator: Accelerator) -> bool | None:
    """Return tqdm's `disable`: one process of a machine draws bars, and tqdm itself draws none outside a terminal."""
    return None if accelerator.is_local_main_process else True


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 step" or "2 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shell_line(command: list[str]) -> str:
    """Return a command as it is typed; Windows' cmd.exe knows double quotes alone."""
    if os.name == "nt":
        return subprocess.list2cmdline(command)
    return shlex.join(command)


def peak_memory() -> str:
    """Return the peak VRAM and RAM of this process so far; RAM includes mapped files, such as weights."""
    vram = f"peak VRAM {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB, " if torch.cuda.is_available() else ""
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        ram = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # on Windows
        ram = psutil.Process().memory_info().peak_wset
    return f"{vram}peak RAM {ram / 2**30:.2f} GiB"


def vram_in_use() -> str:
    """Return the peak VRAM of this process for the progress bar, or nothing without a GPU."""
    if not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB"


if __name__ == "__main__":
    main(parse_args())
