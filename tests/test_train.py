"""The trainer from end to end: what it writes, that it resumes exactly, and what it refuses to start on."""

import itertools
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from diffusers.models.attention import JointTransformerBlock
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import quantized_on_cpu
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, RANK, ROOT, compute, equal, logged, lora

Train = Callable[..., Path]
REFERENCE_COMMAND = """--mixed_precision="fp16" --instance_prompt="a photo of sks dog" --resolution=1024
--train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing --use_8bit_adam --learning_rate=1e-4
--report_to="tensorboard" --lr_scheduler="constant" --lr_warmup_steps=0 --seed="0" """
PREVIEWS = f"--validation_prompt={PREVIEW_PROMPT}"
LATEST = "--resume_from_checkpoint=latest"
# What another value of each flag does to a run that resumes, and such a value ({0} is a folder).
REFUSED = {  # with it the state of the optimizer, the latents or the order of the samples would mean something else
    "seed": 1, "variant": "fp16", "rank": 32, "lora_alpha": 7, "lora_layers": "to_q",
    "optimizer": "paged_adamw_8bit", "use_8bit_adam": True, "resolution": 80, "aspect_ratio_buckets": "64,64;80,48",
    "center_crop": True, "random_flip": True, "alpha_mask": True, "with_prior_preservation": True,
    "num_class_images": 3,
}  # fmt: skip
NOTED = {  # it is followed, and the user hears of it
    "revision": "main", "instance_prompt": PREVIEW_PROMPT,
    "caption_dropout": 0.1, "class_prompt": "a dog", "prior_loss_weight": 0.5, "lora_dropout": 0.1,
    "num_train_epochs": 7, "max_train_steps": 3, "learning_rate": 1e-4,
    "scale_lr": True, "lr_scheduler": "linear", "lr_warmup_steps": 2, "lr_num_cycles": 3, "lr_power": 2,
    "weighting_scheme": "mode", "logit_mean": 0.5, "logit_std": 0.5, "mode_scale": 1, "precondition_outputs": 1,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.1, "adam_epsilon": 1e-6, "max_grad_norm": 2,
    "mixed_precision": "bf16", "quantize_base": "nf4", "allow_tf32": True,
}  # fmt: skip
SILENT = {  # the LoRA stays the same, to the bit
    "pretrained_model_name_or_path": "{0}/moved", "pretrained_lora_path": "{0}/out/checkpoint-1",
    "output_dir": "{0}/elsewhere", "cache_dir": "{0}/cache", "instance_data_dir": "{0}/moved photos",
    "data_df_path": "{0}/moved.parquet", "max_sequence_length": 77, "dataloader_num_workers": 1,
    "class_data_dir": "{0}/class", "sample_batch_size": 2, "gradient_checkpointing": True,
    "prior_generation_precision": "fp16", "local_rank": 0, "validation_prompt": PREVIEW_PROMPT,
    "negative_prompt": PROMPT, "num_validation_images": 2, "validation_epochs": 9, "validation_steps": 3,
    "num_inference_steps": 1, "guidance_scale": 2, "checkpointing_steps": 7, "checkpoints_total_limit": 5,
    "resume_from_checkpoint": "{0}/out/checkpoint-1", "report_to": "none", "logging_dir": "elsewhere",
    "hub_private_repo": True, "hub_model_id": "me/dog", "hub_token": "hf_token",
}  # fmt: skip
SILENT_BUT_FOR_THE_BITS = {"train_batch_size": 2, "gradient_accumulation_steps": 1}  # sums in another order
SILENT_AND_NO_TRAINING = {"dry_run": True, "push_to_hub": True}


def state(checkpoint: Path) -> dict:
    return torch.load(checkpoint / trainer.STATE_NAME, weights_only=True)


def names(checkpoints: list[Path]) -> list[str]:
    return [path.name for path in checkpoints]


def parse(*flags: str) -> object:
    required = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e"]
    return trainer.parse_args([*required, "--instance_prompt=p", *flags])


def command(values: dict[str, object], folder: Path) -> list[str]:
    """A table's flags with their values."""
    texts = {name: str(value).format(folder) for name, value in values.items()}
    return [f"--{name}" if values[name] is True else f"--{name}={text}" for name, text in texts.items()]


def test_a_run_writes_these_files_and_no_others(train: Train) -> None:
    """LoRA, card, samples, checkpoints, latents, logs; TensorBoard gets the sheet of all previews once, at the end."""
    output = train("--checkpointing_steps=2", PREVIEWS, "--validation_steps=2")
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    latents = {file for file in files if re.fullmatch(r"latents/[0-9a-f]{16}\.safetensors", file)}
    files = {file for file in files if not file.startswith("logs/")}
    samples = {f"samples/step-{step:06d}-prompt-0-0.png" for step in (0, 2, 4)} | {"samples/progress.png"}
    expected = {f"checkpoint-{n}/{part}" for n in (2, 4) for part in (trainer.LORA_NAME, trainer.STATE_NAME)} | samples
    assert len(latents) == 5 and files - latents == expected | {".lock", "README.md", trainer.LORA_NAME}
    assert len(logged(output)) == 4 and Image.open(output / max(samples)).size == (64, 64)
    events = EventAccumulator(str(next((output / "logs").rglob("events.out*")).parent)).Reload()
    shown = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {PREVIEW_PROMPT: [0, 2, 4], "progress": [4]}


