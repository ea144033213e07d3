"""Images, their latents, the order of samples, and training samples as a function of (seed, sample number)."""

import itertools
import os
import re
import shutil
import signal
import struct
import unicodedata
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features
from torch import Tensor
from torch.utils.data import DataLoader

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import LATEST, PREVIEW_PROMPT, PROMPT, Train, compute, equal, lora

ENTIRE = (64, 64)
Load = Callable[..., DataLoader]


def make_args(*flags: str) -> trainer.Args:
    required = ["--instance_data_dir=d", "--data_df_path=e", f"--instance_prompt={PROMPT}", "--resolution=64"]
    return trainer.parse_args(["--pretrained_model_name_or_path=m", *required, *flags])


def make_example(path: Path | str, shape: tuple[int, int] = ENTIRE, mask: Path | None = None) -> trainer.Example:
    return trainer.Example(Path(path), "", mask, Path(f"{path}.latents"), shape, shape, False, PROMPT)


@pytest.fixture
def load(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Load:
    """Run the trainer as far as the training, and return what it would have trained on."""

    def run(*flags: str, **changes: object) -> DataLoader:
        loaded: list[DataLoader] = []
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "train", lambda _args, _plan, _state, _model, loader, *_: loaded.append(loader))
            train(*flags, **changes)
        return loaded[0]

    return run


@pytest.fixture
def samples(load: Load) -> Callable[..., trainer.SampleDataset]:
    """All samples of a run."""
    return lambda *flags, **changes: load(*flags, **changes).dataset.dataset


# --------------------------------------------------------------------------------------------------------- latents


class Mirror:
    """Stands where the VAE does; its latents are the pixels themselves."""

    device, config = torch.device("cpu"), Namespace(shift_factor=0, scaling_factor=1)

    def encode(self, pixel_values: Tensor) -> Namespace:
        return Namespace(latent_dist=Namespace(mean=pixel_values, std=pixel_values))


def variants(path: Path, shape: tuple[int, int], *flags: str) -> Tensor:
    """The variants of an image as the VAE is given them, (V, 3, H, W), in 0 to 255."""
    encoded = trainer.encode_image(Mirror(), make_example(path, shape), make_args(*flags))["mean"]
    return ((encoded.float() + 1) * 127.5).round()


def save_noise(path: Path, width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Image.fromarray(pixels)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def test_latents_have_shift_and_scale(tiny: Path, tmp_path: Path) -> None:
    """(z - shift) * scale, as the pipeline decodes them; the reference forgot the shift."""
    image = save_noise(tmp_path / "a.png", 64, 64)
    local = trainer.LocalModel(str(tiny), tiny, None, None)
    loaded = trainer.load_vae(local, torch.float32)
    latents = trainer.encode_image(loaded, make_example(tmp_path / "a.png"), make_args())
    vae = AutoencoderKL.from_pretrained(tiny, subfolder="vae")
    with torch.no_grad():
        posterior = vae.encode(as_tensor(image)[None] / 127.5 - 1).latent_dist
    assert torch.equal(latents["mean"], ((posterior.mean - 0.0609) * 1.5305).half())
    assert torch.equal(latents["std"], (posterior.std * 1.5305).half())
    assert torch.equal(latents["mask"], torch.ones(1, 1, 8, 8, dtype=torch.half))


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 400)])
def test_crops_go_from_edge_to_edge(tmp_path: Path, width: int, height: int) -> None:
    """Four squares along the longer side, to the pixel; with --center_crop the one in the middle."""
    image = save_noise(tmp_path / "a.png", width, height)

    def crop(share: float) -> Tensor:
        left, top = share * (width - 100), share * (height - 100)
        box = (left, top, left + 100, top + 100)
        return as_tensor(image.resize(ENTIRE, Image.Resampling.LANCZOS, box=box))

    crops = variants(tmp_path / "a.png", ENTIRE)
    assert torch.equal(crops, torch.stack([crop(number / 3) for number in range(4)]))
    assert torch.equal(variants(tmp_path / "a.png", ENTIRE, "--center_crop"), crop(0.5)[None])


