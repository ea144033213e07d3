"""Two processes train like one: the same samples, the same losses, the same LoRA but for rounding."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, RANK, ROOT, logged
from safetensors.torch import load_file

STEPS = 6
ONE_PROCESS = ["--num_processes=1"]
TWO_PROCESSES = ["--multi_gpu", "--num_processes=2", "--num_machines=1"]
Launch = Callable[..., subprocess.Popen]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture
def launch(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> Launch:
    """Start recorded_run.py by accelerate, on the CPU."""

    def start(output: str, *flags: str, launcher: list[str] = TWO_PROCESSES) -> subprocess.Popen:
        port = [] if any("port" in flag for flag in launcher) else [f"--main_process_port={free_port()}"]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--mixed_precision=no", *launcher]
        script = [ROOT / "tests" / "recorded_run.py", tmp_path / output / "record"]
        fixed = {
            "pretrained_model_name_or_path": tiny, "instance_data_dir": photos, "data_df_path": embeddings,
            "instance_prompt": PROMPT, "output_dir": tmp_path / output, "resolution": 64, "max_train_steps": STEPS,
            "lr_warmup_steps": 0, "learning_rate": 1e-3, "rank": RANK, "seed": 0, "num_inference_steps": 2,
        }  # fmt: skip
        given = [f"--{name}={value}" for name, value in fixed.items()]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
        return subprocess.Popen(
            list(map(str, [*command, *port, *script, *given, *flags])), env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return start


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def records(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "record").glob("rank-*.json")}


def distance(one: Path, other: Path) -> float:
    """Relative L2 distance of two LoRAs."""
    first, second = (load_file(folder / trainer.LORA_NAME) for folder in (one, other))
    assert first.keys() == second.keys()
    difference = sum((first[name] - second[name]).square().sum() for name in first)
    return float((difference / sum(value.square().sum() for value in first.values())).sqrt())


def assert_same_training(one: Path, two: Path, tolerance: float, samples_per_step: int) -> None:
    """One process and two: half of each global batch in each of the two, equal losses, LoRAs within the tolerance."""
    alone, ranks = records(one)["rank-0"], records(two)
    assert [ranks[f"rank-{i}"]["patience_hours"] for i in (0, 1)] == [12, 12]  # encoding many pictures takes long
    assert alone["world_size"] == 1 and [ranks[f"rank-{i}"]["world_size"] for i in (0, 1)] == [2, 2]
    of_ranks = [ranks[f"rank-{i}"]["sample_numbers"] for i in (0, 1)]
    assert alone["sample_numbers"] == list(range(STEPS * samples_per_step))
    for step in range(STEPS):
        half = slice(step * samples_per_step // 2, (step + 1) * samples_per_step // 2)
        batch = sorted(of_ranks[0][half] + of_ranks[1][half])
        assert batch == list(range(step * samples_per_step, (step + 1) * samples_per_step))
    assert np.abs(np.subtract(logged(one), logged(two))).max() <= 1e-5
    assert distance(one, two) <= tolerance


def test_two_processes_train_like_one(launch: Launch, tmp_path: Path) -> None:
    """Five pictures, accumulation, AdamW, prior preservation: relative L2 1e-5 and losses 1e-5."""
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=3"]
    flags += [f"--class_data_dir={tmp_path / 'class'}", "--gradient_accumulation_steps=2"]
    finish(launch("two", *flags, "--train_batch_size=1", "--resume_from_checkpoint=latest"))
    finish(launch("one", *flags, "--train_batch_size=2", launcher=ONE_PROCESS))
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-5, samples_per_step=4)


def test_two_processes_with_8_bit_adam(launch: Launch, tmp_path: Path) -> None:
    """Real 8-bit states: relative L2 1e-2. One run resumes what the other saved, with another number of processes."""
    flags = ["--use_8bit_adam", "--checkpointing_steps=3"]
    finish(launch("two", *flags, "--train_batch_size=1"))
    finish(launch("one", *flags, "--train_batch_size=2", launcher=ONE_PROCESS))
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-2, samples_per_step=2)
    checkpoint = tmp_path / "two" / "checkpoint-3"
    states = torch.load(checkpoint / "training_state.pt", weights_only=True)["optimizer"]["state"]
    assert all(each["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8 for each in states.values())
    flags += [f"--resume_from_checkpoint={checkpoint}", "--train_batch_size=2"]
    finish(launch("resumed", *flags, launcher=ONE_PROCESS))
    assert records(tmp_path / "resumed")["rank-0"]["sample_numbers"] == list(range(6, 12))
    assert distance(tmp_path / "one", tmp_path / "resumed") <= 1e-2


def test_two_processes_with_shapes(launch: Launch, tmp_path: Path) -> None:
    """Pictures of three shapes, class pictures, accumulation, 10 samples of 5 + 3 pictures a round: as one process."""
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", "--num_class_images=3"]
    flags += [f"--class_data_dir={tmp_path / 'class'}", "--gradient_accumulation_steps=2", "--aspect_ratio_buckets"]
    finish(launch("two", *flags, "--train_batch_size=1"))
    finish(launch("one", *flags, "--train_batch_size=2", launcher=ONE_PROCESS))
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-5, samples_per_step=4)


def test_two_processes_with_a_quantised_base(launch: Launch, tmp_path: Path) -> None:
    """Real 4-bit layers of bitsandbytes, frozen, in both processes."""
    flags = ["--quantize_base=nf4"]
    finish(launch("two", *flags, "--train_batch_size=1"))
    finish(launch("one", *flags, "--train_batch_size=2", launcher=ONE_PROCESS))
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-5, samples_per_step=2)


def test_two_machines(launch: Launch, tmp_path: Path) -> None:
    """Two launches that meet on loopback, one process each, with a common output folder."""
    where = ["--multi_gpu", "--num_processes=2", "--num_machines=2", "--main_process_ip=127.0.0.1"]
    where += [f"--main_process_port={free_port()}"]
    finish(*(launch("two", "--train_batch_size=1", launcher=[*where, f"--machine_rank={i}"]) for i in (0, 1)))
    finish(launch("one", "--train_batch_size=2", launcher=ONE_PROCESS))
    assert_same_training(tmp_path / "one", tmp_path / "two", 1e-5, samples_per_step=2)


def test_a_killed_worker_ends_the_run_and_the_checkpoint_resumes(launch: Launch, tmp_path: Path) -> None:
    """Nobody waits for it for ever, the exit code is not 0, and the run goes on to the uninterrupted result."""
    flags = ["--train_batch_size=1", "--checkpointing_steps=1"]
    finish(launch("whole", *flags))
    process = launch("killed", *flags, "--max_train_steps=1000")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in output or "-9" in output
    for path in (tmp_path / "killed").glob("checkpoint-*"):
        if int(path.name.split("-")[1].split(".")[0]) > 3:
            path.rename(tmp_path / path.name)
    finish(launch("killed", *flags, "--resume_from_checkpoint=latest"))
    assert distance(tmp_path / "whole", tmp_path / "killed") == 0
