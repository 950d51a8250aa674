"""Puts the blocks' large linears into fp8; see `mugv_kernels.fp8_linear` for how they compute."""

import importlib

import torch

from mugv_ds.config.errors import ConfigError
from mugv_ds.models.layers import Block
from mugv_ds.models.lora import carry_adapter

_KEY = 'model.precision = "fp8"'


def check_fp8(device: torch.device) -> None:
    """Checks that this machine can run what `use_fp8` makes, so that a run fails before it builds the model.

    Raises:
        ConfigError: Transformer Engine is missing, broken or too old, or the device has no fp8.
    """
    try:
        importlib.import_module("mugv_kernels.fp8_linear")
    except Exception as error:  # a broken installation of the library fails in many ways
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{_KEY}: needs Transformer Engine for PyTorch with Float8CurrentScaling and autocast (2.20 has them): "
            f'pip install --no-build-isolation "transformer-engine[pytorch]", or set "bf16" ({reason})'
        ) from None
    if device.type != "cuda":
        raise ConfigError(f'{_KEY}: needs an NVIDIA GPU with fp8, this process runs on {device.type}; set "bf16"')
    available, reason = importlib.import_module("transformer_engine.pytorch").is_fp8_available(return_reason=True)
    if not available:
        raise ConfigError(f'{_KEY}: {torch.cuda.get_device_name(device)} cannot run it ({reason}); set "bf16"')


def use_fp8(block: Block) -> None:
    """Replaces the linears over a block's tokens by fp8 ones with the same parameters and names.

    The projection of the text stays in bf16: it has few rows, so rounding its weight would cost more than the product.
    Adapters stay in bf16 beside the linears.
    """
    from mugv_kernels.fp8_linear import Fp8Linear

    for module, names in (
        (block.attn, ("qkv", "proj")),
        (block.cross_attn, ("q_linear", "proj")),
        (block.mlp, ("fc1", "fc2")),
    ):
        for name in names:
            linear = getattr(module, name)
            setattr(module, name, Fp8Linear(linear))
            carry_adapter(linear, getattr(module, name))
