"""Ends a run in which some rank has stopped: ranks that wait for it in a collective would wait for ever.

Two threads a rank. One tells the others, through the store of torch.distributed, where the rank's main thread is, and
hears the same of them. The other looks whether the main thread still moves and ends the process if it does not; the
main thread could not, being inside a collective, nor the first thread, being inside a store whose host may be stopped.
"""

import json
import os
import sys
import threading
import time
import traceback

import torch.distributed as dist

from mugv_ds.engine.guard.signals import STOPPED

_BEATS = 10  # a time-out
_STALE_BEATS = 5  # missed by a rank that is taken to be stopped or gone
_LONGEST_BEAT = 10.0  # seconds
_LOOK_EVERY = 0.05  # seconds; so closely together the ranks end
_WAITING = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")


class Watchdog:
    """The watchdog of one rank.

    Args:
        rank: of this process. names: what to call each rank.
        timeout_s: seconds without `reached` after which the run is taken to hang.
    """

    def __init__(self, rank: int, names: list[str], timeout_s: float) -> None:
        self._rank, self._timeout = rank, timeout_s
        self._beat = min(timeout_s / _BEATS, _LONGEST_BEAT)
        self._heard = Heard(names, _STALE_BEATS * self._beat)
        self._moved, self._step = time.monotonic(), 0
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
        # A connection of its own: on the default one it would wait for the calls of other threads.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.PrefixStore("watchdog", dist.TCPStore(*address, is_master=False))
        beats = 0
        while not self._closed.wait(self._beat):
            beats += 1
            try:
                store.set(str(self._rank), json.dumps({"beat": beats, **self._whereabouts()}))
                self._heard.listen(store)
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
            if time.monotonic() - self._moved > self._timeout:
                print(
                    f"error: rank {self._rank} has not moved since step {self._step} for {self._timeout:g} s; "
                    f"held up by {self._heard.culprits()}",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(2 * self._beat)  # all have said so before the first end breaks the others' connections
                os._exit(STOPPED)


class Heard:
    """What was last heard of every rank, and when; clocks of hosts are not compared.

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
        """Takes up what the ranks have put into the store."""
        for rank in self._ranks:
            if store.check([str(rank)]):
                self.note(rank, json.loads(store.get(str(rank))))
        self._answered = time.monotonic()

    def note(self, rank: int, told: dict) -> None:
        """Takes up what one rank tells."""
        with self._lock:
            if told != self._told.get(rank):
                self._told[rank], self._when[rank] = told, time.monotonic()

    def culprits(self) -> str:
        """The ranks that are silent or, if none is, those furthest behind that wait for nobody."""
        now = time.monotonic()
        with self._lock:
            if now - self._answered > self._stale:  # rank 0 holds the store
                return f"{self._names[0]}, silent for {now - self._answered:.0f} s"
            silent = [rank for rank in self._ranks if now - self._when[rank] > self._stale]
            if silent:
                return ", ".join(f"{self._names[rank]}, silent for {now - self._when[rank]:.0f} s" for rank in silent)
            step = min(told["step"] for told in self._told.values())
            behind = [rank for rank, told in self._told.items() if told["step"] == step]
            busy = [rank for rank in behind if not self._told[rank]["waits"]]
            return ", ".join(f"{self._names[rank]}, at {self._told[rank]['at']}" for rank in busy or behind)
