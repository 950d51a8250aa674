"""The manifest: a CSV of samples, and how its index is built.

A list of dicts of 12 M rows costs 6–9 GB in every process; the index costs the pages that are touched. It is built
once for each content of the CSV and shared by all processes of a host.
"""

import csv
import hashlib
import io
import itertools
import logging
import math
import re
import shutil
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from mugv_ds.config.errors import InputError, TransientError
from mugv_ds.config.model import LATENT_STRIDE as STRIDE
from mugv_ds.config.model import MAX_LATENT_SIDE
from mugv_ds.config.regular_file import open_regular
from mugv_ds.config.text_encoder import TEXT_ENCODER_NAME
from mugv_ds.config.url import is_url, parent_url
from mugv_ds.data.buckets import Shape as Shape  # what others take from here
from mugv_ds.data.cache import Cache, CachedBucket
from mugv_ds.data.headers import SIZES, Latents, declared_shapes, prepare_processes, read_shapes
from mugv_ds.data.index import (
    PLACES,
    SCHEMA,
    VERSION,
    Facts,
    Index,
    complete,
    digest_of,
    fault,
    kept_path,
    open_columns,
)
from mugv_ds.data.index import Row as Row
from mugv_ds.data.paths import ManifestError, PathError, check_lexically, distinct_files
from mugv_ds.data.places import Rows, read_places, shard_numbers
from mugv_ds.data.progress import Progress
from mugv_ds.data.storage import Bucket, Files, Folder, files_below
from mugv_ds.files.atomic import write_atomically
from mugv_ds.files.copies import copied
from mugv_ds.files.objects import ObjectFolder

REQUIRED_COLUMNS = ("sample_id", "source", "latent_path", "text_feat_path")
_PATHS = ("latent_path", "text_feat_path")
CHOICES = {"source": ("generated", "real"), "kind": ("image", "video"), "label": ("good", "bad")}

_INTEGER_COLUMNS = (*SIZES, "rank")
_OPTIONAL_COLUMNS = ("fps", "weight", "caption", "kind", "label", "pair_id", *_INTEGER_COLUMNS)
_MAX_SIDE = MAX_LATENT_SIDE * STRIDE
# Sides are bounded by the model's positions. For frames it has no bound; a hundred thousand are an hour.
_RANGES = {"num_frames": (1, 100_000), "height": (1, _MAX_SIDE), "width": (1, _MAX_SIDE), "rank": (0, 999_999)}
_NUMBERS = {"fps": (0.1, 1000.0), "weight": (1e-3, 1e3)}
_FEW_VALUES = (*CHOICES, *_NUMBERS, *_INTEGER_COLUMNS)  # columns that have few different ones

_MAX_LINE_BYTES = 1 << 20
_MAX_COLUMNS = 1000
_BLOCK_BYTES = 1 << 18
_LARGE_BYTES = 1 << 25  # some 150,000 rows
_CHUNK_ROWS = 10_000
_HASH_BYTES = 1 << 20
_DIGITS = re.compile("[0-9]{1,6}")

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def open_index(
    csv_path: str | Path, index_dir: str | Path | None = None, root: str | None = None, cache: Cache | None = None
) -> Index:
    """Opens the index of a manifest, building it first where there is none for the CSV's present content.

    Args:
        csv_path: the manifest, a file or a URL, of which the index is one of a copy on this host.
        index_dir: folder of the index; by default `.index` beside the CSV.
        root: folder or URL that the manifest's paths are relative to; by default the CSV's folder.
        cache: keeps what comes from a URL; by default nothing does.

    Raises:
        ManifestError, PathError, UnsafeFileError, TrainingError, ConfigError: see `build_index`.
    """
    if is_url(csv_path):
        root = root or parent_url(str(csv_path))[0]
        csv_path = _copy(str(csv_path))
    csv_path = Path(csv_path)
    path = build_index(csv_path, index_dir, root)
    files = _files(csv_path, root)
    if cache is not None and isinstance(files, Bucket):
        files = CachedBucket(files, cache)
    index = Index(path, csv_path.parent, files)
    unreadable = int((~index.shapes().any(axis=1)).sum())
    if unreadable:
        logger.warning(
            "%s: %d of %d rows are left out, their latents could not be read when the index was built; "
            "repair them and delete %s to have them back",
            csv_path,
            unreadable,
            len(index),
            path.with_suffix(".json"),
        )
    return index


