"""The Parquet file between the two scripts: what compute_embeddings.py writes and what the trainer reads."""

import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from filelock import FileLock
from huggingface_hub import constants
from transformers import CLIPTextModelWithProjection, T5EncoderModel

import compute_embeddings as embed
import tiny_pipeline
import train_dreambooth_sd3_lora_miniature as trainer
from benchmark import t5_error
from conftest import PREVIEW_PROMPT, PROMPT, ROOT, compute
from hub_server import COMMIT, serve

PROMPTS = ["a photo of sks dog", "sks dog in a bucket", "a dog", ""]


def read(path: Path, name: str) -> np.ndarray:
    return pq.read_table(path)[name].combine_chunks().to_numpy_ndarray()


def pipeline_embeds(model: Path, prompts: list[str], length: int, **parts: None) -> tuple[np.ndarray, np.ndarray]:
    """What StableDiffusion3Pipeline.encode_prompt gives in fp32, cast to fp16."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(model, dtype=torch.float32, **parts)
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length}
    with torch.no_grad():
        embeds = pipeline.encode_prompt(prompts, None, None, **options)
    return embeds[0].half().numpy(), embeds[2].half().numpy()


def test_one_row_and_row_group_per_distinct_prompt(embeddings: Path, photos: Path) -> None:
    """Three prompts, '' among them; the five images belong to the instance prompt."""
    file = pq.ParquetFile(embeddings)
    rows = file.read(["prompt", "image_hashes"]).to_pydict()
    hashes = [embed.sha256_of(path) for path in sorted(photos.iterdir())]
    assert dict(zip(*rows.values(), strict=True)) == {PROMPT: hashes, PREVIEW_PROMPT: [], "": []}
    assert file.num_row_groups == 3


def test_the_schema_is_the_contract(embeddings: Path, tiny: Path) -> None:
    """Fixed-shape fp16 tensors, and what the file was made with."""
    schema = pq.ParquetFile(embeddings).schema_arrow
    assert schema.field("prompt_embeds").type == pa.fixed_shape_tensor(pa.float16(), [154, tiny_pipeline.T5_WIDTH])
    assert schema.field("pooled_prompt_embeds").type == pa.fixed_shape_tensor(pa.float16(), [80])
    about = json.loads(schema.metadata[b"sd3_embeddings"])
    assert (about["model"], about["max_sequence_length"], about["t5"]) == (str(tiny), 77, "exact")
    assert about["format_version"] == 2 and about["versions"]["torch"] == version("torch")


def test_the_last_row_is_the_empty_prompt(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """The first is --prompt: README's snippet reads them so, whatever captions there are and the file is called."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "a.txt").write_text("sks dog asleep")
    path = compute(tiny, folder, tmp_path / "prompt_embeds", f"--prompt={PROMPT}", "--no_t5", "--validation_prompt=")
    assert pq.read_table(path)["prompt"].to_pylist() == [PROMPT, "sks dog asleep", ""]


def test_the_trainer_reads_what_was_written(embeddings: Path) -> None:
    """Every prompt's row, by its text."""
    table = trainer.PromptEmbeddings(embeddings)
    for row, prompt in enumerate([PROMPT, PREVIEW_PROMPT, ""]):
        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            assert np.array_equal(table[prompt][name], read(embeddings, name)[row])


