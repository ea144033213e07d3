"""What only a GPU can show; skipped without one. Run by its name, which shows the GPU to the tests."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, RANK, ROOT, compute, logged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PREVIEWS = [f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=2"]
PRIOR = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=2"]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two LoRAs."""
    assert one.keys() == other.keys() and all(value.isfinite().all() for value in one.values())
    difference = sum((one[name] - other[name]).square().sum() for name in one)
    return float((difference / sum(value.square().sum() for value in one.values())).sqrt())


def test_both_precisions_of_t5_agree(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Within 5 % of the embeddings' norm."""
    rows = []
    for precision in ("exact", "int8"):
        path = compute(tiny, photos, tmp_path / f"{precision}.parquet", f"--t5_precision={precision}")
        embeds = pq.read_table(path)["prompt_embeds"].combine_chunks().to_numpy_ndarray()
        rows.append(embeds.astype(np.float32))
    assert 0 < np.linalg.norm(rows[0] - rows[1]) < 0.05 * np.linalg.norm(rows[0])


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_training_with_previews_goes_on_after_a_resume(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    """With 8-bit Adam; nothing needs to recompute on an empty card."""
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("needs a GPU with bf16")
    flags = [f"--mixed_precision={precision}", "--use_8bit_adam", "--checkpointing_steps=2", *PREVIEWS]
    whole = train(*flags, output="whole")
    assert "gradient checkpointing: off, peak VRAM" in capsys.readouterr().out
    resumed = train(*flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}", output="resumed")
    assert logged(resumed) == pytest.approx(logged(whole)[2:], rel=1e-2)
    assert distance(*(load_file(folder / trainer.LORA_NAME) for folder in (whole, resumed))) < 1e-2
    assert len(list(whole.glob("samples/step-*.png"))) == 3


def test_recomputed_it_is_the_same_training(train: Callable[..., Path]) -> None:
    """Within the rounding of fp16."""
    kept = train("--mixed_precision=fp16", output="kept")
    recomputed = train("--mixed_precision=fp16", "--gradient_checkpointing", output="recomputed")
    assert logged(kept) == pytest.approx(logged(recomputed), rel=1e-2)


@pytest.mark.parametrize("flags", [[], ["--quantize_base=nf4"]])
def test_class_images_are_made_and_trained_on(train: Callable[..., Path], flags: list[str]) -> None:
    """Also by a transformer of 4 bits, with previews in between."""
    output = train("--mixed_precision=fp16", "--lora_layers=to_k,to_q,to_v,to_out.0", *PRIOR, *PREVIEWS, *flags)
    assert len(list(output.glob("class_images-*/*.png"))) == 2
    weights = load_file(output / trainer.LORA_NAME)
    assert all(value.isfinite().all() and value.any() for value in weights.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_like_one(
    train: Callable[..., Path], tiny: Path, photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """With previews, which only the first of them makes, against one with twice the batch."""
    values = {
        "pretrained_model_name_or_path": tiny, "instance_data_dir": photos, "data_df_path": embeddings,
        "instance_prompt": PROMPT, "output_dir": tmp_path / "two", "resolution": 64, "train_batch_size": 1,
        "max_train_steps": 4, "lr_warmup_steps": 0, "learning_rate": 1e-3, "rank": RANK, "seed": 0,
        "num_inference_steps": 2, "num_validation_images": 1,
    }  # fmt: skip
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes=2"]
    command = [sys.executable, *launch, ROOT / "train_dreambooth_sd3_lora_miniature.py", *PREVIEWS]
    command += [f"--{name}={value}" for name, value in values.items()]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    one = train(*PREVIEWS, train_batch_size=2)
    assert logged(one) == pytest.approx(logged(tmp_path / "two"), rel=1e-3)
    assert distance(*(load_file(folder / trainer.LORA_NAME) for folder in (one, tmp_path / "two"))) < 1e-3