def _copy(url: str) -> Path:
    """A copy of the CSV at a URL, with the text_encoder.json beside it, if there is one.

    Raises:
        ManifestError: there is no CSV. TrainingError: the store failed.
    """
    folder_url, name = parent_url(url)
    try:
        folder, there = copied(ObjectFolder(folder_url, "data.manifest"), (name, TEXT_ENCODER_NAME))
    except OSError as error:
        raise TransientError(f"{error.filename or url}: {error.strerror}") from error
    if name not in there:
        raise ManifestError(f"{url}: missing")
    return folder / name


def _files(csv_path: Path, root: str | None) -> Files:
    return Folder(csv_path.parent) if root is None else files_below(root)


def build_index(csv_path: str | Path, index_dir: str | Path | None = None, root: str | None = None) -> Path:
    """Writes the index of a manifest and returns the path of its Arrow file; an index that holds is left as it is.

    Columns `sample_id, source, latent_path, text_feat_path` are required; `fps, height, width, num_frames, caption,
    kind, label, pair_id, rank, weight` are optional, as are their values; others are ignored. A path is a file's, or
    `….safetensors#key` for a tensor in a shard (see `data.shards`), whose header is read. The shape of a latent that
    has a file of its own comes from num_frames, height and width (pixels) when a row has all three, and from the file's
    header otherwise. A row with a bad header, or with a tensor that its shard does not have, is logged and indexed with
    shape (0, 0, 0): one bad file of 12 M must not stop a run.

    A killed build leaves no index, and what it has read of headers serves the next one (see `data.headers`). Headers
    are not read again either of rows that an older CSV had, if the present one only has more rows at its end. Two
    builders do no harm. An index that is not as it was when it was complete is built anew, which a warning says.

    Args:
        csv_path: the manifest.
        index_dir: folder of the index; by default `.index` beside the CSV.
        root: folder or URL that the manifest's paths are relative to; by default the CSV's folder.

    Raises:
        ManifestError: the CSV cannot be read, is not a manifest or changes meanwhile; no row has a readable latent; or
            the index cannot be written.
        PathError: a path is absolute, leads out of the folder or URL, or is no regular file.
        UnsafeFileError: a latent's file asks for more than tensors.
        ConfigError: fsspec cannot open the URL.
        TrainingError: the file system failed, or a process that reads headers was killed.
    """
    csv_path = Path(csv_path)
    digest, files = hash_csv(csv_path), _files(csv_path, root)
    folder = csv_path.parent / ".index" if index_dir is None else Path(index_dir)
    of_root = "" if root is None else f"{hashlib.sha256(root.encode()).hexdigest()[:12]}."
    path = folder / f"{digest}.{of_root}v{VERSION}.arrow"
    with _writing(folder):
        if path.with_suffix(".json").exists():
            why = fault(path)
            if why is None:
                return path
            logger.warning("%s; the index is built anew", why)
            path.with_suffix(".json").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _build(csv_path, path, files)
        except InputError:
            if not path.with_suffix(".json").exists():  # else another builder has completed it meanwhile
                path.unlink(missing_ok=True)
            raise
    return path


def _build(csv_path: Path, path: Path, files: Files) -> None:
    """Writes an index, its facts last, and removes the parts that it was made of."""
    csv_bytes, root = csv_path.stat().st_size, _root(files)
    if csv_bytes > _LARGE_BYTES:
        prepare_processes()
    with write_atomically(path) as stream:
        lines, sizes, hashes = _write_columns(csv_path, stream)
    columns, parts = open_columns(path), path.with_suffix(".parts")
    _check_unique(csv_path, columns["sample_id"], hashes, lines)
    shards = {side: shard_numbers(columns, side) for side in ("latent", "text")}
    single = shards["latent"] < 0
    shapes = declared_shapes(sizes)
    shapes[~single] = 0
    sharded = any((numbers >= 0).any() for numbers in shards.values())
    places = np.zeros(len(shapes), PLACES) if sharded else None
    if sharded or not shapes.any(axis=1).all():
        _take_over(csv_path, csv_bytes, path.parent, root, shapes, places)
    latents = Latents(csv_path, files, lines, sizes, columns["latent_path"], single)
    unreadable = read_shapes(latents, shapes, parts)
    if places is not None:
        rows = Rows(csv_path, files, path, lines, sizes)
        wrong = read_places(rows, shards, shapes, places, parts)
        without = [row for row, _ in wrong]
        shapes[without], places[without] = 0, 0
        unreadable += [message for _, message in sorted(wrong)]
    if not shapes.any():
        raise ManifestError(f"{csv_path}: no row has a readable latent; the first: {unreadable[0]}")
    for message in unreadable:
        logger.warning("left out: %s", message)
    if hash_csv(csv_path) != digest_of(path):
        raise ManifestError(f"{csv_path}: changed while it was being read; start again when it is complete")
    complete(path, shapes, places, root, csv_bytes)
    shutil.rmtree(parts, ignore_errors=True)  # another builder may be removing it too


