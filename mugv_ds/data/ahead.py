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


class Ahead(Iterator[Item]):
    """Yields what `items` yields, of which a thread takes the next from when `begin` is called, or it is asked for.

    `items` runs in that thread, from its beginning to its end or to its `close`. Who closes this waits for that, but
    not for ever: a thread that is held up, as by a disk that does not answer, is left behind, and holds up no exit.
    What `items` raises comes in its place, as it was.

    Args:
        name: of the thread; None: there is none, and an item is taken when it is asked for, by who asks.
    """

    def __init__(self, items: Generator[Item, None, None], name: str | None) -> None:
        self._items, self._asked, self._answer = items, SimpleQueue(), None
        self._thread = None
        if name is not None:
            self._thread = threading.Thread(target=_take, args=(items, self._asked), name=name, daemon=True)
            self._thread.start()

    def begin(self) -> None:
        """Has the thread take the next item, unless it does already."""
        if self._thread is not None and self._answer is None:
            self._answer = Future()
            self._asked.put(self._answer)

    def __next__(self) -> Item:
        if self._thread is None:
            return next(self._items)
        self.begin()
        answer, self._answer = self._answer, None
        try:
            item = answer.result()
        except BaseException:
            self.close()
            raise
        if item is _END:
            self.close()
            raise StopIteration
        return item

    def close(self) -> None:
        """Closes `items`; nothing can be taken afterwards."""
        if self._thread is None:
            self._items.close()
        else:
            self._asked.put(None)
            self._thread.join(_PATIENCE_SECONDS)


def _take(items: Generator, asked: SimpleQueue) -> None:
    with closing(items):
        while (answer := asked.get()) is not None:
            try:
                answer.set_result(next(items, _END))
            except BaseException as error:  # whatever it is, somebody waits for the answer
                answer.set_exception(error)
