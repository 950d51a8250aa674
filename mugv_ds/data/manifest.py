"""The manifest: a CSV of samples, and its memory-mapped Arrow index.

A list of dicts of 12 M rows costs 6–9 GB in every process; the index costs the pages that are touched. It is built
once for each content of the CSV and shared by all processes of a host.
"""

import csv
import errno
import hashlib
import itertools
import logging
import math
import posixpath
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_STRIDE as STRIDE
from mugv_ds.files.atomic import write_atomically
from mugv_ds.files.tensor_file import SampleError, UnsafeFileError, check_latent, load_tensors

REQUIRED_COLUMNS = ("sample_id", "source", "latent_path", "text_feat_path")
CHOICES = {"source": ("generated", "real"), "kind": ("image", "video"), "label": ("good", "bad")}

_INDEX_VERSION = 1  # part of the index's name: a change of the columns below must raise it
_SHAPE_COLUMNS = ("latent_t", "latent_h", "latent_w")
_FEATURES = Features(
    {
        **{name: Value("string") for name in (*REQUIRED_COLUMNS, "caption", "kind", "label", "pair_id")},
        "fps": Value("float64"),
        "rank": Value("int32"),
        **{name: Value("int32") for name in _SHAPE_COLUMNS},
    }
)
_INTEGER_COLUMNS = ("num_frames", "height", "width", "rank")
_OPTIONAL_COLUMNS = ("fps", "caption", "kind", "label", "pair_id", *_INTEGER_COLUMNS)

_MAX_LINE_BYTES = 1 << 20
_MAX_COLUMNS = 1000
_CHUNK_ROWS = 10_000
_HEADER_THREADS = 16  # opening files is waiting, on a network file system most of all
_UNREADABLE = (0, 0, 0)
_DIGITS = re.compile("[0-9]{1,6}")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

logger = logging.getLogger(__name__)

Shape = tuple[int, int, int]
Record = dict[str, Any]


class ManifestError(InputError):
    """The CSV is not a manifest. The message names file, line and what is wrong."""


class PathError(InputError):
    """A path of the manifest leads somewhere it must not. The message names it."""


@dataclass(frozen=True)
class Row:
    """One sample of the manifest.

    Attributes:
        sample_id: unique in the manifest.
        source: "generated" (latent already normalised) or "real" (raw).
        latent_path, text_feat_path: relative to the CSV's folder; `Index.resolve` opens them up.
        latent_shape: (T, H, W) of the latent; (0, 0, 0) where it could not be read.
        fps: frames a second, None where the manifest does not say.
        caption, kind, label, pair_id, rank: as in the CSV, None where it does not say.
    """

    sample_id: str
    source: str
    latent_path: str
    text_feat_path: str
    latent_shape: Shape
    fps: float | None
    caption: str | None
    kind: str | None
    label: str | None
    pair_id: str | None
    rank: int | None

    @property
    def height(self) -> int:
        """Pixels; those of the CSV, which are multiples of 8, or 8 × the latent's."""
        return STRIDE * self.latent_shape[1]

    @property
    def width(self) -> int:
        """Pixels, as `height`."""
        return STRIDE * self.latent_shape[2]


class Index:
    """The rows of a manifest, memory-mapped; cheap to pickle and to open in many processes.

    Args:
        path: Arrow file of `build_index`.
        root: folder that the rows' paths are relative to.

    Attributes:
        root: as given.
        digest: SHA-256 of the CSV, in hex; the identity of the data set.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.root = root
        self.digest = path.name.partition(".")[0]
        self._path = path
        table = Dataset.from_file(str(path)).data
        # Rows are taken from the columns directly: the formatting of `Dataset` takes several times as long.
        self._columns = dict(zip(table.column_names, table.columns, strict=True))

    def __reduce__(self) -> tuple:
        return Index, (self._path, self.root)

    def __len__(self) -> int:
        return len(self._columns["sample_id"])

    def row(self, i: int) -> Row:
        """Row `i` of the CSV, counted from 0 without the header.

        Raises:
            IndexError: there is no such row.
        """
        record = {name: column[i].as_py() for name, column in self._columns.items()}
        shape = tuple(record.pop(name) for name in _SHAPE_COLUMNS)
        return Row(latent_shape=shape, **record)

    def shapes(self) -> np.ndarray:
        """(T, H, W) of every row's latent: int32 [n, 3]; zeros where it could not be read."""
        return np.stack([self.column(name).to_numpy() for name in _SHAPE_COLUMNS], axis=1)

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the CSV that rows have too, memory-mapped; null where the CSV does not say.

        Raises:
            KeyError: there is no such column.
        """
        return self._columns[name]

    def resolve(self, relative: str) -> Path:
        """The file that a row's path names; see `resolve`."""
        return resolve(self.root, relative)


