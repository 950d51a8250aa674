"""Where the files of a manifest lie: in a folder, or under a URL that fsspec opens, of which ranges are fetched."""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import NotRegularError, open_regular
from mugv_ds.config.url import is_url
from mugv_ds.data.paths import PathError, check_lexically, resolve
from mugv_ds.files.objects import as_os_error, open_url
from mugv_ds.files.tensor_file import SampleError

_KEY = "data.root"  # what a URL that cannot be opened is called
MAX_FILE_BYTES = 1 << 30  # of a file that is fetched as a whole; a shard is read by ranges
# What a server or fsspec may read as more than a name: a query, a fragment, an escape, a pattern, a chain of URLs.
_NOT_PLAIN = re.compile(r"[%?#*\[\]{}\\]|::|[\x00-\x1f\x7f]")


class Range(NamedTuple):
    """Bytes of a file. path: relative to where the files lie. crc: their CRC-32; None where it is not known."""

    path: str
    start: int
    length: int
    crc: int | None = None


class Blob(Protocol):
    """An open file that is read by ranges.

    Attributes:
        name: what messages call it.
    """

    name: str

    def size(self) -> int:
        """Its bytes."""

    def read(self, start: int, length: int, crc: int | None = None) -> np.ndarray:
        """`length` bytes from byte `start` on, uint8 [length].

        Args:
            crc: CRC-32 that they should have, by which a cache knows them; who reads checks it.

        Raises:
            SampleError: it has not so many. OSError: the file system failed.
        """


class Files(Protocol):
    """Where the relative paths of a manifest lead; `str` of it names the place. It is cheap to pickle."""

    def open(self, path: str) -> AbstractContextManager[Blob]:
        """A file to read ranges of.

        Raises:
            PathError: the path leads somewhere it must not.
            SampleError: the file is missing, or no regular one. OSError: the file system failed.
        """

    def whole(self, path: str) -> AbstractContextManager[Path]:
        """A local file with the content; for one that is fetched only as long as the context lasts.

        Errors of `open`, but that a missing local file is left to who opens it.
        """

    def fetch(self, ranges: Iterable[Range]) -> None:
        """Gets ranges that are about to be read, all at once, where reading them one by one would take longer."""

    def is_readable(self) -> bool:
        """Whether the place can be looked into at all; if not, then no file in it is to blame."""


@dataclass(frozen=True)
class FileBlob:
    """A local file that is open; see `Blob`."""

    name: str
    file: BinaryIO

    def size(self) -> int:
        """Its bytes."""
        return os.fstat(self.file.fileno()).st_size

    def read(self, start: int, length: int, crc: int | None = None) -> np.ndarray:
        """See `Blob.read`. Nothing is allocated that the file does not have."""
        if start + length > (size := self.size()):
            raise SampleError(f"{self.name}: truncated: {size} bytes, and those up to {start + length} are wanted")
        buffer, done = np.empty(length, np.uint8), 0  # a bytearray would be filled with zeros first: 1 ms for a latent
        while done < length:
            got = os.preadv(self.file.fileno(), [buffer[done:]], start + done)
            if not got:
                raise SampleError(f"{self.name}: truncated while it was read, at byte {start + done}")
            done += got
        return buffer


@contextmanager
def open_file(path: Path) -> Iterator[FileBlob]:
    """A local file to read ranges of.

    Raises:
        SampleError: it is missing, or no regular file. OSError: the file system failed.
    """
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError(f"{path}: missing") from error
    except NotRegularError as error:
        raise SampleError(str(error)) from error
    with file:
        yield FileBlob(str(path), file)


