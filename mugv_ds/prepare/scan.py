"""Finds the videos of a folder, tells them apart by their content, and keeps the plan of their units.

What is known lies in two files: `paths.parquet`, the files of the last scan with their SHA-256, and `videos.parquet`,
the unit of every content that was ever seen, which only grows. So new videos make new units and old ones keep theirs.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular, read_text_file
from mugv_ds.data.paths import PathError, resolve
from mugv_ds.prepare.units import read_table, write_table

_PATHS = pa.schema(
    [
        ("path", pa.string()),
        ("video", pa.string()),  # hex SHA-256; null where it could not be read
        ("error", pa.string()),
        ("bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)
_VIDEOS = pa.schema([("unit", pa.int32()), ("video", pa.string())])
_MAX_LIST_BYTES = 1 << 30
_THREADS = 4
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


@dataclass(frozen=True)
class Scan:
    """The files of a folder, and the units of their contents.

    Attributes:
        sources: all files, by path. units: number → SHA-256 of its videos in their order.
    """

    sources: tuple[Source, ...]
    units: dict[int, tuple[str, ...]]

    def paths(self) -> dict[str, str]:
        """Returns SHA-256 → path of each content; of several files that hold it, the first."""
        found: dict[str, str] = {}
        for source in self.sources:
            if source.video is not None:
                found.setdefault(source.video, source.path)
        return found

    def copies(self) -> dict[str, str]:
        """Returns path → path of the first file with the same content, of the files that are not the first."""
        first = self.paths()
        return {s.path: first[s.video] for s in self.sources if s.video is not None and first[s.video] != s.path}


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
    if not names:
        raise InputError(f"{videos}: holds no file that ends in {', '.join(suffixes)}; see scan.suffixes")
    plan.mkdir(parents=True, exist_ok=True)
    known = {source.path: source for source in _read_paths(plan)}
    done = 0

    def look(name: str) -> Source:
        return _look(videos, name, known.get(name))

    sources = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for source in threads.map(look, names):
            sources.append(source)
            done += 1
            tell(f"{done:,} of {len(names):,} files")
    columns = {field.name: [getattr(source, field.name) for source in sources] for field in _PATHS}
    write_table(plan / "paths.parquet", pa.table(columns, schema=_PATHS))
    return Scan(tuple(sources), _extend(plan, {s.video for s in sources if s.video is not None}, unit))


def read_scan(plan: Path) -> Scan:
    """Returns what the last scan found.

    Raises:
        InputError: there was none.
    """
    sources = _read_paths(plan)
    if not sources:
        raise InputError(f"{plan}: nothing was scanned yet; `prepare.py run` or `prepare.py scan` comes first")
    return Scan(tuple(sources), _read_units(plan))


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
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="backslashreplace").decode()
        return Source(shown, None, "its name is not UTF-8: rename it", 0, 0)
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
        return Source(name, None, reason, 0, 0)


def _read_paths(plan: Path) -> list[Source]:
    path = plan / "paths.parquet"
    return [Source(**row) for row in read_table(path, schema=_PATHS).to_pylist()] if path.exists() else []


def _read_units(plan: Path) -> dict[int, tuple[str, ...]]:
    path, units = plan / "videos.parquet", {}
    if path.exists():
        table = read_table(path, schema=_VIDEOS)
        for unit, video in zip(table["unit"].to_pylist(), table["video"].to_pylist(), strict=True):
            units.setdefault(unit, []).append(video)
    return {unit: tuple(videos) for unit, videos in units.items()}


def _extend(plan: Path, found: set[str], size: int) -> dict[int, tuple[str, ...]]:
    """Puts contents that have no unit into new ones, by their hashes' order, and returns all units."""
    units = _read_units(plan)
    new = sorted(found - {video for videos in units.values() for video in videos})
    first = max(units, default=-1) + 1
    units |= {first + i: tuple(new[i * size : (i + 1) * size]) for i in range(-(-len(new) // size))}
    if new:
        rows = [(unit, video) for unit, videos in sorted(units.items()) for video in videos]
        columns = dict(zip(("unit", "video"), zip(*rows, strict=True), strict=True))
        write_table(plan / "videos.parquet", pa.table(columns, schema=_VIDEOS))
    return units
