"""The stages of sampling, of which each needs one model alone: text features, first frames, latents, pixels.

Shape suffixes: B batch, F video frames, T latent frames, H and W video height and width, h = H/8 and w = W/8, L text
tokens, C width of the text features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_STRIDE
from mugv_ds.data.noise import gaussian
from mugv_ds.data.video import read_image, to_frames
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.parallel.guidance import GuidancePair
from mugv_ds.sampling.jobs import Job
from mugv_ds.sampling.sampler import ALL_TIMES, Model, sample_latents
from mugv_ds.sampling.settings import SamplingSettings


class Codec(Protocol):
    """A video codec: pixels [B, 3, F, 8h, 8w] in [−1, 1] ↔ latents [B, 24, F/8, h, w]."""

    def encode(self, video: Tensor) -> Tensor: ...

    def decode_windows(self, latent: Tensor) -> Iterator[Tensor]: ...


class TextEncoder(Protocol):
    """A text encoder: texts → features [B, L, C], and their mask bool [B, L], True on tokens of the text."""

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class FirstFrame:
    """An image that videos start with: pixels [3, H, W] in [−1, 1], and its latent [24, 1, h, w], both on the CPU."""

    pixels: Tensor
    latent: Tensor

    @property
    def image(self) -> np.ndarray:
        """Returns the pixels as uint8 RGB [H, W, 3]."""
        return to_frames(self.pixels[None, :, None])[0, 0].numpy()


def read_first_frame(path: Path, settings: SamplingSettings) -> Tensor:
    """Returns the pixels [3, H, W] in [−1, 1] of an image, scaled and cropped to the videos' size.

    Raises:
        InputError: the image cannot be used.
    """
    try:
        return read_image(path, settings.height, settings.width)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


@torch.no_grad()
def encode_first_frame(codec: Codec, pixels: Tensor, device: torch.device) -> FirstFrame:
    """Encodes an image [3, H, W] in [−1, 1] as the eight frames that a latent frame stands for."""
    still_131HW = pixels[None, :, None].to(device)
    if isinstance(codec, VideoVAE):  # repeats a lone frame by itself, which may be bright all over
        latent_1C1hw = codec.encode(still_131HW, allow_nonnegative=True)
    else:
        latent_1C1hw = codec.encode(still_131HW.expand(-1, -1, LATENT_STRIDE, -1, -1))
    return FirstFrame(pixels, latent_1C1hw[0].float().cpu())


def denoise(
    model: Model,
    jobs: Sequence[Job],
    settings: SamplingSettings,
    texts: Mapping[str, Tensor],
    first_frames: Mapping[Path, FirstFrame],
    *,
    device: torch.device,
    pair: GuidancePair | None = None,
) -> list[Tensor]:
    """Samples the latents [24, T, h, w] of some videos in one batch; on the CPU.

    Args:
        model: predicts the velocity.
        texts: features [L, C] of every prompt with its suffix, and of the negative prompt.
        first_frames: by the path of the image.
        device: of the model. pair: see `guided_velocity`.
    """
    shape = settings.latent_shape
    noise = torch.stack([gaussian(job.seed, job.prompt, job.draw, shape) for job in jobs])
    reference, frame_mask = torch.zeros_like(noise), torch.ones(len(jobs), shape[1], dtype=torch.bool)
    for row, job in enumerate(jobs):
        if job.image is not None:
            reference[row, :, :1], frame_mask[row, 0] = first_frames[job.image].latent, False
    text, text_mask = _padded([texts[job.prompt + settings.prompt_suffix] for job in jobs])
    negative_text, negative_mask = _padded([texts[settings.negative_prompt]] * len(jobs))
    given = {
        "noise": noise,
        "reference": reference,
        "frame_mask": frame_mask,
        "text": text,
        "text_mask": text_mask,
        "negative_text": negative_text,
        "negative_mask": negative_mask,
        "fps": torch.full((len(jobs),), settings.fps),
    }
    latents = sample_latents(
        model,
        **{name: value.to(device) for name, value in given.items()},
        height=settings.height,
        width=settings.width,
        steps=settings.steps,
        guidance=settings.guidance,
        shift=settings.shift,
        interval=settings.guidance_interval or ALL_TIMES,
        pair=pair,
    )
    return list(latents.cpu())


@torch.no_grad()
def video_parts(
    decode: Callable[[Tensor], Iterator[Tensor]], latent: Tensor, *, still_first: bool, image: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Yields a video's frames as they are decoded, uint8 RGB [F, H, W, 3] each.

    Args:
        decode: yields the pixels [1, 3, F, H, W] of latents [1, 24, T, h, w] window by window.
        latent: [24, T, h, w].
        still_first: whether the first frame has a latent of its own, see `SamplingSettings.still_first`.
        image: uint8 RGB [H, W, 3], the first frame. With `still_first` the video begins with it, and its latent is not
            decoded, as in the published sampler.

    Raises:
        InputError: a pixel is not finite.
    """
    dropped = LATENT_STRIDE - 1 if still_first else 0  # that first latent frame stands for eight copies
    if still_first and image is not None:
        yield image[None]
        dropped, latent = 0, latent[:, 1:]
        if not latent.shape[1]:
            return
    for video_13FHW in decode(latent[None]):
        if not video_13FHW.isfinite().all():
            raise InputError("the codec made pixels that are not finite: its weights are damaged, or overflow in bf16")
        yield to_frames(video_13FHW)[0, dropped:].cpu().numpy()
        dropped = 0


def _padded(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pads features [L, C] to the longest: [B, L, C], and their mask bool [B, L]."""
    lengths = torch.tensor([len(feature) for feature in features])
    mask_BL = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(features), batch_first=True), mask_BL
