"""What the watchdogs of many ranks ask of their one store: python -m tests.engine.guard.measure_watchdog [--ranks 512]

All ranks' keys lie in one TCPStore, and this process takes the part of one rank after another for a beat: as it was
when every rank read every other at each beat, as it is while the run is well, and as it is while ranks are late. The
requests of a rank are counted and timed; a beat of the run is as many of these as there are ranks, at one store.
"""

import argparse
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from mugv_ds.engine.guard.watchdog import Heard, told
from tests.helpers.distributed import free_port

WHERE = {"step": 1000, "at": "/repository/mugv_ds/engine/loop.py:231 (_train_step)", "waits": True}


class Counted:
    """A store that counts its requests."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.requests = store, 0

    def __getattr__(self, name: str) -> Callable:
        self.requests += 1
        return getattr(self.store, name)


def read_all_one_by_one(store: Counted, rank: int, ranks: int, beat: int) -> None:
    """A beat as it was until November 2026."""
    store.set(str(rank), told(beat, **WHERE))
    for other in map(str, range(ranks)):
        if store.check([other]):
            store.get(other)


def well(store: Counted, rank: int, ranks: int, beat: int) -> None:
    """A beat of a rank that is not late."""
    store.set(str(rank), told(beat))


def late(store: Counted, rank: int, ranks: int, beat: int, heard: Heard) -> None:
    """A beat of a rank that is."""
    store.set(str(rank), told(beat, **WHERE))
    heard.listen(store)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=512)
    ranks = parser.parse_args().ranks
    port = free_port()
    serving = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    for rank in range(ranks):
        serving.set(f"watchdog/{rank}", told(0))
    client = dist.PrefixStore("watchdog", dist.TCPStore("127.0.0.1", port, is_master=False))
    heard = Heard([f"rank {rank}" for rank in range(ranks)], stale_s=50.0)
    print(f"{ranks} ranks, one store      requests a rank    requests a beat    seconds, one by one")
    beats = {"every rank read (was)": (read_all_one_by_one, 8), "well": (well, ranks)}
    beats["late"] = (partial(late, heard=heard), min(ranks, 64))
    for name, (beat, sample) in beats.items():
        store, begin = Counted(client), time.perf_counter()
        for rank in range(sample):
            beat(store, rank, ranks, 1)
        seconds = (time.perf_counter() - begin) / sample * ranks
        each = store.requests // sample
        print(f"{name:27} {each:15,}    {each * ranks:15,}    {seconds:18.3f}")


if __name__ == "__main__":
    main()
