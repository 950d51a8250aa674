"""Trains as `mugv_ds/train.py` does, and dies by SIGKILL at the n-th call of what the environment names."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mugv_ds import train
from mugv_ds.config.command import leave
from mugv_ds.engine.evaluate.evaluate import Evaluator
from mugv_ds.engine.loop import Trainer
from mugv_ds.engine.reward import rounds

PLACES: dict[str, tuple[Any, str]] = {
    "rollout": (rounds, "write_rollout"),
    "video": (rounds, "write_mp4"),
    "reward": (rounds, "ask"),
    "old_policy": (Evaluator, "losses"),
    "step": (Trainer, "_train_step"),
}


def dying(function: Callable, at: int) -> Callable:
    calls = 0

    def call(*args, **options):
        nonlocal calls
        calls += 1
        if calls == at:
            Path(os.environ["MUGV_TEST_DIED"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    return call


if __name__ == "__main__":
    name, number = os.environ["MUGV_TEST_DIE_AT"].split()
    owner, attribute = PLACES[name]
    setattr(owner, attribute, dying(getattr(owner, attribute), int(number)))
    leave(train.main())
