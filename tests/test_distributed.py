"""Two processes train like one: the same latents, samples and losses, and the same LoRA but for rounding."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import chdir, suppress
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import measuring
import quantized_on_cpu
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEW_PROMPT, PROMPT, RANK, ROOT, logged, reset_accelerate

STEPS = 6
SCRIPT_LINE = 'recorded_run.py", line'  # of a traceback that is not the launcher's own
ON_LOOPBACK = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
TWO_PROCESSES = ["--multi_gpu", "--num_processes=2", "--num_machines=1"]
Script = Callable[..., list[str]]
Launch = Callable[..., subprocess.Popen]
RunTwo = Callable[..., str]
Train = Callable[..., Path]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="session")
def script(tiny: Path, photos: Path, embeddings: Path) -> Script:
    """recorded_run.py with its flags: a micro-batch of one image in each process."""

    def command(output: Path, *flags: str, **changes: object) -> list[str]:
        values = {
            "pretrained_model_name_or_path": tiny, "instance_data_dir": photos, "data_df_path": embeddings,
            "instance_prompt": PROMPT, "output_dir": output, "resolution": 64, "max_train_steps": STEPS, "seed": 0,
            "train_batch_size": 1, "lr_warmup_steps": 0, "learning_rate": 1e-3, "rank": RANK,
            "num_inference_steps": 2, "num_validation_images": 1,
        }  # fmt: skip
        given = [f"--{name}={value}" for name, value in (values | changes).items()]
        return [str(ROOT / "tests" / "tools" / "recorded_run.py"), str(output / "record"), *given, *flags]

    return command


@pytest.fixture(scope="session")
def launch(script: Script) -> Launch:
    """Start the script by accelerate, on the CPU."""

    def start(output: Path, *flags: str, launcher: list[str] = TWO_PROCESSES, **changes: object) -> subprocess.Popen:
        port = [] if any("port" in flag for flag in launcher) else [f"--main_process_port={free_port()}"]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--mixed_precision=no", *launcher]
        return subprocess.Popen(
            [*command, *port, *script(output, *flags, **changes)], env=os.environ | ON_LOOPBACK, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="session")
def run_two(script: Script, tmp_path_factory: pytest.TempPathFactory) -> RunTwo:
    """Run the script in two processes that are forked from this one, which spares them the imports; what they print.

    They get the environment that a launcher would give them. machines: the working directory of each of two machines,
    which have a process each; () is one machine.
    """

    def run(output: Path, *flags: str, machines: Sequence[Path] = (), code: int = 0, **changes: object) -> str:
        reset_accelerate()
        folder = tmp_path_factory.mktemp("logs")
        shared = ON_LOOPBACK | {"WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"LOCAL_WORLD_SIZE": "1" if machines else "2"}
        logs = [folder / f"{rank}.log" for rank in (0, 1)]
        processes = []
        for rank, log in enumerate(logs):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": "0" if machines else str(rank)}
            with chdir(machines[rank] if machines else ROOT):
                processes.append(measuring.fork(folder, 0, script(output, *flags, **changes), log, environment))
        try:
            codes = [process.wait(timeout=300) for process in processes]
        finally:
            for process in processes:
                with suppress(psutil.Error):
                    process.kill()
        printed = "".join(log.read_text() for log in logs)
        assert codes == [code, code], printed
        return printed

    return run


def finish(*processes: subprocess.Popen, code: int = 0) -> list[str]:
    """Wait for the ends of processes; what they printed."""
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), printed
    return printed


def records(folder: Path) -> list[dict]:
    return [json.loads((folder / "record" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def distance(one: Path, other: Path) -> float:
    """Relative L2 distance of two LoRAs."""
    first, second = (load_file(folder / trainer.LORA_NAME) for folder in (one, other))
    assert first.keys() == second.keys()
    difference = sum((first[name] - second[name]).square().sum() for name in first)
    return float((difference / sum(value.square().sum() for value in first.values())).sqrt())


def assert_same_training(one: Path, two: Path, tolerance: float, samples_per_step: int) -> None:
    """Half of each step's samples in each of two processes, the losses of one, its LoRA within the tolerance."""
    ranks = records(two)
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert [rank["patience_hours"] for rank in ranks] == [12, 12]  # previews and the upload take long
    for step in range(STEPS):
        half = slice(step * samples_per_step // 2, (step + 1) * samples_per_step // 2)
        numbers = sorted(ranks[0]["sample_numbers"][half] + ranks[1]["sample_numbers"][half])
        assert numbers == list(range(step * samples_per_step, (step + 1) * samples_per_step))
    assert logged(one) == pytest.approx(logged(two), abs=1e-5, rel=0) and len(logged(one)) == STEPS
    assert distance(one, two) <= tolerance


@pytest.fixture(scope="module")
def two(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("two")
    finish(launch(folder, "--checkpointing_steps=1", "--checkpoints_total_limit=0"))
    return folder


def test_two_processes_train_like_one(train: Train, two: Path) -> None:
    """Five images, AdamW: relative L2 1e-5 and losses 1e-5."""
    one = train(train_batch_size=2, max_train_steps=STEPS)
    assert_same_training(one, two, 1e-5, samples_per_step=2)


def test_each_process_encodes_its_share(train: Train, two: Path) -> None:
    """Of the five images, into the files that one process writes."""
    shares = [rank["encoded"] for rank in records(two)]
    assert sorted(map(len, shares)) == [2, 3] and len(set(shares[0] + shares[1])) == 5
    one = train(train_batch_size=2, max_train_steps=1)
    files = [{path.name: path.read_bytes() for path in (folder / "latents").iterdir()} for folder in (one, two)]
    assert len(files[0]) == 5 and files[0] == files[1]


def test_one_process_resumes_what_two_began(train: Train, two: Path) -> None:
    """From the fourth step on."""
    flags = [f"--resume_from_checkpoint={two / 'checkpoint-3'}"]
    one = train(*flags, train_batch_size=2, max_train_steps=STEPS)
    assert logged(one) == pytest.approx(logged(two)[3:], abs=1e-5, rel=0)
    assert distance(one, two) <= 1e-5


@pytest.mark.parametrize("kind, count", [("images", 3), ("velocities", 24)])  # three files
def test_shapes_class_samples_accumulation_and_previews(
    train: Train, run_two: RunTwo, tmp_path: Path, kind: str, count: int
) -> None:
    """All at once, and two resolutions, in two processes as in one; each makes its share of the class samples."""
    flags = ["--with_prior_preservation", f"--class_prompt={PREVIEW_PROMPT}", f"--num_class_images={count}"]
    flags += ["--sample_batch_size=1", "--gradient_accumulation_steps=2", "--aspect_ratio_buckets"]
    flags += [f"--class_samples={kind}"]
    flags += ["--resolution", "48", "64"]
    flags += [f"--validation_prompt={PREVIEW_PROMPT}", "--validation_steps=2"]
    run_two(tmp_path / "two", *flags)
    one = train(*flags, train_batch_size=2, max_train_steps=STEPS, output="one")
    assert_same_training(one, tmp_path / "two", 1e-5, samples_per_step=4)
    samples = []
    for folder in (one, tmp_path / "two"):
        samples.append({path.name: path.read_bytes() for path in folder.glob("class_*-*/*.[ps]*")})
    assert len(samples[0]) == 3 and samples[0].keys() == samples[1].keys()
    assert kind == "velocities" or samples[0] == samples[1]  # no rounding to 8 bits hides theirs


def test_4_bit_weights_and_8_bit_states(
    train: Train, run_two: RunTwo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real layers and states of bitsandbytes in both processes: relative L2 1e-2."""
    quantized_on_cpu.allow(monkeypatch.setattr)
    flags = ["--quantize_base=nf4", "--use_8bit_adam", "--checkpointing_steps=6"]
    run_two(tmp_path / "two", *flags)
    one = train(*flags, train_batch_size=2, max_train_steps=STEPS, output="one")
    assert_same_training(one, tmp_path / "two", 1e-2, samples_per_step=2)
    states = trainer.read_state(tmp_path / "two" / "checkpoint-6")["optimizer"]["state"]
    assert all(each["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8 for each in states.values())


def test_8_bit_products_and_compiled_blocks(train: Train, run_two: RunTwo, tmp_path: Path) -> None:
    """Two shapes, one of them compiled inside of DDP, as in one process that compiles nothing.

    Relative L2 1e-2 and losses 1e-4, since a number may be rounded to another integer.
    """
    flags = ["--quantize_base=int8", "--aspect_ratio_buckets=80,80;96,64"]  # 17 tokens and more in each process
    run_two(tmp_path / "two", *flags, "--compile")
    one = train(*flags, train_batch_size=2, max_train_steps=STEPS, output="one")
    assert logged(one) == pytest.approx(logged(tmp_path / "two"), abs=1e-4, rel=0) and len(logged(one)) == STEPS
    assert distance(one, tmp_path / "two") <= 1e-2


def test_two_machines_with_a_common_folder(launch: Launch, two: Path, tmp_path: Path) -> None:
    """A launch on each, which meet on loopback, train what two processes of one machine train, to the bit."""
    where = ["--multi_gpu", "--num_processes=2", "--num_machines=2", "--main_process_ip=127.0.0.1"]
    where += [f"--main_process_port={free_port()}"]
    finish(*(launch(tmp_path, launcher=[*where, f"--machine_rank={rank}"]) for rank in (0, 1)))
    assert logged(tmp_path) == logged(two) and distance(tmp_path, two) == 0


def test_two_machines_without_a_common_folder(run_two: RunTwo, tmp_path: Path) -> None:
    """Both are asked to share it, and end."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    printed = run_two(Path("out"), machines=folders, code=1)
    assert "latents" in printed and printed.count("share out") == 2 and SCRIPT_LINE not in printed


def test_a_folder_that_is_taken_is_one_message(run_two: RunTwo, tmp_path: Path) -> None:
    """Every process hears of it, and ends."""
    with FileLock(tmp_path / ".lock"):
        printed = run_two(tmp_path, code=1)
    assert printed.count(f"Another run is writing to {tmp_path}") == 1 and SCRIPT_LINE not in printed


def test_what_each_process_finds_is_one_message(run_two: RunTwo, photos: Path, tmp_path: Path) -> None:
    """Each checks its share of the images; nobody waits for one that has ended."""
    shutil.copytree(photos, tmp_path / "photos")
    for name in ("a.jpg", "b.JPEG"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    printed = run_two(tmp_path / "out", instance_data_dir=tmp_path / "photos", code=1)
    assert printed.count("a.jpg cannot be read") == printed.count("b.JPEG cannot be read") == 1
    assert printed.count("Cannot start") == 1 and SCRIPT_LINE not in printed
    assert not (tmp_path / "out" / "latents").exists()


def test_a_killed_worker_ends_the_run_and_the_checkpoint_resumes(
    launch: Launch, run_two: RunTwo, two: Path, tmp_path: Path
) -> None:
    """Nobody waits for it for ever, the exit code is not 0, and the run goes on to the uninterrupted result."""
    flags = ["--checkpointing_steps=1", "--checkpoints_total_limit=0"]
    process = launch(tmp_path, *flags, max_train_steps=10**5)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    psutil.Process(process.pid).children()[-1].kill()
    finish(process, code=1)
    for path in tmp_path.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 3:
            shutil.rmtree(path)
    run_two(tmp_path, *flags, "--resume_from_checkpoint=latest")
    assert distance(two, tmp_path) == 0
