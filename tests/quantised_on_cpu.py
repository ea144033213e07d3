"""What lets --quantize_base run on a CPU, in tests only: bitsandbytes itself can, diffusers and a check forbid it."""

from collections.abc import Callable

import bitsandbytes as bnb
import train_dreambooth_sd3_lora_miniature as trainer
from diffusers.quantizers.bitsandbytes import bnb_quantizer


def allow(setattr: Callable[[object, str, object], None] = setattr) -> None:
    """Take away the two checks for a GPU, and what a CPU would do to the weights in a preview."""
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        setattr(quantizer, "validate_environment", lambda *_, **__: None)
        setattr(quantizer, "update_device_map", lambda *_: {"": "cpu"})
    as_loaded, check = bnb.nn.Linear4bit.__init__, trainer.check_environment

    def without_repacking(self: bnb.nn.Linear4bit, *args: object, **kwargs: object) -> None:
        as_loaded(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = False  # a preview would repack the weights, and end the training

    def without_the_check(args: object, accelerator: object, problems: list[str]) -> None:
        check(args, accelerator, problems)
        problems.remove("--quantize_base needs a GPU.")

    setattr(bnb.nn.Linear4bit, "__init__", without_repacking)
    setattr(trainer, "check_environment", without_the_check)
