"""From weights in any form that is read to published-format weights."""

from pathlib import Path

import torch

from mugv_ds.checkpoint.hf import PublishedWeights
from mugv_ds.checkpoint.megatron import find_megatron, open_megatron
from mugv_ds.checkpoint.save import Layout, save_weights
from mugv_ds.checkpoint.store import CheckpointError
from mugv_ds.checkpoint.weights import Weights, check_weights, infer_sizes, preset_of
from mugv_ds.config.model import PRESETS, DiTConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
