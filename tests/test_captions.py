"""Which image has which caption, and what is wrong with a folder of images and captions."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import compute_embeddings as embed
from conftest import PROMPT, Train, compute


def test_suffixes_in_any_case_sorted_hidden_ones_skipped(tmp_path: Path) -> None:
    """The reference took *.jpeg alone; masks are no images."""
    names = [
        "b.JPG",
        "a.jpeg",
        "c.Png",
        "d.webp",
        "e.bmp",
        "f.TIFF",
        "g.tif",
        ".hidden.jpg",
        "notes.txt",
        "a.mask.png",
    ]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    names = [path.name for path in embed.find_images(tmp_path)]
    assert names == ["a.jpeg", "b.JPG", "c.Png", "d.webp", "e.bmp", "f.TIFF", "g.tif"]


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """The five images, to be given captions."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def test_a_missing_folder_is_no_change_of_captions(tiny: Path, folder: Path, train: Train, tmp_path: Path) -> None:
    """The command that follows a change would fail, too."""
    (folder / "a.txt").write_text("sks dog asleep")
    embeddings = compute(tiny, folder, tmp_path / "captioned.parquet", "--t5_precision=exact")
    with pytest.raises(SystemExit, match="does not exist") as ended:
        train(instance_data_dir=tmp_path / "none", data_df_path=embeddings)
    assert "aptions" not in str(ended.value)


def captions_of(folder: Path) -> dict[str, str]:
    """The caption of each image by its name, as compute_embeddings.py finds it."""
    captions = embed.caption_images(embed.parse_args(["--local_data_dir", str(folder), "--prompt", PROMPT]))
    of_hash = {sha256: caption for caption, hashes in captions.items() for sha256 in hashes}
    return {path.name: of_hash[embed.sha256_of(path)] for path in embed.find_images(folder)}


