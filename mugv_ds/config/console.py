"""What a person reads on the terminal, apart from what libraries print, which goes to a file for each rank."""

import contextlib
import faulthandler
import io
import logging
import os
import sys
from pathlib import Path
from typing import TextIO


class _Log(io.TextIOWrapper):
    """Where what is printed goes once it is diverted. What the disk does not take is lost, and nobody fails by it."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class Console:
    """The terminal of a process. Until `divert` it is stdout and stderr as they are."""

    def __init__(self) -> None:
        self._streams: tuple[TextIO, TextIO] | None = None

    def divert(self, log: Path) -> None:
        """Has all that is printed from now on, by libraries in C too, go to the end of `log`, and `say` to both.

        Warnings of this package's loggers, and where a fatal signal met Python, still reach the terminal.

        Raises:
            OSError: the file cannot be written; nothing has changed then.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(log, flags, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        self._streams = tuple(os.fdopen(os.dup(number), "w", buffering=1, errors="replace") for number in (1, 2))
        for number in (1, 2):
            os.dup2(file, number)
        os.close(file)
        sys.stdout, sys.stderr = (
            _Log(os.fdopen(number, "wb", closefd=False), errors="replace", line_buffering=True) for number in (1, 2)
        )
        handler = logging.StreamHandler(self._streams[1])
        handler.setLevel(logging.WARNING)
        logging.getLogger("mugv_ds").addHandler(handler)
        faulthandler.enable(self._streams[1])

    def say(self, text: str, *, error: bool = False) -> None:
        """Prints to the terminal, as an error to its stderr; where output is diverted to the log, too."""
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
        if self._streams is not None:
            print(text, file=self._streams[error], flush=True)

    @property
    def bar(self) -> TextIO:
        """Where a progress bar is drawn."""
        return sys.stderr if self._streams is None else self._streams[1]


CONSOLE = Console()  # of this process, whose file descriptors it changes


def say(text: str, *, error: bool = False) -> None:
    """Prints a line that a person is to read; see `Console.say`."""
    CONSOLE.say(text, error=error)