@pytest.mark.parametrize("flags", [
    [], ["--use_8bit_adam", "--aspect_ratio_buckets"], ["--optimizer=paged_adamw_8bit"],
    ["--use_8bit_adam", "--mixed_precision=bf16", "--gradient_checkpointing"],
    ["--use_8bit_adam", "--mixed_precision=fp16"], ["--lora_dropout=0.2", "--random_flip", "--lora_alpha=48"],
    ["--lora_alpha=7", "--mixed_precision=bf16", "--caption_dropout=0.5"],
])  # fmt: skip
def test_resumed_equals_uninterrupted(train: Train, flags: list[str]) -> None:
    """Bit for bit: LoRA, optimizer, schedule, loss scale and logged losses; from a path outside the output folder."""
    flags = [*flags, "--gradient_accumulation_steps=2", "--lr_scheduler=cosine", "--checkpointing_steps=2"]
    whole = train(*flags, output="whole")
    assert trainer.list_checkpoints(whole)[-1].name == "checkpoint-4"
    resumed = train(*flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}", output="resumed")
    assert equal(lora(whole), lora(resumed))
    assert equal(state(whole / "checkpoint-4"), state(resumed / "checkpoint-4"))
    assert logged(whole)[2:] == logged(resumed) and len(logged(resumed)) == 2
    if any("8bit" in flag for flag in flags):
        states = state(whole / "checkpoint-4")["optimizer"]["state"].values()
        moments = [each["__bnb_optimizer_quant_state__"][name] for each in states for name in ("state1", "state2")]
        assert moments and all(moment.dtype == torch.uint8 for moment in moments)
    if "--mixed_precision=fp16" in flags:
        assert "scale" in state(whole / "checkpoint-4")["scaler"]


def test_resuming_ends_at_max_train_steps(train: Train) -> None:
    """The reference went from step 2 of 4 to step 5. Folders of other names, which broke it, do no harm."""
    output = train("--checkpointing_steps=2", "--max_train_steps=2")
    (output / "checkpoints").mkdir()
    (output / "checkpoint-²").mkdir()
    train("--checkpointing_steps=1", LATEST)
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert len(logged(output)) == 4


def test_a_finished_run_resumed_ends_well(train: Train) -> None:
    """The reference crashed; here the LoRA is written once more, the same."""
    output = train("--checkpointing_steps=4")
    before = lora(output)
    train("--checkpointing_steps=4", LATEST)
    assert equal(before, lora(output)) and len(logged(output)) == 4


def test_resuming_latest_without_a_checkpoint_starts_anew(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the reference, with a line that says so."""
    assert len(logged(train(LATEST))) == 4
    assert "starting from the beginning" in capsys.readouterr().out


@pytest.fixture
def resume(train: Train, tiny: Path, photos: Path, tmp_path: Path) -> Train:
    """Run the trainer for one step in folders of this test's own; what is returned resumes that, with changes."""
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copytree(photos, tmp_path / "photos")
    Image.new("L", (128, 96), "gray").save(tmp_path / "photos" / "a.mask.png")
    (tmp_path / "photos" / "b.txt").write_text(PREVIEW_PROMPT)
    flags = [f"--negative_prompt={PROMPT}", "--t5_precision=exact"]
    compute(tiny, tmp_path / "photos", tmp_path / "embeddings.parquet", *flags)
    places = {"pretrained_model_name_or_path": tmp_path / "model", "instance_data_dir": tmp_path / "photos"}
    places["data_df_path"] = tmp_path / "embeddings.parquet"

    def resume(*flags: str, **changes: object) -> Path:
        shared = ["--gradient_accumulation_steps=2", f"--resume_from_checkpoint={tmp_path / 'out' / 'checkpoint-1'}"]
        return train(*shared, *flags, **(places | changes))

    train("--gradient_accumulation_steps=2", "--checkpointing_steps=1", "--alpha_mask", **places, output="masked")
    train("--gradient_accumulation_steps=2", "--checkpointing_steps=1", **places)
    return resume


def test_the_table_has_every_flag() -> None:
    """So that a new one cannot come without a thought about what it means on resume."""
    silent = SILENT | SILENT_BUT_FOR_THE_BITS | SILENT_AND_NO_TRAINING
    assert sorted([*REFUSED, *NOTED, *silent]) == sorted(vars(parse()))
    assert silent.keys() == trainer.MAY_CHANGE
    found_out = {"images and captions", "embeddings", "base model", "samples per step", "samples per micro-batch"}
    assert REFUSED.keys() | found_out == trainer.MUST_NOT_CHANGE


def test_what_must_not_change_is_refused(resume: Train, tmp_path: Path) -> None:
    """Every difference is named, in one message."""
    for path in (tmp_path / "model").rglob("diffusion_pytorch_model.safetensors"):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    with pytest.raises(SystemExit) as exit_info:
        resume(*command(REFUSED, tmp_path), f"--class_prompt={PREVIEW_PROMPT}", "--dry_run")
    message = str(exit_info.value)
    assert [name for name in REFUSED if f"was trained with {name} " not in message] == []
    assert "seed 0, this run has 1" in message


def test_what_is_followed_is_noted(
    resume: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every difference is named, in one note."""
    quantized_on_cpu.allow(monkeypatch.setattr)
    resume(*command(NOTED, tmp_path), "--dry_run")
    [note] = [line for line in capsys.readouterr().out.splitlines() if "was trained with" in line]
    assert [name for name in NOTED if not re.search(rf"\b{name} .*, this run has", note)] == []


def test_what_makes_no_other_lora_is_not_mentioned(
    resume: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all of it changed the resumed run ends with the same LoRA, to the bit."""
    monkeypatch.setattr(trainer.HfApi, "whoami", lambda *_: {})
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    shutil.copytree(tmp_path / "photos", tmp_path / "moved photos")
    shutil.copy(tmp_path / "embeddings.parquet", tmp_path / "moved.parquet")
    resume(*command(SILENT | SILENT_BUT_FOR_THE_BITS | SILENT_AND_NO_TRAINING, tmp_path))
    assert "trained with" not in capsys.readouterr().out
    resume(*command(SILENT, tmp_path))
    assert equal(lora(tmp_path / "elsewhere"), lora(tmp_path / "out"))


def recompute_embeddings(*flags: str) -> Callable[[Path], object]:
    return lambda folder: compute(folder / "model", folder / "photos", folder / "embeddings.parquet", *flags)


def recaption(folder: Path) -> None:
    (folder / "photos" / "b.txt").write_text(PROMPT)
    recompute_embeddings("--t5_precision=exact")(folder)


def replace_model(folder: Path) -> None:
    """By weights of the same names and shapes."""
    path = folder / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(path).items()}, path, {"format": "pt"})


