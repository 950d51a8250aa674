"""Where the tensors of rows lie in shards, from the shards' headers: each is read once, whatever the rows' order.

Rows are grouped by shard. As with latents that have files of their own, few headers are read in threads, many in
processes, and what they say of some 50,000 rows is kept in a part as soon as it is known: a build that is killed goes
on where it was.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from mugv_ds.config.errors import TransientError
from mugv_ds.config.model import LATENT_CHANNELS, MAX_LATENT_SIDE
from mugv_ds.data import headers
from mugv_ds.data.index import CODES, open_columns, whole_path
from mugv_ds.data.paths import PathError, split_key
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.progress import Progress
from mugv_ds.data.shards import Entry, find, read_header
from mugv_ds.data.storage import Files
from mugv_ds.files.tensor_file import SampleError

Side = Literal["latent", "text"]
Columns = dict[str, "Column"]
Wrong = tuple[int, str]  # a row, and what is wrong with its tensor

_COLUMNS = {"latent": "latent_path", "text": "text_feat_path"}
_FEW_ROWS = 200_000  # about 2 s of one core
_PART_ROWS = 50_000
_TASK_ROWS = 2_000
_MAX_TEXT_SIDE = (1 << 16) - 1  # tokens and channels have two bytes each in an index
_CODE_OF = {name: code for code, name in enumerate(CODES)}
_FOUND = np.dtype([("row", "<i4"), ("offset", "<u4"), ("crc", "<u4"), ("dtype", "u1"), ("shape", "<i4", (3,))])


class Column:
    """A column of an index, of which rows are taken in any order; Arrow itself would copy all of it first.

    Args:
        values: the column.
    """

    def __init__(self, values: pa.ChunkedArray) -> None:
        self._chunks = values.chunks
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def take(self, rows: np.ndarray) -> list:
        """The values of rows, int64 [n]."""
        order = np.argsort(rows)
        ascending, values = rows[order], np.empty(len(rows), object)
        edges = np.searchsorted(ascending, self._starts)
        for k in np.flatnonzero(np.diff(edges)).tolist():
            first, last = edges[k], edges[k + 1]
            taken = self._chunks[k].take(pa.array(ascending[first:last] - self._starts[k]))
            values[order[first:last]] = taken.to_numpy(zero_copy_only=False)
        return values.tolist()


def read_columns(arrow: Path) -> Columns:
    """The columns of an index's Arrow file, memory-mapped."""
    return {name: Column(values) for name, values in open_columns(arrow).items()}


_of_the_index = lru_cache(1)(read_columns)  # of a process that reads for one


@dataclass(frozen=True)
class Rows:
    """What the CSV says of its rows.

    Attributes:
        csv_path: the CSV. files: where its paths lead.
        arrow: the index's Arrow file.
        lines: int64 [rows], where each row starts.
        sizes: int32 [rows, 3], num_frames, height and width; 0 where the CSV does not say.
    """

    csv_path: Path
    files: Files
    arrow: Path
    lines: np.ndarray
    sizes: np.ndarray


class Task(NamedTuple):
    """Rows whose tensors of a side lie in some shards, sorted by shard: int64 [rows], and their lines in the CSV."""

    rows: np.ndarray
    lines: np.ndarray


