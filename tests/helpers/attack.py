"""Reading a hostile file in a process of its own, which may neither take long, nor take much memory, nor die."""

import multiprocessing
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from mugv_ds.config.errors import InputError

SECONDS = 10
GIB = 1 << 30


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
        error, line, grown = receiving.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process ended with {process.exitcode} ({-signal.SIGALRM}: after 10 s)") from None
    process.join()
    assert error == "InputError", f"{error}: {line}"
    assert grown < GIB, f"took {grown / GIB:.1f} GiB"
    assert "\n" not in line and len(line) < 1000, line[:1000]
    return line


def _read(sending: Connection, read: Callable[..., object], arguments: tuple) -> None:
    torch.set_num_threads(1)  # a fork has no threads of OpenMP
    size, before, *_ = (int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split())
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * GIB,) * 2)  # spares the machine what is to be found out
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would wait for the end of a call of C
    signal.alarm(SECONDS)
    try:
        found = "nothing raised", repr(read(*arguments))[:200]
    except InputError as error:
        found = "InputError", str(error)
    except BaseException as error:
        found = type(error).__name__, str(error)[:200]
    sending.send((*found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))
