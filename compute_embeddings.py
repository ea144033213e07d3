"""Compute the prompt embeddings that train_dreambooth_sd3_lora_miniature.py trains on, once, into one Parquet file.

    python compute_embeddings.py --prompt "a photo of sks dog" --local_data_dir dog

Stable Diffusion 3 reads a prompt with three text encoders: the two CLIPs run first, then T5, and each is gone before
the next one comes. Peak on a GPU: 7.4 GiB with T5 in 8 bits, 1.7 GiB with --t5_precision exact (counted by
tests/tools/step_cost.py). The file has one row per distinct prompt, and one for the empty prompt.

A map of this file, from top to bottom. The job ends where the flags begin; the rest deals with user input:

    Main              the order in which everything happens
    Text encoders     both CLIPs, then T5, into fp16 embeddings
    Captions          which prompt belongs to which image
    The Parquet file  how it is written, whole or not at all
    The model         where its files are, and whether they are whole
    Flags             every command-line flag, declared once, in the dataclass Args
    Images            what counts as a photo, and how one is opened
    Output, errors    streams that printing never fails for, and words for what went wrong
"""

from __future__ import annotations

import argparse
import difflib
import errno
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

# Both would end an import below with a traceback of a library.
if sys.flags.optimize > 1:
    raise SystemExit("python -OO and PYTHONOPTIMIZE=2 strip the docstrings that transformers reads. Use python -O.")
if not isinstance(logging.getLevelName(os.environ.get("ACCELERATE_LOG_LEVEL", "INFO").upper()), int):
    raise SystemExit(
        f"ACCELERATE_LOG_LEVEL={os.environ['ACCELERATE_LOG_LEVEL']} is not a log level such as INFO or ERROR."
    )

# Read when torch is imported; a setting of the user's stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait slow a busy machine down

try:
    import diffusers  # this and transformers load their parts on first use, so --help answers soon
except ModuleNotFoundError as error:
    raise SystemExit(
        f"The package {error.name} is missing. Activate the environment into which you installed requirements.txt; if "
        "there is none, run: pip install -r requirements.txt"
    ) from error
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from packaging.version import Version
from PIL import Image, PngImagePlugin
from torch import Tensor
from tqdm import tqdm

OTHER_SCRIPT = "train_dreambooth_sd3_lora_miniature.py"


# ---------------------------------------------------------------------------------------------------------------- main
# Everything that can be wrong is found before the first text encoder is loaded. The Parquet file appears under its
# name when it is complete; an interrupted run leaves the older file as it was.


def main(args: Args) -> None:
    """Compute the embeddings, and end with one message on what can go wrong in between."""
    end_on_signals()
    try:
        with redirect_stdout(ForgivingStream(sys.stdout)), redirect_stderr(ForgivingStream(sys.stderr, has_bars=True)):
            compute(args)
        return
    except KeyboardInterrupt:
        message = "Interrupted; nothing was written."
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = (
            f"Out of GPU memory, {peak_memory()}. T5 in 8 bits takes 7.4 GiB; --t5_precision exact takes 1.7 GiB."
        )
    except OSError as error:  # a full disk, a folder that may not be read or written
        places = f"--local_data_dir {args.local_data_dir} or --output_path {args.output_path}"
        message = f"{places} cannot be read or written: {error}."
    raise SystemExit(message.translate(CONTROLS))


