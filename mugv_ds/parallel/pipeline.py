"""The DiT as stages of a DeepSpeed pipeline.

The layers are the model's own: embedders, blocks and final layer, built only on the stage that runs them. Inside a
stage tokens and condition pass as they are. Between stages they are packed into one float tensor (DeepSpeed runs a
backward pass for each float tensor, so there must be only one) and one integer tensor.

Shape suffixes: B batch, C latent channels, T latent frames, H and W latent height and width, n tokens held by this
rank, L text tokens, D hidden size, P = 2·2 pixels of a patch, K = 2 token classes.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor

from mugv_ds.config.model import DiTConfig
from mugv_ds.config.post_training_schema import LoraSection
from mugv_ds.models.dit import Embedders, describe_tokens, init_weights, patch_pixels
from mugv_ds.models.layers import Block, Condition, FinalLayer
from mugv_ds.models.lora import add_adapters
from mugv_ds.models.reuse import HeldText, RunBlocks, run_blocks
from mugv_ds.models.rope import Grid, patch_grid, positions
from mugv_ds.parallel.layout import Layout
from mugv_ds.parallel.ulysses import Ulysses

# Rows of width D of a packed condition: (shift, scale, gate) × (attention, feed-forward) × 2 classes; one a class.
_MODULATION_ROWS, _TIME_ROWS = 12, 2


class Inputs(NamedTuple):
    """The arguments of the first stage; see `DiT.forward`."""

    x: Tensor  # [B, 24, T, H, W]
    timestep: Tensor  # [B]
    text: Tensor  # [B, L, caption channels]
    text_mask: Tensor  # bool [B, L]
    x_mask: Tensor  # bool [B, T]
    fps: Tensor  # [B]


class Labels(NamedTuple):
    """What the last stage compares its output with, for the tokens that this rank holds."""

    target_BnPC: Tensor
    weight_BnP1: Tensor  # see `objectives.flow.loss_weight`; zero for tokens that are no patch
    timestep: Tensor  # [B]
    scale: Tensor  # [B], weight of the sample in the micro-batch's loss
    elements: Tensor  # [B], number of latent elements of the noised frames
    role: Tensor  # int8 [B]: 1 for better or good, −1 for worse or bad; empty where the flow loss is wanted
    reference: Tensor  # [B], flow loss under the frozen reference model
    optimality: Tensor  # [B], of rollouts, see `objectives.reward.optimality`


def layer_prefix(layer: int, depth: int) -> str:
    """Returns what precedes the parameter names of pipeline layer `layer` in the published weights."""
    if layer == 0:
        return ""
    return "final_layer." if layer == depth + 1 else f"blocks.{layer - 1}."


def labels(
    target: Tensor, weight: Tensor, *, token_n: Tensor, timestep: Tensor, scale: Tensor, **of_samples: Tensor
) -> Labels:
    """Makes the labels of the tokens `token_n` from those of whole latents.

    Args:
        target: [B, C, T, H, W]. weight: [B, 1, T, H, W], see `objectives.flow.loss_weight`.
        token_n: indices into the sequence; those that are no patch get the weight 0.
        timestep, scale, role, reference, optimality: as in `Labels`.
    """
    grid = patch_grid(*target.shape[2:])
    patch_n = positions(token_n, grid).patch_N
    is_patch_n = (token_n > 0) & (token_n <= grid.patches)
    weight_BnP1 = patch_pixels(weight)[:, patch_n] * is_patch_n[:, None, None]
    elements_B = target.shape[1] * (weight > 0).flatten(1).sum(dim=1)
    return Labels(patch_pixels(target)[:, patch_n], weight_BnP1, timestep, scale, elements_B, **of_samples)


def pack(tokens: Tensor, condition: Condition, x_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Packs what one stage sends to the next; `unpack` is the inverse.

    Args:
        tokens: [B, n, D]. x_mask: bool [B, T], False for frames given clean.
    Returns:
        Floats [B, n + 14 + L, D] and integers [B, T + L].
    """
    width = tokens.shape[-1]
    floats = [
        tokens,
        condition.modulation_BKD.reshape(len(tokens), _MODULATION_ROWS, width),
        condition.time_BKD,
        condition.text_BLD,
    ]
    return torch.cat(floats, dim=1), torch.cat([x_mask, condition.text_mask_BL], dim=1).int()


def unpack(floats: Tensor, integers: Tensor, grid: Grid, token_n: Tensor) -> tuple[Tensor, Condition, Tensor]:
    """Returns (tokens, condition, x_mask) of what `pack` made; what follows from the shape alone is computed again."""
    rows = [len(token_n), _MODULATION_ROWS, _TIME_ROWS, integers.shape[1] - grid.frames]
    tokens, modulation, time, text = floats.split(rows, dim=1)
    x_mask, text_mask = integers.bool().split([grid.frames, rows[-1]], dim=1)
    described = describe_tokens(positions(token_n, grid), x_mask, frame_index(grid, x_mask))
    condition = Condition(modulation.reshape(len(tokens), 2, -1), time, text, text_mask, *described)
    return tokens, condition, x_mask


