"""The rectified-flow sampler with classifier-free guidance: from text, or text and a first frame, to latents.

It solves dx/dt backwards in time by Euler steps, with the timesteps and the shift of `objectives.flow`; `invert` goes
the other way, from latents to the noise that the sampler makes them of.

Shape suffixes: B batch, T latent frames, H and W latent height and width, L text tokens, C width of the text features.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_ds.objectives.flow import MAX_TIME, resolution_shift, sampling_times
from mugv_ds.parallel.guidance import GuidancePair

Model = Callable[..., Tensor]  # a `DiT`, or what is called as one: (x, timestep, text, text_mask, x_mask, fps)
ALL_TIMES = (0.0, float("inf"))
Velocity = Callable[[Tensor, Tensor], Tensor]  # (z [B, 24, T, H, W], t scalar) → dz/d(−t/1000), of z's shape


@torch.no_grad()
def sample_latents(
    model: Model,
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
    interval: tuple[float, float] = ALL_TIMES,
    pair: GuidancePair | None = None,
) -> Tensor:
    """Follows the flow from noise (t = 1000) to latents (t = 0).

    Args:
        model: predicts the velocity.
        noise, reference: [B, 24, T, H, W].
        frame_mask: [B, T]; False (or 0) keeps the reference's frame, clean, through all steps.
        text, text_mask: [B, L, C] and [B, L] of the prompts; negative_text, negative_mask likewise, of any length.
        fps: [B], frames a second.
        height, width: of the video in pixels, for the timestep shift.
        steps: number of Euler steps; each evaluates the model once, on a batch of 2·B.
        guidance, interval, pair: see `guided_velocity`.
        shift: the timestep shift r, see `objectives.flow.shift_time`; None for `resolution_shift`.
    Returns:
        [B, 24, T, H, W].
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
        interval=interval,
        pair=pair,
    )
    z_BCTHW = torch.where(noised[:, None, :, None, None], noise, reference)
    return euler(velocity, z_BCTHW, F.pad(sampling_times(steps, shift), (0, 1)))


def euler(velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
    """Takes Euler steps through `times` (falling, the end included): z += v · Δt/1000 with Δt > 0."""
    for t, following in pairwise(times.to(z.device)):
        z = z + velocity(z, t) * ((t - following) / MAX_TIME)
    return z


def invert(velocity: Velocity, z: Tensor, times: Tensor, corrections: int) -> Tensor:
    """Carries latents back to noise: undoes the steps of `euler`, the last one first.

    A step from time t to t − Δ took z' = z + v(z, t) · Δ/1000, so z = z' − v(z, t) · Δ/1000, which has z on both sides.
    DDIM inversion (Song et al. 2021, section 4.3) takes v(z', t) for v(z, t), an error of first order in Δ. That is
    where the fixed-point iteration starts (Pan et al. 2023, "Effective Real Image Editing with Accelerated Iterative
    Diffusion Inversion", section 3.1), each round of which makes the error smaller by about the step times the
    velocity's slope.

    Args:
        z: clean latents [B, 24, T, H, W]. times: those of `euler`, falling, the end included.
        corrections: rounds of the iteration; each step evaluates the model once, and once more for each round.
    """
    for following, t in pairwise(times.flip(0).to(z.device)):
        reached, step = z, (t - following) / MAX_TIME
        for _ in range(1 + corrections):
            z = reached - velocity(z, t) * step
    return z


def guided_velocity(
    model: Model,
    *,
    frame_mask: Tensor,
    text: Tensor,
    text_mask: Tensor,
    negative_text: Tensor,
    negative_mask: Tensor,
    fps: Tensor,
    guidance: float,
    interval: tuple[float, float] = ALL_TIMES,
    pair: GuidancePair | None = None,
) -> Velocity:
    """Returns the function v_negative + guidance · (v_text − v_negative), which is zero in frames given clean.

    This is classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is guidance − 1), with the negative prompt in
    place of no prompt. Both branches run as one batch of the model, or on two ranks.

    Args:
        interval: (from, to) in timesteps; outside of it the velocity is v_text alone (Kynkäänniemi et al. 2024), for
            which one rank does not compute the negative prompt. So it is at all times where guidance is 1.
        pair: this rank's part of two that compute one branch each; None if it computes both. The model then gets
            this rank's text alone at all times, so that what is kept of a text (`models.reuse`) is that text's.
        The other arguments are those of `sample_latents`; `frame_mask` is bool.
    """
    length = max(text.shape[1], negative_text.shape[1])
    texts = torch.stack([_lengthen(text, length), _lengthen(negative_text, length)])  # [2, B, L, C]
    masks = torch.stack([_lengthen(text_mask.bool(), length), _lengthen(negative_mask.bool(), length)])

    def branches(z: Tensor, t: Tensor, which: slice) -> Tensor:
        """Runs the branches of the slice as one batch: [branches, B, C, T, H, W]."""
        count = len(texts[which])
        batch = (texts[which].flatten(0, 1), masks[which].flatten(0, 1), frame_mask.repeat(count, 1), fps.repeat(count))
        out = model(z.repeat(count, 1, 1, 1, 1), t.expand(count * len(z)), *batch)
        return out[:, : z.shape[1]].unflatten(0, (count, len(z)))

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        is_guided = guidance != 1 and bool(interval[0] <= t <= interval[1])
        if pair is not None:
            both = pair.exchange(branches(z, t, slice(pair.branch, pair.branch + 1))[0])
        else:
            both = branches(z, t, slice(0, 2 if is_guided else 1))
        guided = _guide(*both, guidance) if is_guided else both[0]
        return (guided * frame_mask[:, None, :, None, None]).to(z.dtype)

    return velocity


def _guide(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    return negative + guidance * (positive - negative)


def _lengthen(text: Tensor, length: int) -> Tensor:
    """Appends zeros (False) to [B, L, …] along L, up to `length`."""
    return F.pad(text, (0, 0) * (text.dim() - 2) + (0, length - text.shape[1]))
