"""Starts runs with a fault in them and collects what they did.

Ranks are forked from a server that has imported everything, so that a run costs seconds. What a rank does beside
training, being watched and being hurt, is put around the code from here: production code has no hooks.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.helpers.distributed import free_port, set_environment

PATIENCE = 150.0  # seconds that a run may take on a busy machine
STEPS = 10
SHAPES = [(2, 4, 6), (1, 4, 4)] * 5 + [(2, 4, 6)]

Fault = Callable[[int], None]  # called with the rank before training; patches what it wants

_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Step:
    """A step as one rank saw it. loss: as hex, so that equal is bitwise equal. noise: digest of the target."""

    step: int
    position: int
    loss: str
    noise: str
    at: float


@dataclass
class Done:
    """A finished run."""

    folder: Path
    codes: list[int]
    output: str
    seconds: float
    began: float

    def steps(self, rank: int = 0) -> dict[int, Step]:
        """The last time each step was taken, over all runs in the folder."""
        file = self.folder / f"steps-{rank}.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return {step.step: step for step in (Step(**json.loads(line)) for line in lines)}

    def losses(self) -> list[tuple[int, str]]:
        """(data step, loss) of each step."""
        return [(step.position, step.loss) for _, step in sorted(self.steps().items())]

    def weights(self) -> list[str]:
        """Digest of the weights and the optimizer's state of each rank, at the end."""
        return [(self.folder / f"weights-{rank}").read_text() for rank in range(len(self.codes))]

    def incidents(self, *events: str) -> list[dict]:
        """The recorded incidents of these kinds; all, if none is named."""
        file = self.folder / "checkpoints" / "incidents.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [line for line in lines if not events or line["event"] in events]

    def restarted_in(self) -> float:
        """Seconds from the start of this run to the end of its first step."""
        return min(step.at for step in self.steps().values() if step.at > self.began) - self.began


class Run:
    """A run of `world` ranks; `faults[i]` is done to rank i before it trains.

    Args:
        config: file of its config. overrides: as on the command line, for all ranks or a list for each.
    """

    def __init__(
        self,
        config: Path,
        world: int,
        *overrides: str,
        faults: dict[int, Fault] | None = None,
        only: dict[int, Sequence[str]] | None = None,
    ) -> None:
        self.folder, self.began = config.parent, time.time()
        self._log = self.folder / f"output-{time.time_ns()}"
        self._log.touch()
        port = free_port()
        self.ranks: list[BaseProcess] = []
        for rank in range(world):
            arguments = [a for override in (*overrides, *(only or {}).get(rank, ())) for a in ("--set", override)]
            task = (rank, world, port, self._log, ["--config", str(config), *arguments], (faults or {}).get(rank))
            self.ranks.append(_context.Process(target=_rank, args=task))
            self.ranks[-1].start()

    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Until something holds; fails when the run is over first."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline and any(rank.is_alive() for rank in self.ranks), self.output()
            time.sleep(0.02)

    def taken(self, rank: int = 0) -> int:
        """Steps this rank has taken in the folder, those taken again included."""
        file = self.folder / f"steps-{rank}.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def finish(self, stopped: Sequence[int] = (), patience: float = PATIENCE) -> Done:
        """Waits for the ranks, at most `patience` seconds; those in `stopped` are killed once the others have ended."""
        deadline = time.monotonic() + patience
        for number, rank in enumerate(self.ranks):
            if number not in stopped:
                rank.join(max(deadline - time.monotonic(), 0))
        late = [rank for rank in self.ranks if rank.is_alive()]
        for rank in late:
            rank.kill()
            rank.join()
        assert len(late) == len(stopped), f"hung:\n{self.output()}"
        codes = [rank.exitcode for rank in self.ranks]
        return Done(self.folder, codes, self.output(), time.time() - self.began, self.began)


def run(config: Path, world: int, *overrides: str, faults=None, only=None) -> Done:
    """A run from start to end; see `Run`."""
    return Run(config, world, *overrides, faults=faults, only=only).finish()


def _rank(rank: int, world: int, port: int, log: Path, arguments: list[str], fault: Fault | None) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_environment(rank, world, port)
    from mugv_ds import train
    from tests.faults import observe

    observe.steps(rank)
    if fault is not None:
        fault(rank)
    train.leave(train.main(arguments))


def digest(tensors) -> str:
    """SHA-256 of the bytes of tensors, in order."""
    import torch

    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
