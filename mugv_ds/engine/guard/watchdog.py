"""Ends a run in which some rank has stopped: ranks that wait for it in a collective would wait for ever.

Two threads a rank. One tells the others, through the store of torch.distributed, that this rank lives and, once it is
late for its next step boundary, where its main thread is; only then does it read what the others tell. The other thread
looks whether the main thread still moves and ends the process if it does not; the main thread could not, being inside a
collective, nor the first thread, being inside a store whose host may be stopped.

When one rank hangs all of them are late, as none passes a boundary without the others. So while a run is well each rank
writes a few bytes a beat and reads nothing.
"""

import json
import os
import sys
import threading
import time
import traceback
from typing import Any, Protocol

import torch.distributed as dist

from mugv_ds.config.command import leave
from mugv_ds.config.console import say
from mugv_ds.config.errors import Status

_BEATS = 10  # a time-out
_STALE_BEATS = 5  # missed by a rank that is taken to be stopped or gone
_LISTEN_BEATS = _STALE_BEATS + 2  # before the time-out: long enough to see who misses them
_LONGEST_BEAT = 10.0  # seconds
_LOOK_EVERY = 0.05  # seconds; so closely together the ranks see it
_LINGER_BEATS, _LEAST_LINGER = 2, 3.0  # and seconds: for a rank of a busy machine that sees it later
_WAITING = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")


class Host(Protocol):
    """Collectives of all ranks on the host; see `engine.process.HostGroup`."""

    rank: int

    def gather(self, value: Any) -> list[Any]: ...


class Watchdog:
    """The watchdog of one rank. All ranks make it together.

    Args:
        host: of all ranks. name: what to call this one.
        timeout_s: seconds without `reached` after which the run is taken to hang.
        mark: what `reached` counts. status: that the process then ends with.
    """

    def __init__(
        self, host: Host, name: str, timeout_s: float, *, mark: str = "step", status: Status = Status.AGAIN
    ) -> None:
        self._rank, self._timeout, self._mark, self._status = host.rank, timeout_s, mark, status
        self._beat = min(timeout_s / _BEATS, _LONGEST_BEAT)
        self._moved, self._step = time.monotonic(), 0
        self._heard: Heard | None = None  # while this rank is late
        # A connection of its own: on the default one it would wait for the calls of other threads.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.PrefixStore("watchdog", dist.TCPStore(*address, is_master=False))
        self._store.set(str(self._rank), told(0))
        self._names = host.gather(name)  # from here on all ranks have told something
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._tell, self._look)]

    def start(self) -> None:
        """From now on."""
        self._moved = time.monotonic()
        for thread in self._threads:
            thread.start()

    def reached(self, step: int) -> None:
        """The main thread moves: it is at the boundary of `step`, or at a mark in the validation there."""
        self._moved, self._step = time.monotonic(), step

    def close(self) -> None:
        """Ends the threads."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=self._beat)

    def _tell(self) -> None:
        beats = 0
        while not self._closed.wait(self._beat):
            beats, heard = beats + 1, self._heard
            try:
                if heard is None:
                    self._store.set(str(self._rank), told(beats))
                else:
                    self._store.set(str(self._rank), told(beats, **self._whereabouts()))
                    heard.listen(self._store)
            except dist.DistError:
                return  # rank 0, which holds the store, is gone; `_look` sees that nothing is heard

    def _whereabouts(self) -> dict:
        frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        ours = (frame for frame in reversed(frames) if f"{os.sep}mugv_ds{os.sep}" in frame.filename)
        place = next(ours, frames[-1])
        return {
            "step": self._step,
            "at": f"{place.filename}:{place.lineno} ({place.name})",
            "waits": any(part in frame.filename for frame in frames for part in _WAITING),
        }

    def _look(self) -> None:
        while not self._closed.wait(_LOOK_EVERY):
            since = time.monotonic() - self._moved
            if since <= self._timeout - _LISTEN_BEATS * self._beat:
                self._heard = None
                continue
            if self._heard is None:
                self._heard = Heard(self._names, _STALE_BEATS * self._beat)
            if since > self._timeout:
                say(
                    f"error: rank {self._rank} has not moved since {self._mark} {self._step} for {self._timeout:g} s; "
                    f"held up by {self._heard.culprits()}",
                    error=True,
                )
                # All have said so before the first end breaks the others' connections; their main threads, which
                # then fail, wait for this one to end the process.
                leave(self._status, linger=max(_LINGER_BEATS * self._beat, _LEAST_LINGER))


def told(beat: int, **whereabouts: Any) -> str:
    """What a rank puts into the store: how many beats it has lived and, if it is late, where it is."""
    return json.dumps({"beat": beat, **whereabouts})


class Heard:
    """What was heard of every rank since this one is late, and when; clocks of hosts are not compared.

    Args:
        names: what to call each rank. stale_s: seconds after which a rank that tells nothing new is silent.
    """

    def __init__(self, names: list[str], stale_s: float) -> None:
        self._names, self._ranks, self._stale = names, range(len(names)), stale_s
        self._lock = threading.Lock()
        self._told: dict[int, dict] = {}
        self._when = dict.fromkeys(self._ranks, time.monotonic())
        self._answered = time.monotonic()

    def listen(self, store: dist.Store) -> None:
        """Takes up what the ranks have put into the store, all of which have put something there: one request."""
        values = store.multi_get([str(rank) for rank in self._ranks])
        with self._lock:
            self._answered = time.monotonic()
            for rank, value in zip(self._ranks, map(json.loads, values), strict=True):
                if value != self._told.get(rank):
                    self._told[rank], self._when[rank] = value, self._answered

    def culprits(self) -> str:
        """The ranks that are silent or, if none is, those of the late that are furthest behind and wait for nobody."""
        now = time.monotonic()
        with self._lock:
            if now - self._answered > self._stale:  # rank 0 holds the store
                return f"{self._names[0]}, silent for at least {now - self._answered:.0f} s"
            quiet = {rank: now - when for rank, when in self._when.items() if now - when > self._stale}
            if quiet:
                return ", ".join(f"{self._names[rank]}, silent for at least {s:.0f} s" for rank, s in quiet.items())
            late = {rank: value for rank, value in self._told.items() if "step" in value}
            step = min(value["step"] for value in late.values())
            behind = [rank for rank, value in late.items() if value["step"] == step]
            busy = [rank for rank in behind if not late[rank]["waits"]]
            return ", ".join(f"{self._names[rank]}, at {late[rank]['at']}" for rank in busy or behind)
