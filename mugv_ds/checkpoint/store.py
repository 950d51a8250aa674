"""Saving and resuming a run through DeepSpeed.

A run's folder holds `global_step<n>/` for each checkpoint and `latest`, which names the newest. The state of the data
is the number of steps taken: order and randomness are functions of it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from pydantic import ValidationError

from mugv_ds.config.errors import InputError, TrainingError
from mugv_ds.config.schema import TrainConfig

CONFIG_NAME = "run_config.json"
_LATEST = "latest"


class CheckpointError(InputError):
    """A checkpoint that cannot be used. The message names the file or folder and what to do."""


def newest(run_dir: Path) -> Path | None:
    """The folder of the newest checkpoint in `run_dir`, or None if the run has none.

    Raises:
        CheckpointError: `latest` is missing beside checkpoints, or does not name one of them.
    """
    saved = sorted(path.name for path in run_dir.glob("global_step*"))
    latest = run_dir / _LATEST
    if not latest.is_file():
        if saved:
            raise CheckpointError(f"{latest}: missing, but there are {', '.join(saved)}; write the one to use into it")
        return None
    tag = latest.read_text().strip()
    if tag not in saved:
        raise CheckpointError(f"{latest}: names {tag!r}, which is not one of {', '.join(saved) or 'no checkpoints'}")
    return run_dir / tag


class Store:
    """The checkpoints of one run.

    Args:
        config: of the run; it is kept beside each checkpoint, so that a checkpoint can be read without the run.
        engine: whose state is saved and loaded.
    """

    def __init__(self, config: TrainConfig, engine: PipelineEngine) -> None:
        self._config, self._engine = config, engine
        self.dir = Path(config.checkpoint.dir)
        self.state: dict[str, Any] = {}  # what was saved with the checkpoint that was loaded

    def poll(self) -> None:
        """Nothing is saved in the background."""

    wait = poll

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Saves the state after `step` steps, and `state`, of plain values, with it. All ranks call it."""
        tag = f"global_step{step}"
        client_state = {"step": step, "loop": state}
        self._engine.save_checkpoint(str(self.dir), tag=tag, client_state=client_state, save_latest=False)
        if dist.get_rank() == 0:
            (self.dir / tag / CONFIG_NAME).write_text(self._config.model_dump_json(indent=2))
        dist.barrier()  # `latest` moves only when every rank has written
        if dist.get_rank() == 0:
            beside = self.dir / f"{_LATEST}.tmp"
            beside.write_text(tag)
            beside.replace(self.dir / _LATEST)

    def resume(self) -> int:
        """Loads the newest checkpoint as `checkpoint.resume` says; returns the steps it has taken, 0 for a fresh start.

        Raises:
            CheckpointError: a checkpoint is wanted and there is none, there is one and none may be, or another layout
                saved it.
        """
        mode, found = self._config.checkpoint.resume, newest(self.dir)
        if found is None:
            if mode == "must":
                raise CheckpointError(f"{self.dir}: no checkpoint, and checkpoint.resume is 'must'")
            return 0
        if mode == "never":
            raise CheckpointError(
                f"{self.dir}: holds {found.name}, and checkpoint.resume is 'never'; use another folder"
            )
        return self._load(found)

    def restore(self, before: int) -> int:
        """Loads the newest checkpoint of fewer than `before` steps; returns the steps it has taken.

        Raises:
            TrainingError: there is none.
        """
        steps = (int(path.name.removeprefix("global_step")) for path in self.dir.glob("global_step*"))
        newest = max((step for step in steps if step < before), default=None)
        if newest is None:
            raise TrainingError(f"{self.dir}: has no checkpoint of before step {before} to go back to")
        return self._load(self.dir / f"global_step{newest}")

    def _load(self, found: Path) -> int:
        _check_layout(found, self._engine)
        with _trusting_no_pickle():
            path, state = self._engine.load_checkpoint(str(self.dir), tag=found.name)
        if path is None:
            raise CheckpointError(f"{found}: DeepSpeed could not load it")
        self.state = state["loop"]
        return int(state["step"])


def _check_layout(checkpoint: Path, engine: PipelineEngine) -> None:
    """DeepSpeed loads optimizer shards on as many ranks and stages as saved them."""
    saved_replicas = len(list(checkpoint.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")))
    saved_stages = len(list(checkpoint.glob("mp_rank_*_model_states.pt")))
    if (saved_replicas, saved_stages) != (engine.dp_world_size, engine.num_stages):
        raise CheckpointError(
            f"{checkpoint}: was saved by {saved_replicas} data × sequence ranks and {saved_stages} pipeline stages, "
            f"this run has {engine.dp_world_size} and {engine.num_stages}; start it as it was, or convert the weights "
            "and start another run from them with checkpoint.init_from"
        )


@contextlib.contextmanager
def _trusting_no_pickle() -> Iterator[None]:
    """torch.load inside DeepSpeed takes tensors, plain values and the three classes its shards hold; nothing else."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([fragment_address, LossScaler, ZeroStageEnum]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def read_run_config(checkpoint: Path) -> TrainConfig:
    """The config kept beside a checkpoint.

    Raises:
        CheckpointError: the folder is no checkpoint of ours.
    """
    path = checkpoint / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {checkpoint} is not a checkpoint of a training run")
    try:
        return TrainConfig.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {key}: {first['msg']}; it was not written by this version") from None
