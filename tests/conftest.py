"""Tiny pipelines, images and embeddings that the tests share, and a way to run the real trainer in this process."""
# ruff: noqa: E402 - torch reads the environment when it is imported

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
# A GPU is for test_gpu.py alone: what the others assert to the bit holds on a CPU. xdist's workers see no arguments.
os.environ |= {"SD3_TEST_GPU": "1"} if any("test_gpu" in argument for argument in sys.argv) else {}
os.environ |= {} if "SD3_TEST_GPU" in os.environ else {"CUDA_VISIBLE_DEVICES": ""}
# Signals as a terminal leaves them: a shell that starts pytest in the background ignores the first, nohup the other.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # not on Windows
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import compute_embeddings as embed
import tiny_pipeline
import train_dreambooth_sd3_lora_miniature as trainer

PROMPT, PREVIEW_PROMPT = "a photo of sks dog", "sks dog in a bucket"
PREVIEWS = f"--validation_prompt={PREVIEW_PROMPT}"
LATEST = "--resume_from_checkpoint=latest"
RANK = 64  # the smallest at which bitsandbytes keeps the tiny transformer's states in 8 bit


Train = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the toy's trainings, which take minutes: at the end, one process would wait for the other."""
    items.sort(key=lambda item: item.path.name != "test_toy.py")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline like SD3-medium."""
    return tiny_pipeline.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny35(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline like SD3.5-medium."""
    return tiny_pipeline.save(tmp_path_factory.mktemp("tiny35"), "sd35")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images: upright, wide, square, in different formats."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    shapes = [("a.jpg", 96, 128), ("b.JPEG", 128, 96), ("c.png", 80, 80), ("d.webp", 100, 75), ("e.bmp", 64, 64)]
    for name, height, width in shapes:
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / name)
    return folder


@contextmanager
def restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in trainer.END_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def compute(model: Path, photos: Path, output: Path, *flags: str) -> Path:
    """Run compute_embeddings.py in this process."""
    command = ["--pretrained_model_name_or_path", model, "--local_data_dir", photos, "--output_path", output]
    embed.main(embed.parse_args([*map(str, command), *flags]))
    return output


@pytest.fixture(scope="session")
def embeddings(tiny: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline's embeddings of the images' prompt and a preview prompt."""
    path = tmp_path_factory.mktemp("embeddings") / "embeddings.parquet"
    with restored_signals():
        compute(tiny, photos, path, "--t5_precision", "exact", "--validation_prompt", PREVIEW_PROMPT)
    gc.collect()
    gc.freeze()  # the libraries are loaded by now; looking through them cost 0.4 s whenever the trainer frees memory
    return path


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its precision and devices for the life of a process; each test starts anew."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)  # the trainer takes all cores where a launcher started it


@pytest.fixture(autouse=True)
def earlier_signal_handlers() -> Iterator[None]:
    """Both scripts leave their handlers in place, since their process ends with them."""
    with restored_signals():
        yield


@pytest.fixture(autouse=True)
def loss_scaler_on_a_cpu() -> Iterator[None]:
    """accelerate scales the loss of fp16 on GPUs alone; here it does on the CPU, as it would there."""
    make_accelerator = trainer.make_accelerator

    def with_scaler(*args: object) -> Accelerator:
        accelerator = make_accelerator(*args)
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
        return accelerator

    with pytest.MonkeyPatch.context() as patch:  # of its own: a test may undo its monkeypatch
        patch.setattr(trainer, "make_accelerator", with_scaler)
        yield


@pytest.fixture
def train(tiny: Path, photos: Path, embeddings: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the trainer in this process, 4 steps unless something else is given, and return its output folder."""

    def run(*flags: str, output: str = "out", **changes: object) -> Path:
        reset_accelerate()
        defaults = {
            "pretrained_model_name_or_path": tiny, "instance_data_dir": photos, "data_df_path": embeddings,
            "instance_prompt": PROMPT, "output_dir": tmp_path / output, "resolution": 64, "train_batch_size": 1,
            "max_train_steps": 4, "lr_warmup_steps": 0, "learning_rate": 1e-3, "rank": RANK, "seed": 0,
            "num_inference_steps": 2, "num_validation_images": 1,
        }  # fmt: skip
        command = [f"--{name}={value}" for name, value in (defaults | changes).items() if value is not None]
        trainer.main(trainer.parse_args([*command, *flags]))
        return tmp_path / output

    return run


def lora(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the LoRA in a folder."""
    return load_file(folder / trainer.LORA_NAME)


def equal(one: object, other: object) -> bool:
    """Whether two nested states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def logged(folder: Path, name: str = "loss") -> list[float]:
    """A scalar of every optimizer step, from all TensorBoard files under a folder."""
    values: dict[int, float] = {}
    for file in sorted(folder.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(file)).Reload()
        if name in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars(name)}
    return [values[step] for step in sorted(values)]


def parse(*flags: str) -> trainer.Args:
    """The trainer's command line, with something for each required flag."""
    required = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e"]
    return trainer.parse_args([*required, "--instance_prompt=p", *flags])


def state(checkpoint: Path) -> dict:
    """The training state of a checkpoint."""
    return torch.load(checkpoint / trainer.STATE_NAME, weights_only=True)


def names(checkpoints: list[Path]) -> list[str]:
    return [path.name for path in checkpoints]
