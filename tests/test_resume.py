"""A run that resumes: exactly where it stopped, and not with settings that would make it another run."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import quantized_on_cpu
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import LATEST, PREVIEW_PROMPT, PROMPT, RANK, Train, compute, equal, logged, lora, names, state

ANOTHER_VALUE = {  # another value for each flag; {0} stands for the folder of the test
    "seed": 1, "variant": "fp16", "rank": 32, "lora_alpha": 7, "lora_layers": "to_q",
    "optimizer": "paged_adamw_8bit", "use_8bit_adam": True, "resolution": 80, "aspect_ratio_buckets": "64,64;80,48",
    "center_crop": True, "random_flip": True, "alpha_mask": True, "with_prior_preservation": True,
    "num_class_images": 3, "class_every_n_samples": 8, "class_samples": "velocities",
    "revision": "main", "instance_prompt": PREVIEW_PROMPT,
    "caption_dropout": 0.1, "class_prompt": "a dog", "prior_loss_weight": 0.5, "lora_dropout": 0.1,
    "num_train_epochs": 7, "max_train_steps": 3, "learning_rate": 1e-4,
    "scale_lr": True, "lr_scheduler": "linear", "lr_warmup_steps": 2, "lr_num_cycles": 3, "lr_power": 2,
    "weighting_scheme": "mode", "logit_mean": 0.5, "logit_std": 0.5, "mode_scale": 1, "precondition_outputs": 1,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_weight_decay": 0.1, "adam_epsilon": 1e-6, "max_grad_norm": 2,
    "mixed_precision": "bf16", "quantize_base": "nf4", "compile": True, "allow_tf32": True,
    "pretrained_model_name_or_path": "{0}/moved", "pretrained_lora_path": "{0}/out/checkpoint-1",
    "output_dir": "{0}/elsewhere", "cache_dir": "{0}/cache", "instance_data_dir": "{0}/moved photos",
    "data_df_path": "{0}/moved.parquet", "max_sequence_length": 77, "dataloader_num_workers": 1,
    "class_data_dir": "{0}/class", "sample_batch_size": 2, "gradient_checkpointing": True,
    "prior_generation_precision": "fp16", "local_rank": 0, "validation_prompt": PREVIEW_PROMPT,
    "negative_prompt": PROMPT, "num_validation_images": 2, "validation_epochs": 9, "validation_steps": 3,
    "num_inference_steps": 1, "guidance_scale": 2, "checkpointing_steps": 7, "checkpoints_total_limit": 5,
    "resume_from_checkpoint": "{0}/out/checkpoint-1", "report_to": "none", "logging_dir": "elsewhere",
    "hub_private_repo": True, "hub_model_id": "me/dog", "hub_token": "hf_token",
    "train_batch_size": 2, "gradient_accumulation_steps": 1, "dry_run": True, "push_to_hub": True,
}  # fmt: skip
SAID_OTHERWISE = {"use_8bit_adam"}  # what it means is a value of another flag, --optimizer
SUMS_IN_ANOTHER_ORDER = {"train_batch_size", "gradient_accumulation_steps"}  # the same LoRA but for rounding
NO_TRAINING = {"dry_run", "push_to_hub"}


def values_of(on_resume: str, without: set[str] = frozenset()) -> dict[str, object]:
    """Another value of each flag that the trainer declares as refused, noted or free on resume."""
    names = [each.name for each in dataclasses.fields(trainer.Args) if each.metadata["on_resume"] == on_resume]
    return {name: ANOTHER_VALUE[name] for name in names if name not in without}


def active(values: dict[str, object]) -> dict[str, object]:
    """Flags with their values, but for those that would do nothing without another one, and so are refused."""
    idle = []
    for name, (needed, choices) in trainer.NEEDS.items():
        value = values.get(needed, getattr(trainer.Args, needed))
        if not (value in choices if choices else value):
            idle.append(name)
    return {name: value for name, value in values.items() if name not in idle}


def command(values: dict[str, object], folder: Path) -> list[str]:
    """A table's flags with their values."""
    values = active(values)
    texts = {name: str(value).format(folder) for name, value in values.items()}
    return [f"--{name}" if values[name] is True else f"--{name}={text}" for name, text in texts.items()]


