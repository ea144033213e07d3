"""Compute the prompt embeddings that train_dreambooth_sd3_lora_miniature.py trains on, once, into one Parquet file.

    python compute_embeddings.py --prompt "a photo of sks dog" --local_data_dir dog

Stable Diffusion 3 reads a prompt with three text encoders: both CLIPs first, then T5, each gone before the next comes.
Peak on a GPU: 7.4 GiB with T5 in 8 bit, 1.7 GiB with --t5_precision exact (counted by tests/step_cost.py). One row is
written per distinct prompt, and one for the empty prompt.
"""

from __future__ import annotations

import argparse
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
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import diffusers  # this and transformers load their parts on first use, so that --help answers soon
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

T = TypeVar("T")
CHUNK_TOKENS = 16 * 77  # T5 tokens per pass: more prompts share one reading of a streamed T5, but need more memory
FORMATS = ["BMP", "JPEG", "PNG", "TIFF", "WEBP"]  # no others are tried: Pillow would start Ghostscript for one
with suppress(ImportError):  # for the photos of phones
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")
METADATA: dict[str, Callable[[Path], list[dict]]] = {  # captions, as datasets' ImageFolder reads them
    "metadata.csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records"),
    "metadata.jsonl": lambda path: list(map(json.loads, filter(str.strip, path.read_text("utf-8-sig").split("\n")))),
    "metadata.parquet": lambda path: pq.read_table(path).to_pylist(),
}
NOT_USED = (
    "not an image (HEIC needs pip install pillow-heif), nor NAME.txt, NAME.caption or NAME.mask.png of one, "
    "nor metadata.csv, .jsonl or .parquet in the images' folder"
)


