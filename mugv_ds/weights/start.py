"""The weights that a run starts from: published ones, or those of another run's checkpoint."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.reader import CheckpointReader, open_checkpoint
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.weights.base import check_weights
from mugv_ds.weights.published import PublishedWeights, TrainedWeights


def find_start(path: str | Path) -> Path:
    """What `checkpoint.init_from` means: of a run's folder the newest sound checkpoint, else `path` itself.

    Checkpoints are verified, which reads all of their files; so one rank asks and tells the others.

    Raises:
        CheckpointError: it is a run's folder without a sound checkpoint, or a checkpoint that is not sound.
    """
    path = Path(path)
    if (path / files.MANIFEST_NAME).exists() or (path.is_dir() and files.saved_steps(path)):
        with open_checkpoint(path) as saved:
            return saved.folder
    return path


def load_into(path: str | Path, config: DiTConfig, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Copies weights into parts of a DiT of these sizes, each with the prefix of its names.

    All of the weights are held against the sizes first, so that every rank of a pipeline comes to the same verdict.

    Args:
        path: see `find_start`.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or has another shape.
    """
    path = Path(path)
    if (path / files.MANIFEST_NAME).exists():
        weights = TrainedWeights(CheckpointReader(path, files.read_manifest(path)), torch.float32)
    else:
        weights = PublishedWeights(path)
    check_weights(weights, config)
    for prefix, layer in layers:
        layer.load_state_dict({name: weights[prefix + name] for name in layer.state_dict()}, strict=True)


def start_digest(path: str | Path | None, config: TrainConfig) -> str:
    """SHA-256 of the weights' files; of sizes and seed where a run starts from initial weights.

    Args:
        path: see `find_start`, or None.

    Raises:
        CheckpointError: there are no weights at `path`.
    """
    if path is None:
        return hashlib.sha256(f"{config.model.dit()} {config.data.seed}".encode()).hexdigest()
    manifest = Path(path) / files.MANIFEST_NAME
    whole = hashlib.sha256()
    for file in [manifest] if manifest.exists() else PublishedWeights(path).files:  # a manifest has its files' hashes
        with file.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()