@pytest.mark.parametrize("flags", [
    [], ["--use_8bit_adam", "--aspect_ratio_buckets"], ["--optimizer=paged_adamw_8bit"],
    ["--use_8bit_adam", "--mixed_precision=bf16", "--gradient_checkpointing"],
    ["--use_8bit_adam", "--mixed_precision=fp16"], ["--lora_dropout=0.2", "--random_flip", "--lora_alpha=48"],
    ["--lora_alpha=7", "--mixed_precision=bf16", "--caption_dropout=0.5"], ["--resolution", "48", "64"],
    ["--optimizer=prodigy", "--mixed_precision=fp16"], ["--optimizer=prodigy", "--adam_beta1=0"],
    ["--optimizer=adamw_schedulefree", "--mixed_precision=fp16"],
    ["--quantize_base=int8", "--mixed_precision=fp16", "--gradient_checkpointing"],
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


def test_more_steps_after_the_end_go_on_from_it(train: Train) -> None:
    """The end saves a checkpoint too, within --checkpoints_total_limit: 3 steps, continued to 6, are 6."""
    expected = lora(train(output="whole", max_train_steps=6))
    flags = ["--checkpointing_steps=2", "--checkpoints_total_limit=1"]
    output = train(*flags, max_train_steps=3)
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-3"]
    train(*flags, LATEST, max_train_steps=6)
    assert equal(lora(output), expected) and len(logged(output)) == 6


def test_a_finished_run_resumed_ends_well(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference crashed; here the LoRA is written once more, the same, and how to train on is said."""
    output = train("--checkpointing_steps=4")
    before = lora(output)
    train("--checkpointing_steps=4", LATEST)
    assert "--max_train_steps" in capsys.readouterr().out
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

    flags = ["--gradient_accumulation_steps=2", "--checkpointing_steps=1", "--checkpoints_total_limit=0"]
    train(*flags, "--alpha_mask", **places, output="masked")
    train(*flags, **places)
    return resume


def test_each_flag_declares_what_another_value_does_on_resume() -> None:
    """And has another value in the table above, so that a new flag is tried by the tests below."""
    assert sorted(ANOTHER_VALUE) == sorted(each.name for each in dataclasses.fields(trainer.Args))
    refused, noted, free = (values_of(on_resume) for on_resume in ("refused", "noted", "free"))
    assert refused.keys() >= {"seed", "rank", "lora_alpha", "lora_layers", "resolution", "optimizer"}
    assert noted.keys() >= {"learning_rate", "max_train_steps", "adam_beta2", "mixed_precision", "prior_loss_weight"}
    assert free.keys() >= {"guidance_scale", "checkpointing_steps", "hub_token", "output_dir", "validation_prompt"}


def test_what_must_not_change_is_refused(resume: Train, tmp_path: Path) -> None:
    """Every difference is named, in one message."""
    for path in (tmp_path / "model").rglob("diffusion_pytorch_model.safetensors"):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    with pytest.raises(SystemExit) as exit_info:
        resume(*command(values_of("refused"), tmp_path), f"--class_prompt={PREVIEW_PROMPT}", "--dry_run")
    message = str(exit_info.value)
    assert [name for name in values_of("refused") if f"was trained with {name} " not in message] == []
    assert "seed 0, this run has 1" in message


EARLIER_LAYERS = "to_k,to_q,to_v,to_out.0,add_k_proj,add_q_proj,add_v_proj,to_add_out"  # the default once


def test_another_spelling_of_the_same_layers_goes_on(resume: Train, tmp_path: Path) -> None:
    """What is compared is which layers are trained, also where a LoRA to start from is given."""
    first = tmp_path / "out" / "checkpoint-1"
    saved = state(first)
    saved["settings"]["lora_layers"] = EARLIER_LAYERS
    torch.save(saved, first / trainer.STATE_NAME)
    same = "attn.*_q,attn.*_k,attn.*_v,attn.add_*,attn.to_out.0,attn.to_add_out"
    for layers in (EARLIER_LAYERS, trainer.Args.lora_layers, same):
        resume("--dry_run", f"--lora_layers={layers}", f"--pretrained_lora_path={first}")
    with pytest.raises(SystemExit, match="was trained with lora_layers to_k,"):
        resume("--dry_run", "--lora_layers=attn.to_q", f"--pretrained_lora_path={tmp_path / 'nothing'}")


def test_on_sd35_the_earlier_layers_are_others(train: Train, tiny35: Path) -> None:
    """They matched its second attention, too; the message names what to ask for."""
    model = {"pretrained_model_name_or_path": tiny35}
    train("--checkpointing_steps=1", f"--lora_layers={EARLIER_LAYERS}", **model, max_train_steps=1)
    with pytest.raises(SystemExit, match=f"was trained with lora_layers {re.escape(EARLIER_LAYERS)}"):
        train("--dry_run", LATEST, **model)
    train("--dry_run", LATEST, f"--lora_layers={EARLIER_LAYERS}", **model)


@pytest.mark.parametrize(("one", "other"), [
    (["--use_8bit_adam"], ["--optimizer=adamw_8bit"]), (["--optimizer=adamw_8bit"], ["--use_8bit_adam"]),
    ([f"--lora_alpha={RANK}"], []), ([], [f"--lora_alpha={RANK}"]),
])  # fmt: skip
def test_the_same_said_otherwise_is_no_change(
    train: Train, capsys: pytest.CaptureFixture[str], one: list[str], other: list[str]
) -> None:
    """Two flags for 8-bit Adam, and alpha that is unset or the rank: the run continues to the same LoRA."""
    expected = lora(train("--checkpointing_steps=2", *one))
    output = train(*other, "--resume_from_checkpoint=checkpoint-2")
    assert equal(lora(output), expected) and "changed settings" not in capsys.readouterr().out


def test_what_is_followed_is_noted(
    resume: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every difference is named, in one note."""
    quantized_on_cpu.allow(monkeypatch.setattr)
    monkeypatch.setattr(trainer, "check_kernels", lambda *_: None)  # a machine may have no compiler
    resume(*command(values_of("noted"), tmp_path), "--dry_run")
    [note] = [line for line in capsys.readouterr().out.splitlines() if "changed settings" in line]
    assert [name for name in active(values_of("noted")) if not re.search(rf"\b{name} .* -> ", note)] == []
    assert "revision unset -> " in note and "None" not in note


def test_the_plan_says_from_which_step(resume: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in a dry run."""
    resume("--dry_run")
    assert "from step 1\n" in capsys.readouterr().out


def test_what_makes_no_other_lora_is_not_mentioned(
    resume: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all of it changed the resumed run ends with the same LoRA, to the bit."""
    monkeypatch.setattr(trainer.HfApi, "whoami", lambda *_: {})
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    shutil.copytree(tmp_path / "photos", tmp_path / "moved photos")
    shutil.copy(tmp_path / "embeddings.parquet", tmp_path / "moved.parquet")
    resume(*command(values_of("free", without=SAID_OTHERWISE), tmp_path))
    assert "changed settings" not in capsys.readouterr().out
    resume(*command(values_of("free", without=SUMS_IN_ANOTHER_ORDER | NO_TRAINING | SAID_OTHERWISE), tmp_path))
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
    (recaption, "other images and captions: .*renamed"),
    (add_image, "other images and captions: .*renamed"),
    (lambda folder: (folder / "photos" / "c.png").unlink(), "other images and captions: .*renamed"),
    (replace_model, "base model"),
])  # fmt: skip
def test_other_data_are_refused(
    resume: Train, tmp_path: Path, change: Callable[[Path], object], difference: str
) -> None:
    """Embeddings without T5 or of another length, other captions or images, another model of the same name."""
    change(tmp_path)
    with pytest.raises(SystemExit, match=f"The checkpoint was trained with {difference}"):
        resume("--dry_run")


def test_other_masks_are_refused(resume: Train, tmp_path: Path) -> None:
    """The images are the same, their loss is not."""
    masked = f"--resume_from_checkpoint={tmp_path / 'masked' / 'checkpoint-1'}"
    resume("--alpha_mask", masked, "--dry_run")
    Image.new("L", (128, 96), "black").save(tmp_path / "photos" / "a.mask.png")
    with pytest.raises(SystemExit, match="The checkpoint was trained with other images and captions: .*masks"):
        resume("--alpha_mask", masked, "--dry_run")


def test_files_of_another_variant_make_no_other_model(resume: Train, tmp_path: Path) -> None:
    """What is not loaded does not count."""
    for path in (tmp_path / "model").rglob("diffusion_pytorch_model.safetensors"):
        path.with_suffix(".fp16.safetensors").write_bytes(b"other weights")
    resume("--dry_run")


def test_another_number_of_samples_a_step_is_refused(resume: Train) -> None:
    """The step that the checkpoint counts would be another one; how the samples are made up does not matter."""
    with pytest.raises(SystemExit, match="trained with samples per step 2, this run has 8. .*--output_dir"):
        resume("--train_batch_size=4", "--dry_run")


def test_a_learning_rate_lowered_on_resume_is_followed(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """From the next step on, along the schedule, with a note."""
    flags = ["--lr_scheduler=linear", "--checkpointing_steps=2"]
    start = f"--resume_from_checkpoint={train(*flags) / 'checkpoint-2'}"
    lower = train(*flags, start, output="lower", learning_rate=1e-4)
    assert logged(lower, "lr") == pytest.approx([0.5e-4, 0.25e-4])
    assert "learning_rate 0.001 -> 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["adam_beta2=0.5", "adam_epsilon=1", "adam_weight_decay=99"])
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
    """--checkpoints_total_limit; a user's own copy stays."""
    output = train("--checkpointing_steps=2", "--checkpoints_total_limit=2", max_train_steps=6)
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-4", "checkpoint-6"]
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-4-good")
    train("--checkpoints_total_limit=1", LATEST, max_train_steps=7)
    assert [path.name for path in sorted(output.glob("checkpoint-*"))] == ["checkpoint-4-good", "checkpoint-7"]


def test_three_checkpoints_are_kept_unless_all_are_asked_for(train: Train) -> None:
    """The last step's counts among the three; 0 keeps all."""
    output = train("--checkpointing_steps=2", max_train_steps=9)
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-6", "checkpoint-8", "checkpoint-9"]
    train("--checkpointing_steps=1", "--checkpoints_total_limit=0", LATEST, max_train_steps=11)
    assert names(trainer.list_checkpoints(output)) == [f"checkpoint-{step}" for step in (6, 8, 9, 10, 11)]


def test_a_new_run_wants_a_folder_without_checkpoints(train: Train) -> None:
    """Else the next `latest` could be either run's; the message has both ways to go on, and nothing is changed."""
    output = train()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(SystemExit, match="(?s)checkpoint-4.*--resume_from_checkpoint latest.*--output_dir"):
        train("--seed=1")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_times_of_files_do_not_decide(train: Train) -> None:
    """cp, zip, a drive in the cloud and the Hub do not keep them: the highest step is resumed."""
    output = train("--checkpointing_steps=1", "--checkpoints_total_limit=0", max_train_steps=10)
    for age, folder in enumerate(trainer.list_checkpoints(output)):
        os.utime(folder / trainer.STATE_NAME, (1e9 - age, 1e9 - age))
    assert trainer.list_checkpoints(output)[-1].name == "checkpoint-10"


def test_going_back_replaces_the_later_checkpoints(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """At the first save, so that `latest` is this run's; the plan says so, and until then nothing is lost."""
    keep_all = "--checkpoints_total_limit=0"
    output = train("--checkpointing_steps=1", keep_all)
    flags = [keep_all, "--resume_from_checkpoint=checkpoint-1"]
    train(*flags, "--dry_run")
    assert "replaces checkpoint-2, checkpoint-3, checkpoint-4" in capsys.readouterr().out
    assert len(trainer.list_checkpoints(output)) == 4
    train(*flags, learning_rate=1e-4, max_train_steps=3)
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-1", "checkpoint-3"]


def test_a_checkpoint_that_is_a_link_is_only_unlinked(train: Train, tmp_path: Path) -> None:
    """When it is the oldest one beyond --checkpoints_total_limit; its files stay."""
    output = train("--checkpointing_steps=1", max_train_steps=2)
    for step in (1, 2):
        folder = output / f"checkpoint-{step}"
        folder.rename(tmp_path / folder.name)
        folder.symlink_to(tmp_path / folder.name)
    train("--checkpoints_total_limit=2", LATEST, max_train_steps=3)
    assert names(trainer.list_checkpoints(output)) == ["checkpoint-2", "checkpoint-3"]
    assert names(trainer.list_checkpoints(tmp_path)) == ["checkpoint-1", "checkpoint-2"]


def test_a_refused_flag_that_a_checkpoint_lacks_counts_as_its_default(train: Train) -> None:
    """Whoever adds a flag gets a check of older checkpoints with it."""
    checkpoint = train() / "checkpoint-4"
    saved = state(checkpoint)
    del saved["settings"]["random_flip"]
    torch.save(saved, checkpoint / trainer.STATE_NAME)
    train(LATEST, "--dry_run")
    with pytest.raises(SystemExit, match="random_flip False, this run has True"):
        train(LATEST, "--random_flip", "--dry_run")


def test_a_checkpoint_keeps_the_weights_of_its_step(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not views of the live ones: whoever swaps weights while a file is written would save the wrong ones."""
    saved, save = [], torch.save

    def record(content: dict, file: object) -> None:
        saved.append(content)
        save(content, file)

    monkeypatch.setattr(torch, "save", record)
    output = train("--checkpointing_steps=2")
    first, last = saved[0]["lora"], saved[-1]["lora"]
    assert not equal(first, last) and equal(first, state(output / "checkpoint-2")["lora"])


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
    with pytest.raises(SystemExit, match="^Interrupted"):
        train()
    assert encoded == expected
    train()
    assert encoded[3:] == ["c.png", "d.webp", "e.bmp"]
    train(LATEST)
    assert len(encoded) == 6
    folder = shutil.copytree(photos, tmp_path / "photos")
    Image.new("RGB", (64, 64)).save(folder / "f.png")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    train(instance_data_dir=folder, data_df_path=compute(tiny, folder, tmp_path / "f.parquet", "--no_t5"))
    assert encoded[6:] == ["f.png"]