class Parser(argparse.ArgumentParser):
    """argparse that reads flags from @FILE, a flag and its value a line, and repeats no token in its messages."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"hf_\w+", "hf_...", message))


def parse_args(argv: list[str] | None = None) -> Namespace:
    # fmt: off
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False, fromfile_prefix_chars="@",
                    epilog="Flags may stand in a file, one with its value a line: @FILE.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", default="stabilityai/stable-diffusion-3-medium-diffusers",
        help="SD3 or SD3.5: Hub repository, or folder in diffusers' layout")
    add("--revision", help="branch, tag or commit of the repository; unset: its main branch")
    add("--variant", help="variant of the weight files, such as fp16; unset: the plain files")
    add("--cache_dir", help="where downloads are kept; unset: the Hugging Face cache")
    add("--t5_precision", choices=["int8", "exact", "none"], default="int8",
        help="int8: LLM.int8(), 7.4 GiB; exact: fp32, streamed from disk, 1.7 GiB; none: zeros, as SD3 accepts")
    add("--no_t5", action="store_const", dest="t5_precision", const="none", help="the same as --t5_precision none")
    add = parser.add_argument_group("prompts").add_argument
    add("--prompt", default="a photo of sks dog", help="instance prompt, for every image without a caption of its own")
    add("--class_prompt", help="prompt of prior preservation, such as 'a photo of a dog'")
    add("--validation_prompt", nargs="+", default=(), metavar="PROMPT", help="prompts of previews")
    add("--negative_prompt", help="negative prompt of the previews; '' is always there")
    add("--max_sequence_length", type=int, default=77, help="T5 tokens per prompt, at most 512")
    add = parser.add_argument_group("files").add_argument
    add("--local_data_dir", type=Path, default=Path("dog"), help="folder with the images of the subject")
    add("--output_path", type=Path, default=Path("sample_embeddings.parquet"), help="file to write")
    # fmt: on
    try:
        args = parser.parse_args(argv)
    except ValueError as error:  # --flag=--, or a file of flags with an open quote
        parser.error(f"cannot be read: {error}")
    if not 1 <= args.max_sequence_length <= 512:
        parser.error(f"--max_sequence_length {args.max_sequence_length}: T5 takes 1 to 512 tokens")
    if len(args.validation_prompt) > 2 and " " not in "".join(args.validation_prompt):
        parser.error("--validation_prompt: prompts of several words need quotes, such as 'a photo of sks dog'")
    for name, value in vars(args).items():
        if "\\udc" in repr(value) or value == []:  # argparse makes [] of --flag=--
            parser.error(f"--{name} is not UTF-8, or empty")
    return args


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


def load_tokenizer(load: Any, args: Namespace, subfolder: str) -> Any:
    """A tokenizer; where there is none, transformers gives an empty one that knows no word and no length."""
    tokenizer = load_part(load.from_pretrained, args, subfolder)
    if tokenizer.model_max_length > 10**6:
        raise SystemExit(f"Cannot load {subfolder} of {args.pretrained_model_name_or_path}: its files are missing.")
    return tokenizer


def load_clip(args: Namespace, device: torch.device) -> diffusers.StableDiffusion3Pipeline:
    """A pipeline of nothing but both CLIPs, in fp16 on a GPU (1.6 GiB)."""
    config = load_part(diffusers.SD3Transformer2DModel.load_config, args, "transformer")
    parts: dict[str, Any] = dict.fromkeys(["scheduler", "vae", "text_encoder_3", "tokenizer_3"])
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # CPUs are slow in fp16
    kwargs = {"variant": args.variant, "dtype": dtype, "use_safetensors": True}
    for number in ("", "_2"):
        parts[f"tokenizer{number}"] = load_tokenizer(transformers.CLIPTokenizer, args, f"tokenizer{number}")
        load = transformers.CLIPTextModelWithProjection.from_pretrained
        parts[f"text_encoder{number}"] = load_part(load, args, f"text_encoder{number}", **kwargs).to(device)
    with torch.device("meta"):  # encode_prompt asks the transformer for its width
        parts["transformer"] = diffusers.SD3Transformer2DModel.from_config(config)
    return diffusers.StableDiffusion3Pipeline(**parts)


def load_t5(args: Namespace, device: torch.device, offload_folder: Path) -> transformers.T5EncoderModel:
    """T5 in 8 bit, or in fp32 with its blocks left on disk, for accelerate to fetch one at a time.

    What is streamed is computed in fp32, since streaming loses transformers' rule that keeps `wo`, which overflows in
    fp16, in fp32. In 8 bit `wo` stays in fp32 by that rule.
    """
    kwargs: dict[str, Any] = {"variant": args.variant, "use_safetensors": True}  # other files could run code
    if args.t5_precision == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        kwargs |= {"device_map": device, "dtype": torch.float16, "quantization_config": config}
    else:
        device_map = dict.fromkeys(["shared", "encoder.embed_tokens", "encoder.final_layer_norm"], device.type)
        device_map["encoder.block"] = "disk"
        kwargs |= {"device_map": device_map, "offload_folder": offload_folder, "dtype": torch.float32}
    return load_part(transformers.T5EncoderModel.from_pretrained, args, "text_encoder_3", **kwargs)


def report_cut(tokenizer: Any, prompts: list[str], max_length: int, name: str) -> None:
    """Say which end of which prompt an encoder will not see."""
    room = max_length - tokenizer.num_special_tokens_to_add()
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if len(ids) > room:
            unseen = tokenizer.decode(ids[room:])
            print(f"note: {name} reads {max_length} tokens; of {prompt!r} it does not see {unseen!r}")


def to_float16(embeds: Tensor, name: str) -> np.ndarray:
    """The same numbers in fp16; an error if one of them is not finite there."""
    embeds = embeds.half()
    if not embeds.isfinite().all():
        raise SystemExit(f"{name} gave values that fp16 cannot hold. With T5 in 8 bit, try --t5_precision exact.")
    return embeds.cpu().numpy()


@torch.inference_mode()
def encode_prompts(args: Namespace, prompts: list[str], scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """What StableDiffusion3Pipeline.encode_prompt gives, in fp16: (N, CLIP tokens + T5 tokens, D) and (N, P).

    The first lives in a file under `scratch`: 1.2 MB a prompt would not fit into RAM for ten thousand captions.
    """
    device, length = torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.max_sequence_length
    size = CHUNK_TOKENS // max(77, length)
    chunks = [slice(start, start + size) for start in range(0, len(prompts), size)]
    pipeline, pooled_prompt_embeds = load_clip(args, device), []
    report_cut(pipeline.tokenizer, prompts, pipeline.tokenizer.model_max_length, "CLIP")
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length}
    with open(scratch / "prompt_embeds", "wb") as file:  # a full disk would be a crash later, in a mapped page
        for chunk in tqdm(chunks, desc="Encoding with CLIP", unit="chunk"):
            embeds, _, pooled_embeds, _ = pipeline.encode_prompt(prompts[chunk], None, None, device, **options)
            file.write(to_float16(embeds, "CLIP").data)  # zeros in T5's place
            pooled_prompt_embeds.append(to_float16(pooled_embeds, "CLIP"))
    prompt_embeds = np.memmap(file.name, np.float16, "r+", shape=(len(prompts), *embeds.shape[1:]))
    del pipeline
    diffusers.training_utils.free_memory()
    if args.t5_precision != "none":
        tokenizer = load_tokenizer(transformers.T5TokenizerFast, args, "tokenizer_3")
        report_cut(tokenizer, prompts, length, "T5")
        encoder = load_t5(args, device, scratch)
        padding = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        layers = len(encoder.encoder.block) * len(chunks)
        with tqdm(total=layers, desc="Encoding with T5", unit="layer") as progress_bar:
            for block in encoder.encoder.block:  # one pass of a streamed T5 can take a minute
                block.register_forward_hook(lambda *_: progress_bar.update() and None)
            for chunk in chunks:
                input_ids = tokenizer(prompts[chunk], **padding).input_ids  # (n, length)
                embeds = encoder(input_ids.to(device))[0]  # (n, length, D)
                prompt_embeds[chunk, -length:] = to_float16(embeds, "T5")
    return prompt_embeds, np.concatenate(pooled_prompt_embeds)


def write_embeddings(path: Path, captions: dict[str, list[str]], embeds: tuple[np.ndarray, ...], about: dict) -> None:
    """One row and row group per prompt.

    captions: the hashes of the images that each prompt captions; embeds: prompt_embeds (N, L, D) and pooled (N, P).
    """
    prompt_embeds, pooled_prompt_embeds = map(pa.FixedShapeTensorArray.from_numpy_ndarray, embeds)
    columns = {
        "prompt": list(captions),
        "image_hashes": pa.array(captions.values(), pa.list_(pa.string())),
        "prompt_embeds": prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
    }
    table = pa.table(columns, metadata={"sd3_embeddings": json.dumps(about)})
    with open(path, "wb") as file:
        pq.write_table(table, file, row_group_size=1)
        os.fsync(file.fileno())


def read_captions(folder: Path, images: list[Path], problems: list[str]) -> dict[Path, str]:
    """Captions of images that have their own: NAME.txt or NAME.caption, or a row of a metadata file.

    What is not used is named, for whoever wonders where an image or a caption went.
    """
    captions: dict[Path, str] = {}
    images_of: dict[str, list[Path]] = defaultdict(list)  # by stem
    for image in images:
        images_of[image.stem].append(image)
    known = {*images, *(folder / f"{stem}.mask.png" for stem in images_of)}
    files = sorted(folder.glob("[!.]*"), key=lambda path: path.name not in METADATA)
    for path in [*files, *folder.parent.glob("metadata.*")]:
        rows, found = [], {}
        try:
            if path.name in METADATA and path.parent == folder:
                rows = [(row["file_name"], row["text"]) for row in METADATA[path.name](path)]
            elif path.suffix.lower() in (".txt", ".caption") and path.stem in images_of:
                rows = [(image.name, path.read_text("utf-8-sig")) for image in images_of[path.stem]]
            elif path not in known and not path.is_dir():
                print(f"note: skipped {path}: {NOT_USED}")
        except Exception as error:  # of pandas, Arrow or the file system
            problems.append(f"{path} cannot be read: {error!r}. Captions are UTF-8; tables have file_name and text.")
        for name, text in rows:
            image = folder / str(name)
            if image in found:
                problems.append(f"{path} has two rows for {image}. Leave one of them.")
            elif image not in known or image.stem.endswith(".mask"):
                problems.append(f"{path} has a caption of {name}; only images directly in {folder} are read.")
            elif not isinstance(text, str | int | float) or text != text or not str(text).strip():
                problems.append(f"{path}: the caption of {name} is {text!r}. Write one, or remove it.")
            else:
                found[image] = " ".join(str(text).split())
        captions |= found
    return captions


def caption_images(args: Namespace) -> dict[str, list[str]]:
    """Every distinct prompt, with the hashes of the images that it captions; exits with all that is wrong.

    Every image is decoded once: mending a truncated one later would change its hash, and cost the embeddings again.
    """
    folder, problems = args.local_data_dir, []
    images = find_images(folder)
    if not images:
        problems.append(f"--local_data_dir {folder} has no images ({', '.join(FORMATS)}).")
    own = read_captions(folder, images, problems)
    caption_of = dict.fromkeys(images, args.prompt) | own
    prompts = [args.prompt, args.class_prompt, *args.validation_prompt, args.negative_prompt]
    captions: dict[str, list[str]] = {prompt: [] for prompt in prompts if prompt is not None}
    first_of: dict[str, Path] = {}  # by hash
    for path in tqdm(images, desc="Reading images", unit="image", leave=False):
        try:
            with open_image(path) as image:
                image.load()
            sha256 = sha256_of(path)
        except Exception as error:  # Pillow has no class for what makes a file unreadable
            problems.append(f"{path} is not a readable image ({error}). Repair it or take it out of the folder.")
            continue
        first = first_of.setdefault(sha256, path)
        if first == path:
            captions.setdefault(caption_of[path], []).append(sha256)
        elif caption_of[first] != caption_of[path]:
            problems.append(f"{first} and {path} are the same image with different captions. Remove one of them.")
    captions[""] = captions.pop("", [])  # the last row
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{len(images)} images in {folder}, {len(own)} with their own captions; {len(captions)} distinct prompts")
    return captions


def compute(args: Namespace) -> None:
    """Everything from the images to the file."""
    started, path = time.monotonic(), args.output_path
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    captions = caption_images(args)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path.is_file() and path.open("rb").read(4) == b"PAR1"):
        raise SystemExit(f"--output_path {path} exists and is no Parquet file.")
    about = {
        "format_version": 1,
        "model": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "prompt": args.prompt,
        "max_sequence_length": args.max_sequence_length,
        "t5": args.t5_precision,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "bitsandbytes")},
    }
    with tempfile.TemporaryDirectory(prefix=".embeddings-", dir=path.parent) as scratch:
        embeds = encode_prompts(args, list(captions), Path(scratch))
        table = Path(scratch, "table.parquet")
        write_embeddings(table, captions, embeds, about)
        os.replace(table, path)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, {peak_memory()}, {time.monotonic() - started:.0f} s")


def main(args: Namespace) -> None:
    for number in signal.valid_signals() & {1, 15}:  # SIGHUP, which Windows has not, and SIGTERM
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    try:
        compute(args)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; nothing was written.") from None
    except torch.OutOfMemoryError as error:
        cure = "T5 in 8 bit takes 7.4 GiB; --t5_precision exact takes 1.7."
        raise SystemExit(f"Out of GPU memory, {peak_memory()}. {cure}") from error
    except OSError as error:  # a full disk, a folder that may not be read or written
        places = f"--local_data_dir {args.local_data_dir} or --output_path {args.output_path}"
        raise SystemExit(f"{places} cannot be read or written: {error}.") from error


if __name__ == "__main__":
    main(parse_args())