def open_index(csv_path: str | Path, index_dir: str | Path | None = None) -> Index:
    """Opens the index of a manifest, building it first where there is none for the CSV's present content.

    Args:
        csv_path: the manifest.
        index_dir: folder of the index; by default `.index` beside the CSV.

    Raises:
        ManifestError, PathError, UnsafeFileError, OSError: see `build_index`.
    """
    csv_path = Path(csv_path)
    path = build_index(csv_path, index_dir)
    index = Index(path, csv_path.parent)
    unreadable = int((index.shapes() == _UNREADABLE).all(axis=1).sum())
    if unreadable:
        logger.warning(
            "%s: %d of %d rows are left out, their latents could not be read when the index was built; "
            "repair them and delete %s to have them back",
            csv_path,
            unreadable,
            len(index),
            path,
        )
    return index


def build_index(csv_path: str | Path, index_dir: str | Path | None = None) -> Path:
    """Writes the Arrow index of a manifest and returns its path; returns at once if the CSV has one.

    Columns `sample_id, source, latent_path, text_feat_path` are required; `fps, height, width, num_frames, caption,
    kind, label, pair_id, rank` are optional, as are their values; others are ignored. A latent's shape comes from
    num_frames, height and width (pixels) when a row has all three, and from the header of the latent's file otherwise.
    A latent whose header is bad is logged and indexed with shape (0, 0, 0): one bad file of 12 M must not stop a run.

    The index is renamed into place when it is complete, so a killed build leaves none and two builders do no harm.

    Args:
        csv_path: the manifest.
        index_dir: folder of the index; by default `.index` beside the CSV.

    Raises:
        ManifestError: the CSV is not a manifest, or no row has a readable latent.
        PathError: a path is absolute, leads out of the CSV's folder, or is no regular file.
        UnsafeFileError: a latent's file asks for more than tensors.
        OSError: the file system failed.
    """
    csv_path = Path(csv_path)
    if not csv_path.is_file():
        raise ManifestError(f"{csv_path}: no such file")
    with csv_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = csv_path.parent / ".index" if index_dir is None else Path(index_dir)
    path = folder / f"{digest}.v{_INDEX_VERSION}.arrow"
    if path.exists():
        return path
    _check(csv_path)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as stream:
        _write(csv_path, stream)
    return path


