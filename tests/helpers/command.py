"""Running a command in a fork of the test's process, which has imported everything: what it printed and its status."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.helpers.limits import confine, grown


class Answer(NamedTuple):
    """How a command ended. grown: bytes of memory that it took at most, beside those of the test's process."""

    status: int
    output: str
    errors: str
    grown: int


def answer(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Answer:
    """Runs `main(arguments)`, at most 10 s and with at most 4 GiB of address space more.

    A status below 0 is the number of the signal that ended it; 70 says that it ended with a traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = multiprocessing.get_context("fork").Process(target=_run, args=(main, list(arguments), out, err))
        process.start()
        process.join()
        taken = Path(folder) / "out.grown"
        return Answer(
            process.exitcode, out.read_text(), err.read_text(), int(taken.read_text()) if taken.exists() else 0
        )


def _run(main: Callable[[Sequence[str]], int], arguments: list[str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    before = confine()
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    out.with_name("out.grown").write_text(str(grown(before)))
    os._exit(status)