def compute(args: Args) -> None:
    """Compute the embeddings: everything from the images to the file."""
    started = time.monotonic()
    silence_libraries()

    # Whatever can be wrong is found now: a text encoder takes minutes.
    captions = caption_images(args)
    digest = digest_of_captions(args.local_data_dir)  # now: a download can take an hour, in which captions change
    path = args.output_path
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    note_old_torchao()
    model = find_model(args)

    about = {
        "format_version": 2,
        "model": args.pretrained_model_name_or_path,
        "revision": model.commit or args.revision,
        "prompt": args.prompt,
        "max_sequence_length": args.max_sequence_length,
        "t5": args.t5_precision,
        "captions": digest,
        "rare_word": find_rare_word(args.prompt, model),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "bitsandbytes")},
    }
    with scratch_folder(path.parent) as scratch:
        prompt_embeds, pooled_prompt_embeds = encode_prompts(args, model, list(captions), scratch)
        table = scratch / "table.parquet"
        write_embeddings(table, captions, prompt_embeds, pooled_prompt_embeds, about)
        del prompt_embeds  # it maps a file in the scratch folder, which Windows could not remove
        move_file(table, path)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB, {peak_memory()}, {time.monotonic() - started:.0f} s")


# ------------------------------------------------------------------------------------------------------- text encoders
# Both CLIPs together (1.6 GiB in fp16), for all prompts; then T5 alone, for all prompts, in 8 bits or streamed from
# disk one block at a time. What they give goes into a file on disk, since ten thousand captions would not fit in RAM.

CHUNK_TOKENS = 16 * 77  # T5 tokens per pass: more prompts share one reading of a streamed T5, but need more memory