def add_image(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "photos" / "f.png")
    recompute_embeddings("--t5_precision=exact")(folder)


@pytest.mark.parametrize(("change", "difference"), [
    (recompute_embeddings("--no_t5"), "embeddings"),
    (recompute_embeddings("--t5_precision=exact", "--max_sequence_length=100"), "embeddings"),
    (recaption, "images and captions"),
    (add_image, "images and captions"),
    (lambda folder: (folder / "photos" / "c.png").unlink(), "images and captions"),
    (replace_model, "base model"),
])  # fmt: skip
def test_other_data_are_refused(
    resume: Train, tmp_path: Path, change: Callable[[Path], object], difference: str
) -> None:
    """Embeddings without T5 or of another length, other captions or images, another model of the same name."""
    change(tmp_path)
    with pytest.raises(SystemExit, match=f"The checkpoint was trained with {difference} "):
        resume("--dry_run")


def test_other_masks_are_refused(resume: Train, tmp_path: Path) -> None:
    """The images are the same, their loss is not."""
    masked = f"--resume_from_checkpoint={tmp_path / 'masked' / 'checkpoint-1'}"
    resume("--alpha_mask", masked, "--dry_run")
    Image.new("L", (128, 96), "black").save(tmp_path / "photos" / "a.mask.png")
    with pytest.raises(SystemExit, match="The checkpoint was trained with images and captions "):
        resume("--alpha_mask", masked, "--dry_run")


def test_files_of_another_variant_make_no_other_model(resume: Train, tmp_path: Path) -> None:
    """What is not loaded does not count."""
    for path in (tmp_path / "model").rglob("diffusion_pytorch_model.safetensors"):
        path.with_suffix(".fp16.safetensors").write_bytes(b"other weights")
    resume("--dry_run")


def test_another_number_of_samples_a_step_is_refused(resume: Train) -> None:
    """The step that the checkpoint counts would be another one; how the samples are made up does not matter."""
    with pytest.raises(SystemExit, match="The checkpoint was trained with samples per step 2, this run has 8."):
        resume("--train_batch_size=4", "--dry_run")


def test_a_learning_rate_lowered_on_resume_is_followed(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """From the next step on, along the schedule, with a note."""
    flags = ["--lr_scheduler=linear", "--checkpointing_steps=2"]
    start = f"--resume_from_checkpoint={train(*flags) / 'checkpoint-2'}"
    lower = train(*flags, start, output="lower", learning_rate=1e-4)
    assert logged(lower, "lr") == pytest.approx([0.5e-4, 0.25e-4])
    assert "learning_rate 0.001, this run has 0.0001, which is followed" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["adam_beta1=0.1", "adam_beta2=0.5", "adam_epsilon=1", "adam_weight_decay=99"])
def test_other_settings_of_the_optimizer_are_followed_on_resume(train: Train, flag: str) -> None:
    """Not those that its saved state holds."""
    start = f"--resume_from_checkpoint={train('--checkpointing_steps=2') / 'checkpoint-2'}"
    assert not equal(lora(train(start, output="same")), lora(train(start, f"--{flag}", output="other")))


