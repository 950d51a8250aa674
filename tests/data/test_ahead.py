"""One item ahead, in a thread that takes along errors and the end, and that no exit waits for."""

import threading
import time
from contextlib import closing

import pytest

from mugv_ds.data import ahead as module
from mugv_ds.data.ahead import Ahead
from tests.helpers.waiting import wait_until

NAME = "ahead of a test"


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


def test_all_comes_in_its_order():
    assert list(Ahead((number for number in range(100)), NAME)) == list(range(100))
    assert list(Ahead((number for number in ()), NAME)) == []
    assert not running()


def test_one_item_is_made_once_it_is_begun_and_no_more():
    made = []
    items = Ahead((made.append(number) or number for number in range(9)), NAME)
    with closing(items):
        assert not made, "nothing before it is asked for"
        for number in range(3):
            assert next(items) == number
            time.sleep(0.02)
            assert len(made) == number + 1
            for _ in range(2):
                items.begin()
            wait_until(lambda number=number: len(made) == number + 2)
            time.sleep(0.02)
            assert len(made) == number + 2


def test_without_a_thread_an_item_is_taken_when_it_is_asked_for():
    made, ends = [], []

    def make():
        try:
            for number in range(3):
                made.append(threading.current_thread())
                yield number
        finally:
            ends.append(True)

    with closing(Ahead(make(), None)) as items:
        items.begin()
        assert not made
        assert next(items) == 0 and made == [threading.current_thread()]
        assert list(items) == [1, 2]
    assert ends == [True]


def test_who_takes_an_item_that_is_there_does_not_wait():
    def slow():
        for number in range(4):
            time.sleep(0.2)
            yield number

    waits = []
    with closing(Ahead(slow(), NAME)) as items:
        for number in range(4):
            begin = time.perf_counter()
            assert next(items) == number
            items.begin()
            waits.append(time.perf_counter() - begin)
            time.sleep(0.4)
    assert waits[0] > 0.15 and max(waits[1:]) < 0.15


@pytest.mark.parametrize("error", [ValueError("of the third"), SystemExit(3)])
def test_an_error_comes_in_its_place(error):
    def failing():
        yield from (1, 2)
        raise error

    items = Ahead(failing(), NAME)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(type(error)) as raised:
        next(items)
    assert raised.value is error and not running()


def test_closing_ends_what_is_read_in_its_own_thread():
    ends = []

    def items():
        try:
            yield from range(9)
        finally:
            ends.append(threading.current_thread().name)

    with closing(Ahead(items(), NAME)) as taken:
        next(taken)
        assert not ends
    assert ends == [NAME] and not running()


def test_a_thread_that_is_held_up_holds_up_no_exit(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.1)
    go_on, ended = threading.Event(), threading.Event()

    def items():
        try:
            yield 0
            go_on.wait()
            yield 1
        finally:
            ended.set()

    begin = time.monotonic()
    with closing(Ahead(items(), NAME)) as taken:
        next(taken)
        taken.begin()
    assert time.monotonic() - begin < 5 and [thread.daemon for thread in running()] == [True]
    go_on.set()
    assert ended.wait(5)
    wait_until(lambda: not running())