@pytest.mark.parametrize(("size", "shape", "crops"), [
    ((100, 112), ENTIRE, 1), ((100, 113), ENTIRE, 4), ((400, 300), (96, 128), 1),
])  # fmt: skip
def test_a_crop_that_could_hardly_move_is_one(tmp_path: Path, size: tuple, shape: tuple, crops: int) -> None:
    """Where the longer side exceeds the shape by less than a latent pixel, which is 8 wide."""
    save_noise(tmp_path / "a.png", *size)
    assert len(variants(tmp_path / "a.png", shape)) == crops


def test_random_flip_adds_the_mirror_images(tmp_path: Path) -> None:
    """Each crop is followed by its own."""
    save_noise(tmp_path / "a.png", 128, 64)
    both, plain = variants(tmp_path / "a.png", ENTIRE, "--random_flip"), variants(tmp_path / "a.png", ENTIRE)
    assert torch.equal(both[::2], plain) and torch.equal(both[1::2], plain.flip(-1))


def test_masks_weight_the_loss(tmp_path: Path) -> None:
    """From the alpha channel, from NAME.mask.png, which is no photo itself, or 1; mirrored with the image."""
    alpha = np.zeros((64, 64), np.uint8)
    alpha[:, :16] = 255
    Image.fromarray(np.dstack([np.full((64, 64, 3), 90, np.uint8), alpha])).save(tmp_path / "a.png")
    for name in ("b.jpg", "c.jpg"):
        Image.new("RGB", (64, 64), "red").save(tmp_path / name)
    Image.fromarray(255 - alpha).save(tmp_path / "b.mask.png")
    args, left = make_args("--alpha_mask", "--random_flip"), torch.zeros(8, 8)
    left[:, :2] = 1
    images = trainer.find_images(tmp_path)
    assert [path.name for path in images] == ["a.png", "b.jpg", "c.jpg"]
    masks = trainer.masks_beside(images)
    for path, expected in zip(images, (left, 1 - left, torch.ones(8, 8)), strict=True):
        example = make_example(path, mask=masks.get(path))
        mask = trainer.encode_image(Mirror(), example, args)["mask"]  # (2, 1, 8, 8)
        assert torch.equal(mask[:, 0].float(), torch.stack([expected, expected.flip(-1)])), path.name
        assert (trainer.encode_image(Mirror(), example, make_args())["mask"] == 1).all()


def read(path: Path) -> Image.Image:
    """The photo as it is trained on, in RGB."""
    return trainer.read_image(path, None)[0]


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    """Whatever color the file has there."""
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_16_bits_become_8(tmp_path: Path) -> None:
    """Scaled, not cut off, as convert would."""
    Image.fromarray(np.array([[0, 32768], [65535, 256]], np.uint16)).save(tmp_path / "a.png")
    image = read(tmp_path / "a.png")
    assert [image.getpixel(at)[0] for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 128, 255, 1]


def save_with_odd_exif(path: Path, orientation: int) -> None:
    """A photo of 20 x 10 as some phones write it: EXIF has its width as a double, and a negative resolution."""

    def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack(">HHI", tag, kind, count) + value

    values = 8 + 2 + 3 * 12 + 4  # where values of more than 4 bytes begin: after the header and three entries
    entries = entry(0x0100, 12, 1, struct.pack(">I", values))  # ImageWidth as a double
    entries += entry(0x0112, 3, 1, struct.pack(">HH", orientation, 0))
    entries += entry(0x011A, 5, 1, struct.pack(">I", values + 8))  # XResolution, a fraction without a sign, of -72
    data = struct.pack(">d", 20.0) + struct.pack(">iI", -72, 1)
    tiff = b"MM\0*" + struct.pack(">IH", 8, 3) + entries + struct.pack(">I", 0) + data
    Image.new("RGB", (20, 10)).save(path, exif=b"Exif\0\0" + tiff)


def test_odd_exif_does_not_keep_a_photo_from_being_turned(tmp_path: Path) -> None:
    """Of EXIF the orientation alone is read; writing the rest anew ended in a struct.error."""
    save_with_odd_exif(tmp_path / "a.jpg", orientation=6)
    assert read(tmp_path / "a.jpg").size == (10, 20)


