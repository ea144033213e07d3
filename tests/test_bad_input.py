"""What users get wrong: one message with what, where and how to mend it, the right exit code, and no file changed."""

import json
import os
import re
import shlex
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import compute_embeddings as embed
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, RANK, compute, reset_accelerate
from PIL import Image
from safetensors.torch import load_file, save_file

Change = Callable[[Path], object]


@pytest.fixture
def project(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> Path:
    """Everything that both scripts need, in one folder, to be spoilt."""
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(tiny, tmp_path / "model", copy_function=os.link)
    shutil.copy(embeddings, tmp_path / "embeddings.parquet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / trainer.LORA_NAME).write_text("an older LoRA")
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def replace(path: Path, content: bytes) -> None:
    """Not in place: the model's files are links."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def cut_short(name: str) -> Change:
    return lambda folder: replace(folder / name, (folder / name).read_bytes()[: (folder / name).stat().st_size // 2])


def write(name: str, content: bytes) -> Change:
    return lambda folder: replace(folder / name, content)


def remove(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def nothing(_: Path) -> None:
    pass


def empty(name: str) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    return change


def bomb(folder: Path) -> None:
    """A PNG of 36 bytes that says it has 10 gigapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "photos" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


def floating_point_picture(folder: Path) -> None:
    Image.fromarray(np.ones((64, 64), np.float32)).save(folder / "photos" / "c.tiff")
    compute(folder / "model", folder / "photos", folder / "embeddings.parquet", "--no_t5", f"--prompt={PROMPT}")


def truncated_picture(folder: Path) -> None:
    cut_short("photos/a.jpg")(folder)
    compute(folder / "model", folder / "photos", folder / "embeddings.parquet", "--no_t5", f"--prompt={PROMPT}")


def symlink_loop(folder: Path) -> None:
    (folder / "photos" / "loop.jpg").symlink_to(folder / "photos" / "loop.jpg")


def change_table(change: Callable[[pa.Table], pa.Table]) -> Change:
    def rewrite(folder: Path) -> None:
        path = folder / "embeddings.parquet"
        pq.write_table(change(pq.read_table(path)), path, row_group_size=1)

    return rewrite


def with_nan(table: pa.Table) -> pa.Table:
    values = table["prompt_embeds"].combine_chunks().to_numpy_ndarray().copy()
    values[:, 3, 5] = np.nan
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    return table.set_column(table.column_names.index("prompt_embeds"), "prompt_embeds", array)


def narrower(table: pa.Table) -> pa.Table:
    values = table["prompt_embeds"].combine_chunks().to_numpy_ndarray()[:, :, :32]
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
    return table.set_column(table.column_names.index("prompt_embeds"), "prompt_embeds", array)


def other_mask(folder: Path) -> None:
    Image.new("L", (5, 5)).save(folder / "photos" / "a.mask.png")


def scaled_t5(folder: Path) -> None:
    """Weights with which T5's output overflows fp16."""
    [path] = (folder / "model" / "text_encoder_3").glob("*.safetensors")
    weights = load_file(path)
    weights["encoder.final_layer_norm.weight"] = weights["encoder.final_layer_norm.weight"] * 1e6
    path.unlink()
    save_file(weights, path, {"format": "pt"})


TRANSFORMER = "model/transformer/diffusion_pytorch_model.safetensors"


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


PRIOR = "--with_prior_preservation"
TRAINER = {  # what is spoilt, flags, exit code, what the message says
    "unknown flag": (nothing, "--zoom 3", 2, "--zoom"),
    "abbreviated flag": (nothing, "--resolutio 64", 2, "--resolutio"),
    "resolution off the grid": (nothing, "--resolution 100", 2, "--resolution 100 is not a multiple of 16"),
    "no resolution": (nothing, "--resolution 0", 2, "--resolution 0 is below 1"),
    "negative resolution": (nothing, "--resolution=-64", 2, "--resolution -64 is below 1"),
    "no rank": (nothing, "--rank 0", 2, "--rank 0 is below 1"),
    "no batch": (nothing, "--train_batch_size 0", 2, "--train_batch_size 0 is below 1"),
    "no accumulation": (nothing, "--gradient_accumulation_steps 0", 2, "steps 0 is below 1"),
    "no steps": (nothing, "--max_train_steps 0", 2, "--max_train_steps 0 is below 1"),
    "negative learning rate": (nothing, "--learning_rate=-1", 2, "--learning_rate -1.0 is below 0"),
    "infinite learning rate": (nothing, "--learning_rate inf", 2, "--learning_rate inf is not a finite number"),
    "learning rate in words": (nothing, "--learning_rate high", 2, "invalid float value: 'high'"),
    "unknown precision": (nothing, "--mixed_precision fp8", 2, "invalid choice: 'fp8'"),
    "unknown schedule": (nothing, "--lr_scheduler exotic", 2, "invalid choice: 'exotic'"),
    "unknown weighting": (nothing, "--weighting_scheme exotic", 2, "invalid choice: 'exotic'"),
    "buckets": (nothing, "--aspect_ratio_buckets 64x96", 2, "--aspect_ratio_buckets 64x96: Invalid bucket"),
    "odd buckets": (nothing, "--aspect_ratio_buckets 64,100", 2, "64,100: not all sides are multiples of 16"),
    "large buckets": (nothing, "--aspect_ratio_buckets 64,64;16,2048", 1, "a side of 2048 pixels"),
    "rules without schedule": (nothing, "--step_rules 1:2,0.1", 2, "piecewise_constant and --step_rules"),
    "bad rules": (nothing, "--lr_scheduler piecewise_constant --step_rules 1:x", 2, "--step_rules 1:x is not a list"),
    "unknown optimizer": (nothing, "--optimizer prodigy", 2, "invalid choice: 'prodigy'"),
    "precondition twice": (nothing, "--precondition_outputs 2", 2, "invalid choice: 2"),
    "blocks in words": (nothing, "--lora_blocks first", 2, "--lora_blocks first is not a list of numbers"),
    "all dropped out": (nothing, "--lora_dropout 1", 2, "--lora_dropout 1.0 is not below 1"),
    "all captions dropped": (nothing, "--caption_dropout 1.5", 2, "--caption_dropout 1.5 is not below 1"),
    "no class prompt": (nothing, PRIOR, 2, "--with_prior_preservation needs --class_prompt"),
    "unknown tracker": (nothing, "--report_to paper", 2, "invalid choice: 'paper'"),
    "token for a tracker": (nothing, "--hub_token hf_x --report_to wandb", 2, "could expose the token"),
    "no checkpoints": (nothing, "--checkpointing_steps 0", 2, "--checkpointing_steps 0 is below 1"),
    "negative seed": (nothing, "--seed=-1", 2, "--seed -1 is below 0"),
    "keep no checkpoint": (nothing, "--checkpoints_total_limit 0", 2, "--checkpoints_total_limit 0 is below 1"),
    "no pictures folder": (remove("photos"), "", 1, "photos is not a folder"),
    "pictures folder is a file": (nothing, "--instance_data_dir=embeddings.parquet", 1, "is not a folder"),
    "empty folder": (empty("photos"), "", 1, "photos has no pictures"),
    "empty picture": (write("photos/a.jpg", b""), "", 1, "a.jpg is not a readable picture"),
    "text as picture": (write("photos/a.jpg", b"hello"), "", 1, "a.jpg is not a readable picture"),
    "decompression bomb": (bomb, "", 1, "bomb.png is not a readable picture"),
    "symlink loop": (symlink_loop, "", 1, "loop.jpg is not a readable picture"),
    "truncated picture": (truncated_picture, "", 1, "Repair these pictures.*a.jpg"),
    "floating-point picture": (floating_point_picture, "", 1, "Repair these pictures.*c.tiff .*8 or 16 bits"),
    "no embeddings": (remove("embeddings.parquet"), "", 1, "cannot be read.*Run: python compute_embeddings.py"),
    "truncated embeddings": (cut_short("embeddings.parquet"), "", 1, "embeddings.parquet cannot be read"),
    "text as embeddings": (write("embeddings.parquet", b"hello"), "", 1, "embeddings.parquet cannot be read"),
    "other columns": (change_table(lambda t: t.select(["prompt"])), "", 1, "cannot be read.*image_hashes"),
    "embeddings with NaN": (change_table(with_nan), "", 1, "are not finite"),
    "another model's embeddings": (change_table(narrower), "", 1, "was computed with another kind of model"),
    "another text length": (nothing, "--max_sequence_length 12", 1, "T5 tokens, not --max_sequence_length 12"),
    "unknown instance prompt": (nothing, "--instance_prompt zebra", 1, "no embeddings of 'zebra'.*--prompt zebra"),
    "prompt of no picture": (nothing, "--instance_prompt=", 1, "'' captions none of the pictures"),
    "unknown preview prompt": (nothing, "--validation_prompt zebra", 1, "no embeddings of 'zebra'"),
    "forgotten quotes": (nothing, "--validation_prompt a big dog", 1, "several words need quotes"),
    "unknown negative": (nothing, "--validation_prompt= --negative_prompt zebra", 1, "no embeddings of 'zebra'"),
    "unknown class prompt": (nothing, f"{PRIOR} --class_prompt zebra", 1, "no embeddings of 'zebra'"),
    "new picture": (lambda f: Image.new("RGB", (9, 9)).save(f / "photos" / "z.png"), "", 1, "1 of 6 pictures.*z.png"),
    "no model": (remove("model"), "", 1, "Cannot load transformer of .*model"),
    "half a model": (remove("model/transformer"), "", 1, "Cannot load transformer of .*model"),
    "broken config": (write("model/transformer/config.json", b"{"), "", 1, "Cannot load transformer of .*model"),
    "no transformer weights": (remove(TRANSFORMER), "", 1, "weights in .*transformer cannot be read"),
    "transformer cut short": (cut_short(TRANSFORMER), "", 1, "weights in .*transformer cannot be read"),
    "pickled transformer": (pickled("transformer", "diffusion_pytorch_model.bin"), "", 1, "there are none"),
    "pickled VAE": (pickled("vae", "diffusion_pytorch_model.bin"), "", 1, "there are none"),
    "no VAE": (remove("model/vae"), "", 1, "weights in .*vae cannot be read"),
    "unknown variant": (nothing, "--variant fp7", 1, "weights in .*transformer cannot be read"),
    "resolution above the model's": (nothing, "--resolution 65536", 1, "--resolution 65536 has a side of"),
    "unknown layers": (nothing, "--lora_layers to_x", 1, "no linear layer to_x"),
    "unknown block": (nothing, "--lora_blocks 99", 1, "--lora_blocks 99: the last block is"),
    "output is a file": (nothing, "--output_dir=embeddings.parquet", 1, "--output_dir .* cannot be written"),
    "output under a file": (nothing, "--output_dir=embeddings.parquet/out", 1, "--output_dir .* cannot be written"),
    "samples is a file": (write("out/samples", b""), f"--validation_prompt '{PREVIEW_PROMPT}'", 1, "samples cannot"),
    "no such checkpoint": (nothing, "--resume_from_checkpoint checkpoint-9", 1, "is not a checkpoint"),
    "no masks": (nothing, "--alpha_mask", 1, "no picture in .* has an alpha channel"),
    "mask of another size": (other_mask, "--alpha_mask", 1, "a.jpg.*its mask has"),
    "no such LoRA": (nothing, "--pretrained_lora_path missing.safetensors", 1, "missing.safetensors cannot be loaded"),
}
EMBEDDINGS = {
    "unknown flag": (nothing, "--zoom 3", 2, "--zoom"),
    "abbreviated flag": (nothing, "--promp x", 2, "--promp"),
    "no text": (nothing, "--max_sequence_length 0", 2, "T5 takes 1 to 512 tokens"),
    "negative text": (nothing, "--max_sequence_length=-1", 2, "T5 takes 1 to 512 tokens"),
    "too much text": (nothing, "--max_sequence_length 513", 2, "T5 takes 1 to 512 tokens"),
    "length in words": (nothing, "--max_sequence_length long", 2, "invalid int value: 'long'"),
    "unknown precision": (nothing, "--t5_precision int3", 2, "invalid choice: 'int3'"),
    "forgotten quotes": (nothing, "--validation_prompt a big dog", 2, "several words need quotes"),
    "flag without value": (nothing, "--prompt", 2, "expected one argument"),
    "no prompts": (nothing, "--validation_prompt", 2, "expected at least one argument"),
    "a word too many": (nothing, "dog", 2, "unrecognized arguments: dog"),
    "no pictures folder": (remove("photos"), "", 1, "photos is not a folder"),
    "pictures folder is a file": (nothing, "--local_data_dir=embeddings.parquet", 1, "is not a folder"),
    "empty folder": (empty("photos"), "", 1, "photos has no pictures"),
    "empty picture": (write("photos/a.jpg", b""), "", 1, "a.jpg is not a readable picture"),
    "text as picture": (write("photos/a.jpg", b"hello"), "", 1, "a.jpg is not a readable picture"),
    "decompression bomb": (bomb, "", 1, "bomb.png is not a readable picture"),
    "symlink loop": (symlink_loop, "", 1, "loop.jpg is not a readable picture"),
    "empty caption": (write("photos/a.txt", b" \n"), "", 1, "captions of a.jpg are empty"),
    "caption in latin-1": (write("photos/a.txt", b"\xe4"), "", 1, "a.txt cannot be read.*UTF-8"),
    "caption in UTF-16": (write("photos/a.txt", "dog".encode("utf-16")), "", 1, "a.txt cannot be read.*UTF-8"),
    "caption is a folder": (lambda f: (f / "photos/a.txt").mkdir(), "", 1, "a.txt cannot be read"),
    "caption of no picture": (write("photos/metadata.csv", b"file_name,text\nx.jpg,dog"), "", 1, "of x.jpg, but no"),
    "metadata without text": (write("photos/metadata.csv", b"file_name,words\na.jpg,dog"), "", 1, "no column 'text'"),
    "metadata without names": (write("photos/metadata.csv", b"name,text\na.jpg,dog"), "", 1, "no column 'file_name'"),
    "metadata with an empty text": (write("photos/metadata.csv", b"file_name,text\na.jpg,"), "", 1, "a.jpg are empty"),
    "empty metadata": (write("photos/metadata.csv", b""), "", 1, "metadata.csv cannot be read"),
    "broken jsonl": (write("photos/metadata.jsonl", b'{"file_name": '), "", 1, "metadata.jsonl cannot be read"),
    "jsonl of lists": (write("photos/metadata.jsonl", b"[1]\n"), "", 1, "metadata.jsonl cannot be read"),
    "broken metadata.parquet": (write("photos/metadata.parquet", b"hello"), "", 1, "metadata.parquet cannot be read"),
    "metadata in latin-1": (write("photos/metadata.csv", b"file_name,text\na.jpg,\xe4"), "", 1, "metadata.csv cannot"),
    "two captions of one picture": (
        lambda f: (shutil.copy(f / "photos/a.jpg", f / "photos/f.jpg"), (f / "photos/f.txt").write_text("cat")), "", 1,
        "a.jpg and .*f.jpg are the same picture with different captions",
    ),
    "output is a folder": (nothing, "--output_path=photos", 1, "--output_path .*photos cannot be written"),
    "output under a file": (nothing, "--output_path=embeddings.parquet/e", 1, "cannot be written"),
    "output is a picture": (nothing, "--output_path=photos/a.jpg", 1, "it exists and is no Parquet file"),
    "no model": (remove("model"), "", 1, "Cannot load transformer of .*model"),
    "no repository": (nothing, "--pretrained_model_name_or_path=sd3", 1, "not the name of a repository"),
    "no transformer config": (remove("model/transformer"), "", 1, "Cannot load transformer of .*model"),
    "no tokenizer": (remove("model/tokenizer"), "", 1, "Cannot load tokenizer of .*model"),
    "no second tokenizer": (remove("model/tokenizer_2"), "", 1, "Cannot load tokenizer_2 of .*model"),
    "no T5 tokenizer": (remove("model/tokenizer_3"), "", 1, "Cannot load tokenizer_3 of .*model"),
    "no CLIP-L": (remove("model/text_encoder"), "", 1, "Cannot load text_encoder of .*model"),
    "no CLIP-G": (remove("model/text_encoder_2"), "", 1, "Cannot load text_encoder_2 of .*model"),
    "no T5": (remove("model/text_encoder_3"), "", 1, "Cannot load text_encoder_3 of .*model"),
    "pickled CLIP-L": (pickled("text_encoder", "pytorch_model.bin"), "", 1, "Cannot load text_encoder of"),
    "pickled T5": (pickled("text_encoder_3", "pytorch_model.bin"), "", 1, "Cannot load text_encoder_3 of"),
    "T5 cut short": (cut_short("model/text_encoder_3/model.safetensors"), "", 1, "Cannot load text_encoder_3"),
    "CLIP-L cut short": (cut_short("model/text_encoder/model.safetensors"), "", 1, "Cannot load text_encoder of"),
    "unknown variant": (nothing, "--variant fp7", 1, "Cannot load text_encoder of"),
    "fp16 overflow": (scaled_t5, "--t5_precision exact", 1, "T5 gave values that fp16 cannot hold"),
}


def ends_with_one_message(
    main: Callable[[], None], project: Path, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SystemExit and nothing else; argparse's own message is on stderr, ours is in the exception."""
    before = contents(project)
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    said = captured.err if code == 2 else str(stop.value.code)
    assert re.search(f"(?s){message}", said), said
    assert (stop.value.code == 2) == (code == 2) and "Traceback" not in captured.out + captured.err + said
    after = contents(project)
    assert after == before, {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}


@pytest.mark.parametrize("name", TRAINER)
def test_the_trainer_refuses(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row of the table."""
    change, flags, code, message = TRAINER[name]
    change(project)
    monkeypatch.chdir(project)
    reset_accelerate()
    fixed = ["--pretrained_model_name_or_path=model", "--instance_data_dir=photos", "--output_dir=out"]
    fixed += [f"--instance_prompt={PROMPT}", "--data_df_path=embeddings.parquet", "--resolution=64"]
    fixed += ["--seed=0", "--lr_warmup_steps=0"]
    fixed += ["--max_train_steps=1", f"--rank={RANK}", "--train_batch_size=1", "--report_to=none"]
    extra = shlex.split(flags)
    ends_with_one_message(lambda: trainer.main(trainer.parse_args([*fixed, *extra])), project, code, message, capsys)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_compute_embeddings_refuses(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row of the table; the older Parquet file stays."""
    change, flags, code, message = EMBEDDINGS[name]
    change(project)
    monkeypatch.chdir(project)
    fixed = ["--pretrained_model_name_or_path=model", "--local_data_dir=photos", "--output_path=embeddings.parquet"]
    extra = shlex.split(flags)
    ends_with_one_message(lambda: embed.main(embed.parse_args([*fixed, *extra])), project, code, message, capsys)


def test_odd_pictures_work(tiny: Path, tmp_path: Path, train: Callable[..., Path]) -> None:
    """Every mode, one pixel, very wide, animated; names with spaces, newlines and letters of any script."""
    folder = tmp_path / "photos"
    folder.mkdir()
    modes = {"1": "bw.png", "L": "grey.jpg", "LA": "grey alpha.png", "P": "palette.png", "RGBA": "ä\nб犬.png"}
    modes |= {"CMYK": "cmyk.jpg", "I;16": "16 bit.png", "YCbCr": "y.jpg"}
    for mode, name in modes.items():
        Image.new(mode, (70, 64)).save(folder / name)
    Image.new("RGB", (1, 1)).save(folder / "one pixel.png")
    Image.new("RGB", (3000, 20)).save(folder / "wide.webp")
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    embeddings = compute(tiny, folder, tmp_path / "e.parquet", f"--prompt={PROMPT}", "--no_t5")
    output = train(instance_data_dir=folder, data_df_path=embeddings)
    assert trainer.open_latents(output / "latents.arrow").num_record_batches == 11
    assert all(torch.isfinite(value).all() for value in load_file(output / trainer.LORA_NAME).values())
    table = pd.DataFrame(pq.read_table(embeddings, columns=["prompt", "image_hashes"]).to_pylist())
    assert json.dumps(table["image_hashes"].map(len).tolist()) == "[11, 0]"
