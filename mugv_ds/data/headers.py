"""The shapes of latents that have files of their own, from the headers: many in processes and by parts.

Many are read by a process for each CPU, in a few threads each where reading is waiting, as on a network file system. A
part, the rows between two multiples of 50,000, is kept in a file as soon as it is known: a build that is killed goes on
where it was.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, get_context, parent_process
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from mugv_ds.config.errors import TrainingError, TransientError
from mugv_ds.config.model import LATENT_STRIDE as STRIDE
from mugv_ds.config.model import MAX_LATENT_SIDE
from mugv_ds.data.buckets import Shape
from mugv_ds.data.paths import ManifestError, PathError
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.progress import Progress
from mugv_ds.data.storage import Files
from mugv_ds.files.atomic import write_atomically
from mugv_ds.files.tensor_file import SampleError, UnsafeFileError, check_latent, load_tensors

SIZES = ("num_frames", "height", "width")

_FEW = 20_000  # headers, 12 s of one core; what processes are forked from takes 3 s of one to start
_PART_ROWS = 50_000
_TASK_ROWS = 100
THREADS_ALONE, THREADS_OF_MANY = 16, 4  # where opening files is waiting

_NO_PART = "%s: not a part of this manifest; its latents' headers are read again"
TOO_LARGE = f"(T, H, W) = {{}}; the model has positions for sides of at most {MAX_LATENT_SIDE}"

T, R = TypeVar("T"), TypeVar("R")

logger = logging.getLogger(__name__)


class Latent(NamedTuple):
    """A row whose latent is to be opened. sizes: num_frames, height and width of the CSV, 0 where it does not say."""

    line: int
    path: str
    sizes: tuple[int, int, int]


@dataclass(frozen=True)
class Latents:
    """What the CSV says of the rows' latents.

    Attributes:
        csv_path: the CSV. files: where its paths lead.
        lines: int64 [rows], where each row starts.
        sizes: int32 [rows, 3], num_frames, height and width; 0 where the CSV does not say.
        paths: of the latents, as `Index` keeps them. single: bool [rows], True for a latent with a file of its own.
    """

    csv_path: Path
    files: Files
    lines: np.ndarray
    sizes: np.ndarray
    paths: pa.ChunkedArray
    single: np.ndarray

    def take(self, rows: np.ndarray) -> list[Latent]:
        """The latents of these rows, which ascend."""
        near = self.paths.slice(rows[0], rows[-1] - rows[0] + 1)  # Arrow takes from few chunks much faster
        paths = near.take(pa.array(rows - rows[0])).to_pylist()
        sizes = map(tuple, self.sizes[rows].tolist())
        return [Latent(*row) for row in zip(self.lines[rows].tolist(), paths, sizes, strict=True)]


def declared_shapes(sizes: np.ndarray) -> np.ndarray:
    """(T, H, W) of the rows that say num_frames, height and width, zeros for others; both int32 [rows, 3]."""
    shapes = latent_sizes(sizes)
    shapes[~sizes.all(axis=1)] = 0
    return shapes


def latent_sizes(sizes: np.ndarray) -> np.ndarray:
    """Of frames and pixels, those of latents; 0 of 0. Pixels are multiples of the stride, frames need not be."""
    return -(-sizes // STRIDE)


def read_shapes(latents: Latents, shapes: np.ndarray, parts: Path) -> list[str]:
    """Puts (T, H, W) of the single latents whose shapes are not known into `shapes`; zeros stay where a file is bad.

    Args:
        latents: of all rows.
        shapes: int32 [rows, 3], zeros where it is not known.
        parts: folder of the parts; those that an earlier call left are used, but what was bad is read again.
    Returns:
        What is wrong with each bad file, one line each with the CSV's line, in the order of the rows.

    Raises:
        ManifestError, PathError, UnsafeFileError: see `build_index`.
        TransientError: the file system failed for minutes. TrainingError: a process that reads was killed.
        OSError: a part could not be written.
    """
    for start in range(0, len(shapes), _PART_ROWS):
        _fill_from_part(parts, start, shapes[start : start + _PART_ROWS])
    unknown = np.flatnonzero(~shapes.any(axis=1) & latents.single)
    if len(unknown) <= _FEW:
        read = partial(stored_shape, latents.files, latents.csv_path)
        return _put(shapes, unknown, read_all(read, latents.take(unknown), THREADS_ALONE)) if len(unknown) else []
    return _read_many(latents, shapes, unknown, parts)


def stored_shape(files: Files, csv_path: Path, latent: Latent) -> Shape | str:
    """(T, H, W) from the header of a row's latent, or what is wrong with the file.

    Raises:
        ManifestError, PathError, UnsafeFileError: see `build_index`.
        TransientError: the file system failed for minutes.
    """
    where = f"{csv_path}:{latent.line}"

    def read() -> Shape:
        with files.whole(latent.path) as path:
            return tuple(check_latent(load_tensors(path), path).shape[1:])

    try:
        shape = read_patiently(read, files)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{where}: {error}") from error
    except TransientError as error:
        raise TransientError(f"{where}: {error}") from error
    except SampleError as error:
        if isinstance(error.__cause__, PathError):
            raise PathError(f"{where}: latent_path: {error}") from error
        return f"{where}: {error}"
    name = f"{files}/{latent.path}"
    refuse_contradiction(where, latent.sizes, shape, name)
    if max(shape[1:]) > MAX_LATENT_SIDE:
        return f"{where}: {name}: {TOO_LARGE.format(shape)}"
    return shape


def refuse_contradiction(where: str, sizes: Sequence[int], shape: Shape, name: str) -> None:
    """Raises ManifestError if a row's num_frames, height and width (0: not said) are not those of its latent."""
    for column, size, stored in zip(SIZES, sizes, shape, strict=True):
        declared = -(-size // STRIDE)
        if declared not in (0, stored):
            raise ManifestError(f"{where}: {column} = {size} means {declared} in the latent, but {name} has {stored}")


def _read_many(latents: Latents, shapes: np.ndarray, unknown: np.ndarray, parts: Path) -> list[str]:
    """As `read_shapes`, of the rows `unknown`, in processes; each part is kept when it is known."""
    bad: list[str] = []
    done, progress = 0, Progress(str(latents.csv_path))
    read = partial(_read_task, latents.files, latents.csv_path)
    with processes(latents.csv_path, parts, lambda: f"{done:,} of {len(unknown):,}") as pool:
        for start in range(0, len(shapes), _PART_ROWS):
            first, last = np.searchsorted(unknown, [start, start + _PART_ROWS])
            if first == last:
                continue
            tasks = [unknown[i : min(i + _TASK_ROWS, last)] for i in range(first, last, _TASK_ROWS)]
            for rows, answer in zip(tasks, pool.map(read, map(latents.take, tasks)), strict=True):
                bad += _put(shapes, rows, answer)
                done += len(rows)
                progress.tell(f"headers of {done:,} of {len(unknown):,} latents read")
            _keep_part(parts, start, shapes[start : start + _PART_ROWS])
    return bad


def prepare_processes() -> None:
    """Begins to import, in a process of its own, what `processes` and the workers of the loader are forked from."""
    forkserver.set_forkserver_preload(["mugv_ds.data.places", "mugv_ds.data.loader"])
    forkserver.ensure_running()


@contextmanager
def processes(csv_path: Path, parts: Path, done: Callable[[], str]) -> Iterator[ProcessPoolExecutor]:
    """A process for each CPU, which read headers.

    Args:
        csv_path, parts, done: of what, the folder of what is kept, and how much is done, for messages.

    Raises:
        TrainingError: one of them was killed.
    """
    prepare_processes()
    pool = ProcessPoolExecutor(
        len(os.sched_getaffinity(0)), mp_context=get_context("forkserver"), initializer=_begin_process
    )
    try:
        with pool:
            yield pool
    except BrokenProcessPool as error:
        raise TrainingError(
            f"{csv_path}: a process that read latents' headers was killed, as the system does when memory runs out, "
            f"after {done()}; start again, what is in {parts} is kept"
        ) from error


def _put(shapes: np.ndarray, rows: np.ndarray, found: list[Shape | str]) -> list[str]:
    """Puts the shapes found into their rows, and returns what else was found."""
    bad = []
    for row, shape in zip(rows.tolist(), found, strict=True):
        if isinstance(shape, str):
            bad.append(shape)
        else:
            shapes[row] = shape
    return bad


def _read_task(files: Files, csv_path: Path, task: list[Latent]) -> list[Shape | str]:
    """What a process does at a time."""
    return read_all(partial(stored_shape, files, csv_path), task, THREADS_OF_MANY)


def read_all(read: Callable[[T], R], wanted: Sequence[T], threads: int) -> list[R]:
    """`read` of each, at least one: in threads if the first shows that it is mostly waiting, else one after the other.

    Threads that do not wait for files wait for each other, at every call of the system: on a local disk four of them
    take a third longer than one.
    """
    begin, worked = time.monotonic(), time.thread_time()
    first = read(wanted[0])
    if time.monotonic() - begin < 2 * (time.thread_time() - worked):
        return [first, *map(read, wanted[1:])]
    with ThreadPoolExecutor(threads) as pool:
        return [first, *pool.map(read, wanted[1:])]


def _begin_process() -> None:
    """Leaves Ctrl-C to the parent, and ends this process when the parent is gone: it would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _part_path(parts: Path, start: int) -> Path:
    return parts / f"{start:012}.npy"


def _keep_part(parts: Path, start: int, shapes: np.ndarray) -> None:
    write_part(_part_path(parts, start), shapes)


def _fill_from_part(parts: Path, start: int, shapes: np.ndarray) -> None:
    """Puts what a part knows into `shapes`, where these are zeros; a damaged part is told and not used."""
    path = _part_path(parts, start)
    if not path.exists():
        return
    part = read_part(path, shapes.dtype)
    if part is None:
        return
    if part.shape != shapes.shape or (part < 0).any():
        logger.warning(_NO_PART, path)
        return
    unknown = ~shapes.any(axis=1)
    shapes[unknown] = part[unknown]


def write_part(path: Path, part: np.ndarray) -> None:
    """Writes a part, unless another builder has just finished the index and removed the folder of its parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with write_atomically(path) as stream:
            np.save(stream, part, allow_pickle=False)
    except FileNotFoundError:
        if path.parent.exists():
            raise


def read_part(path: Path, dtype: np.dtype) -> np.ndarray | None:
    """A part of that dtype; None, and a warning, if it is damaged."""
    try:
        part = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        logger.warning("%s: damaged (%s); its latents' headers are read again", path, error)
        return None
    if part.dtype != dtype:
        logger.warning(_NO_PART, path)
        return None
    return part
