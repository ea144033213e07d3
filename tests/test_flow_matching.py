"""The objective: rectified flow, its weightings, and how it relates to the reference's loss."""

from argparse import Namespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor, nn

import train_dreambooth_sd3_lora_miniature as trainer

SCHEMES = ["logit_normal", "sigma_sqrt", "mode", "cosmap", "none"]
SIGMAS = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas


def batch(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(count, 16, 4, 4, generator=generator) for _ in range(2))
    sigma = SIGMAS[torch.randint(len(SIGMAS), (count,), generator=generator)]
    return {
        "latents": latents, "noise": noise, "sigma": sigma, "mask": torch.ones(count, 1, 4, 4),
        "prompt_embeds": torch.zeros(count, 5, 8), "pooled_prompt_embeds": torch.zeros(count, 8),
        "loss_weight": torch.ones(count),
    }  # fmt: skip


def loss(velocity_pred: Tensor, one: dict[str, Tensor], scheme: str = "none", precondition: bool = False) -> Tensor:
    sigmas = one["sigma"].view(-1, 1, 1, 1)
    error = velocity_pred.float() - (one["noise"] - one["latents"])
    return trainer.flow_matching_loss(error, sigmas, one["mask"], scheme, precondition)


class Recorder(nn.Module):
    """Stands where the transformer does: keeps what it is given, and predicts 0 or what it is told."""

    def __init__(self, velocity: Tensor | None = None) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, **inputs: Tensor) -> Namespace:
        self.inputs = inputs
        return Namespace(sample=torch.zeros_like(inputs["hidden_states"]) if self.velocity is None else self.velocity)


def args(*flags: str) -> Namespace:
    required = ("pretrained_model_name_or_path", "instance_data_dir", "data_df_path", "instance_prompt")
    return trainer.parse_args([*(f"--{name}=x" for name in required), *flags])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("precondition", [0, 1])
def test_a_perfect_prediction_has_no_loss(scheme: str, precondition: int) -> None:
    """The target is noise - latents."""
    one = batch()
    flags = args(f"--weighting_scheme={scheme}", f"--precondition_outputs={precondition}")
    assert trainer.training_loss(Recorder(one["noise"] - one["latents"]), one, torch.float32, flags) == 0
    assert trainer.training_loss(Recorder(), one, torch.float32, flags) > 0


def test_unweighted_it_is_the_mean_squared_error_of_each_sample() -> None:
    """(B,), not yet averaged over the batch."""
    one, velocity_pred = batch(), torch.zeros(3, 16, 4, 4)
    expected = torch.stack([((n - x) ** 2).mean() for x, n in zip(one["latents"], one["noise"], strict=True)])
    assert torch.allclose(loss(velocity_pred, one), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_preconditioned_it_is_the_references_loss(scheme: str) -> None:
    """The reference compares x0 = noisy - sigma * prediction with the latents: sigma² times the velocity's error."""
    one, velocity_pred = batch(), torch.randn(3, 16, 4, 4)
    sigmas = one["sigma"].view(-1, 1, 1, 1)
    noisy = sigmas * one["noise"] + (1 - sigmas) * one["latents"]
    weighting = compute_loss_weighting_for_sd3(scheme, sigmas)
    reference = (weighting * (velocity_pred * -sigmas + noisy - one["latents"]) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(loss(velocity_pred, one, scheme, precondition=True), reference, rtol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weighting_is_finite_at_every_noise_level(scheme: str) -> None:
    """Also for a prediction in fp16: in the reference's fp16 sigmas, sigma_sqrt was infinite."""
    count = len(SIGMAS)
    one = {"latents": torch.zeros(count, 16, 2, 2), "noise": torch.ones(count, 16, 2, 2), "sigma": SIGMAS}
    one["mask"] = torch.ones(count, 1, 2, 2)
    losses = loss(torch.zeros(count, 16, 2, 2, dtype=torch.float16), one, scheme)
    assert torch.isfinite(losses).all() and (losses > 0).all()


def test_the_mask_takes_away_what_it_covers() -> None:
    """Errors where the mask is 0 do not count, but the mean is over all pixels: a small subject counts less."""
    one = batch()
    one["mask"][:, :, :2] = 0
    velocity = one["noise"] - one["latents"]
    wrong_above, wrong_below = velocity.clone(), velocity.clone()
    wrong_above[:, :, :2] += 1
    wrong_below[:, :, 2:] += 1
    assert torch.equal(loss(wrong_above, one), torch.zeros(3))
    assert torch.allclose(loss(wrong_below, one), torch.full((3,), 0.5))


def test_the_transformer_sees_the_mix_at_its_time() -> None:
    """noisy = (1 - sigma) latents + sigma noise, at 1000 sigma, in the weights' dtype."""
    one, model = batch(), Recorder()
    trainer.training_loss(model, one, torch.bfloat16, args())
    sigmas = one["sigma"].view(-1, 1, 1, 1)
    noisy = ((1 - sigmas) * one["latents"] + sigmas * one["noise"]).bfloat16()
    assert torch.equal(model.inputs["hidden_states"], noisy)
    assert torch.equal(model.inputs["timestep"], 1000 * one["sigma"])
    assert model.inputs["encoder_hidden_states"].dtype == model.inputs["pooled_projections"].dtype == torch.bfloat16


def test_samples_are_weighted() -> None:
    """loss_weight multiplies a sample's share of the batch's mean."""
    one, model = batch(), Recorder()
    one["loss_weight"] = torch.tensor([1.0, 0.0, 0.5])
    each = loss(torch.zeros(3, 16, 4, 4), one, "logit_normal")
    total = trainer.training_loss(model, one, torch.float32, args())
    assert torch.allclose(total, (each[0] + 0.5 * each[2]) / 3)