@dataclass(frozen=True)
class Reader:
    """Reads the headers of shards.

    Args:
        csv_path, files, arrow: as of `Rows`. side: whose shards.
    """

    csv_path: Path
    files: Files
    arrow: Path
    side: Side

    def __call__(self, task: Task) -> tuple[np.ndarray, list[Wrong]]:
        """As `read`, in a process for each CPU."""
        return self.read(_of_the_index(self.arrow), task, headers.THREADS_OF_MANY)

    def read(self, columns: Columns, task: Task, threads: int) -> tuple[np.ndarray, list[Wrong]]:
        """What the headers say of the tensors of the rows, as `_FOUND`, and what is wrong with the others.

        Raises:
            PathError: a path leads somewhere it must not. TransientError: the file system failed for minutes.
        """
        kept, ids = (columns[name].take(task.rows) for name in (_COLUMNS[self.side], "sample_id"))
        paths = [path.rpartition("#") for path in kept]  # no key has a #, and one that is the sample's id is left out
        keys = [key or sample for (_, _, key), sample in zip(paths, ids, strict=True)]
        members = zip((file for file, _, _ in paths), task.rows.tolist(), task.lines.tolist(), keys, strict=True)
        shards = [(file, list(group)) for file, group in groupby(members, key=itemgetter(0))]
        answers = headers.read_all(self._of_shard, shards, threads)
        return np.concatenate([found for found, _ in answers]), [one for _, wrong in answers for one in wrong]

    def _of_shard(self, shard: tuple[str, list[tuple[str, int, int, str]]]) -> tuple[np.ndarray, list[Wrong]]:
        """As `read`, of one shard: its path, and of its rows path, number, line and key."""
        path, members = shard

        def read() -> tuple[str, dict[str, Entry]]:
            with self.files.open(path) as blob:
                return blob.name, read_header(blob)

        found, wrong, first = [], [], f"{self.csv_path}:{members[0][2]}"
        try:
            name, entries = read_patiently(read, self.files)
        except TransientError as error:
            raise TransientError(f"{first}: {error}") from error
        except SampleError as error:
            if isinstance(error.__cause__, PathError):
                raise PathError(f"{first}: {_COLUMNS[self.side]}: {error}") from error
            wrong = [(row, f"{self.csv_path}:{line}: {path}#{key}: {error}") for _, row, line, key in members]
            return np.empty(0, _FOUND), wrong
        shape_of = _latent_shape if self.side == "latent" else _text_shape
        for _, row, line, key in members:
            try:
                entry = find(entries, key, name)
                found.append((row, entry.offset, entry.crc, _CODE_OF[entry.dtype], shape_of(entry.shape)))
            except SampleError as error:
                wrong.append((row, f"{self.csv_path}:{line}: {path}#{key}: {error}"))
        return np.array(found, _FOUND), wrong


def shard_numbers(columns: dict[str, pa.ChunkedArray], side: Side) -> np.ndarray:
    """Numbers the shards of a side in the order of appearance: int32 [rows], −1 for rows whose tensor is in none."""
    numbers: dict[str, int] = {}
    of_rows = [np.empty(0, np.int32)]
    for chunk in columns[_COLUMNS[side]].chunks:
        files = [split_key(whole_path(path, "any")) for path in chunk.dictionary.to_pylist()]
        of_paths = [-1 if key is None else numbers.setdefault(file, len(numbers)) for file, key in files]
        of_rows.append(np.array(of_paths, np.int32)[chunk.indices.to_numpy()])
    return np.concatenate(of_rows)


