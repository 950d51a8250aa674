"""Reading a hostile file in a process of its own, which may neither take long, nor take much memory, nor die."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

from mugv_ds.config.errors import InputError
from tests.helpers.limits import GIB, confine, grown


def verdict(read: Callable[..., object], *arguments: object) -> str:
    """The one line of the InputError that `read(*arguments)` raises in a fork of this process.

    Fails if it takes more than 10 s or 1 GiB, raises nothing or something else, or if the process dies.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(sending, read, arguments))
    process.start()
    sending.close()
    try:
        error, line, taken = receiving.recv()
    except EOFError:
        process.join()
        too_long = (-signal.SIGPROF, -signal.SIGALRM)
        raise AssertionError(f"the process ended with {process.exitcode} (after too long: {too_long})") from None
    process.join()
    assert error == "InputError", f"{error}: {line}"
    assert taken < GIB, f"took {taken / GIB:.1f} GiB"
    assert "\n" not in line and len(line) < 1000, line[:1000]
    return line


def _read(sending: Connection, read: Callable[..., object], arguments: tuple) -> None:
    before = confine()
    try:
        found = "nothing raised", repr(read(*arguments))[:200]
    except InputError as error:
        found = "InputError", str(error)
    except BaseException as error:
        found = type(error).__name__, str(error)[:200]
    sending.send((*found, grown(before)))
