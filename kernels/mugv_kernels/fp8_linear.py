"""A linear layer whose matrix products run in fp8, through Transformer Engine. Importing this module needs the library.

Recipe: each tensor is scaled by its own largest value when it is rounded (current scaling), to E4M3 in the forward
pass and E5M2 for gradients (Micikevicius et al. 2022, arXiv:2209.05433). It has no state: delayed scaling takes its
scales from a history of steps, which an exact resume would need, and which must stand still while activations are
recomputed. A rank scales by the tokens that it holds, so results depend on the layout within the rounding of fp8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_engine.common.recipe import Float8CurrentScaling
from transformer_engine.pytorch import Linear, autocast

_RECIPE = Float8CurrentScaling()
_ROWS = 16  # fp8 products want a multiple of it along every side


class Fp8Linear(Linear):
    """Takes the place of an `nn.Linear` and shares its parameters, which stay in bf16.

    Input and gradient widths must be multiples of 16; rows may be any number, they are padded. Zero rows change neither
    the scale nor any sum.

    Args:
        linear: with a bias, on a CUDA device.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, params_dtype=linear.weight.dtype, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    # The library adds an entry to the state dict for recipes with a state; this one has none.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        rows = x.flatten(0, -2)
        padding = -len(rows) % _ROWS
        with autocast(recipe=_RECIPE):
            y = super().forward(F.pad(rows, (0, 0, 0, padding)) if padding else rows)
        return y[: len(rows)].view(*x.shape[:-1], -1)
