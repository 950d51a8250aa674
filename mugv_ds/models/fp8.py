"""Puts the blocks' large linears into fp8: by our own products (`models.fp8_products`), or by Transformer Engine."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugv_ds.config.errors import ConfigError
from mugv_ds.models.fp8_products import Weight, fp8_linear, round_weight
from mugv_ds.models.layers import Block
from mugv_ds.models.lora import carry_adapter

Backend = Literal["native", "te"]
_KEY = 'model.precision = "fp8"'
_CAPABILITY = (8, 9)  # of the first devices with fp8 products


class Fp8Linear(nn.Module):
    """Takes the place of an `nn.Linear` and shares its parameters, which stay in bf16.

    Args:
        linear: the layer to replace. Both its widths must be multiples of 16.
        keeps_weight: whether the fp8 forms of the weight, 2 bytes a parameter, are kept until the weight changes, in
            place of being made for each product.

    Attributes:
        fp8_on: whether it computes in fp8, or as the linear that it replaced, see `fp8_off`.
    """

    fp8_on = True

    def __init__(self, linear: nn.Linear, keeps_weight: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._keeps_weight = keeps_weight
        self._version, self._kept = -1, ()

    def refresh(self) -> None:
        """Makes the forms of the weight that are kept anew, if it has changed since.

        Its version counter tells. What writes to the weight's memory behind autograd, as the sharded optimizer does,
        has to raise it (`torch.autograd.graph.increment_version`).
        """
        if self._keeps_weight and self._version != self.weight._version:
            self._kept, self._version = tuple(round_weight(self.weight)), self.weight._version

    @property
    def rounded(self) -> Weight:
        """Returns the weight, and what is kept of it in fp8."""
        return Weight(self.weight, *self._kept)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer: […, D] → […, E], for a weight [E, D]."""
        return fp8_linear(x, self.rounded, self.bias) if self.fp8_on else F.linear(x, self.weight, self.bias)


def check_fp8(device: torch.device, backend: Backend) -> None:
    """Checks that this machine can run what `use_fp8` makes, so that a run fails before it builds the model.

    Raises:
        ConfigError: Transformer Engine is asked for, and missing, broken or too old, or the device has no fp8.
    """
    if backend == "native":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
            raise ConfigError(f'{_KEY}: {torch.cuda.get_device_name(device)} has no fp8 products; set "bf16"')
        return
    try:
        importlib.import_module("mugv_kernels.fp8_linear")
    except Exception as error:  # a broken installation of the library fails in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            'model.fp8_backend = "te": needs Transformer Engine for PyTorch with Float8CurrentScaling and autocast '
            '(2.20 has them): pip install --no-build-isolation "transformer-engine[pytorch]", or set "native" '
            f"({reason})"
        ) from None
    if device.type != "cuda":
        raise ConfigError(f'{_KEY}: needs an NVIDIA GPU with fp8, this process runs on {device.type}; set "bf16"')
    available, reason = importlib.import_module("transformer_engine.pytorch").is_fp8_available(return_reason=True)
    if not available:
        raise ConfigError(f'{_KEY}: {torch.cuda.get_device_name(device)} cannot run it ({reason}); set "bf16"')


def use_fp8(block: Block, backend: Backend = "native", keeps_weights: bool = False) -> None:
    """Replaces the linears over a block's tokens by fp8 ones with the same parameters and names.

    The projection of the text stays in bf16: it has few rows, so rounding its weight would cost more than the product.
    Adapters stay in bf16 beside the linears.

    Args:
        keeps_weights: see `Fp8Linear`; for steps of several micro-batches. Transformer Engine does not.
    """
    made = []
    for module, names in (
        (block.attn, ("qkv", "proj")),
        (block.cross_attn, ("q_linear", "proj")),
        (block.mlp, ("fc1", "fc2")),
    ):
        for name in names:
            linear = getattr(module, name)
            if backend == "te":
                from mugv_kernels.fp8_linear import Fp8Linear as TransformerEngineLinear

                replaced = TransformerEngineLinear(linear)
            else:
                replaced = Fp8Linear(linear, keeps_weights)
                made.append(replaced)
            setattr(module, name, replaced)
            carry_adapter(linear, replaced)

    def refresh(*_) -> None:
        for linear in made:
            linear.refresh()

    if keeps_weights:
        block.register_forward_pre_hook(refresh)


@contextmanager
def fp8_off(module: nn.Module) -> Iterator[None]:
    """Inside, the linears that `use_fp8` has put into a model compute in bf16, as those that they replaced did.

    So do the published weights wherever they are used: what is measured or shown of a model is measured inside.
    """
    linears = [linear for linear in module.modules() if hasattr(linear, "fp8_on")]
    for linear in linears:
        linear.fp8_on = False
    try:
        yield
    finally:
        for linear in linears:
            linear.fp8_on = True
