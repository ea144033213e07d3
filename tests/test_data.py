"""Pictures, latents, and training samples as a function of (seed, sample number)."""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_pipeline
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, compute
from diffusers import AutoencoderKL
from PIL import Image


def make_args(model: Path, photos: Path, *flags: str) -> argparse.Namespace:
    values = {
        "pretrained_model_name_or_path": model, "instance_data_dir": photos, "data_df_path": "e",
        "instance_prompt": PROMPT, "resolution": 64, "seed": 0,
    }  # fmt: skip
    return trainer.parse_args([*(f"--{name}={value}" for name, value in values.items()), *flags])


def encode(args: argparse.Namespace, path: Path) -> list[str]:
    """Write the latents of a folder; the pictures' hashes."""
    images, _ = trainer.find_images(args.instance_data_dir)
    hashes = [trainer.hash_image(image) for image in images]
    key = trainer.latents_key(args, dict(zip(images, hashes, strict=True)))
    trainer.write_latents(path, key, images, args, torch.device("cpu"))
    return hashes


@pytest.fixture
def samples(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> Callable[..., trainer.SampleDataset]:
    """Training samples of the five pictures, by a range of numbers and flags."""

    def make(sample_numbers: range, *flags: str, micro_batch: int = 1) -> trainer.SampleDataset:
        args = make_args(tiny, photos, *flags)
        path = tmp_path / f"{abs(hash(flags))}.arrow"
        hashes = encode(args, path)
        table = trainer.PromptEmbeddings(embeddings, tiny_pipeline.T5_WIDTH)
        sigmas = torch.linspace(1, 0.001, 1000)
        prompts = [table.prompt_of_image[image_hash] for image_hash in hashes]
        what = args, path, table, prompts, sigmas, sample_numbers
        return trainer.SampleDataset(*what, micro_batch=micro_batch)

    return make


def test_latents_have_shift_and_scale(tiny: Path, tmp_path: Path) -> None:
    """(z - shift) * scale, as the pipeline decodes them; the reference forgot the shift."""
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    encode(make_args(tiny, tmp_path / "photos"), tmp_path / "latents.arrow")
    row = trainer.open_latents(tmp_path / "latents.arrow").get_batch(0)
    vae = AutoencoderKL.from_pretrained(tiny, subfolder="vae")
    with torch.no_grad():
        posterior = vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
    expected = ((posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor).flatten().half().numpy()
    assert np.array_equal(row["mean"].flatten().to_numpy(), expected)
    expected = (posterior.std * vae.config.scaling_factor).flatten().half().numpy()
    assert np.array_equal(row["std"].flatten().to_numpy(), expected)


def test_a_sample_is_a_function_of_seed_and_number(samples: Callable[..., trainer.SampleDataset]) -> None:
    """Whoever asks for it, whenever: sample 7 is sample 7. Another seed gives another."""
    flags = ["--random_flip"]
    whole, rest = samples(range(10), *flags), samples(range(5, 10), *flags)
    for name, value in whole[7].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(rest[2][name])), name
    assert not torch.equal(samples(range(10), *flags, "--seed=1")[7]["noise"], whole[7]["noise"])
    assert not torch.equal(whole[6]["noise"], whole[7]["noise"])


def test_every_epoch_has_every_picture_once_in_another_order(samples: Callable[..., trainer.SampleDataset]) -> None:
    """Two epochs of five pictures: the same pictures, another permutation."""
    dataset = samples(range(10), "--center_crop")
    means = [trainer.open_latents(dataset.latents_path).get_batch(i)["mean"].flatten().to_numpy() for i in range(5)]
    latents = [dataset[i]["latents"].numpy().ravel() for i in range(10)]
    seen = [int(np.argmin([np.abs(one - mean).mean() for mean in means])) for one in latents]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4] and seen[:5] != seen[5:]


