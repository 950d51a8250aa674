"""The weights that a run starts from: published ones, or those of another run's checkpoint."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import StartWeights
from mugv_ds.checkpoint.places import newest_manifest
from mugv_ds.checkpoint.reader import open_checkpoint
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.text_encoder import TextEncoderInfo, agree
from mugv_ds.config.url import is_url
from mugv_ds.models.dit import init_weights
from mugv_ds.models.lora import is_factor
from mugv_ds.weights.base import check_weights
from mugv_ds.weights.located import located, resolved
from mugv_ds.weights.lora import check_base, check_start, load_adapter, open_start, weights_digest

Layers = Iterable[tuple[str, nn.Module]]
First = Callable[[Callable[[], Any]], Any]  # calls a function on rank 0 and gives its result to all


def saved_start(config: TrainConfig) -> dict[str, Any] | None:
    """Returns the weights that the run in `checkpoint.dir` started from, as its newest checkpoint says; None: none is.

    Raises:
        CheckpointError: another version wrote the checkpoint.
    """
    manifest = newest_manifest(config.checkpoint)
    return None if manifest is None else manifest.start.model_dump()


def find_weights(config: TrainConfig, saved: dict[str, Any] | None, first: First) -> StartWeights:
    """Returns the weights that a run starts from, resolved, or those that it has started from.

    `checkpoint.init_from` may be a folder that holds newer checkpoints by now, so a run that goes on keeps to what its
    checkpoint says. The digest is computed where a run has to know them later: as its reference, or as its base.

    Args:
        saved: see `saved_start`. first: called for what reads files, so that one rank does.

    Raises:
        CheckpointError: there are no sound weights.
    """
    if saved is not None:
        return StartWeights(**saved)
    init = config.checkpoint.init_from
    path = init and first(lambda: str(find_start(init)))
    digest = None if config.preference is None and config.lora is None else first(lambda: start_digest(path, config))
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
        if self.start.path is not None:
            check_start(
                self.start, "restore them, or name reference files that hold all visits (make reference CONFIG=…)"
            )

    def distance(self, pieces: Iterable[tuple[str, int, Tensor]]) -> tuple[float, float]:
        """Returns Σ ‖θ − θ_start‖² and Σ ‖θ_start‖² over pieces of parameters.

        Args:
            pieces: name, first element of the flattened parameter, and the elements as they are now, fp32 [n].

        Raises:
            CheckpointError: the weights are gone, or do not fit.
        """
        weights, moved, size = open_start(located(self.start.path)), 0.0, 0.0
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
            init_weights(layer, prefix, self.config.data.seed, self.config.widths)


def check_resumed_base(start: StartWeights, config: TrainConfig) -> None:
    """Checks that the weights that a run with adapters started from, and now loads again, are what they were.

    Raises:
        CheckpointError: they are gone, or are others now.
    """
    if start.path is not None:
        check_start(start, "restore them: the run's checkpoints hold adapters alone")
    elif start_digest(None, config) != start.digest:
        raise CheckpointError(
            f"{config.checkpoint.dir}: the run started from initial weights of another data.seed, and its checkpoints "
            "hold adapters alone; set data.seed as it was"
        )


def put_start(start: StartWeights, config: TrainConfig, fresh: bool) -> Callable[[Layers], None] | None:
    """Returns what puts the weights that a run starts with into parts of a DiT; None: initial ones stay.

    Args:
        fresh: whether no checkpoint follows. One holds all weights, but of a run with adapters the adapters alone.
    """
    dit, lora = config.model.dit(), config.lora
    base = start.path if fresh or lora is not None else None
    adapter = lora.init_from if fresh and lora is not None else None
    if base is None and adapter is None:
        return None

    def put(layers: Layers) -> None:
        layers = list(layers)
        if base is not None:
            load_into(base, dit, layers)
        if adapter is not None:
            load_adapter(adapter, dit, lora, layers)

    return put


def find_start(path: str | Path) -> Path | str:
    """What `checkpoint.init_from` means: of a run's folder or URL the newest sound checkpoint, else `path` itself.

    Of a checkpoint the weights' files are verified, which reads them; so one rank asks and tells the others. Where it
    holds adapters, so is their base.

    Raises:
        CheckpointError: it is a run's folder without a sound checkpoint, or a checkpoint that is not sound.
    """
    if is_url(path):
        url = resolved(str(path))
        if (manifest := located(url) / files.MANIFEST_NAME).exists():
            check_base(files.read_manifest(manifest.parent))
        return url
    path = Path(path)
    if (path / files.MANIFEST_NAME).exists() or (path.is_dir() and files.saved_steps(path)):
        with open_checkpoint(path) as saved:
            check_base(saved.manifest)
            return saved.folder
    return path


def load_into(path: str | Path, config: DiTConfig, layers: Layers) -> None:
    """Copies weights into parts of a DiT of these sizes, each with the prefix of its names. Adapters stay as they are.

    All of the weights are held against the sizes first, so that every rank of a pipeline comes to the same verdict.

    Args:
        path: see `find_start`.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or has another shape.
    """
    weights = open_start(located(path))
    check_weights(weights, config)
    for prefix, layer in layers:
        own = layer.state_dict()
        state = {name: value if is_factor(name) else weights[prefix + name] for name, value in own.items()}
        layer.load_state_dict(state, strict=True)


def check_start_features(path: str | Path, text_encoder: TextEncoderInfo | None) -> None:
    """Compares what made the text features of a run with those that its first weights were trained on.

    Args:
        path: see `find_start`. text_encoder: of the run's data, if they say.

    Raises:
        CheckpointError: they are of different encoders.
    """
    agree(
        {f"checkpoint.init_from = {path}": open_start(located(path)).text_encoder, "the data": text_encoder},
        "make the features anew, or set checkpoint.accept_changed_data to train with others from here on",
        CheckpointError,
    )


def start_digest(path: str | Path | None, config: TrainConfig) -> str:
    """SHA-256 of the weights' files; where a run starts from initial weights, of what these are a function of.

    Args:
        path: see `find_start`, or None.

    Raises:
        CheckpointError: there are no weights at `path`.
    """
    if path is None:
        drawn_by = f"{config.model.dit()} {config.data.seed}" + (f" {config.widths}" if config.widths else "")
        return hashlib.sha256(drawn_by.encode()).hexdigest()
    return weights_digest(located(path))
