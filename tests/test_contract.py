"""The Parquet file between the two scripts: what compute_embeddings.py writes and what the trainer reads."""

import gc
import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import compute_embeddings as embed
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_pipeline
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from benchmark import t5_error
from conftest import PREVIEW_PROMPT, PROMPT, compute
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel

PROMPTS = ["a photo of sks dog", "sks dog in a bucket", "a dog", ""]


def read(path: Path, name: str) -> np.ndarray:
    return pq.read_table(path)[name].combine_chunks().to_numpy_ndarray()


def pipeline_embeds(model: Path, prompts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """What StableDiffusion3Pipeline.encode_prompt gives in fp32, cast to fp16."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        embeds = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return embeds[0].half().numpy(), embeds[2].half().numpy()


def test_one_row_and_row_group_per_distinct_prompt(embeddings: Path, photos: Path) -> None:
    """Three prompts, '' among them; the five pictures belong to the instance prompt."""
    file = pq.ParquetFile(embeddings)
    rows = file.read(["prompt", "image_hashes"]).to_pydict()
    hashes = [embed.hash_image(path) for path in sorted(photos.iterdir())]
    assert dict(zip(*rows.values(), strict=True)) == {PROMPT: hashes, PREVIEW_PROMPT: [], "": []}
    assert file.num_row_groups == 3


def test_the_schema_is_the_contract(embeddings: Path, tiny: Path) -> None:
    """Fixed-shape fp16 tensors, and what the file was made with."""
    schema = pq.ParquetFile(embeddings).schema_arrow
    assert schema.field("prompt_embeds").type == pa.fixed_shape_tensor(pa.float16(), [154, tiny_pipeline.T5_WIDTH])
    assert schema.field("pooled_prompt_embeds").type == pa.fixed_shape_tensor(pa.float16(), [80])
    about = json.loads(schema.metadata[b"sd3_embeddings"])
    assert (about["model"], about["max_sequence_length"], about["t5"]) == (str(tiny), 77, "exact")
    assert about["format_version"] == 1 and about["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("length", [77, 256])
@pytest.mark.parametrize("kind", ["tiny", "tiny35"])
def test_exact_equals_the_pipelines_encode_prompt(
    length: int, kind: str, photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Bit for bit after the cast to fp16, for the same list of prompts."""
    model = request.getfixturevalue(kind)
    flags = ["--t5_precision=exact", f"--max_sequence_length={length}", "--class_prompt", PROMPTS[2]]
    path = compute(model, photos, tmp_path / "e.parquet", *flags, "--validation_prompt", PROMPTS[1])
    order = pq.read_table(path)["prompt"].to_pylist()
    assert sorted(order) == sorted(PROMPTS)
    prompt_embeds, pooled_prompt_embeds = pipeline_embeds(model, order, length)
    assert np.array_equal(read(path, "prompt_embeds"), prompt_embeds)
    assert np.array_equal(read(path, "pooled_prompt_embeds"), pooled_prompt_embeds)


def test_int8_is_real_and_close_to_exact(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """T5's layers are bitsandbytes' 8-bit ones; CLIP's part is exact, T5's within a few percent."""
    args = embed.parse_args([f"--pretrained_model_name_or_path={tiny}"])
    t5 = embed.load_t5(args, torch.device("cpu"), tmp_path)
    assert any(isinstance(module, bnb.nn.Linear8bitLt) for module in t5.modules())
    path = compute(tiny, photos, tmp_path / "int8.parquet", "--validation_prompt", PREVIEW_PROMPT)
    exact, int8 = (read(file, "prompt_embeds") for file in (embeddings, path))
    assert np.array_equal(int8[:, :77], exact[:, :77])
    assert 0 < t5_error(path, embeddings) < 0.05


def test_what_overflows_fp16_inside_t5_is_right(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """With feed-forward layers that give more than fp16 holds: exact is bit for bit fp32's, int8 within percents."""
    model = shutil.copytree(tiny, tmp_path / "model")
    t5 = T5EncoderModel.from_pretrained(model / "text_encoder_3")
    with torch.no_grad():
        for block in t5.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(1e6)
        assert t5(torch.arange(2, 50)[None], output_hidden_states=True).hidden_states[1].abs().max() > 65504
    t5.save_pretrained(model / "text_encoder_3")
    exact, int8 = (
        compute(model, photos, tmp_path / f"{how}.parquet", f"--t5_precision={how}") for how in ("exact", "int8")
    )
    assert np.array_equal(read(exact, "prompt_embeds"), pipeline_embeds(model, [PROMPT, ""], 77)[0])
    assert t5_error(int8, exact) < 0.05


def test_without_t5_its_part_is_zero(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """--no_t5 leaves CLIP's part as it is."""
    path = compute(tiny, photos, tmp_path / "e.parquet", "--no_t5", "--validation_prompt", PREVIEW_PROMPT)
    assert not read(path, "prompt_embeds")[:, 77:].any()
    assert np.array_equal(read(path, "prompt_embeds")[:, :77], read(embeddings, "prompt_embeds")[:, :77])


def test_both_clips_are_gone_before_t5_is_loaded(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One encoder at a time, so the peak is T5's alone."""
    alive, load_t5 = [], embed.load_t5

    def count_and_load(*args: object) -> torch.nn.Module:
        gc.collect()
        alive.append(sum(isinstance(thing, CLIPTextModelWithProjection) for thing in gc.get_objects()))
        return load_t5(*args)

    monkeypatch.setattr(embed, "load_t5", count_and_load)
    compute(tiny, photos, tmp_path / "e.parquet")
    assert alive == [0]


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_what_fp16_cannot_hold_is_an_error(value: float) -> None:
    """Not finite, or above fp16's range: an error that names the encoder."""
    with pytest.raises(SystemExit, match="T5 gave values that fp16 cannot hold"):
        embed.to_float16(torch.tensor([0.0, value]), "T5")


def test_a_failing_run_leaves_the_old_file(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file takes the old one's place only when it is complete."""
    path = compute(tiny, photos, tmp_path / "e.parquet", "--no_t5")
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", fail)
    with pytest.raises(OSError, match="No space"):
        compute(tiny, photos, path, "--no_t5", "--prompt", "another")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["e.parquet"]


def test_suffixes_in_any_case_sorted_hidden_ones_passed_over(tmp_path: Path) -> None:
    """The reference took *.jpeg alone."""
    names = ["b.JPG", "a.jpeg", "c.Png", "d.webp", "e.bmp", "f.TIFF", "g.tif", ".hidden.jpg", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    images, passed_over = embed.find_images(tmp_path)
    assert [path.name for path in images] == ["a.jpeg", "b.JPG", "c.Png", "d.webp", "e.bmp", "f.TIFF", "g.tif"]
    assert [path.name for path in passed_over] == ["notes.txt"]


@pytest.mark.parametrize("content", ["missing", "empty", "text"])
def test_no_pictures_is_an_error(content: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference wrote an empty file for a folder without pictures; files that are passed over are named."""
    folder = tmp_path / "photos"
    if content != "missing":
        folder.mkdir()
    if content == "text":
        (folder / "notes.txt").touch()
    with pytest.raises(SystemExit, match="is not a folder" if content == "missing" else "has no pictures"):
        compute(tiny, folder, tmp_path / "e.parquet")
    assert ("notes.txt" in capsys.readouterr().out) == (content == "text")
    assert not (tmp_path / "e.parquet").exists()


def test_a_file_that_cannot_be_written_is_told_before_encoding(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in its place costs no encoding."""
    monkeypatch.setattr(embed, "encode_prompts", lambda *_: pytest.fail("encoded"))
    with pytest.raises(SystemExit, match="cannot be written: Is a directory"):
        compute(tiny, photos, tmp_path)


def test_a_missing_model_is_one_message(photos: Path, tmp_path: Path) -> None:
    """What could not be loaded, and how to get at a gated repository."""
    with pytest.raises(SystemExit, match="Cannot load transformer of .*nowhere(.|\n)*hf auth login"):
        compute(tmp_path / "nowhere", photos, tmp_path / "e.parquet")


def test_what_an_encoder_does_not_see_is_said(
    tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt longer than an encoder's tokens is cut; the cut end is printed."""
    compute(tiny, photos, tmp_path / "e.parquet", "--no_t5", "--prompt", "x" * 72 + "farend")
    output = capsys.readouterr().out
    assert "CLIP-L reads 77 tokens" in output and "does not see 'end" in output


def reference_file(path: Path, photos: Path, embeddings: Path) -> Path:
    """The same embeddings as the reference's script writes them: a row per picture, flat lists of doubles."""
    prompt_embeds, pooled = read(embeddings, "prompt_embeds")[0], read(embeddings, "pooled_prompt_embeds")[0]
    lists = [prompt_embeds.flatten().astype(float).tolist(), pooled.astype(float).tolist()]
    rows = [(embed.hash_image(image), *lists) for image in sorted(photos.iterdir())]
    pd.DataFrame(rows, columns=["image_hash", "prompt_embeds", "pooled_prompt_embeds"]).to_parquet(path)
    return path


def test_files_of_the_reference_are_read(photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """A row per picture, and no fixed 154 x 4096."""
    path = reference_file(tmp_path / "old.parquet", photos, embeddings)
    old = trainer.PromptEmbeddings(path, tiny_pipeline.T5_WIDTH)
    new = trainer.PromptEmbeddings(embeddings, tiny_pipeline.T5_WIDTH)
    assert old.prompt_of_image.keys() == new.prompt_of_image.keys()
    for image_hash in old.prompt_of_image:
        for mine, theirs in zip(old[old.prompt_of_image[image_hash]], new[PROMPT], strict=True):
            assert torch.equal(mine, theirs.float())


def test_the_trainer_reads_what_was_written(embeddings: Path) -> None:
    """Every prompt's row, by its text."""
    table = trainer.PromptEmbeddings(embeddings, tiny_pipeline.T5_WIDTH)
    stored, pooled = read(embeddings, "prompt_embeds"), read(embeddings, "pooled_prompt_embeds")
    for row, prompt in enumerate([PROMPT, PREVIEW_PROMPT, ""]):
        prompt_embeds, pooled_prompt_embeds = table[prompt]
        assert np.array_equal(prompt_embeds, stored[row]) and np.array_equal(pooled_prompt_embeds, pooled[row])


@pytest.fixture
def captioned(photos: Path, tmp_path: Path) -> Path:
    """Pictures with captions of their own, in a sidecar and in a metadata file."""
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "a.txt").write_text("sks dog\n asleep\n", "utf-8-sig")
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,text\nb.JPEG,a dog in the snow\na.jpg,overruled\n")
    return tmp_path / "photos"


def captions_of(folder: Path) -> dict[str, list[str]]:
    return embed.caption_images(embed.parse_args(["--local_data_dir", str(folder), "--prompt", PROMPT]))


def test_pictures_have_their_own_captions(captioned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NAME.txt wins over a metadata file, which wins over --prompt; neither is passed over as no picture."""
    captions = captions_of(captioned)
    hashes = {name: [embed.hash_image(captioned / name)] for name in ("a.jpg", "b.JPEG")}
    assert captions["sks dog asleep"] == hashes["a.jpg"] and captions["a dog in the snow"] == hashes["b.JPEG"]
    assert len(captions[PROMPT]) == 3 and captions[""] == []
    assert capsys.readouterr().out == f"5 pictures in {captioned}, 2 with their own captions; 4 distinct prompts\n"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.parquet"])
def test_metadata_in_other_formats(photos: Path, tmp_path: Path, name: str) -> None:
    """As datasets' ImageFolder takes it."""
    shutil.copytree(photos, tmp_path / "photos")
    table = pd.DataFrame({"file_name": ["a.jpg", "c.png"], "text": ["one", "2"], "other": [1, 2]})
    path = tmp_path / "photos" / name
    table.to_parquet(path) if "parquet" in name else table.to_json(path, orient="records", lines=True)
    assert {"one", "2", PROMPT, ""} == set(captions_of(tmp_path / "photos"))


def test_all_that_is_wrong_with_captions_in_one_message(captioned: Path) -> None:
    """Empty, not UTF-8, of no picture, of two equal pictures, in a broken file: each is named."""
    (captioned / "c.txt").write_text(" \n")
    (captioned / "d.txt").write_bytes("ä".encode("latin-1"))
    shutil.copy(captioned / "a.jpg", captioned / "f.jpg")
    (captioned / "metadata.csv").write_text("file_name,text\nzebra.jpg,a zebra\n")
    (captioned / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\n')
    with pytest.raises(SystemExit) as stop:
        captions_of(captioned)
    expected = ["zebra.jpg, but no such", "c.png are empty", "d.txt cannot be read", "f.jpg are the same picture"]
    expected += ["metadata.jsonl cannot be read: it has no column 'text'"]
    assert all(part in str(stop.value) for part in expected)
