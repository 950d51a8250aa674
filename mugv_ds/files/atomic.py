"""Files that are there as a whole or not at all."""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

HALF = re.compile(r".+\.[0-9a-f]{32}\.tmp")  # names of files that a killed process left half-written


@contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the name `path` once its content is on the disk.

    If the block raises, `path` stays as it was and nothing is left; a killed process leaves a file called as in `HALF`.
    Several writers do no harm: the last to finish gives the content.

    Args:
        path: in a folder that exists.

    Raises:
        OSError: the file system failed.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_changed(path: Path, content: bytes) -> None:
    """Writes a file whose folder may be missing as a whole, unless it holds that already.

    Raises:
        OSError: the file system failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
        return
    with write_atomically(path) as stream:
        stream.write(content)
