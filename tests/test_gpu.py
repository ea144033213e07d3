"""What only a GPU can show; skipped without one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, compute, logged
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision", ["int8", "exact"])
def test_embeddings_on_the_gpu(tiny: Path, photos: Path, tmp_path: Path, precision: str) -> None:
    """Both precisions of T5 run there."""
    assert compute(tiny, photos, tmp_path / "e.parquet", f"--t5_precision={precision}").stat().st_size > 0


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_training_on_the_gpu(train: Callable[..., Path], precision: str) -> None:
    """With previews, 8-bit Adam and checkpointing; resumed, the losses go on as they did."""
    flags = [f"--mixed_precision={precision}", "--use_8bit_adam", "--gradient_checkpointing"]
    flags += ["--checkpointing_steps=2", f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=2"]
    whole = train(*flags, output="whole")
    resumed = train(*flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}", output="resumed")
    assert logged(resumed) == pytest.approx(logged(whole)[2:], rel=1e-2)
    assert all(torch.isfinite(value).all() for value in load_file(whole / trainer.LORA_NAME).values())