def test_exif_that_cannot_be_read_leaves_a_photo_as_it_is(tmp_path: Path) -> None:
    """Its pixels are good."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF")
    assert read(tmp_path / "a.jpg").size == (20, 10)


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])
def test_images_are_turned_as_pillow_turns_them(tmp_path: Path, name: str) -> None:
    """By all eight EXIF orientations; Pillow turns a TIFF when it loads one, and gives its size as turned before."""
    image = save_noise(tmp_path / "noise.png", 20, 10)
    path = tmp_path / name
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)
        expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        assert as_tensor(read(path)).equal(as_tensor(expected)), orientation
        with trainer.opened_photo(path) as opened:
            assert trainer.upright_size(opened) == (expected.height, expected.width), orientation


def test_a_png_with_a_long_text_is_read(tmp_path: Path) -> None:
    """1.5 MB, as programs write that note how an image was made; Pillow refuses 1 MB."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 1_500_000, zip=True)
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png", pnginfo=text)
    assert read(tmp_path / "a.png").size == (20, 10)


def adobe_rgb() -> bytes:
    """A profile of Adobe RGB's kind: sRGB's, whose red has another place, under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    start = profile.index(b"rXYZ") + 4
    place = int.from_bytes(profile[start : start + 4], "big")
    profile[place + 8 : place + 12] = int(0.6097 * 65536).to_bytes(4, "big")  # the X of red
    return (
        bytes(profile)
        .replace("sRGB".encode("utf-16-be"), "wide".encode("utf-16-be"))
        .replace(b"sRGB built", b"wide built")
    )


def test_colors_of_another_profile_become_srgb(tmp_path: Path) -> None:
    """A phone's photos have Display P3: taken for sRGB, they are pale. Alpha stays, and sRGB changes nothing."""
    image = Image.new("RGBA", (8, 8), (200, 40, 40, 250))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    renamed = srgb.replace("sRGB".encode("utf-16-be"), "uRGB".encode("utf-16-be"))  # as small copies of it are
    profiles = {"none": None, "srgb": srgb, "renamed": renamed, "wide": adobe_rgb(), "broken": b"x" * 200}
    profiles["incomplete"] = adobe_rgb().replace(b"rTRC", b"xxxx")  # it can be opened, but not used
    colors = {}
    for name, profile in profiles.items():
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        rgb, alpha = trainer.read_image(tmp_path / f"{name}.png", None)
        assert alpha.getpixel((0, 0)) == 250
        colors[name] = rgb.getpixel((0, 0))
    assert colors.pop("wide")[0] > colors["none"][0] + 9
    assert set(colors.values()) == {colors["none"]}


