"""What lets --quantize_base run on a CPU, in tests only, and soon.

    python tests/tools/quantized_on_cpu.py FLAGS...    # the trainer with these flags

nf4: bitsandbytes itself can, diffusers and a check forbid it. int8: an old CPU needs thirty times as long for products
of integers as for those of floats, which give the same numbers.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import bitsandbytes as bnb
import torch
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

import train_dreambooth_sd3_lora_miniature as trainer


def allow(setattr: Callable[[object, str, object], None] = setattr) -> None:
    """Take away the two checks for a GPU, and what a CPU would do to the weights in a preview."""
    as_loaded, check = bnb.nn.Linear4bit.__init__, trainer.check_machine

    def without_repacking(self: bnb.nn.Linear4bit, *args: object, **kwargs: object) -> None:
        as_loaded(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = False  # a preview would repack the weights, and end the training

    def without_the_check(args: trainer.Args, accelerator: object, problems: trainer.Problems) -> None:
        check(args, accelerator, problems)
        problems.problems = [problem for problem in problems.problems if "--quantize_base" not in problem]

    setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda *_: {"": "cpu"})
    setattr(bnb.nn.Linear4bit, "__init__", without_repacking)
    setattr(trainer, "check_machine", without_the_check)


def multiply_in_floats(setattr: Callable[[object, str, object], None] = setattr) -> None:
    """Let 8-bit products be made of floats: the same to the bit, since fp64 holds every integer up to 2**53."""

    def product(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return (rows.double() @ columns.double()).float()

    setattr(torch, "_int_mm", product)


if __name__ == "__main__":
    allow()
    multiply_in_floats()
    trainer.main(trainer.parse_args())
