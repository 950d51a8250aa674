"""Limits of a forked process that is given something hostile."""

import resource
import signal
from pathlib import Path

import torch

SECONDS = 10  # of one core's time; a machine that does other work as well takes longer by the clock
_HANGS = 60  # seconds by the clock
GIB = 1 << 30


def confine() -> int:
    """Lets this process compute for 10 s and take 4 GiB more of addresses; returns the bytes that it has resident."""
    torch.set_num_threads(1)  # a fork has no threads of OpenMP
    size, before, *_ = (int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split())
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * GIB,) * 2)  # spares the machine what is to be found out
    # A handler in Python would wait for the end of a call of C.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(_HANGS)
    return before


def grown(before: int) -> int:
    """Bytes that this process had resident at most beyond `before`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
