"""The checkpoints of a run as sources of averages."""

from pathlib import Path

import torch
from torch import Tensor

from mugv_ds.checkpoint.hf import TrainedLayers
from mugv_ds.checkpoint.store import CheckpointError, read_run_config

_PREFIX = "global_step"


class TrainedCheckpoint:
    """The weights of one training checkpoint; see `average.Source`.

    Raises:
        CheckpointError: the folder is no checkpoint of ours.
    """

    kinds = ("weight",)

    def __init__(self, path: Path) -> None:
        number = path.name.removeprefix(_PREFIX)
        if not path.is_dir() or not number.isdecimal():
            raise CheckpointError(f"{path}: is no checkpoint; name folders of the form {_PREFIX}<n>")
        self.path, self.step, self.model = path, int(number), read_run_config(path).model
        self._layers = TrainedLayers(path, self.model.dit().depth)

    def names(self) -> list[str]:
        return list(self._layers)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._layers.meta(name).shape)

    def read(self, name: str, kind: str) -> Tensor:
        return self._layers[name].to(torch.float32)


def checkpoints_of(run: Path) -> list[TrainedCheckpoint]:
    """All checkpoints in a run's folder.

    Raises:
        CheckpointError: there are none.
    """
    found = [TrainedCheckpoint(path) for path in sorted(run.glob(f"{_PREFIX}*"))]
    if not found:
        raise CheckpointError(f"{run}: holds no checkpoint")
    return found
