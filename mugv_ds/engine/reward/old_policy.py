"""The policy that rolls out and that the loss compares with: it follows the trained one from round to round."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mugv_ds.engine.ema import exchanged

_KIND = "old_policy"  # of tensors, in checkpoints


class OldPolicy:
    """A moving average of fp32 tensors, those that this rank owns of what is trained; with adapters, of them alone.

    Args:
        tensors: what is trained; they are updated in place elsewhere.
        decay, decay_max: η and its bound, see `config.post_training_schema.RewardSection`.

    Attributes:
        kinds: the average by its kind, parallel to `tensors`, for checkpoints; at first a copy of them.
    """

    def __init__(self, tensors: Sequence[Tensor], decay: float, decay_max: float) -> None:
        self._tensors, self._decay, self._decay_max = [tensor.detach() for tensor in tensors], decay, decay_max
        self.kinds = {_KIND: [tensor.clone() for tensor in self._tensors]}

    def update(self, number: int) -> None:
        """Follows the trained tensors after round `number`, counted from 0.

        θ_old ← κ·θ_old + (1 − κ)·θ with κ = min(η·number, η_max) (Zheng et al. 2025, arXiv 2509.16117, section 3.3).
        """
        if self._tensors:
            torch._foreach_lerp_(self.kinds[_KIND], self._tensors, 1 - min(self._decay * number, self._decay_max))

    def in_model(self, refresh: Callable[[], None]) -> AbstractContextManager[None]:
        """Has the old policy in the place of the trained one; see `engine.ema.exchanged`."""
        return exchanged(list(zip(self._tensors, self.kinds[_KIND], strict=True)), refresh)
