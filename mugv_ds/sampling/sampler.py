"""The rectified-flow sampler with classifier-free guidance: from text, or text and a first frame, to video.

It solves dx/dt backwards in time by Euler steps, with the timesteps and the shift of `objectives.flow`.

Shape suffixes: B batch, F video frames, T = F/8 latent frames, H and W latent height and width, L text tokens, C width
of the text features.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_ds.config.model import LATENT_STRIDE as STRIDE
from mugv_ds.data.noise import gaussian
from mugv_ds.data.video import to_frames
from mugv_ds.models.dit import DiT
from mugv_ds.models.text import NEGATIVE_PROMPT, PROMPT_SUFFIX
from mugv_ds.objectives.flow import MAX_TIME, resolution_shift, sampling_times

Model = Callable[..., Tensor]  # a `DiT`, or what is called as one: (x, timestep, text, text_mask, x_mask, fps)
Velocity = Callable[[Tensor, Tensor], Tensor]  # (z [B, 24, T, H, W], t scalar) → dz/d(−t/1000), of z's shape


class Codec(Protocol):
    """A video codec: pixels [B, 3, F, 8H, 8W] in [−1, 1] ↔ latents [B, 24, F/8, H, W]."""

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latent: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """A text encoder: texts → features [B, L, C], and their mask bool [B, L], True on tokens of the text."""

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def sample_videos(
    model: DiT,
    codec: Codec,
    encoder: TextEncoder,
    prompts: Sequence[str],
    *,
    frames: int,
    height: int,
    width: int,
    fps: float,
    seed: int,
    draws: Sequence[int] | None = None,
    image: Tensor | None = None,
    steps: int = 25,
    guidance: float = 4.0,
    shift: float | None = None,
) -> Tensor:
    """Samples videos of the prompts, on the device of the model.

    Args:
        model: predicts the velocity.
        codec: encodes the image and decodes the latents.
        encoder: encodes the prompts, to which the published suffix is appended, and the negative prompt.
        prompts: one a video.
        frames, height, width: of the videos, in pixels; multiples of 8.
        fps: frames a second, which the model is told.
        seed: a prompt's noise is keyed by (seed, prompt, draw), so it does not depend on the other prompts.
        draws: for each prompt, which of its draws to take; by default 0. Others give other videos of the same prompt.
        image: [3, height, width] in [−1, 1], which the first latent frame (8 frames) of every video shows.
        steps, guidance, shift: see `sample_latents`.
    Returns:
        uint8 RGB [B, frames, height, width, 3].
    Raises:
        ValueError: a size is no multiple of 8, the image has another size, or there is not one draw for each prompt.
    """
    if any(size < STRIDE or size % STRIDE for size in (frames, height, width)):
        raise ValueError(f"frames {frames}, height {height}, width {width}: must be multiples of {STRIDE}")
    device = model.start_token.device
    shape = (model.config.in_channels, frames // STRIDE, height // STRIDE, width // STRIDE)
    keys = zip(prompts, draws or [0] * len(prompts), strict=True)
    noise = torch.stack([gaussian(seed, prompt, draw, shape) for prompt, draw in keys]).to(device)
    reference, frame_mask = torch.zeros_like(noise), torch.ones(len(prompts), shape[1], dtype=torch.bool, device=device)
    if image is not None:
        if image.shape != (3, height, width):
            raise ValueError(f"the image is {list(image.shape)}, the videos take [3, {height}, {width}]")
        still = image[None, :, None].expand(-1, -1, STRIDE, -1, -1).to(device)
        reference[:, :, :1], frame_mask[:, 0] = codec.encode(still), False
    text, text_mask = encoder([prompt + PROMPT_SUFFIX for prompt in prompts])
    negative_text, negative_mask = encoder([NEGATIVE_PROMPT] * len(prompts))
    latents = sample_latents(
        model,
        noise=noise,
        reference=reference,
        frame_mask=frame_mask,
        text=text.to(device),
        text_mask=text_mask.to(device),
        negative_text=negative_text.to(device),
        negative_mask=negative_mask.to(device),
        fps=torch.full((len(prompts),), fps, device=device),
        height=height,
        width=width,
        steps=steps,
        guidance=guidance,
        shift=shift,
    )
    return to_frames(codec.decode(latents))


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
        guidance: see `guided_velocity`.
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
    )
    z_BCTHW = torch.where(noised[:, None, :, None, None], noise, reference)
    return euler(velocity, z_BCTHW, F.pad(sampling_times(steps, shift), (0, 1)))


def euler(velocity: Velocity, z: Tensor, times: Tensor) -> Tensor:
    """Takes Euler steps through `times` (falling, the end included): z += v · Δt/1000 with Δt > 0."""
    for t, following in pairwise(times.to(z.device)):
        z = z + velocity(z, t) * ((t - following) / MAX_TIME)
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
) -> Velocity:
    """Returns the function v_negative + guidance · (v_text − v_negative), which is zero in frames given clean.

    This is classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is guidance − 1), with the negative prompt in
    place of no prompt. Both branches run as one batch of the model. The arguments are those of `sample_latents`;
    `frame_mask` is bool.
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
    """Appends zeros (False) to [B, L, …] along L, up to `length`."""
    return F.pad(text, (0, 0) * (text.dim() - 2) + (0, length - text.shape[1]))