def read_places(
    rows: Rows, shards: dict[Side, np.ndarray], shapes: np.ndarray, places: np.ndarray, parts: Path
) -> list[Wrong]:
    """Puts what the shards' headers say of the rows' tensors into `places`, and of latents also into `shapes`.

    Args:
        rows: all rows. shards: of the rows for each side, as `shard_numbers` gives them.
        shapes: int32 [rows, 3], (T, H, W) of the latents.
        places: `PLACES` [rows]; headers for what it has already are not read.
        parts: folder of the parts; those that an earlier call left are used, but what was bad is read again.

    Returns:
        The rows with a tensor that is not there or cannot be used, and why, with the CSV's line.

    Raises:
        ManifestError, PathError: see `manifest.build_index`.
        TransientError: the file system failed for minutes. TrainingError: a process that reads was killed.
        OSError: a part could not be written.
    """
    wanted = {}
    for side, numbers in shards.items():
        for path in sorted(parts.glob(f"{side}-*.npy")):
            part = headers.read_part(path, _FOUND)
            if part is not None:
                of_rows = (part["row"] >= 0) & (part["row"] < len(shapes)) & (part["dtype"] < len(CODES))
                _put(rows, side, part[of_rows], shapes, places)
        unknown = np.flatnonzero((numbers >= 0) & (places[f"{side}_dtype"] == 0))
        wanted[side] = unknown[np.argsort(numbers[unknown], kind="stable")]
    wrong: list[Wrong] = []
    total = sum(map(len, wanted.values()))
    readers = {side: Reader(rows.csv_path, rows.files, rows.arrow, side) for side in wanted}
    if total <= _FEW_ROWS:
        columns = read_columns(rows.arrow)
        for side in (side for side in wanted if len(wanted[side])):
            task = Task(wanted[side], rows.lines[wanted[side]])
            found, more = readers[side].read(columns, task, headers.THREADS_ALONE)
            _put(rows, side, found, shapes, places)
            wrong += more
        return wrong
    done, progress = 0, Progress(str(rows.csv_path))
    with headers.processes(rows.csv_path, parts, lambda: f"{done:,} of {total:,}") as pool:
        begun = (
            (side, of_part, pool.map(readers[side], tasks))
            for side in wanted
            for of_part in _cut(wanted[side], shards[side], _PART_ROWS)
            for tasks in [[Task(some, rows.lines[some]) for some in _cut(of_part, shards[side], _TASK_ROWS)]]
        )
        for (side, of_part, answers), _ in pairwise(chain(begun, [None])):  # a part is begun before the last is done
            kept = []
            for found, more in answers:
                _put(rows, side, found, shapes, places)
                kept.append(found)
                wrong += more
            done += len(of_part)
            progress.tell(f"headers of the shards of {done:,} of {total:,} latents and text features read")
            headers.write_part(parts / f"{side}-{of_part[0]:012}.npy", np.concatenate(kept))
    return wrong


def _cut(rows: np.ndarray, shards: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts rows that are sorted by shard into pieces of about so many, each of whole shards."""
    starts = np.flatnonzero(np.diff(shards[rows])) + 1  # of every shard but the first
    near = np.searchsorted(starts, np.arange(size, len(rows), size))
    return np.split(rows, np.unique(starts[near[near < len(starts)]])) if len(rows) else []


@lru_cache  # the tensors of a shard have few different shapes
def _latent_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 4 or shape[0] != LATENT_CHANNELS:
        raise SampleError(f"shape {list(shape)}, expected [{LATENT_CHANNELS}, T, H, W]")
    if max(shape[2:]) > MAX_LATENT_SIDE:
        raise SampleError(headers.TOO_LARGE.format(shape[1:]))
    return shape[1:]


@lru_cache
def _text_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 2 or max(shape) > _MAX_TEXT_SIDE:
        raise SampleError(f"shape {list(shape)}, expected text features [L, C], both at most {_MAX_TEXT_SIDE}")
    return (*shape, 0)


def _put(rows: Rows, side: Side, found: np.ndarray, shapes: np.ndarray, places: np.ndarray) -> None:
    """Puts what is found into the rows.

    Raises:
        ManifestError: the CSV says something else of a latent's size.
    """
    at = found["row"]
    for name in ("offset", "crc", "dtype"):
        places[f"{side}_{name}"][at] = found[name]
    if side == "text":
        places["text_tokens"][at], places["text_channels"][at] = found["shape"][:, 0], found["shape"][:, 1]
        return
    shapes[at] = found["shape"]
    declared = headers.latent_sizes(rows.sizes[at])
    for k in np.flatnonzero(((declared != 0) & (declared != found["shape"])).any(axis=1))[:1].tolist():
        row = int(at[k])
        columns = open_columns(rows.arrow)
        kept, sample = (columns[name][row].as_py() for name in ("latent_path", "sample_id"))
        name = f"{rows.files}/{whole_path(kept, sample)}"
        where = f"{rows.csv_path}:{rows.lines[row]}"
        headers.refuse_contradiction(where, rows.sizes[row].tolist(), found["shape"][k].tolist(), name)
