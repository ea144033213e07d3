"""Pushing to the Hub, here a server on loopback: what is sent, with which token, and that a failure costs nothing."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders import lora_base
from huggingface_hub import ModelCard, constants, hf_api

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import LATEST, PREVIEW_PROMPT, PROMPT, ROOT
from hub_server import serve

SAMPLE = "samples/step-000001-prompt-0-0.png"
PUSHED = {"README.md", trainer.LORA_NAME, SAMPLE, "samples/progress.png"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """The only Hub that this process knows."""
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def push(train: Callable[..., Path]) -> Callable[..., Path]:
    """Train a step, with a preview and a checkpoint, and push."""

    def run(*flags: str, token: str | None = "hf_write", **changes: object) -> Path:
        flags = "--push_to_hub", f"--validation_prompt={PREVIEW_PROMPT}", "--checkpointing_steps=1", *flags
        return train(*flags, hub_token=token, max_train_steps=1, **changes)

    return run


def test_only_lora_card_and_samples_are_pushed(
    hub: ThreadingHTTPServer, push: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte; no log, latents or checkpoint, and no token anywhere."""
    output = push()
    pushed, printed = hub.repos["me/out"], "".join(capfd.readouterr())
    assert "pushed to me/out" in printed and pushed.keys() == PUSHED and not hub.private
    assert all((output / name).read_bytes() == data for name, data in pushed.items())
    written = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    assert not any(b"hf_write" in text for text in [*written, printed.encode()])


def test_samples_of_an_earlier_run_are_not_pushed(hub: ThreadingHTTPServer, train: Callable[..., Path]) -> None:
    """Of the same folder, by a run that goes on without prompts."""
    train(f"--validation_prompt={PREVIEW_PROMPT}", max_train_steps=1)
    train("--push_to_hub", LATEST, hub_token="hf_write", max_train_steps=1)
    assert hub.repos["me/out"].keys() == {"README.md", trainer.LORA_NAME}


def test_the_repository_is_named_and_private_if_that_is_asked(
    hub: ThreadingHTTPServer, push: Callable[..., Path]
) -> None:
    """A second push goes to the same one."""
    for output in ("first", "second"):
        push("--hub_private_repo", "--hub_model_id=dog", output=output)
    assert hub.repos.keys() == hub.private == {"me/dog"}
    assert 'load_lora_weights("me/dog"' in hub.repos["me/dog"]["README.md"].decode()


@pytest.mark.parametrize(("token", "part"), [
    ("hf_read", "You need a token that may write"), ("hf_wrong", "Invalid user token"),
])  # fmt: skip
def test_a_token_that_cannot_push_is_reported_before_training(
    hub: ThreadingHTTPServer, push: Callable[..., Path], tmp_path: Path, token: str, part: str
) -> None:
    """A read-only or invalid token: one message with what to do, and nothing is encoded."""
    with pytest.raises(SystemExit, match=f"(?s){part}.*hf auth login") as refused:
        push(token=token)
    assert token not in str(refused.value)
    assert not list((tmp_path / "out").glob("latents/*"))


# ------------------------------------------------------------------------------------------------------------- faults


def test_passing_faults_before_the_commit_are_survived(hub: ThreadingHTTPServer, push: Callable[..., Path]) -> None:
    """huggingface_hub itself tries again after a server error, too many requests, and a connection that was cut."""
    hub.faults = {"/preupload/": [500], "/objects/batch": [429], "/lfs/": [0]}
    output = push()
    assert not any(hub.faults.values())
    assert hub.repos["me/out"][trainer.LORA_NAME] == (output / trainer.LORA_NAME).read_bytes()


@pytest.mark.parametrize(("part", "fault", "reason"), [
    ("/commit/", 429, "not now"), ("/commit/", 500, "not now"), ("/commit/", 0, "Server disconnected"),
    ("/lfs/", 400, "not now"),
])  # fmt: skip
def test_a_failed_push_loses_nothing(
    hub: ThreadingHTTPServer, push: Callable[..., Path], tmp_path: Path, part: str, fault: int, reason: str
) -> None:
    """A commit is not tried again. The LoRA is on disk, and the command that sends it is in the one message."""
    hub.faults = {part: [fault]}
    with pytest.raises(SystemExit) as failed:
        push()
    command = f"hf upload me/out {tmp_path / 'out'} . --include={trainer.LORA_NAME} --include=README.md"
    assert str(failed.value).startswith(f"The upload failed: {reason}") and command in str(failed.value)
    assert all((tmp_path / "out" / name).exists() for name in PUSHED) and not hub.repos["me/out"]


