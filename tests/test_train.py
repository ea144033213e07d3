"""The trainer from end to end: what it writes, that it resumes exactly, and what it refuses to start on."""

import itertools
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import train_dreambooth_sd3_lora_miniature as trainer
import transformers
from conftest import PREVIEW_PROMPT, PROMPT, RANK, ROOT, compute, logged
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Train = Callable[..., Path]
REFERENCE_COMMAND = """--mixed_precision="fp16" --instance_prompt="a photo of sks dog" --resolution=1024
--train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing --use_8bit_adam --learning_rate=1e-4
--report_to="tensorboard" --lr_scheduler="constant" --lr_warmup_steps=0 --seed="0" """


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / trainer.LORA_NAME)


def equal(one: object, other: object) -> bool:
    """Whether two nested states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def state(checkpoint: Path) -> dict:
    return torch.load(checkpoint / "training_state.pt", weights_only=True)


def test_a_run_writes_these_files_and_no_others(train: Train) -> None:
    """LoRA, card, samples, checkpoints, latents, logs."""
    output = train("--checkpointing_steps=2", f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=2")
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    files = {file for file in files if not file.startswith("logs/")}
    parts = ["pytorch_lora_weights.safetensors", "trainer_state.json", "training_state.pt"]
    samples = {f"samples/step-{step:06d}-prompt-0-0.png" for step in (0, 2, 4)} | {"samples/progress.png"}
    expected = {f"checkpoint-{step}/{part}" for step in (2, 4) for part in parts} | samples
    assert files == expected | {"README.md", "latents.arrow", "pytorch_lora_weights.safetensors"}
    assert len(logged(output)) == 4 and Image.open(output / max(samples)).size == (64, 64)
    events = EventAccumulator(str(next((output / "logs").rglob("events.out*")).parent)).Reload()
    assert [image.step for image in events.Images(events.Tags()["images"][0])] == [0, 2, 4]


@pytest.mark.parametrize("flags", [
    [], ["--use_8bit_adam", "--aspect_ratio_buckets"], ["--optimizer=paged_adamw_8bit"],
    ["--use_8bit_adam", "--mixed_precision=bf16", "--gradient_checkpointing"],
    ["--use_8bit_adam", "--mixed_precision=fp16"], ["--lora_dropout=0.2", "--random_flip", "--lora_alpha=48"],
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
    """The reference went from step 2 of 4 to step 5. A folder named checkpoints, which broke it, does no harm."""
    output = train("--checkpointing_steps=2", "--max_train_steps=2")
    (output / "checkpoints").mkdir()
    train("--checkpointing_steps=1", "--resume_from_checkpoint=latest", "--gradient_accumulation_steps=1")
    assert [path.name for path in trainer.list_checkpoints(output)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert len(logged(output)) == 4


def test_a_finished_run_resumed_ends_well(train: Train) -> None:
    """The reference crashed; here the LoRA is written once more, the same."""
    output = train("--checkpointing_steps=4")
    before = lora(output)
    train("--checkpointing_steps=4", "--resume_from_checkpoint=latest")
    assert equal(before, lora(output)) and len(logged(output)) == 4


def test_resuming_latest_without_a_checkpoint_starts_anew(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """As in the reference, with a line that says so."""
    assert len(logged(train("--resume_from_checkpoint=latest"))) == 4
    assert "starting from the beginning" in capsys.readouterr().out


def test_resuming_with_other_settings_is_refused(train: Train) -> None:
    """Every difference is named; more steps on a constant schedule are none."""
    output = train("--checkpointing_steps=2", "--max_train_steps=2")
    with pytest.raises(SystemExit, match=r"(?s)learning_rate 0.001, this run has 0.1.*seed 0, this run has 1"):
        train("--resume_from_checkpoint=latest", "--learning_rate=0.1", "--seed=1")
    train("--resume_from_checkpoint=latest", "--max_train_steps=3")
    assert len(logged(output)) == 3


def test_a_path_that_is_no_checkpoint_is_refused(train: Train, tmp_path: Path) -> None:
    """With what there is instead."""
    train("--checkpointing_steps=2")
    with pytest.raises(SystemExit, match="has: checkpoint-2, checkpoint-4"):
        train("--resume_from_checkpoint=checkpoint-3")


def test_only_the_newest_checkpoints_are_kept(train: Train) -> None:
    """--checkpoints_total_limit."""
    output = train("--checkpointing_steps=1", "--checkpoints_total_limit=2")
    assert [path.name for path in trainer.list_checkpoints(output)] == ["checkpoint-3", "checkpoint-4"]
    assert not list(output.glob("*.partial"))


def test_the_seed_decides(train: Train) -> None:
    """Seed 0 gives the same LoRA again, seed 1 another."""
    first, again, other = train(output="a"), train(output="b"), train("--seed=1", output="c")
    assert equal(lora(first), lora(again)) and not equal(lora(first), lora(other))


def test_an_unset_seed_is_drawn_printed_and_stored(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """And a resumed run takes it from the checkpoint."""
    output = train("--checkpointing_steps=1", seed=None, max_train_steps=1)
    seed = json.loads((output / "checkpoint-1" / "trainer_state.json").read_text())["settings"]["seed"]
    assert f"seed {seed}" in capsys.readouterr().out
    train("--resume_from_checkpoint=latest", seed=None)
    assert f"seed {seed}" in capsys.readouterr().out


def test_the_schedule_counts_optimizer_steps(train: Train) -> None:
    """Two steps of warm-up are two optimizer steps, whatever the accumulation."""
    flags = ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=2", "--gradient_accumulation_steps=3"]
    assert logged(train(*flags), "lr") == pytest.approx([0, 0.0005, 0.001, 0.001])


@pytest.mark.parametrize("schedule", [schedule.value for schedule in trainer.SchedulerType])
def test_every_schedule_of_diffusers_is_followed(train: Train, schedule: str) -> None:
    """The logged learning rates are those of diffusers' schedule; two restarts, a warm-up, or rules."""
    flags = [f"--lr_scheduler={schedule}", "--lr_num_cycles=2", "--lr_power=2"]
    rules = "1:2,0.5:4,0.1" if schedule == "piecewise_constant" else None
    output = train(*flags, max_train_steps=6, lr_warmup_steps=2, step_rules=rules)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    how = {"num_warmup_steps": 2, "num_training_steps": 6, "num_cycles": 2, "power": 2.0, "step_rules": rules}
    expected = trainer.get_scheduler(schedule, optimizer, **how)
    for learning_rate in logged(output, "lr"):
        assert learning_rate == pytest.approx(expected.get_last_lr()[0])
        expected.step()


