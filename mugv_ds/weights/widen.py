"""Widens a DiT by a whole factor e without changing its output: every hidden vector x becomes [x; …; x].

A matrix that reads a hidden vector is repeated along its columns and divided by e (Net2WiderNet, Chen et al. 2016,
section 3.2, with every unit copied e times; MUG-V's 2B → 10B). LayerNorm's statistics, the norms of each head, the
rotary positions and the softmax scale stay as they are, because the heads keep their width and there are e times as
many. The copies would get equal gradients for ever, so noise can be added to the divided matrices.

Shape suffixes in patterns: r rows and c columns of a matrix, e copies, g groups of rows, d width of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor

from mugv_ds.config import InputError
from mugv_ds.config.model import DiTConfig
from mugv_ds.models.dit import DiT, keyed_generator
from mugv_ds.weights.base import UNUSED, Weights

NoiseKind = Literal["paired", "iid", "none"]

# Linears whose output is cut into groups: q, k, v; k, v; six modulations. Each group is repeated by itself.
_ROW_GROUPS = {"attn.qkv": 3, "cross_attn.kv_linear": 2, "t_block.1": 6}
_UNCHANGED = ("q_norm.weight", "k_norm.weight", "final_layer.linear.bias")
# Linears whose input is not a hidden vector but pixels, a sinusoid or text features.
_READ_FROM_OUTSIDE = ("x_embedder.proj", "t_embedder.mlp.0", "fps_embedder.mlp.0", "y_embedder.y_proj.fc1")


@dataclass(frozen=True)
class Noise:
    """The noise that is added to the divided matrices, so that the copies of a unit learn different things.

    Args:
        kind: "paired": the e column blocks of a row get noise that sums to zero (for e = 2, +N and −N, with another N
            for each row), so the output stays the same; "iid": every element gets its own noise, which changes the
            output; "none": the copies stay equal.
        scale: standard deviation of the noise over the root mean square of the divided matrix.
        seed: seed that keys the generator of each tensor, together with its name.

    Raises:
        InputError: the scale is negative or not finite.
    """

    kind: NoiseKind
    scale: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < float("inf"):
            raise InputError(f"noise scale {self.scale}: must be at least 0 and finite")

    def put_on(self, name: str, wide: Tensor, factor: int) -> Tensor:
        """Returns the divided matrix [rows, e · columns] with noise added."""
        if self.kind == "none":
            return wide
        std = self.scale * wide.square().mean().sqrt()
        generator = keyed_generator(self.seed, f"widening noise of {name}")
        if self.kind == "iid":
            return wide + std * torch.randn(wide.shape, generator=generator)
        blocks = rearrange(wide, "r (e c) -> e r c", e=factor)
        drawn = std * torch.randn(factor - 1, *blocks.shape[1:], generator=generator)
        return rearrange(blocks + torch.cat([drawn, -drawn.sum(0, keepdim=True)]), "e r c -> r (e c)")


class Widened(Weights):
    """The fp32 weights of a DiT `factor` times as wide; each tensor is made when it is asked for.

    Args:
        weights: those of a whole DiT. factor: e, at least 2. noise: see `Noise`.

    Raises:
        InputError: the factor is less than 2.
    """

    def __init__(self, weights: Weights, factor: int, noise: Noise) -> None:
        if factor < 2:
            raise InputError(f"factor {factor}: must be at least 2")
        self.path, self.text_encoder = weights.path, weights.text_encoder
        self._weights, self._factor, self._noise = weights, factor, noise

    def __getitem__(self, name: str) -> Tensor:
        wide = widen_tensor(name, self._weights[name].float(), self._factor)
        return self._noise.put_on(name, wide, self._factor) if _is_divided(name) else wide

    def meta(self, name: str) -> Tensor:
        return widen_tensor(name, self._weights.meta(name).float(), self._factor)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._weights if name != UNUSED)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def widened_sizes(config: DiTConfig, factor: int) -> DiTConfig:
    """Returns the sizes of a DiT `factor` times as wide."""
    return replace(config, hidden_size=factor * config.hidden_size, num_heads=factor * config.num_heads)


def widen_tensor(name: str, value: Tensor, factor: int) -> Tensor:
    """Returns the published tensor `name` of a DiT `factor` times as wide, without noise."""
    if name.endswith(_UNCHANGED):
        return value
    groups = next((count for module, count in _ROW_GROUPS.items() if f"{module}." in name), 1)
    if value.dim() == 1 or name.endswith("scale_shift_table"):
        return repeat(value, "... (g d) -> ... (g e d)", g=groups, e=factor)
    if not name.startswith("final_layer."):
        value = repeat(value, "(g d) ... -> (g e d) ...", g=groups, e=factor)
    return repeat(value, "r c -> r (e c)", e=factor) / factor if _is_divided(name) else value


def _is_divided(name: str) -> bool:
    """Tells whether the tensor is a matrix that reads a hidden vector."""
    return name.endswith(".weight") and "norm" not in name and not name.startswith(_READ_FROM_OUTSIDE)


@torch.no_grad()
def output_difference(narrow: Weights, wide: Weights, config: DiTConfig, factor: int, blocks: int) -> float:
    """Returns ‖wide − narrow‖ / ‖narrow‖ of the two models' outputs on random input, computed in fp32 on the CPU.

    Args:
        narrow, wide: the weights before and after. config: the sizes before. factor: e.
        blocks: how many blocks, from the first on, are run; the others are left out of both models.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, 2, 6, 6, generator=generator)
    timestep = torch.tensor([900.0, 100.0])
    text = torch.randn(2, 8, config.caption_channels, generator=generator)
    outputs = []
    for weights, sizes in ((narrow, config), (wide, widened_sizes(config, factor))):
        with torch.device("meta"):
            model = DiT(replace(sizes, depth=blocks))
        model.load_state_dict({name: weights[name].float() for name in model.state_dict()}, strict=True, assign=True)
        outputs.append(model(x, timestep, text).double())
        del model  # so that it is not in memory beside the next one
    before, after = outputs
    scale = before.norm()
    return float((after - before).norm() / (scale if scale > 0 else 1.0))
