"""Where a run's seconds go: the trainer in this process, with a clock around each of its parts.

    python tests/tools/wall_clock.py @tests/toy/train.txt          # any flags of the trainer
    python tests/tools/wall_clock.py --pretrained_model_name_or_path P ... --max_train_steps 3   # at full size

Prints a Markdown table. A part's seconds are its own: without those of the parts that it calls.
"""

import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

STARTED = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import train_dreambooth_sd3_lora_miniature as trainer

PARTS = {
    "make_accelerator": "starting accelerate",
    "preflight": "checking everything, hashing images and model",
    "resolve_model": "downloading the model, or finding it",
    "start_tracker": "starting the tracker (and importing TensorBoard)",
    "load_vae": "loading the VAE",
    "encode_latents": "encoding images",
    "load_transformer": "loading the transformer",
    "make_class_images": "making class images",
    "add_lora": "adding the LoRA (and importing PEFT)",
    "start_or_resume": "making the optimizer (and importing bitsandbytes), reading a checkpoint",
    "choose_recomputation": "trying a micro-batch",
    "make_previews": "drawing previews",
    "train": "training steps",
    "save_checkpoint": "writing checkpoints",
    "publish": "writing the LoRA and its card, uploading",
}


class Clock:
    """Adds up the seconds of parts, each without those of the parts inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.inner: list[float] = []  # for each part that is running, the seconds of the parts that it has called

    def around(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: object, **kwargs: object) -> object:
            self.inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                whole = time.perf_counter() - started
                self.seconds[name] += whole - self.inner.pop()
                self.calls[name] += 1
                if self.inner:
                    self.inner[-1] += whole

        return timed


def main() -> None:
    imports = time.perf_counter() - STARTED
    clock = Clock()
    for name in PARTS:
        setattr(trainer, name, clock.around(name, getattr(trainer, name)))
    trainer.main(trainer.parse_args())
    whole = time.perf_counter() - STARTED
    rest = whole - imports - sum(clock.seconds.values())
    print("\n| part | calls | seconds |\n|---|---|---|")
    print(f"| importing the libraries | | {imports:.1f} |")
    for name, what in PARTS.items():
        if clock.calls[name]:
            print(f"| {what} | {clock.calls[name]} | {clock.seconds[name]:.1f} |")
    print(f"| the rest | | {rest:.1f} |\n| the whole run | | {whole:.1f} |")


if __name__ == "__main__":
    main()