def test_optimizers(tiny: Path) -> None:
    """AdamW fused, in 8 bit, paged; --use_8bit_adam is a name of the second."""
    for flags, kind in [
        ([], torch.optim.AdamW), (["--use_8bit_adam"], trainer.bnb.optim.AdamW8bit),
        (["--optimizer=adamw_8bit"], trainer.bnb.optim.AdamW8bit),
        (["--optimizer=paged_adamw_8bit"], trainer.bnb.optim.PagedAdamW8bit),
    ]:  # fmt: skip
        required = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e"]
        args = trainer.parse_args([*required, "--instance_prompt=p", *flags])
        assert type(trainer.make_optimizer(torch.nn.Linear(2, 2), args, 1)) is kind


def test_epochs_are_passes_over_the_pictures(tiny: Path) -> None:
    """Five pictures, two epochs, four samples a step: three steps. Previews every epoch come after steps 2 and 3."""
    args = trainer.parse_args([
        f"--pretrained_model_name_or_path={tiny}", "--instance_data_dir=d", "--data_df_path=e", "--instance_prompt=p",
        "--validation_prompt=p", "--validation_epochs=1", "--max_train_steps=9",
    ])  # fmt: skip
    due = []
    for step in range(1, 10):
        run = trainer.Run(args, None, None, None, None, None, None, {"samples_per_step": 4}, step)
        if trainer.preview_due(run, epoch=5):
            due.append(step)
    assert due == [2, 3, 4, 5, 7, 8]


def test_num_train_epochs_gives_the_number_of_steps(train: Train) -> None:
    """ceil(2 epochs * 5 pictures / 4 samples)."""
    output = train("--num_train_epochs=2", "--gradient_accumulation_steps=4", max_train_steps=None)
    assert len(logged(output)) == 3


