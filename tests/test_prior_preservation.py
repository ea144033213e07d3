"""Prior preservation: class images are made once, by the model without a LoRA, and take turns with the subject."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import LATEST, PREVIEW_PROMPT, Train, compute, equal, logged, lora, parse


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
    files = sorted(folder.glob("*.png"))
    assert [path.name for path in files] == [f"class-0000{number}.png" for number in range(3)]
    assert all(difference(one, other) > 20 for one, other in itertools.combinations(files, 2))
    shutil.copytree(folder, before)
    kept = files[2].stat().st_mtime_ns
    files[1].unlink()
    train(*class_flags(folder), output="again")
    assert difference(files[1], before / files[1].name) <= 1
    assert sorted(folder.glob("*.png")) == files and files[2].stat().st_mtime_ns == kept


def test_other_class_images_are_noted_on_resume(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, but it is no longer the one that would not have stopped."""
    flags = [*class_flags(tmp_path / "class"), "--checkpointing_steps=2", LATEST]
    train(*flags, max_train_steps=2)
    train(*flags)
    assert "differ from those that the checkpoint" not in capsys.readouterr().out
    Image.new("RGB", (64, 64)).save(tmp_path / "class" / "class-00001.png")
    train(*flags, max_train_steps=6)
    assert "samples of the class differ from those that the checkpoint was trained with" in capsys.readouterr().out


