"""Converts weights in any form that can be read to published-format weights, of the same width or wider."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mugv_ds.config import InputError
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import PRESETS, DiTConfig
from mugv_ds.weights.base import Weights, check_weights, infer_sizes, meta_state, preset_of
from mugv_ds.weights.megatron import find_megatron, open_megatron
from mugv_ds.weights.published import PublishedWeights
from mugv_ds.weights.save import Layout, save_weights
from mugv_ds.weights.widen import Noise, Widened, output_difference, widened_sizes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_ALL_BLOCKS_UP_TO = 1_000_000_000  # parameters of the wide model up to which the comparison runs all of its blocks


def open_weights(path: Path) -> tuple[Weights, DiTConfig]:
    """Opens the weights of a whole DiT, in a published form or a Megatron training checkpoint.

    Returns:
        The weights, whose tensors are read when they are asked for, and their sizes.

    Raises:
        CheckpointError: there are none at `path`, they cannot be read, or they are not those of a DiT.
    """
    folder = find_megatron(path)
    weights = PublishedWeights(path) if folder is None else open_megatron(folder)
    config = infer_sizes(weights)
    check_weights(weights, config)
    return weights, config


def import_weights(
    path: Path,
    out: Path,
    *,
    layout: Layout = "safetensors",
    dtype: torch.dtype | None = None,
    preset: str | None = None,
) -> tuple[Path, DiTConfig]:
    """Checks weights in any form and writes them in a published one, which `checkpoint.init_from` takes.

    Args:
        path: see `open_weights`. out, layout, dtype: see `save_weights`.
        preset: name of the preset that the sizes must be; None for any sizes.
    Returns:
        What to open, the file or folder that was written; and the sizes.
    Raises:
        CheckpointError: see `open_weights` and `save_weights`; also if the sizes are not the preset's.
    """
    weights, config = open_weights(path)
    if preset is not None and PRESETS[preset] != config:
        raise CheckpointError(f"{path}: is {preset_of(config) or config}, not {preset}")
    return save_weights(weights, config, out, layout, dtype=dtype), config


@dataclass(frozen=True)
class WideningReport:
    """What `widen_weights` did.

    Attributes:
        path: what was written. config: its sizes. narrow_width: of the model before.
        blocks: how many blocks, from the first on, were compared with the narrow model's.
        difference: relative distance of the outputs, see `output_difference`.
    """

    path: Path
    config: DiTConfig
    narrow_width: int
    blocks: int
    difference: float


def widen_weights(
    path: Path,
    out: Path,
    *,
    factor: int,
    noise: Noise,
    layout: Layout = "safetensors",
    dtype: torch.dtype = torch.float32,
    check_blocks: int | None = None,
) -> WideningReport:
    """Writes the weights of a DiT `factor` times as wide, and compares what was written with the narrow model.

    Args:
        path: see `open_weights`. out, layout, dtype: see `save_weights`.
        factor: e, at least 2. noise: see `Noise`.
        check_blocks: blocks that the comparison runs; None for all of a wide model of up to a billion parameters, and
            2 of a larger one.
    Raises:
        CheckpointError: see `open_weights` and `save_weights`.
        InputError: the factor or `check_blocks` is out of its range.
    """
    narrow, config = open_weights(path)
    widened, sizes = Widened(narrow, factor, noise), widened_sizes(config, factor)
    if check_blocks is None:
        parameters = sum(value.numel() for value in meta_state(sizes).values())
        check_blocks = config.depth if parameters <= _ALL_BLOCKS_UP_TO else min(2, config.depth)
    if not 1 <= check_blocks <= config.depth:
        raise InputError(f"{check_blocks} blocks to check: must be 1 to {config.depth}, the model's depth")
    written = save_weights(widened, sizes, out, layout, dtype=dtype)
    difference = output_difference(narrow, PublishedWeights(written), config, factor, check_blocks)
    return WideningReport(written, sizes, config.hidden_size, check_blocks, difference)
