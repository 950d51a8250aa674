"""The weights that a run starts from: published ones, or those of another run's checkpoint."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import StartWeights
from mugv_ds.checkpoint.reader import CheckpointReader, open_checkpoint
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.text_encoder import TextEncoderInfo, agree
from mugv_ds.models.dit import init_weights
from mugv_ds.weights.base import Weights, check_weights
from mugv_ds.weights.published import PublishedWeights, TrainedWeights

Layers = Iterable[tuple[str, nn.Module]]
First = Callable[[Callable[[], Any]], Any]  # calls a function on rank 0 and gives its result to all


def saved_start(config: TrainConfig) -> dict[str, Any] | None:
    """Returns the weights that the run in `checkpoint.dir` started from, as its newest checkpoint says; None: none is.

    Raises:
        CheckpointError: another version wrote the checkpoint.
    """
    manifest = files.newest_manifest(Path(config.checkpoint.dir))
    return None if manifest is None else manifest.start.model_dump()


def find_weights(config: TrainConfig, saved: dict[str, Any] | None, first: First) -> StartWeights:
    """Returns the weights that a run starts from, resolved, or those that it has started from.

    `checkpoint.init_from` may be a folder that holds newer checkpoints by now, so a run that goes on keeps to what its
    checkpoint says. The digest is computed where a preference run has to know its reference.

    Args:
        saved: see `saved_start`. first: called for what reads files, so that one rank does.

    Raises:
        CheckpointError: there are no sound weights.
    """
    if saved is not None:
        return StartWeights(**saved)
    init = config.checkpoint.init_from
    path = init and first(lambda: str(find_start(init)))
    digest = None if config.preference is None else first(lambda: start_digest(path, config))
    return StartWeights(path=path, digest=digest)


@dataclass(frozen=True)
class FrozenWeights:
    """The weights that a run started from, as the reference that they stay while the policy learns.

    Args:
        start: see `find_weights`. config: the run.
    """

    start: StartWeights
    config: TrainConfig

    @property
    def digest(self) -> str:
        """SHA-256 of the weights; see `start_digest`."""
        return self.start.digest

    def check(self) -> None:
        """Reads the weights' files once and compares them with what they were when the run started.

        Raises:
            CheckpointError: they are gone, or are others now.
        """
        if self.start.path is None:
            return
        remedy = "restore them, or name reference files that hold all visits (make reference CONFIG=…)"
        if not Path(self.start.path).exists():
            raise CheckpointError(f"{self.start.path}: the weights that the run started from are gone; {remedy}")
        if start_digest(self.start.path, self.config) != self.digest:
            raise CheckpointError(f"{self.start.path}: not the weights that the run started from any more; {remedy}")

    def distance(self, pieces: Iterable[tuple[str, int, Tensor]]) -> tuple[float, float]:
        """Returns Σ ‖θ − θ_start‖² and Σ ‖θ_start‖² over pieces of parameters.

        Args:
            pieces: name, first element of the flattened parameter, and the elements as they are now, fp32 [n].

        Raises:
            CheckpointError: the weights are gone, or do not fit.
        """
        weights, moved, size = _open(Path(self.start.path)), 0.0, 0.0
        for name, first, now in pieces:
            start = weights[name].flatten()[first : first + now.numel()].to(now)
            moved += float((now - start).square().sum(dtype=torch.float64))
            size += float(start.square().sum(dtype=torch.float64))
        return moved, size

    def put_in(self, layers: Layers) -> None:
        """Puts them into parts of a DiT, each with the prefix of its names; see `load_into` for the errors."""
        if self.start.path is not None:
            load_into(self.start.path, self.config.model.dit(), layers)
            return
        for prefix, layer in layers:
            init_weights(layer, prefix, self.config.data.seed)


def find_start(path: str | Path) -> Path:
    """What `checkpoint.init_from` means: of a run's folder the newest sound checkpoint, else `path` itself.

    Of a checkpoint the weights' files are verified, which reads them; so one rank asks and tells the others.

    Raises:
        CheckpointError: it is a run's folder without a sound checkpoint, or a checkpoint that is not sound.
    """
    path = Path(path)
    if (path / files.MANIFEST_NAME).exists() or (path.is_dir() and files.saved_steps(path)):
        with open_checkpoint(path) as saved:
            return saved.folder
    return path


def load_into(path: str | Path, config: DiTConfig, layers: Layers) -> None:
    """Copies weights into parts of a DiT of these sizes, each with the prefix of its names.

    All of the weights are held against the sizes first, so that every rank of a pipeline comes to the same verdict.

    Args:
        path: see `find_start`.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or has another shape.
    """
    weights = _open(Path(path))
    check_weights(weights, config)
    for prefix, layer in layers:
        layer.load_state_dict({name: weights[prefix + name] for name in layer.state_dict()}, strict=True)


def check_start_features(path: str | Path, text_encoder: TextEncoderInfo | None) -> None:
    """Compares what made the text features of a run with those that its first weights were trained on.

    Args:
        path: see `find_start`. text_encoder: of the run's data, if they say.

    Raises:
        CheckpointError: they are of different encoders.
    """
    agree(
        {f"checkpoint.init_from = {path}": _open(Path(path)).text_encoder, "the data": text_encoder},
        "make the features anew, or set checkpoint.accept_changed_data to train with others from here on",
        CheckpointError,
    )


def _open(path: Path) -> Weights:
    if (path / files.MANIFEST_NAME).exists():
        return TrainedWeights(CheckpointReader(path, files.read_manifest(path)), torch.float32)
    return PublishedWeights(path)


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
    held = [manifest] if manifest.exists() else PublishedWeights(path).files  # a manifest has its files' hashes
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets the interpreter go
        return hashlib.sha256(b"".join(pool.map(_sha256, held))).hexdigest()


def _sha256(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