@torch.inference_mode()
def encode_prompts(args: Args, model: LocalModel, prompts: list[str], scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return what the pipeline's encode_prompt gives, in fp16: (N, CLIP tokens + T5 tokens, D) and (N, P)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = CHUNK_TOKENS // max(77, args.max_sequence_length)
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    prompt_embeds, pooled_prompt_embeds = encode_with_clip(args, model, chunks, device, scratch / "prompt_embeds")
    diffusers.training_utils.free_memory()  # both CLIPs
    if args.t5_precision != "none":
        encode_with_t5(args, model, chunks, device, prompt_embeds, scratch)
    return prompt_embeds, pooled_prompt_embeds


def encode_with_clip(
    args: Args, model: LocalModel, chunks: list[list[str]], device: torch.device, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return prompt_embeds with zeros in T5's place, (N, CLIP tokens + T5 tokens, D), and the pooled ones, (N, P).

    The first array lives in a file: 1.2 MB per prompt would not fit in RAM for ten thousand captions.
    """
    pipeline = load_clip(model, device)
    note_unseen_text(pipeline.tokenizer, sum(chunks, []), pipeline.tokenizer.model_max_length, "CLIP")
    pooled_prompt_embeds = []
    with open(path, "wb") as file:  # written, not mapped: on a full disk, writing to a mapped page is a crash
        for chunk in tqdm(chunks, desc="Encoding with CLIP", unit="chunk", disable=None):
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
    args: Args,
    model: LocalModel,
    chunks: list[list[str]],
    device: torch.device,
    prompt_embeds: np.ndarray,
    scratch: Path,
) -> None:
    """Write T5's part into prompt_embeds, (N, CLIP tokens + T5 tokens, D), in place."""
    length = args.max_sequence_length
    tokenizer = load_tokenizer(transformers.T5TokenizerFast, model, "tokenizer_3")
    note_unseen_text(tokenizer, sum(chunks, []), length, "T5")
    encoder = load_t5(model, args.t5_precision, device, scratch)
    blocks = encoder.encoder.block
    row = 0
    with tqdm(total=len(blocks) * len(chunks), desc="Encoding with T5", unit="layer", disable=None) as progress_bar:

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


def load_clip(model: LocalModel, device: torch.device) -> diffusers.StableDiffusion3Pipeline:
    """Return a pipeline of nothing but both CLIPs, in fp16 on a GPU."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32  # CPUs are slow in fp16
    load = transformers.CLIPTextModelWithProjection.from_pretrained
    with loading(model, "transformer"), torch.device("meta"):  # encode_prompt asks the transformer for its width
        config = diffusers.SD3Transformer2DModel.load_config(model.folder, subfolder="transformer")
        transformer = diffusers.SD3Transformer2DModel.from_config(config)
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=None,
        vae=None,
        text_encoder=load_part(load, model, "text_encoder", dtype=dtype).to(device),
        tokenizer=load_tokenizer(transformers.CLIPTokenizer, model, "tokenizer"),
        text_encoder_2=load_part(load, model, "text_encoder_2", dtype=dtype).to(device),
        tokenizer_2=load_tokenizer(transformers.CLIPTokenizer, model, "tokenizer_2"),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load_t5(model: LocalModel, precision: str, device: torch.device, scratch: Path) -> transformers.T5EncoderModel:
    """Load T5 in 8 bits, or in fp32 with its blocks left on disk, from where accelerate reads them one at a time.

    transformers keeps `wo`, which overflows in fp16, in fp32. Streaming would lose that rule, so a streamed T5 is
    computed in fp32 altogether.
    """
    kwargs: dict[str, Any] = {}
    if precision == "int8":
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        kwargs["dtype"] = torch.float16
        kwargs["device_map"] = device
    else:
        kwargs["dtype"] = torch.float32
        kwargs["offload_folder"] = scratch
        kwargs["device_map"] = {
            "shared": device.type,
            "encoder.embed_tokens": device.type,
            "encoder.final_layer_norm": device.type,
            "encoder.block": "disk",
        }
    return load_part(transformers.T5EncoderModel.from_pretrained, model, "text_encoder_3", **kwargs)


def find_model(args: Args) -> LocalModel:
    """Find the model and check its text encoders and tokenizers, before the first one takes its time."""
    encoders = {
        "text_encoder": transformers.CLIPTextModelWithProjection,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "text_encoder_3": transformers.T5EncoderModel,
    }
    tokenizers = {
        "tokenizer": transformers.CLIPTokenizer,
        "tokenizer_2": transformers.CLIPTokenizer,
        "tokenizer_3": transformers.T5TokenizerFast,
    }
    if args.t5_precision == "none":
        del encoders["text_encoder_3"], tokenizers["tokenizer_3"]
    parts = dict.fromkeys(encoders, "model") | dict.fromkeys(tokenizers, "")
    parts["transformer"] = ""
    try:
        model = resolve_model(args, parts, token=None)
        for part, model_class in encoders.items():
            load_part(model_class.from_pretrained, model, part, device_map="meta")
        for part, tokenizer_class in tokenizers.items():
            load_tokenizer(tokenizer_class, model, part)
    except UserError as error:
        is_about_t5 = any(part in str(error) for part in ("text_encoder_3", "tokenizer_3"))
        advice = "\nWithout T5, run with --t5_precision none." if is_about_t5 else ""
        raise UserError(f"{error}{advice}") from error
    return model


def load_tokenizer(load: Any, model: LocalModel, part: str) -> Any:
    """Load a tokenizer; raise UserError if its files are missing, for which transformers gives one without words."""
    with loading(model, part):
        tokenizer = load.from_pretrained(model.folder, subfolder=part)
        if tokenizer.model_max_length > 10**6:  # transformers' value for an unknown length
            raise ValueError("its files are missing")
    return tokenizer


def find_rare_word(prompt: str, model: LocalModel) -> str:
    """Return the word of the prompt that CLIP has seen least, in lowercase; "" without a prompt.

    Its vocabulary is ordered by how often a piece of text was seen: dog is number 1,929 of it, sks 48,136.
    """
    tokenizer = load_tokenizer(transformers.CLIPTokenizer, model, "tokenizer")
    rarest = ""
    highest = -1
    for word in re.findall(r"\w+", prompt.lower()):
        rank = max(tokenizer(word, add_special_tokens=False).input_ids)
        if rank > highest:
            rarest = word
            highest = rank
    return rarest


def note_unseen_text(tokenizer: Any, prompts: list[str], max_length: int, name: str) -> None:
    """Note how many prompts are too long for an encoder, and words that it does not know, each with an example."""
    room = max_length - tokenizer.num_special_tokens_to_add()
    cut = []
    unknown = []
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if len(ids) > room:
            cut.append(f"of {prompt[:60]!r}... it does not see {tokenizer.decode(ids[room:])[:60]!r}")
        for word in prompt.split():
            # CLIP has bytes for all that is written; its unknown token is also that of the end.
            if name == "T5" and tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids:
                unknown.append(word)
    if cut:
        print(f"note: {name} reads {max_length} tokens; {len(cut)} of {len(prompts)} prompts are longer: {cut[0]}")
    if unknown:
        words = ", ".join(repr(word) for word in dict.fromkeys(unknown[:5]))
        print(f"note: {name} does not know all of these words, so it does not see them as they are: {words}")


def to_float16(embeds: Tensor, name: str) -> np.ndarray:
    """Return the same numbers in fp16; exit if one of them overflows."""
    embeds = embeds.half()
    if not embeds.isfinite().all():
        raise UserError(f"{name} gave values that fp16 cannot hold. With T5 in 8 bits, try --t5_precision exact.")
    return embeds.cpu().numpy()


# ------------------------------------------------------------------------------------------------------------ captions
# Which prompt belongs to which image. Everything that is wrong with the folder is collected and reported at once.

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as datasets' ImageFolder reads them
CAPTION_SUFFIXES = (".txt", ".caption")  # of the files beside their images


def caption_images(args: Args) -> dict[str, list[str]]:
    """Return each distinct prompt with the hashes of the images that it captions; exit if anything is wrong.

    The first prompt is --prompt, the last one is the empty prompt.
    """
    folder = args.local_data_dir
    problems: list[str] = []
    images = find_images(folder)
    if not images:
        problems.append(f"--local_data_dir {why_no_images(folder)}")
    own_captions = read_captions(folder, images, problems)
    caption_of = {}
    for image in images:
        caption_of[image] = own_captions.get(image, args.prompt)
    hashes_of = hash_images(images, caption_of, problems)
    if problems:
        raise UserError("\n".join(problems))
    captions: dict[str, list[str]] = {}
    for prompt in (args.prompt, args.class_prompt, *args.validation_prompt, args.negative_prompt, *hashes_of):
        if prompt:
            captions[prompt] = hashes_of.get(prompt, [])
    captions[""] = hashes_of.get("", [])
    count = f"{len(images)} images in {folder}, {len(own_captions)} with a caption of their own"
    print(f"{count}; {len(captions)} distinct prompts")
    return captions


def hash_images(images: list[Path], caption_of: dict[Path, str], problems: list[str]) -> dict[str, list[str]]:
    """Return each caption with the hashes of its images; what is wrong with an image is added to the problems.

    Each image is decoded once, to find a broken one now: repairing it later would change its hash, and cost the
    embeddings again.
    """
    hashes_of: dict[str, list[str]] = {}
    first_of: dict[str, Path] = {}  # by hash
    repeated = []
    animated = []
    for path in tqdm(images, desc="Reading images", unit="image", leave=False, disable=None):
        try:
            with opened_photo(path) as image:
                if getattr(image, "n_frames", 1) > 1:
                    animated.append(path)
                image.load()
            sha256 = sha256_of(path)
        except UserError as error:
            problems.append(str(error))
            continue
        first = first_of.setdefault(sha256, path)
        if first == path:
            hashes_of.setdefault(caption_of[path], []).append(sha256)
        elif caption_of[first] != caption_of[path]:
            problems.append(f"{first} and {path} are the same image with different captions. Remove one of them.")
        else:
            repeated.append(f"{path} is {first.name}")
    if animated:
        print(f"note: images of several frames, of which the first is used: {len(animated)} (first: {animated[0]})")
    if repeated:
        print(f"note: duplicate images count once per copy: {len(repeated)} (first: {repeated[0]})")
    return hashes_of


def read_captions(folder: Path, images: list[Path], problems: list[str]) -> dict[Path, str]:
    """Return the captions of images that have their own; what is wrong with one is added to the problems.

    A sidecar NAME.txt or NAME.caption wins over a row of metadata.csv, metadata.jsonl or metadata.parquet.
    """
    files = files_by_name(sorted(folder.glob("[!.]*")))
    captions: dict[Path, str] = {}
    used = set(images)
    for name in METADATA_NAMES:
        if name in files:
            captions |= read_metadata(files[name], images, problems)
            used.add(files[name])
    for image in images:
        paths = sidecars_of(image, files)
        texts = []
        for path in paths:
            used.add(path)
            try:
                with reading(path, "Write a caption into it, or remove it."):
                    texts.append(clean_caption(path.read_text("utf-8-sig")))
            except UserError as error:
                problems.append(str(error))
        if len(set(texts)) > 1:
            problems.append(f"{image.name} has two captions, {paths[0]} and {paths[1]}. Remove one of them.")
        if texts:
            captions[image] = texts[0]
    if images:
        note_skipped(folder, used)
    return captions


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


def clean_caption(text: Any) -> str:
    """Return a caption in one line; raise ValueError if it is none."""
    is_nan = pd.api.types.is_scalar(text) and pd.isna(text)  # of an empty cell
    if isinstance(text, bool) or not isinstance(text, str | int | float) or is_nan:
        raise ValueError("a caption is missing" if is_nan else f"a caption is {text!r}, which is not text")
    caption = " ".join(str(text).split())
    caption.encode()  # a ValueError: JSON can hold one half of an emoji
    if "\0" in caption:
        raise ValueError("a caption contains zero bytes, as UTF-16 does; save it as UTF-8")
    if all(unicodedata.category(character)[0] in "CZ" for character in caption):  # controls, joiners and spaces
        raise ValueError("a caption is empty")
    return caption


def digest_of_captions(folder: Path) -> str:
    """Return a digest of the files with captions of the images in a folder, by their names and bytes."""
    files = files_by_name(sorted(folder.glob("[!.]*")))
    paths = {files[name] for name in METADATA_NAMES if name in files}
    for image in find_images(folder):
        paths.update(sidecars_of(image, files))
    entries = sorted([comparable(path.name), sha256_of(path)] for path in paths)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def read_table(path: Path) -> pd.DataFrame:
    """Return the columns file_name and text of a metadata file, as they are written.

    Every row must have as many fields as the header: an unquoted comma in a caption would be its end.
    """
    columns = ["file_name", "text"]
    if path.suffix.lower() == ".parquet":
        return pd.read_parquet(path, columns=columns, dtype_backend="pyarrow")
    if path.suffix.lower() == ".jsonl":  # pandas' own reader would make 7.0 of 7 and drop half an emoji
        lines = path.read_text("utf-8-sig").split("\n")
        table = pd.DataFrame([json.loads(line) for line in lines if line.strip()], dtype=object)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a row with more fields than the header
            table = pd.read_csv(
                path, dtype=str, index_col=False, keep_default_na=False, encoding="utf-8-sig", engine="python"
            )  # pandas' other engine would take text after a closing quote, and a row that ends early
    if not set(columns) <= set(table.columns):
        raise ValueError(f"its columns are {', '.join(map(str, table.columns))}")
    return table[columns]


def read_metadata(path: Path, images: list[Path], problems: list[str]) -> dict[Path, str]:
    """Return the captions of images in a metadata file; what is wrong with it is added to the problems."""
    captions: dict[Path, str] = {}
    files = files_by_name(images)
    fix = (
        "Tables have columns file_name and text, separated by commas, in UTF-8; a caption that contains a comma needs "
        "quotes. In Excel, save as CSV UTF-8."
    )
    try:
        with reading(path, fix):
            table = read_table(path)
    except UserError as error:
        problems.append(str(error))
        return captions
    for row, (name, text) in enumerate(table.itertuples(index=False), start=2):  # a spreadsheet's header is row 1
        relative = os.path.normpath(str(name).replace("\\", "/"))  # as Windows writes it
        image = files.get(relative) or files.get(comparable(relative))
        try:
            if image is None:
                raise ValueError(f"there is no image {name} in {path.parent}")
            if image in captions:
                raise ValueError(f"{image} has a row already")
            captions[image] = clean_caption(text)
        except ValueError as error:
            problems.append(f"{path}, row {row} ({name}): {error}.")
    return captions


def note_skipped(folder: Path, used: set[Path]) -> None:
    """Note what is in or beside the folder and is not used, for whoever wonders where an image or a caption went."""
    stems = {comparable(path.stem) for path in find_images(folder)}
    skipped = []
    for path in sorted(folder.glob("[!.]*")):
        is_of_use = path in used or is_mask(path, stems) or path.name.lower() in LEFT_BY_WINDOWS
        if not is_of_use and (not path.is_dir() or find_images(path)):
            skipped.append(path)
    for path in folder.parent.glob("metadata.*"):  # a common mistake: beside the folder instead of inside it
        if path.resolve().parent != folder.resolve():  # it is inside if the folder is "."
            skipped.append(path)
    question = ""
    for path in skipped:
        stem = Path(path.stem).stem
        if path.suffix in CAPTION_SUFFIXES and comparable(stem) in stems:  # Windows hides the last suffix
            question = f"; did you mean {stem}{path.suffix} instead of {path.name}?"
    if skipped:
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        print(
            f"note: skipped {skipped[0]}{more}: used are images directly in {folder} ({' '.join(PHOTO_SUFFIXES)}), "
            f"masks (NAME{', NAME'.join(MASK_ENDINGS)}) and captions of them (NAME{', NAME'.join(CAPTION_SUFFIXES)}), "
            f"and {', '.join(METADATA_NAMES)}{question}"
        )


LEFT_BY_WINDOWS = ("thumbs.db", "desktop.ini")


# ---------------------------------------------------------------------------------------------------- the Parquet file


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
    text = json.dumps(about)
    checksum = hashlib.sha256(text.encode()).hexdigest()  # Parquet has none for its metadata
    table = pa.table(columns, metadata={"sd3_embeddings": text, "sha256": checksum})
    with open(path, "wb") as file:
        pq.write_table(table, file, row_group_size=1, write_page_checksum=True)  # a flipped bit is an error then
        flush_to_disk(file)


def check_output(path: Path) -> None:
    """Raise UserError if a file would be replaced that this program did not write, such as a metadata.parquet."""
    if not path.exists():
        return
    advice = f"--output_path {path} would replace it: name another file, or remove this one."
    with reading(path, advice):
        metadata = pq.read_schema(path).metadata or {}
        if b"sd3_embeddings" not in metadata:
            raise ValueError("it is not a file of this program")


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder for what does not fit in RAM, beside the output since /tmp is often small; it is removed again.

    So are those of runs that were killed: a run holds a lock in its folder for as long as it lives.
    """
    for folder in parent.glob(".embeddings-*"):
        with suppress(OSError, NotImplementedError):  # it is in use, or nobody can tell
            with FileLock(folder / "lock", timeout=0):
                pass
            shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(prefix=".embeddings-", dir=parent, ignore_cleanup_errors=True) as scratch:
        lock = FileLock(Path(scratch, "lock"), timeout=0)
        with suppress(OSError, NotImplementedError):  # not every file system has locks
            lock.acquire()
        try:
            yield Path(scratch)
        finally:
            lock.release()


def flush_to_disk(file: Any) -> None:
    """Wait until an open file is on disk, if its file system can do that; some shares and FUSE mounts cannot."""
    cannot = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF)
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in cannot:  # the disk is full, or broken
            raise OSError(error.errno, error.strerror, str(file.name)) from error


def move_file(source: Path, target: Path) -> None:
    """Replace a file, retrying for up to 2 s: Windows refuses while a virus scanner or a viewer has it open."""
    for _ in range(20):
        with suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(0.1)
    os.replace(source, target)


# ----------------------------------------------------------------------------------------------------------- the model


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


# --------------------------------------------------------------------------------------------------------------- flags
# Each flag is declared once, as a field of Args; the parser and the checks of limits are derived from it. Whatever the
# trainer needs, too, stands there word for word, since each script works alone: change both; a test compares them.

FLAG_DETAILS: dict[str, Any] = {  # what a flag can say about itself, and what holds if it says nothing
    "minimum": None,  # lowest value of a number; None: 1 for integers, 1e-30 for real numbers
    "maximum": None,  # highest value of a number; None: 10 million for integers, 1e30 for real numbers
    "choices": None,
    "metavar": None,  # what --help shows in place of a value
    "const": None,  # the value if the flag is given without one
    "parse": None,  # converts the text from the command line; None: the field's type does
    "aliases": (),  # its names in the other script, which are easily mixed up
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
        "prompts", "a photo of sks dog", "instance prompt, for every image without a caption of its own",
        metavar="PROMPT", aliases=("instance_prompt",))
    class_prompt: str | None = flag(
        "prompts", None, 'prompt of prior preservation, such as "a photo of a dog"', metavar="PROMPT")
    validation_prompt: tuple[str, ...] = flag("prompts", (), "prompts of previews", metavar="PROMPT")
    negative_prompt: str = flag(
        "prompts", "", "negative prompt of the previews; the empty prompt is always included", metavar="PROMPT")
    max_sequence_length: int = flag("prompts", 77, "number of T5 tokens per prompt, at most 512", maximum=512)

    # files
    local_data_dir: Path = flag(
        "files", Path("dog"), "folder with the images of the subject", metavar="DIR", aliases=("instance_data_dir",))
    output_path: Path = flag(
        "files", Path("sample_embeddings.parquet"), "file to write", metavar="FILE", aliases=("data_df_path",))
# fmt: on


def parse_args(argv: list[str] | None = None) -> Args:
    """Parse the command line; a mistake ends the program in one message."""
    parser = Parser(Args, str(__doc__))
    help_text = "the same as --t5_precision none"
    parser.add_argument("--no_t5", action="store_const", dest="t5_precision", const="none", help=help_text)
    args = Args(**parser.parse_values(argv))
    problems = flag_problems(args)
    if len(args.validation_prompt) > 2 and " " not in "".join(args.validation_prompt):
        problems.append('--validation_prompt: prompts of several words need quotes, such as "a photo of sks dog"')
    if problems:
        parser.error("\n  ".join(problems))
    return args


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


# -------------------------------------------------------------------------------------------------------------- images

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


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex: the embeddings name an image by it."""
    with reading(path, ""):
        return hashlib.sha256(path.read_bytes()).hexdigest()


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


# ------------------------------------------------------------------------------------------------------ output, errors


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


def end_on_signals() -> None:
    """Let whatever asks this program to end do it as Ctrl-C does."""
    sighup = 1  # which Windows does not have
    sigbreak = getattr(signal, "SIGBREAK", signal.SIGTERM)  # Ctrl-Break, which only Windows has
    for number in signal.valid_signals() & {sighup, sigbreak, signal.SIGTERM}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)


def silence_libraries() -> None:
    """Leave the output to this program: what goes wrong is an error here, and there is one bar at a time."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # redrawn for every weight
    diffusers.utils.logging.set_verbosity_error()
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # transformers 5.0 loads all of T5 while it quantizes


def note_old_torchao() -> None:
    """Note a torchao that peft, which only the trainer needs, refuses: Colab and Kaggle come with one."""
    with suppress(PackageNotFoundError):
        installed = version("torchao")
        if Version(installed) < Version("0.16"):
            print(f"note: the training will not start beside torchao {installed}. Run: pip uninstall -y torchao")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: the Hub's own words, where there are some."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8; save it as UTF-8"
    message = (getattr(error, "server_message", None) or str(error)).strip() or type(error).__name__
    return message.splitlines()[0].rstrip(".")


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


if __name__ == "__main__":
    main(parse_args())
