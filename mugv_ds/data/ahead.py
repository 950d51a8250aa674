"""Taking the next item of an iterator in a thread while the one before is at work."""

import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")

_END = object()
_PATIENCE_SECONDS = 5.0  # that closing waits for the thread, as DataLoader waits for a worker


def ahead(items: Generator[Item, None, None], name: str) -> Iterator[Item]:
    """Yields what `items` yields, of which one thread takes one item ahead, from when the first is asked for.

    `items` runs in that thread, from its beginning to its end or to its `close`. Who closes this waits for that, but
    not for ever: a thread that is held up, as by a disk that does not answer, is left behind, and holds up no exit.

    Args:
        name: of the thread.

    Raises:
        BaseException: what `items` raised, as it was, once all that it yielded before was taken.
    """
    asked: SimpleQueue[Future | None] = SimpleQueue()

    def take() -> None:
        with closing(items):
            while (answer := asked.get()) is not None:
                try:
                    answer.set_result(next(items, _END))
                except BaseException as error:  # whatever it is, somebody waits for the answer
                    answer.set_exception(error)

    def ask() -> Future:
        answer = Future()
        asked.put(answer)
        return answer

    thread = threading.Thread(target=take, name=name, daemon=True)
    thread.start()
    try:
        answer = ask()
        while (item := answer.result()) is not _END:
            answer = ask()
            yield item
    finally:
        asked.put(None)
        thread.join(_PATIENCE_SECONDS)
