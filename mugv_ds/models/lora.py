"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen linear W learns by the factors of a matrix that is added to it.

    y = x·Wᵀ + b + (alpha / rank) · x·Aᵀ·Bᵀ        (their eq. 3, with the scaling of section 4.1)

A linear's adapter is its children `lora_A` and `lora_B`, by peft's names: A and B are the parameters
`<linear>.lora_A.weight` [rank, in] and `<linear>.lora_B.weight` [out, rank]. The linear keeps its own parameters and
their names, so published weights load as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mugv_ds.config.model import DiTConfig
from mugv_ds.config.post_training_schema import LoraSection
from mugv_ds.models.modulated import Adapter

FACTORS = ("lora_A", "lora_B")


def add_adapters(block: nn.Module, lora: LoraSection) -> None:
    """Freezes a block and gives the linears that `lora.targets` names an adapter each, in the dtype of their weight.

    The factors are left uninitialised: `models.dit.init_weights` draws A and sets B to zero, as it does by name.
    """
    block.requires_grad_(False)
    for target in lora.targets:
        linear = block.get_submodule(target)
        like = {"bias": False, "dtype": linear.weight.dtype, "device": linear.weight.device}
        linear.lora_A = nn.Linear(linear.in_features, lora.rank, **like)
        linear.lora_B = nn.Linear(lora.rank, linear.out_features, **like)
        linear.lora_scaling, linear.lora_on = lora.scaling, True


def carry_adapter(old: nn.Module, new: nn.Module) -> None:
    """Moves a linear's adapter, if it has one, to the layer that takes its place."""
    if has_adapter(old):
        for name in FACTORS:
            new.add_module(name, getattr(old, name))
        new.lora_scaling, new.lora_on = old.lora_scaling, old.lora_on


def has_adapter(linear: nn.Module) -> bool:
    """Tells whether a linear has an adapter of ours, switched on or off. A layer that peft has put in has its own."""
    return hasattr(linear, "lora_on")


def is_factor(name: str) -> bool:
    """Tells whether a parameter's full name is that of an adapter's A or B."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def adapter_of(linear: nn.Module) -> Adapter | None:
    """Returns A and (alpha / rank) · B of a linear; None where it has no adapter, or one that is switched off."""
    if not has_adapter(linear) or not linear.lora_on:
        return None
    b = linear.lora_B.weight
    return Adapter(linear.lora_A.weight, b if linear.lora_scaling == 1 else b * linear.lora_scaling)


def plus_adapter(y: Tensor, linear: nn.Module, x: Tensor) -> Tensor:
    """Adds what the linear's adapter makes of x, […, in], to y, […, out]."""
    adapter = adapter_of(linear)
    return y if adapter is None else y + F.linear(F.linear(x, adapter.a), adapter.b)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, the model computes with the frozen weights alone, as if it had no adapters."""
    adapted = [linear for linear in module.modules() if has_adapter(linear)]
    for linear in adapted:
        linear.lora_on = False
    try:
        yield
    finally:
        for linear in adapted:
            linear.lora_on = True


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns W + scaling · B·A, [out, in], computed in fp32."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)


def adapter_sizes(module: nn.Module) -> tuple[float, float]:
    """Returns Σ ‖(alpha / rank)·B·A‖² over all adapters of a model, and Σ ‖W‖² over its frozen parameters."""
    moved, size = 0.0, 0.0
    for linear in filter(has_adapter, module.modules()):
        a, b = (getattr(linear, name).weight.detach().double() for name in FACTORS)
        moved += linear.lora_scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())  # the trace of BᵀB·AAᵀ, without B·A
    for parameter in module.parameters():
        if not parameter.requires_grad:
            size += float(parameter.square().sum(dtype=torch.float64))
    return moved, size


def block_adapter_shapes(config: DiTConfig, lora: LoraSection) -> dict[str, tuple[int, int]]:
    """Returns the shapes of the adapters of one block, of a DiT of these sizes, by name in the block."""
    from mugv_ds.models.layers import Block  # which computes with what is above

    with torch.device("meta"):
        block = Block(config)
    add_adapters(block, lora)
    return {name: tuple(p.shape) for name, p in block.named_parameters() if p.requires_grad}


def adapter_shapes(config: DiTConfig, lora: LoraSection) -> dict[str, tuple[int, int]]:
    """Returns the shapes of all adapters of a DiT of these sizes by full name, in the model's order."""
    shapes = block_adapter_shapes(config, lora)
    return {f"blocks.{i}.{name}": shape for i in range(config.depth) for name, shape in shapes.items()}
