"""Rectified flow (Liu et al. 2022; timestep shift: Esser et al. 2024, eq. 23).

t ∈ [0, 1000], 1000 is pure noise: x_t = (1 − t/1000)·x0 + (t/1000)·ε, and the model predicts v = x0 − ε.
"""

import torch
from torch import Tensor

MAX_TIME = 1000.0


def resolution_shift(height: float, width: float, frames: int) -> float:
    """r = sqrt(height·width / 512²)·sqrt(frames), pixels and latent frames: large videos train nearer to noise."""
    return (height * width / 512**2) ** 0.5 * frames**0.5


def shift_time(u: Tensor, shift: Tensor | float) -> Tensor:
    """u' = r·u / (1 + (r−1)·u), of u in [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)


def draw_time(normal: Tensor, shift: Tensor | float) -> Tensor:
    """Training timesteps in (0, 1000) from standard normal numbers: the sigmoid, then the shift."""
    return MAX_TIME * shift_time(normal.sigmoid(), shift)


def sampling_times(steps: int, shift: float) -> Tensor:
    """The sampler's timesteps [steps], from 1000 downwards: evenly spaced, then shifted."""
    return MAX_TIME * shift_time(torch.linspace(1, 0, steps + 1)[:-1], shift)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B, …] of the clean x0 and noise ε [B, …] at the timesteps t [B]."""
    share = (t / MAX_TIME).view(-1, *[1] * (x0.dim() - 1))
    return (1 - share) * x0 + share * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model predicts: v = x0 − ε."""
    return x0 - noise


def loss_weight(x_mask: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[B, 1, T, H, W]: 1/(channels·H·W·noised frames) where the frame is noised, 0 where it is given clean.

    With these weights the sum of squared errors of a sample is its flow loss.

    Raises:
        ValueError: a sample has no noised frame.
    """
    noised = x_mask.sum(dim=1, keepdim=True)
    if not noised.all():
        raise ValueError("x_mask: a sample has no noised frame, so it has no loss")
    weight = x_mask / (channels * height * width * noised)
    return weight[:, None, :, None, None].expand(-1, 1, -1, height, width)


def weighted_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Per sample Σ weight·(prediction − target)², [B].

    Args:
        prediction, target: [B, …] of one shape. weight: broadcasts to it; see `loss_weight`.
    The sum is linear in the elements: over a part of them it is that part's share of the loss.
    """
    return (weight * (prediction - target).square()).flatten(1).sum(dim=1)


def flow_loss(prediction: Tensor, target: Tensor, x_mask: Tensor) -> Tensor:
    """Per-sample loss [B]: mean squared error of the velocity over the channels and pixels of noised frames.

    Args:
        prediction: [B, ≥C, T, H, W]; channels beyond the target's are not used.
        target: [B, C, T, H, W], see `velocity`. x_mask: bool [B, T], False for frames given clean.
    """
    channels, _, height, width = target.shape[1:]
    return weighted_error(prediction[:, :channels], target, loss_weight(x_mask, channels, height, width))


def loss_by_quartile(loss: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Sum of the losses [B] and number of samples in each quarter of [0, 1000], keyed "loss_q0", "count_q0", …"""
    quartile = (t / (MAX_TIME / 4)).long().clamp(0, 3)
    terms = {}
    for q in range(4):
        terms[f"loss_q{q}"] = loss.detach()[quartile == q].sum()
        terms[f"count_q{q}"] = (quartile == q).sum().to(loss.dtype)
    return terms