@pytest.mark.parametrize("fault", [500, 0])
@pytest.mark.parametrize("part", ["/whoami-v2", "/repos/create"])
def test_a_hub_that_fails_at_the_start_is_one_message(
    hub: ThreadingHTTPServer, push: Callable[..., Path], part: str, fault: int
) -> None:
    """Before anything is trained."""
    hub.faults = {part: [fault] * 9}
    with pytest.raises(SystemExit, match=f"--push_to_hub: {'not now' if fault else 'Server disconnected'}"):
        push()
    assert not hub.repos


# --------------------------------------------------------------------------------------------------- gated models, Xet


@pytest.fixture
def gated(hub: ThreadingHTTPServer, tiny: Path) -> ThreadingHTTPServer:
    """A Hub with a model that only the write token may read."""
    files = [path for path in tiny.rglob("*") if path.is_file()]
    hub.repos["owner/sd3"] = {str(path.relative_to(tiny)): path.read_bytes() for path in files}
    hub.gated = {"owner/sd3"}
    return hub


@pytest.mark.parametrize("token", [None, "hf_read"])
def test_a_gated_model_is_told_with_its_page(
    gated: ThreadingHTTPServer, train: Callable[..., Path], tmp_path: Path, token: str | None
) -> None:
    """Without a token, or with that of somebody who has not accepted the license."""
    wanted = r"(?s)Cannot load owner/sd3.*its license on https://huggingface.co/owner/sd3 .*hf auth login"
    with pytest.raises(SystemExit, match=wanted):
        train(f"--cache_dir={tmp_path / 'cache'}", pretrained_model_name_or_path="owner/sd3", hub_token=token)


def test_trained_from_a_gated_repository_and_loaded_by_name(
    gated: ThreadingHTTPServer, push: Callable[..., Path], tmp_path: Path
) -> None:
    """All of the model comes from the Hub with the token; the pushed LoRA loads by its repository's name."""
    push(f"--cache_dir={tmp_path / 'cache'}", pretrained_model_name_or_path="owner/sd3")
    lora = StableDiffusion3Pipeline.lora_state_dict("me/out", token="hf_write", cache_dir=tmp_path / "other")
    assert len(lora) == 30
    card = ModelCard(gated.repos["me/out"]["README.md"].decode())
    assert card.data.base_model == "owner/sd3" and 'from_pretrained(\n    "owner/sd3"' in card.text
    assert card.data.license_link == "https://huggingface.co/owner/sd3/blob/main/LICENSE.md"
    assert [image["output"]["url"] for image in card.data.widget] == [SAMPLE]
    assert "](/me/out/tree/main)" in card.text  # the Files tab


def test_without_a_network_the_start_is_one_message(
    hub: ThreadingHTTPServer, train: Callable[..., Path], tmp_path: Path
) -> None:
    """httpx's errors are no OSErrors; the way to work offline is named."""
    hub.faults = {"/": [0] * 99}
    with pytest.raises(SystemExit, match=r"(?s)Cannot load owner/sd3: .*Without a network, HF_HUB_OFFLINE=1"):
        train(f"--cache_dir={tmp_path / 'cache'}", pretrained_model_name_or_path="owner/sd3")


def test_xet_stores_and_returns_the_same_bytes(
    hub: ThreadingHTTPServer, tiny: Path, photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """Large files go through Xet when it is on, in a process of its own; what comes back is what was sent."""
    hub.xet = tmp_path / "xet"
    values = {
        "pretrained_model_name_or_path": tiny, "instance_data_dir": photos, "data_df_path": embeddings,
        "instance_prompt": PROMPT, "output_dir": tmp_path / "dog", "resolution": 64, "max_train_steps": 1,
        "train_batch_size": 1, "hub_token": "hf_write",
    }  # fmt: skip
    command = [sys.executable, ROOT / "train_dreambooth_sd3_lora_miniature.py", "--push_to_hub"]
    command += [f"--{name}={value}" for name, value in values.items()]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True, timeout=120)
    name, _, size = hub.repos["me/dog"][trainer.LORA_NAME]  # what Xet calls it
    assert name and not hub.blobs and size == (tmp_path / "dog" / trainer.LORA_NAME).stat().st_size
    code = f"import huggingface_hub as hub; hub.hf_hub_download('me/dog', '{trainer.LORA_NAME}', local_dir='back')"
    environment |= {"HF_TOKEN": "hf_read", "HF_HOME": str(tmp_path / "other")}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, timeout=60)
    back, sent = tmp_path / "back" / trainer.LORA_NAME, tmp_path / "dog" / trainer.LORA_NAME
    assert back.read_bytes() == sent.read_bytes()
