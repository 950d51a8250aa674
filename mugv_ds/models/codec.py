"""A linear video codec with the VideoVAE's interface, fitted in seconds: for demos and tests that need no download."""

from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from safetensors.torch import load, save_file
from torch import Tensor, nn

from mugv_ds.config.model import LATENT_CHANNELS as CHANNELS
from mugv_ds.config.model import LATENT_STRIDE as BLOCK
from mugv_ds.config.regular_file import read_bytes_file

_BLOCK_PIXELS = 3 * BLOCK**3
_MAX_BYTES = 1 << 20  # the buffers take 154 KB
_RANK_TOLERANCE = 1e-10  # of the largest variance; rounding in fp64 leaves about 1e-15


class LinearCodec(nn.Module):
    """Whitened principal components of 8×8×8 blocks: latent = basis · (block − mean) / scale.

    Every channel has unit variance over the videos it was fitted on. With one scale for all channels, which would keep
    the metric of pixels, most channels lie far below the noise that flow matching adds, and samples come out noisier.

    Buffers: mean [1536], basis [24, 1536] with orthonormal rows, scale [24].
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(_BLOCK_PIXELS))
        self.register_buffer("basis", torch.eye(CHANNELS, _BLOCK_PIXELS))
        self.register_buffer("scale", torch.ones(CHANNELS))

    @classmethod
    def fit(cls, videos: Tensor) -> Self:
        """Fits the codec to videos [B, 3, F, H, W] in [−1, 1].

        Raises:
            ValueError: F, H or W is no multiple of 8, or the videos' blocks vary in fewer than 24 directions.
        """
        blocks = rearrange(_to_blocks(videos), "b t h w p -> (b t h w) p").double()
        variances, vectors = torch.linalg.eigh(torch.cov(blocks.T, correction=0))  # ascending
        variances, vectors = variances[-CHANNELS:].flip(0), vectors[:, -CHANNELS:].flip(1)
        if variances[-1] <= _RANK_TOLERANCE * variances[0]:
            raise ValueError(
                f"the 8×8×8 blocks of the videos vary in fewer than {CHANNELS} directions: give more videos"
            )
        codec = cls()
        codec.mean.copy_(blocks.mean(dim=0))
        codec.basis.copy_(vectors.T)
        codec.scale.copy_(variances.sqrt())
        return codec

    def encode(self, video: Tensor) -> Tensor:
        """Pixels [B, 3, F, H, W] in [−1, 1] → latents [B, 24, F/8, H/8, W/8].

        Raises:
            ValueError: F, H or W is no multiple of 8.
        """
        latent = (_to_blocks(video) - self.mean) @ self.basis.T / self.scale
        return rearrange(latent, "b t h w c -> b c t h w")

    def decode(self, latent: Tensor) -> Tensor:
        """Latents [B, 24, T, h, w] → pixels [B, 3, 8T, 8h, 8w], about [−1, 1] and not clamped."""
        blocks = rearrange(latent, "b c t h w -> b t h w c") * self.scale @ self.basis + self.mean
        return rearrange(blocks, "b t h w (c p q r) -> b c (t p) (h q) (w r)", c=3, p=BLOCK, q=BLOCK, r=BLOCK)

    def save(self, path: str | Path) -> None:
        """Writes the buffers as safetensors."""
        save_file(self.state_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a codec that `save` wrote.

        Raises:
            InputError: it is no regular file, or larger than a codec. SafetensorError, RuntimeError: it is none.
            OSError: it is missing, or the file system failed.
        """
        codec = cls()
        codec.load_state_dict(load(read_bytes_file(path, _MAX_BYTES)))
        return codec


def _to_blocks(video: Tensor) -> Tensor:
    """[B, 3, F, H, W] → [B, F/8, H/8, W/8, 1536]."""
    if video.ndim != 5 or video.shape[1] != 3 or any(size % BLOCK for size in video.shape[2:]):
        raise ValueError(f"video must be [B, 3, F, H, W] with F, H, W multiples of {BLOCK}, got {list(video.shape)}")
    return rearrange(video, "b c (t p) (h q) (w r) -> b t h w (c p q r)", p=BLOCK, q=BLOCK, r=BLOCK)
