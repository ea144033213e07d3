"""Compute the prompt embeddings that train_dreambooth_sd3_lora_miniature.py trains on, once, into one Parquet file.

    python compute_embeddings.py --prompt "a photo of sks dog" --local_data_dir dog

Stable Diffusion 3 reads a prompt with three text encoders. They are loaded one after the other, each gone before the
next comes, so the peak is that of T5 alone. One row is written per distinct prompt, and one for the empty prompt.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

logging.disable(logging.WARNING)  # the libraries have much to say at start-up; their errors still come through
import bitsandbytes
import diffusers
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import free_memory
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerBase
from transformers import T5Config, T5EncoderModel, T5TokenizerFast
from transformers.utils import ModelOutput

try:
    import resource
except ImportError:  # Windows
    resource = None


CHUNK_SIZE = 16  # prompts per pass of an encoder
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
if importlib.util.find_spec("pillow_heif"):  # for the pictures of phones
    importlib.import_module("pillow_heif").register_heif_opener()
    IMAGE_SUFFIXES |= {".heic", ".heif"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # captions, as datasets' ImageFolder reads them


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write SD3's embeddings of a few prompts, and which pictures they caption, to a Parquet file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model")
    model.add_argument("--pretrained_model_name_or_path", default="stabilityai/stable-diffusion-3-medium-diffusers",
                       help="a Hub repository or a folder in diffusers' layout; SD3 or SD3.5")
    model.add_argument("--revision", help="branch, tag or commit of the Hub repository; unset: its main branch")
    model.add_argument("--variant", help="variant of the weight files, such as fp16; unset: the plain files")
    model.add_argument("--cache_dir", help="where downloads are kept; unset: the Hugging Face cache")
    model.add_argument("--t5_precision", choices=["int8", "exact"], default="int8",
                       help="int8: LLM.int8(); exact: fp32, streamed from disk block by block, least memory")
    model.add_argument("--no_t5", action="store_true", help="zeros for T5, as SD3 accepts; saves a 9.5 GB download")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", default="a photo of sks dog",
                         help="the instance prompt, for every picture without a caption of its own")
    prompts.add_argument("--class_prompt", help="the prompt of prior preservation, such as 'a photo of a dog'")
    prompts.add_argument("--validation_prompt", nargs="+", default=[], metavar="PROMPT", help="prompts for previews")
    prompts.add_argument("--negative_prompt", help="what previews are guided away from; '' is always there")
    prompts.add_argument("--max_sequence_length", type=int, default=77, help="T5 tokens per prompt, at most 512")
    files = parser.add_argument_group("files")
    files.add_argument("--local_data_dir", type=Path, default=Path("dog"), help="folder of the instance pictures")
    files.add_argument("--output_path", type=Path, default=Path("sample_embeddings.parquet"), help="file to write")
    args = parser.parse_args(argv)
    if not 1 <= args.max_sequence_length <= 512:
        parser.error(f"--max_sequence_length {args.max_sequence_length}: T5 takes 1 to 512 tokens")
    if len(args.validation_prompt) > 2 and " " not in "".join(args.validation_prompt):
        parser.error("--validation_prompt: prompts of several words need quotes, such as 'a photo of sks dog'")
    return args


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


def peak_memory() -> str:
    """Peak VRAM and RAM of this process so far; RAM counts mapped files, such as weights, too."""
    vram = f"peak VRAM {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB, " if torch.cuda.is_available() else ""
    if resource is None:
        return f"{vram}peak RAM {psutil.Process().memory_info().peak_wset / 2**30:.2f} GiB"
    return f"{vram}peak RAM {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"


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


def load_tokenizer(load: type, args: argparse.Namespace, subfolder: str) -> PreTrainedTokenizerBase:
    """A tokenizer; where there is none, transformers gives an empty one that knows no word and no length."""
    tokenizer = load_part(load.from_pretrained, args, subfolder)
    if tokenizer.model_max_length > 10**6:
        raise SystemExit(f"Cannot load {subfolder} of {args.pretrained_model_name_or_path}: its files are missing.")
    return tokenizer


def load_t5(args: argparse.Namespace, device: torch.device, offload_folder: Path) -> T5EncoderModel:
    """T5 in 8 bit, or in fp32 with its blocks left on disk, for accelerate to fetch one at a time.

    What is streamed is computed in fp32, since streaming loses transformers' rule that keeps `wo`, which overflows in
    fp16, in fp32. In 8 bit `wo` stays in fp32 by that rule.
    """
    if args.t5_precision == "int8":
        dtype = torch.float16 if device.type == "cuda" else torch.float32  # CPUs are slow in fp16
        quantization = BitsAndBytesConfig(load_in_8bit=True)
        how = {"quantization_config": quantization, "device_map": {"": device}, "dtype": dtype}
    else:
        layers = load_part(T5Config.from_pretrained, args, "text_encoder_3").num_layers
        resident = dict.fromkeys(["shared", "encoder.embed_tokens", "encoder.final_layer_norm"], device.type)
        streamed = dict.fromkeys([f"encoder.block.{i}" for i in range(layers)], "disk")
        how = {"device_map": resident | streamed, "offload_folder": offload_folder, "dtype": torch.float32}
    how |= {"variant": args.variant, "use_safetensors": True}  # other files could run code
    return load_part(T5EncoderModel.from_pretrained, args, "text_encoder_3", **how)


def report_cut(tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int, name: str) -> None:
    """Say which end of which prompt an encoder will not see."""
    room = max_length - tokenizer.num_special_tokens_to_add()
    for prompt in prompts:
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        if len(ids) > room:
            unseen = tokenizer.decode(ids[room:])
            print(f"note: {name} reads {max_length} tokens; of {prompt!r} it does not see {unseen!r}")


def encode(
    encoder: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_length: int, name: str, **kwargs
) -> Iterator[tuple[slice, ModelOutput]]:
    """Yield an encoder's outputs for chunks of the prompts: which prompts, and states of (n, max_length, width)."""
    report_cut(tokenizer, prompts, max_length, name)
    chunks = [slice(start, start + CHUNK_SIZE) for start in range(0, len(prompts), CHUNK_SIZE)]
    layers = next(module for module in encoder.modules() if isinstance(module, nn.ModuleList))
    with tqdm(total=len(layers) * len(chunks), desc=f"Encoding with {name}", unit="layer") as progress_bar:

        def count(*_: object) -> None:
            progress_bar.update()

        for layer in layers:  # one pass of a streamed T5 can take a minute, so the bar counts layers
            layer.register_forward_hook(count)
        for chunk in chunks:
            padding = {"padding": "max_length", "max_length": max_length, "truncation": True, "return_tensors": "pt"}
            input_ids = tokenizer(prompts[chunk], **padding).input_ids  # (n, max_length)
            yield chunk, encoder(input_ids.to(encoder.device), **kwargs)