def test_a_path_that_is_no_checkpoint_is_refused(train: Train) -> None:
    """With what there is instead."""
    train("--checkpointing_steps=2")
    with pytest.raises(SystemExit, match="has: checkpoint-2, checkpoint-4"):
        train("--resume_from_checkpoint=checkpoint-3")


def test_only_the_newest_checkpoints_are_kept(train: Train) -> None:
    """--checkpoints_total_limit; those of an earlier run with higher numbers go first, and a user's own copy stays."""
    output = train("--checkpointing_steps=2", "--checkpoints_total_limit=2", max_train_steps=6)
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-4", "checkpoint-6"]
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-4-good")
    train("--checkpointing_steps=1", "--checkpoints_total_limit=1", "--seed=1", max_train_steps=3)
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-4-good"]


def test_the_latest_checkpoint_is_the_one_that_was_saved_last(train: Train) -> None:
    """Not the highest, which an earlier run in the same folder has left."""
    expected = lora(train("--checkpointing_steps=1", output="alone"))
    train("--checkpointing_steps=6", learning_rate=0.1, max_train_steps=6)
    train("--checkpointing_steps=2", max_train_steps=2)
    assert equal(lora(train(LATEST)), expected)


def test_a_clock_that_was_set_back_costs_no_new_checkpoint(train: Train) -> None:
    """The one that was just saved stays, even if another claims to be of tomorrow."""
    newest = train("--checkpointing_steps=6", max_train_steps=6) / "checkpoint-6" / trainer.STATE_NAME
    tomorrow = newest.stat().st_mtime + 86400
    os.utime(newest, (tomorrow, tomorrow))
    output = train("--checkpointing_steps=2", "--checkpoints_total_limit=1")
    assert {*names(trainer.list_checkpoints(output))} >= {"checkpoint-4", "checkpoint-6"}


def test_the_seed_decides(train: Train) -> None:
    """Seed 0 gives the same LoRA again, seed 1 another."""
    first, again, other = train(output="a"), train(output="b"), train("--seed=1", output="c")
    assert equal(lora(first), lora(again)) and not equal(lora(first), lora(other))


