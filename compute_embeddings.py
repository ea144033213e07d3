"""Compute the prompt embeddings that train_dreambooth_sd3_lora_miniature.py trains on, once, into one Parquet file.

    python compute_embeddings.py --prompt "a photo of sks dog" --local_data_dir dog

Stable Diffusion 3 reads a prompt with three text encoders: the two CLIPs run first, then T5, and each is gone before
the next one comes. Peak on a GPU: 7.4 GiB with T5 in 8 bits, 1.7 GiB with --t5_precision exact (counted by
tests/tools/step_cost.py). The file has one row per distinct prompt, and one for the empty prompt.

A map of this file, from top to bottom:

    Flags             every command-line flag, declared once, in the dataclass Args
    Images, captions  which prompt belongs to which image
    Text encoders     both CLIPs, then T5, into fp16 embeddings
    Main              the Parquet file, errors, and the order in which everything happens
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

# Both would end an import below with a traceback of a library.
if sys.flags.optimize > 1:
    raise SystemExit("python -OO and PYTHONOPTIMIZE=2 take away docstrings, which transformers reads. Use python -O.")
if not isinstance(logging.getLevelName(os.environ.get("ACCELERATE_LOG_LEVEL", "INFO").upper()), int):
    raise SystemExit(f"ACCELERATE_LOG_LEVEL={os.environ['ACCELERATE_LOG_LEVEL']} is no level, such as INFO or ERROR.")

import diffusers  # this and transformers load their parts on first use, so --help answers soon
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------------- flags
# Each flag is declared once, as a field of Args; the parser and the checks of limits are derived from it.


FLAG_DETAILS: dict[str, Any] = {  # what a flag can say about itself, and what holds if it says nothing
    "minimum": None,  # lowest value of a number; None: 1 for integers, 1e-30 for real numbers
    "maximum": None,  # highest value of a number; None: 10 million for integers, 1e30 for real numbers
    "choices": None,
    "metavar": None,  # what --help shows in place of a value
    "const": None,  # the value if the flag is given without one
    "parse": None,  # converts the text from the command line; None: the field's type does
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
@dataclass(frozen=True)
class Args:
    """The command line; without flags it does the reference's job."""

    # model
    pretrained_model_name_or_path: str = flag(
        "model", "stabilityai/stable-diffusion-3-medium-diffusers",
        "SD3 or SD3.5: a Hub repository, or a folder in diffusers' layout", metavar="MODEL")
    revision: str | None = flag("model", None, "branch, tag or commit of the repository; unset: its main branch")
    variant: str | None = flag("model", None, "variant of the weight files, such as fp16; unset: the plain files")
    cache_dir: str | None = flag(
        "model", None, "where downloads are kept; unset: the Hugging Face cache", metavar="DIR")
    t5_precision: str = flag(
        "model", "int8", "int8: LLM.int8(), 7.4 GiB; exact: fp32, streamed from disk, 1.7 GiB; none: zeros in T5's "
        "place, which SD3 accepts", choices=("int8", "exact", "none"))

    # prompts
    prompt: str = flag(
        "prompts", "a photo of sks dog", "instance prompt, for every image without a caption of its own")
    class_prompt: str | None = flag(
        "prompts", None, "prompt of prior preservation, such as 'a photo of a dog'", metavar="PROMPT")
    validation_prompt: tuple[str, ...] = flag("prompts", (), "prompts of previews", metavar="PROMPT")
    negative_prompt: str | None = flag(
        "prompts", None, "negative prompt of the previews; the empty prompt is always included", metavar="PROMPT")
    max_sequence_length: int = flag("prompts", 77, "number of T5 tokens per prompt, at most 512", maximum=512)

    # files
    local_data_dir: Path = flag("files", Path("dog"), "folder with the images of the subject", metavar="DIR")
    output_path: Path = flag("files", Path("sample_embeddings.parquet"), "file to write", metavar="FILE")
# fmt: on


