"""The DiT as DeepSpeed pipeline stages.

The layers are the model's own: embedders, blocks, final layer, built only on the stage that runs them. Inside a stage
tokens and condition pass as they are; between stages they are packed into one float tensor (DeepSpeed runs a backward
pass for each, so there must be one) and one integer tensor.

Shape suffixes: B batch, T latent frames, n tokens held by this rank, L text tokens, D hidden size, P = 2·2 pixels.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor

from mugv_ds.config.model import DiTConfig
from mugv_ds.models.dit import Embedders, describe_tokens, init_weights, patch_pixels
from mugv_ds.models.layers import Block, Condition, FinalLayer
from mugv_ds.models.rope import Grid, patch_grid, positions
from mugv_ds.parallel.layout import Layout
from mugv_ds.parallel.ulysses import Ulysses

_MODULATION_ROWS, _TIME_ROWS = 12, 2  # rows of width D: (shift, scale, gate) × 2 × 2 classes; 2 classes


class Inputs(NamedTuple):
    """What the first stage takes; see `DiT.forward`."""

    x: Tensor  # [B, 24, T, H, W]
    timestep: Tensor  # [B]
    text: Tensor  # [B, L, C]
    text_mask: Tensor  # bool [B, L]
    x_mask: Tensor  # bool [B, T]
    fps: Tensor  # [B]


class Labels(NamedTuple):
    """What the last stage compares with, for the tokens this rank holds."""

    target_BnPC: Tensor
    weight_BnP1: Tensor  # see `objectives.flow.loss_weight`; zero for tokens that are no patch
    timestep: Tensor  # [B]
    scale: Tensor  # [B], of the sample in the micro-batch's loss
    elements: Tensor  # [B], latent elements of the noised frames
    role: Tensor  # int8 [B], 1 better or good, −1 worse or bad; [0] where the flow loss is wanted
    reference: Tensor  # [B], flow loss under the frozen reference


def layer_prefix(layer: int, depth: int) -> str:
    """What precedes the parameter names of pipeline layer `layer` in the published weights."""
    if layer == 0:
        return ""
    return "final_layer." if layer == depth + 1 else f"blocks.{layer - 1}."


def labels(
    target: Tensor, weight: Tensor, *, timestep: Tensor, scale: Tensor, role: Tensor, reference: Tensor, token_n: Tensor
) -> Labels:
    """The labels of the tokens `token_n`.

    Args:
        target: [B, C, T, H, W]. weight: [B, 1, T, H, W], see `objectives.flow.loss_weight`.
        timestep, scale, role, reference: as in `Labels`.
    """
    grid = patch_grid(*target.shape[2:])
    patch = positions(token_n, grid).patch_N
    is_patch = (token_n > 0) & (token_n <= grid.patches)
    weight_BnP1 = patch_pixels(weight)[:, patch] * is_patch[:, None, None]
    elements = target.shape[1] * (weight > 0).flatten(1).sum(dim=1)
    return Labels(patch_pixels(target)[:, patch], weight_BnP1, timestep, scale, elements, role, reference)


def pack(tokens: Tensor, condition: Condition, x_mask: Tensor) -> tuple[Tensor, Tensor]:
    """What one stage sends to the next: floats [B, n + 14 + L, D], integers [B, T + L]. `unpack` is the inverse."""
    width = tokens.shape[-1]
    floats = [
        tokens,
        condition.modulation_BKD.reshape(len(tokens), _MODULATION_ROWS, width),
        condition.time_BKD,
        condition.text_BLD,
    ]
    return torch.cat(floats, dim=1), torch.cat([x_mask, condition.text_mask_BL], dim=1).int()


def unpack(floats: Tensor, integers: Tensor, grid: Grid, token_n: Tensor) -> tuple[Tensor, Condition, Tensor]:
    """(tokens, condition, x_mask); what follows from the shape alone is computed again."""
    rows = [len(token_n), _MODULATION_ROWS, _TIME_ROWS, integers.shape[1] - grid.frames]
    tokens, modulation, time, text = floats.split(rows, dim=1)
    x_mask, text_mask = integers.bool().split([grid.frames, rows[-1]], dim=1)
    described = describe_tokens(positions(token_n, grid), x_mask, frame_index(grid, x_mask))
    condition = Condition(modulation.reshape(len(tokens), 2, -1), time, text, text_mask, *described)
    return tokens, condition, x_mask


def empty_packed(given: Inputs, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where what `pack` makes of these inputs, for this many tokens of width D, can be received."""
    batch, text_tokens = given.text_mask.shape
    rows = tokens + _MODULATION_ROWS + _TIME_ROWS + text_tokens
    floats = given.x.new_empty(batch, rows, width, dtype=dtype)
    return floats, given.x.new_empty(batch, given.x_mask.shape[1] + text_tokens, dtype=torch.int32)