@pytest.mark.parametrize("name", ["a-masklabel.png", "A_Mask.PNG"])
def test_masks_of_other_trainers_are_masks(tmp_path: Path, name: str) -> None:
    """OneTrainer's -masklabel and everybody's _mask, whatever their case, as Windows and cameras do not care."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    Image.new("L", (8, 8)).save(tmp_path / name)
    images = trainer.find_images(tmp_path)
    assert images == [tmp_path / "a.jpg"] and trainer.masks_beside(images) == {images[0]: tmp_path / name}


def test_a_mask_that_two_images_could_have_is_that_of_the_one_with_its_letters(tmp_path: Path) -> None:
    """Where both can be, a.jpg and A.jpg are two photos; neither takes what could be the other's."""
    for name in ("a.jpg", "A.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    if len(trainer.find_images(tmp_path)) == 1:
        pytest.skip("this file system takes a.jpg for A.jpg")
    Image.new("L", (8, 8)).save(tmp_path / "a_mask.png")
    images = trainer.find_images(tmp_path)
    assert images == [tmp_path / "A.jpg", tmp_path / "a.jpg"]
    assert trainer.masks_beside(images) == {tmp_path / "a.jpg": tmp_path / "a_mask.png"}


def test_a_mask_of_another_unicode_form_is_found(tmp_path: Path) -> None:
    """A photo from a Mac's archive, a mask from elsewhere."""
    photo = tmp_path / unicodedata.normalize("NFD", "café.png")
    mask = tmp_path / unicodedata.normalize("NFC", "café_mask.png")
    for path in (photo, mask):
        Image.new("L", (8, 8)).save(path)
    assert trainer.find_images(tmp_path) == [photo] and trainer.masks_beside([photo]) == {photo: mask}


def test_a_mask_may_have_its_shape_in_the_alpha_channel(tmp_path: Path) -> None:
    """As programs write that cut out the subject; without transparency, a mask's brightness counts."""
    photo, mask_path = tmp_path / "a.png", tmp_path / "a.mask.png"
    Image.new("RGB", (2, 1)).save(photo)
    mask = Image.new("RGBA", (2, 1), "black")
    mask.save(mask_path)
    assert trainer.read_image(photo, mask_path)[1].tobytes() == bytes([0, 0])
    mask.putalpha(Image.frombytes("L", (2, 1), bytes([255, 0])))
    mask.save(mask_path)
    assert trainer.read_image(photo, mask_path)[1].tobytes() == bytes([255, 0])


@pytest.mark.parametrize("dark", [1, 5])
def test_masks_that_are_dark_all_over_are_reported(
    train: Train, photos: Path, tmp_path: Path, dark: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as those of labels, 0 and 1: nothing was learned, without a word. One is noted, all end the run."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    for number, path in enumerate(trainer.find_images(folder)):
        mask = Image.new("L", Image.open(path).size, 1 if number < dark else 255)
        mask.save(folder / f"{path.stem}.mask.png")
    expected = rf"dark all over at an eighth of the size: {dark} \(first: {folder / 'a.jpg'}\)"
    if dark == 5:
        with pytest.raises(SystemExit, match=f"--alpha_mask: .*{expected}"):
            train("--alpha_mask", "--dry_run", instance_data_dir=folder)
    else:
        train("--alpha_mask", "--dry_run", instance_data_dir=folder)
        assert re.search(f"note: .*{expected}", capsys.readouterr().out)


def test_photos_of_200_megapixels_are_read_and_far_larger_ones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As phones make them; Pillow gave a warning for half as many, and refused them."""
    assert Image.MAX_IMAGE_PIXELS > 16320 * 12240
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(trainer.UserError, match=r"a\.jpg .*pixels"):
        read(tmp_path / "a.jpg")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_a_damaged_photo_is_named_whatever_its_decoder_raises(tmp_path: Path) -> None:
    """AVIF's raises RuntimeError, which ended the program without the file's name."""
    path = tmp_path / "a.avif"
    Image.new("RGB", (64, 64), "red").save(path)
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data[:start] + bytes(len(data) - start))
    with pytest.raises(trainer.UserError, match=r"a\.avif cannot be read"):
        read(path)


def test_a_heic_that_needs_a_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messengers give it other names; without pillow-heif the file is not broken."""
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    monkeypatch.setattr(Image, "registered_extensions", lambda: {".jpg": "JPEG"})
    with pytest.raises(trainer.UserError, match=r"a\.jpg .*pip install pillow-heif"):
        read(tmp_path / "a.jpg")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    """As many phones and websites give it."""
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.avif")
    [path] = trainer.find_images(tmp_path)
    assert read(path).size == (20, 10)


def test_a_mask_of_another_size_is_an_error(tmp_path: Path) -> None:
    """It belongs to another image."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    Image.new("L", (32, 64)).save(tmp_path / "a.mask.png")
    with pytest.raises(trainer.UserError, match=r"a\.jpg .*its mask a\.mask\.png"):
        trainer.read_image(tmp_path / "a.jpg", tmp_path / "a.mask.png")


def test_a_photo_may_be_named_like_a_mask(tmp_path: Path) -> None:
    """Where there is no other image of that name it is one."""
    Image.new("RGB", (64, 64)).save(tmp_path / "dog_mask.png")
    assert trainer.find_images(tmp_path) == [tmp_path / "dog_mask.png"]


# ------------------------------------------------------------------------------------------------ the latents' files


def latents_names(folder: Path, *flags: str, vae: str = "vae") -> list[str]:
    args = make_args(*flags)
    accelerator = trainer.make_accelerator(args)
    base_model = trainer.BaseModel(files=None, skeleton=None, identity=vae, noise_scheduler=None)
    images = trainer.find_images(folder)
    found = trainer.find_examples(images, args, base_model, accelerator, trainer.Problems(accelerator))
    return [example.latents.name for example in found]


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """A folder of one image and its mask."""
    folder = tmp_path / "masked"
    folder.mkdir()
    save_noise(folder / "a.png", 64, 96)
    Image.new("L", (64, 96)).save(folder / "a.mask.png")
    return folder


@pytest.mark.parametrize(
    "flag", ["--resolution=32", "--center_crop", "--random_flip", "--alpha_mask", "--aspect_ratio_buckets=64,80"]
)
def test_latents_of_other_flags_are_other_files(masked: Path, flag: str) -> None:
    """Whatever changes the latents changes their name, and the learning rate does not."""
    names = latents_names(masked)
    assert names == latents_names(masked, "--learning_rate=1e-5", "--rank=8")
    assert names != latents_names(masked, flag)


def test_latents_of_other_images_masks_and_models_are_other_files(masked: Path) -> None:
    """By their bytes: not by their names and dates."""
    before, with_mask = latents_names(masked), latents_names(masked, "--alpha_mask")
    assert before != latents_names(masked, vae="another")
    Image.new("L", (64, 96), 1).save(masked / "a.mask.png")
    assert before == latents_names(masked) and with_mask != latents_names(masked, "--alpha_mask")
    (masked / "a.png").rename(masked / "b.png")
    assert before == latents_names(masked)
    save_noise(masked / "b.png", 65, 96)
    assert before != latents_names(masked)


def test_a_new_image_costs_one_encoding(
    load: Load, tiny: Path, photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """Latents that are there stay; those of images that are gone are not in the way."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    load()
    latents = tmp_path / "out" / "latents"
    first = {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    save_noise(folder / "new.png", 64, 64)
    (folder / "a.jpg").unlink()
    more = compute(tiny, folder, tmp_path / "e.parquet", "--no_t5")
    load(instance_data_dir=folder, data_df_path=more)
    second = {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    assert len(first) == 5 and len(second) == 6 and first.items() < second.items()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def swap_two(paths: list[Path]) -> None:
    one, other = (path.read_bytes() for path in paths[:2])
    paths[0].write_bytes(other)
    paths[1].write_bytes(one)


def flip_a_bit(paths: list[Path]) -> None:
    content = bytearray(paths[0].read_bytes())
    content[-99] ^= 4
    paths[0].write_bytes(content)


@pytest.mark.parametrize("spoil", [swap_two, flip_a_bit])
def test_latents_that_are_not_what_was_encoded_are_encoded_again(
    train: Train, tmp_path: Path, spoil: Callable[[list[Path]], None]
) -> None:
    """Those of another photo, or with a flipped bit, trained another LoRA in silence; now it is the same."""
    latents = train() / "latents"
    spoilt = Path(shutil.copytree(latents, tmp_path / "again" / "latents"))
    spoil(sorted(spoilt.iterdir()))
    assert contents(spoilt) != contents(latents)
    again = train(output="again")
    assert contents(spoilt) == contents(latents) and equal(lora(again), lora(tmp_path / "out"))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Let a test that waits for a minute fail: nobody writes into its pipe."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for a pipe"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put_pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("name", ["a.jpg", "a.mask.png"])
def test_a_pipe_in_the_place_of_a_photo_or_a_mask_is_named(
    train: Train, photos: Path, tmp_path: Path, name: str
) -> None:
    """It was waited for forever."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    pipe = put_pipe(folder / name)
    with pytest.raises(SystemExit, match=re.escape(f"{pipe} cannot be read")):
        train("--alpha_mask", instance_data_dir=folder)


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_in_the_place_of_a_training_state_is_named(train: Train) -> None:
    """Before anything is trained."""
    checkpoint = train() / "checkpoint-4"
    put_pipe(checkpoint / trainer.STATE_NAME)
    with pytest.raises(SystemExit, match=f"--resume_from_checkpoint latest: .*{checkpoint}"):
        train(LATEST, max_train_steps=5)


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_in_the_place_of_latents_is_replaced(load: Load, tmp_path: Path) -> None:
    """As every file is that does not prove to be what was encoded."""
    load()
    latents = tmp_path / "out" / "latents"
    before = contents(latents)
    put_pipe(latents / min(before))
    load()
    assert contents(latents) == before


@pytest.mark.usefixtures("no_waiting")
def test_a_pipe_in_the_place_of_the_card_is_named(train: Train, tmp_path: Path) -> None:
    """It is nothing that this program wrote, so it is not replaced; it was waited for after the training."""
    (tmp_path / "out").mkdir()
    pipe = put_pipe(tmp_path / "out" / "README.md")
    with pytest.raises(SystemExit, match=f"{pipe} would be replaced"):
        train()
    assert pipe.is_fifo()


def test_class_images_that_cannot_be_read_are_named_before_others_are_made(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A truncated JPEG has a good header; decoding finds it. All are named at once, before anything is encoded."""
    folder = Path(shutil.copytree(photos, tmp_path / "class"))
    for name in ("a.jpg", "b.JPEG"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])
    (folder / "c.png").write_text("no image")
    monkeypatch.setattr(trainer, "encode_latents", lambda *_: pytest.fail("images were encoded"))
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=8"]
    with pytest.raises(SystemExit) as stop:
        train(*flags, f"--class_data_dir={folder}")
    for name in ("a.jpg", "b.JPEG", "c.png"):
        assert f"{folder / name} cannot be read" in str(stop.value.code)


def test_pixels_that_cannot_be_read_are_named(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both bad images, which the encoding finds, and the good ones are encoded."""
    folder = Path(shutil.copytree(photos, tmp_path / "class"))
    for name in ("a.jpg", "b.JPEG"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])
    monkeypatch.setattr(trainer, "check_class_images", lambda *_: None)  # as if they broke after it
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=5"]
    with pytest.raises(SystemExit, match=r"(?s)class/a\.jpg cannot be read.*class/b\.JPEG cannot be"):
        train(*flags, f"--class_data_dir={folder}")
    assert len(list((tmp_path / "out" / "latents").iterdir())) == 5  # of the subject, which the three others equal


# ------------------------------------------------------------------------------------------------ the order of samples


def make_kinds(*counts: int, shapes: tuple[tuple[int, int], ...] = (ENTIRE,)) -> list[list[trainer.Example]]:
    """Lists of examples; their shapes take turns."""
    turns = itertools.cycle(shapes)
    return [[make_example(f"{kind}-{number}", next(turns)) for number in range(count)]
            for kind, count in enumerate(counts)]  # fmt: skip


def test_every_epoch_has_every_image_once_in_another_order() -> None:
    """Also the last one, as far as it goes."""
    [images] = kinds = make_kinds(20)
    order = trainer.sample_order(kinds, 2, 0, 1, 50)
    assert set(order[:20]) == set(order[20:40]) == set(images) and len(set(order[40:])) == 10
    assert order[:20] != order[20:40] and order != trainer.sample_order(kinds, 2, 1, 1, 50)


def test_the_class_takes_turns_with_the_subject() -> None:
    """Each in epochs of its own, whatever their numbers."""
    subject, images = kinds = make_kinds(2, 3)
    order = trainer.sample_order(kinds, 2, 0, 4, 13)
    assert [set(order[::2][start : start + 2]) == set(subject) for start in (0, 2, 4)] == [True] * 3
    assert [set(order[1::2][start : start + 3]) == set(images) for start in (0, 3)] == [True] * 2


def test_the_class_can_have_fewer_turns() -> None:
    """Of every four samples the last; an epoch over six images of the subject is eight samples then."""
    subject, images = kinds = make_kinds(6, 3)
    order = trainer.sample_order(kinds, 4, 0, 1, 40)
    assert {order.index(example) % 4 for example in images} == {3} and set(order[3::4]) == set(images)
    assert Counter(order[:8][i] in subject for i in range(8)) == {True: 6, False: 2}
    flags = ["--with_prior_preservation", "--class_prompt=c", "--class_every_n_samples=4"]
    assert trainer.samples_per_epoch(make_args(*flags), subject) == 8


@pytest.mark.parametrize("counts", [(6,), (5, 4)])
def test_a_micro_batch_has_one_shape_and_one_kind(counts: tuple[int, ...]) -> None:
    """Where shapes differ; every image comes equally often nevertheless."""
    kinds = make_kinds(*counts, shapes=(ENTIRE, (80, 48), (48, 80), ENTIRE, ENTIRE))
    order = trainer.sample_order(kinds, 2, 0, 4, 4 * 60 * len(kinds))
    for start in range(0, len(order), 4):
        micro_batch = order[start : start + 4]
        assert len({(example.shape, example.path.name[0]) for example in micro_batch}) == 1
    seen = Counter(order)
    assert all(seen[example] == 4 * 60 // len(kind) for kind in kinds for example in kind)


def test_alone_in_a_micro_batch_every_image_comes_once_an_epoch_whatever_its_shape() -> None:
    """Buckets change nothing for batches of one."""
    [images] = kinds = make_kinds(5, shapes=(ENTIRE, (80, 48)))
    order = trainer.sample_order(kinds, 2, 0, 1, 20)
    assert [set(order[start : start + 5]) == set(images) for start in range(0, 20, 5)] == [True] * 4


@pytest.mark.parametrize("shapes", [(ENTIRE,), (ENTIRE, (80, 48))])
def test_a_longer_run_begins_like_a_shorter_one(shapes: tuple) -> None:
    """So a run can be resumed with more steps."""
    kinds = make_kinds(5, 3, shapes=shapes)
    longer = trainer.sample_order(kinds, 2, 0, 2, 97)
    for length in (0, 1, 33, 96):
        assert trainer.sample_order(kinds, 2, 0, 2, length) == longer[:length]


def test_a_million_samples_are_as_fair_as_a_hundred() -> None:
    """The longest runs have one; it takes half a second."""
    kinds = make_kinds(100)
    seen = Counter(example.path for example in trainer.sample_order(kinds, 2, 0, 8, 10**6))
    assert set(seen.values()) == {10**4}


# ------------------------------------------------------------------------------------------------------------ samples


def assert_equal_samples(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


def test_a_sample_is_a_function_of_seed_and_number(samples: Callable[..., trainer.SampleDataset]) -> None:
    """Whoever asks for it, whenever, in batches of whatever size: sample 7 is sample 7. Another seed gives another."""
    short, long = samples("--random_flip", max_train_steps=10), samples("--random_flip", train_batch_size=2)
    assert len(short.order) == 10 and len(long.order) == 8
    for number in (7, 0):
        assert_equal_samples(short[number], long[number])
    assert not torch.equal(short[6]["noise"], short[7]["noise"])
    assert not torch.equal(replace(short, seed=1)[7]["noise"], short[7]["noise"])


def test_worker_processes_read_the_same_samples(load: Load) -> None:
    """Two workers, each with its own view of the embeddings' file."""
    alone, workers = load(train_batch_size=2), load("--dataloader_num_workers=2", train_batch_size=2)
    assert workers.num_workers == 2
    for one, other in zip(alone, workers, strict=True):
        assert_equal_samples(one, other)


def test_crops_and_flips_vary_between_epochs(samples: Callable[..., trainer.SampleDataset]) -> None:
    """The reference froze them at load. Here all eight variants of an oblong image come in turn."""
    dataset = samples("--random_flip", max_train_steps=200)
    numbers = [number for number, example in enumerate(dataset.order) if example.path.name == "a.jpg"]
    means = trainer.load_file(dataset.order[numbers[0]].latents)["mean"].float().flatten(1)
    drawn = torch.stack([dataset[number]["latents"].flatten() for number in numbers])  # (40, 1024)
    nearest = torch.cdist(drawn, means).argmin(dim=1)
    assert len(numbers) == 40 and len(means) == 8 and set(nearest.tolist()) == set(range(8))


def test_every_scheme_draws_noise_levels_of_the_schedule(samples: Callable[..., trainer.SampleDataset]) -> None:
    """Many of them, in (0, 1]."""
    dataset = samples(max_train_steps=200)
    for scheme in ("logit_normal", "mode", "sigma_sqrt", "cosmap", "none"):
        drawn = replace(dataset, args=make_args(f"--weighting_scheme={scheme}"))
        sigmas = {float(sample["sigma"]) for sample in drawn}
        assert sigmas <= set(dataset.sigmas.tolist()) and 0 not in sigmas and len(sigmas) > 100


def test_a_noise_level_at_the_edge_stays_inside_the_schedule(
    samples: Callable[..., trainer.SampleDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mode` can give a density of exactly 1: the last step, not one past it."""
    dataset = samples()
    density = "compute_density_for_timestep_sampling"
    monkeypatch.setattr(diffusers.training_utils, density, lambda *_, **__: torch.ones(1))
    assert dataset[0]["sigma"] == dataset.sigmas[999]


def test_class_images_have_their_prompt_and_weight(samples: Callable[..., trainer.SampleDataset]) -> None:
    """Every second sample."""
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--prior_loss_weight=0.5"]
    dataset = samples(*flags, "--num_class_images=1")
    embeds = [dataset.embeddings[prompt]["prompt_embeds"] for prompt in (PROMPT, PREVIEW_PROMPT)]
    for number, sample in enumerate(dataset):
        assert sample["loss_weight"] == [1.0, 0.5][number % 2]
        assert torch.equal(sample["prompt_embeds"], embeds[number % 2])


def test_captions_are_dropped_as_often_as_asked(samples: Callable[..., trainer.SampleDataset]) -> None:
    """A dropped caption becomes the empty prompt; everything else about the sample stays."""
    never = samples(max_train_steps=100)
    sometimes, empty = replace(never, args=make_args("--caption_dropout=0.3")), never.embeddings[""]["prompt_embeds"]
    dropped = [torch.equal(sample["prompt_embeds"], empty) for sample in sometimes]
    assert 15 <= sum(dropped) <= 45 and not torch.equal(never[0]["prompt_embeds"], empty)
    assert all(torch.equal(never[i]["latents"], sometimes[i]["latents"]) for i in range(3))


# ------------------------------------------------------------------------------------------------------------- shapes


def test_phone_photos_are_not_cut() -> None:
    """3:4, 4:3, 9:16, 16:9 and 3:2 have buckets of nearly the square's area: less than 3 % of a side is cut off."""
    shapes = trainer.training_shapes(make_args("--aspect_ratio_buckets", "--resolution=1024"))[1024]
    assert len(shapes) == 11 and all(abs(height * width / 1024**2 - 1) < 0.03 for height, width in shapes)
    for width, height in [(3024, 4032), (4032, 3024), (1080, 1920), (1920, 1080), (3000, 2000), (2000, 2000)]:
        ratios = [(width / height) / (shape[1] / shape[0]) for shape in shapes]
        assert any(0.97 < ratio < 1 / 0.97 for ratio in ratios), (width, height)


def test_each_image_trains_at_every_resolution_that_it_is_large_enough_for(
    samples: Callable[..., trainer.SampleDataset], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The smallest takes all; what a larger one leaves out is noted; an epoch shows each image at each of its own."""
    small = []
    for path in trainer.find_images(photos):
        if min(Image.open(path).size) < 80:
            small.append(path.name)
    assert 0 < len(small) < 5
    dataset = samples(
        "--resolution", "80", "48", "80", "--num_train_epochs=2", "--dataloader_num_workers=0", max_train_steps=None
    )
    shapes: dict[str, list[int]] = {}
    for example in dataset.order:
        shapes.setdefault(example.path.name, []).append(example.shape[0])
    for path in trainer.find_images(photos):
        assert sorted(shapes[path.name]) == ([48, 48] if path.name in small else [48, 48, 80, 80])
    output = capsys.readouterr().out
    assert f"{len(small)} images too small for" in output
    assert "5 images at the resolutions 48 80" in output


def test_a_micro_batch_has_one_resolution(load: Load) -> None:
    """Images of several resolutions cannot be stacked; subject and class take turns by the micro-batch."""
    sides = {batch["latents"].shape[-1] for batch in load("--resolution", "48", "64", "--train_batch_size=2")}
    assert sides == {6, 8}


def test_images_train_in_the_nearest_of_their_own_shapes(samples: Callable[..., trainer.SampleDataset]) -> None:
    """(height, width) as diffusers writes them; latents are an eighth of that."""
    dataset = samples("--aspect_ratio_buckets=64,80; 80,64;64,64", max_train_steps=5)
    wide, upright = (64, 80), (80, 64)
    expected = {"a.jpg": wide, "b.JPEG": upright, "c.png": ENTIRE, "d.webp": upright, "e.bmp": ENTIRE}
    assert {example.path.name: example.shape for example in dataset.order} == expected
    for sample, example in zip(dataset, dataset.order, strict=True):
        assert sample["latents"].shape == (16, example.shape[0] // 8, example.shape[1] // 8)


def test_latents_that_another_machine_has_written_elsewhere_are_named_by_their_folder(tmp_path: Path) -> None:
    """Those of the class may lie in --class_data_dir, which has to be shared as well."""
    folder = tmp_path / "class"
    with pytest.raises(SystemExit, match=re.escape(f"share {folder}")):
        trainer.check_visible([make_example(folder / "a")])