def empty_packed(given: Inputs, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns tensors to receive what `pack` makes of these inputs, for this many tokens of width D."""
    batch, text_tokens = given.text_mask.shape
    rows = tokens + _MODULATION_ROWS + _TIME_ROWS + text_tokens
    floats = given.x.new_empty(batch, rows, width, dtype=dtype)
    return floats, given.x.new_empty(batch, given.x_mask.shape[1] + text_tokens, dtype=torch.int32)


def frame_index(grid: Grid, like: Tensor) -> Tensor:
    """Returns the time positions [B, T + 2] of a whole clip, 0 … T + 1, on the device of `like` [B, …]."""
    return torch.arange(grid.frames + 2, device=like.device).expand(len(like), -1)


@contextlib.contextmanager
def _building(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Gives parameters made in the context this dtype and device from the start, so that none is made in fp32 first."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)


class DiTPipeline(PipelineModule):
    """Holds the stage of the DiT that this rank runs, for the tokens that this rank holds.

    Args:
        config: sizes of the whole model.
        layout: how ranks are split over replicas, sequence and stages.
        boundaries: see `stage_boundaries`.
        ulysses: this rank's part of the sequence, and the self-attention.
        loss: (velocity [B, n, P, 24], `Labels`) → (this rank's scalar loss, scalars to report); None to predict alone.
        terms: names of the scalars that `loss` reports.
        recompute: level of `parallel.activation_checkpointing`, of all the model's blocks or of each, see
            `Block.forward`.
        lora: adapters of the blocks, which alone are trained; None trains all weights.
        seed: seed of the initial weights, which do not depend on the layout; None leaves them as they happen to be.
        widths: D and R that their spread follows, see `models.dit.init_weights`.
        dtype, device: of the weights.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        layout: Layout,
        boundaries: list[int],
        ulysses: Ulysses,
        loss: Callable[[Tensor, Labels], tuple[Tensor, dict[str, Tensor]]] | None = None,
        terms: Iterable[str] = (),
        recompute: str | Sequence[str] = "off",
        lora: LoraSection | None = None,
        seed: int | None,
        widths: tuple[int, int] | None = None,
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
        self.config, self.ulysses, self.loss = config, ulysses, loss
        levels = [recompute] * config.depth if isinstance(recompute, str) else recompute
        self.first_block = max(boundaries[self.stage_id] - 1, 0)  # layer 0 is the embedders
        self.recompute = tuple(levels[self.first_block : self.first_block + len(self.blocks)])
        self.terms = dict.fromkeys(terms)
        self.grid: Grid | None = None
        self.size = 0
        self.token_n: Tensor | None = None
        self.run_blocks: RunBlocks = run_blocks
        self.held_text: HeldText | None = None
        self.adapted = lora is not None
        if self.adapted:
            self.requires_grad_(False)
            for block in self.blocks:
                add_adapters(block, lora)
        for prefix, layer in self.named_layers() if seed is not None else ():
            init_weights(layer, prefix, seed, widths)

    def _partition_layers(self, method: str) -> None:
        """Sets the layers of this stage; the base class calls it in place of its own method, which knows no costs."""
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def named_layers(self) -> list[tuple[str, torch.nn.Module]]:
        """Returns this stage's layers, each with what precedes its parameter names in the published weights."""
        first = self.parts[self.stage_id]
        return [(layer_prefix(first + i, self.config.depth), layer) for i, layer in enumerate(self.forward_funcs)]

    @property
    def blocks(self) -> list[Block]:
        """Returns this stage's blocks."""
        return [layer for layer in self.forward_funcs if isinstance(layer, Block)]

    @property
    def is_first(self) -> bool:
        return self.stage_id == 0

    @property
    def is_last(self) -> bool:
        return self.stage_id == self.num_stages - 1

    def set_shape(self, shape: tuple[int, int, int], size: int, device: torch.device) -> bool:
        """Sets the latent shape and size of the coming micro-batches.

        Args:
            shape: latent (T, H, W). size: samples of a micro-batch.
        Returns:
            Whether activations have another size than before, so that DeepSpeed's buffers do not fit.
        """
        grid = patch_grid(*shape)
        changed = (grid, size) != (self.grid, self.size)
        self.grid, self.size = grid, size
        self.ulysses.tokens = grid.tokens
        self.token_n = self.ulysses.local_tokens(device)
        return changed

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor]:
        """Runs this stage.

        Args:
            inputs: on the first stage `Inputs`, else what the stage before packed.
        Returns:
            On the last stage the final layer's output [B, n, 2·2·48], else what is packed for the next stage.
        """
        layers = self.forward_funcs
        if self.is_first:
            given = Inputs(*inputs)
            tokens_BnD, condition = layers[0].embed(*given, frame_index(self.grid, given.x), self.token_n)
            x_mask = given.x_mask
        else:
            tokens_BnD, condition, x_mask = unpack(*inputs, self.grid, self.token_n)
        if self.adapted:  # what the frozen embedders made needs no gradient
            condition = Condition(*(part.detach() for part in condition))
            tokens_BnD = tokens_BnD.detach() if self.is_first else tokens_BnD
        if self.held_text is not None:
            self.held_text.use(condition.text_BLD)
        recompute = self.recompute if torch.is_grad_enabled() else "off"  # samplers may run fewer blocks
        tokens_BnD = self.run_blocks(self.blocks, tokens_BnD, condition, self.ulysses, recompute)
        return layers[-1](tokens_BnD, condition) if self.is_last else pack(tokens_BnD, condition, x_mask)

    def _record_loss(self, output: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        """Returns the loss of the last stage's output; the scalars to report are kept until DeepSpeed asks for them."""
        channels = self.config.in_channels
        loss, self.terms = self.loss(output.unflatten(-1, (-1, 2 * channels))[..., :channels], Labels(*given))
        # A loss that is not finite may have gradients that are finite. They are made NaN too, so that DeepSpeed skips
        # the update on all ranks.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def get_additional_losses(self) -> dict[str, Tensor | None]:
        """Returns the scalars of the last micro-batch, which DeepSpeed averages over replicas and accumulation.

        DeepSpeed calls it after each loss. Stages without the loss return the same names, of which DeepSpeed only uses
        the number and the order.
        """
        return self.terms
