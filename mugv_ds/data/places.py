"""Where the tensors of rows lie in shards, from the shards' headers: each is read once, whatever the rows' order.

Rows are grouped by shard. As with latents that have files of their own, few headers are read in threads, many in
processes, and what they say of some 50,000 rows is kept in a part as soon as it is known: a build that is killed goes
on where it was.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from mugv_ds.config.errors import TransientError
from mugv_ds.config.model import LATENT_CHANNELS, MAX_LATENT_SIDE
from mugv_ds.data import headers
from mugv_ds.data.index import CODES, whole_path
from mugv_ds.data.paths import PathError, split_key
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.progress import Progress
from mugv_ds.data.shards import Entry, find, read_header
from mugv_ds.data.storage import Files
from mugv_ds.files.tensor_file import SampleError

Side = Literal["latent", "text"]
Wrong = tuple[int, str]  # a row, and what is wrong with its tensor

_COLUMNS = {"latent": "latent_path", "text": "text_feat_path"}
_FEW_ROWS = 200_000  # about 2 s of one core
_PART_ROWS = 50_000
_TASK_ROWS = 2_000
_MAX_TEXT_SIDE = (1 << 16) - 1  # tokens and channels have two bytes each in an index
_FOUND = np.dtype([("row", "<i4"), ("offset", "<u4"), ("crc", "<u4"), ("dtype", "u1"), ("shape", "<i4", (3,))])


@dataclass(frozen=True)
class Rows:
    """What the CSV says of its rows.

    Attributes:
        csv_path: the CSV. files: where its paths lead.
        columns: as `index.open_columns` gives them.
        lines: int64 [rows], where each row starts.
        sizes: int32 [rows, 3], num_frames, height and width; 0 where the CSV does not say.
    """

    csv_path: Path
    files: Files
    columns: dict[str, pa.ChunkedArray]
    lines: np.ndarray
    sizes: np.ndarray


class Shard(NamedTuple):
    """Rows of one shard: its path, and of each row its number, its line in the CSV and the key of its tensor."""

    path: str
    rows: list[int]
    lines: list[int]
    keys: list[str]


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
    if total <= _FEW_ROWS:
        with ThreadPoolExecutor(headers.THREADS_ALONE) as threads:
            for side in wanted:
                read = partial(_read_shard, rows.files, rows.csv_path, side)
                for found, more in threads.map(read, _shards(rows, side, shards[side], wanted[side])):
                    _put(rows, side, found, shapes, places)
                    wrong += more
        return wrong
    done, progress = 0, Progress(str(rows.csv_path))
    with headers.processes(rows.csv_path, parts, lambda: f"{done:,} of {total:,}") as pool:
        begun = (
            (side, of_part, pool.map(partial(_read_shards, rows.files, rows.csv_path, side), tasks))
            for side in wanted
            for of_part in _parts(shards[side], wanted[side])
            for tasks in [_tasks(_shards(rows, side, shards[side], of_part))]
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


def _parts(shards: np.ndarray, wanted: np.ndarray) -> list[np.ndarray]:
    """Cuts rows that are sorted by shard into parts of whole shards."""
    starts = np.flatnonzero(np.diff(shards[wanted])) + 1  # of every shard but the first
    near = np.searchsorted(starts, np.arange(_PART_ROWS, len(wanted), _PART_ROWS))
    return np.split(wanted, np.unique(starts[near[near < len(starts)]]))


def _shards(rows: Rows, side: Side, shards: np.ndarray, wanted: np.ndarray) -> Iterator[Shard]:
    """The shards of rows that are sorted by shard."""
    kept, ids = (_take(rows.columns[name], wanted) for name in (_COLUMNS[side], "sample_id"))
    paths = [whole_path(path, sample).rpartition("#") for path, sample in zip(kept, ids, strict=True)]  # keys have no #
    edges = [0, *(np.flatnonzero(np.diff(shards[wanted])) + 1).tolist(), len(wanted)]
    for first, last in pairwise(edges if len(wanted) else []):
        of_shard = wanted[first:last]
        keys = [key for _, _, key in paths[first:last]]
        yield Shard(paths[first][0], of_shard.tolist(), rows.lines[of_shard].tolist(), keys)


def _tasks(shards: Iterable[Shard]) -> Iterator[list[Shard]]:
    """Groups shards into what a process does at a time."""
    task, size = [], 0
    for shard in shards:
        task.append(shard)
        size += len(shard.rows)
        if size >= _TASK_ROWS:
            yield task
            task, size = [], 0
    if task:
        yield task


def _take(column: pa.ChunkedArray, rows: np.ndarray) -> list:
    """The values of rows in any order; Arrow itself would copy the whole column first."""
    order = np.argsort(rows)
    ascending, values, start = rows[order], np.empty(len(rows), object), 0
    for chunk in column.chunks:
        first, last = np.searchsorted(ascending, [start, start + len(chunk)])
        if first < last:
            values[order[first:last]] = chunk.take(pa.array(ascending[first:last] - start)).to_pylist()
        start += len(chunk)
    return values.tolist()


def _read_shards(files: Files, csv_path: Path, side: Side, task: list[Shard]) -> tuple[np.ndarray, list[Wrong]]:
    """What a process does at a time; see `_read_shard`."""
    with ThreadPoolExecutor(headers.THREADS_OF_MANY) as threads:
        answers = list(threads.map(partial(_read_shard, files, csv_path, side), task))
    return np.concatenate([found for found, _ in answers]), [one for _, wrong in answers for one in wrong]


def _read_shard(files: Files, csv_path: Path, side: Side, shard: Shard) -> tuple[np.ndarray, list[Wrong]]:
    """What the header of a shard says of its rows' tensors, as `_FOUND`, and what is wrong with the others.

    Raises:
        PathError: its path leads somewhere it must not. TransientError: the file system failed for minutes.
    """

    def read() -> tuple[str, dict[str, Entry]]:
        with files.open(shard.path) as blob:
            return blob.name, read_header(blob)

    found, wrong = [], []
    members = list(zip(shard.rows, shard.lines, shard.keys, strict=True))
    try:
        name, entries = read_patiently(read, files)
    except TransientError as error:
        raise TransientError(f"{csv_path}:{shard.lines[0]}: {error}") from error
    except SampleError as error:
        if isinstance(error.__cause__, PathError):
            raise PathError(f"{csv_path}:{shard.lines[0]}: {_COLUMNS[side]}: {error}") from error
        wrong = [(row, f"{csv_path}:{line}: {shard.path}#{key}: {error}") for row, line, key in members]
        return np.empty(0, _FOUND), wrong
    for row, line, key in members:
        try:
            entry = find(entries, key, name)
            shape = _latent_shape(entry) if side == "latent" else _text_shape(entry)
            found.append((row, entry.offset, entry.crc, CODES.index(entry.dtype), shape))
        except SampleError as error:
            wrong.append((row, f"{csv_path}:{line}: {shard.path}#{key}: {error}"))
    return np.array(found, _FOUND), wrong


def _latent_shape(entry: Entry) -> tuple[int, int, int]:
    if len(entry.shape) != 4 or entry.shape[0] != LATENT_CHANNELS:
        raise SampleError(f"shape {list(entry.shape)}, expected [{LATENT_CHANNELS}, T, H, W]")
    if max(entry.shape[2:]) > MAX_LATENT_SIDE:
        raise SampleError(headers.TOO_LARGE.format(entry.shape[1:]))
    return entry.shape[1:]


def _text_shape(entry: Entry) -> tuple[int, int, int]:
    if len(entry.shape) != 2 or max(entry.shape) > _MAX_TEXT_SIDE:
        raise SampleError(f"shape {list(entry.shape)}, expected text features [L, C], both at most {_MAX_TEXT_SIDE}")
    return (*entry.shape, 0)


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
        kept, sample = (rows.columns[name][row].as_py() for name in ("latent_path", "sample_id"))
        name = f"{rows.files}/{whole_path(kept, sample)}"
        where = f"{rows.csv_path}:{rows.lines[row]}"
        headers.refuse_contradiction(where, rows.sizes[row].tolist(), found["shape"][k].tolist(), name)