def test_an_unset_seed_is_drawn_printed_and_stored(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """And a resumed run takes it from the checkpoint."""
    seed = state(train("--checkpointing_steps=1", seed=None, max_train_steps=1) / "checkpoint-1")["settings"]["seed"]
    assert f"seed {seed}" in capsys.readouterr().out
    train(LATEST, seed=None)
    assert f"seed {seed}" in capsys.readouterr().out


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are encoded from now on; the third one ends in Ctrl-C."""
    encoded, encode_image = [], trainer.encode_image

    def encode_or_end(vae: torch.nn.Module, example: trainer.Example, *rest: object) -> dict[str, torch.Tensor]:
        encoded.append(example.path.name)
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode_image(vae, example, *rest)

    monkeypatch.setattr(trainer, "encode_image", encode_or_end)
    return encoded


def test_an_interrupted_encoding_goes_on(
    train: Train, encoded: list[str], tiny: Path, photos: Path, tmp_path: Path
) -> None:
    """Only what is missing is encoded: three of five images, then none, then a new one."""
    expected = ["a.jpg", "b.JPEG", "c.png"]
    with pytest.raises(SystemExit, match="Interrupted. What was saved is whole: run the same command again."):
        train()
    assert encoded == expected
    train()
    assert encoded[3:] == ["c.png", "d.webp", "e.bmp"]
    train()
    assert len(encoded) == 6
    folder = shutil.copytree(photos, tmp_path / "photos")
    Image.new("RGB", (64, 64)).save(folder / "f.png")
    train(instance_data_dir=folder, data_df_path=compute(tiny, folder, tmp_path / "f.parquet", "--no_t5"))
    assert encoded[6:] == ["f.png"]


def test_the_schedule_counts_optimizer_steps(train: Train) -> None:
    """Two steps of warm-up are two optimizer steps, whatever the accumulation."""
    flags = ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=2", "--gradient_accumulation_steps=3"]
    assert logged(train(*flags), "lr") == pytest.approx([0, 0.0005, 0.001, 0.001])


SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_diffusers_is_followed(train: Train, schedule: str) -> None:
    """The logged learning rates are those of diffusers' schedule, with two restarts or a warm-up."""
    output = train(f"--lr_scheduler={schedule}", "--lr_num_cycles=2", "--lr_power=2", max_train_steps=6,
                   lr_warmup_steps=2)  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    steps = {"num_warmup_steps": 2, "num_training_steps": 6, "num_cycles": 2, "power": 2.0}
    expected = trainer.diffusers.optimization.get_scheduler(schedule, optimizer, **steps)
    for learning_rate in logged(output, "lr"):
        assert learning_rate == pytest.approx(expected.get_last_lr()[0])
        expected.step()


@pytest.mark.parametrize(("flags", "kind"), [
    ([], "AdamW"), (["--use_8bit_adam"], "AdamW8bit"), (["--optimizer=adamw_8bit"], "AdamW8bit"),
    (["--optimizer=paged_adamw_8bit"], "PagedAdamW8bit"),
])  # fmt: skip
def test_optimizers(flags: list[str], kind: str) -> None:
    """AdamW, in 8 bit, paged; --use_8bit_adam is a name of the second."""
    assert type(trainer.make_optimizer([torch.nn.Parameter(torch.zeros(2))], parse(*flags), 1)).__name__ == kind


def test_scale_lr_multiplies_by_the_images_of_a_step(train: Train) -> None:
    """Two images at once, three times: six times the learning rate."""
    output = train("--scale_lr", "--train_batch_size=2", "--gradient_accumulation_steps=3", max_train_steps=1)
    assert logged(output, "lr") == pytest.approx([6e-3])


def test_epochs_are_passes_over_the_images(train: Train) -> None:
    """Five images, four samples a step: previews of every epoch come after steps 2, 3, 4, 5, 7 and 8 of nine."""
    flags = [PREVIEWS, "--validation_epochs=1", "--train_batch_size=4", "--num_inference_steps=1"]
    samples = train(*flags, max_train_steps=9) / "samples"
    steps = [int(path.name.split("-")[1]) for path in sorted(samples.glob("step-*"))]
    assert steps == [0, 2, 3, 4, 5, 7, 8, 9]


def test_num_train_epochs_gives_the_number_of_steps(train: Train) -> None:
    """ceil(2 epochs * 5 images / 4 samples)."""
    output = train("--num_train_epochs=2", "--gradient_accumulation_steps=4", max_train_steps=None)
    assert len(logged(output)) == 3


def test_previews_change_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without previews the LoRA is the same, bit for bit; no text encoder or second pipeline is loaded."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("loaded a text encoder or a pipeline")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", fail)
    for name in ("T5EncoderModel", "CLIPTextModelWithProjection"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
    for output, flags in (("plain", ["--lora_dropout=0.2"]), ("8bit", ["--use_8bit_adam"])):
        without = lora(train(*flags, output=output))
        assert equal(without, lora(train(*flags, PREVIEWS, "--validation_steps=1", output=f"{output} previewed")))


def test_previews_leave_no_hook_on_the_model(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's preview put offload hooks on the very model that was being trained."""
    models, publish = [], trainer.publish
    monkeypatch.setattr(trainer, "publish", lambda run, *rest: models.append(run.transformer) or publish(run, *rest))
    train(PREVIEWS, "--validation_steps=1")
    assert not any(hasattr(module, "_hf_hook") or module._forward_pre_hooks for module in models[0].modules())


def test_previews_have_fixed_noise(train: Train) -> None:
    """Run again, they are the same images; each number has its own noise."""
    flags = [PREVIEWS, "--num_validation_images=2", "--max_train_steps=1"]
    one, other = train(*flags, output="a") / "samples", train(*flags, output="b") / "samples"
    files = [path.name for path in sorted(one.glob("step-000001-*"))]
    assert len(files) == 2 and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    assert (one / files[0]).read_bytes() != (one / files[1]).read_bytes()


def test_progress_is_seen_at_a_glance(train: Train) -> None:
    """One sheet: a row per prompt, a column per preview, the first without LoRA; not those of a longer run."""
    flags = ["--validation_prompt", PREVIEW_PROMPT, PROMPT, "--validation_steps=2", "--num_validation_images=2"]
    samples = train(*flags, max_train_steps=6) / "samples"
    sheet = Image.open(samples / "progress.png")
    assert sheet.size == (4 * 256, 2 * 256)
    for column, step in enumerate((0, 2, 4, 6)):
        for row in (0, 1):
            box = (256 * column, 256 * row, 256 * column + 256, 256 * row + 256)
            alone = Image.open(samples / f"step-{step:06d}-prompt-{row}-0.png").resize((256, 256))
            assert list(sheet.crop(box).get_flattened_data()) == list(alone.get_flattened_data())
    assert len(list(samples.glob("step-000000-*"))) == 2 and len(list(samples.glob("step-000006-*"))) == 4
    train(*flags, max_train_steps=4)
    assert Image.open(samples / "progress.png").size == (3 * 256, 2 * 256)


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """Let this process open ten more files than it has."""
    lowest, before = os.open(os.devnull, os.O_RDONLY), resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_thousand_previews_make_one_sheet(tmp_path: Path, few_open_files: None) -> None:
    """Of at most 17 columns, from the first step to the last, with few files open at a time."""
    for step in range(1000):
        Image.new("RGB", (8, 8), (step % 256, step // 256, 0)).save(tmp_path / f"step-{step:06d}-prompt-0-0.png")
    args = types.SimpleNamespace(validation_prompt=[PREVIEW_PROMPT])
    sheet = trainer.draw_progress(types.SimpleNamespace(args=args, global_step=999), tmp_path)
    colors = [sheet.getpixel((256 * column, 0)) for column in range(sheet.width // 256)]
    steps = [256 * green + red for red, green, _ in colors]
    assert sheet.height == 256 and 10 <= len(steps) <= 17
    assert steps == sorted(steps) and (steps[0], steps[-1]) == (0, 999)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_launchers_precision_counts(train: Train, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The reference asked its own flag, left the LoRA in fp16 when the launcher set it, and the loss became nan."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    output = train("--checkpointing_steps=4")
    assert all(torch.isfinite(torch.tensor(logged(output))))
    assert all(value.dtype == torch.float32 for value in lora(output).values())
    assert state(output / "checkpoint-4")["settings"]["mixed_precision"] == precision


def test_sd35_trains(train: Train, tiny35: Path) -> None:
    """Dual attention and QK norm, from the same embeddings."""
    trained = lora(train("--lora_layers=to_q", pretrained_model_name_or_path=tiny35))
    attentions = {f"transformer.transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn")}
    assert trained.keys() == {f"{name}.to_q.lora_{side}.weight" for name in attentions for side in "AB"}


def test_gradient_accumulation_equals_a_larger_batch(train: Train) -> None:
    """Four samples at once or one after the other: the same losses and, but for rounding, the same LoRA."""
    whole = train("--train_batch_size=4", output="whole")
    parts = train("--gradient_accumulation_steps=4", output="parts")
    assert logged(whole) == pytest.approx(logged(parts), abs=1e-5)
    assert all(torch.allclose(value, lora(parts)[name], atol=1e-5) for name, value in lora(whole).items())


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let blocks run out of memory if more than so many keep their activations, which two blocks in all might."""
    kept, recomputing, forward, checkpoint = set(), [], JointTransformerBlock.forward, trainer.checkpoint

    def recompute(block: torch.nn.Module, *inputs: object, **options: object) -> object:
        def marked(*inputs: object) -> object:
            recomputing.append(block)
            try:
                return block(*inputs)
            finally:
                recomputing.pop()

        return checkpoint(marked, *inputs, **options)

    def set_room(room: int) -> None:
        def forward_in_room(block: torch.nn.Module, *inputs: object, **options: object) -> object:
            if torch.is_grad_enabled() and not recomputing:
                kept.add(block)
            if len(kept) > room:
                kept.clear()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(block, *inputs, **options)

        kept.clear()
        monkeypatch.setattr(JointTransformerBlock, "forward", forward_in_room)

    monkeypatch.setattr(trainer, "checkpoint", recompute)
    return set_room


@pytest.mark.parametrize("flags", [[], ["--lora_dropout=0.2", "--mixed_precision=fp16"]])
def test_as_few_blocks_recompute_as_the_memory_demands(
    train: Train, memory_for: Callable[[int], None], capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """None, half or all of two, found out by running out of memory; the LoRA is the same, to the bit."""
    outputs, said = [], []
    for room, count in ((2, 0), (1, 1), (0, 2)):
        memory_for(room)
        outputs.append(train(*flags, output=f"room for {room}"))
        said.append(f"{count} of 2 blocks recompute their activations" in capsys.readouterr().out)
    memory_for(0)
    outputs.append(train(*flags, "--gradient_checkpointing", output="asked"))
    said.append("2 of 2 blocks recompute their activations" in capsys.readouterr().out)
    assert said == [True] * 4 and all(equal(lora(outputs[0]), lora(output)) for output in outputs)
    assert all(logged(outputs[0]) == logged(output) for output in outputs)


def test_the_card_has_the_base_models_license_and_no_path(train: Train, tmp_path: Path) -> None:
    """Not openrail++, which is no license of SD3; the folder of the model is named without its path."""
    output = train(PREVIEWS, "--hub_model_id=me/dog")
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "other" and card.data.instance_prompt == PROMPT
    assert [each["output"]["url"] for each in card.data.widget] == ["samples/step-000004-prompt-0-0.png"]
    assert "openrail" not in str(card) and str(tmp_path.parent) not in str(card)


def test_without_a_tracker_nothing_is_logged(train: Train) -> None:
    """--report_to none."""
    assert not (train("--report_to=none") / "logs").exists()


def test_the_token_is_in_no_file(train: Train) -> None:
    """The reference wrote it into the tracker's configuration and uploaded the logs."""
    output = train("--hub_token=hf_secret_token", "--checkpointing_steps=2")
    assert all(b"hf_secret_token" not in path.read_bytes() for path in output.rglob("*") if path.is_file())


def test_all_problems_are_told_at_once(train: Train, tmp_path: Path) -> None:
    """A bad image, an image and a prompt without embeddings, a wrong layer; with the command that mends it."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    (folder / "bad.jpg").write_text("not an image")
    Image.new("RGB", (64, 64)).save(folder / "new.png")
    flags = ["--lora_layers=to_q,nothing", "--validation_prompt", "unknown prompt"]
    with pytest.raises(SystemExit) as exit_info:
        train(*flags, instance_data_dir=folder)
    message = str(exit_info.value)
    parts = ["bad.jpg is not a readable image", "1 of 1 images", "first: new.png", "'unknown prompt'"]
    parts += ["no linear layer nothing", f"compute_embeddings.py --prompt '{PROMPT}'"]
    assert [part for part in parts if part not in message] == [] and f"--local_data_dir '{folder}'" in message
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_and_writes_nothing(
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
    with pytest.raises(SystemExit, match="no embeddings of 'a cow'"):
        train("--dry_run", "--validation_prompt=a cow")


@pytest.mark.parametrize(("flags", "part"), [
    (["--data_df_path=nowhere.parquet"], "nowhere.parquet cannot be read"),
    (["--instance_data_dir=nowhere"], "--instance_data_dir nowhere has no images"),
    (["--pretrained_model_name_or_path=nowhere/nothing"], "Cannot load transformer of nowhere/nothing"),
    (["--instance_prompt=another prompt"], "has no embeddings of 'another prompt'"),
    (["--max_sequence_length=256"], "has 77 T5 tokens, not --max_sequence_length 256"),
    (["--resolution=1040"], "--resolution 1040 has a side of 1040 pixels, above the model's 1024"),
    (["--report_to=comet_ml"], "--report_to comet_ml is not installed"),
    (["--with_prior_preservation", "--class_prompt=a dog"], "(?s)no embeddings of 'a dog'.*--class_prompt 'a dog'"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_a_model_loads(
    train: Train, monkeypatch: pytest.MonkeyPatch, flags: list[str], part: str
) -> None:
    """One message, exit code 1."""
    monkeypatch.setattr(trainer, "load_vae", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=part):
        train(*flags)


@pytest.mark.parametrize("name", ["joint_attention_dim", "pooled_projection_dim"])
def test_widths_of_another_model_are_refused(train: Train, tiny: Path, tmp_path: Path, name: str) -> None:
    """Embeddings must have the transformer's widths."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {name: 96}))
    with pytest.raises(SystemExit, match="computed with another kind of model"):
        train(pretrained_model_name_or_path=model)


def test_emulated_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 says that it can do bf16, but only emulates it."""
    t4 = types.SimpleNamespace(mixed_precision="bf16", device=torch.device("cuda"), is_main_process=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    problems = list(trainer.check_machine(trainer.Run(parse("--report_to=none"), t4)))
    assert problems == ["Tesla T4 only emulates bf16; use --mixed_precision fp16."]


def test_the_references_own_command_line_runs_through_accelerate_launch(
    tiny: Path, photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """From its notebook, changed in paths, size and number of steps alone, and with TensorBoard for wandb."""
    paths = {"pretrained_model_name_or_path": tiny, "instance_data_dir": photos, "data_df_path": embeddings,
             "output_dir": tmp_path / "trained-sd3-lora", "max_train_steps": 1, "resolution": 64}  # fmt: skip
    flags = [*shlex.split(REFERENCE_COMMAND), *(f"--{name}={value}" for name, value in paths.items())]
    script = str(ROOT / "train_dreambooth_sd3_lora_miniature.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes=1", script, *flags]
    result = subprocess.run(launch, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(lora(tmp_path / "trained-sd3-lora")) == 2 * 15  # eight layers a block, the last without to_add_out
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert "1 steps of 4 samples" in result.stdout


def test_training_starts_from_another_lora(train: Train, tmp_path: Path) -> None:
    """With a learning rate of nothing the LoRA comes out as it went in; one of another rank is refused."""
    first = train(output="first") / trainer.LORA_NAME
    again = train(f"--pretrained_lora_path={first}", learning_rate=1e-30, adam_weight_decay=0, output="again")
    assert equal(lora(first.parent), lora(again))
    with pytest.raises(SystemExit, match="Cannot start:(.|\n)*is no LoRA in diffusers. layout, --rank 8 and"):
        train(f"--pretrained_lora_path={first}", rank=8, output="refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(SystemExit, match="cannot be loaded"):
        train(f"--pretrained_lora_path={tmp_path / 'none'}")


@pytest.mark.parametrize(("start", "alpha"), [(trainer.LORA_NAME, 4 * RANK), ("checkpoint-4", RANK)])
def test_another_lora_keeps_its_strength(train: Train, start: str, alpha: int) -> None:
    """Whatever --lora_alpha it was trained with, and whatever --lora_alpha goes on with."""
    first = train(f"--lora_alpha={2 * RANK}", "--checkpointing_steps=4", output="first")
    flags = [f"--pretrained_lora_path={first / start}", f"--lora_alpha={alpha}"]
    assert equal(lora(first), lora(train(*flags, learning_rate=1e-30, adam_weight_decay=0, output="again")))


def test_another_lora_is_not_rounded_to_the_bases_precision(train: Train) -> None:
    """Neither in bf16."""
    first = train(output="first")
    flags = [f"--pretrained_lora_path={first}", "--mixed_precision=bf16"]
    assert equal(lora(first), lora(train(*flags, learning_rate=1e-30, adam_weight_decay=0, output="again")))


def test_images_train_with_their_own_captions(train: Train, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Every image may have one; then the LoRA is another, and the instance prompt is still known."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    for number, path in enumerate(sorted(folder.iterdir())):
        path.with_suffix(".txt").write_text(f"sks dog number {number}")
    embeddings = compute(tiny, folder, tmp_path / "own.parquet", f"--prompt={PROMPT}", "--no_t5")
    plain = compute(tiny, photos, tmp_path / "plain.parquet", f"--prompt={PROMPT}", "--no_t5")
    own = train(instance_data_dir=folder, data_df_path=embeddings, output="own")
    assert not equal(lora(own), lora(train(data_df_path=plain, output="plain")))


def class_flags(folder: Path, count: int = 3) -> list[str]:
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", f"--class_data_dir={folder}"]
    return [*flags, f"--num_class_images={count}", "--sample_batch_size=2"]


def difference(one: Path, other: Path) -> int:
    """The largest difference of two images, of 255."""
    return int(np.abs(np.subtract(*(np.int16(Image.open(path)) for path in (one, other)))).max())


def test_class_images_are_generated_once_and_resumably(train: Train, tmp_path: Path) -> None:
    """From the stored embeddings; what is lost comes back the same but for rounding, the rest is left alone."""
    folder, before = tmp_path / "class", tmp_path / "before"
    train(*class_flags(folder))
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"class-0000{number}.png" for number in range(3)]
    assert all(difference(one, other) > 20 for one, other in itertools.combinations(files, 2))
    shutil.copytree(folder, before)
    kept = files[2].stat().st_mtime_ns
    files[1].unlink()
    train(*class_flags(folder))
    assert difference(files[1], before / files[1].name) <= 1
    assert sorted(folder.iterdir()) == files and files[2].stat().st_mtime_ns == kept


def test_class_images_of_another_class_are_not_reused(train: Train) -> None:
    """Each class prompt has its own folder."""
    flags = ["--with_prior_preservation", "--num_class_images=1", "--max_train_steps=1"]
    for more in ([f"--class_prompt={PREVIEW_PROMPT}"], [f"--class_prompt={PROMPT}"], [f"--class_prompt={PROMPT}"]):
        output = train(*flags, *more)
    assert len(list(output.glob("class_images-*/class-00000.png"))) == 2


def test_class_images_are_of_the_model_without_a_lora_to_start_from(train: Train, tmp_path: Path) -> None:
    """What is to be preserved is the model's class, not what another LoRA made of it."""
    start = train(learning_rate=0.1, output="start") / trainer.LORA_NAME
    train(*class_flags(tmp_path / "one"), output="one")
    train(*class_flags(tmp_path / "other"), f"--pretrained_lora_path={start}", output="other")
    files = sorted((tmp_path / "one").glob("class-*.png"))
    assert len(files) == 3 and all(difference(path, tmp_path / "other" / path.name) <= 1 for path in files)


def test_shapes_and_prior_preservation_train_together(train: Train, tmp_path: Path) -> None:
    """Upright and wide images of the subject, square ones of its class, in batches of two of one shape."""
    flags = [*class_flags(tmp_path / "class"), "--aspect_ratio_buckets", "--train_batch_size=2"]
    whole = train(*flags, output="whole")
    train(*flags, output="parts", max_train_steps=2, checkpointing_steps=2)
    parts = train(*flags, LATEST, output="parts")
    latents = [load_file(path)["mean"].shape[2:] for path in (whole / "latents").iterdir()]
    assert equal(lora(whole), lora(parts)) and len(latents) == 8 and len({*latents}) == 3
    with pytest.raises(SystemExit, match="samples per micro-batch 2, this run has 1"):
        train(*flags, LATEST, "--train_batch_size=1", "--gradient_accumulation_steps=2", output="parts")


def test_prior_preservation_resumes_exactly(train: Train, tmp_path: Path) -> None:
    """Two steps and two more give the LoRA of four; more or other class images are refused."""
    folder = tmp_path / "class"
    whole = train(*class_flags(folder), output="whole")
    train(*class_flags(folder), output="parts", max_train_steps=2, checkpointing_steps=2)
    parts = train(*class_flags(folder), LATEST, output="parts")
    assert equal(lora(whole), lora(parts)) and not equal(lora(whole), lora(train(output="plain")))
    with pytest.raises(SystemExit, match="num_class_images 3, this run has 4"):
        train(*class_flags(folder, 4), LATEST, output="parts")


def test_a_lost_class_image_is_made_again_on_resume(train: Train, tmp_path: Path) -> None:
    """By the model without its LoRA, so that it is the same but for rounding."""
    folder = tmp_path / "class"
    train(*class_flags(folder), max_train_steps=2, checkpointing_steps=2, learning_rate=0.1)
    shutil.copytree(folder, tmp_path / "before")
    (folder / "class-00001.png").unlink()
    output = train(*class_flags(folder), LATEST, learning_rate=0.1)
    assert difference(folder / "class-00001.png", tmp_path / "before" / "class-00001.png") <= 1
    assert len(logged(output)) == 4
