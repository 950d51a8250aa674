"""Where a run's wall time goes, over all its starts: `goodput.jsonl` in `logging.dir`, a line for each step.

Goodput is the share of the time that is spent in steps which became part of the model.
"""

import json
import os
import time
from array import array
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular
from mugv_ds.engine.optional import OptionalOutput

NAME = "goodput.jsonl"
STALLED = 2.0  # a step of so many medians of its kind has stalled
_OTHER = "other"
_MOST_BYTES = 1 << 30
# What totals begin with, in their order; phases follow.
_OF_STEPS = ("useful", "compile", "stalled", "skipped", "replayed")


class _Alike(NamedTuple):
    """Steps of one kind that were taken. is_first: of its kind in its process, which compiles."""

    seconds: array
    applied: array
    is_first: array

    @classmethod
    def none(cls) -> "_Alike":
        return cls(array("d"), array("b"), array("b"))


class Account:
    """Adds up the lines of a run.

    Attributes:
        starts: processes, one after the other. steps: that are part of the run's end.
    """

    def __init__(self) -> None:
        self.starts = 0
        self._phases: dict[str, float] = {}
        self._taken: list[tuple[int, str]] = []  # steps and their kinds
        self._by_kind: defaultdict[str, _Alike] = defaultdict(_Alike.none)
        self._met: set[str] = set()  # kinds that this process has taken
        self._replayed = 0.0
        self._began: float | None = None
        self._last = 0.0

    @property
    def steps(self) -> int:
        return len(self._taken)

    @property
    def wall(self) -> float:
        """Returns the seconds from the start of the first process to the last line."""
        return 0.0 if self._began is None else self._last - self._began

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        event, at, step = line["event"], float(line["at"]), int(line["step"])
        seconds = {str(name): float(value) for name, value in line["seconds"].items()}
        if event == "start":
            began = float(line["began"])
            self._count("down", 0.0 if self._began is None else began - self._last)
            self._began = began if self._began is None else self._began
            self.starts += 1
            self._met = set()
        if event in ("start", "back"):
            while self._taken and self._taken[-1][0] > step:
                _, kind = self._taken.pop()
                again, *_ = (column.pop() for column in self._by_kind[kind])
                self._replayed += again
        if event == "step":
            kind = str(line["kind"])
            facts = seconds.pop("step"), bool(line["applied"]), kind not in self._met
            for column, fact in zip(self._by_kind[kind], facts, strict=True):
                column.append(fact)
            self._taken.append((step, kind))
            self._met.add(kind)
        for name, value in seconds.items():
            self._count(name, value)
        self._last = at

    def _count(self, phase: str, seconds: float) -> None:
        self._phases[phase] = self._phases.get(phase, 0.0) + seconds

    def totals(self) -> dict[str, float]:
        """Returns the seconds by what they were spent on; they add up to `wall`.

        useful: steps that are part of the run's end, each at most as long as `STALLED` medians of its kind.
        compile: what the first step of a kind in a process took longer than their median. stalled: likewise, what a
        step of more than `STALLED` medians did. skipped: steps without an update. replayed: steps that were taken
        again. down: from a process's last line to the next one's start. The others are phases between steps.
        """
        totals = dict.fromkeys(_OF_STEPS, 0.0) | {"replayed": self._replayed}
        for alike in self._by_kind.values():
            seconds = np.array(alike.seconds)
            applied, is_first = (np.array(column, bool) for column in (alike.applied, alike.is_first))
            totals["skipped"] += float(seconds[~applied].sum())
            lost = {}
            if not is_first.all():
                median = np.median(seconds[~is_first])
                beyond = np.maximum(seconds - median, 0.0) * applied
                lost["compile"] = float(beyond[is_first].sum())
                lost["stalled"] = float(beyond[~is_first & (seconds > STALLED * median)].sum())
            for why, value in lost.items():
                totals[why] += value
            totals["useful"] += float(seconds[applied].sum()) - sum(lost.values())
        return totals | self._phases


class Timeline:
    """Notes what this process does; rank 0 writes it down, on the others nothing happens.

    It is always in one phase, at first in "start", which began with the process.

    Args:
        folder: `logging.dir`. rank: global rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path, self._rank = folder / NAME, rank
        self._output = OptionalOutput(str(self._path))
        age = process_age()
        self._began, self._clock = time.time() - age, time.perf_counter() - age
        self._since = self._clock
        self._phases, self._seconds = ["start"], {}
        self._account, self._step = Account(), 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is of this phase, and not of the one around it."""
        self._switch()
        self._phases.append(name)
        try:
            yield
        finally:
            self._switch()
            self._phases.pop()

    def _switch(self) -> None:
        now = time.perf_counter()
        name = self._phases[-1]
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now

    def started(self, step: int, restored: float = 0.0) -> None:
        """Notes that steps begin after `step` of them. restored: seconds in which a checkpoint was loaded.

        What is in the file is gone on with, but by a run that starts afresh.
        """
        if self._rank == 0 and self._path.exists():
            self._output.attempt(self._path.unlink if step == 0 else self._go_on)
        self._switch()
        self._phases[0] = _OTHER
        self._seconds["start"] -= restored
        self._seconds["restore"] = restored
        self._write("start", step, began=round(self._began, 3))

    def step(self, step: int, kind: str, applied: bool) -> None:
        """Notes that the phase "step" took the `step`-th one. kind: alike for steps that take equally long."""
        self._write("step", step, kind=kind, applied=applied)

    def went_back(self, step: int) -> None:
        """Notes that the run goes on after `step` steps once more."""
        self._write("back", step)

    def ended(self) -> None:
        """Notes the end of this process's part."""
        self._write("end", self._step)

    def scalars(self) -> dict[str, float]:
        """Returns the shares of the run's wall time until now, of all its starts, on rank 0."""
        wall = self._account.wall
        return {f"goodput/{name}": seconds / wall for name, seconds in self._account.totals().items()} if wall else {}

    def _write(self, event: str, step: int, **facts: Any) -> None:
        self._switch()
        seconds, self._seconds, self._step = self._seconds, {}, step
        if self._rank != 0:
            return
        at = self._began + self._since - self._clock
        rounded = {name: round(value, 6) for name, value in seconds.items()}
        line = {"event": event, "at": round(at, 3), "step": step, **facts, "seconds": rounded}
        self._account.add(line)
        self._output.attempt(lambda: self._append(json.dumps(line) + "\n"))

    def _go_on(self) -> None:
        """Takes in what earlier processes wrote, and takes off a line that was cut off."""
        try:
            self._account = read_account(self._path)
        except InputError as error:
            raise OSError(str(error)) from None
        with self._path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)

    def _append(self, text: str) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(text)


def process_age() -> float:
    """Returns the seconds since this process was started, to a hundredth: by /proc/self/stat, see proc(5)."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def read_account(path: Path) -> Account:
    """Returns the account of a run; a last line that was cut off when its process was killed is left out.

    Raises:
        InputError: the file is none of a run's. FileNotFoundError: there is none.
    """
    with open_regular(path) as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise InputError(f"{path}: more than {_MOST_BYTES:,} bytes")
    account = Account()
    *lines, _ = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            account.add(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is none of a run's: {error!r}") from None
    return account