@dataclass(frozen=True)
class Folder:
    """`Files` below a local folder; see `paths.resolve` for what a path may be."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    def open(self, path: str) -> AbstractContextManager[FileBlob]:
        """See `Files.open`."""
        return open_file(resolve(self.root, path))

    @contextmanager
    def whole(self, path: str) -> Iterator[Path]:
        """See `Files.whole`."""
        yield resolve(self.root, path)

    def fetch(self, ranges: Iterable[Range]) -> None:
        """Nothing: the worker processes of the loader are ahead by several micro-batches already."""

    def is_readable(self) -> bool:
        """See `Files.is_readable`."""
        try:
            return any(os.scandir(self.root))  # a mount that is gone leaves an empty folder
        except OSError:
            return False


class Bucket:
    """`Files` under a URL that fsspec opens, such as s3://bucket/set; credentials and options are fsspec's own.

    Args:
        url: of the folder.

    Raises:
        ConfigError: fsspec does not know the URL's protocol, or lacks the package for it.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._system, self._folder = open_url(self._url, _KEY)
        self._fetched: dict[Range, bytes] = {}

    def __reduce__(self) -> tuple:
        return Bucket, (self._url,)

    def __str__(self) -> str:
        return self._url

    @contextmanager
    def open(self, path: str) -> Iterator["_Object"]:
        """See `Files.open`. Nothing is asked for before it is read."""
        self._full(path)
        yield _Object(f"{self._url}/{path}", path, self)

    @contextmanager
    def whole(self, path: str) -> Iterator[Path]:
        """See `Files.whole`; the file is kept in memory."""
        with in_memory(self.content(path), f"{self._url}/{path}") as local:
            yield local

    def content(self, path: str) -> np.ndarray:
        """A whole file, uint8 [bytes].

        Raises:
            PathError, SampleError, OSError: see `Files.open` and `Blob.read`; it may also be too large.
        """
        size = self.size_of(path)
        if size > MAX_FILE_BYTES:
            raise SampleError(f"{self._url}/{path}: {size} bytes; a file of one sample has at most {MAX_FILE_BYTES}")
        return self.read(Range(path, 0, size))

    def fetch(self, ranges: Iterable[Range]) -> None:
        """Gets ranges at once and keeps each for the next `read` of it; what fails is left to that one."""
        self._fetched, ranges = {}, list(ranges)
        try:
            paths = [self._full(one.path) for one in ranges]
            starts, ends = [one.start for one in ranges], [one.start + one.length for one in ranges]
            answers = self._system.cat_ranges(paths, starts, ends, on_error="return")
        except Exception:  # whatever it is, `read` meets it again, and says so
            return
        self._fetched = {one: answer for one, answer in zip(ranges, answers, strict=True) if isinstance(answer, bytes)}

    def is_readable(self) -> bool:
        """See `Files.is_readable`; a store that has no such folder, or does not list folders, has answered."""
        try:
            self._system.invalidate_cache()
            self._system.ls(self._folder, detail=False)
        except (FileNotFoundError, NotImplementedError):
            return True
        except Exception:  # each store has errors of its own
            return False
        return True

    def size_of(self, path: str) -> int:
        """Bytes of a file; see `Blob.size`."""
        size = self._asked(path, lambda full: self._system.info(full)["size"])
        if not isinstance(size, int):
            raise SampleError(f"{self._url}/{path}: the store does not say how large it is")
        return size

    def read(self, wanted: Range) -> np.ndarray:
        """See `Blob.read`."""
        path, start, length, _ = wanted
        content = self._fetched.pop(wanted, None)
        if content is None:
            content = self._asked(path, lambda full: self._system.cat_file(full, start=start, end=start + length))
        if len(content) != length:
            raise SampleError(f"{self._url}/{path}: {len(content)} bytes came, and {length} from {start} on are wanted")
        return np.frombuffer(content, np.uint8).copy()  # which may be written to, as tensors must be

    def _full(self, path: str) -> str:
        """The file system's own name of a file.

        Raises:
            PathError: the path may lead somewhere it must not.
        """
        check_lexically(path)
        if special := _NOT_PLAIN.search(path):
            raise PathError(f"path {path!r}: has {special[0]!r}, which may be no part of a name in {self._url}")
        return f"{self._folder}/{posixpath.normpath(path)}"

    def _asked(self, path: str, ask: Callable[[str], Any]) -> Any:
        """What the store says of a file, its errors turned into OSError; all but a denial may pass again."""
        full, name = self._full(path), f"{self._url}/{path}"
        try:
            return ask(full)
        except InputError:
            raise
        except Exception as error:  # each store has errors of its own
            failure = as_os_error(error, name)
            if isinstance(failure, FileNotFoundError):
                raise SampleError(f"{name}: missing") from None
            raise failure from None


@dataclass(frozen=True)
class _Object:
    """A file of a bucket; see `Blob`."""

    name: str
    path: str
    bucket: Bucket

    def size(self) -> int:
        return self.bucket.size_of(self.path)

    def read(self, start: int, length: int, crc: int | None = None) -> np.ndarray:
        return self.bucket.read(Range(self.path, start, length, crc))


@contextmanager
def in_memory(content: np.ndarray, name: str) -> Iterator[Path]:
    """A local file with a content, in memory, as long as the context lasts; what messages call it is `name`."""
    descriptor = os.memfd_create("sample", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "r+b") as file:
        file.write(content)
        file.flush()
        local = Path(f"/proc/self/fd/{descriptor}")
        try:
            yield local
        except SampleError as error:
            raise type(error)(str(error).replace(str(local), name)) from error


def files_below(root: str | Path) -> Files:
    """The files below a folder or URL; what fsspec takes for local is a folder, whose paths are checked as such.

    Raises:
        ConfigError: see `Bucket`.
    """
    if not is_url(root):
        return Folder(Path(root))
    system, folder = open_url(root, _KEY)
    return Folder(Path(folder)) if isinstance(system, LocalFileSystem) else Bucket(root)
