"""Preflight: all problems in one message, before a model is loaded; and the dry run."""

import json
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from PIL import Image

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, Train, compute, parse


def test_all_problems_are_reported_at_once(train: Train, tmp_path: Path) -> None:
    """A bad image, an image and a prompt without embeddings, a wrong layer; with the command that fixes it."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    (folder / "bad.jpg").write_text("not an image")
    Image.new("RGB", (64, 64)).save(folder / "new.png")
    flags = ["--lora_layers=to_q,nothing", "--validation_prompt", "unknown prompt"]
    with pytest.raises(SystemExit) as exit_info:
        train(*flags, instance_data_dir=folder)
    message = str(exit_info.value)
    parts = ["bad.jpg", "1 of 1 image", "new.png", "'unknown prompt'"]
    parts += ["no linear layer nothing", "compute_embeddings.py ", f"--prompt '{PROMPT}'"]
    assert [part for part in parts if part not in message] == [] and f"--local_data_dir '{folder}'" in message
    assert not (tmp_path / "out").exists()


def test_an_old_torchao_is_one_message(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Colab and Kaggle have one, which PEFT refused after the photos were encoded."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    (tmp_path / "torchao-0.10.0.dist-info").mkdir()
    (tmp_path / "torchao-0.10.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0"
    )
    monkeypatch.syspath_prepend(tmp_path)
    peft.import_utils.is_torchao_available.cache_clear()
    try:
        with pytest.raises(SystemExit, match="torchao.*0.10.*pip uninstall -y torchao"):
            train()
    finally:
        peft.import_utils.is_torchao_available.cache_clear()
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_cannot_start_is_one_message(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing login costs no latents."""

    def start(*_: object, **__: object) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(trainer.Accelerator, "init_trackers", start)
    monkeypatch.setattr(trainer, "load_vae", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="--report_to tensorboard: api_key not configured"):
        train()


