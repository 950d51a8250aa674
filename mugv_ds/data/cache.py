"""A folder on the disk of a host in which samples from a store are kept, for all ranks and loader workers of the host.

<cache_dir>/3f/3f9a…  an entry: the bytes, then their CRC-32; named by the hash of what it is
<cache_dir>/size      bytes of all entries; who changes it holds its lock

An entry is there as a whole or not at all, and is checked whenever it is read. What fails in here fails no reading.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mugv_ds.config.regular_file import open_regular
from mugv_ds.data.storage import MAX_FILE_BYTES, Bucket, Range, in_memory
from mugv_ds.files.tensor_file import SampleError

_CRC_BYTES = 4
_KEPT_SHARE = 0.9  # of the limit, of what is kept when room is made: that reads the whole folder, and is to be rare

logger = logging.getLogger(__name__)
_warned: set[Path] = set()


@dataclass(frozen=True)
class Cache:
    """Entries by name, of at most `limit` bytes in all; those that were not used for longest make room for others.

    Args:
        folder: where they are; it is made. limit: bytes.
    """

    folder: Path
    limit: int

    def holds(self, name: str) -> bool:
        """Tells whether there is an entry, sound or not."""
        return self._path(name).exists()

    def get(self, name: str) -> np.ndarray | None:
        """Returns an entry's bytes, uint8 [n], and marks it as used; None: there is none. A damaged one is dropped."""
        path = self._path(name)
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                if not _CRC_BYTES <= size <= MAX_FILE_BYTES + _CRC_BYTES:
                    raise ValueError("no entry has this size")
                content = np.empty(size, np.uint8)
                if file.readinto(content) != size:
                    raise ValueError("truncated while it was read")
            content, crc = content[:-_CRC_BYTES], content[-_CRC_BYTES:].tobytes()
            if zlib.crc32(content) != int.from_bytes(crc, "big"):
                raise ValueError("its CRC-32 differs")
            os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._warn(error)
            self.drop(name)
            return None
        return content

    def put(self, name: str, content: np.ndarray) -> None:
        """Keeps bytes as an entry, unless they are too many or the disk does not take them."""
        path, size = self._path(name), len(content) + _CRC_BYTES
        if size > self.limit or path.exists():
            return
        half = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._reserve(size)
            try:
                with half.open("xb") as file:  # not flushed to the disk: what a crash leaves of it is noticed
                    file.write(content)
                    file.write(zlib.crc32(content).to_bytes(_CRC_BYTES, "big"))
                half.replace(path)
            finally:
                half.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def drop(self, name: str) -> None:
        """Removes an entry."""
        with contextlib.suppress(OSError):
            size = self._path(name).stat().st_size
            self._path(name).unlink()
            self._reserve(-size)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / digest

    def _reserve(self, size: int) -> None:
        """Counts `size` bytes more, for which there is room then."""
        with self._size_file() as file:
            said = file.read(32)
            total = int(said) if said.isdigit() else self._make_room(0)
            if total + size > self.limit:
                total = self._make_room(size)
            file.seek(0)
            file.truncate()
            file.write(str(max(total + size, 0)).encode())

    def _make_room(self, size: int) -> int:
        """Removes the entries that were not used for longest until `size` more fit; returns the bytes of the others."""
        entries = sorted(
            (about.st_mtime_ns, about.st_size, entry.path)
            for folder in os.scandir(self.folder)
            if folder.is_dir(follow_symlinks=False)
            for entry in os.scandir(folder)
            if (about := _stat(entry)) is not None
        )
        total = sum(length for _, length, _ in entries)
        if total + size <= self.limit:
            return total
        for _, length, path in entries:
            if total + size <= _KEPT_SHARE * self.limit:
                break
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            total -= length
        return total

    @contextmanager
    def _size_file(self) -> Iterator[BinaryIO]:
        with os.fdopen(os.open(self.folder / "size", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _warn(self, error: Exception) -> None:
        if self.folder not in _warned:
            _warned.add(self.folder)
            logger.warning("data.cache_dir = %s: %s; samples are fetched anew where it fails", self.folder, error)


@dataclass(frozen=True)
class CachedBucket:
    """`Files` of a bucket that are kept in a cache: tensors of shards, whose CRC-32 an index knows, and whole files.

    Headers of shards are not kept: an index is built once. A tensor that was written anew in its shard has another
    CRC-32 in a new index, and so another entry. Of whole files nothing tells that the store has others by now.
    """

    bucket: Bucket
    cache: Cache

    def __str__(self) -> str:
        return str(self.bucket)

    @contextmanager
    def open(self, path: str) -> Iterator["_CachedObject"]:
        """See `Files.open`."""
        with self.bucket.open(path) as blob:
            yield _CachedObject(blob.name, path, self)

    @contextmanager
    def whole(self, path: str) -> Iterator[Path]:
        """See `Files.whole`. One that cannot be used is not kept."""
        with self.bucket.open(path) as blob:  # which refuses what may be no path
            name = f"{blob.name}\nwhole"
            content = self.cache.get(name)
            if content is None:
                content = self.bucket.content(path)
                self.cache.put(name, content)
            try:
                with in_memory(content, blob.name) as local:
                    yield local
            except SampleError:
                self.cache.drop(name)
                raise

    def fetch(self, ranges: Iterable[Range]) -> None:
        """See `Files.fetch`."""
        self.bucket.fetch(wanted for wanted in ranges if not self.cache.holds(self._name(wanted)))

    def is_readable(self) -> bool:
        """See `Files.is_readable`."""
        return self.bucket.is_readable()

    def read(self, wanted: Range) -> np.ndarray:
        """See `Blob.read`."""
        if wanted.crc is None:
            return self.bucket.read(wanted)
        content = self.cache.get(self._name(wanted))
        if content is None:
            content = self.bucket.read(wanted)
            if zlib.crc32(content) == wanted.crc:
                self.cache.put(self._name(wanted), content)
        return content

    def _name(self, wanted: Range) -> str:
        return f"{self.bucket}/{wanted.path}\n{wanted.start} {wanted.length} {wanted.crc}"


@dataclass(frozen=True)
class _CachedObject:
    """A file of a bucket with a cache; see `Blob`."""

    name: str
    path: str
    files: CachedBucket

    def size(self) -> int:
        return self.files.bucket.size_of(self.path)

    def read(self, start: int, length: int, crc: int | None = None) -> np.ndarray:
        return self.files.read(Range(self.path, start, length, crc))


def _stat(entry: os.DirEntry) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # another process has removed it
        return None
