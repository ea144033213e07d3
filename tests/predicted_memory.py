"""The peak memory of training, predicted without a GPU and without weights.

    python tests/predicted_memory.py            # the table behind the formula of --dry_run

The trainer's own functions load a model of a real size and compute a real loss on torch's meta device, where tensors
have shapes but no contents, while a dispatch mode adds up the storages that are alive. Attention takes the
memory-efficient kernel's path, as on a T4: on meta it would otherwise make the whole attention matrix.
"""

import argparse
import itertools
import sys
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import train_dreambooth_sd3_lora_miniature as trainer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

COMMON = {"sample_size": 128, "patch_size": 2, "attention_head_dim": 64, "joint_attention_dim": 4096,
          "pooled_projection_dim": 2048}  # fmt: skip
MODELS = {
    "sd3-medium": COMMON | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                            "pos_embed_max_size": 192},
    "sd3.5-medium": COMMON | {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                              "pos_embed_max_size": 384, "qk_norm": "rms_norm",
                              "dual_attention_layers": tuple(range(13))},
    "sd3.5-large": COMMON | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                             "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
}  # fmt: skip
VAE = {
    "latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "norm_num_groups": 32,
    "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False, "use_post_quant_conv": False,
    "force_upcast": True,
}  # fmt: skip


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of all storages that operators make and nobody has dropped yet."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def efficient_attention(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    """SDPA by the kernel that never holds the attention matrix; (B, heads, L, 64)."""
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, None, True)[0]


@contextmanager
def models_on_meta(config: dict) -> Iterator[LiveStorages]:
    """Let the trainer load a model that has this transformer's shapes and no contents, in the dtype it asks for."""
    storages = LiveStorages()

    def empty(kind: type[nn.Module], config: dict, dtype: torch.dtype) -> nn.Module:
        with _disable_current_modes(), torch.device("meta"):
            model = kind(**config).to(dtype)
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            storages.note(tensor.untyped_storage())
        return model

    def transformer(*_: object, dtype: torch.dtype = torch.float32, **__: object) -> nn.Module:
        return empty(SD3Transformer2DModel, config, dtype)

    def vae(*_: object, dtype: torch.dtype = torch.float32, **__: object) -> nn.Module:
        return empty(AutoencoderKL, VAE, dtype)

    def adamw(parameters: list[nn.Parameter], fused: bool, **kwargs: object) -> torch.optim.Optimizer:
        return AdamW(parameters, foreach=False, **kwargs)  # the fused one, which needs no more, refuses meta

    def scheduler(*_: object, **__: object) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(shift=3.0)

    with (
        patch.object(SD3Transformer2DModel, "from_pretrained", transformer),
        patch.object(AutoencoderKL, "from_pretrained", vae),
        patch.object(FlowMatchEulerDiscreteScheduler, "from_pretrained", scheduler),
        patch.object(torch.optim, "AdamW", adamw),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", efficient_attention),
        storages,
    ):
        yield storages


def parse(*flags: str) -> argparse.Namespace:
    required = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e", "--seed=0"]
    return trainer.parse_args([*required, "--instance_prompt=p", "--train_batch_size=1", *flags])


def sample_batch(args: argparse.Namespace, config: dict) -> dict[str, Tensor]:
    """A micro-batch as the data loader makes it, of pictures of the resolution and prompts of 154 tokens."""
    count, side = args.train_batch_size, args.resolution // 8
    shapes = {
        "latents": (count, 16, side, side), "noise": (count, 16, side, side), "mask": (count, 1, side, side),
        "sigma": (count,), "loss_weight": (count,),
    }  # fmt: skip
    batch = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    half = {"dtype": torch.float16, "device": "meta"}
    batch["prompt_embeds"] = torch.empty(count, 154, config["joint_attention_dim"], **half)
    return batch | {"pooled_prompt_embeds": torch.empty(count, config["pooled_projection_dim"], **half)}


def encode_pictures(args: argparse.Namespace, folder: Path) -> None:
    """The trainer's encoding of two pictures; the contents that meta tensors lack are put in at the end."""

    def encode(vae: nn.Module, *_: object) -> trainer.pa.RecordBatch:
        vae.encode(torch.empty(1, 3, args.resolution, args.resolution, device="meta")).latent_dist.mean.half()
        empty = [trainer.pa.array([], field.type) for field in trainer.LATENTS_SCHEMA]
        return trainer.pa.RecordBatch.from_arrays(empty, schema=trainer.LATENTS_SCHEMA)

    pictures = [folder / f"{number}.png" for number in range(2)]
    for picture in pictures:
        trainer.Image.new("RGB", (64, 64)).save(picture)
    with patch.object(trainer, "encode_image", encode), torch.no_grad():
        trainer.write_latents(folder / "latents.arrow", "key", pictures, args, torch.device("meta"))


def train_two_steps(args: argparse.Namespace, config: dict, precision: str) -> None:
    """Loading and two steps by the trainer's own functions: the optimizer's state is there in the second."""
    accelerator = types.SimpleNamespace(mixed_precision=precision, device=torch.device("meta"))
    run = trainer.load_run(args, accelerator, None, {"samples_per_step": 1})
    run.transformer.train()
    for _ in range(2):
        loss = trainer.training_loss(run.transformer, sample_batch(args, config), run.weight_dtype, args)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


def predicted_bytes(model: str, *flags: str, precision: str = "fp16") -> int:
    """Peak bytes of loading and training a model, weights included."""
    args, config = parse("--max_train_steps=2", *flags), MODELS[model]
    with models_on_meta(config) as storages:
        train_two_steps(args, config, precision)
    return storages.peak


def by_formula(model: str, *flags: str, itemsize: int = 2) -> float:
    """What --dry_run says about the same, with weights of so many bytes."""
    config = MODELS[model]
    return trainer.predicted_vram(parse(*flags), {"dual_attention_layers": ()} | config, 154, itemsize)


def main() -> None:
    print("| model | resolution | batch | checkpointing | predicted GiB | --dry_run |\n|---|---|---|---|---|---|")
    for model, resolution, batch, checkpointing in itertools.product(MODELS, (512, 1024), (1, 4), (True, False)):
        flags = [f"--resolution={resolution}", f"--train_batch_size={batch}"]
        flags += ["--gradient_checkpointing"] if checkpointing else []
        counted, formula = predicted_bytes(model, *flags), by_formula(model, *flags)
        row = model, resolution, batch, checkpointing, f"{counted / 2**30:.2f}", f"{formula / 2**30:.2f}"
        print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main()