def resolve(root: str | Path, relative: str) -> Path:
    """The real path of the file `relative` to `root`; a missing file is left to who opens it.

    Raises:
        PathError: the path is absolute, a URL or pipe, leads out of `root` (symlinks followed), or names something that
            exists and is not a regular file.
        FileNotFoundError: `root` itself is gone, as when a mount vanishes.
    """
    _check_lexically(relative)
    real_root = Path(root).resolve(strict=True)
    try:
        path = (real_root / relative).resolve()
        if not path.is_relative_to(real_root):
            raise PathError(f"{relative!r} leads out of {root}, to {path}")
        if not stat.S_ISREG(path.stat().st_mode):
            raise PathError(f"{relative!r} in {root} is not a regular file")
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError as error:  # how pathlib reports a loop of symlinks
        raise PathError(f"{relative!r} in {root}: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise PathError(f"{relative!r} in {root}: {error.strerror}") from error
    return path


def _write(csv_path: Path, stream: BinaryIO) -> None:
    """Writes the index of a checked CSV as one Arrow stream, a chunk of rows at a time."""
    rows, unreadable = 0, []
    with (
        ThreadPoolExecutor(_HEADER_THREADS) as pool,
        ArrowWriter(stream=stream, features=_FEATURES, writer_batch_size=_CHUNK_ROWS) as writer,
    ):
        records = _records(csv_path)
        while chunk := list(itertools.islice(records, _CHUNK_ROWS)):
            for (line, record), shape in zip(chunk, _shapes(csv_path, chunk, pool), strict=True):
                if isinstance(shape, SampleError):
                    unreadable.append(f"{csv_path}:{line}: {shape}")
                    shape = _UNREADABLE
                record.update(zip(_SHAPE_COLUMNS, shape, strict=True))
            columns = {name: [record[name] for _, record in chunk] for name in _FEATURES}
            writer.write_table(pa.table(columns, schema=_FEATURES.arrow_schema))
            rows += len(chunk)
        writer.finalize(close_stream=False)
    if len(unreadable) == rows:
        raise ManifestError(f"{csv_path}: no row has a readable latent; the first: {unreadable[0]}")
    for message in unreadable:
        logger.warning("left out: %s", message)


def _shapes(csv_path: Path, chunk: list[tuple[int, Record]], pool: ThreadPoolExecutor) -> list[Shape | SampleError]:
    """(T, H, W) of each row's latent, or why it cannot be known; files are opened only where the row does not say."""
    declared = [_declared_shape(record) for _, record in chunk]
    unknown = [row for row, shape in zip(chunk, declared, strict=True) if None in shape]
    stored = pool.map(partial(_stored_shape, csv_path), unknown)
    return [next(stored) if None in shape else shape for shape in declared]


def _declared_shape(record: Record) -> tuple[int | None, int | None, int | None]:
    """(T, H, W) as far as the row says."""
    frames, height, width = record["num_frames"], record["height"], record["width"]
    return frames and math.ceil(frames / STRIDE), height and height // STRIDE, width and width // STRIDE


def _stored_shape(csv_path: Path, numbered: tuple[int, Record]) -> Shape | SampleError:
    """(T, H, W) from the header of a row's latent, or what is wrong with the file.

    Raises:
        ManifestError, PathError, UnsafeFileError: see `build_index`.
    """
    line, record = numbered
    try:
        path = resolve(csv_path.parent, record["latent_path"])
        shape = tuple(check_latent(load_tensors(path), path).shape[1:])
    except PathError as error:
        raise PathError(f"{csv_path}:{line}: latent_path: {error}") from error
    except UnsafeFileError:
        raise
    except SampleError as error:
        return error
    for name, declared, stored in zip(("num_frames", "height", "width"), _declared_shape(record), shape, strict=True):
        if declared not in (None, stored):
            raise ManifestError(
                f"{csv_path}:{line}: {name} = {record[name]} means {declared} in the latent, but {path} has {stored}"
            )
    return shape


def _check(csv_path: Path) -> None:
    """Reads the whole CSV once, so that its errors come before any latent is opened.

    Ids are compared by their 128-bit hashes: 16 bytes a row whatever their length.

    Raises:
        ManifestError, PathError: see `build_index`.
    """
    hashes, lines = bytearray(), array("q")
    for line, record in _records(csv_path):
        hashes += hashlib.blake2b(record["sample_id"].encode(), digest_size=16).digest()
        lines.append(line)
    if not lines:
        raise ManifestError(f"{csv_path}:1: only a header, no samples")
    keys = np.frombuffer(hashes, np.uint64).reshape(-1, 2)
    order = np.lexsort(keys.T)  # stable: rows with the same id stay in the order of their lines
    again = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]).all(axis=1))
    if len(again):
        first, second = min(((order[i], order[i + 1]) for i in again), key=lambda pair: pair[1])
        raise ManifestError(f"{csv_path}:{lines[second]}: duplicate sample_id, first used in line {lines[first]}")


