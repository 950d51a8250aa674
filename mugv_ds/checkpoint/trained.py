"""The checkpoints of a run as sources of averages."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mugv_ds.checkpoint.hf import TrainedLayers
from mugv_ds.checkpoint.store import CheckpointError, read_run_config

_PREFIX = "global_step"


@dataclass(frozen=True)
class Contents:
    """See `average.Summary`."""

    step: int
    kinds: tuple[str, ...] = ("weight",)


class TrainedCheckpoint:
    """The weights of one training checkpoint; see `average.Source`."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.manifest = folder, Contents(step)
        self._layers = TrainedLayers(folder, read_run_config(folder).model.dit().depth)

    def names(self) -> list[str]:
        return list(self._layers)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._layers.meta(name).shape)

    def read(self, name: str, kind: str) -> Tensor:
        return self._layers[name].to(torch.float32)


def open_checkpoint(folder: Path) -> TrainedCheckpoint:
    """The checkpoint in a `global_step<n>` folder.

    Raises:
        CheckpointError: it is none, or not complete.
    """
    number = folder.name.removeprefix(_PREFIX)
    if not folder.is_dir() or not number.isdecimal():
        raise CheckpointError(f"{folder}: is no checkpoint; name folders of the form {_PREFIX}<n>")
    return TrainedCheckpoint(folder, int(number))


def open_run(run: Path) -> list[TrainedCheckpoint]:
    """All checkpoints in a run's folder.

    Raises:
        CheckpointError: there are none, or one is not complete.
    """
    found = [open_checkpoint(path) for path in sorted(run.glob(f"{_PREFIX}*"))]
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoint")
    return found