def frame_index(grid: Grid, like: Tensor) -> Tensor:
    """Time positions [B, T + 2] of a whole clip: 0 … T + 1."""
    return torch.arange(grid.frames + 2, device=like.device).expand(len(like), -1)


@contextlib.contextmanager
def _building(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Parameters made in this context have this dtype and live on this device from the start."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)


class DiTPipeline(PipelineModule):
    """The stage of the DiT that this rank runs, with its share of the sequence.

    Args:
        config: sizes of the whole model.
        layout: the ranks.
        boundaries: see `stage_boundaries`.
        ulysses: this rank's part of the sequence, and the self-attention.
        loss: (velocity [B, n, P, 24], `Labels`) → (this rank's scalar loss, scalars to report).
        terms: names of the scalars that `loss` reports.
        recompute: see `Block.forward`.
        seed: of the initial weights, which do not depend on the layout.
        dtype, device: of the weights.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        layout: Layout,
        boundaries: list[int],
        ulysses: Ulysses,
        loss: Callable[[Tensor, Labels], tuple[Tensor, dict[str, Tensor]]],
        terms: Iterable[str],
        recompute: str,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        specs = [
            LayerSpec(Embedders, config),
            *[LayerSpec(Block, config)] * config.depth,
            LayerSpec(FinalLayer, config),
        ]
        self.parts = boundaries  # read by _partition_layers, which the base class calls while it builds
        topology = PipeDataParallelTopology(num_pp=layout.pipeline, num_dp=layout.replicas)
        with _building(dtype, device):
            super().__init__(specs, topology=topology, loss_fn=self._record_loss)
        self.config, self.ulysses, self.recompute, self.loss = config, ulysses, recompute, loss
        self.terms = dict.fromkeys(terms)
        self.grid: Grid | None = None
        self.size = 0
        self.token_n: Tensor | None = None
        for prefix, layer in self.named_layers():
            init_weights(layer, prefix, seed)

    def _partition_layers(self, method: str) -> None:
        """DeepSpeed's hook, with our boundaries."""
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def named_layers(self) -> list[tuple[str, torch.nn.Module]]:
        """This stage's layers, each with what precedes its parameter names in the published weights."""
        first = self.parts[self.stage_id]
        return [(layer_prefix(first + i, self.config.depth), layer) for i, layer in enumerate(self.forward_funcs)]

    @property
    def blocks(self) -> list[Block]:
        """This stage's blocks."""
        return [layer for layer in self.forward_funcs if isinstance(layer, Block)]

    @property
    def is_first(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        return self.stage_id == self.num_stages - 1

    def set_shape(self, shape: tuple[int, int, int], size: int, device: torch.device) -> bool:
        """Sets latent (T, H, W) and samples of the coming micro-batches; True if activations are sized otherwise."""
        grid = patch_grid(*shape)
        changed = (grid, size) != (self.grid, self.size)
        self.grid, self.size = grid, size
        self.ulysses.tokens = grid.tokens
        self.token_n = self.ulysses.local_tokens(device)
        return changed

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor]:
        """Runs this stage on `Inputs` or on what the stage before packed; returns the output or packs for the next."""
        layers = self.forward_funcs
        if self.is_first:
            given = Inputs(*inputs)
            tokens, condition = layers[0].embed(*given, frame_index(self.grid, given.x), self.token_n)
            x_mask, layers = given.x_mask, layers[1:]
        else:
            tokens, condition, x_mask = unpack(*inputs, self.grid, self.token_n)
        for layer in layers[: -1 if self.is_last else None]:
            tokens = layer(tokens, condition, self.ulysses, self.recompute)
        return layers[-1](tokens, condition) if self.is_last else pack(tokens, condition, x_mask)

    def _record_loss(self, output: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        channels = self.config.in_channels
        loss, self.terms = self.loss(output.unflatten(-1, (-1, 2 * channels))[..., :channels], Labels(*given))
        # A loss that is not finite may have gradients that are. Made NaN too, they keep DeepSpeed from the update on
        # all ranks.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def get_additional_losses(self) -> dict[str, Tensor | None]:
        """DeepSpeed's hook: scalars of the last micro-batch, which it averages over replicas and accumulation.

        Stages without the loss give the same names, of which DeepSpeed only takes the number and the order.
        """
        return self.terms
