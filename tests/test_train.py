"""The trainer from end to end: what it writes, its schedules, optimizers and precisions, and where a LoRA starts."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PREVIEWS, PROMPT, RANK, ROOT, Train, compute, equal, logged, lora, parse, state

REFERENCE_COMMAND = """--mixed_precision="fp16" --instance_prompt="a photo of sks dog" --resolution=1024
--train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing --use_8bit_adam --learning_rate=1e-4
--report_to="tensorboard" --lr_scheduler="constant" --lr_warmup_steps=0 --seed="0" """


def test_a_run_writes_these_files_and_no_others(train: Train) -> None:
    """LoRA, card, samples, checkpoints, latents, logs; TensorBoard gets the sheet of all previews once, at the end."""
    output = train("--checkpointing_steps=2", PREVIEWS, "--validation_steps=2")
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    latents = {file for file in files if re.fullmatch(r"latents/[0-9a-f]{16}\.safetensors", file)}
    files = {file for file in files if not file.startswith("logs/")}
    samples = {f"samples/step-{step:06d}-prompt-0-0.png" for step in (0, 2, 4)} | {"samples/progress.png"}
    expected = {f"checkpoint-{n}/{part}" for n in (2, 4) for part in (trainer.LORA_NAME, trainer.STATE_NAME)} | samples
    assert len(latents) == 5 and files - latents == expected | {".lock", "README.md", trainer.LORA_NAME}
    assert len(logged(output)) == 4 and Image.open(output / max(samples)).size == (64, 64)
    events = EventAccumulator(str(next((output / "logs").rglob("events.out*")).parent)).Reload()
    shown = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert shown == {PREVIEW_PROMPT: [0, 2, 4], "progress": [4]}


def test_the_schedule_counts_optimizer_steps(train: Train) -> None:
    """Two steps of warm-up are two optimizer steps, whatever the accumulation."""
    flags = ["--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=2", "--gradient_accumulation_steps=3"]
    assert logged(train(*flags), "lr") == pytest.approx([0, 0.0005, 0.001, 0.001])


SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_of_diffusers_is_followed(train: Train, schedule: str) -> None:
    """The logged learning rates are those of diffusers' schedule, with two restarts or a warm-up."""
    own = {"cosine_with_restarts": ["--lr_num_cycles=2"], "polynomial": ["--lr_power=2"]}
    warmup = 0 if schedule == "constant" else 2
    flags = [f"--lr_scheduler={schedule}", *own.get(schedule, [])]
    output = train(*flags, max_train_steps=6, lr_warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    steps = {"num_warmup_steps": warmup, "num_training_steps": 6, "num_cycles": 2, "power": 2.0}
    expected = trainer.diffusers.optimization.get_scheduler(schedule, optimizer, **steps)
    for learning_rate in logged(output, "lr"):
        assert learning_rate == pytest.approx(expected.get_last_lr()[0])
        expected.step()


@pytest.mark.parametrize(("flags", "kind"), [
    ([], "AdamW"), (["--use_8bit_adam"], "AdamW8bit"), (["--optimizer=adamw_8bit"], "AdamW8bit"),
    (["--optimizer=paged_adamw_8bit"], "PagedAdamW8bit"),
])  # fmt: skip
def test_optimizers(flags: list[str], kind: str) -> None:
    """AdamW, in 8 bit, paged; --use_8bit_adam is a name of the second."""
    assert type(trainer.make_optimizer([torch.nn.Parameter(torch.zeros(2))], parse(*flags), 1)).__name__ == kind


def test_scale_lr_multiplies_by_the_images_of_a_step(train: Train) -> None:
    """Two images at once, three times: six times the learning rate."""
    output = train("--scale_lr", "--train_batch_size=2", "--gradient_accumulation_steps=3", max_train_steps=1)
    assert logged(output, "lr") == pytest.approx([6e-3])


def test_epochs_are_passes_over_the_images(train: Train) -> None:
    """Five images, four samples a step: previews of every epoch come after steps 2, 3, 4, 5, 7 and 8 of nine."""
    flags = [PREVIEWS, "--validation_epochs=1", "--train_batch_size=4", "--num_inference_steps=1"]
    samples = train(*flags, max_train_steps=9) / "samples"
    steps = [int(path.name.split("-")[1]) for path in sorted(samples.glob("step-*"))]
    assert steps == [0, 2, 3, 4, 5, 7, 8, 9]


def test_num_train_epochs_gives_the_number_of_steps(train: Train) -> None:
    """ceil(2 epochs * 5 images / 4 samples)."""
    output = train("--num_train_epochs=2", "--gradient_accumulation_steps=4", max_train_steps=None)
    assert len(logged(output)) == 3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_launchers_precision_counts(train: Train, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The reference asked its own flag, left the LoRA in fp16 when the launcher set it, and the loss became nan."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    output = train("--checkpointing_steps=4")
    assert all(torch.isfinite(torch.tensor(logged(output))))
    assert all(value.dtype == torch.float32 for value in lora(output).values())
    assert state(output / "checkpoint-4")["settings"]["mixed_precision"] == precision


def test_sd35_trains(train: Train, tiny35: Path) -> None:
    """Dual attention and QK norm, from the same embeddings."""
    trained = lora(train("--lora_layers=to_q", pretrained_model_name_or_path=tiny35))
    attentions = {f"transformer.transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn")}
    assert trained.keys() == {f"{name}.to_q.lora_{side}.weight" for name in attentions for side in "AB"}


def test_gradient_accumulation_equals_a_larger_batch(train: Train) -> None:
    """Four samples at once or one after the other: the same losses and, but for rounding, the same LoRA."""
    whole = train("--train_batch_size=4", output="whole")
    parts = train("--gradient_accumulation_steps=4", output="parts")
    assert logged(whole) == pytest.approx(logged(parts), abs=1e-5)
    assert all(torch.allclose(value, lora(parts)[name], atol=1e-5) for name, value in lora(whole).items())


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let blocks run out of memory if more than so many keep their activations, which two blocks in all might."""
    kept, recomputing, forward, checkpoint = set(), [], JointTransformerBlock.forward, trainer.checkpoint

    def recompute(block: torch.nn.Module, *inputs: object, **options: object) -> object:
        def marked(*inputs: object) -> object:
            recomputing.append(block)
            try:
                return block(*inputs)
            finally:
                recomputing.pop()

        return checkpoint(marked, *inputs, **options)

    def set_room(room: int) -> None:
        def forward_in_room(block: torch.nn.Module, *inputs: object, **options: object) -> object:
            if torch.is_grad_enabled() and not recomputing:
                kept.add(block)
            if len(kept) > room:
                kept.clear()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(block, *inputs, **options)

        kept.clear()
        monkeypatch.setattr(JointTransformerBlock, "forward", forward_in_room)

    monkeypatch.setattr(trainer, "checkpoint", recompute)
    return set_room


@pytest.mark.parametrize("flags", [[], ["--lora_dropout=0.2", "--mixed_precision=fp16"]])
def test_as_few_blocks_recompute_as_the_memory_demands(
    train: Train, memory_for: Callable[[int], None], capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """None, half or all of two, found out by running out of memory; the LoRA is the same, to the bit."""
    outputs, said = [], []
    for room, recomputed in ((2, "off"), (1, "1 of 2 blocks"), (0, "all 2 blocks")):
        memory_for(room)
        outputs.append(train(*flags, output=f"room for {room}"))
        said.append(f"gradient checkpointing: {recomputed}" in capsys.readouterr().out)
    memory_for(0)
    outputs.append(train(*flags, "--gradient_checkpointing", output="asked"))
    said.append("gradient checkpointing: all 2 blocks" in capsys.readouterr().out)
    assert said == [True] * 4 and all(equal(lora(outputs[0]), lora(output)) for output in outputs)
    assert all(logged(outputs[0]) == logged(output) for output in outputs)


def test_prodigy_finds_the_learning_rate_and_keeps_it_on_resume(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a factor of 1, and what is logged is the rate that it has found. Without its package, pip is named."""
    flags = ["--optimizer=prodigy", "--checkpointing_steps=26"]
    whole = train(*flags, max_train_steps=30, learning_rate=None, output="whole")
    rates = logged(whole, "lr")
    assert len(rates) == 30 and rates[0] == pytest.approx(1e-6) and rates[-1] > 1.3 * rates[0]
    saved = trainer.read_state(whole / "checkpoint-26")
    assert saved["settings"]["learning_rate"] == 1 and saved["optimizer"]["param_groups"][0]["d"] > 1.05e-6
    flags.append(f"--resume_from_checkpoint={whole / 'checkpoint-26'}")
    resumed = train(*flags, max_train_steps=30, learning_rate=None, output="resumed")
    assert equal(lora(whole), lora(resumed)) and logged(resumed, "lr") == rates[26:]
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(SystemExit, match="pip install prodigyopt"):
        train("--optimizer=prodigy", "--dry_run")


def test_schedule_free_training_keeps_the_average_of_its_steps(train: Train) -> None:
    """The LoRA is the average, x; training goes on from y = 0.9 x + 0.1 z, whatever is saved and drawn on the way."""
    flags = ["--optimizer=adamw_schedulefree", f"--validation_prompt={PREVIEW_PROMPT}"]
    rarely = train(*flags, "--checkpointing_steps=0", output="rarely")
    often = train(*flags, "--checkpointing_steps=1", "--validation_steps=1", output="often")
    assert equal(lora(rarely), lora(often))
    saved = state(often / "checkpoint-4")
    trained_at = {f"transformer.{name}": y for name, y in saved["lora"].items()}
    assert not equal(lora(often), trained_at)
    for number, (name, y) in enumerate(trained_at.items()):
        z = saved["optimizer"]["state"][number]["z"]
        torch.testing.assert_close(y, 0.9 * lora(often)[name] + 0.1 * z, rtol=0, atol=1e-7)
    from_it = train(f"--pretrained_lora_path={often}", flags[1], "--max_train_steps=1", output="from it")
    before, after = from_it / "samples/step-000000-prompt-0-0.png", often / "samples/step-000004-prompt-0-0.png"
    assert Image.open(before).tobytes() == Image.open(after).tobytes()


def test_blocks_before_the_first_lora_are_not_recomputed(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """They keep nothing, since no gradient passes through them: of two blocks, one is all that there is to choose."""
    said = {
        "transformer_blocks.1.attn.*": "1 of 2 blocks",
        "transformer_blocks.0.attn.to_q": "all 2 blocks",
        "context_embedder": "all 2 blocks",
        "proj_out": "off",
    }
    for number, (layers, recomputed) in enumerate(said.items()):
        train(f"--lora_layers={layers}", "--gradient_checkpointing", output=str(number), max_train_steps=1)
        assert f"gradient checkpointing: {recomputed}" in capsys.readouterr().out


def test_without_a_terminal_there_is_a_line_a_checkpoint(
    train: Train, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With step, loss and seconds; in a log file a bar would be redrawn thousands of times."""
    monkeypatch.delenv("TQDM_DISABLE")
    train("--checkpointing_steps=2", max_train_steps=5)
    said = capfd.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and all(re.fullmatch(r"step \d: loss \d.* s per step, checkpoint saved", x) for x in lines)
    assert "Training" not in said.err and "\r" not in said.out


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: out of memory"),
])  # fmt: skip
def test_a_library_that_finds_no_memory_makes_blocks_recompute(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: RuntimeError
) -> None:
    """cuBLAS allocates beside torch, in the first backward pass; the figure of the peak begins again after it."""
    probe, tried, reset = trainer.time_micro_batch, [], []

    def full_once(*args: object) -> float:
        tried.append(len(reset))
        if len(tried) == 1:
            raise error
        return probe(*args)

    monkeypatch.setattr(trainer, "time_micro_batch", full_once)
    monkeypatch.setattr(trainer, "peak_memory", lambda: "")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: reset.append(1))
    choose = trainer.choose_recomputation

    def choose_on_a_gpu(*args: object) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return choose(*args)

    monkeypatch.setattr(trainer, "choose_recomputation", choose_on_a_gpu)
    monkeypatch.setattr(trainer.diffusers.training_utils, "free_memory", lambda: None)
    train(max_train_steps=1)
    assert "checkpointing: 1 of 2 blocks" in capsys.readouterr().out and tried == [0, 1]


def test_torch_gets_what_is_free_on_the_gpu_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond that, Windows' driver goes on in RAM; what torch holds already counts as its own."""
    fractions = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    trainer.limit_gpu_memory(torch.device("cpu"), torch.float32)
    assert fractions == [7.75 / 16]


def test_another_error_of_the_first_step_stays_one(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not look like a lack of memory."""

    def fail(*_: object) -> float:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(trainer, "time_micro_batch", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        train()


def test_without_a_tracker_nothing_is_logged(train: Train) -> None:
    """--report_to none."""
    assert not (train("--report_to=none") / "logs").exists()


def test_the_token_is_in_no_file(train: Train) -> None:
    """The reference wrote it into the tracker's configuration and uploaded the logs."""
    output = train("--hub_token=hf_secret_token", "--checkpointing_steps=2")
    assert all(b"hf_secret_token" not in path.read_bytes() for path in output.rglob("*") if path.is_file())


def test_the_references_own_command_line_runs_through_accelerate_launch(
    tiny: Path, photos: Path, embeddings: Path, tmp_path: Path
) -> None:
    """From its notebook, changed in paths, size and number of steps alone, and with TensorBoard for wandb.

    A TensorFlow beside it, as on Colab and Kaggle, is not imported: that took a minute.
    """
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('TensorFlow was imported')")
    paths = {"pretrained_model_name_or_path": tiny, "instance_data_dir": photos, "data_df_path": embeddings,
             "output_dir": tmp_path / "trained-sd3-lora", "max_train_steps": 1, "resolution": 64}  # fmt: skip
    flags = [*shlex.split(REFERENCE_COMMAND), *(f"--{name}={value}" for name, value in paths.items())]
    script = str(ROOT / "train_dreambooth_sd3_lora_miniature.py")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes=1", script, *flags]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(lora(tmp_path / "trained-sd3-lora")) == 2 * 15  # eight layers a block, the last without to_add_out
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert "1 step of 4 samples" in result.stdout and len(logged(tmp_path / "trained-sd3-lora")) == 1


def test_training_starts_from_another_lora(train: Train, tmp_path: Path) -> None:
    """With a learning rate of nothing the LoRA comes out as it went in; one of another rank is refused."""
    first = train(output="first") / trainer.LORA_NAME
    again = train(f"--pretrained_lora_path={first}", learning_rate=1e-30, adam_weight_decay=0, output="again")
    assert equal(lora(first.parent), lora(again))
    with pytest.raises(SystemExit, match=f"--pretrained_lora_path .*--rank 8 .*rank is {RANK}"):
        train(f"--pretrained_lora_path={first}", rank=8, output="refused")
    assert not (tmp_path / "refused").exists()
    for missing in (tmp_path / "none", "owner/none", "folder/none.safetensors"):  # the second may be a repository
        with pytest.raises(SystemExit, match=f"--pretrained_lora_path .*{Path(missing).absolute()} does not exist"):
            train(f"--pretrained_lora_path={missing}")


@pytest.mark.parametrize(("start", "alpha"), [(trainer.LORA_NAME, 4 * RANK), ("checkpoint-4", RANK)])
def test_another_lora_keeps_its_strength(train: Train, start: str, alpha: int) -> None:
    """Whatever --lora_alpha it was trained with, and whatever --lora_alpha goes on with."""
    first = train(f"--lora_alpha={2 * RANK}", "--checkpointing_steps=4", output="first")
    flags = [f"--pretrained_lora_path={first / start}", f"--lora_alpha={alpha}"]
    assert equal(lora(first), lora(train(*flags, learning_rate=1e-30, adam_weight_decay=0, output="again")))


def test_another_lora_is_not_rounded_to_the_bases_precision(train: Train) -> None:
    """Neither in bf16."""
    first = train(output="first")
    flags = [f"--pretrained_lora_path={first}", "--mixed_precision=bf16"]
    assert equal(lora(first), lora(train(*flags, learning_rate=1e-30, adam_weight_decay=0, output="again")))


def test_images_train_with_their_own_captions(train: Train, tiny: Path, photos: Path, tmp_path: Path) -> None:
    """Every image may have one; then the LoRA is another, and the instance prompt is still known."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    for number, path in enumerate(sorted(folder.iterdir())):
        path.with_suffix(".txt").write_text(f"sks dog number {number}")
    embeddings = compute(tiny, folder, tmp_path / "own.parquet", f"--prompt={PROMPT}", "--no_t5")
    plain = compute(tiny, photos, tmp_path / "plain.parquet", f"--prompt={PROMPT}", "--no_t5")
    own = train(instance_data_dir=folder, data_df_path=embeddings, output="own")
    assert not equal(lora(own), lora(train(data_df_path=plain, output="plain")))