def test_crops_and_flips_vary_between_epochs(samples: Callable[..., trainer.SampleDataset]) -> None:
    """The reference froze them at load. An oblong picture has four crops and their mirror images, a square one two."""
    dataset = samples(range(5), "--random_flip")
    variants = [trainer.open_latents(dataset.latents_path).get_batch(i).num_rows for i in range(5)]
    assert variants == [8, 8, 2, 8, 2]
    dataset.sample_numbers, dataset.kinds = range(40), [(1.0, [[0]])]  # 40 epochs of the first picture
    latents = torch.stack([dataset[i]["latents"].round(decimals=1).flatten() for i in range(40)])
    assert (torch.cdist(latents, latents) > 3).any()


def test_center_crop_takes_the_middle() -> None:
    """One square, in the middle; without it, four along the longer side, from edge to edge."""
    assert trainer.crop_boxes((300, 100), (64, 64), True) == [(100, 0, 200, 100)]
    boxes = trainer.crop_boxes((100, 400), (64, 64), False)
    assert [box[1] for box in boxes] == [0, 100, 200, 300] and all(box[2:] == (100, box[1] + 100) for box in boxes)
    assert len(trainer.crop_boxes((100, 105), (64, 64), False)) == 1  # a crop could move less than a latent pixel
    assert trainer.crop_boxes((4000, 3000), (96, 128), False) == [(0, 0, 4000, 3000)]


def test_phone_photos_are_not_cut(tiny: Path) -> None:
    """3:4, 4:3, 9:16 and 16:9 have buckets of nearly the square's area: less than 3 % of a side is cut off."""
    buckets = trainer.training_shapes(1024, "auto")
    assert len(buckets) == 11 and all(abs(height * width / 1024**2 - 1) < 0.03 for height, width in buckets)
    for width, height in [(3024, 4032), (4032, 3024), (1080, 1920), (1920, 1080), (3000, 2000), (2000, 2000)]:
        shape = buckets[trainer.find_nearest_bucket(height, width, buckets)]
        left, top, right, bottom = trainer.crop_boxes((width, height), shape, True)[0]
        assert (right - left) / width > 0.97 and (bottom - top) / height > 0.97


def test_own_buckets() -> None:
    """As diffusers writes them; one that is no multiple of 16 is refused."""
    assert trainer.training_shapes(64, "64,96; 96,64") == [(64, 96), (96, 64)]
    assert trainer.training_shapes(64, None) == [(64, 64)]
    for wrong in ("64", "64,100", "", "0,64"):
        with pytest.raises(ValueError, match=r"16|[Bb]ucket"):
            trainer.training_shapes(64, wrong)


