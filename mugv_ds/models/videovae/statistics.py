"""Mean and spread of a VideoVAE's latents, by which they are normalised.

Shape suffixes: B clips, C = 24 latent channels, T latent frames, h and w latent height and width.
"""

import torch
from torch import Tensor

from mugv_ds.config.errors import InputError


class LatentStatistics:
    """Sums up posteriors; gives the mean and the standard deviation of latents drawn from them, without drawing."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, mean_BCThw: Tensor, logvar_BCThw: Tensor) -> None:
        """Takes up the posteriors of some clips."""
        mean, variance = mean_BCThw.double(), logvar_BCThw.double().exp()
        self._count += mean[:, 0].numel()
        self._sum = self._sum + mean.sum(dim=(0, 2, 3, 4))
        self._squares = self._squares + (mean.square() + variance).sum(dim=(0, 2, 3, 4))

    def shift_and_scale(self) -> tuple[Tensor, Tensor]:
        """Returns the buffers `shift` and `scale` of the VideoVAE, each fp32 [1, C, 1, 1, 1].

        Raises:
            InputError: there was nothing to sum up, or a channel is constant.
        """
        if not self._count:
            raise InputError("no clips to compute shift and scale of")
        mean = self._sum / self._count
        variance = self._squares / self._count - mean.square()
        if not (variance > 0).all() or not torch.isfinite(variance).all():
            raise InputError(
                f"channel {int(variance.argmin())} of the latents does not vary: latents cannot be normalised"
            )
        return tuple(value.float().view(1, -1, 1, 1, 1) for value in (mean, variance.sqrt()))
