"""The rectified-flow sampler with classifier-free guidance: text, or text and a first frame, to a latent video."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_ds.models.dit import DiT
from mugv_ds.objectives.flow import MAX_TIME, resolution_shift, sampling_times

Velocity = Callable[[Tensor, Tensor], Tensor]  # (z [B, 24, T, H, W], t scalar) → dz/d(−t/1000), of z's shape


@torch.no_grad()
def sample_latents(
    model: DiT,
    *,
    noise: Tensor,
    reference: Tensor,
    frame_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    negative_text: Tensor,
    negative_mask: Tensor,
    fps: Tensor,
    height: float,
    width: float,
    steps: int = 25,
    guidance: float = 4.0,
    shift: float | None = None,
) -> Tensor:
    """Follows the flow from noise to a latent.

    Args:
        model: predicts the velocity.
        noise, reference: [B, 24, T, H, W].
        frame_mask: [B, T]; False (or 0) keeps the reference's frame, clean, through all steps.
        text, text_mask: [B, L, C] and [B, L] of the prompts; negative_text, negative_mask likewise, of any length.
        fps: [B] frames a second.
        height, width: pixels, for the timestep shift.
        steps: evaluations of the model.
        guidance: see `guided_velocity`.
        shift: the timestep shift; None is that of the resolution.
    Returns:
        The latent [B, 24, T, H, W].
    """
    noised = frame_mask.bool()
    if shift is None:
        shift = resolution_shift(height, width, noise.shape[2])
    velocity = guided_velocity(
        model,
        frame_mask=noised,
        text=text,
        text_mask=text_mask,
        negative_text=negative_text,
        negative_mask=negative_mask,
        fps=fps,
        guidance=guidance,
    )
    z = torch.where(noised[:, None, :, None, None], noise, reference)
    return euler(velocity, z, F.pad(sampling_times(steps, shift), (0, 1)))


def euler(velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
    """Euler steps through `times` (falling, the end included): z += v·Δt/1000."""
    for t, following in pairwise(times.to(z.device)):
        z = z + velocity(z, t) * ((t - following) / MAX_TIME)
    return z


def guided_velocity(
    model: DiT,
    *,
    frame_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    negative_text: Tensor,
    negative_mask: Tensor,
    fps: Tensor,
    guidance: float,
) -> Velocity:
    """v_negative + guidance·(v_text − v_negative) (Ho & Salimans 2022), and zero in frames given clean.

    Arguments as for `sample_latents`; `frame_mask` is bool. Both branches run as one batch of the model.
    """
    length = max(text.shape[1], negative_text.shape[1])
    texts = torch.cat([_lengthen(text, length), _lengthen(negative_text, length)])
    masks = torch.cat([_lengthen(text_mask.bool(), length), _lengthen(negative_mask.bool(), length)])
    x_mask, rates = frame_mask.repeat(2, 1), fps.repeat(2)

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        out = model(z.repeat(2, 1, 1, 1, 1), t.expand(len(rates)), texts, masks, x_mask, rates)
        positive, negative = out[:, : z.shape[1]].chunk(2)
        guided = negative + guidance * (positive - negative)
        return (guided * frame_mask[:, None, :, None, None]).to(z.dtype)

    return velocity


def _lengthen(text: Tensor, length: int) -> Tensor:
    """[B, L, …] with zeros (False) appended along L."""
    return F.pad(text, (0, 0) * (text.dim() - 2) + (0, length - text.shape[1]))
