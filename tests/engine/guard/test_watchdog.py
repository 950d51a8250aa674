"""Whom the watchdog names, and what it asks of the store."""

import pytest

from mugv_ds.engine.guard import watchdog
from mugv_ds.engine.guard.watchdog import Heard

NAMES = ["rank 0 (host a, pid 1)", "rank 1 (host a, pid 2)", "rank 2 (host b, pid 1)"]


class FakeStore(dict):
    def multi_get(self, keys):
        return [self[key] for key in keys]


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


def told(beat: int, step: int = 7, waits: bool = True, at: str = "loop.py:1 (run)") -> str:
    return watchdog.told(beat, step=step, waits=waits, at=at)


def test_the_silent_are_named_first(clock):
    heard, store = Heard(NAMES, stale_s=5.0), FakeStore()
    for beat in range(4):
        store.update({"0": told(beat, waits=False), "1": told(0, waits=False), "2": told(beat)})
        heard.listen(store)
        clock[0] += 2.0
    assert heard.culprits() == "rank 1 (host a, pid 2), silent for at least 8 s"


def test_a_rank_that_is_not_late_holds_nobody_up(clock):
    heard = Heard(NAMES, stale_s=5.0)
    heard.listen(FakeStore({"0": told(0), "1": watchdog.told(9), "2": told(0, waits=False)}))
    assert heard.culprits() == "rank 2 (host b, pid 1), at loop.py:1 (run)"


def test_rank_0_is_named_when_its_store_does_not_answer(clock):
    heard = Heard(NAMES, stale_s=5.0)
    heard.listen(FakeStore({"0": told(0), "1": told(0), "2": told(0)}))
    clock[0] += 8.0
    assert heard.culprits() == "rank 0 (host a, pid 1), silent for at least 8 s"


def test_among_the_living_those_behind_that_wait_for_nobody_are_named(clock):
    heard = Heard(NAMES, stale_s=5.0)
    heard.listen(FakeStore({"0": told(0), "1": told(0, waits=False, at="feed.py:9 (_share)"), "2": told(0)}))
    assert heard.culprits() == "rank 1 (host a, pid 2), at feed.py:9 (_share)"
    heard.listen(FakeStore({"0": told(1, step=8, waits=False), "1": told(1), "2": told(1)}))
    assert heard.culprits() == ", ".join(f"{name}, at loop.py:1 (run)" for name in NAMES[1:])