def _root(files: Files) -> str:
    """What tells one place of files from another."""
    return str(files.root.resolve()) if isinstance(files, Folder) else str(files)


def _take_over(csv_path: Path, csv_bytes: int, older: Path, root: str, shapes: np.ndarray, places: np.ndarray | None):
    """Takes what is known of the CSV's first rows from the largest index of an older CSV that it begins with.

    Args:
        older: folder of indexes; one for another root is not taken.
        shapes: int32 [rows, 3], zeros where it is not known. places: `PLACES` [rows]; None: no row has one.
    """
    found = []
    for file in older.glob(f"*.v{VERSION}.json"):
        try:
            facts = Facts.of(file)
            if facts.root == root and 0 < facts.csv_bytes < csv_bytes:
                found.append((facts.csv_bytes, file.with_suffix(".arrow")))
        except (OSError, ValueError, TypeError):
            continue  # damaged: it is told to who opens that index
    beginnings = []  # (index, whether its CSV ends with a complete line)
    with _reading(csv_path), csv_path.open("rb") as file:
        hashed, read, block = hashlib.sha256(), 0, b""
        for size, path in sorted(found):
            while read < size and (block := file.read(min(_HASH_BYTES, size - read))):
                hashed.update(block)
                read += len(block)
            if hashed.hexdigest() == digest_of(path):
                beginnings.append((path, block.endswith(b"\n")))
    for path, whole in reversed(beginnings):
        if fault(path) is None:
            index = Index(path, path.parent, Folder(path.parent))
            rows = len(index) if whole else len(index) - 1  # the last row may have gone on
            readable = index.shapes()[:rows].any(axis=1)
            unknown = readable & ~shapes[:rows].any(axis=1)
            shapes[:rows][unknown] = index.shapes()[:rows][unknown]
            if places is not None and index.places() is not None:
                places[:rows][readable] = index.places()[:rows][readable]
            return