def test_previews_change_nothing(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without previews the LoRA is the same, bit for bit; no text encoder or second pipeline is loaded."""

    def fail(*_: object, **__: object) -> None:
        pytest.fail("loaded a text encoder or a pipeline")

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", fail)
    for name in ("T5EncoderModel", "CLIPTextModelWithProjection"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
    flags = [f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=1", "--use_8bit_adam"]
    assert equal(lora(train(output="without")), lora(train(*flags[:2], output="with")))
    assert equal(lora(train(flags[2], output="without8")), lora(train(*flags, output="with8")))


def test_previews_leave_no_hook_on_the_model(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's preview put offload hooks on the very model that was being trained."""
    models, save_lora = [], trainer.save_lora

    def keep_and_save(folder: Path, transformer: torch.nn.Module, *rest: object, **options: object) -> None:
        models.append(transformer)
        save_lora(folder, transformer, *rest, **options)

    monkeypatch.setattr(trainer, "save_lora", keep_and_save)
    train(f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=1")
    assert not any(hasattr(module, "_hf_hook") or module._forward_pre_hooks for module in models[-1].modules())


def test_previews_have_fixed_noise(train: Train) -> None:
    """Run again, they are the same pictures; each number has its own noise."""
    flags = [f"--validation_prompt={PREVIEW_PROMPT}", "--num_validation_images=2", "--max_train_steps=1"]
    one, other = train(*flags, output="a") / "samples", train(*flags, output="b") / "samples"
    names = sorted(path.name for path in one.glob("step-000001-*"))
    assert len(names) == 2 and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert (one / names[0]).read_bytes() != (one / names[1]).read_bytes()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_launchers_precision_counts(train: Train, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The reference asked its own flag, left the LoRA in fp16 when the launcher set it, and the loss became nan."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    output = train("--checkpointing_steps=4")
    assert all(torch.isfinite(torch.tensor(logged(output))))
    assert all(value.dtype == torch.float32 for value in lora(output).values())
    saved = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["settings"]["mixed_precision"] == precision


def test_sd35_trains(train: Train, tiny35: Path) -> None:
    """Dual attention and QK norm, from the same embeddings."""
    assert len(lora(train(f"--pretrained_model_name_or_path={tiny35}"))) == 24


def test_gradient_accumulation_equals_a_larger_batch(train: Train) -> None:
    """Four samples at once or one after the other: the same losses and, but for rounding, the same LoRA."""
    whole = train("--train_batch_size=4", output="whole")
    parts = train("--gradient_accumulation_steps=4", output="parts")
    assert logged(whole) == pytest.approx(logged(parts), abs=1e-5)
    assert all(torch.allclose(value, lora(parts)[name], atol=1e-5) for name, value in lora(whole).items())


def test_the_card_has_the_base_models_licence_and_no_path(train: Train, tmp_path: Path) -> None:
    """Not openrail++, which is no licence of SD3; the folder of the model is named without its path."""
    output = train(f"--validation_prompt={PREVIEW_PROMPT}", "--hub_model_id=me/dog")
    card = (output / "README.md").read_text()
    assert "license: other" in card and "openrail" not in card and str(tmp_path.parent) not in card
    assert f"instance_prompt: {PROMPT}" in card and 'load_lora_weights("me/dog")' in card
    assert "url: samples/step-000004-prompt-0-0.png" in card


def test_without_a_tracker_nothing_is_logged(train: Train) -> None:
    """--report_to none."""
    assert not (train("--report_to=none") / "logs").exists()


def test_the_token_is_in_no_file(train: Train) -> None:
    """The reference wrote it into the tracker's configuration and uploaded the logs."""
    output = train("--hub_token=hf_secret_token", "--checkpointing_steps=2")
    assert all(b"hf_secret_token" not in path.read_bytes() for path in output.rglob("*") if path.is_file())


def test_all_problems_are_told_at_once(train: Train, tmp_path: Path) -> None:
    """A bad picture, a picture and a prompt without embeddings, a wrong layer; with the command that mends it."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    (folder / "bad.jpg").write_text("not a picture")
    Image.new("RGB", (64, 64)).save(folder / "new.png")
    flags = ["--lora_layers=to_q,nothing", "--validation_prompt", "unknown prompt", "--lora_blocks=7"]
    with pytest.raises(SystemExit) as exit_info:
        train(f"--instance_data_dir={folder}", *flags)
    message = str(exit_info.value)
    parts = ["bad.jpg is not a readable picture", "1 of 1 pictures", "first: new.png", "'unknown prompt'"]
    parts += ["no linear layer nothing", "the last block is 1", f"compute_embeddings.py --prompt '{PROMPT}'"]
    assert [part for part in parts if part not in message] == [] and f"--local_data_dir '{folder}'" in message
    assert not (tmp_path / "out" / "latents.arrow").exists()


def test_a_dry_run_tells_and_writes_nothing(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures with shapes and captions, steps, memory; a problem ends it as it ends a run."""
    monkeypatch.setattr(trainer, "load_part", only_configs(trainer.load_part))
    output = train("--dry_run", "--aspect_ratio_buckets", "--gradient_accumulation_steps=5")
    told = capsys.readouterr().out
    assert "a.jpg: 128 x 96, trained as 80 x 48" in told
    assert told.count(repr(PROMPT)) == 5 and "4 steps of 5 samples: each picture 4.0 times, seed 0" in told
    assert "predicted peak VRAM" in told and "there is no GPU" in told
    assert not any(path.is_file() for path in output.rglob("*"))
    with pytest.raises(SystemExit, match="no embeddings of 'a cow'"):
        train("--dry_run", "--validation_prompt=a cow")


def only_configs(load_part: Callable) -> Callable:
    """load_part that refuses weights."""

    def load(loader: Callable, *args: object, **kwargs: object) -> object:
        assert loader.__name__ == "load_config"
        return load_part(loader, *args, **kwargs)

    return load


@pytest.mark.parametrize(("flags", "part"), [
    (["--data_df_path=nowhere.parquet"], "nowhere.parquet cannot be read"),
    (["--instance_data_dir=nowhere"], "nowhere is not a folder"),
    (["--pretrained_model_name_or_path=nowhere/nothing"], "Cannot load transformer of nowhere/nothing"),
    (["--instance_prompt=another prompt"], "has no embeddings of 'another prompt'"),
    (["--max_sequence_length=256"], "has 77 T5 tokens, not --max_sequence_length 256"),
    (["--resolution=1040"], "--resolution 1040 has a side of 1040 pixels, above the model's 1024"),
    (["--report_to=comet_ml"], "--report_to comet_ml is not installed"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_a_model_loads(
    train: Train, monkeypatch: pytest.MonkeyPatch, flags: list[str], part: str
) -> None:
    """One message, exit code 1."""
    monkeypatch.setattr(trainer, "load_vae", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=part):
        train(*flags)


def test_a_prompt_that_captions_no_picture_is_refused(train: Train) -> None:
    """The pictures are trained with their caption in the file; another --instance_prompt would be a lie."""
    with pytest.raises(SystemExit, match=f"'{PREVIEW_PROMPT}' captions none of the pictures"):
        train(instance_prompt=PREVIEW_PROMPT)


def test_checkpoints_of_an_earlier_run_do_not_push_out_new_ones(train: Train) -> None:
    """What is kept is the newest of this run."""
    output = train("--checkpointing_steps=2")
    train("--checkpointing_steps=1", "--checkpoints_total_limit=1", "--seed=1", max_train_steps=3)
    assert [path.name for path in trainer.list_checkpoints(output)] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["joint_attention_dim", "pooled_projection_dim"])
def test_widths_of_another_model_are_refused(train: Train, tiny: Path, tmp_path: Path, name: str) -> None:
    """Embeddings must have the transformer's widths."""
    model = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((model / "transformer" / "config.json").read_text())
    (model / "transformer" / "config.json").write_text(json.dumps(config | {name: 96}))
    with pytest.raises(SystemExit, match="computed with another kind of model"):
        train(f"--pretrained_model_name_or_path={model}")


def test_emulated_bf16_is_refused(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 says that it can do bf16, but only emulates it."""
    accelerator = type("T4", (), {"mixed_precision": "bf16", "device": torch.device("cuda"), "is_main_process": True})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(trainer, "seen_by_all", lambda *_: True)
    args = trainer.parse_args(["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e",
                               "--instance_prompt=p", "--report_to=none", "--output_dir=/tmp"])  # fmt: skip
    problems: list[str] = []
    trainer.check_environment(args, accelerator, problems)
    assert problems == ["Tesla T4 only emulates bf16; use --mixed_precision fp16."]


def test_a_disk_that_is_too_small_is_told_before_training(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed and what there is: for the latents, then for the checkpoints."""
    for free, what in ((1_000, "Latents"), (200_000, "Checkpoints")):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(trainer.shutil, "disk_usage", lambda _, usage=usage: usage)
        with pytest.raises(SystemExit, match=f"{what} need .* GB free"):
            train("--checkpointing_steps=1")


def test_the_references_own_command_line_runs_through_accelerate_launch(
    tiny: Path, photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """From its notebook, changed in paths and number of steps alone, and with TensorBoard for wandb."""
    paths = {"pretrained_model_name_or_path": tiny, "instance_data_dir": photos, "data_df_path": embeddings,
             "output_dir": tmp_path / "trained-sd3-lora-miniature", "max_train_steps": 1}  # fmt: skip
    flags = [*shlex.split(REFERENCE_COMMAND), *(f"--{name}={value}" for name, value in paths.items())]
    script = str(ROOT / "train_dreambooth_sd3_lora_miniature.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes=1", script, *flags]
    result = subprocess.run(launch, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(lora(tmp_path / "trained-sd3-lora-miniature")) == 2 * 2 * 4
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert RANK > 4 and "steps of 4 samples" in result.stdout


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


def test_training_starts_from_another_lora(train: Train, tmp_path: Path) -> None:
    """With a learning rate of nothing the LoRA comes out as it went in; one of another rank is refused."""
    first = train(output="first") / trainer.LORA_NAME
    again = train(f"--pretrained_lora_path={first}", learning_rate=1e-30, adam_weight_decay=0, output="again")
    assert equal(lora(first.parent), lora(again))
    with pytest.raises(SystemExit, match="Cannot start:(.|\n)*layers or rank of .* are others"):
        train(f"--pretrained_lora_path={first}", rank=8, output="refused")
    assert not (tmp_path / "refused" / "latents.arrow").exists()
    with pytest.raises(SystemExit, match="cannot be loaded"):
        train(f"--pretrained_lora_path={tmp_path / 'none'}")


@pytest.mark.parametrize("start", [trainer.LORA_NAME, "checkpoint-4"])
@pytest.mark.parametrize("alpha", [RANK, 4 * RANK])
def test_another_lora_keeps_its_strength(train: Train, start: str, alpha: int) -> None:
    """The file's alpha counts, folded into the weights or not, whatever --lora_alpha goes on with."""
    first = train(f"--lora_alpha={2 * RANK}", "--checkpointing_steps=4", output="first")
    flags = [f"--pretrained_lora_path={first / start}", f"--lora_alpha={alpha}"]
    assert equal(lora(first), lora(train(*flags, learning_rate=1e-30, adam_weight_decay=0, output="again")))


def test_another_lora_is_not_rounded_to_the_bases_precision(train: Train) -> None:
    """Neither in bf16."""
    first = train(output="first")
    flags = [f"--pretrained_lora_path={first}", "--mixed_precision=bf16"]
    assert equal(lora(first), lora(train(*flags, learning_rate=1e-30, adam_weight_decay=0, output="again")))


def test_the_latest_checkpoint_is_the_one_that_was_saved_last(train: Train) -> None:
    """Not the highest, which an earlier run in the same folder has left."""
    expected = lora(train("--checkpointing_steps=1", output="alone"))
    train("--checkpointing_steps=6", learning_rate=0.1, max_train_steps=6)
    train("--checkpointing_steps=2", max_train_steps=2)
    assert equal(lora(train("--resume_from_checkpoint=latest")), expected)


def test_a_clock_that_was_set_back_costs_no_new_checkpoint(train: Train) -> None:
    """The one that was just saved stays, even if another claims to be of tomorrow."""
    state = train("--checkpointing_steps=6", max_train_steps=6) / "checkpoint-6" / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"saved_at": time.time() + 86400}))
    output = train("--checkpointing_steps=2", "--checkpoints_total_limit=1")
    assert {path.name for path in trainer.list_checkpoints(output)} >= {"checkpoint-4", "checkpoint-6"}


def test_class_pictures_of_another_class_are_not_reused(train: Train) -> None:
    """Each class prompt and resolution has its own folder."""
    flags = ["--with_prior_preservation", "--num_class_images=1", "--max_train_steps=1"]
    for more in ([f"--class_prompt={PREVIEW_PROMPT}"], [f"--class_prompt={PROMPT}"], [f"--class_prompt={PROMPT}"]):
        output = train(*flags, *more)
    assert len(list(output.glob("class_images-*/class-00000.png"))) == 2


def test_pictures_train_with_their_own_captions(train: Train, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Every picture may have one; then the LoRA is another, and the instance prompt is still known."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.with_suffix(".txt").write_text(f"sks dog number {number}")
    embeddings = compute(tiny, folder, tmp_path / "own.parquet", f"--prompt={PROMPT}", "--no_t5")
    plain = compute(tiny, photos, tmp_path / "plain.parquet", f"--prompt={PROMPT}", "--no_t5")
    own = train(instance_data_dir=folder, data_df_path=embeddings, output="own")
    assert not equal(lora(own), lora(train(data_df_path=plain, output="plain")))


def class_flags(folder: Path, count: int = 5) -> list[str]:
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", f"--class_data_dir={folder}"]
    return [*flags, f"--num_class_images={count}", "--sample_batch_size=2"]


def test_class_pictures_are_generated_once_and_resumably(train: Callable[..., Path], tmp_path: Path) -> None:
    """From the stored embeddings; what is lost comes back the same but for rounding, the rest is left alone."""
    folder = tmp_path / "class"
    train(*class_flags(folder))
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"class-0000{number}.png" for number in range(5)]
    first = np.stack([np.int16(Image.open(path)) for path in files])
    assert all(np.abs(one - other).max() > 20 for one, other in itertools.combinations(first, 2))
    kept = files[4].stat().st_mtime_ns
    files[1].unlink()
    train(*class_flags(folder))
    assert np.abs(np.int16(Image.open(files[1])) - first[1]).max() <= 1
    assert sorted(folder.iterdir()) == files and files[4].stat().st_mtime_ns == kept


def test_class_pictures_are_of_the_model_without_a_lora_to_start_from(train: Train, tmp_path: Path) -> None:
    """What is to be preserved is the model's class, not what another LoRA made of it."""
    start = train(learning_rate=0.1, output="start") / trainer.LORA_NAME
    train(*class_flags(tmp_path / "one"), output="one")
    train(*class_flags(tmp_path / "other"), f"--pretrained_lora_path={start}", output="other")
    for path in (tmp_path / "one").glob("class-*.png"):
        pixels = [np.int16(Image.open(folder / path.name)) for folder in (tmp_path / "one", tmp_path / "other")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_shapes_and_prior_preservation_train_together(train: Train, tmp_path: Path) -> None:
    """Upright and wide pictures of the subject, square ones of its class, in batches of two of one shape."""
    flags = [*class_flags(tmp_path / "class"), "--aspect_ratio_buckets", "--train_batch_size=2"]
    whole = train(*flags, output="whole")
    train(*flags, output="parts", max_train_steps=2, checkpointing_steps=2)
    parts = train(*flags, "--resume_from_checkpoint=latest", output="parts")
    assert equal(lora(whole), lora(parts)) and len(set(trainer.latent_shapes(whole / "latents.arrow"))) == 3
    with pytest.raises(SystemExit, match="samples_per_micro_batch 2, this run has 1"):
        train(*flags, "--resume_from_checkpoint=latest", "--train_batch_size=1", "--gradient_accumulation_steps=2",
              output="parts", max_train_steps=6)  # fmt: skip


def test_prior_preservation_resumes_exactly(train: Callable[..., Path], tmp_path: Path) -> None:
    """Two steps and two more give the LoRA of four; other class pictures are refused."""
    folder = tmp_path / "class"
    whole = train(*class_flags(folder), output="whole")
    train(*class_flags(folder), output="parts", max_train_steps=2, checkpointing_steps=2)
    parts = train(*class_flags(folder), "--resume_from_checkpoint=latest", output="parts")
    assert equal(lora(whole), lora(parts)) and not equal(lora(whole), lora(train(output="plain")))
    Image.new("RGB", (64, 64)).save(folder / "class-00002.png")
    with pytest.raises(SystemExit, match="class pictures"):
        train(*class_flags(folder), "--resume_from_checkpoint=latest", output="parts", max_train_steps=6)


def test_class_prompt_without_embeddings(train: Callable[..., Path]) -> None:
    """One message, with the command that computes them."""
    with pytest.raises(SystemExit, match="(?s)no embeddings of 'a dog'.*--class_prompt 'a dog'"):
        train("--with_prior_preservation", "--class_prompt=a dog")
