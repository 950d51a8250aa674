"""Objects below a URL that fsspec opens: whole ones in and out, each call tried again a bounded number of times.

What is relied on: an object is there as a whole or not at all, whoever reads after a write that has ended gets it, and
lists name it. There are no folders, and nothing is renamed.
"""

import errno
import logging
import posixpath
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.url import hidden

ATTEMPTS = 8  # of a call, each after those that the store's own client makes
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds; waits double, and of each a random half at most is left out
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_CHECKSUM_ERROR = "FlexibleChecksumError"  # botocore's, by name: it need not be installed

T = TypeVar("T")

logger = logging.getLogger(__name__)
_random = random.Random()  # of its own: training's randomness is a function of the seed alone


class DamagedError(OSError):
    """What came is not what the store's own checksum of it says."""


_FINAL = (*_MISSING, FileExistsError, PermissionError)  # what is the same a moment later


class ObjectFolder:
    """The objects below a URL, such as s3://bucket/run; paths are relative to it. It is cheap to pickle.

    A failing call is tried `ATTEMPTS` times, with waits of random length, so that many ranks that were turned away do
    not come back together. Methods raise OSError at the end, with the URL of the object as its file name and without
    anything secret in its text; FileNotFoundError, FileExistsError and PermissionError at once, and DamagedError when
    it comes again, as what is damaged on the way may be sound where it is.

    Args:
        url: of the folder. key: of the config that names it, for messages.

    Raises:
        ConfigError: fsspec does not know the URL's protocol, or lacks the package for it.
    """

    def __init__(self, url: str, key: str) -> None:
        self._url, self._key = url.rstrip("/"), key
        self._system, self._folder = open_url(self._url, key)

    def __reduce__(self) -> tuple:
        return ObjectFolder, (self._url, self._key)

    def __str__(self) -> str:
        return self._url

    def url(self, path: str) -> str:
        """Returns the URL of an object."""
        return f"{self._url}/{path}" if path else self._url

    def names(self, path: str = "") -> list[str]:
        """Returns the names of what is directly below a folder, sorted; none if nothing is."""

        def ask(full: str) -> list[str]:
            self._system.invalidate_cache()
            return self._system.ls(full, detail=False)

        try:
            found = self._call(path, ask)
        except _MISSING:
            return []
        own = self._full(path)
        return sorted({posixpath.basename(name.rstrip("/")) for name in found if name.strip("/") != own.strip("/")})

    def size(self, path: str) -> int:
        """Returns the bytes of an object."""
        return self._call(path, self._size)

    def exists(self, path: str) -> bool:
        """Tells whether there is an object; it is asked for by its name, not looked for in a list."""
        try:
            return self.size(path) >= 0
        except _MISSING:
            return False

    def identity(self, path: str) -> str:
        """Returns a text that changes with the content of an object, as far as the store has one, such as an ETag."""
        return self._call(path, lambda full: str(self._system.ukey(full)))

    def read(self, path: str, max_bytes: int) -> bytes:
        """Returns the content of an object.

        Raises:
            InputError: it has more than `max_bytes` bytes.
        """
        content = self._call(path, lambda full: self._system.cat_file(full, start=0, end=max_bytes + 1))
        if len(content) > max_bytes:
            raise InputError(f"{self.url(path)}: larger than {max_bytes:,} bytes; is this the right object?")
        return content

    def write(self, path: str, content: bytes, *, new: bool = False) -> None:
        """Writes a small object, in one request.

        Args:
            new: fail if it is there already, where the store can tell.

        Raises:
            FileExistsError: it is.
        """
        mode = "create" if new else "overwrite"
        self._call(path, lambda full: self._system.pipe_file(full, content, mode=mode))

    def upload(self, local: Path, path: str) -> None:
        """Makes a local file an object, a large one in parts, and sees that all of its bytes are there."""
        wanted = local.stat().st_size

        def put(full: str) -> None:
            self._system.put_file(str(local), full)
            try:
                found = self._size(full)
            except _MISSING:
                found = 0
            if found != wanted:
                raise OSError(errno.EIO, f"{found} bytes are there after {wanted} were uploaded")

        self._call(path, put)

    def download(self, path: str, local: Path) -> None:
        """Makes an object a local file, which may be there in part after a failure."""

        def get(full: str) -> None:
            self._system.get_file(full, str(local))
            wanted, found = self._size(full), local.stat().st_size
            if found != wanted:
                raise OSError(errno.EIO, f"{found} bytes came of {wanted}")

        self._call(path, get)

    def remove(self, paths: Iterable[str]) -> None:
        """Removes objects; those that are not there are no failure."""
        if fulls := [self._full(path) for path in paths]:
            try:
                self._call("", lambda _: self._system.rm(fulls))
            except _MISSING:
                return

    def _size(self, full: str) -> int:
        self._system.invalidate_cache()
        return int(self._system.info(full)["size"])

    def _full(self, path: str) -> str:
        return posixpath.join(self._folder, path) if path else self._folder

    def _call(self, path: str, ask: Callable[[str], T]) -> T:
        full, wait, damaged = self._full(path), FIRST_WAIT, False
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask(full)
            except InputError:
                raise
            except Exception as error:  # each store has errors of its own
                failure = as_os_error(error, self.url(path))
                again = damaged and isinstance(failure, DamagedError)
                if again or isinstance(failure, _FINAL) or attempt == ATTEMPTS:
                    raise failure from None
                damaged = isinstance(failure, DamagedError)
                pause = wait * _random.uniform(0.5, 1.0)
                logger.warning("%s; trying again in %.1f s", failure, pause)
                time.sleep(pause)
                wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable: the last attempt returns or raises")


def open_url(url: str, key: str) -> tuple[AbstractFileSystem, str]:
    """Returns the file system of a URL, one for each in a process, and the folder in it.

    Args:
        url: what to open. key: of the config that names it, for messages.

    Raises:
        ConfigError: see `ObjectFolder`.
    """
    try:
        return url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(hidden(f"{key} = {url!r}: {error}")) from None


def as_os_error(error: Exception, name: str) -> OSError:
    """Returns what a store's client raised as an OSError of its kind, without anything secret in it.

    Args:
        error: whatever it raised. name: URL of what was asked for.
    """
    text = hidden(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if isinstance(error, _MISSING):
        return FileNotFoundError(errno.ENOENT, "missing", name)
    if isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, text, name)
    if type(error).__name__ == _CHECKSUM_ERROR:
        return DamagedError(errno.EIO, text, name)
    if isinstance(error, FileExistsError) or "PreconditionFailed" in str(error):
        return FileExistsError(errno.EEXIST, "is there already", name)
    return OSError(errno.EIO, text, name)  # whatever number a client has made of an HTTP status: it may pass
