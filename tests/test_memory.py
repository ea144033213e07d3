"""A memory guard that needs no GPU: SD3-medium at its real size on torch's meta device."""

from pathlib import Path

import predicted_memory as predicted
import pytest
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from diffusers import AutoencoderKL

AT_1024 = ["--resolution=1024", "--gradient_checkpointing"]
BUDGET = 4.55 * 2**30  # SD3-medium in fp16, 1024 x 1024, batch 1, rank 4, AdamW: 3.9 of weights, the rest activations


def peak_of_whole_run(folder: Path) -> int:
    """The VAE encodes and leaves, the transformer loads and trains: the most bytes at once while it trains."""
    args = predicted.parse("--max_train_steps=2", *AT_1024, f"--output_dir={folder}")
    with predicted.models_on_meta(predicted.MODELS["sd3-medium"]) as storages:
        predicted.encode_pictures(args, folder)
        assert storages.peak < 2.7 * 2**30
        storages.peak = storages.live
        predicted.train_two_steps(args, predicted.MODELS["sd3-medium"], "fp16")
    return storages.peak


def test_training_stays_within_its_budget(tmp_path: Path) -> None:
    """4.5 GiB of a goal of 6 GB, and encoding 2.6 GiB."""
    assert 4.4 * 2**30 < peak_of_whole_run(tmp_path) < BUDGET


def test_the_guard_sees_a_transformer_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded so, and loaded so and cast afterwards."""
    monkeypatch.setitem(trainer.WEIGHT_DTYPES, "fp16", torch.float32)
    assert peak_of_whole_run(tmp_path) > BUDGET
    monkeypatch.undo()
    as_it_is = trainer.load_part

    def load_in_fp32(loader: object, args: object, part: str, dtype: torch.dtype = torch.float32, **rest: object):
        rest |= {"dtype": torch.float32} if part == "transformer" else {}
        loaded = as_it_is(loader, args, part, **rest)
        return loaded.to(dtype) if part == "transformer" else loaded

    monkeypatch.setattr(trainer, "load_part", load_in_fp32)
    assert peak_of_whole_run(tmp_path) > BUDGET


def test_the_guard_sees_a_vae_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even without its decoder."""
    load_vae, kept = trainer.load_vae, []

    def load_and_keep(*args: object) -> AutoencoderKL:
        kept.append(load_vae(*args))
        return kept[-1]

    monkeypatch.setattr(trainer, "load_vae", load_and_keep)
    assert peak_of_whole_run(tmp_path) > BUDGET


@pytest.mark.parametrize(("model", "flags"), [
    ("sd3-medium", AT_1024), ("sd3-medium", AT_1024[:1]), ("sd3-medium", ["--train_batch_size=4", "--rank=64"]),
    ("sd3.5-medium", AT_1024), ("sd3.5-medium", ["--optimizer=adamw"]), ("sd3.5-large", AT_1024),
    ("sd3.5-large", AT_1024[:1]),
])  # fmt: skip
def test_the_formula_of_dry_run_is_near_the_count(model: str, flags: list[str]) -> None:
    """Within 6 %, with and without checkpointing."""
    assert predicted.by_formula(model, *flags) == pytest.approx(predicted.predicted_bytes(model, *flags), rel=0.06)


def test_what_a_quantised_base_and_previews_add() -> None:
    """By arithmetic: 4 and 8 bit for the linear layers; previews need the VAE's decoder, beside a quantised base."""
    goals = {"nf4": 3.5e9, "int8": 4.5e9}
    for kind, goal in goals.items():
        assert predicted.by_formula("sd3-medium", *AT_1024, f"--quantize_base={kind}") < goal
    assert predicted.by_formula("sd3.5-large", *AT_1024, "--quantize_base=nf4") < 12e9
    assert predicted.by_formula("sd3.5-medium", *AT_1024) < 7e9
    bare = predicted.by_formula("sd3-medium", *AT_1024)
    assert predicted.by_formula("sd3-medium", *AT_1024, "--validation_prompt=p") == bare
    quantised = predicted.by_formula("sd3-medium", *AT_1024, "--quantize_base=nf4", "--validation_prompt=p")
    assert 3e9 < quantised < goals["nf4"]


@pytest.mark.parametrize("resolution", [512, 1024])
def test_what_decoding_takes(resolution: int) -> None:
    """In fp16, as on a GPU: half of what the formula has for fp32."""
    with predicted.models_on_meta(predicted.MODELS["sd3-medium"]) as storages, torch.no_grad():
        vae = trainer.load_vae(predicted.parse(), torch.device("meta"), torch.float16)
        vae.decode(torch.empty(1, 16, resolution // 8, resolution // 8, device="meta", dtype=torch.float16))
    assert storages.peak == pytest.approx((0.31 * 2**30 + 3073 * resolution**2) / 2, rel=0.02)
