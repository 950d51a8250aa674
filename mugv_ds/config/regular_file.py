"""Opening files that somebody else put there: regular ones only, and no more of them than was agreed."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from mugv_ds.config.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class NotRegularError(InputError):
    """What has a file's name is a directory, FIFO, socket or device. The message names it."""


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading; anything else is refused before it is opened.

    Opening a FIFO waits for a writer who may never come, and opening a device may start something.

    Raises:
        NotRegularError: it is something else. OSError: it is missing, or the file system failed.
    """
    _refuse_irregular(Path(path).stat().st_mode, path)
    # Should the name have gone to a FIFO or a terminal since, then opening neither waits for it nor takes it over.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes_file(path: str | Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    Raises:
        InputError: it is no regular file, or larger. OSError: it is missing, or the file system failed.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size <= max_bytes:
            content = file.read(max_bytes + 1)  # the file may have grown, and those in /proc have no size
            if len(content) <= max_bytes:
                return content
    raise InputError(f"{path}: larger than {max_bytes:,} bytes; is this the right file?")


def read_text_file(path: str | Path, max_bytes: int, error: type[InputError] = InputError) -> str:
    """The text of a regular UTF-8 file of at most `max_bytes` bytes.

    Args:
        path: the file.
        max_bytes: its largest size.
        error: class of what is raised.

    Raises:
        InputError: it is missing, no regular file, larger, not UTF-8, or the file system failed.
    """
    try:
        return read_bytes_file(path, max_bytes).decode()
    except OSError as failure:
        raise error(f"{path}: {failure.strerror}") from None
    except UnicodeDecodeError as failure:
        raise error(f"{path}: not UTF-8 text: {failure.reason} at byte {failure.start}") from None
    except InputError as failure:
        raise error(str(failure)) from None


def _refuse_irregular(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegularError(f"{path}: {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not a regular file")