@pytest.mark.parametrize("length", [77, 256])
@pytest.mark.parametrize("kind", ["tiny", "tiny35"])
def test_exact_equals_the_pipelines_encode_prompt(
    length: int, kind: str, photos: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Bit for bit after the cast to fp16, for the same list of prompts."""
    model = request.getfixturevalue(kind)
    flags = ["--t5_precision=exact", f"--max_sequence_length={length}", "--class_prompt", PROMPTS[2]]
    path = compute(model, photos, tmp_path / "e.parquet", *flags, "--validation_prompt", PROMPTS[1])
    order = pq.read_table(path)["prompt"].to_pylist()
    assert sorted(order) == sorted(PROMPTS)
    prompt_embeds, pooled_prompt_embeds = pipeline_embeds(model, order, length)
    assert np.array_equal(read(path, "prompt_embeds"), prompt_embeds)
    assert np.array_equal(read(path, "pooled_prompt_embeds"), pooled_prompt_embeds)


def test_without_t5_its_part_is_zero(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """--no_t5 gives what a pipeline without T5 gives, bit for bit."""
    path = compute(tiny, photos, tmp_path / "e.parquet", "--no_t5", "--validation_prompt", PREVIEW_PROMPT)
    without = {"text_encoder_3": None, "tokenizer_3": None}
    prompt_embeds, pooled = pipeline_embeds(tiny, [PROMPT, PREVIEW_PROMPT, ""], 77, **without)
    assert not prompt_embeds[:, 77:].any()
    assert np.array_equal(read(path, "prompt_embeds"), prompt_embeds)
    assert np.array_equal(read(path, "pooled_prompt_embeds"), pooled)


def test_int8_is_real_and_close_to_exact(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """T5's layers are bitsandbytes' 8-bit ones; CLIP's part is exact, T5's within a few percent."""
    model = embed.LocalModel(str(tiny), tiny, commit=None, variant=None)
    t5 = embed.load_t5(model, "int8", torch.device("cpu"), tmp_path)
    assert any(isinstance(module, bnb.nn.Linear8bitLt) for module in t5.modules())
    path = compute(tiny, photos, tmp_path / "int8.parquet", "--validation_prompt", PREVIEW_PROMPT)
    exact, int8 = (read(file, "prompt_embeds") for file in (embeddings, path))
    assert np.array_equal(int8[:, :77], exact[:, :77])
    assert 0 < t5_error(path, embeddings) < 0.05


def test_what_overflows_fp16_inside_t5_is_right(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """With feed-forward layers that give more than fp16 holds: exact is bit for bit fp32's, int8 within percents."""
    model = shutil.copytree(tiny, tmp_path / "model")
    t5 = T5EncoderModel.from_pretrained(model / "text_encoder_3")
    with torch.no_grad():
        for block in t5.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(1e6)
        assert t5(torch.arange(2, 50)[None], output_hidden_states=True).hidden_states[1].abs().max() > 65504
    t5.save_pretrained(model / "text_encoder_3")
    exact, int8 = (
        compute(model, photos, tmp_path / f"{how}.parquet", f"--t5_precision={how}") for how in ("exact", "int8")
    )
    assert np.array_equal(read(exact, "prompt_embeds"), pipeline_embeds(model, [PROMPT, ""], 77)[0])
    assert t5_error(int8, exact) < 0.05


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_what_fp16_cannot_hold_is_an_error(value: float) -> None:
    """Not finite, or above fp16's range: an error that names the encoder."""
    with pytest.raises(embed.UserError, match="T5 gave values that fp16 cannot hold"):
        embed.to_float16(torch.tensor([0.0, value]), "T5")


def test_both_clips_are_gone_before_t5_is_loaded(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One encoder at a time, so the peak is T5's alone."""
    alive, load_t5 = [], embed.load_t5

    def count_and_load(*args: object) -> torch.nn.Module:
        gc.collect()
        alive.append(sum(type(thing) is CLIPTextModelWithProjection for thing in gc.get_objects()))
        return load_t5(*args)

    monkeypatch.setattr(embed, "load_t5", count_and_load)
    compute(tiny, photos, tmp_path / "e.parquet")
    assert alive == [0]


def test_what_an_encoder_does_not_see_is_said(
    tiny: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt longer than an encoder's tokens is cut; the cut end is printed."""
    compute(tiny, photos, tmp_path / "e.parquet", "--no_t5", "--prompt", "x" * 72 + "farend")
    output = capsys.readouterr().out
    assert "CLIP reads 77 tokens; 1 of 2 prompts" in output and "does not see 'end" in output


def before_the_rows(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Do something when the rows are about to be written, after all the encoding."""
    write_table = pq.write_table

    def act_and_write(*args: object, **kwargs: object) -> None:
        monkeypatch.setattr(pq, "write_table", write_table)
        action()
        write_table(*args, **kwargs)

    monkeypatch.setattr(pq, "write_table", act_and_write)


def test_the_digest_is_that_of_the_captions_that_were_read(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what they have become while a model was downloaded."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    before, find_model = embed.digest_of_captions(folder), embed.find_model

    def write_and_find(args: embed.Args) -> embed.LocalModel:
        (folder / "a.txt").write_text("another caption")
        return find_model(args)

    monkeypatch.setattr(embed, "find_model", write_and_find)
    path = compute(tiny, folder, tmp_path / "e.parquet", "--no_t5")
    assert json.loads(pq.read_schema(path).metadata[b"sd3_embeddings"])["captions"] == before


def test_a_flipped_bit_is_an_error(embeddings: Path, tmp_path: Path) -> None:
    """Wherever it is in the numbers; without checksums of pages it would be another embedding."""
    data = embeddings.read_bytes()
    column = pq.ParquetFile(embeddings).metadata.row_group(0).column(2)
    start, size = column.data_page_offset, column.total_compressed_size
    for place in range(start + size // 4, start + size, size // 4):
        damaged = bytearray(data)
        damaged[place] ^= 1
        (tmp_path / "e.parquet").write_bytes(damaged)
        with pytest.raises(OSError):
            pq.read_table(tmp_path / "e.parquet", page_checksum_verification=True)


def prompts_of(path: Path) -> list[str]:
    return pq.read_table(path)["prompt"].to_pylist()


def test_two_runs_to_one_output_leave_a_readable_file(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One ends while the other writes: each file is whole, the last to end stays, and no scratch is left."""
    path = tmp_path / "e.parquet"

    def other_run() -> None:
        compute(tiny, photos, path, "--no_t5", "--prompt=theirs")
        assert prompts_of(path) == ["theirs", ""]

    before_the_rows(monkeypatch, other_run)
    compute(tiny, photos, path, "--no_t5", "--prompt=ours")
    assert prompts_of(path) == ["ours", ""] and list(tmp_path.iterdir()) == [path]


def test_the_scratch_of_a_killed_run_is_removed(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next start; that of a run that lives stays."""
    killed = tmp_path / ".embeddings-killed"
    killed.mkdir()
    (killed / "lock").touch()
    (killed / "prompt_embeds").write_text("x")
    alive = tmp_path / ".embeddings-alive"
    alive.mkdir()
    with FileLock(alive / "lock"):
        compute(tiny, photos, tmp_path / "e.parquet", "--no_t5")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".embeddings-alive", "e.parquet"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_older_file_and_no_scratch(
    number: int, tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scratch, as large as the embeddings, lies beside the output, since /tmp is often small; then it is gone."""
    path = compute(tiny, photos, tmp_path / "results" / "e.parquet", "--no_t5")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    before, scratch = path.read_bytes(), []

    def send_signal() -> None:
        scratch.extend(file.stat().st_size for file in path.parent.rglob("*") if file.is_file() and file != path)
        os.kill(os.getpid(), number)

    before_the_rows(monkeypatch, send_signal)
    with pytest.raises(SystemExit, match="Interrupted; nothing was written."):
        compute(tiny, photos, path, "--no_t5", "--prompt=another")
    assert max(scratch) == 2 * 2 * 154 * tiny_pipeline.T5_WIDTH  # bytes a number, prompts, tokens, width
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path] and not list((tmp_path / "tmp").iterdir())


def test_nohup_is_respected(tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost terminal ends no run that ignores it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before_the_rows(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert prompts_of(compute(tiny, photos, tmp_path / "e.parquet", "--no_t5")) == [PROMPT, ""]


@pytest.mark.parametrize("room", [10_000, 79_000])
def test_a_full_disk_is_one_message(room: int, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Whether scratch (78,848 bytes) or the Parquet file does not fit; the older file stays."""
    path = compute(tiny, photos, tmp_path / "e.parquet", "--no_t5")
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(SystemExit, match=f"--output_path {path} cannot be read or written: .*File too large"):
            compute(tiny, photos, path, "--t5_precision=exact", "--prompt=another")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_room_is_claimed_before_t5_is_loaded(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of a mapped file that finds no room kills the process without a message."""

    def look(*arguments: object) -> None:
        file = Path(str(arguments[-1]), "prompt_embeds")
        assert file.stat().st_blocks * 512 >= 2 * 2 * 154 * tiny_pipeline.T5_WIDTH
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embed, "load_t5", look)
    with pytest.raises(SystemExit, match="No space left on device"):
        compute(tiny, photos, tmp_path / "e.parquet")
    assert not list(tmp_path.iterdir())


def test_a_bad_output_costs_no_encoding(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in its place, a pipe, or a file that this program did not write: a table of captions, too."""
    monkeypatch.setattr(embed, "encode_prompts", lambda *_: pytest.fail("encoded"))
    (tmp_path / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    pq.write_table(pa.table({"file_name": ["a.jpg"], "text": ["sks dog"]}), tmp_path / "metadata.parquet")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "pipe", tmp_path / "metadata.parquet"):
        with pytest.raises(SystemExit, match=f"--output_path {path}"):
            compute(tiny, photos, path)


# ---------------------------------------------------------------------------------------------------------- the model


Weights = dict[str, torch.Tensor]


def without(end: str) -> Callable[[Weights], object]:
    """Remove the last of the tensors whose name ends so."""
    return lambda weights: weights.pop([name for name in weights if name.endswith(end)][-1])


def test_weights_in_several_files_and_of_a_variant_are_whole(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """As T5 of SD3 has them: the same embeddings; without one of the files, a message that names it."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        (model / part / "model.safetensors").rename(model / part / "model.fp16.safetensors")
    t5 = T5EncoderModel.from_pretrained(tiny / "text_encoder_3")
    (model / "text_encoder_3" / "model.fp16.safetensors").unlink()
    t5.save_pretrained(model / "text_encoder_3", max_shard_size="100KB", variant="fp16")
    files = sorted((model / "text_encoder_3").glob("model.fp16-*.safetensors"))
    assert len(files) > 2
    for precision in ("exact", "int8"):
        one, other = (
            compute(each, photos, tmp_path / f"{each.name}.parquet", f"--t5_precision={precision}", *variant)
            for each, variant in ((tiny, []), (model, ["--variant=fp16"]))
        )
        assert pq.read_table(one)["prompt_embeds"].equals(pq.read_table(other)["prompt_embeds"])
    files[1].unlink()
    with pytest.raises(SystemExit, match=f"text_encoder_3 .*{files[1].name}"):
        compute(model, photos, tmp_path / "e.parquet", "--variant=fp16")


def test_only_what_is_needed_comes_from_the_hub(
    hub: ThreadingHTTPServer, tiny: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the variant and without T5; the commit is noted; afterwards it works without a network."""
    flags = ["--no_t5", f"--cache_dir={tmp_path / 'cache'}"]
    name = Path("owner/sd3")
    online = compute(name, photos, tmp_path / "online.parquet", *flags)
    about = json.loads(pq.read_schema(online).metadata[b"sd3_embeddings"])
    assert (about["model"], about["revision"]) == ("owner/sd3", COMMIT)
    downloaded = {path.parent.name + "/" + path.name for path in (tmp_path / "cache").glob("*/snapshots/*/*/*")}
    assert {"text_encoder/model.safetensors", "transformer/config.json", "tokenizer_2/tokenizer.json"} <= downloaded
    assert not [file for file in downloaded if re.search("_3/|vae/|fp16|diffusion_pytorch_model", file)]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = compute(name, photos, tmp_path / "offline.parquet", *flags)
    assert pq.read_table(online).equals(pq.read_table(offline))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--variant=fp7"], "model.fp7.safetensors.* model.fp16.safetensors, model.safetensors"),
        (["--revision=gated"], "(?s)https://huggingface.co/owner/sd3 .*hf auth login"),
        (["--pretrained_model_name_or_path=owner/none"], "owner/none: .*not found"),
    ],
)
def test_what_the_hub_does_not_give_is_one_message(
    flags: list[str], expected: str, hub: ThreadingHTTPServer, photos: Path, tmp_path: Path
) -> None:
    """A variant that does not exist with those that do; a license with its page; a name without a repository."""
    hub.gated = {"owner/sd3"} if "gated" in flags[0] else set()
    with pytest.raises(SystemExit, match=expected):
        compute(Path("owner/sd3"), photos, tmp_path / "e.parquet", f"--cache_dir={tmp_path / 'cache'}", *flags)


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A Hub with the tiny pipeline, and a second variant of one part."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        files = [path for path in tiny.rglob("*") if path.is_file()]
        repository = {path.relative_to(tiny).as_posix(): path.read_bytes() for path in files}
        repository["text_encoder/model.fp16.safetensors"] = b"another variant"
        server.repos["owner/sd3"] = repository
        yield server


# ------------------------------------------------------------------------------------------------------- whole scripts

RUN_SCRIPTS = """
import json, runpy, sys, time
time.sleep = lambda _: None  # huggingface_hub's, before it tries again
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print(json.dumps(end.code))
"""


def messages_of(commands: list[list[str]], endpoint: str, home: Path) -> list[str]:
    """How the scripts end with a Hub at this address, in a process that reads the address when it starts."""
    code = [sys.executable, "-c", RUN_SCRIPTS, json.dumps(commands)]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    result = subprocess.run(code, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith('"')]


def training(model: Path | str, photos: Path, embeddings: Path, output: Path, *flags: str) -> list[str]:
    values = {"pretrained_model_name_or_path": model, "instance_data_dir": photos, "data_df_path": embeddings}
    values |= {"instance_prompt": PROMPT, "output_dir": output, "resolution": 64, "max_train_steps": 1}
    return [trainer.__file__, *(f"--{name}={value}" for name, value in values.items()), *flags]


def test_no_network_is_one_message(photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """Both scripts say first that the Hub does not answer, and then what folder there is not."""
    computing = [embed.__file__, f"--local_data_dir={photos}", f"--output_path={tmp_path / 'e.parquet'}"]
    commands = [computing, training("owner/sd3", photos, embeddings, tmp_path / "out")]
    messages = messages_of(commands, "http://127.0.0.1:9", tmp_path / "home")  # a port that nobody listens to
    assert len(messages) == 2
    for message in messages:
        assert re.search(r"Cannot load \S+: the Hub does not answer.*there is no /", message)
    assert not (tmp_path / "e.parquet").exists() and not (tmp_path / "out").exists()


def test_a_cut_connection_before_a_push_is_one_message(
    tiny: Path, photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """While asking for the user, and while making the repository; nothing was encoded."""
    command = training(tiny, photos, embeddings, tmp_path / "out", "--push_to_hub", "--hub_token=hf_write")
    with serve() as hub:
        hub.faults = {"whoami": [0], "create": [0] * 99}
        messages = messages_of([command] * 2, hub.url, tmp_path / "home")
        assert hub.faults["whoami"] == [] and 0 < len(hub.faults["create"]) < 99
    assert len(messages) == 2 and all("--push_to_hub: " in message for message in messages)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_without_a_terminal_no_bar_redraws_itself(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Neither transformers' own nor ours: a log file stays as it is."""
    values = {"pretrained_model_name_or_path": tiny, "local_data_dir": photos, "output_path": tmp_path / "e.parquet"}
    command = [sys.executable, embed.__file__, "--t5_precision=exact"]
    command += [f"--{name}={value}" for name, value in values.items()]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True).stderr
    assert b"%|" not in output and b"\r" not in output
