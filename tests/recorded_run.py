"""Run the trainer as it is, and write down which samples this process trained on.

Started by accelerate from test_distributed.py: the first argument is the folder for rank-N.json, the rest are flags.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import quantised_on_cpu
import torch
import train_dreambooth_sd3_lora_miniature as trainer

if any(flag.startswith("--quantize_base") for flag in sys.argv):
    quantised_on_cpu.allow()

folder = Path(sys.argv.pop(1))
folder.mkdir(parents=True, exist_ok=True)
sample_numbers: list[int] = []
loss_of_batch, estimate = trainer.training_loss, trainer.estimate_step_seconds


def recorded(model, batch, *rest):
    sample_numbers.extend(batch["sample_number"].tolist())
    about = {"world_size": int(os.environ.get("WORLD_SIZE", 1)), "sample_numbers": sample_numbers}
    if torch.distributed.is_initialized():
        group = torch.distributed.group.WORLD
        about["patience_hours"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600
    (folder / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(about))
    return loss_of_batch(model, batch, *rest)


def not_recorded(*args):
    """The estimate's own forward passes are no training."""
    seconds = estimate(*args)
    sample_numbers.clear()
    return seconds


trainer.training_loss, trainer.estimate_step_seconds = recorded, not_recorded
trainer.main(trainer.parse_args())