class Parser(argparse.ArgumentParser):
    """argparse for a dataclass of flags. It also reads flags from @FILE, and hides tokens in its messages."""

    def __init__(self, flags: type, description: str) -> None:
        epilog = "Flags can also be read from a file, one with its value per line: @FILE."
        super().__init__(description=description, allow_abbrev=False, fromfile_prefix_chars="@", epilog=epilog)
        types = get_type_hints(flags)
        groups: dict[str, Any] = {}
        for each in fields(flags):
            name = each.metadata["group"]
            if name not in groups:
                groups[name] = self.add_argument_group(name)
            groups[name].add_argument(f"--{each.name}", **argparse_options(each, types[each.name]))

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"hf_\w+", "hf_...", message))

    def parse_values(self, argv: list[str] | None) -> dict[str, Any]:
        """Parse a command line; flags that take several values get a tuple."""
        try:
            values = vars(self.parse_args(argv))
        except ValueError as error:  # --flag=--, or a file of flags with an open quote
            self.error(f"cannot be read: {error}")
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
    else:
        options["default"] = each.default
        if each.default not in (None, "", ()) and each.default is not False:
            options["help"] += f" (default: {each.default})"
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


def flag_problems(args: Args) -> list[str]:
    """Return what is wrong with single flags: numbers outside of their limits, and texts that are not UTF-8."""
    problems = []
    for each in fields(args):
        value = getattr(args, each.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = each.metadata["minimum"], each.metadata["maximum"]
            if low is None:
                low = 1 if isinstance(value, int) else 1e-30
            if high is None:
                high = 10_000_000 if isinstance(value, int) else 1e30
            if not low <= value <= high:  # this way around, since nan compares as False
                problems.append(f"--{each.name} {value} is not between {low} and {high}")
        texts = value if isinstance(value, tuple) else [str(value)]
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                problems.append(f"--{each.name} is not UTF-8")
    return problems


def parse_args(argv: list[str] | None = None) -> Args:
    """Parse the command line; a mistake ends the program in one message."""
    parser = Parser(Args, str(__doc__ or "").split("\n")[0])
    help_text = "the same as --t5_precision none"
    parser.add_argument("--no_t5", action="store_const", dest="t5_precision", const="none", help=help_text)
    args = Args(**parser.parse_values(argv))
    problems = flag_problems(args)
    if len(args.validation_prompt) > 2 and " " not in "".join(args.validation_prompt):
        problems.append("--validation_prompt: prompts of several words need quotes, such as 'a photo of sks dog'")
    if problems:
        parser.error("\n  ".join(problems))
    return args


# -------------------------------------------------------------------------------------------------- images, captions
# Which prompt belongs to which image. Everything that is wrong with the folder is collected and reported at once,
# before a text encoder is loaded.

FORMATS = ["BMP", "JPEG", "PNG", "TIFF", "WEBP"]  # no others are tried: Pillow would start Ghostscript for one
with suppress(ImportError):  # the photos of many phones
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")
# Pillow raises any of these for a file that is no image, or a broken one.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, Image.DecompressionBombError)
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as datasets' ImageFolder reads them
NOT_USED = (
    "not an image (HEIC needs pip install pillow-heif), not NAME.txt, NAME.caption or NAME.mask.png of an image, "
    "and not metadata.csv, .jsonl or .parquet in the folder of the images"
)


def find_images(folder: Path) -> list[Path]:
    """Return the image files directly in a folder, sorted by name, without masks and hidden files."""
    format_of = Image.registered_extensions()
    images = []
    for path in sorted(folder.glob("[!.]*")):
        is_mask = path.stem.endswith(".mask")
        if format_of.get(path.suffix.lower()) in FORMATS and not is_mask and not path.is_dir():
            images.append(path)
    return images


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex: the embeddings name an image by it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_image(path: Path) -> Image.Image:
    """Open an image without reading its pixels; raise one of UNREADABLE if it cannot be used."""
    path.name.encode()  # a ValueError if it is not UTF-8
    if not path.is_file():  # a pipe would be waited for forever
        raise OSError("it is not a regular file")
    image = Image.open(path, formats=FORMATS)
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per channel; save it with 8 or 16")
    return image


class UnreadableImageError(ValueError):
    """A user's image that cannot be used; the message names the file and says why."""


@contextmanager
def reading_image(path: Path) -> Iterator[None]:
    """Turn what Pillow raises for a broken file into an UnreadableImageError. Keep the block to reading alone."""
    try:
        yield
    except UNREADABLE as error:
        message = f"{path} is not a readable image ({error}). Repair it or remove it from the folder."
        raise UnreadableImageError(message) from error


def caption_images(args: Args) -> dict[str, list[str]]:
    """Return each distinct prompt with the hashes of the images that it captions; exit if anything is wrong.

    The first prompt is --prompt, the last one is the empty prompt.
    """
    folder = args.local_data_dir
    problems: list[str] = []
    images = find_images(folder)
    if not images:
        problems.append(f"--local_data_dir {folder} has no images ({', '.join(FORMATS)}).")
    own_captions = read_captions(folder, images, problems)
    caption_of = {}
    for image in images:
        caption_of[image] = own_captions.get(image, args.prompt)
    hashes_of = hash_images(images, caption_of, problems)
    if problems:
        raise SystemExit("\n".join(problems))

    captions: dict[str, list[str]] = {}
    for prompt in (args.prompt, args.class_prompt, *args.validation_prompt, args.negative_prompt, *hashes_of):
        if prompt:
            captions[prompt] = hashes_of.get(prompt, [])
    captions[""] = hashes_of.get("", [])
    count = f"{len(images)} images in {folder}, {len(own_captions)} with a caption of their own"
    print(f"{count}; {len(captions)} distinct prompts")
    return captions


def hash_images(images: list[Path], caption_of: dict[Path, str], problems: list[str]) -> dict[str, list[str]]:
    """Return each caption with the hashes of its images.

    Each image is decoded once: repairing a truncated one later would change its hash, and cost the embeddings again.
    """
    hashes_of: dict[str, list[str]] = {}
    first_of: dict[str, Path] = {}  # by hash
    for path in tqdm(images, desc="Reading images", unit="image", leave=False):
        try:
            with reading_image(path), open_image(path) as image:
                image.load()
                sha256 = sha256_of(path)
        except UnreadableImageError as error:
            problems.append(str(error))
            continue
        first = first_of.setdefault(sha256, path)
        if first == path:
            hashes_of.setdefault(caption_of[path], []).append(sha256)
        elif caption_of[first] != caption_of[path]:
            problems.append(f"{first} and {path} are the same image with different captions. Remove one of them.")
    return hashes_of


def read_captions(folder: Path, images: list[Path], problems: list[str]) -> dict[Path, str]:
    """Return the captions of images that have their own, from sidecar files and from a metadata file.

    A sidecar NAME.txt or NAME.caption wins over a row of metadata.csv, metadata.jsonl or metadata.parquet. What is not
    used is named in a note, for whoever wonders where an image or a caption went.
    """
    images_of: dict[str, list[Path]] = {}  # by stem: a.txt is the caption of a.jpg and of a.png
    for image in images:
        images_of.setdefault(image.stem, []).append(image)
    known = {*images, *[image.with_suffix(".mask.png") for image in images]}

    captions: dict[Path, str] = {}
    sidecars = []
    for path in sorted(folder.glob("[!.]*")):
        if path.name in METADATA_NAMES:
            captions |= read_metadata_file(path, set(images), problems)
        elif path.suffix.lower() in (".txt", ".caption") and path.stem in images_of:
            sidecars.append(path)
        elif path not in known and not path.is_dir():
            print(f"note: skipped {path}: {NOT_USED}")
    for path in folder.parent.glob("metadata.*"):  # a common mistake: beside the folder instead of inside it
        if path.resolve().parent != folder.resolve():  # it is inside if the folder is "."
            print(f"note: skipped {path}: {NOT_USED}")
    for path in sidecars:
        try:
            text = path.read_text("utf-8-sig")
        except (OSError, ValueError) as error:
            problems.append(f"{path} cannot be read: {error}. Captions are UTF-8.")
            continue
        for image in images_of[path.stem]:
            captions |= check_caption(path, image.name, text, {image}, problems)
    return captions


def check_caption(path: Path, name: Any, text: Any, images: set[Path], problems: list[str]) -> dict[Path, str]:
    """Return {image: caption} for an image's name and its caption as a file gives them, or {} and a problem."""
    image = path.parent / str(name)
    if image not in images:
        problems.append(f"{path} has a caption of {name}; only images directly in {path.parent} are read.")
        return {}
    is_nan = text != text  # pandas and Arrow write an empty cell so
    if not isinstance(text, str | int | float) or is_nan or not str(text).strip():
        problems.append(f"{path}: the caption of {name} is {text!r}. Write one, or remove it.")
        return {}
    return {image: " ".join(str(text).split())}


def read_metadata_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metadata file; raises OSError or ValueError if it is not readable."""
    if path.suffix == ".csv":
        return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    lines = path.read_text("utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def read_metadata_file(path: Path, images: set[Path], problems: list[str]) -> dict[Path, str]:
    """Return the captions in a metadata file, which has columns file_name and text."""
    try:
        rows = read_metadata_rows(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        problems.append(f"{path} cannot be read: {error}. Tables are UTF-8 and have columns file_name and text.")
        return {}
    captions: dict[Path, str] = {}
    for row in rows:
        if not isinstance(row, dict) or "file_name" not in row or "text" not in row:
            problems.append(f"{path} has a row without file_name or text: {row!r}.")
            return {}
        for image, caption in check_caption(path, row["file_name"], row["text"], images, problems).items():
            if image in captions:
                problems.append(f"{path} has two rows for {image}. Keep one of them.")
            captions[image] = caption
    return captions


# ----------------------------------------------------------------------------------------------------- text encoders
# Both CLIPs together (1.6 GiB in fp16), for all prompts; then T5 alone, for all prompts, in 8 bits or streamed from
# disk one block at a time. What they give goes into a file on disk, since ten thousand captions would not fit in RAM.

CHUNK_TOKENS = 16 * 77  # T5 tokens per pass: more prompts share one reading of a streamed T5, but need more memory


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: the Hub's own words, where there are some."""
    message = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    return message.splitlines()[0].rstrip(".")


def load_part(load: Callable[..., T], args: Args, subfolder: str, **kwargs: object) -> T:
    """Call `load`, a from_pretrained, for one part of the pipeline; if it fails, exit with one message."""
    name = args.pretrained_model_name_or_path
    try:
        return load(name, subfolder=subfolder, revision=args.revision, cache_dir=args.cache_dir, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the file system, safetensors, the Hub or the network, which share no class
        raise SystemExit(f"Cannot load {subfolder} of {name}: {first_line(error)}\n{advice_on_model(name)}") from error


def advice_on_model(name: str) -> str:
    """Return what to try if a model cannot be loaded."""
    if Path(name).is_dir():
        return "The folder must have diffusers' layout, with whole weight files in the safetensors format."
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return "There is no such folder, and no repository can have this name."
    return (
        "There is no such folder. The repository may be gated: accept its license on "
        f"https://huggingface.co/{name} and run: hf auth login\n"
        "Without a network, HF_HUB_OFFLINE=1 uses what has been downloaded before."
    )


def list_model_files(args: Args, token: str | None) -> list[str] | None:
    """Return the names of the model's files, such as vae/config.json; None if the Hub cannot be asked."""
    folder = Path(args.pretrained_model_name_or_path)
    if folder.is_dir():
        return [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    try:
        return HfApi(token=token).list_repo_files(str(folder.as_posix()), revision=args.revision)
    except Exception:  # of the Hub or the network, which share no class; what was downloaded before may be enough
        return None


def missing_weights(files: list[str], args: Args, subfolder: str) -> str:
    """Return a message if a model has no weights of a part in the format and the variant that are loaded, or "".

    They are NAME.safetensors or, in several files, NAME.safetensors.index.json, with the variant as one more suffix.
    """
    stem = "model" if subfolder.startswith("text_encoder") else "diffusion_pytorch_model"
    present = [Path(file).name for file in files if Path(file).parent.name == subfolder]
    for name in present:
        suffixes = name.removeprefix(stem).split(".")
        variant = [suffix for suffix in suffixes if suffix not in ("", "safetensors", "index", "json")]
        if name.startswith(f"{stem}.") and "safetensors" in suffixes and ".".join(variant) == (args.variant or ""):
            return ""
    wanted = f"{stem}.{args.variant}.safetensors" if args.variant else f"{stem}.safetensors"
    weights = [name for name in sorted(present) if "config" not in name]
    has = f"It has: {', '.join(weights)}." if weights else "It has no weights at all."
    fix = "Leave out --variant, or use one that is there." if args.variant else "See --variant."
    return f"Cannot load {subfolder} of {args.pretrained_model_name_or_path}: there is no {wanted}. {has} {fix}"


def check_weights(args: Args) -> None:
    """Exit if weights of a text encoder are missing, before the first one takes its time."""
    files = list_model_files(args, token=None)
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    if args.t5_precision == "none":
        encoders.remove("text_encoder_3")
    if files is not None:
        missing = [missing_weights(files, args, encoder) for encoder in encoders]
        if any(missing):
            raise SystemExit("\n".join(message for message in missing if message))


def load_tokenizer(load: Any, args: Args, subfolder: str) -> Any:
    """Load a tokenizer; exit if its files are missing, for which transformers gives one that knows no words."""
    tokenizer = load_part(load.from_pretrained, args, subfolder)
    if tokenizer.model_max_length > 10**6:  # transformers' value for an unknown length
        raise SystemExit(f"Cannot load {subfolder} of {args.pretrained_model_name_or_path}: its files are missing.")
    return tokenizer


def load_clip(args: Args, device: torch.device) -> diffusers.StableDiffusion3Pipeline:
    """Return a pipeline of nothing but both CLIPs, in fp16 on a GPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # CPUs are slow in fp16
    kwargs = {"variant": args.variant, "dtype": dtype, "use_safetensors": True}
    load = transformers.CLIPTextModelWithProjection.from_pretrained
    config = load_part(diffusers.SD3Transformer2DModel.load_config, args, "transformer")
    with torch.device("meta"):  # encode_prompt asks the transformer for its width
        transformer = diffusers.SD3Transformer2DModel.from_config(config)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=None,
        vae=None,
        text_encoder=load_part(load, args, "text_encoder", **kwargs).to(device),
        tokenizer=load_tokenizer(transformers.CLIPTokenizer, args, "tokenizer"),
        text_encoder_2=load_part(load, args, "text_encoder_2", **kwargs).to(device),
        tokenizer_2=load_tokenizer(transformers.CLIPTokenizer, args, "tokenizer_2"),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load_t5(args: Args, device: torch.device, offload_folder: Path) -> transformers.T5EncoderModel:
    """Load T5 in 8 bits, or in fp32 with its blocks left on disk, from where accelerate reads one at a time.

    transformers keeps `wo`, which overflows in fp16, in fp32. Streaming would lose that rule, so a streamed T5 is
    computed in fp32 altogether.
    """
    kwargs: dict[str, Any] = {"variant": args.variant, "use_safetensors": True}  # other files could run code
    if args.t5_precision == "int8":
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        kwargs["dtype"] = torch.float16
        kwargs["device_map"] = device
    else:
        kwargs["dtype"] = torch.float32
        kwargs["offload_folder"] = offload_folder
        kwargs["device_map"] = {
            "shared": device.type,
            "encoder.embed_tokens": device.type,
            "encoder.final_layer_norm": device.type,
            "encoder.block": "disk",
        }
    return load_part(transformers.T5EncoderModel.from_pretrained, args, "text_encoder_3", **kwargs)


def report_truncated(tokenizer: Any, prompts: list[str], max_length: int, name: str) -> None:
    """Note the end of each prompt that is too long for an encoder."""
    room = max_length - tokenizer.num_special_tokens_to_add()
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if len(ids) > room:
            unseen = tokenizer.decode(ids[room:])
            print(f"note: {name} reads {max_length} tokens; of {prompt!r} it does not see {unseen!r}")


def to_float16(embeds: Tensor, name: str) -> np.ndarray:
    """Return the same numbers in fp16; exit if one of them is not finite there."""
    embeds = embeds.half()
    if not embeds.isfinite().all():
        raise SystemExit(f"{name} gave values that fp16 cannot hold. With T5 in 8 bits, try --t5_precision exact.")
    return embeds.cpu().numpy()


def encode_with_clip(
    args: Args, chunks: list[list[str]], device: torch.device, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return prompt_embeds with zeros in T5's place, (N, CLIP tokens + T5 tokens, D), and the pooled ones, (N, P).

    The first array lives in a file: 1.2 MB per prompt would not fit in RAM for ten thousand captions.
    """
    pipeline = load_clip(args, device)
    for chunk in chunks:
        report_truncated(pipeline.tokenizer, chunk, pipeline.tokenizer.model_max_length, "CLIP")
    pooled_prompt_embeds = []
    with open(path, "wb") as file:  # written, not mapped: on a full disk, writing to a mapped page is a crash
        for chunk in tqdm(chunks, desc="Encoding with CLIP", unit="chunk"):
            embeds, _, pooled_embeds, _ = pipeline.encode_prompt(
                prompt=chunk,
                prompt_2=None,
                prompt_3=None,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=args.max_sequence_length,
            )
            file.write(to_float16(embeds, "CLIP").data)
            pooled_prompt_embeds.append(to_float16(pooled_embeds, "CLIP"))
    pooled = np.concatenate(pooled_prompt_embeds)
    return np.memmap(path, np.float16, "r+", shape=(len(pooled), *embeds.shape[1:])), pooled


def encode_with_t5(
    args: Args, chunks: list[list[str]], device: torch.device, prompt_embeds: np.ndarray, scratch: Path
) -> None:
    """Write T5's part into prompt_embeds, (N, CLIP tokens + T5 tokens, D), in place."""
    length = args.max_sequence_length
    tokenizer = load_tokenizer(transformers.T5TokenizerFast, args, "tokenizer_3")
    for chunk in chunks:
        report_truncated(tokenizer, chunk, length, "T5")
    encoder = load_t5(args, device, scratch)
    blocks = encoder.encoder.block
    row = 0
    with tqdm(total=len(blocks) * len(chunks), desc="Encoding with T5", unit="layer") as progress_bar:

        def advance(*_: object) -> None:
            progress_bar.update()

        for block in blocks:  # one pass of a streamed T5 can take a minute
            block.register_forward_hook(advance)
        for chunk in chunks:
            input_ids = tokenizer(
                chunk, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids  # (n, length)
            embeds = encoder(input_ids.to(device))[0]  # (n, length, D)
            prompt_embeds[row : row + len(chunk), -length:] = to_float16(embeds, "T5")
            row += len(chunk)


@torch.inference_mode()
def encode_prompts(args: Args, prompts: list[str], scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return what the pipeline's encode_prompt gives, in fp16: (N, CLIP tokens + T5 tokens, D) and (N, P)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = CHUNK_TOKENS // max(77, args.max_sequence_length)
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    prompt_embeds, pooled_prompt_embeds = encode_with_clip(args, chunks, device, scratch / "prompt_embeds")
    diffusers.training_utils.free_memory()  # both CLIPs
    if args.t5_precision != "none":
        encode_with_t5(args, chunks, device, prompt_embeds, scratch)
    return prompt_embeds, pooled_prompt_embeds


# -------------------------------------------------------------------------------------------------------------- main
# The Parquet file appears under its name when it is complete; an interrupted run leaves the older file as it was.


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


def flush_to_disk(file: Any) -> None:
    """Wait until an open file is on disk, if its file system can do that; some shares and FUSE mounts cannot."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # the disk is full, or broken
            raise


def write_embeddings(
    path: Path,
    captions: dict[str, list[str]],
    prompt_embeds: np.ndarray,
    pooled_prompt_embeds: np.ndarray,
    about: dict[str, Any],
) -> None:
    """Write one row and row group per prompt.

    captions: the hashes of the images that each prompt captions; prompt_embeds (N, L, D), pooled_prompt_embeds (N, P).
    """
    columns = {
        "prompt": list(captions),
        "image_hashes": pa.array(captions.values(), pa.list_(pa.string())),
        "prompt_embeds": pa.FixedShapeTensorArray.from_numpy_ndarray(prompt_embeds),
        "pooled_prompt_embeds": pa.FixedShapeTensorArray.from_numpy_ndarray(pooled_prompt_embeds),
    }
    table = pa.table(columns, metadata={"sd3_embeddings": json.dumps(about)})
    with open(path, "wb") as file:
        pq.write_table(table, file, row_group_size=1)
        flush_to_disk(file)


def compute(args: Args) -> None:
    """Compute the embeddings: everything from the images to the file."""
    started = time.monotonic()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    captions = caption_images(args)
    path = args.output_path
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path.is_file() and path.open("rb").read(4) == b"PAR1"):
        raise SystemExit(f"--output_path {path} exists and is not a Parquet file.")
    check_weights(args)
    about = {
        "format_version": 1,
        "model": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "prompt": args.prompt,
        "max_sequence_length": args.max_sequence_length,
        "t5": args.t5_precision,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "bitsandbytes")},
    }
    with tempfile.TemporaryDirectory(prefix=".embeddings-", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        prompt_embeds, pooled_prompt_embeds = encode_prompts(args, list(captions), Path(scratch))
        table = Path(scratch, "table.parquet")
        write_embeddings(table, captions, prompt_embeds, pooled_prompt_embeds, about)
        del prompt_embeds  # it maps a file in the scratch folder, which Windows could not remove
        os.replace(table, path)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, {peak_memory()}, {time.monotonic() - started:.0f} s")


def main(args: Args) -> None:
    """Compute the embeddings, and end with one message on what can go wrong in between."""
    for number in signal.valid_signals() & {1, 15}:  # SIGHUP, which Windows does not have, and SIGTERM
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    try:
        compute(args)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; nothing was written.") from None
    except torch.OutOfMemoryError as error:
        fix = "T5 in 8 bits takes 7.4 GiB; --t5_precision exact takes 1.7 GiB."
        raise SystemExit(f"Out of GPU memory, {peak_memory()}. {fix}") from error
    except OSError as error:  # a full disk, a folder that may not be read or written
        places = f"--local_data_dir {args.local_data_dir} or --output_path {args.output_path}"
        raise SystemExit(f"{places} cannot be read or written: {error}.") from error


if __name__ == "__main__":
    main(parse_args())
