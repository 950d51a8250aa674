"""A linear video codec with the VideoVAE's interface, fitted in seconds, for demos and tests without a download.

Shape suffixes: B batch, C = 24 latent channels, F video frames, T = F/8 latent frames, H and W video height and width,
h = H/8 and w = W/8 latent height and width, P = 3·8·8·8 = 1536 values of a block.
"""

from collections.abc import Iterator
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
    """Encodes each 8×8×8 block of pixels by its whitened principal components: latent = basis · (block − mean) / scale.

    Every channel has unit variance over the videos it was fitted on. With one scale for all channels, which would keep
    the metric of pixels, most channels would lie far below the noise that flow matching adds, and samples would come
    out noisier.

    Attributes:
        mean: buffer [1536].
        basis: buffer [24, 1536] with orthonormal rows.
        scale: buffer [24], the standard deviations.
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
        blocks_NP = rearrange(_to_blocks(videos), "b t h w p -> (b t h w) p").double()
        variances, vectors = torch.linalg.eigh(torch.cov(blocks_NP.T, correction=0))  # ascending
        variance_C, vectors_PC = variances[-CHANNELS:].flip(0), vectors[:, -CHANNELS:].flip(1)
        if variance_C[-1] <= _RANK_TOLERANCE * variance_C[0]:
            raise ValueError(
                f"the 8×8×8 blocks of the videos vary in fewer than {CHANNELS} directions: give more videos"
            )
        codec = cls()
        codec.mean.copy_(blocks_NP.mean(dim=0))
        codec.basis.copy_(vectors_PC.T)
        codec.scale.copy_(variance_C.sqrt())
        return codec

    def encode(self, video: Tensor) -> Tensor:
        """Encodes pixels [B, 3, F, H, W] in [−1, 1] as latents [B, 24, F/8, H/8, W/8].

        Raises:
            ValueError: F, H or W is no multiple of 8.
        """
        latent_BThwC = (_to_blocks(video) - self.mean) @ self.basis.T / self.scale
        return rearrange(latent_BThwC, "b t h w c -> b c t h w")

    def decode(self, latent: Tensor) -> Tensor:
        """Decodes latents [B, 24, T, h, w] to pixels [B, 3, 8T, 8h, 8w], about in [−1, 1] and not clamped."""
        blocks_BThwP = rearrange(latent, "b c t h w -> b t h w c") * self.scale @ self.basis + self.mean
        return rearrange(blocks_BThwP, "b t h w (c p q r) -> b c (t p) (h q) (w r)", c=3, p=BLOCK, q=BLOCK, r=BLOCK)

    def decode_windows(self, latent: Tensor) -> Iterator[Tensor]:
        """Yields what `decode` returns in one piece, in the way of `VideoVAE.decode_windows`."""
        yield self.decode(latent)

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
    """Cuts a video [B, 3, F, H, W] into blocks [B, F/8, H/8, W/8, 1536]."""
    if video.ndim != 5 or video.shape[1] != 3 or any(size % BLOCK for size in video.shape[2:]):
        raise ValueError(f"video must be [B, 3, F, H, W] with F, H, W multiples of {BLOCK}, got {list(video.shape)}")
    return rearrange(video, "b c (t p) (h q) (w r) -> b t h w (c p q r)", p=BLOCK, q=BLOCK, r=BLOCK)