def test_a_machine_without_a_gpu_is_told(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Its torch is usually a build for CPUs; the plan has the command that replaces it, and the estimate says CPU."""
    train(max_train_steps=1)
    said = capsys.readouterr().out
    assert f"no GPU: torch {torch.__version__}" in said and "--torch-backend=auto" in said
    assert "s per step on a CPU" in said


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images with shapes and captions, and steps; a problem ends it as it ends a run."""
    monkeypatch.setattr(trainer, "load_transformer", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(trainer, "load_vae", lambda *_: pytest.fail("loaded"))
    output = train("--dry_run", "--aspect_ratio_buckets", "--gradient_accumulation_steps=5")
    told = capsys.readouterr().out
    assert "a.jpg: trained as 80 x 48" in told
    assert told.count(repr(PROMPT)) == 5 and "4 steps of 5 samples: 4.0 epochs, seed 0" in told
    assert not output.exists()
    with pytest.raises(SystemExit, match="no embeddings for 'a cow'"):
        train("--dry_run", "--validation_prompt=a cow")


@pytest.mark.parametrize(("flags", "part"), [
    (["--data_df_path=nowhere.parquet"], "--data_df_path nowhere.parquet .*--t5_precision exact"),
    (["--instance_data_dir=nowhere"], "--instance_data_dir /.*/nowhere does not exist"),
    (["--resume_from_checkpoint=nowhere"], "--resume_from_checkpoint nowhere"),
    (["--pretrained_model_name_or_path=nowhere/nothing"], "Cannot load nowhere/nothing: the Hub does not answer"),
    (["--instance_prompt=another prompt"], f"has no embeddings for 'another prompt'. It has: '{PROMPT}'"),
    (["--max_sequence_length=256"], "has 77 T5 tokens, not --max_sequence_length 256"),
    (["--resolution=1040"], "--resolution 1040 .*1040 pixels .*1024"),
    (["--report_to=comet_ml"], "--report_to comet_ml is not installed"),
    (["--with_prior_preservation", "--class_prompt=a dog"], "(?s)no embeddings for 'a dog'.*--class_prompt 'a dog'"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_a_model_loads(
    train: Train, monkeypatch: pytest.MonkeyPatch, flags: list[str], part: str
) -> None:
    """One message, exit code 1."""
    monkeypatch.setattr(trainer, "load_vae", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=part):
        train(*flags)


def test_the_plan_says_how_many_class_images_are_to_be_made(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that are there need not be."""
    Image.new("RGB", (64, 64)).save(tmp_path / "mine.png")
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", f"--class_data_dir={tmp_path}"]
    train("--dry_run", *flags, "--num_class_images=7")
    assert "to generate first: 6 class images" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["a.jpg", ""], ids=["a photo", "a folder"])
def test_what_is_no_parquet_file_is_not_offered_to_be_written_over(train: Train, photos: Path, given: str) -> None:
    """A photo, given as --data_df_path by mistake, was in the command as the file to write."""
    with pytest.raises(SystemExit) as stop:
        train("--dry_run", data_df_path=photos / given)
    assert ".parquet" in str(stop.value.code) and "--output_path" not in str(stop.value.code)


def notes_of(output: str, part: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("note: ") and part in line]


def test_small_and_long_photos_are_noted(
    train: Train, tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are enlarged, or mostly cut off: one note each, with the count and the first."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    for name, size in [("small.png", (64, 24)), ("tiny.png", (72, 1)), ("wide.png", (600, 64))]:
        Image.new("RGB", size).save(folder / name)
    embeddings = compute(tiny, folder, tmp_path / "e.parquet", "--no_t5")
    train("--dry_run", instance_data_dir=folder, data_df_path=embeddings)
    output = capsys.readouterr().out
    [small] = notes_of(output, "enlarged")
    [long] = notes_of(output, "less than half")
    assert "2 images" in small and "small.png" in small and "3 images" in long and "small.png" in long
    train("--dry_run")
    assert not notes_of(capsys.readouterr().out, "first")


@pytest.mark.parametrize(("caption", "noted"), [("a dog asleep", True), ("SKS, asleep", False)])
def test_a_caption_without_the_rare_word_is_noted(
    train: Train, tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caption: str, noted: bool
) -> None:  # fmt: skip
    """The LoRA would not answer to it. CLIP's vocabulary tells that "sks" is the rare word, and "dog" is not."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "c.txt").write_text(caption)
    embeddings = compute(tiny, folder, tmp_path / "e.parquet", "--no_t5")
    train("--dry_run", instance_data_dir=folder, data_df_path=embeddings)
    notes = notes_of(capsys.readouterr().out, "captions without")
    assert len(notes) == noted and all("sks" in note and "1 (first: " in note and "c.png" in note for note in notes)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.txt").unlink(),
        lambda folder: (folder / "c.txt").write_text("sks dog asleep"),
        lambda folder: (folder / "a.txt").write_text("sks dog asleep"),
        lambda folder: (folder / "metadata.csv").write_text("file_name,text\nc.png,sks dog asleep\n"),
    ],
    ids=["deleted", "added", "changed", "a table"],
)
def test_other_captions_than_those_of_the_embeddings_are_refused(
    train: Train, tiny: Path, photos: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """With the command that computes them, whatever the files' dates are."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "a.txt").write_text("sks dog awake")
    embeddings = compute(tiny, folder, tmp_path / "e.parquet", "--no_t5")
    train("--dry_run", instance_data_dir=folder, data_df_path=embeddings)
    change(folder)
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    with pytest.raises(SystemExit, match=f"(?s)Captions .*{embeddings}.*Run: python compute_embeddings.py"):
        train("--dry_run", instance_data_dir=folder, data_df_path=embeddings)


@pytest.mark.parametrize("name", ["joint_attention_dim", "pooled_projection_dim"])
def test_widths_of_another_model_are_refused(train: Train, tiny: Path, tmp_path: Path, name: str) -> None:
    """Embeddings must have the transformer's widths."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {name: 96}))
    with pytest.raises(SystemExit, match="computed with a different type of model"):
        train(pretrained_model_name_or_path=model)


def test_emulated_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 says that it can do bf16, but only emulates it."""
    t4 = types.SimpleNamespace(mixed_precision="bf16", device=torch.device("cuda"), is_main_process=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    problems = trainer.Problems(t4)
    trainer.check_machine(parse("--report_to=none"), t4, problems)
    assert problems.problems == ["Tesla T4 only emulates bf16; use --mixed_precision fp16."]


@pytest.mark.parametrize("flags", [["--variant=fp16"], []])
def test_weights_of_another_variant_are_seen_before_anything_loads(
    train: Train, tiny: Path, tmp_path: Path, flags: list[str]
) -> None:
    """With and without --variant, the part is named, with the files that there are."""
    model = shutil.copytree(tiny, tmp_path / "model")
    name = "diffusion_pytorch_model.safetensors"
    if not flags:
        for path in sorted(model.rglob(name)):
            path.rename(path.with_suffix(".fp16.safetensors"))
        name = "diffusion_pytorch_model.fp16.safetensors"
    with pytest.raises(SystemExit, match=f"transformer of {model}.*It has: {name}.*--variant"):
        train("--dry_run", *flags, pretrained_model_name_or_path=model)
