"""Kill the trainer with SIGKILL at random moments, resume it each time, and compare the end with an undisturbed run.

    python tests/kill_test.py --kills 50

Each attempt is a process forked from this one, which has the libraries loaded, so that it starts at once.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import compute_embeddings as embed
import numpy as np
import tiny_pipeline
import train_dreambooth_sd3_lora_miniature as trainer
from PIL import Image
from safetensors import safe_open


def make_inputs(folder: Path) -> list[str]:
    """A tiny pipeline, three pictures and their embeddings; the trainer's flags for them."""
    model, photos = tiny_pipeline.save(folder / "model"), folder / "photos"
    photos.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    shared = [f"--pretrained_model_name_or_path={model}"]
    table = folder / "embeddings.parquet"
    embed.main(embed.parse_args([*shared, f"--local_data_dir={photos}", f"--output_path={table}", "--no_t5"]))
    flags = ["--instance_prompt=a photo of sks dog", f"--instance_data_dir={photos}", f"--data_df_path={table}"]
    flags += ["--resolution=64", "--train_batch_size=1", "--max_train_steps=12", "--rank=64", "--use_8bit_adam"]
    return [*shared, *flags, "--seed=0", "--report_to=none", "--checkpointing_steps=1", "--checkpoints_total_limit=2"]


def attempt(flags: list[str], output: Path, kill_after: float | None) -> bool:
    """Train in a process of its own, killed after so many seconds; whether it came to the end."""
    child = os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        trainer.main(trainer.parse_args([*flags, f"--output_dir={output}", "--resume_from_checkpoint=latest"]))
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or status == 0:
        return status == 0
    raise SystemExit(f"an attempt failed with exit code {os.waitstatus_to_exitcode(status)}")


def read_lora(folder: Path) -> tuple[dict, dict]:
    """Tensors, and metadata but for the title, the folder's name; bytes differ, as safetensors shuffles metadata."""
    with safe_open(folder / trainer.LORA_NAME, "np") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "modelspec.title"}
        return metadata, {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def survive(kills: int, seed: int = 0) -> tuple[int, int]:
    """Kill until so many attempts were cut short; (attempts cut short, runs completed), all with the same LoRA."""
    rng, cut, completed = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        flags = make_inputs(Path(folder))
        started = time.monotonic()
        attempt(flags, Path(folder, "whole"), None)
        length = time.monotonic() - started
        expected = read_lora(Path(folder, "whole"))
        while cut < kills:
            output = Path(folder, f"run-{completed}")
            while not attempt(flags, output, rng.uniform(0, length) if cut < kills else None):
                cut += 1
                there = (output / trainer.LORA_NAME).exists()
                assert not there or read_lora(output) == expected, "a torn LoRA was taken for good"
            assert read_lora(output) == expected, "the resumed run ended elsewhere"
            completed += 1
    return cut, completed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how often to kill")
    cut, completed = survive(parser.parse_args().kills)
    print(f"{cut} kills survived in {completed} runs: every LoRA is bit-identical to that of an undisturbed run")
