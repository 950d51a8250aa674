"""Reads the samples of the coming steps in worker processes. The whole state is the number of the next step.

A thread can receive a step from the workers while the one before is at work: a hand-over takes milliseconds where all
cores are busy.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from traceback import format_tb
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mugv_ds.config.errors import TrainingError
from mugv_ds.data.ahead import Ahead
from mugv_ds.data.plan import SampleRef

Batch = TypeVar("Batch")

_MAX_RESTARTS = 1  # in a row without a step in between
_SHARED_MEMORY = "/dev/shm"
_ALIGNMENT = 64  # bytes, of a tensor in shared memory
_PREFETCHED = 2  # batches of a worker

logger = logging.getLogger(__name__)


def loader(
    micro_batches: Callable[[int], list[list[SampleRef]]],
    *,
    start_step: int,
    stop_step: int,
    make: Callable[[list[SampleRef]], Batch],
    name: Callable[[SampleRef], str],
    num_workers: int,
    pin: bool = False,
) -> Ahead[list[Batch]]:
    """Yields this rank's micro-batches for each step of [start_step, stop_step).

    The same step gives the same batches whatever `start_step` and `num_workers` are; ambient random state is neither
    read nor advanced. When a worker is killed, the samples of the step it was to deliver are logged and read again.

    Where there are workers, a thread receives from them, and `micro_batches` and `name` are called there: the next step
    from when `Ahead.begin` is called. Who trains calls it as its step begins, so that neither the thread nor the
    workers, which then have room again, are at work when the ranks meet after a step.

    Args:
        micro_batches: what this rank takes of a step, by micro-batch; a function of the step alone.
        start_step, stop_step: steps to yield.
        make: turns the refs of one micro-batch into tensors; must pickle, as workers are not forked from this process
            (which may hold a CUDA context).
        name: of a ref, for messages.
        num_workers: processes, of one thread each; 0 reads in this one when a step is asked for, as a thread that
            reads would keep the interpreter from who trains.
        pin: hand the tensors out in pinned memory, from which copies to a CUDA device need not be waited for.

    Raises:
        TrainingError: workers were killed again, before the step was read; or shared memory ran out.
        Exception: what `make` raised, as it was; in a worker, with its traceback as a note.
    """
    read = partial(_read, make=make, num_workers=num_workers, pin=pin)
    steps = _steps(micro_batches, start_step, stop_step, read, name, num_workers)
    return Ahead(steps, "loader" if num_workers else None)


def _steps(
    micro_batches: Callable[[int], list[list[SampleRef]]],
    step: int,
    stop_step: int,
    read: Callable[[Iterable[list[SampleRef]]], Iterator[Batch]],
    name: Callable[[SampleRef], str],
    num_workers: int,
) -> Generator[list[Batch], None, None]:
    """Yields what `loader` does, and reads it when it is asked for."""
    restarts, failure = 0, None
    while step < stop_step and failure is None:
        wanted = chain.from_iterable(micro_batches(index) for index in range(step, stop_step))
        try:
            with closing(read(wanted)) as batches:
                while step < stop_step:
                    made = list(islice(batches, len(micro_batches(step))))
                    failure = next((item.error for item in made if isinstance(item, _Failure)), None)
                    if failure is not None:
                        break
                    yield made
                    step, restarts = step + 1, 0
        except (RuntimeError, ConnectionError, EOFError) as error:
            if num_workers == 0 or not _worker_died(error):
                raise
            if restarts == _MAX_RESTARTS:
                raise TrainingError(
                    f"loader workers were killed {restarts + 1} times in a row at step {step} ({_first_line(error)}); "
                    "the kernel does so where memory runs out: lower data.num_workers, or give the job more memory and "
                    f"{_SHARED_MEMORY} more room ({_shared_memory_free()} are free)"
                ) from error
            restarts += 1
            samples = [name(ref) for refs in micro_batches(step) for ref in refs]
            logger.warning(
                "a loader worker was killed (%r); step %d, samples %s: read again, %d of %d",
                error,
                step,
                samples,
                restarts,
                _MAX_RESTARTS,
            )
    if failure is not None:
        raise failure


@dataclass(frozen=True)
class _Failure:
    """What `make` raised, handed over as a value: DataLoader would raise another message in its place."""

    error: Exception


@dataclass(frozen=True)
class _Reader(Dataset):
    """The worker's side: refs in, a batch out. It has no state; the order stays in the main process."""

    make: Callable[[list[SampleRef]], Batch]

    def __getitem__(self, refs: list[SampleRef]) -> "Batch | _Packed | _Failure":
        try:
            made = self.make(refs)
            # Here, where a failure can be handed over: the thread that sends it would lose it, and all would wait.
            return made if get_worker_info() is None else _Packed.of(made)
        except Exception as error:
            error.add_note("".join(format_tb(error.__traceback__)))  # a traceback does not pickle
            return _Failure(error)


