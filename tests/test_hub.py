"""Pushing to the Hub, here a server on loopback: what is sent, with which token, and that a failure costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PREVIEW_PROMPT, PROMPT, RANK, ROOT
from hub_server import serve


def run(
    model: Path, photos: Path, embeddings: Path, output: Path, url: str, *flags: str, xet: bool = False
) -> subprocess.CompletedProcess:
    """The trainer in a process of its own, which reads the Hub's address when it starts."""
    values = {
        "pretrained_model_name_or_path": model, "instance_data_dir": photos, "data_df_path": embeddings,
        "instance_prompt": PROMPT, "output_dir": output, "resolution": 64, "max_train_steps": 1, "rank": RANK,
        "train_batch_size": 1, "num_inference_steps": 1, "num_validation_images": 1, "checkpointing_steps": 1,
        "validation_prompt": PREVIEW_PROMPT,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "train_dreambooth_sd3_lora_miniature.py"), "--push_to_hub", *flags]
    environment = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": str(int(not xet)), "HF_HOME": str(output.parent / "hf"),
                   "PATH": "/usr/bin:/bin", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    command += [f"--{name}={value}" for name, value in values.items()]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_only_lora_card_and_samples_are_pushed(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """Byte for byte; no log, latent or checkpoint, and no token anywhere."""
    with serve() as hub:
        result = run(tiny, photos, embeddings, tmp_path / "dog", hub.url, "--hub_token=hf_write")
        assert result.returncode == 0, result.stderr
        pushed = hub.repos["me/dog"]
        assert not hub.private
    sample = "samples/step-000001-prompt-0-0.png"
    assert set(pushed) == {"README.md", "pytorch_lora_weights.safetensors", sample, "samples/progress.png"}
    assert all((tmp_path / "dog" / name).read_bytes() == data for name, data in pushed.items())
    written = [path.read_bytes() for path in (tmp_path / "dog").rglob("*") if path.is_file()]
    assert not any(b"hf_write" in text for text in [*written, result.stdout.encode(), result.stderr.encode()])


def test_xet_stores_and_returns_the_same_bytes(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """Large files go through Xet when it is on; what comes back is byte for byte what was sent."""
    with serve() as hub:
        hub.xet = tmp_path / "xet"
        flags = ["--hub_token=hf_write", "--hub_private_repo"]
        result = run(tiny, photos, embeddings, tmp_path / "dog", hub.url, *flags, xet=True)
        assert result.returncode == 0, result.stderr
        assert hub.private == {"me/dog"}
        name, sha256, size = hub.repos["me/dog"]["pytorch_lora_weights.safetensors"]
        assert not hub.blobs and size == (tmp_path / "dog" / "pytorch_lora_weights.safetensors").stat().st_size
        code = "import sys, huggingface_hub as hub\n"
        code += "for name in sys.argv[1:]: hub.hf_hub_download('me/dog', name, local_dir='back')"
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_read", "HF_HOME": str(tmp_path / "other")}
        command = [sys.executable, "-c", code, *hub.repos["me/dog"]]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=60)
        pushed = list(hub.repos["me/dog"])
    assert len(pushed) == 4
    assert all((tmp_path / "back" / name).read_bytes() == (tmp_path / "dog" / name).read_bytes() for name in pushed)


@pytest.mark.parametrize(("token", "part"), [("hf_read", "may write"), ("hf_wrong", "Invalid user token")])
def test_a_token_that_cannot_push_is_told_before_training(
    tiny: Path, photos: Path, embeddings: Path, tmp_path: Path, token: str, part: str
) -> None:
    """A read-only or invalid token: one message, exit code 1, nothing trained."""
    with serve() as hub:
        result = run(tiny, photos, embeddings, tmp_path / "dog", hub.url, f"--hub_token={token}")
    assert result.returncode == 1 and part in result.stderr and token not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "dog" / "latents.arrow").exists()


@pytest.mark.parametrize("fault", [("/commit/", 429), ("/commit/", 500), ("/commit/", 0), ("/lfs/", 0)])
def test_a_passing_fault_is_tried_again(
    tiny: Path, photos: Path, embeddings: Path, tmp_path: Path, fault: tuple[str, int]
) -> None:
    """Too many requests, a server error, a connection cut in the middle: then it succeeds."""
    with serve() as hub:
        hub.faults = {fault[0]: [fault[1]]}
        result = run(tiny, photos, embeddings, tmp_path / "dog", hub.url, "--hub_token=hf_write")
        assert result.returncode == 0, result.stderr
        pushed = hub.repos["me/dog"]
    assert hub.faults == {fault[0]: []}
    lora = "pytorch_lora_weights.safetensors"
    assert pushed[lora] == (tmp_path / "dog" / lora).read_bytes()


@pytest.mark.parametrize("token", [[], ["--hub_token=hf_read"]])
def test_a_gated_model_is_told_with_its_page(photos: Path, embeddings: Path, tmp_path: Path, token: list[str]) -> None:
    """Without a token, or with that of somebody who has not accepted the licence."""
    with serve() as hub:
        hub.repos["owner/sd3"], hub.gated = {}, {"owner/sd3"}
        result = run(Path("owner/sd3"), photos, embeddings, tmp_path / "dog", hub.url, *token)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "https://huggingface.co/owner/sd3" in result.stderr and "hf auth login" in result.stderr
    assert "restricted" in result.stderr.lower() or "gated" in result.stderr.lower()


def test_trained_from_a_gated_repository_and_loaded_by_name(
    tiny: Path, photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """All of the model comes from the Hub with the token; the pushed LoRA loads by its repository's name."""
    with serve() as hub:
        files = [path for path in tiny.rglob("*") if path.is_file()]
        hub.repos["owner/sd3"] = {str(path.relative_to(tiny)): path.read_bytes() for path in files}
        hub.gated = {"owner/sd3"}
        result = run(Path("owner/sd3"), photos, embeddings, tmp_path / "dog", hub.url, "--hub_token=hf_write")
        assert result.returncode == 0, result.stderr
        script = (
            "from diffusers import StableDiffusion3Pipeline as P\n"
            "lora = P.lora_state_dict('me/dog', token='hf_write'); print(len(lora))"
        )
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        loaded = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert loaded.stdout.strip() == "16", loaded.stderr


def test_a_failed_push_loses_nothing(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> None:
    """The LoRA is on disk, and the command that sends it is printed."""
    with serve() as hub:
        hub.faults = {"/commit/": [400] * 9}
        result = run(tiny, photos, embeddings, tmp_path / "dog", hub.url, "--hub_token=hf_write")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"hf upload me/dog {tmp_path / 'dog'} . --include pytorch_lora_weights.safetensors" in result.stderr
    assert (tmp_path / "dog" / "pytorch_lora_weights.safetensors").exists()
