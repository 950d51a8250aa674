"""A linear layer whose matrix products run in fp8, through Transformer Engine, without which this cannot be imported.

The recipe is current scaling: each tensor is scaled by its own largest value when it is rounded, to E4M3 in the forward
pass and to E5M2 for gradients (Micikevicius et al. 2022, arXiv:2209.05433). It has no state. Delayed scaling would take
its scales from a history of steps, which an exact resume would have to restore, and which must not advance while
activations are recomputed. A rank scales by the tokens that it holds, so results depend on the layout within the
rounding of fp8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_engine.common.recipe import Float8CurrentScaling
from transformer_engine.pytorch import Linear, autocast

_RECIPE = Float8CurrentScaling()
_ROWS = 16  # every dimension of an fp8 product must be a multiple of it


class Fp8Linear(Linear):
    """Takes the place of an `nn.Linear` and shares its parameters, which stay in bf16.

    The input and output width must be multiples of 16. Rows may be any number: they are padded with zeros, which change
    neither the scale nor any sum.

    Args:
        linear: the layer to replace, with a bias, on a CUDA device.

    Attributes:
        fp8_on: whether it computes in fp8, or in the dtype of its parameters.
    """

    fp8_on = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, params_dtype=linear.weight.dtype, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    # The library adds an entry to the state dict for recipes with a state; this one has none.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer: […, in_features] → […, out_features]."""
        if not self.fp8_on:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        padding = -len(rows) % _ROWS
        with autocast(recipe=_RECIPE):
            y = super().forward(F.pad(rows, (0, 0, 0, padding)) if padding else rows)
        return y[: len(rows)].view(*x.shape[:-1], -1)