def _read(
    wanted: Iterable[list[SampleRef]], make: Callable[[list[SampleRef]], Batch], num_workers: int, pin: bool
) -> Iterator[Batch]:
    """The batches that are wanted, in that order."""
    batches = iter(
        DataLoader(
            _Reader(make),
            sampler=wanted,
            batch_size=None,
            collate_fn=_as_made,
            num_workers=num_workers,
            prefetch_factor=_PREFETCHED if num_workers else None,
            multiprocessing_context=_workers_context() if num_workers else None,
            worker_init_fn=_end_with_parent,
            pin_memory=pin,
            generator=torch.Generator(),  # otherwise each pass would draw a seed from the ambient one
        )
    )
    try:
        for batch in batches:
            yield batch.unpack() if isinstance(batch, _Packed) else batch
    finally:
        if num_workers:
            # An exception from a worker is part of a reference cycle that holds the iterator. The garbage collector
            # may take its queues first, and the iterator would then wait 5 s for each worker.
            batches._shutdown_workers()


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a buffer of bytes."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class _Packed:
    """What a worker made, with all its tensors in one buffer in shared memory, and a `_Place` in place of each.

    To hand a tensor over takes a connection of its own, half a millisecond and more, whatever its size.
    """

    made: Any
    buffer: torch.Tensor

    @classmethod
    def of(cls, made: Any) -> "_Packed":
        """Packs what was made.

        Raises:
            TrainingError: there is not enough shared memory.
        """
        tensors: list[tuple[_Place, torch.Tensor]] = []

        def place(tensor: torch.Tensor) -> _Place:
            start = -(-tensors[-1][0].stop // _ALIGNMENT) * _ALIGNMENT if tensors else 0
            tensors.append((_Place(start, start + tensor.nbytes, tensor.dtype, tensor.shape), tensor))
            return tensors[-1][0]

        placed = _replaced(made, torch.Tensor, place)
        buffer = torch.empty(tensors[-1][0].stop if tensors else 0, dtype=torch.uint8)
        try:
            buffer.share_memory_()
        except RuntimeError as error:
            raise TrainingError(
                f"{_SHARED_MEMORY} is too small for a batch of {buffer.nbytes / 2**20:.0f} MiB more, "
                f"{_shared_memory_free()} are free ({_first_line(error)}); enlarge it (docker run --shm-size, or "
                "--ipc=host), or lower data.num_workers; 0 needs none"
            ) from error
        for of, tensor in tensors:
            cls._view(buffer, of).copy_(tensor)
        return cls(placed, buffer)

    def pin_memory(self) -> "_Packed":
        """Moves the buffer to pinned memory; DataLoader calls it."""
        return _Packed(self.made, self.buffer.pin_memory())

    def unpack(self) -> Any:
        """Returns what was made, whose tensors are views of the buffer."""
        return _replaced(self.made, _Place, lambda place: self._view(self.buffer, place))

    @staticmethod
    def _view(buffer: torch.Tensor, place: _Place) -> torch.Tensor:
        return buffer[place.start : place.stop].view(place.dtype).view(place.shape)


def _replaced(made: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """Returns nested tuples, lists and dicts with all that is of a kind replaced."""
    if isinstance(made, kind):
        return by(made)
    if isinstance(made, tuple):
        parts = [_replaced(part, kind, by) for part in made]
        return type(made)(*parts) if hasattr(made, "_fields") else tuple(parts)
    if isinstance(made, list):
        return [_replaced(part, kind, by) for part in made]
    if isinstance(made, dict):
        return {key: _replaced(part, kind, by) for key, part in made.items()}
    return made


def _shared_memory_free() -> str:
    try:
        return f"{shutil.disk_usage(_SHARED_MEMORY).free / 2**20:.0f} MiB"
    except OSError as error:
        return str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _worker_died(error: Exception) -> bool:
    """Whether a worker is gone: DataLoader says so, or the connection broke over which it was passing a tensor.

    Where tensors are pinned, a thread receives them, and ends when the connection breaks.
    """
    signs = ("DataLoader worker (pid", "Pin memory thread exited")
    return not isinstance(error, RuntimeError) or str(error).startswith(signs)


def _workers_context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a server that has imported this module and no more: no CUDA context, no second import.

    They are no children of this process either, so a killed one shows when its batch is waited for, not as an
    exception out of a signal handler in the middle of a training step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_parent(_worker: int) -> None:
    """Ends this worker when the training process is gone, however it went, and not before.

    Signals that ask the whole job to stop are for the training process, which goes on reading until its step is done.
    DataLoader's worker watches its own parent, which here is the server; and the server lives as long as its workers.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _as_made(batch: Batch) -> Batch:
    return batch
