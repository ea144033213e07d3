"""Run the trainer as it is, and write down which images this process encoded and which samples it trained on.

For test_distributed.py: the first argument is the folder for rank-N.json, the rest are flags of the trainer.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import quantized_on_cpu
import train_dreambooth_sd3_lora_miniature as trainer

if any(flag.startswith("--quantize_base") for flag in sys.argv):
    quantized_on_cpu.allow()
torch.compile = partial(torch.compile, backend="eager")  # Python runs the graphs: seconds instead of minutes
path = Path(sys.argv.pop(1)) / f"rank-{os.environ.get('RANK', 0)}.json"
path.parent.mkdir(parents=True, exist_ok=True)
encoded: list[str] = []
sample_numbers: list[int] = []
encode_image, training_loss, choose = trainer.encode_image, trainer.training_loss, trainer.choose_recomputation


def encode_and_record(vae, example, args):
    encoded.append(example.path.name)
    return encode_image(vae, example, args)


def record_and_compute(model, batch, *rest):
    sample_numbers.extend(batch["sample_number"].tolist())
    about = {"world_size": int(os.environ.get("WORLD_SIZE", 1)), "encoded": encoded, "sample_numbers": sample_numbers}
    if torch.distributed.is_initialized():
        group = torch.distributed.group.WORLD
        about["patience_hours"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600
    path.write_text(json.dumps(about))
    return training_loss(model, batch, *rest)


def choose_unrecorded(*args):
    """Its own micro-batches are no training."""
    seconds = choose(*args)
    sample_numbers.clear()
    return seconds


trainer.encode_image, trainer.training_loss = encode_and_record, record_and_compute
trainer.choose_recomputation = choose_unrecorded
trainer.PARENT = os.getppid()  # a process that was forked has imported the trainer before it had this parent
if __name__ == "__main__":
    trainer.main(trainer.parse_args())