def test_images_have_their_own_captions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NAME.txt wins over a metadata file, which wins over --prompt; white space is one blank; neither is skipped."""
    (folder / "a.txt").write_text("sks dog\n asleep\n", "utf-8-sig")
    (folder / "metadata.csv").write_text("file_name,text\nb.JPEG,a dog in the snow\na.jpg,overruled\n")
    rest = dict.fromkeys(["c.png", "d.webp", "e.bmp"], PROMPT)
    assert captions_of(folder) == {"a.jpg": "sks dog asleep", "b.JPEG": "a dog in the snow"} | rest
    assert capsys.readouterr().out == f"5 images in {folder}, 2 with a caption of their own; 4 distinct prompts\n"


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.Caption"])
def test_sidecars(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NAME.caption, as kohya writes them, is read like NAME.txt; suffixes in any case."""
    (folder / name).write_text("sks dog")
    assert captions_of(folder)["a.jpg"] == "sks dog"
    assert "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_whichever_system_wrote_their_accents(forms: tuple[str, str], folder: Path) -> None:
    """A Mac writes e and its accent (NFD), others é (NFC): in sidecars and in metadata."""
    of_images, of_captions = forms
    (folder / "a.jpg").rename(folder / unicodedata.normalize(of_images, "é.jpg"))
    (folder / "c.png").rename(folder / unicodedata.normalize(of_images, "ü.png"))
    (folder / unicodedata.normalize(of_captions, "é.txt")).write_text("one")
    row = {"file_name": unicodedata.normalize(of_captions, "ü.png"), "text": "two"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    captions = captions_of(folder)
    assert captions[unicodedata.normalize(of_images, "é.jpg")] == "one"
    assert captions[unicodedata.normalize(of_images, "ü.png")] == "two"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_metadata(name: str, folder: Path) -> None:
    """As datasets' ImageFolder takes it; ./ is normalized; a byte order mark, as Windows writes it, is no text."""
    path = folder / name
    rows = [{"file_name": "a.jpg", "text": "one", "other": 1}, {"file_name": "./c.png", "text": "2", "other": 2}]
    if name == "metadata.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "metadata.jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8-sig")
    else:
        path.write_text("file_name,text,other\na.jpg,one,1\n./c.png,2,2\n", "utf-8-sig")
    rest = dict.fromkeys(["b.JPEG", "d.webp", "e.bmp"], PROMPT)
    assert captions_of(folder) == {"a.jpg": "one", "c.png": "2"} | rest


def test_captions_in_csv_may_have_commas_quotes_and_lines(folder: Path) -> None:
    """In quotes, as spreadsheets write them."""
    rows = ["text,file_name", '"a dog, ""sitting""\nin the snow",a.jpg', "", "a cat,c.png", ""]
    (folder / "metadata.csv").write_bytes("\r\n".join(rows).encode())
    captions = captions_of(folder)
    assert (captions["a.jpg"], captions["c.png"]) == ('a dog, "sitting" in the snow', "a cat")


def test_words_that_mean_nothing_elsewhere_are_text(folder: Path) -> None:
    """None, NA, null and numbers as captions."""
    (folder / "metadata.csv").write_text("file_name,text\na.jpg,None\nb.JPEG,NA\nc.png,null\nd.webp,007\ne.bmp,nan\n")
    expected = ["None", "NA", "null", "007", "nan"]
    assert list(captions_of(folder).values()) == expected
    (folder / "metadata.csv").unlink()
    rows = [
        {"file_name": "a.jpg", "text": 7, "id": 2**70},
        {"file_name": "b.JPEG", "text": 0.7},
        {"file_name": "c.png", "text": "NA"},
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert list(captions_of(folder).values()) == ["7", "0.7", "NA", PROMPT, PROMPT]


@pytest.mark.parametrize("name", ["a.jpg.txt", "a.json", "b.txt.bak", "z.caption", "notes.pdf", "d.gif"])
def test_what_is_not_used_is_named(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that looks like a caption or an image, with what is read instead."""
    (folder / name).write_text("sks dog")
    assert set(captions_of(folder).values()) == {PROMPT}
    [note] = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert note.startswith(f"note: skipped {folder / name}: ")
    assert "NAME.txt" in note and ".webp" in note and "metadata.csv" in note
    assert ("did you mean a.txt" in note) == (name == "a.jpg.txt")


def test_a_photo_that_needs_a_package_is_named_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEIC counts as a photo, with pillow-heif or without."""
    known = {suffix: name for suffix, name in Image.registered_extensions().items() if name != "HEIF"}
    monkeypatch.setattr(Image, "registered_extensions", lambda: known)
    (folder / "z.HEIC").write_bytes(b"....ftypheic")
    with pytest.raises(embed.UserError, match="z.HEIC cannot be read: .*pip install pillow-heif"):
        captions_of(folder)


def test_a_photo_with_much_text_in_it_is_read(folder: Path) -> None:
    """Programs that generate images write how into them; Pillow's own limit is 1 MB."""
    text = PngInfo()
    text.add_text("workflow", "x" * 1_500_000, zip=True)
    Image.new("RGB", (8, 8)).save(folder / "z.png", pnginfo=text)
    assert captions_of(folder)["z.png"] == PROMPT


def test_the_digest_of_captions_is_that_of_names_and_bytes(folder: Path) -> None:
    """It follows captions that are added, changed and removed, and nothing else."""
    digests = [embed.digest_of_captions(folder)]

    def expect_another_digest() -> None:
        assert embed.digest_of_captions(folder) not in digests
        digests.append(embed.digest_of_captions(folder))

    (folder / "a.txt").write_text("sks dog")
    expect_another_digest()
    os.utime(folder / "a.txt", (0, 0))
    (folder / "z.txt").write_text("of no image")
    shutil.copy(folder / "a.jpg", folder / "f.jpg")
    assert embed.digest_of_captions(folder) == digests[-1]
    (folder / "a.txt").rename(folder / "b.txt")
    expect_another_digest()
    (folder / "metadata.csv").write_text("file_name,text\nc.png,a cat\n")
    expect_another_digest()
    (folder / "metadata.csv").write_text("file_name,text\nc.png,a dog\n")
    expect_another_digest()
    for name in ("metadata.csv", "b.txt"):
        (folder / name).unlink()
    assert embed.digest_of_captions(folder) == digests[0]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_metadata_one_folder_up_is_named(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """datasets reads it there, we do not."""
    (folder.parent / name).write_text("file_name,text\nphotos/a.jpg,sks dog\n")
    assert set(captions_of(folder).values()) == {PROMPT}
    assert f"note: skipped {folder.parent / name}" in capsys.readouterr().out


def test_a_folder_of_masks_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only images directly in the folder are read."""
    (folder / "masks").mkdir()
    shutil.copy(folder / "c.png", folder / "masks")
    captions_of(folder)
    assert f"note: skipped {folder / 'masks'}: " in capsys.readouterr().out


def test_all_that_is_wrong_with_a_folder_in_one_message(folder: Path) -> None:
    """Captions that are empty, not UTF-8, of no image, of two equal images, in a broken file; a truncated image."""
    (folder / "a.txt").write_text("sks dog")
    shutil.copy(folder / "a.jpg", folder / "f.jpg")
    (folder / "b.JPEG").write_bytes((folder / "b.JPEG").read_bytes()[:-200])
    (folder / "c.txt").write_text(" \n")
    (folder / "d.txt").write_bytes("ä".encode("latin-1"))
    (folder / "metadata.csv").write_text("file_name,text\nzebra.jpg,a zebra\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg"}\n')
    with pytest.raises(embed.UserError) as stop:
        captions_of(folder)
    expected = ["zebra.jpg", "b.JPEG cannot be read", "c.txt", "d.txt cannot be read", "f.jpg are the same"]
    expected += ["metadata.jsonl"]
    lines = str(stop.value).splitlines()
    assert len(lines) == len(expected) and all(any(part in line for line in lines) for part in expected), lines


def test_a_truncated_photo_is_found_before_any_encoding(
    tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header is good. Found later, repairing it would change its hash and cost the embeddings again."""
    Image.effect_noise((300, 300), 90).save(folder / "noise.jpg")
    (folder / "noise.jpg").write_bytes((folder / "noise.jpg").read_bytes()[:-200])
    monkeypatch.setattr(embed, "load_part", lambda *_, **__: pytest.fail("a part of the model was loaded"))
    with pytest.raises(SystemExit, match="noise.jpg cannot be read: .*truncated"):
        compute(tiny, folder, tmp_path / "e.parquet")


def test_many_captions(tmp_path: Path) -> None:
    """4,000 images with a sidecar and a row each; a sidecar wins."""
    rows = ["file_name,text"]
    for number in range(4000):
        (tmp_path / f"{number}.jpg").touch()
        (tmp_path / f"{number}.txt").write_text("dog")
        rows.append(f"{number}.jpg,cat")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    problems: list[str] = []
    captions = embed.read_captions(tmp_path, embed.find_images(tmp_path), problems)
    assert len(captions) == 4000 and set(captions.values()) == {"dog"} and not problems


def test_names_match_without_regard_to_case(folder: Path) -> None:
    """As on the systems that made them: A.TXT for a.jpg, METADATA.CSV, and a row with a Windows path."""
    first, second, *_ = embed.find_images(folder)
    (folder / f"{first.stem.upper()}.TXT").write_text("one")
    (folder / "METADATA.CSV").write_text(f"file_name,text\n.\\{second.name.upper()},two\n")
    problems: list[str] = []
    captions = embed.read_captions(folder, embed.find_images(folder), problems)
    assert captions == {first: "one", second: "two"} and problems == []


def test_an_image_that_is_there_twice_is_noted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy under another name doubles its weight."""
    shutil.copy(folder / "a.jpg", folder / "z.jpg")
    captions_of(folder)
    assert f"once per copy: 1 (first: {folder / 'z.jpg'} is a.jpg)" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"file_name;text\na.jpg;dog\n", "file_name,text\n".encode("utf-16")])
def test_what_excel_saves_by_default_is_answered_with_what_to_choose(content: bytes, folder: Path) -> None:
    """Semicolons, where a comma is that of decimals, and UTF-16."""
    (folder / "metadata.csv").write_bytes(content)
    with pytest.raises(embed.UserError, match="metadata.csv .*commas, .*Excel, save as CSV UTF-8"):
        captions_of(folder)


def test_a_caption_with_the_letters_of_its_image_wins(folder: Path) -> None:
    """Over one that only differs in case; a.txt comes after A.txt by name, and would win."""
    (folder / "a.jpg").rename(folder / "A.jpg")
    (folder / "A.txt").write_text("its own")
    (folder / "a.txt").write_text("another's")
    if (folder / "A.txt").read_text() != "its own":
        pytest.skip("this file system takes a.txt for A.txt")
    assert captions_of(folder)["A.jpg"] == "its own"


def test_skipped_files_get_one_note(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of a phone's export has a file beside each photo; what Windows leaves is not worth a word."""
    for name in ("a.mov", "b.mov", "c.mov", "Thumbs.db", "desktop.ini"):
        (folder / name).write_text("x")
    embed.read_captions(folder, embed.find_images(folder), [])
    [note] = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert "a.mov and 2 more" in note
