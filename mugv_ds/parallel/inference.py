"""Calls a DiT that is spread over pipeline stages and sequence ranks as one function of whole latents.

Shape suffixes: B batch, T latent frames, H and W latent height and width, n tokens held by this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import DiTConfig
from mugv_ds.models.attention import sdpa
from mugv_ds.models.dit import unpatchify
from mugv_ds.models.rope import patch_grid
from mugv_ds.parallel.layout import Layout, RankCoordinates, stage_boundaries
from mugv_ds.parallel.pipeline import DiTPipeline, Inputs, empty_packed
from mugv_ds.parallel.ulysses import Ulysses


def inference_stage(
    config: DiTConfig,
    *,
    layout: Layout,
    coordinates: RankCoordinates,
    group: dist.ProcessGroup | None,
    shape: tuple[int, int, int],
    text_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DiTPipeline:
    """Makes this rank's stage of a DiT to predict with, whose weights are still to be loaded.

    Args:
        layout, coordinates, group: of all ranks, of this one, and those that share a sequence with it.
        shape: latent (T, H, W) of a typical sample, by whose cost the stages are balanced. text_tokens: of its text.
        dtype, device: of the weights.

    Raises:
        ConfigError: see `stage_boundaries`, or the ranks of a sequence do not divide the heads.
    """
    if config.num_heads % layout.sequence:
        raise ConfigError(f"sequence {layout.sequence}: must divide the model's {config.num_heads} attention heads")
    return DiTPipeline(
        config,
        layout=layout,
        boundaries=stage_boundaries(config, layout.pipeline, patch_grid(*shape).tokens, text_tokens),
        ulysses=Ulysses(group, layout.sequence, coordinates.sequence, sdpa),
        seed=None,
        dtype=dtype,
        device=device,
    ).eval()


class PipelinedModel:
    """Predicts velocities as `DiT` does, with all ranks of a replica.

    All of them call it together and with the same arguments, and all get the result. It hands on the activations
    itself: DeepSpeed's `eval_batch` would sum up the outputs of all evaluations, whatever their shapes, report them to
    monitors as a loss, and keep buffers that the next training step must not use.

    Args:
        module: this rank's stage. Its shape has to be set again (`set_shape`) before the next training step.
    """

    def __init__(self, module: DiTPipeline) -> None:
        self._module = module

    @torch.no_grad()
    def __call__(
        self, x: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor, x_mask: Tensor, fps: Tensor
    ) -> Tensor:
        """Predicts the velocity [B, 48, T, H, W] fp32 of latents [B, 24, T, H, W]; see `DiT.forward`."""
        self._module.eval()
        self._module.set_shape(tuple(x.shape[2:]), len(x), x.device)
        grid = self._module.grid
        tokens = self._gather(self._run(Inputs(x, timestep, text, text_mask, x_mask, fps)))
        self._module.grid = None  # so that the shape of the next batch counts as another
        return unpatchify(tokens[:, 1 : 1 + grid.patches], grid, *x.shape[3:])

    def _run(self, given: Inputs) -> Tensor:
        """Runs all stages; returns on each of them the last stage's output for the tokens that this rank holds."""
        module, ranks = self._module, self._module.mpu()
        tokens, config = len(module.token_n), module.config
        received = given
        if not module.is_first:
            received = empty_packed(given, tokens, config.hidden_size, next(module.parameters()).dtype)
            for tensor in received:
                dist.recv(tensor, ranks.stage_to_global(module.stage_id - 1))
        output = module(received)
        if not module.is_last:
            for tensor in output:
                dist.send(tensor, ranks.stage_to_global(module.stage_id + 1))
            output = given.x.new_empty(len(given.x), tokens, 4 * 2 * config.in_channels, dtype=torch.float32)
        if module.num_stages > 1:
            last = ranks.stage_to_global(module.num_stages - 1)
            dist.broadcast(output, last, group=ranks.get_pipe_parallel_group())
        return output

    def _gather(self, output: Tensor) -> Tensor:
        """Gathers the sequence, padding included, from its parts [B, n, …] on the sequence ranks."""
        ulysses = self._module.ulysses
        if ulysses.size == 1:
            return output
        parts = [torch.empty_like(output) for _ in range(ulysses.size)]
        dist.all_gather(parts, output, group=ulysses.group)
        return torch.cat(parts, dim=1)