def to_float16(embeds: Tensor, name: str) -> np.ndarray:
    """The same numbers in fp16; an error if one of them is not finite there."""
    if not (embeds.abs() <= torch.finfo(torch.float16).max).all():
        raise SystemExit(f"{name} gave values that fp16 cannot hold. With T5 in 8 bit, try --t5_precision exact.")
    return embeds.to(torch.float16).cpu().numpy()


@torch.inference_mode()
def encode_prompts(args: argparse.Namespace, prompts: list[str], scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """What StableDiffusion3Pipeline.encode_prompt gives, in fp16: (N, CLIP tokens + T5 tokens, D) and (N, P).

    The first lives in a file under `scratch`: 1.2 MB a prompt would not fit into RAM for ten thousand captions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_part(SD3Transformer2DModel.load_config, args, "transformer")
    clip_tokens = load_tokenizer(CLIPTokenizer, args, "tokenizer").model_max_length
    shape = (len(prompts), clip_tokens + args.max_sequence_length, config["joint_attention_dim"])
    prompt_embeds = np.memmap(scratch / "prompt_embeds", np.float16, "w+", shape=shape)  # zeros where nobody writes
    pooled_prompt_embeds = np.zeros((len(prompts), config["pooled_projection_dim"]), np.float16)
    left = 0
    for suffix, name in (("", "CLIP-L"), ("_2", "CLIP-G")):
        tokenizer = load_tokenizer(CLIPTokenizer, args, f"tokenizer{suffix}")
        kwargs = {"variant": args.variant, "dtype": torch.float32, "use_safetensors": True}  # lighter than T5 even so
        encoder = load_part(CLIPTextModelWithProjection.from_pretrained, args, f"text_encoder{suffix}", **kwargs)
        encoder.to(device)
        for chunk, output in encode(encoder, tokenizer, prompts, clip_tokens, name, output_hidden_states=True):
            hidden_states = to_float16(output.hidden_states[-2], name)  # SD3 takes the last layer but one
            right = left + hidden_states.shape[-1]
            prompt_embeds[chunk, :clip_tokens, left:right] = hidden_states
            pooled_prompt_embeds[chunk, left:right] = to_float16(output.text_embeds, name)
        left = right
        del encoder, output
        free_memory()
    if not args.no_t5:
        tokenizer = load_tokenizer(T5TokenizerFast, args, "tokenizer_3")
        encoder = load_t5(args, device, scratch)
        for chunk, output in encode(encoder, tokenizer, prompts, args.max_sequence_length, "T5"):
            prompt_embeds[chunk, clip_tokens:] = to_float16(output.last_hidden_state, "T5")
    return prompt_embeds, pooled_prompt_embeds


def write_embeddings(
    path: Path, captions: dict[str, list[str]], prompt_embeds: np.ndarray, pooled_prompt_embeds: np.ndarray,
    about: dict[str, object],
) -> None:  # fmt: skip
    """One row and row group per prompt, in a file that appears complete or not at all.

    captions: the hashes of the pictures that each prompt captions; embeddings of (N, L, D) and (N, P).
    """
    fields = [("prompt", pa.string()), ("image_hashes", pa.list_(pa.string()))]
    for name, embeds in (("prompt_embeds", prompt_embeds), ("pooled_prompt_embeds", pooled_prompt_embeds)):
        fields.append((name, pa.fixed_shape_tensor(pa.float16(), embeds.shape[1:])))
    schema = pa.schema(fields, metadata={"sd3_embeddings": json.dumps(about)})
    unfinished = path.with_name(f"{path.name}.partial")
    try:
        with open(unfinished, "wb") as file:
            with pq.ParquetWriter(file, schema) as writer:
                for i, (prompt, image_hashes) in enumerate(captions.items()):
                    tensors = [prompt_embeds[i : i + 1], pooled_prompt_embeds[i : i + 1]]
                    arrays = [pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(t)) for t in tensors]
                    writer.write_table(pa.table([[prompt], [image_hashes], *arrays], schema=schema))
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_captions(folder: Path, images: list[Path], problems: list[str]) -> dict[str, str]:
    """Captions by file name, of the pictures that have their own: NAME.txt, or a row of a metadata file."""
    captions: dict[str, str] = {}
    readers = (partial(pd.read_json, lines=True, dtype=False), partial(pd.read_csv, dtype=str), pd.read_parquet)
    for name, read in zip(METADATA, readers, strict=True):
        try:
            if (folder / name).exists():
                table = read(folder / name)
                captions |= dict(zip(table["file_name"], table["text"], strict=True))
        except (OSError, ValueError, KeyError) as error:
            reason = f"it has no column {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            problems.append(f"{folder / name} cannot be read: {reason}. It needs the columns file_name and text.")
    unknown = [name for name in captions if name not in {image.name for image in images}]
    if unknown:
        problems.append(f"{folder} has captions of {', '.join(map(str, unknown))}, but no such pictures.")
    for path in (image.with_suffix(".txt") for image in images):
        try:
            if path.exists():
                captions |= {image.name: path.read_text("utf-8-sig") for image in images if image.stem == path.stem}
        except (OSError, ValueError) as error:
            problems.append(f"{path} cannot be read: {error}. Save it as UTF-8.")
    empty = [name for name, text in captions.items() if not isinstance(text, str) or not text.strip()]
    if empty:
        problems.append(f"The captions of {', '.join(map(str, empty))} are empty. Write them or remove them.")
    return {name: " ".join(str(text).split()) for name, text in captions.items()}


def caption_images(args: argparse.Namespace) -> dict[str, list[str]]:
    """Every distinct prompt, with the hashes of the pictures that it captions."""
    folder, problems = args.local_data_dir, []
    try:
        images, passed_over = find_images(folder) if folder.is_dir() else ([], [])
        unreadable = unreadable_images(images)
        problems += unreadable.values()
        own_captions = read_captions(folder, images, problems)
        hash_of_image = {path: hash_image(path) for path in images if not unreadable}
    except OSError as error:
        raise SystemExit(f"{error.filename} cannot be read: {error.strerror}.") from error
    if passed_over:
        print(passed_over_note(passed_over))
    if not images:
        wanted = ", ".join(sorted(IMAGE_SUFFIXES))
        what = "has no pictures" if folder.is_dir() else "is not a folder"
        problems.append(f"{folder} {what}. Put {wanted} files there, or name another folder with --local_data_dir.")
    prompts = [args.prompt, args.class_prompt, *args.validation_prompt, args.negative_prompt, ""]
    captions: dict[str, list[str]] = {prompt: [] for prompt in prompts if prompt is not None}
    first_of: dict[str, tuple[Path, str]] = {}
    for path, image_hash in hash_of_image.items():
        caption = own_captions.get(path.name, args.prompt)
        first, its_caption = first_of.setdefault(image_hash, (path, caption))
        if caption != its_caption:
            problems.append(f"{first} and {path} are the same picture with different captions. Remove one of them.")
        elif first == path:
            captions.setdefault(caption, []).append(image_hash)
    if problems:
        raise SystemExit("\n".join(problems))
    own = f", {len(own_captions)} with their own captions" if own_captions else ""
    print(f"{len(images)} pictures in {folder}{own}; {len(captions)} distinct prompts")
    return captions


def main(args: argparse.Namespace) -> None:
    started = time.monotonic()
    captions = caption_images(args)
    try:
        args.output_path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_path.parent).close()
        if args.output_path.exists() and not args.output_path.open("rb").read(4) == b"PAR1":
            raise FileExistsError(None, "it exists and is no Parquet file")
    except OSError as error:
        raise SystemExit(f"--output_path {args.output_path} cannot be written: {error.strerror}.") from error
    with tempfile.TemporaryDirectory() as scratch:
        prompt_embeds, pooled_prompt_embeds = encode_prompts(args, list(captions), Path(scratch))
        libraries = (torch, diffusers, transformers, bitsandbytes)
        about = {
            "format_version": 1,
            "model": args.pretrained_model_name_or_path,
            "revision": args.revision,
            "prompt": args.prompt,
            "max_sequence_length": args.max_sequence_length,
            "t5": "none" if args.no_t5 else args.t5_precision,
            "versions": {library.__name__: library.__version__ for library in libraries},
        }
        write_embeddings(args.output_path, captions, prompt_embeds, pooled_prompt_embeds, about)
    size, images = args.output_path.stat().st_size / 1e6, sum(map(len, captions.values()))
    print(f"wrote {args.output_path}: {size:.1f} MB, {len(captions)} prompts, {images} distinct pictures")
    print(f"{peak_memory()}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; nothing was written.") from None
