"""Finds the videos of a folder, tells them apart by their content, and keeps the plan of their units.

What is known lies in two files: `paths.parquet`, the files of the last scan with their SHA-256, and `videos.parquet`,
the unit of every content that was ever seen, which only grows. So new videos make new units and old ones keep theirs.
"""

import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular, read_text_file
from mugv_ds.data.paths import PathError, resolve
from mugv_ds.prepare.units import read_table, write_table

_FILES = pa.schema(
    [
        ("path", pa.string()),
        ("video", pa.string()),  # hex SHA-256; null where it could not be read
        ("error", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)
_PLAN = pa.schema([("unit", pa.int32()), ("video", pa.string())])
_MAX_LIST_BYTES = 1 << 30
_THREADS = 4
_BATCH = 10_000
_MAX_DEPTH = 64  # of folders; deeper is a loop of mounts


@dataclass(frozen=True)
class Source:
    """A file of the scan.

    Attributes:
        path: relative to the folder of videos. video: hex SHA-256, None where it could not be read.
        error: why not. bytes, mtime_ns: as the file system says.
    """

    path: str
    video: str | None
    error: str | None
    bytes: int
    mtime_ns: int

    def is_still(self, path: Path) -> bool:
        """Returns whether the file at a path has the size and time that it had when it was scanned."""
        try:
            facts = path.stat()
        except OSError:
            return False
        return (facts.st_size, facts.st_mtime_ns) == (self.bytes, self.mtime_ns)


class Scan:
    """The files of a folder, and the units of their contents; about 200 bytes a file.

    Args:
        files: one row a file, by path. plan: one row a content that was ever seen, in the order of the units.
    """

    def __init__(self, files: pa.Table, plan: pa.Table) -> None:
        self.files = files
        self._plan = plan.combine_chunks()
        self._unit = np.asarray(self._plan["unit"])
        place = pc.index_in(files["video"], value_set=self._plan["video"].combine_chunks())
        place = np.asarray(place.fill_null(len(plan)))
        self._order = np.argsort(place, kind="stable")  # of one content, files stay in the order of their paths
        self._place = place[self._order]

    @property
    def units(self) -> range:
        """Returns the numbers of the units."""
        return range(int(self._unit[-1]) + 1 if len(self._unit) else 0)

    @property
    def seen(self) -> pa.Array:
        """Returns the SHA-256 of all contents that were ever seen."""
        return self._plan["video"].combine_chunks()

    def videos(self, unit: int) -> list[str]:
        """Returns the SHA-256 of a unit's videos in their order, also of those that no file has any more."""
        first, last = np.searchsorted(self._unit, [unit, unit + 1])
        return self._plan["video"].slice(first, last - first).to_pylist()

    def sources(self, unit: int) -> list[Source]:
        """Returns the files of a unit's videos: by video, and by path where several have the same content."""
        first, last = np.searchsorted(self._place, np.searchsorted(self._unit, [unit, unit + 1]))
        return [Source(**row) for row in self.files.take(pa.array(self._order[first:last])).to_pylist()]

    def unreadable(self) -> list[Source]:
        """Returns the files that could not be read."""
        return [Source(**row) for row in self.files.filter(pc.is_null(self.files["video"])).to_pylist()]


def scan(
    videos: Path,
    plan: Path,
    *,
    suffixes: tuple[str, ...],
    unit: int,
    listed: Path | None = None,
    limit: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Scan:
    """Walks the folder of videos, hashes what is new or changed, and extends the plan.

    Args:
        videos: the folder; links that lead out of it are refused. plan: folder of the two files, made if it is missing.
        suffixes: endings of names, lower case. unit: videos of a new unit.
        listed: a file of paths, one a line, relative to the folder, to take instead of walking.
        limit: take at most so many files, the first by path. tell: is told of progress.

    Raises:
        InputError: the folder is none, or holds no video; a line of the list does not name a file in it.
        PathError: a path leads out of the folder. OSError: the plan cannot be written.
    """
    if not videos.is_dir():
        raise InputError(f"{videos}: no such folder; --videos names the folder of raw videos")
    names = sorted(set(_listed(videos, listed) if listed else _walk(videos, suffixes)))[:limit]
    if not names and listed:
        raise InputError(f"{listed}: names no file; give one path a line")
    if not names:
        raise InputError(f"{videos}: holds no file that ends in {', '.join(suffixes)}; see scan.suffixes")
    plan.mkdir(parents=True, exist_ok=True)
    known = _read(plan / "paths.parquet", _FILES)
    places = pc.index_in(pa.array([_shown(name) for name in names]), value_set=known["path"].combine_chunks())

    def look(name: str, place: int | None) -> Source:
        return _look(videos, name, None if place is None else Source(**known.slice(place, 1).to_pylist()[0]))

    parts, done = [_FILES.empty_table()], 0
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(look, names, places.to_pylist())
        while batch := list(itertools.islice(found, _BATCH)):
            parts.append(pa.Table.from_pylist([vars(source) for source in batch], _FILES))
            done += len(batch)
            tell(f"{done:,} of {len(names):,} files")
    files = pa.concat_tables(parts)
    write_table(plan / "paths.parquet", files)
    return Scan(files, _extend(plan / "videos.parquet", files["video"], unit))


def read_scan(plan: Path) -> Scan:
    """Returns what the last scan found.

    Raises:
        InputError: there was none.
    """
    files = _read(plan / "paths.parquet", _FILES)
    if not len(files):
        raise InputError(f"{plan}: nothing was scanned yet; `prepare.py run` or `prepare.py scan` comes first")
    return Scan(files, _read(plan / "videos.parquet", _PLAN))


def _walk(root: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yields the relative paths of regular files below a folder by their endings; links are not followed to folders."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")

    for folder, folders, files in os.walk(root, onerror=refuse):
        relative = Path(folder).relative_to(root)
        if len(relative.parts) >= _MAX_DEPTH:
            raise InputError(f"{folder}: more than {_MAX_DEPTH} folders deep; is a mount a loop?")
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield str(relative / name)


def _listed(root: Path, file: Path) -> Iterator[str]:
    for number, line in enumerate(read_text_file(file, _MAX_LIST_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        try:
            path = resolve(root, line)
        except PathError as error:
            raise PathError(f"{file}:{number}: {error}") from None
        if not path.exists():
            raise InputError(f"{file}:{number}: there is no {line!r} in {root}")
        yield os.path.normpath(line)


def _look(root: Path, name: str, known: Source | None) -> Source:
    """Returns what is known of a file, hashing it if it is not what it was at the last scan."""
    if _shown(name) != name:
        return Source(_shown(name), None, "its name is not UTF-8: rename it", 0, 0)
    try:
        path = resolve(root, name)  # a link that leads out is refused
        facts = path.stat()
        if known is not None and known.video and (known.bytes, known.mtime_ns) == (facts.st_size, facts.st_mtime_ns):
            return known
        if not stat.S_ISREG(facts.st_mode):
            return Source(name, None, "not a regular file", 0, 0)
        with open_regular(path) as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (facts.st_size, facts.st_mtime_ns):
            return Source(name, None, "changed while it was read: scan again when it is complete", 0, 0)
        return Source(name, content, None, facts.st_size, facts.st_mtime_ns)
    except (InputError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Source(name, None, reason.replace(f"{root}", "the folder of videos"), 0, 0)


def _shown(name: str) -> str:
    """Returns a name that can be written down, which one that is not UTF-8 cannot."""
    return name.encode(errors="backslashreplace").decode() if not name.isascii() else name


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    return read_table(path, schema=schema) if path.exists() else schema.empty_table()


def _extend(path: Path, videos: pa.ChunkedArray, size: int) -> pa.Table:
    """Puts contents that have no unit into new ones, by their hashes' order, and returns the whole plan."""
    plan = _read(path, _PLAN)
    new = pc.unique(videos.drop_null()).filter(pc.invert(pc.is_in(pc.unique(videos.drop_null()), plan["video"])))
    if len(new):
        first = 0 if not len(plan) else plan["unit"][-1].as_py() + 1
        numbers = pa.array(first + np.arange(len(new)) // size, pa.int32())
        plan = pa.concat_tables([plan, pa.table([numbers, new.sort()], schema=_PLAN)])
        write_table(path, plan)
    return plan
