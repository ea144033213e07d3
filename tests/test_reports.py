"""What people report: each kind of surprise has one rule in the scripts, and one test here."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import compute_embeddings as embed
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PREVIEWS, Train, compute, logged, parse


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The message with which the trainer's command line is refused."""
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_warm_up_as_long_as_the_run_is_refused(train: Train) -> None:
    """It would never reach its rate; without the flag there is no warm-up."""
    assert parse().lr_warmup_steps == 0
    flags = ["--lr_scheduler=cosine", "--dry_run"]
    train(*flags, lr_warmup_steps=3)
    with pytest.raises(SystemExit, match="--lr_warmup_steps 4 .*4 steps"):
        train(*flags, lr_warmup_steps=4)


def test_zero_turns_a_thing_off(train: Train) -> None:
    """No clipping, no previews on the way, and no checkpoint but the last one."""
    flags = ["--max_grad_norm=0", "--validation_steps=0", "--checkpointing_steps=0", PREVIEWS]
    output = train(*flags, max_train_steps=6)
    assert [path.name for path in trainer.list_checkpoints(output)] == ["checkpoint-6"]
    assert {path.name.split("-")[1] for path in (output / "samples").glob("step-*")} == {"000000", "000006"}
    assert logged(output) == logged(train("--max_grad_norm=1e9", max_train_steps=6, output="clipped at infinity"))


def test_flags_that_do_nothing_without_another_are_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    """All of them in one message, with what they need; the reference's command line has none of them."""
    flags = ["--class_prompt=a dog", "--validation_steps=5", "--lr_num_cycles=2", "--lr_warmup_steps=5"]
    message = refused(capsys, *flags)
    for name, needed in {
        "class_prompt": "with_prior_preservation",
        "validation_steps": "validation_prompt",
        "lr_num_cycles": "lr_scheduler cosine_with_restarts",
        "lr_warmup_steps": "lr_scheduler constant_with_warmup",
    }.items():
        assert f"--{name} does nothing without --{needed}" in message
    for name, (needed, _) in trainer.NEEDS.items():
        assert {name, needed} <= {each.name for each in trainer.fields(trainer.Args)}


def test_a_class_prompt_names_another_thing_than_the_instance_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """Or the class would be what is to be learned."""
    assert "--class_prompt" in refused(capsys, "--with_prior_preservation", "--class_prompt=p")


def test_a_repositorys_name_is_checked_before_anything_else(capsys: pytest.CaptureFixture[str]) -> None:
    """The advice is another name, not a token."""
    message = refused(capsys, "--push_to_hub", "--output_dir=my lora")
    assert "--hub_model_id" in message and "login" not in message
    assert parse("--push_to_hub", "--output_dir=my lora", "--hub_model_id=me/lora").hub_model_id == "me/lora"


def test_a_turbo_model_draws_in_few_steps_without_guidance() -> None:
    """Unless the flags say otherwise."""
    name = "--pretrained_model_name_or_path=stabilityai/stable-diffusion-3.5-large-turbo"
    assert (parse(name).num_inference_steps, parse(name).guidance_scale) == (4, 0)
    elsewhere = parse("--pretrained_model_name_or_path=home/turbo/sd3")
    assert elsewhere.num_inference_steps == 28
    asked = parse(name, "--num_inference_steps=8", "--guidance_scale=2")
    assert (asked.num_inference_steps, asked.guidance_scale) == (8, 2)
    assert (parse().num_inference_steps, parse().guidance_scale) == (28, None)


