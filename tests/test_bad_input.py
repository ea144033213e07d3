"""What users get wrong: one message that names the flag or file, the right exit code, and no file changed."""

import os
import re
import shlex
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import compute_embeddings as embed
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, RANK, compute
from fuzz import SCRIPTS, fuzz

Change = Callable[[Path], object]


@pytest.fixture
def project(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that both scripts need, in the current folder, to be spoilt."""
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(tiny, tmp_path / "model", copy_function=os.link)
    shutil.copy(embeddings, tmp_path / "embeddings.parquet")
    (tmp_path / "out" / "latents").mkdir(parents=True)  # as an earlier run has left them
    (tmp_path / "out" / trainer.LORA_NAME).write_text("an older LoRA")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(name: str, content: bytes | str) -> Change:
    """Not in place: the model's files are links."""

    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def cut_short(name: str) -> Change:
    return lambda folder: write(name, (folder / name).read_bytes()[: (folder / name).stat().st_size // 2])(folder)


def remove(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def nothing(_: Path) -> None:
    pass


def no_images(folder: Path) -> None:
    for path in (folder / "photos").iterdir():
        path.unlink()


def subfolders(folder: Path) -> None:
    """All photos in sub-folders, as kohya wants them."""
    for name in ("10_dog", "20_dog"):
        shutil.copytree(folder / "photos", folder / "moved" / name)
    shutil.rmtree(folder / "photos")
    (folder / "moved").rename(folder / "photos")


def bomb(folder: Path) -> None:
    """A PNG of 45 bytes that says it has 10 gigapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    pixels = struct.pack(">I", 10) + b"IDAT" + bytes(4)
    (folder / "photos" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + pixels)


def image(name: str, kind: type = np.uint8) -> Change:
    """One more image, of this kind of numbers."""
    return lambda folder: Image.fromarray(np.full((64, 64), 200, kind)).save(folder / "photos" / name)


def postscript(folder: Path) -> None:
    """A program for Ghostscript, which Pillow would run; here it would leave a file."""
    (folder / "photos" / "z.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EOF\n")
    (folder / "gs").write_text("#!/bin/sh\ntouch ran.txt\n")
    (folder / "gs").chmod(0o755)


def not_utf8(folder: Path) -> None:
    shutil.copy(folder / "photos" / "a.jpg", os.fsencode(folder / "photos") + b"/\xff.jpg")


def symlink_loop(folder: Path) -> None:
    (folder / "photos" / "loop.jpg").symlink_to(folder / "photos" / "loop.jpg")


def caption_loop(folder: Path) -> None:
    (folder / "photos" / "a.txt").symlink_to(folder / "photos" / "a.txt")


def weights_are_a_pipe(folder: Path) -> None:
    (folder / "model" / "text_encoder" / "model.safetensors").unlink()
    os.mkfifo(folder / "model" / "text_encoder" / "model.safetensors")


def two_captions(folder: Path) -> None:
    shutil.copy(folder / "photos" / "a.jpg", folder / "photos" / "f.jpg")
    (folder / "photos" / "f.txt").write_text("cat")


def null_caption(folder: Path) -> None:
    table = pa.table({"file_name": ["a.jpg", "c.png"], "text": pa.array([None, "dog"], pa.string())})
    pq.write_table(table, folder / "photos" / "metadata.parquet")


def change_table(change: Callable[[pa.Table], pa.Table]) -> Change:
    def rewrite(folder: Path) -> None:
        path = folder / "embeddings.parquet"
        pq.write_table(change(pq.read_table(path)), path, row_group_size=1)

    return rewrite


def with_column(name: str, make: Callable[[pa.ChunkedArray], pa.Array | list]) -> Change:
    return change_table(lambda table: table.set_column(table.column_names.index(name), name, [make(table[name])]))


def truncated_image(folder: Path) -> None:
    """Whose embeddings are there all the same."""
    cut_short("photos/a.jpg")(folder)
    hashes = [trainer.sha256_of(path) for path in sorted((folder / "photos").iterdir())]
    with_column("image_hashes", lambda column: pa.array([hashes, *column.to_pylist()[1:]]))(folder)


def other_mask(folder: Path) -> None:
    Image.new("L", (5, 5)).save(folder / "photos" / "a.mask.png")


def mask_is_a_pipe(folder: Path) -> None:
    """One of two masks: without any, the flag is a problem of its own."""
    [other] = (folder / "photos").glob("b.*")
    Image.new("L", Image.open(other).size, "white").save(other.with_name("b.mask.png"))
    os.mkfifo(folder / "photos" / "a.mask.png")


def scaled_t5(folder: Path) -> None:
    """Weights with which T5's output overflows fp16."""
    [path] = (folder / "model" / "text_encoder_3").glob("*.safetensors")
    weights = load_file(path)
    weights["encoder.final_layer_norm.weight"] = weights["encoder.final_layer_norm.weight"] * 1e6
    path.unlink()
    save_file(weights, path, {"format": "pt"})


class Evil:
    """Unpickling it leaves a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran.txt"),)


def pickled(part: str, name: str) -> Change:
    """Weights as a pickle that runs code."""

    def change(folder: Path) -> None:
        for path in (folder / "model" / part).glob("*.safetensors"):
            path.unlink()
        torch.save({"weight": Evil()}, folder / "model" / part / name)

    return change


def state(value: object) -> Change:
    """A checkpoint whose state is this."""

    def change(folder: Path) -> None:
        (folder / "out" / "checkpoint-9").mkdir()
        torch.save(value, folder / "out" / "checkpoint-9" / trainer.STATE_NAME)

    return change


CSV, JSONL, METADATA = "photos/metadata.csv", "photos/metadata.jsonl", "photos/metadata.parquet"
CONFIG = "model/transformer/config.json"
TRANSFORMER = "model/transformer/diffusion_pytorch_model.safetensors"
VAE = "model/vae/diffusion_pytorch_model.safetensors"
PRIOR = "--with_prior_preservation --class_prompt dog"
RESUME = "--resume_from_checkpoint checkpoint-9"
LATE = {"truncated image", "mask of another size", "VAE cut short", "broken VAE config", "transformer cut short"}
LATE |= {"samples is a file"}
TRAINER = {  # what is spoiled, flags, exit code, and what the message must name; LATE: images may have been encoded
    "unknown flag": (nothing, "--zoom 3", 2, "--zoom"),
    "flag with nothing": (nothing, "--instance_prompt=--", 2, "--instance_prompt"),
    "resolution off the grid": (nothing, "--resolution 100", 2, "--resolution 100"),
    "two optimizers": (nothing, "--use_8bit_adam --optimizer prodigy", 2, "--use_8bit_adam .*prodigy"),
    "a factor of no rate": (nothing, "--scale_lr --optimizer prodigy", 2, "--scale_lr .*prodigy"),
    "an average of weight 0": (nothing, "--optimizer adamw_schedulefree --adam_beta1 0", 2, "--adam_beta1"),
    "several resolutions with shapes of one": (
        nothing,
        "--resolution 48 64 --aspect_ratio_buckets 64,64",
        2,
        "--aspect_ratio_buckets .*--resolution",
    ),
    "resolution of previews off the grid": (
        nothing,
        "--resolution 70 --aspect_ratio_buckets 64,64",
        2,
        "--resolution 70",
    ),
    "resolution of previews above the model's": (
        nothing,
        "--resolution 4096 --aspect_ratio_buckets 64,64",
        1,
        "--resolution 4096",
    ),
    "rates below polynomial's end": (
        nothing,
        "--lr_scheduler polynomial --learning_rate 1e-8",
        2,
        "--learning_rate 1e-08",
    ),
    "buckets": (nothing, "--aspect_ratio_buckets 64x96", 2, "--aspect_ratio_buckets 64x96"),
    "large buckets": (nothing, "--aspect_ratio_buckets 64,64;16,2048", 1, "2048 pixels"),
    "no class prompt": (nothing, "--with_prior_preservation", 2, "--class_prompt"),
    "subject as class": (nothing, f"{PRIOR} --class_data_dir ./photos", 2, "--class_data_dir"),
    "prompt not UTF-8": (nothing, "--validation_prompt dog\udcff", 2, "--validation_prompt"),
    "folder not UTF-8": (nothing, "--output_dir out\udcff", 2, "--output_dir"),
    "int4 base": (nothing, "--quantize_base int4", 2, "--quantize_base"),
    "no flags file": (nothing, "@missing.txt", 2, "missing.txt"),
    "open quote in flags": (write("flags.txt", "--seed '1"), "@flags.txt", 2, "quotation"),
    "images folder is a file": (nothing, "--instance_data_dir=embeddings.parquet", 1, "Not a directory"),
    "images folder missing": (remove("photos"), "", 1, "--instance_data_dir /.*/photos does not exist"),
    "images in sub-folders": (subfolders, "", 1, "--instance_data_dir photos .*10_dog, 20_dog"),
    "empty folder": (no_images, "", 1, "--instance_data_dir photos"),
    "text as image": (write("photos/a.jpg", "hello"), "", 1, "a.jpg"),
    "PostScript as image": (postscript, "", 1, "z.png"),
    "FIFO as image": (lambda f: os.mkfifo(f / "photos/z.jpg"), "", 1, "z.jpg"),
    "decompression bomb": (bomb, "", 1, "bomb.png"),
    "symlink loop": (symlink_loop, "", 1, "loop.jpg"),
    "floating-point image": (image("z.tiff", np.float32), "", 1, "z.tiff .*32 bits"),
    "name not UTF-8": (not_utf8, "", 1, "\\.jpg"),
    "truncated image": (truncated_image, "", 1, "a.jpg"),
    "no masks": (nothing, "--alpha_mask", 1, "--alpha_mask"),
    "mask of another size": (other_mask, "--alpha_mask", 1, "a.jpg .*mask"),
    "FIFO as mask": (mask_is_a_pipe, "--alpha_mask", 1, "a.mask.png .*regular file"),
    "no embeddings": (remove("embeddings.parquet"), "", 1, "embeddings.parquet .*python compute_embeddings.py"),
    "truncated embeddings": (cut_short("embeddings.parquet"), "", 1, "embeddings.parquet"),
    "FIFO as embeddings": (lambda f: os.mkfifo(f / "pipe"), "--data_df_path=pipe", 1, "--data_df_path pipe"),
    "embeddings of another program": (change_table(lambda t: t.select(["prompt"])), "", 1, "embeddings.parquet"),
    "prompt of no image": (nothing, f"--instance_prompt '{PREVIEW_PROMPT}'", 1, "--instance_prompt"),
    "unknown preview prompt": (nothing, "--validation_prompt zebra", 1, "'zebra'"),
    "forgotten quotes": (nothing, "--validation_prompt a big dog", 2, "--validation_prompt"),
    "no model": (remove("model"), "", 1, "Cannot load model"),
    "no scheduler": (remove("model/scheduler"), "", 1, "scheduler of model"),
    "broken config": (write(CONFIG, "{"), "", 1, "transformer of model"),
    "config of a wrong type": (write(CONFIG, "[]"), "", 1, "transformer of model"),
    "another model's config": (
        write(CONFIG, '{"_class_name": "FluxTransformer2DModel"}'),
        "",
        1,
        "a different type of model",
    ),
    "broken VAE config": (write("model/vae/config.json", "{"), "", 1, "vae of model"),
    "transformer cut short": (cut_short(TRANSFORMER), "", 1, "transformer of model"),
    "VAE cut short": (cut_short(VAE), "", 1, "vae of model"),
    "pickled transformer": (pickled("transformer", "diffusion_pytorch_model.bin"), "", 1, "transformer of model"),
    "unknown variant": (nothing, "--variant fp7", 1, "fp7"),
    "output is a file": (nothing, "--output_dir=embeddings.parquet", 1, "embeddings.parquet"),
    "output is a symlink loop": (
        lambda f: (f / "loop").symlink_to("loop"),
        "--output_dir=loop",
        1,
        "loop cannot be written",
    ),
    "output with a long name": (nothing, f"--output_dir={'x' * 300}", 1, "too long: .*xxx"),
    "class folder is a file": (
        nothing,
        f"--with_prior_preservation --class_prompt '{PREVIEW_PROMPT}' --class_data_dir=embeddings.parquet",
        1,
        "embeddings.parquet",
    ),
    "samples is a file": (write("out/samples", ""), "", 1, "out/samples"),
    "no such checkpoint": (nothing, RESUME, 1, "--resume_from_checkpoint checkpoint-9"),
    "state that runs code": (state(Evil()), RESUME, 1, "--resume_from_checkpoint checkpoint-9"),
    "text as LoRA": (write("start.safetensors", "text"), "--pretrained_lora_path start.safetensors", 1, "start.safe"),
}
EMBEDDINGS = {
    "unknown flag": (nothing, "--zoom 3", 2, "--zoom"),
    "flag with nothing": (nothing, "--prompt=--", 2, "--prompt"),
    "no text": (nothing, "--max_sequence_length 0", 2, "--max_sequence_length 0"),
    "forgotten quotes": (nothing, "--validation_prompt a big dog", 2, "--validation_prompt"),
    "prompt not UTF-8": (nothing, "--prompt dog\udcff", 2, "--prompt"),
    "open quote in flags": (write("flags.txt", "--prompt 'a"), "@flags.txt", 2, "quotation"),
    "no images folder": (remove("photos"), "", 1, "--local_data_dir /.*/photos does not exist"),
    "images in sub-folders": (subfolders, "", 1, "--local_data_dir photos .*10_dog, 20_dog"),
    "images folder with a long name": (nothing, f"--local_data_dir={'x' * 300}", 1, "--local_data_dir x"),
    "text as image": (write("photos/a.jpg", "hello"), "", 1, "a.jpg"),
    "PostScript as image": (postscript, "", 1, "z.png"),
    "FIFO as image": (lambda f: os.mkfifo(f / "photos/z.jpg"), "", 1, "z.jpg"),
    "name not UTF-8": (not_utf8, "", 1, "\\.jpg"),
    "truncated image": (cut_short("photos/a.jpg"), "", 1, "a.jpg"),
    "empty caption": (write("photos/a.txt", " \n"), "", 1, "a.txt .*empty"),
    "caption in latin-1": (write("photos/a.txt", b"\xe4"), "", 1, "a.txt .*save it as UTF-8"),
    "caption is a folder": (lambda f: (f / "photos/a.txt").mkdir(), "", 1, "a.txt"),
    "caption of no image": (write(CSV, "file_name,text\nx.jpg,dog"), "", 1, "metadata.csv, row 2 .*x.jpg"),
    "metadata with other words": (write(CSV, "file_name,words\na.jpg,dog"), "", 1, "metadata.csv .*text"),
    "metadata without names": (write(CSV, "name,text\na.jpg,dog"), "", 1, "metadata.csv .*file_name"),
    "metadata with an empty text": (write(CSV, "file_name,text\na.jpg,"), "", 1, "metadata.csv, row 2 .*a.jpg"),
    "metadata with a null": (
        write(JSONL, '{"file_name": "a.jpg", "text": null}'),
        "",
        1,
        "metadata.jsonl, row 2 .*a.jpg",
    ),
    "null in metadata.parquet": (null_caption, "", 1, "metadata.parquet, row 2 .*a.jpg"),
    "caption of a mask": (
        lambda f: (other_mask(f), write(CSV, "file_name,text\na.mask.png,dog")(f)),
        "",
        1,
        "a.mask.png",
    ),
    "half an emoji": (write(JSONL, '{"file_name": "a.jpg", "text": "\\ud83d"}'), "", 1, "metadata.jsonl, row 2"),
    "name with half an emoji": (
        write(JSONL, '{"file_name": "\\ud83d", "text": "a"}'),
        "",
        1,
        "metadata.jsonl, row 2",
    ),
    "metadata with a list": (
        write(JSONL, '{"file_name": "a.jpg", "text": ["a"]}'),
        "",
        1,
        "metadata.jsonl, row 2 .*a.jpg",
    ),
    "two rows of an image": (write(CSV, "file_name,text\na.jpg,1\n./a.jpg,1"), "", 1, "metadata.csv, row 3 .*a.jpg"),
    "unquoted comma": (
        write(CSV, "text,file_name\na cat,b.JPEG\na photo of sks dog, sitting,a.jpg"),
        "",
        1,
        "metadata.csv .*line 3.*quotes",
    ),
    "row without a field": (write(CSV, "file_name,text\na.jpg\nb.JPEG,dog"), "", 1, "metadata.csv, row 2 .*a.jpg"),
    "open quote in metadata": (write(CSV, 'file_name,text\na.jpg,"dog'), "", 1, "metadata.csv"),
    "FIFO as metadata": (lambda f: os.mkfifo(f / CSV), "", 1, "metadata.csv .*regular file"),
    "FIFO as caption": (lambda f: os.mkfifo(f / "photos/a.txt"), "", 1, "a.txt .*regular file"),
    "surplus field": (write(CSV, "file_name,text\na.jpg,a dog, sitting"), "", 1, "metadata.csv .*quotes"),
    "deep JSON": (write(JSONL, '{"text": ' + "[" * 2000), "", 1, "metadata.jsonl"),
    "UTF-16": (write("photos/a.txt", "sks dog".encode("utf-16")), "", 1, "a.txt .*save it as UTF-8"),
    "UTF-16 without a mark": (write("photos/a.txt", "sks dog".encode("utf-16-le")), "", 1, "a.txt .*UTF-8"),
    "nothing visible": (write("photos/a.txt", "\u200b\u200d \ufeff"), "", 1, "a.txt .*empty"),
    "symlink loop as caption": (caption_loop, "", 1, "a.txt"),
    "FIFO as weights": (weights_are_a_pipe, "", 1, "text_encoder.*regular file"),
    "FIFO as flags": (lambda f: os.mkfifo(f / "flags.txt"), "@flags.txt", 2, "flags.txt .*regular file"),
    "flags that double themselves": (write("flags.txt", "@flags.txt\n@flags.txt"), "@flags.txt", 2, "flags.txt"),
    "captions as output": (
        lambda f: pq.write_table(pa.table({"file_name": ["a.jpg"], "text": ["dog"]}), f / METADATA),
        f"--output_path={METADATA}",
        1,
        f"--output_path {METADATA}",
    ),
    "empty metadata": (write(CSV, ""), "", 1, "metadata.csv"),
    "broken jsonl": (write(JSONL, '{"file_name": '), "", 1, "metadata.jsonl"),
    "jsonl of lists": (write(JSONL, "[1]\n"), "", 1, "metadata.jsonl"),
    "broken metadata.parquet": (write(METADATA, "hello"), "", 1, "metadata.parquet"),
    "two captions of one image": (two_captions, "", 1, "a.jpg and photos/f.jpg"),
    "output is a folder": (nothing, "--output_path=photos", 1, "--output_path photos"),
    "output is a FIFO": (lambda f: os.mkfifo(f / "pipe"), "--output_path=pipe", 1, "--output_path pipe"),
    "output with a long name": (nothing, f"--output_path={'x' * 300}", 1, "--output_path x* .*too long"),
    "no model": (remove("model"), "", 1, "load model"),
    "no repository": (nothing, "--pretrained_model_name_or_path=sd3", 1, "sd3: the Hub does not answer"),
    "no transformer config": (remove("model/transformer"), "", 1, "transformer of model"),
    "no T5 tokenizer": (remove("model/tokenizer_3"), "", 1, "tokenizer_3 of model"),
    "no T5": (remove("model/text_encoder_3"), "", 1, "text_encoder_3 of model"),
    "pickled CLIP-L": (pickled("text_encoder", "pytorch_model.bin"), "", 1, "text_encoder of model"),
    "T5 cut short": (cut_short("model/text_encoder_3/model.safetensors"), "", 1, "text_encoder_3 of model"),
    "unknown variant": (nothing, "--variant fp7", 1, "text_encoder of model"),
    "fp16 overflow": (scaled_t5, "--t5_precision exact", 1, "T5 .*fp16"),
}


def ends_with_one_message(
    main: Callable[[], None], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SystemExit and nothing else; argparse's own message is on stderr, ours is in the exception."""
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    said = captured.err if code == 2 else str(stop.value.code)
    assert re.search(f"(?s){message}", said), said
    assert (stop.value.code == 2) == (code == 2) and "Traceback" not in captured.out + captured.err + said
    assert said.count("\n- ") == said.startswith("Cannot start:"), f"one mistake is one line: {said}"


def unchanged(project: Path, before: dict[Path, bytes], latents: bool) -> None:
    """No file is other than before; whole latents and an empty lock may be there if a training had started."""
    after = contents(project)
    for path in after.keys() - before.keys() if latents else []:
        if path.parent == project / "out" / "latents":
            assert load_file(path)["mean"].isfinite().all()
        else:
            assert path == project / "out" / ".lock"
        del after[path]
    assert after == before, {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_refuses(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each row of the table."""
    change, flags, code, message = TRAINER[name]
    change(project)
    before = contents(project)
    fixed = ["--pretrained_model_name_or_path=model", "--instance_data_dir=photos", "--output_dir=out"]
    fixed += [f"--instance_prompt={PROMPT}", "--data_df_path=embeddings.parquet", "--resolution=64", "--seed=0"]
    fixed += ["--max_train_steps=1", f"--rank={RANK}", "--train_batch_size=1", "--report_to=none"]
    command = [*fixed, *shlex.split(flags)]
    ends_with_one_message(lambda: trainer.main(trainer.parse_args(command)), code, message, capsys)
    unchanged(project, before, name in LATE)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_compute_embeddings_refuses(name: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each row of the table; the older Parquet file stays."""
    change, flags, code, message = EMBEDDINGS[name]
    change(project)
    before = contents(project)
    fixed = ["--pretrained_model_name_or_path=model", "--local_data_dir=photos", "--output_path=embeddings.parquet"]
    command = [*fixed, *shlex.split(flags)]
    ends_with_one_message(lambda: embed.main(embed.parse_args(command)), code, message, capsys)
    unchanged(project, before, False)


def grey_with_transparency(path: Path) -> None:
    """16-bit grey whose 0 is transparent, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = b"".join(b"\0" + struct.pack(">64H", *range(0, 64 * 1000, 1000)) for _ in range(64))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 0, 0, 0, 0)) + chunk(b"tRNS", b"\0\0")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def test_odd_images(tiny: Path, tmp_path: Path, train: Callable[..., Path]) -> None:
    """Every mode, very wide, animated; names with spaces, newlines and letters of any script."""
    folder = tmp_path / "photos"
    folder.mkdir()
    modes = {"1": "bw.png", "L": "grey.jpg", "LA": "grey alpha.png", "P": "palette.png", "RGBA": "ä\nб犬.png"}
    modes |= {"CMYK": "cmyk.jpg", "I;16": "16 bit.png", "YCbCr": "y.jpg"}
    for mode, name in modes.items():
        Image.new(mode, (70, 64)).save(folder / name)
    Image.new("P", (64, 64)).save(folder / "transparent palette.png", transparency=0)
    grey_with_transparency(folder / "transparent 16 bit.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (70, 64)).save(folder / "turned.jpg", exif=exif)
    data = (folder / "turned.jpg").read_bytes()
    assert data.count(b"\x01\x12\0\x03") == 1
    (folder / "turned.jpg").write_bytes(data.replace(b"\x01\x12\0\x03", b"\x01\x12\0\x07"))  # bytes, no number
    Image.new("RGB", (3000, 20)).save(folder / "wide.webp")
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    embeddings = compute(tiny, folder, tmp_path / "e.parquet", f"--prompt={PROMPT}", "--no_t5")
    output = train(instance_data_dir=folder, data_df_path=embeddings)
    assert len(list((output / "latents").iterdir())) == 13
    assert all(value.isfinite().all() for value in load_file(output / trainer.LORA_NAME).values())
    assert [len(hashes) for hashes in pq.read_table(embeddings)["image_hashes"].to_pylist()] == [13, 0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_random_command_lines_end_without_a_traceback(name: str) -> None:
    """60 of them; tools/fuzz.py tries more."""
    ends, tracebacks = fuzz(name, 60)
    assert ends["success"] >= 6 and ends["message"] >= 6 and not tracebacks, tracebacks