def test_a_micro_batch_has_one_shape_and_every_picture_comes_as_often(
    samples: Callable[..., trainer.SampleDataset],
) -> None:
    """Pictures of four shapes in micro-batches of two; 20 epochs. Batch size 1 sees each once per epoch."""
    dataset = samples(range(200), "--aspect_ratio_buckets", "--center_crop", micro_batch=2)
    shapes = trainer.latent_shapes(dataset.latents_path)
    assert sorted(set(shapes)) == [(6, 10), (8, 8), (10, 6)]
    ((_, buckets),) = dataset.kinds
    drawn = [trainer.picture_of_sample(buckets, 0, *divmod(number, 2), 2) for number in range(200)]
    assert [drawn.count(i) for i in range(5)] == [40] * 5
    for number in range(0, 200, 2):
        pair = dataset[number]["latents"].shape, dataset[number + 1]["latents"].shape
        assert pair[0] == pair[1] and tuple(pair[0][1:]) == shapes[drawn[number]]
    alone = [trainer.picture_of_sample(buckets, 0, number, 0, 1) for number in range(20)]
    assert all(sorted(alone[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10, 15))


@pytest.mark.parametrize("scheme", ["mode", "sigma_sqrt", "cosmap", "none"])
def test_every_scheme_draws_noise_levels_of_the_schedule(
    samples: Callable[..., trainer.SampleDataset], scheme: str
) -> None:
    """Also `mode`, which can reach one step past the end."""
    dataset = samples(range(200), f"--weighting_scheme={scheme}")
    sigmas = torch.stack([dataset[i]["sigma"] for i in range(200)])
    assert sigmas.min() > 0 and sigmas.max() <= 1 and sigmas.unique().numel() > 100


def test_mode_at_its_edge_stays_inside_the_schedule(
    samples: Callable[..., trainer.SampleDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A density of exactly 1 is the last step, not one past it."""
    dataset = samples(range(1))
    monkeypatch.setattr(trainer, "compute_density_for_timestep_sampling", lambda **_: torch.ones(1))
    assert dataset[0]["sigma"] == dataset.sigmas[-1]


def test_latents_are_reused_until_something_changes(train: Callable[..., Path], photos: Path, tmp_path: Path) -> None:
    """The second run keeps the file; another resolution or flag, or a torn file, makes it anew."""
    latents = train() / "latents.arrow"
    first = latents.stat().st_mtime_ns
    train("--learning_rate=1e-4")
    assert latents.stat().st_mtime_ns == first
    train("--random_flip")
    second = latents.stat().st_mtime_ns
    assert second != first
    latents.write_bytes(latents.read_bytes()[:-100])
    train("--random_flip")
    assert latents.stat().st_mtime_ns != second
    assert [path.name for path in latents.parent.glob("latents*")] == ["latents.arrow"]


def test_what_latents_depend_on(tiny: Path, tiny35: Path, photos: Path) -> None:
    """Pictures, resolution, cropping and the VAE's weights; not the learning rate."""
    image = {photos / "a.jpg": "a"}
    bucketed = make_args(tiny, photos, "--aspect_ratio_buckets")
    assert trainer.latents_key(bucketed, image) != trainer.latents_key(make_args(tiny, photos), image)
    key = trainer.latents_key(make_args(tiny, photos), image)
    assert key == trainer.latents_key(make_args(tiny, photos, "--learning_rate=1"), image)
    flags = ("--resolution=32", "--center_crop", "--random_flip", "--alpha_mask")
    assert all(trainer.latents_key(make_args(tiny, photos, flag), image) != key for flag in flags)
    assert trainer.latents_key(make_args(tiny, photos), {photos / "a.jpg": "b"}) != key


def test_every_second_sample_is_of_the_class(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """With its prompt and weight; each kind comes in epochs of its own, so all pictures come equally often."""
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--prior_loss_weight=0.5"]
    args = make_args(tiny, photos, "--center_crop", *flags)
    encode(args, tmp_path / "latents.arrow")
    table = trainer.PromptEmbeddings(embeddings, tiny_pipeline.T5_WIDTH)
    what = args, tmp_path / "latents.arrow", table, [PROMPT] * 2, torch.linspace(1, 0.001, 1000), range(12)
    data = trainer.SampleDataset(*what, class_images=3)  # the last three of the folder's five pictures
    means = [trainer.open_latents(tmp_path / "latents.arrow").get_batch(i)["mean"][0].as_py() for i in range(5)]
    seen = [[], []]
    for number in range(12):
        sample, kind = data[number], number % 2
        assert sample["loss_weight"] == [1.0, 0.5][kind]
        assert torch.equal(sample["prompt_embeds"], table[[PROMPT, PREVIEW_PROMPT][kind]][0])
        near = [(torch.tensor(mean) - sample["latents"].flatten()).abs().mean().item() for mean in means]
        seen[kind].append(near.index(min(near)))
    assert [sorted(seen[0][i : i + 2]) for i in (0, 2, 4)] == [[0, 1]] * 3
    assert [sorted(seen[1][i : i + 3]) for i in (0, 3)] == [[2, 3, 4]] * 2


def test_captions_are_dropped_as_often_as_asked(samples: Callable[..., trainer.SampleDataset]) -> None:
    """A dropped caption becomes the empty prompt; everything else about the sample stays."""
    always, sometimes = samples(range(100)), samples(range(100), "--caption_dropout=0.3")
    empty = always.embeddings[""][0]
    dropped = [torch.equal(sometimes[i]["prompt_embeds"], empty) for i in range(100)]
    assert 15 <= sum(dropped) <= 45 and not torch.equal(always[0]["prompt_embeds"], empty)
    assert all(torch.equal(always[i]["noise"], sometimes[i]["noise"]) for i in range(3))


def test_masks_weight_the_loss(tiny: Path, tmp_path: Path) -> None:
    """From the alpha channel, from NAME.mask.png, which is no picture itself, or 1; mirrored with the picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    alpha = np.zeros((64, 64), np.uint8)
    alpha[:, :16] = 255
    Image.fromarray(np.dstack([np.full((64, 64, 3), 90, np.uint8), alpha])).save(folder / "a.png")
    for name in ("b.jpg", "c.jpg"):
        Image.new("RGB", (64, 64), "red").save(folder / name)
    Image.fromarray(255 - alpha).save(folder / "b.mask.png")
    args = make_args(tiny, folder, "--alpha_mask", "--random_flip")
    encode(args, tmp_path / "latents.arrow")
    masks = [trainer.open_latents(tmp_path / "latents.arrow").get_batch(i)["mask"] for i in range(3)]
    left = np.zeros((8, 8))
    left[:, :2] = 1
    for mask, expected in ((masks[0], left), (masks[1], 1 - left)):
        mirrored = expected[:, ::-1]
        assert mask.to_pylist() == [expected.flatten().tolist(), mirrored.flatten().tolist()]
    assert masks[2].null_count == 2
    table = type("Table", (), {"__getitem__": lambda *_: (torch.zeros(1), torch.zeros(1))})()
    data = trainer.SampleDataset(args, tmp_path / "latents.arrow", table, ["a"] * 3, torch.ones(1), range(3))
    assert sorted(sample["mask"].mean().item() for sample in data) == [0.25, 0.75, 1.0]


def test_a_mask_of_another_size(tiny: Path, tmp_path: Path) -> None:
    """Is named before anything is trained."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    Image.new("L", (32, 64)).save(tmp_path / "a.mask.png")
    with pytest.raises(SystemExit, match="a.jpg.*its mask"):
        encode(make_args(tiny, tmp_path, "--alpha_mask"), tmp_path / "latents.arrow")


def test_unreadable_pixels_are_named_before_the_transformer_loads(
    train: Callable[..., Path], photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A truncated JPEG has a good header; decoding finds it. Both bad pictures are named, and no file is left."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    for name in ("a.jpg", "b.JPEG"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])
    monkeypatch.setattr(trainer, "load_transformer", lambda *_: pytest.fail("loaded"))
    embeddings = compute(tiny, folder, tmp_path / "e.parquet", f"--prompt={PROMPT}", "--no_t5")
    with pytest.raises(SystemExit, match="(?s)a.jpg.*b.JPEG"):
        train(instance_data_dir=folder, data_df_path=embeddings)
    assert not list((tmp_path / "out").glob("latents*"))


def test_pictures_are_upright_and_on_white(tmp_path: Path) -> None:
    """A phone's EXIF rotation is applied; what is transparent becomes white."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert trainer.open_image(tmp_path / "a.jpg").size == (10, 20)
    grey = np.array([[0, 32768], [65535, 256]], np.uint16)  # 16 bits, which convert would cut off at 255
    Image.fromarray(grey).save(tmp_path / "c.png")
    assert [trainer.open_image(tmp_path / "c.png").getpixel(at)[0] for at in ((0, 0), (1, 0), (0, 1))] == [0, 128, 255]
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "b.png")
    assert trainer.open_image(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)
