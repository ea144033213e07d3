"""What lets --quantize_base run on a CPU, in tests only: bitsandbytes itself can, diffusers and a check forbid it."""

from collections.abc import Callable

import bitsandbytes as bnb
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
