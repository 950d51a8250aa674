"""Watches a rank train: what it read, what the loss was, what it holds in the end. Imported before ranks are forked."""

import json
import time
from pathlib import Path

from mugv_ds import train  # noqa: F401
from mugv_ds.checkpoint import store  # noqa: F401
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.loop import Trainer
from tests.faults.runs import digest


def steps(rank: int) -> None:
    """Every step is appended to `steps-<rank>.jsonl` in the run's folder, the last state goes to `weights-<rank>`."""
    train_step, run, share = Trainer._train_step, Trainer.run, Feed._share
    noise = []

    def watched_share(self, batches, shape, size):
        batch = share(self, batches, shape, size)
        noise.append(batch.target)
        return batch

    def watched_step(self, step, batches, recorder):
        noise.clear()
        position = self.guard.history.position(step)
        taken = train_step(self, step, batches, recorder)
        line = {"step": step, "position": position, "loss": taken.loss.hex(), "noise": digest(noise), "at": time.time()}
        with _file(self, f"steps-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return taken

    def watched_run(self, *args):
        stopped = run(self, *args)
        optimizer = self.engine.optimizer.optimizer
        states = [value for state in optimizer.state.values() for _, value in sorted(state.items())]
        masters = [part for group in optimizer.param_groups for part in group["params"]]
        _file(self, f"weights-{rank}").write_text(digest([*self.engine.module.parameters(), *masters, *states]))
        return stopped

    Feed._share, Trainer._train_step, Trainer.run = watched_share, watched_step, watched_run


def _file(trainer: Trainer, name: str) -> Path:
    return trainer.config.checkpoint.folder.parent / name
