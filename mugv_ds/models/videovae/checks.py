"""What the VideoVAE takes: checks of pixels and latents, each refused with what to do about it.

Shape suffixes: B clips, F video frames, H and W video height and width, T latent frames, h and w latent height and
width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS, LATENT_STRIDE

_PIXEL_DTYPES = (torch.float32, torch.bfloat16)
_LARGEST_PIXEL = 2.0  # a resampled or reconstructed video goes a little beyond 1; one in [0, 255] far


@dataclass(frozen=True)
class PixelRange:
    """The smallest and the largest pixel of each clip so far, [B] each; None before the first frame."""

    low: Tensor | None = None
    high: Tensor | None = None

    def join(self, other: "PixelRange") -> "PixelRange":
        """Returns the range of both."""
        if self.low is None:
            return other
        if other.low.shape != self.low.shape:
            raise InputError(f"{len(other.low)} clips after chunks of {len(self.low)}: a stream keeps its batch size")
        return PixelRange(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def refuse_nonnegative(self) -> None:
        """Refuses clips that look as if their pixels were in [0, 1]. A clip of one value may be any.

        Raises:
            InputError: a clip that is not constant has no pixel below 0.
        """
        suspect = ((self.low >= 0) & (self.high > self.low)).nonzero().flatten().tolist()
        if suspect:
            raise InputError(
                f"clip {suspect[0]} has no pixel below 0 ({self.low[suspect[0]]:.3g} to {self.high[suspect[0]]:.3g}): "
                "it looks like [0, 1] and must be in [−1, 1]; give 2·x − 1, or allow_nonnegative=True if it is meant"
            )


def check_video(video: Tensor, *, any_size: bool, allow_nonnegative: bool) -> None:
    """Checks a whole video [B, 3, F, H, W]; see `VideoVAE.posterior`. F is checked by `chunk_units`.

    Raises:
        InputError: it cannot be encoded.
    """
    seen = check_pixels(video, any_size=any_size)
    if not allow_nonnegative:
        seen.refuse_nonnegative()


def check_pixels(video: Tensor, *, any_size: bool) -> PixelRange:
    """Checks some frames [B, 3, F, H, W], and returns their range.

    Raises:
        InputError: shape or dtype are others, a side is no multiple of 8 (below 8 with `any_size`), or a pixel is not
            finite or far beyond [−1, 1].
    """
    shape = list(video.shape)
    if video.ndim != 5 or shape[1] != 3 or 0 in shape:
        raise InputError(f"a video of shape {shape}: must be [B, 3, F, H, W], with 3 channels (RGB) and none empty")
    if video.dtype not in _PIXEL_DTYPES:
        raise InputError(f"a video in {video.dtype}: must be float32 or bfloat16, in [−1, 1]; uint8 is x / 127.5 − 1")
    height, width = shape[3:]
    if min(height, width) < LATENT_STRIDE or (not any_size and (height % LATENT_STRIDE or width % LATENT_STRIDE)):
        floored = [max(side // LATENT_STRIDE, 1) * LATENT_STRIDE for side in (height, width)]
        raise InputError(
            f"a video of {height}×{width} pixels: height and width must be multiples of {LATENT_STRIDE}; crop or "
            f"resize it, to {floored[0]}×{floored[1]} for example"
        )
    low, high = video.detach().float().flatten(1).aminmax(dim=1)
    if not (low.isfinite() & high.isfinite()).all():
        raise InputError("a video with pixels that are not finite: find out where they come from; the clip is unusable")
    if max(-low.min(), high.max()) > _LARGEST_PIXEL:
        raise InputError(f"a video with pixels from {low.min():.3g} to {high.max():.3g}: must be in [−1, 1]")
    return PixelRange(low, high)


def check_latent(latent: Tensor) -> None:
    """Checks a normalised latent [B, 24, T, h, w].

    Raises:
        InputError: it is no floating tensor of that shape, or not finite.
    """
    shape = list(latent.shape)
    if latent.ndim != 5 or shape[1] != LATENT_CHANNELS or 0 in shape or not latent.is_floating_point():
        raise InputError(
            f"a latent of shape {shape} in {latent.dtype}: must be floating, [B, {LATENT_CHANNELS}, T, h, w], and not "
            "empty"
        )
    if not latent.isfinite().all():
        raise InputError("a latent that is not finite: it cannot be decoded; look at the model that made it")