def test_class_images_of_another_class_are_not_reused(train: Train, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Each class prompt has its own folder."""
    prompts = ["--class_prompt=a dog", f"--validation_prompt={PREVIEW_PROMPT}"]
    embeddings = compute(tiny, photos, tmp_path / "e.parquet", "--no_t5", *prompts)
    flags = ["--with_prior_preservation", "--num_class_images=1", "--max_train_steps=1"]
    for prompt in (PREVIEW_PROMPT, "a dog", "a dog"):
        output = train(*flags, f"--class_prompt={prompt}", data_df_path=embeddings)
        shutil.rmtree(output / "checkpoint-1")  # a new run wants a folder without
    assert len(list(output.glob("class_images-*/class-00000.png"))) == 2


def test_class_images_are_of_the_model_without_a_lora_to_start_from(train: Train, tmp_path: Path) -> None:
    """What is to be preserved is the model's class, not what another LoRA made of it."""
    start = train(learning_rate=0.1, output="start") / trainer.LORA_NAME
    train(*class_flags(tmp_path / "one"), output="one")
    train(*class_flags(tmp_path / "other"), f"--pretrained_lora_path={start}", output="other")
    files = sorted((tmp_path / "one").glob("class-*.png"))
    assert len(files) == 3 and all(difference(path, tmp_path / "other" / path.name) <= 1 for path in files)


def test_class_images_are_made_at_the_largest_resolution_and_trained_at_each(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--num_class_images counts images, not their resolutions; previews have the largest as well."""
    orders = []
    sample_order = trainer.sample_order

    def order_and_keep(*given: object) -> list[trainer.Example]:
        order = sample_order(*given)
        orders.append(order)
        return order

    monkeypatch.setattr(trainer, "sample_order", order_and_keep)
    flags = [f"--validation_prompt={PREVIEW_PROMPT}", "--num_validation_images=1", "--validation_steps=2"]
    output = train(*class_flags(tmp_path / "class", 2), *flags, "--resolution", "48", "64", "--max_train_steps=8")
    made = sorted((tmp_path / "class").glob("*.png"))
    assert [Image.open(path).size for path in made] == [(64, 64)] * 2
    assert Image.open(output / "samples" / "step-000002-prompt-0-0.png").size == (64, 64)
    shown = [(each.path.name, each.shape[0]) for each in orders[0] if each.path in made]
    assert sorted(shown) == sorted((path.name, side) for path in made for side in (48, 64))


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


def test_a_model_in_a_folder_has_one_folder_of_class_images_however_it_is_typed() -> None:
    """Completion adds a slash. The name is the one that earlier versions gave without it."""
    folders = set()
    for model in ("models/sd3", "models/sd3/", "./models/sd3"):
        prior = ["--with_prior_preservation", "--class_prompt=a dog"]
        args = parse(f"--pretrained_model_name_or_path={model}", *prior, "--output_dir=out")
        folders.add(trainer.class_folder(args))
    earlier = trainer.digest(["models/sd3", None, "a dog", 512])
    assert folders == {Path("out") / f"class_images-{earlier}"}


def velocity_flags(folder: Path, *flags: str) -> list[str]:
    return [*class_flags(folder, 32), "--class_samples=velocities", *flags]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_velocities_have_no_loss_before_the_first_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """A new LoRA predicts what the model predicted, at noisy photos; fp16 files round it."""
    orders = []
    sample_order = trainer.sample_order

    def class_alone(groups: list[list[trainer.Example]], *rest: object) -> list[trainer.Example]:
        orders.append(sample_order([groups[1]], *rest))
        return orders[-1]

    monkeypatch.setattr(trainer, "sample_order", class_alone)
    output = train(*velocity_flags(tmp_path / "class"), f"--mixed_precision={precision}", "--train_batch_size=8")
    assert len({example.latents for example in orders[0][:8]}) == 4
    assert 0 < logged(output)[0] < {"no": 1e-5, "bf16": 1e-3}[precision]


def test_velocities_resume_exactly_with_shapes_masks_and_dropped_captions(
    train: Train, photos: Path, tmp_path: Path
) -> None:
    """Two steps and two more give the LoRA of four, though all files are lost in between."""
    masked = Path(shutil.copytree(photos, tmp_path / "photos"))
    photo = trainer.find_images(masked)[0]
    Image.new("L", Image.open(photo).size, "white").save(photo.with_suffix(".mask.png"))
    flags = [
        f"--instance_data_dir={masked}",
        "--aspect_ratio_buckets",
        "--train_batch_size=2",
        "--alpha_mask",
        "--caption_dropout=0.5",
    ]
    flags = velocity_flags(tmp_path / "class", *flags, "--class_every_n_samples=3")
    whole = train(*flags, output="whole")
    train(*flags, output="parts", max_train_steps=2, checkpointing_steps=2)
    files = sorted((tmp_path / "class").iterdir())
    before = [path.read_bytes() for path in files]
    shutil.rmtree(tmp_path / "class")
    parts = train(*flags, LATEST, output="parts")
    assert [path.read_bytes() for path in files] == before and len(files) == 4
    assert equal(lora(whole), lora(parts)) and not equal(lora(whole), lora(train(output="plain")))
    with pytest.raises(SystemExit, match="class_samples velocities, this run has images"):
        train(*flags, "--class_samples=images", LATEST, output="parts")


def test_the_plan_counts_the_velocities_that_are_missing(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose files are all there has nothing to make first."""
    train(*velocity_flags(tmp_path / "class"), output="one")
    assert "to make first: 32 class velocities" in capsys.readouterr().out
    train(*velocity_flags(tmp_path / "class", "--num_class_images=40", "--dry_run"), output="two")
    assert "to make first: 8 class velocities" in capsys.readouterr().out
    train(*velocity_flags(tmp_path / "class", "--dry_run"), output="two")
    assert "to make first" not in capsys.readouterr().out


def test_another_run_uses_the_velocities_that_fit_it(train: Train, tiny: Path, tmp_path: Path) -> None:
    """Whatever its seed and batch are; a damaged file is made again.

    Another precision has files of its own, and so have other noise levels and another attention's weights.
    """
    folder = tmp_path / "class"
    train(*velocity_flags(folder), output="one")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    damaged = sorted(before)[0]
    damaged.write_bytes(before[damaged][0][:-1] + b"?")
    train(*velocity_flags(folder, "--num_class_images=33", "--seed=7", "--sample_batch_size=1"), output="other")
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert len(after) == 5 and all(after[path] == before[path] for path in before if path != damaged)
    one, other = load_file(damaged), safetensors.torch.load(before[damaged][0])
    assert all(torch.allclose(one[name], other[name], atol=1e-2) for name in ("mean", "noise", "sigma"))
    train(*velocity_flags(folder, "--mixed_precision=bf16"), output="bf16")
    assert len([*folder.iterdir()]) == 9
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"shift": 3.0', '"shift": 2.0'))
    train(*velocity_flags(folder, f"--pretrained_model_name_or_path={model}"), output="noise levels")
    assert len([*folder.iterdir()]) == 13
    weights = next((model / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["transformer_blocks.1.attn.to_out.0.weight"].neg_()
    safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    train(*velocity_flags(folder, f"--pretrained_model_name_or_path={model}"), output="weights")
    assert len([*folder.iterdir()]) == 17


def test_velocities_that_are_not_finite_are_not_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end the run as an image would that is black."""
    monkeypatch.setattr(trainer, "predict_velocity", lambda model, noisy, *_: noisy * float("nan"))
    with pytest.raises(SystemExit, match="--mixed_precision"):
        train(*velocity_flags(tmp_path / "class"))
    assert not [*(tmp_path / "class").iterdir()]


def test_a_run_that_draws_nothing_says_nothing_of_guidance(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan of velocities without previews; class images are drawn."""
    flags = [*class_flags(tmp_path / "class"), "--dry_run"]
    train(*flags)
    assert "--guidance_scale" in capsys.readouterr().out
    train(*flags, "--class_samples=velocities")
    printed = capsys.readouterr().out
    assert "velocities" in printed and "--guidance_scale" not in printed
