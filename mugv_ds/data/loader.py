"""Reads the samples of the coming steps in worker processes. The whole state is the number of the next step."""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mugv_ds.data.buckets import Order, Step, Visit, micro_batches

Batch = TypeVar("Batch")

_MAX_RESTARTS = 3  # in a row without a step in between

logger = logging.getLogger(__name__)


def loader(
    order: Order,
    *,
    start_step: int,
    stop_step: int,
    data_rank: int,
    data_ranks: int,
    micro: int,
    make: Callable[[list[Visit]], Batch],
    num_workers: int,
) -> Iterator[tuple[Step, list[Batch]]]:
    """Yields (step, this data rank's micro-batches) for each step of [start_step, stop_step).

    The same step gives the same batches whatever `start_step` and `num_workers` are; ambient random state is neither
    read nor advanced. When a worker is killed, the rows of the step it was to deliver are logged and read again.

    Args:
        order: what the steps hold.
        start_step, stop_step: steps to yield, counted from 0 over all epochs.
        data_rank, data_ranks: which of how many replicas reads.
        micro: samples in a micro-batch.
        make: turns the [(row, visit), …] of one micro-batch into tensors; must pickle, as workers are not forked from
            this process (which may hold a CUDA context).
        num_workers: processes, of one thread each; 0 reads in this one.

    Raises:
        ValueError: a step cannot be split evenly.
        RuntimeError: workers were killed time and again.
        Exception: what `make` raised, in its own class, with the worker's traceback in the message.
    """
    order = copy(order)  # reading runs ahead of the caller, in another epoch at times; an Order caches one
    step, restarts = start_step, 0
    while step < stop_step:
        requests = _Requests(order, step, stop_step, data_rank, data_ranks, micro)
        try:
            for item in _read(requests, make, num_workers):
                yield item
                step, restarts = step + 1, 0
        except (RuntimeError, ConnectionError, EOFError) as error:
            if num_workers == 0 or not _worker_died(error) or restarts == _MAX_RESTARTS:
                raise
            restarts += 1
            rows = [row for _, visits in requests.of_step(step) for row, _ in visits]
            logger.warning("%s; step %d, rows %s: read again, %d of %d", error, step, rows, restarts, _MAX_RESTARTS)


@dataclass(frozen=True)
class _Requests:
    """The micro-batches in the order they are wanted, worked out as they are asked for: the DataLoader's sampler."""

    order: Order
    start_step: int
    stop_step: int
    data_rank: int
    data_ranks: int
    micro: int

    def of_step(self, index: int) -> list[tuple[Step, list[Visit]]]:
        step = self.order.step(index)
        return [(step, visits) for visits in micro_batches(step, self.data_rank, self.data_ranks, self.micro)]

    def __iter__(self) -> Iterator[tuple[Step, list[Visit]]]:
        for index in range(self.start_step, self.stop_step):
            yield from self.of_step(index)


@dataclass(frozen=True)
class _Reader(Dataset):
    """The worker's side: a request in, a batch out. It has no state; the order stays in the main process."""

    make: Callable[[list[Visit]], Batch]

    def __getitem__(self, request: tuple[Step, list[Visit]]) -> tuple[Step, Batch]:
        step, visits = request
        return step, self.make(visits)


def _read(
    requests: _Requests, make: Callable[[list[Visit]], Batch], num_workers: int
) -> Iterator[tuple[Step, list[Batch]]]:
    """One pass over `requests`, grouped by step."""
    batches = DataLoader(
        _Reader(make),
        sampler=requests,
        batch_size=None,
        collate_fn=_as_made,
        num_workers=num_workers,
        multiprocessing_context=_workers_context() if num_workers else None,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # otherwise each pass would draw a seed from the ambient one
    )
    per_step = requests.order.global_batch_size // (requests.data_ranks * requests.micro)
    items = iter(batches)
    try:
        for step, first in items:
            yield step, [first, *(batch for _, batch in islice(items, per_step - 1))]
    finally:
        if num_workers:
            # An exception from a worker is part of a reference cycle that holds the iterator. The garbage collector
            # may take its queues first, and the iterator would then wait 5 s for each worker.
            items._shutdown_workers()


def _worker_died(error: Exception) -> bool:
    """Whether a worker is gone: DataLoader says so, or the connection broke over which it was passing a tensor.

    What `make` raised in a worker starts with "Caught" instead.
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return not str(error).startswith("Caught ")


def _workers_context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a server that has imported this module and no more: no CUDA context, no second import.

    They are no children of this process either, so a killed one shows when its batch is waited for, not as an
    exception out of a signal handler in the middle of a training step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_parent(_worker: int) -> None:
    """Ends this worker when the training process is gone, however it went.

    DataLoader's worker watches its own parent, which here is the server; and the server lives as long as its workers.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_made(item: tuple[Step, Batch]) -> tuple[Step, Batch]:
    return item