def test_prodigy_with_a_rate_for_adam_is_noted(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """It multiplies the rate by what it finds."""
    train("--optimizer=prodigy", "--dry_run", learning_rate=2e-4)
    assert "--learning_rate 0.0002" in capsys.readouterr().out


def test_one_epoch_over_few_images_is_noted(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --max_train_steps, five photos make two steps of four."""
    train("--dry_run", "--gradient_accumulation_steps=4", max_train_steps=None)
    assert "2 steps here; --max_train_steps" in capsys.readouterr().out


def class_flags(folder: Path, *more: str) -> list[str]:
    return [
        "--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", f"--class_data_dir={folder}",
        "--num_class_images=2", *more,
    ]  # fmt: skip


def test_class_images_of_another_class_are_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What this program generates into a folder of the user's carries what it was made by."""
    folder = tmp_path / "class"
    train(*class_flags(folder), max_train_steps=1)
    made_by = folder / trainer.MADE_BY
    assert json.loads(made_by.read_text())["class_prompt"] == PREVIEW_PROMPT
    train(*class_flags(folder, "--dry_run", "--num_class_images=1"), output="again")
    assert "1 of 2 class images" in capsys.readouterr().out
    made_by.write_text(made_by.read_text().replace(PREVIEW_PROMPT, "a cat"))
    with pytest.raises(SystemExit, match=f"{folder} were generated with another class_prompt"):
        train(*class_flags(folder, "--dry_run"), output="another")


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """The five images, to be given captions and masks."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def test_masks_are_counted(train: Train, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many photos have one; masks that are not used; photos that are named like masks."""
    Image.new("L", (128, 96)).save(folder / "a.mask.png")
    train("--dry_run", "--alpha_mask", instance_data_dir=folder)
    assert "1 of 5 images have a mask" in capsys.readouterr().out
    train("--dry_run", instance_data_dir=folder)
    assert f"--alpha_mask: 1 (first: {folder / 'a.mask.png'})" in capsys.readouterr().out


def test_a_photo_named_like_a_mask_is_noted(
    train: Train, tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """00-Mask.jpg beside 00.png is trained as a photo."""
    Image.effect_noise((80, 80), 90).save(folder / "C-Mask.jpg")
    embeddings = compute(tiny, folder, tmp_path / "e.parquet", "--no_t5")
    train("--dry_run", instance_data_dir=folder, data_df_path=embeddings)
    assert f"named like masks: 1 (first: {folder / 'C-Mask.jpg'})" in capsys.readouterr().out


def test_a_tiny_photo_is_refused(train: Train, folder: Path) -> None:
    """An icon or a thumbnail teaches nothing."""
    Image.new("RGB", (32, 48)).save(folder / "z.png")
    with pytest.raises(SystemExit, match="z.png has 32 x 48 pixels"):
        train("--dry_run", instance_data_dir=folder)


def test_two_captions_of_a_photo_are_refused(folder: Path) -> None:
    """Both are named, if they differ."""
    (folder / "a.txt").write_text("one")
    (folder / "a.caption").write_text("one")
    args = embed.parse_args([f"--local_data_dir={folder}"])
    embed.caption_images(args)
    (folder / "a.caption").write_text("two")
    with pytest.raises(embed.UserError, match="a.txt and .*a.caption"):
        embed.caption_images(args)


def test_what_an_encoder_does_not_see_is_one_note(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truncated captions are counted, with one example; words that T5 does not know are named."""
    for name in ("a", "c", "d"):
        (folder / f"{name}.txt").write_text(f"{name} " * 200)
    (folder / "e.txt").write_text("sks 犬")
    compute(tiny, folder, tmp_path / "e.parquet")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert [note for note in notes if "3 of 6 prompts are longer" in note and len(note) < 250]
    assert [note for note in notes if "T5 does not know" in note and "犬" in note]


def test_a_prompt_may_begin_with_at(capsys: pytest.CaptureFixture[str]) -> None:
    """With an equals sign; without one it names a file of flags, and the message says so."""
    assert embed.parse_args(["--prompt=@jane"]).prompt == "@jane"
    with pytest.raises(SystemExit):
        embed.parse_args(["--prompt", "@jane"])
    assert "--prompt=@" in capsys.readouterr().err


def test_images_of_several_frames_are_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first one is used."""
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(folder / "z.webp", save_all=True, append_images=frames[1:])
    embed.caption_images(embed.parse_args([f"--local_data_dir={folder}"]))
    assert f"several frames, of which the first is used: 1 (first: {folder / 'z.webp'})" in capsys.readouterr().out
