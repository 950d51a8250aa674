"""From weights in any form that is read to published-format weights, of the same width or wider."""

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
_ALL_BLOCKS_UP_TO = 1_000_000_000  # parameters of the wide model


def open_weights(path: Path) -> tuple[Weights, DiTConfig]:
    """Weights of a whole DiT, in a published form or a Megatron training checkpoint, and the sizes they have.

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
        preset: what the sizes must be; None: any.
    Returns:
        What was written, and the sizes.
    Raises:
        CheckpointError: see `open_weights` and `save_weights`; or the sizes are not the preset's.
    """
    weights, config = open_weights(path)
    if preset is not None and PRESETS[preset] != config:
        raise CheckpointError(f"{path}: is {preset_of(config) or config}, not {preset}")
    return save_weights(weights, config, out, layout, dtype=dtype), config


@dataclass(frozen=True)
class WideningReport:
    """What was written, its sizes, and how far its output is from the narrow model's over the first `blocks` blocks."""

    path: Path
    config: DiTConfig
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
        path: see `open_weights`. out, layout, dtype: see `save_weights`. noise: see `Noise`.
        check_blocks: blocks that the comparison runs; None: all of a wide model of up to a billion parameters, else 2.
    Raises:
        CheckpointError: see `open_weights` and `save_weights`. InputError: a number is out of its range.
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
    return WideningReport(written, sizes, check_blocks, difference)
