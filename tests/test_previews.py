"""Previews: they show the progress and change nothing."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import LATEST, PREVIEW_PROMPT, PREVIEWS, PROMPT, Train, equal, lora


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

    def keep_model(args: trainer.Args, plan: trainer.Plan, state: trainer.TrainState, *rest: object) -> None:
        models.append(state.transformer)
        publish(args, plan, state, *rest)

    monkeypatch.setattr(trainer, "publish", keep_model)
    train(PREVIEWS, "--validation_steps=1")
    assert not any(hasattr(module, "_hf_hook") or module._forward_pre_hooks for module in models[0].modules())


def test_previews_have_fixed_noise(train: Train) -> None:
    """Run again, they are the same images; each number has its own noise."""
    flags = [PREVIEWS, "--num_validation_images=2", "--max_train_steps=1"]
    one, other = train(*flags, output="a") / "samples", train(*flags, output="b") / "samples"
    files = [path.name for path in sorted(one.glob("step-000001-*"))]
    assert len(files) == 2 and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    assert (one / files[0]).read_bytes() != (one / files[1]).read_bytes()


def test_the_samples_that_are_there_are_counted(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of all steps, not of the last alone."""
    output = train(PREVIEWS, "--validation_steps=1", max_train_steps=2)
    said = capsys.readouterr().out
    assert "README.md and 3 samples beside it" in said and f"wrote {output / 'samples' / 'progress.png'}" in said


def images_of(path: Path) -> Image.Image:
    """Return the sheet without its labels."""
    sheet = Image.open(path)
    return sheet.crop((*trainer.PROGRESS_MARGINS, *sheet.size))


def test_progress_is_seen_at_a_glance(train: Train) -> None:
    """One sheet: a row per prompt, a column per preview, the first without LoRA; after going back, no later ones."""
    flags = ["--validation_prompt", PREVIEW_PROMPT, PROMPT, "--validation_steps=2", "--num_validation_images=2"]
    samples = train(*flags, max_train_steps=6) / "samples"
    sheet = images_of(samples / "progress.png")
    assert sheet.size == (4 * 256, 2 * 256)
    for column, step in enumerate((0, 2, 4, 6)):
        for row in (0, 1):
            box = (256 * column, 256 * row, 256 * column + 256, 256 * row + 256)
            alone = Image.open(samples / f"step-{step:06d}-prompt-{row}-0.png").resize((256, 256))
            assert sheet.crop(box).tobytes() == alone.tobytes()
    assert len(list(samples.glob("step-000000-*"))) == 2 and len(list(samples.glob("step-000006-*"))) == 4
    train(*flags, "--resume_from_checkpoint=checkpoint-2", max_train_steps=4)
    assert images_of(samples / "progress.png").size == (3 * 256, 2 * 256)


def test_the_sheet_says_which_step_and_prompt_an_image_is_of(train: Train) -> None:
    """Above each column and beside each row stands dark text, another one for another prompt."""
    prompts = [PREVIEW_PROMPT, PROMPT]
    samples = train("--validation_prompt", *prompts, "--validation_steps=2", max_train_steps=2) / "samples"
    sheet = Image.open(samples / "progress.png").convert("L")
    left, top = trainer.PROGRESS_MARGINS
    for column in (0, 1):
        assert sheet.crop((left + 256 * column, 0, left + 256 * column + 256, top)).getextrema()[0] < 64
    beside = [sheet.crop((0, top + 256 * row, left, top + 256 * row + 256)) for row in (0, 1)]
    assert all(label.getextrema() == (0, 255) for label in beside) and beside[0].tobytes() != beside[1].tobytes()


def test_the_sheet_shows_no_image_of_another_prompt(train: Train) -> None:
    """A run may be resumed with other prompts; the label beside a row is then no longer that of its first images."""
    train(PREVIEWS, "--validation_steps=1", max_train_steps=1)
    other = f"--validation_prompt={PROMPT}"
    samples = train(other, "--validation_steps=1", LATEST, max_train_steps=2) / "samples"
    assert len(list(samples.glob("step-*.png"))) == 3
    assert images_of(samples / "progress.png").size == (256, 256)


@pytest.mark.parametrize(
    ("model", "flags", "expected"),
    [("tiny", [], 7), ("tiny35", [], 4.5), ("tiny35", ["--guidance_scale=0"], 0), ("tiny", ["--guidance_scale=2"], 2)],
)
def test_the_base_model_decides_about_guidance(
    train: Train,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    flags: list[str],
    expected: float,
) -> None:
    """Unless it is given: 7 for SD3, 4.5 for SD3.5, for previews and class images; the plan says which."""
    used, draw = [], StableDiffusion3Pipeline.__call__

    def record(self: StableDiffusion3Pipeline, *args: object, **kwargs: object) -> object:
        used.append(kwargs["guidance_scale"])
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", record)
    prior = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=1"]
    folder = request.getfixturevalue(model)
    train(PREVIEWS, *prior, *flags, pretrained_model_name_or_path=folder, max_train_steps=1)
    assert used == [expected] * 3  # a class image, the untrained model, the trained one
    assert f"--guidance_scale {expected:g}\n" in capsys.readouterr().out


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
    trainer.draw_progress(tmp_path, ["a prompt"], last_step=999).save(tmp_path / "progress.png")
    sheet = images_of(tmp_path / "progress.png")
    colors = [sheet.getpixel((256 * column, 0)) for column in range(sheet.width // 256)]
    steps = [256 * green + red for red, green, _ in colors]
    assert sheet.height == 256 and 10 <= len(steps) <= 17
    assert steps == sorted(steps) and (steps[0], steps[-1]) == (0, 999)


def test_a_preview_that_is_not_finite_is_named(
    train: Train, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was saved as a black image; class images would teach black. The training goes on."""
    decode = AutoencoderKL.decode

    def overflow(vae: AutoencoderKL, latents: torch.Tensor, **kwargs: object) -> tuple:
        return (decode(vae, latents, **kwargs)[0] / 0 * 0,)

    monkeypatch.setattr(AutoencoderKL, "decode", overflow)
    output = train(PREVIEWS, max_train_steps=1)
    assert f"no preview of {PREVIEW_PROMPT!r} after step 1: the image is not finite" in capsys.readouterr().out
    assert not list((output / "samples").iterdir()) and (output / trainer.LORA_NAME).exists()
    with pytest.raises(SystemExit, match="Class images cannot be made"):
        train("--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=1", output="other")
