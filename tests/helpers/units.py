"""Functions of units for tests of executors, which processes find by their names."""

import os
import signal
import time
from pathlib import Path


def work(job: tuple[str, Path]) -> int:
    """Does what the job's first word says: square, die (each time), die once, segfault, raise, wait."""
    what, folder = job
    number = int(what.split()[-1]) if what[-1].isdigit() else 0
    marker = folder / f"{what}.tried"
    first = not marker.exists()
    marker.touch()
    if what.startswith("segfault"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if what.startswith("die") and (first or "once" not in what):
        os.kill(os.getpid(), signal.SIGKILL)
    if what.startswith("raise"):
        raise ValueError(what)
    if what.startswith("wait"):
        time.sleep(600)
    (folder / f"{what}.done").write_text(str(os.getpid()))
    return number**2


def on_device(job: tuple[str, Path], device: str) -> str:
    """Tells its device and process."""
    work(job)
    return f"{device} {os.getpid()}"
