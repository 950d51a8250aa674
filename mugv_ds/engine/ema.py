"""Power-function averages of the weights, kept during training.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1. Unlike an
exponential average they grow with the training, and from two of them, stored now and then, any other can be
reconstructed afterwards (`mugv_ds/checkpoint/average.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mugv_ds.config.errors import Stopped
from mugv_ds.config.power_profile import exponent, kind_name


class PowerEma:
    """Averages of fp32 tensors with power-function profiles.

    The tensors are the fp32 weights that this rank owns, so that the averages are sharded as the optimizer is.

    Args:
        tensors: what is averaged; they are updated in place elsewhere.
        sigma_rel: relative width of each average; none switches averaging off.

    Attributes:
        averages: for each kind ("ema_0.050") the averages, parallel to `tensors`; at first a copy of them.
    """

    def __init__(self, tensors: Sequence[Tensor], sigma_rel: Sequence[float]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._powers = {kind_name(sigma): exponent(sigma) + 1 for sigma in sigma_rel}
        self.averages = {kind: [tensor.clone() for tensor in self._tensors] for kind in self._powers}

    def update(self, step: int) -> None:
        """Takes in the tensors after optimizer step `step`, counted from 1.

        θ̄ ← β θ̄ + (1 − β) θ with β(t) = (1 − 1/t)^(γ + 1). At step 1, β = 0: the average is the weights.
        """
        if not self._tensors:
            return
        for kind, power in self._powers.items():
            torch._foreach_lerp_(self.averages[kind], self._tensors, 1 - (1 - 1 / step) ** power)

    @contextmanager
    def in_model(self, sigma_rel: float, refresh: Callable[[], None]) -> Iterator[None]:
        """Has an average in the place of the weights for the while of the context; all ranks enter and leave together.

        Tensors and average change places, one after the other, and do so again in the end: both are then as they were,
        bit for bit, and so is the model, which holds the rounded tensors. So it needs next to no memory, and works
        however the tensors are sharded.

        Args:
            sigma_rel: of the average. refresh: puts the tensors, rounded, into the model of all ranks.

        Raises:
            Stopped: inside the context, on all ranks; everything is put back. Whatever else a rank raises there ends
                the run, and nothing is put back: the others would not come to `refresh`.
        """
        pairs = list(zip(self._tensors, self.averages[kind_name(sigma_rel)], strict=True))
        with exchanged(pairs, refresh):
            yield


@contextmanager
def exchanged(pairs: Sequence[tuple[Tensor, Tensor]], refresh: Callable[[], None]) -> Iterator[None]:
    """Has the content of each two tensors exchanged for the while of the context; see `PowerEma.in_model`."""
    _swap(pairs)
    refresh()
    stopped = None
    try:
        yield
    except Stopped as raised:
        stopped = raised
    _swap(pairs)
    refresh()
    if stopped is not None:
        raise stopped


def _swap(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Exchanges the content of each two tensors."""
    for one, other in pairs:
        held = one.clone()
        one.copy_(other)
        other.copy_(held)
