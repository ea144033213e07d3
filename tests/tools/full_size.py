"""Both scripts on a model of the real size: how benchmark.py and gpu_report.py start them, and read what they did."""

import json
import math
import re
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from measuring import GIB, MIB

TRAINER, EMBEDDER = "train_dreambooth_sd3_lora_miniature.py", "compute_embeddings.py"
LORA_NAME = "pytorch_lora_weights.safetensors"
PROMPT, CLASS_PROMPT, PREVIEW_PROMPT = "a photo of sks dog", "a photo of a dog", "sks dog in a bucket"
PACKAGES = ("torch", "diffusers", "transformers", "bitsandbytes", "accelerate", "peft")
Row = dict[str, object]

# ---------------------------------------------------------------------------------------------------- what is started


@dataclass(frozen=True)
class Inputs:
    """The scripts, and what they work on."""

    scripts_dir: Path
    pipeline: Path
    images: Path


def embeddings_command(inputs: Inputs, path: Path, t5_precision: str) -> list[str]:
    """compute_embeddings.py for all prompts that a training here can need, into the file at path."""
    settings = {
        "pretrained_model_name_or_path": inputs.pipeline,
        "local_data_dir": inputs.images,
        "prompt": PROMPT,
        "class_prompt": CLASS_PROMPT,
        "validation_prompt": PREVIEW_PROMPT,
        "t5_precision": t5_precision,
        "output_path": path,
    }
    return [str(inputs.scripts_dir / EMBEDDER), *as_flags(settings)]


def new_logs(output: Path) -> Path:
    """A name for the logs of one run, which a run that resumes it does not share."""
    return output / f"logs-{time.time():.0f}"


def training_command(inputs: Inputs, embeddings: Path, logs: Path, settings: Row, flags: list[str]) -> list[str]:
    """The trainer, batch 1, with more settings and flags; its output folder is that of the logs."""
    common = {
        "pretrained_model_name_or_path": inputs.pipeline,
        "instance_data_dir": inputs.images,
        "data_df_path": embeddings,
        "instance_prompt": PROMPT,
        "output_dir": logs.parent,
        "logging_dir": logs.name,
        "train_batch_size": 1,
        "seed": 0,
    }
    return [str(inputs.scripts_dir / TRAINER), *as_flags(common | settings), "--center_crop", *flags]


def as_flags(settings: Row) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


# ---------------------------------------------------------------------------------------------------- what it has done


def measured(taken: Row) -> Row:
    """The cells that every run has, from what measuring.measure() gives."""
    names = ("VRAM allocated", "VRAM reserved", "VRAM in use", "anonymous RAM", "RAM", "seconds")
    return {name: taken[name] for name in names if name in taken} | memory_over_time(taken.get("events", []))


def training_cells(taken: Row, log: Path, logs: Path) -> Row:
    """What a training took, its losses and what it said, wherever it ended."""
    losses = read_losses(logs)
    row = measured(taken) | speed_and_losses(losses)
    row["recomputed"] = chosen_recomputation(log.read_text(errors="replace"))
    if losses:
        first_step, ended_at, _ = losses[0]
        row |= {"first step": first_step, "to first step": ended_at - taken["started"]}
    return row


def read_losses(logs: Path) -> list[tuple[int, float, float]]:
    """The step, the wall time and the value of every loss in TensorBoard's files under a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in sorted(logs.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(file)).Reload()
        if "loss" in events.Tags()["scalars"]:
            return [(event.step, event.wall_time, event.value) for event in events.Scalars("loss")]
    return []


def speed_and_losses(losses: list[tuple[int, float, float]]) -> Row:
    """Seconds a step, the median of the differences, and whether every loss is finite."""
    if not losses:
        return {}
    times = [wall_time for _, wall_time, _ in losses]
    values = [value for _, _, value in losses]
    row: Row = {"losses": all(math.isfinite(value) for value in values), "mean loss": statistics.mean(values)}
    if len(times) > 1:
        row["s/step"] = statistics.median(later - time for time, later in zip(times, times[1:], strict=False))
    return row


def chosen_recomputation(said: str) -> str | None:
    """none, half or all: how many blocks the trainer said it recomputes; None if it did not come to that."""
    found = re.search(r"gradient checkpointing: (off|all|\d+ of) ?", said)
    if found is None:
        return None
    return {"off": "none", "all": "all"}.get(found[1], "half")


def memory_over_time(events: list[list]) -> Row:
    """What is held after the second step, what a step adds to it, and what the previews between two steps add."""
    steps = [number for number, (kind, _) in enumerate(events) if kind == "step"]
    if len(steps) < 2:
        return {}
    alone: list[float] = []
    around_previews: list[float] = []
    # Not from the first step, which makes the optimizer's states, nor to the last, which has no next batch beside it.
    for before, after in zip(steps[1:-2], steps[2:-1], strict=True):
        added = (events[after][1] - events[before][1]) / MIB
        (alone if after == before + 1 else around_previews).append(added)
    row: Row = {"held": events[steps[1]][1] / GIB}
    if alone:
        row["growth"] = statistics.mean(alone)
    if around_previews:
        row["kept"] = statistics.mean(around_previews) - row.get("growth", 0.0)
    return row


def tensor_sizes(path: Path) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: about["shape"] for name, about in header.items() if name != "__metadata__"}


# ------------------------------------------------------------------------------------------------------ what is shown


def versions() -> dict[str, str]:
    """The versions of the libraries that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cell(value: object) -> str:
    """Three digits of a number; text as it is, without what would end a cell."""
    if isinstance(value, bool) or value is None:
        return "" if value is None else ("yes" if value else "**no**")
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "/").replace("\n", " ")


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """A Markdown table of the columns that some row has; columns: the name in a row, and the title."""
    names = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = [[columns[name] for name in names], ["---"] * len(names)]
    lines += [[cell(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
