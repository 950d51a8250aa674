"""The rectified-flow sampler with classifier-free guidance: text, or text and a first frame, to video."""

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
    """A video codec: [B, 3, F, H, W] in [−1, 1] ↔ [B, 24, F/8, H/8, W/8]."""

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latent: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """Texts → features [B, L, C] and mask bool [B, L]."""

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
    """Videos of the prompts, on the device of the model.

    Args:
        frames, height, width: of the videos; multiples of 8.
        fps: frames a second that the model is told.
        seed: a prompt's noise is keyed by (seed, prompt, draw), so it does not depend on the other prompts.
        draws: for each prompt, which of its draws to take; by default 0. Others give other videos of the same prompt.
        image: [3, height, width] in [−1, 1]: the first latent frame (8 frames) of every video shows it.
        steps, guidance, shift: see `sample_latents`.
    Returns:
        uint8 [B, frames, height, width, 3].
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