def _records(csv_path: Path) -> Iterator[tuple[int, Record]]:
    """(line where the row starts, its columns) for each row; absent columns and empty values are None.

    Raises:
        ManifestError, PathError: see `build_index`.
    """
    with csv_path.open("rb") as file:
        reader = csv.reader(_lines(csv_path, file), strict=True)
        rows = _rows(csv_path, reader)
        line, header = next(rows, (1, None))
        if header is None:
            raise ManifestError(f"{csv_path}:1: empty")
        where = f"{csv_path}:{line}"
        if len(header) > _MAX_COLUMNS:
            raise ManifestError(
                f"{where}: {len(header)} columns, at most {_MAX_COLUMNS} are allowed; is it a header?"
            )
        for name, count in Counter(header).items():
            if count > 1:
                raise ManifestError(f"{where}: duplicate column {name[:100]!r}")
        for name in REQUIRED_COLUMNS:
            if name not in header:
                shown = ", ".join(header)
                shown = shown if len(shown) <= 300 else f"{shown[:300]}…"
                raise ManifestError(f"{where}: missing column {name!r}; the header has {shown}")
        positions = [(name, header.index(name)) for name in (*REQUIRED_COLUMNS, *_OPTIONAL_COLUMNS) if name in header]
        absent = dict.fromkeys(_OPTIONAL_COLUMNS)
        for line, values in rows:
            if len(values) != len(header):
                raise ManifestError(f"{csv_path}:{line}: {len(values)} values, the header has {len(header)}")
            record = absent | {name: values[position] or None for name, position in positions}
            try:
                _convert(record)
            except (ManifestError, PathError) as error:
                raise type(error)(f"{csv_path}:{line}: {error}") from None
            yield line, record


def _rows(csv_path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """(line where it starts, values) for each row that is not blank."""
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ManifestError(f"{csv_path}:{line}: {error}; is a quote left open in this row?") from error
        if values:
            yield line, values


def _lines(csv_path: Path, file: BinaryIO) -> Iterator[str]:
    """The lines of a CSV opened in binary, decoded; a byte-order mark is dropped."""
    for number, raw in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), 1):
        if len(raw) == _MAX_LINE_BYTES:
            raise ManifestError(f"{csv_path}:{number}: longer than {_MAX_LINE_BYTES} bytes")
        if b"\0" in raw:
            raise ManifestError(f"{csv_path}:{number}: contains a NUL byte")
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ManifestError(f"{csv_path}:{number}: not UTF-8 ({error.reason}, byte {error.start})") from error


def _convert(record: Record) -> None:
    """Checks a row's values and turns numbers from text, in place; messages lack the line.

    Raises:
        ManifestError, PathError: see `build_index`.
    """
    if not (record["sample_id"] or "").strip():
        raise ManifestError("blank sample_id")
    for name, choices in CHOICES.items():
        if record[name] not in choices and (record[name] is not None or name in REQUIRED_COLUMNS):
            raise ManifestError(f"unknown {name} {record[name] or ''!r}: must be {' or '.join(choices)}")
    for name in ("latent_path", "text_feat_path"):
        _check_lexically(record[name] or "", name)
    if record["fps"] is not None:
        record["fps"] = _positive_float(record["fps"])
    for name in _INTEGER_COLUMNS:
        if record[name] is not None:
            record[name] = _integer(name, record[name])
    for name in ("height", "width"):
        if record[name] is not None and record[name] % STRIDE:
            raise ManifestError(f"{name} = {record[name]}: must be a multiple of {STRIDE} pixels")


@lru_cache  # a column has few different values
def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ManifestError(f"fps = {text!r}: must be a number above 0")
    return value


@lru_cache
def _integer(name: str, text: str) -> int:
    smallest = 0 if name == "rank" else 1
    if not _DIGITS.fullmatch(text) or int(text) < smallest:
        raise ManifestError(f"{name} = {text!r}: must be a whole number from {smallest} to 999999")
    return int(text)


def _check_lexically(relative: str, name: str = "path") -> None:
    """What can be told of a path without touching the disk.

    Raises:
        PathError: it is blank, absolute, a URL or pipe, holds a NUL, or climbs out with `..`.
    """
    if not relative.strip() or "\0" in relative:
        raise PathError(f"{name} {relative!r}: must name a file")
    if relative.startswith("/"):
        raise PathError(f"{name} {relative!r}: absolute; must be relative to the CSV's folder")
    if _SCHEME.match(relative):
        raise PathError(f"{name} {relative!r}: a URL or pipe; must be a file in the CSV's folder")
    if ".." in relative and posixpath.normpath(relative).partition("/")[0] == "..":
        raise PathError(f"{name} {relative!r}: leads out of the CSV's folder")