def _write_columns(csv_path: Path, stream: BinaryIO) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes the columns of a CSV as one Arrow stream, a chunk of rows at a time, and checks all of them.

    Returns:
        int64 [rows], the line of each row; int32 [rows, 3], its num_frames, height and width, 0 where it does not say;
        int64 [rows], a hash of its id.

    Raises:
        ManifestError, PathError: see `build_index`.
    """
    hashes, lines, sizes, progress = array("q"), array("q"), [], Progress(str(csv_path))
    opened = _open_table(csv_path, REQUIRED_COLUMNS, _OPTIONAL_COLUMNS)
    with pa.ipc.new_stream(stream, SCHEMA) as writer, opened as (positions, rows):
        for of_rows, cells in _chunks(rows):
            columns = _converted(csv_path, of_rows, cells, positions)
            lines.extend(of_rows)
            hashes.extend(map(hash, columns["sample_id"]))
            sizes.append(np.array([[size or 0 for size in columns[name]] for name in SIZES], np.int32).T)
            for name in _PATHS:
                columns[name] = list(map(kept_path, columns[name], columns["sample_id"]))
            types = zip(SCHEMA.names, SCHEMA.types, strict=True)
            arrays = [pa.array(columns[name], type_) for name, type_ in types]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
            progress.tell(f"{len(lines):,} rows read")
        if not lines:
            raise ManifestError(f"{csv_path}:1: only a header, no samples")
    return np.frombuffer(lines, np.int64), np.concatenate(sizes), np.frombuffer(hashes, np.int64)


def _chunks(rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[list[int], list[list[str]]]]:
    """The lines and the columns of a chunk of rows at a time.

    Rows are not kept as lists: to look at each of them again and again would take the garbage collector as long as all
    else takes.
    """
    while True:
        lines, cells = [], []
        for line, values in itertools.islice(rows, _CHUNK_ROWS):
            lines.append(line)
            cells += values
        if not lines:
            return
        width = len(cells) // len(lines)
        yield lines, [cells[at::width] for at in range(width)]


def _check_unique(csv_path: Path, ids: pa.ChunkedArray, hashes: np.ndarray, lines: np.ndarray) -> None:
    """Refuses ids that are used twice; only those of the same hash are compared.

    Args:
        ids: of the rows. hashes, lines: int64 [rows], a hash of each id, and where its row starts.

    Raises:
        ManifestError: an id is used twice.
    """
    order = np.argsort(hashes)
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    first: dict[str, int] = {}
    for row in np.unique(order[[*same, *(same + 1)]]).tolist():
        if (sample_id := ids[row].as_py()) in first:
            where = f"{csv_path}:{lines[row]}"
            raise ManifestError(f"{where}: duplicate sample_id, first used in line {lines[first[sample_id]]}")
        first[sample_id] = row


def hash_csv(csv_path: Path) -> str:
    """Hex SHA-256 of the CSV.

    Raises:
        ManifestError: it is no regular file, or cannot be read.
    """
    with _reading(csv_path):
        if not stat.S_ISREG(csv_path.stat().st_mode):  # opening a FIFO would wait for its writer
            raise ManifestError(f"{csv_path}: a folder, FIFO or device; must be a CSV file")
        with csv_path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(csv_path: Path) -> Iterator[None]:
    """Turns errors of the file system that come from reading the CSV into ManifestError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(f"{csv_path}: no such file") from error
    except OSError as error:
        raise ManifestError(f"{csv_path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns errors of the file system that come from the folder of the index into ManifestError."""
    try:
        yield
    except OSError as error:
        raise ManifestError(
            f"{folder}: the index cannot be written here ({error.strerror or error}); set data.index_dir to a folder "
            "that can be written and has room"
        ) from error


def read_records(
    csv_path: Path,
    required: Sequence[str] = REQUIRED_COLUMNS,
    optional: Sequence[str] = _OPTIONAL_COLUMNS,
    convert: Callable[[Record], None] | None = None,
) -> Iterator[tuple[int, Record]]:
    """(line where the row starts, its columns) for each row; absent columns and empty values are None.

    Args:
        required, optional: names of the columns. convert: checks a row and turns numbers from text, in place, with
            messages that lack the line; by default as a manifest of latents asks.

    Raises:
        ManifestError, PathError: see `build_index`. NotRegularError: it is a folder, FIFO or device.
    """
    absent = dict.fromkeys(optional)
    with _open_table(csv_path, required, optional) as (positions, rows):
        for line, values in rows:
            record = absent | {name: values[position] or None for name, position in positions.items()}
            try:
                (convert or _convert)(record)
            except (ManifestError, PathError) as error:
                raise type(error)(f"{csv_path}:{line}: {error}") from None
            yield line, record


@contextmanager
def _open_table(
    csv_path: Path, required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[dict[str, int], Iterator[tuple[int, list[str]]]]]:
    """Opens a CSV: the places of those columns that it has, and (line where it starts, values) for each row.

    Raises:
        ManifestError, NotRegularError: see `read_records`.
    """
    with _reading(csv_path), open_regular(csv_path) as file:
        rows = _rows(csv_path, csv.reader(_lines(csv_path, file), strict=True))
        line, header = next(rows, (1, None))
        if header is None:
            raise ManifestError(f"{csv_path}:1: empty")
        where = f"{csv_path}:{line}"
        if len(header) > _MAX_COLUMNS:
            raise ManifestError(f"{where}: {len(header)} columns, at most {_MAX_COLUMNS} are allowed; is it a header?")
        for name, count in Counter(header).items():
            if count > 1:
                raise ManifestError(f"{where}: duplicate column {name[:100]!r}")
        for name in required:
            if name not in header:
                shown = ", ".join(header)
                shown = shown if len(shown) <= 300 else f"{shown[:300]}…"
                raise ManifestError(f"{where}: missing column {name!r}; the header has {shown}")
        positions = {name: header.index(name) for name in (*required, *optional) if name in header}
        yield positions, _of_width(csv_path, len(header), rows)


def _of_width(csv_path: Path, width: int, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    """The rows, of which each has as many values as the header."""
    for line, values in rows:
        if len(values) != width:
            raise ManifestError(f"{csv_path}:{line}: {len(values)} values, the header has {width}")
        yield line, values


def column_names(csv_path: Path) -> list[str]:
    """The names in the header of a CSV, as it has them; `read_records` says what is wrong with them.

    Raises:
        ManifestError: it cannot be read. NotRegularError: it is a folder, FIFO or device.
    """
    with _reading(csv_path), open_regular(csv_path) as file:
        _, header = next(_rows(csv_path, csv.reader(_lines(csv_path, file), strict=True)), (1, []))
        return header


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
    """The lines of a CSV opened in binary, decoded many at once; a byte-order mark is dropped."""
    done = 0
    while block := file.read(_BLOCK_BYTES) + file.readline(_MAX_LINE_BYTES):
        lines = io.BytesIO(block).readlines()
        try:
            text = block.decode("utf-8" if done else "utf-8-sig")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text or max(map(len, lines)) >= _MAX_LINE_BYTES:
            yield from _checked(csv_path, lines, done + 1)
        yield from io.StringIO(text, newline="\n")
        done += len(lines)


def _checked(csv_path: Path, lines: list[bytes], first: int) -> Iterator[str]:
    """Lines, numbered from `first` on, up to the one that is wrong, at which it raises."""
    for number, raw in enumerate(lines, first):
        if len(raw) >= _MAX_LINE_BYTES:
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
    for name in _PATHS:
        for file in distinct_files([record[name] or ""]):
            _check_file(file, name)
    for name in _FEW_VALUES:
        record[name] = _value(name, record[name])


def _converted(
    csv_path: Path, lines: list[int], cells: list[list[str]], positions: dict[str, int]
) -> dict[str, Sequence[Any]]:
    """The columns of rows, as `_convert` leaves them; a column's different values are checked once a call.

    Raises:
        ManifestError, PathError: see `build_index`.
    """
    names = (*REQUIRED_COLUMNS, *_OPTIONAL_COLUMNS)
    columns: dict[str, Sequence[Any]] = {}
    try:
        for name in names:
            texts = cells[positions[name]] if name in positions else ("",) * len(lines)
            different = set(texts) if name in _FEW_VALUES else ()
            values = {text: _value(name, text or None) for text in different}
            if len(values) == 1:
                columns[name] = [*values.values()] * len(lines)
            elif values:
                columns[name] = [values[text] for text in texts]
            else:
                columns[name] = [text or None for text in texts]
        if not all(sample_id and not sample_id.isspace() for sample_id in columns["sample_id"]):
            raise ManifestError("blank sample_id")
        for name in _PATHS:
            for file in distinct_files(cells[positions[name]]):
                _check_file(file, name)
    except (ManifestError, PathError):
        for line, *values in zip(lines, *cells, strict=True):  # which of them it is
            try:
                _convert(dict.fromkeys(names) | {name: values[at] or None for name, at in positions.items()})
            except (ManifestError, PathError) as error:
                raise type(error)(f"{csv_path}:{line}: {error}") from None
        raise
    return columns


_check_file = lru_cache(1 << 10)(check_lexically)  # rows of a shard follow each other as a rule


@lru_cache(1 << 12)
def _value(name: str, text: str | None) -> Any:
    """The value of a cell of a column that has few different ones; messages lack the line."""
    if name in CHOICES:
        if text not in CHOICES[name] and (text is not None or name in REQUIRED_COLUMNS):
            raise ManifestError(f"unknown {name} {text or ''!r}: must be {' or '.join(CHOICES[name])}")
        return text
    if text is None:
        return None
    if name in _NUMBERS:
        return _number(name, text)
    value = whole_number(name, text)
    if name in ("height", "width") and value % STRIDE:
        raise ManifestError(f"{name} = {text}: must be a multiple of {STRIDE} pixels")
    return value


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    smallest, largest = _NUMBERS[name]
    if not smallest <= value <= largest:
        raise ManifestError(f"{name} = {text!r}: must be a number from {smallest:g} to {largest:g}")
    return value


@lru_cache
def whole_number(name: str, text: str) -> int:
    """Returns the number in a column of whole numbers.

    Raises:
        ManifestError: it is none, or out of the column's range.
    """
    smallest, largest = _RANGES[name]
    if not _DIGITS.fullmatch(text) or not smallest <= int(text) <= largest:
        reach = ", as far as the model has positions" if largest == _MAX_SIDE else ""
        raise ManifestError(f"{name} = {text!r}: must be a whole number from {smallest} to {largest}{reach}")
    return int(text)
