"""Reads the samples of the coming steps in worker processes. The whole state is the number of the next step."""

import logging
import multiprocessing
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mugv_ds.data.buckets import Order, Step, Visit, micro_batches

Batch = dict[str, Tensor]
Make = Callable[[list[Visit], Step], Batch]

_MAX_RESTARTS = 3  # in a row without a step in between
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")  # an exception raised in a worker says "Caught …" instead

logger = logging.getLogger(__name__)


def loader(
    order: Order,
    *,
    start_step: int,
    stop_step: int,
    data_rank: int,
    data_ranks: int,
    micro: int,
    make: Make,
    num_workers: int,
) -> Iterator[tuple[Step, list[Batch]]]:
    """Yields (step, this data rank's micro-batches) for each step of [start_step, stop_step).

    The same step gives the same batches whatever `start_step` and `num_workers` are; ambient random state is neither
    read nor advanced. When a worker is killed, the step it was to deliver is logged and read again.

    Args:
        order: what the steps hold.
        start_step, stop_step: steps to yield, counted from 0 over all epochs.
        data_rank, data_ranks: which of how many replicas reads.
        micro: samples in a micro-batch.
        make: turns [(row, visit), …] of one micro-batch and its step into tensors; must pickle, as workers are not
            forked from this process (which may hold a CUDA context).
        num_workers: processes; 0 reads in this one.

    Raises:
        ValueError: a step cannot be split evenly.
        RuntimeError: workers were killed time and again.
        Exception: what `make` raised, in the class it was raised in; the message names the place.
    """
    step, restarts = start_step, 0
    while step < stop_step:
        requests = _Requests(order, step, stop_step, data_rank, data_ranks, micro)
        try:
            for item in _read(requests, make, num_workers):
                yield item
                step, restarts = step + 1, 0
        except RuntimeError as error:
            if not _WORKER_DIED.search(str(error)) or restarts == _MAX_RESTARTS:
                raise
            restarts += 1
            rows = [row for request in requests.of_step(step) for row, _ in request.visits]
            logger.warning("%s; step %d, rows %s are read again (%d of %d)", error, step, rows, restarts, _MAX_RESTARTS)


@dataclass(frozen=True)
class _Request:
    """One micro-batch to read."""

    step: Step
    visits: list[Visit]


@dataclass(frozen=True)
class _Requests:
    """Micro-batches in the order they are wanted, made as they are asked for; the sampler of the DataLoader."""

    order: Order
    start_step: int
    stop_step: int
    data_rank: int
    data_ranks: int
    micro: int

    def of_step(self, index: int) -> list[_Request]:
        step = self.order.step(index)
        return [_Request(step, visits) for visits in micro_batches(step, self.data_rank, self.data_ranks, self.micro)]

    def __iter__(self) -> Iterator[_Request]:
        for index in range(self.start_step, self.stop_step):
            yield from self.of_step(index)


@dataclass(frozen=True)
class _Reader(Dataset):
    """The worker's side: no state, a request in, a batch out. The order itself stays in the main process."""

    make: Make

    def __getitem__(self, request: _Request) -> tuple[Step, Batch]:
        return request.step, self.make(request.visits, request.step)


def _read(requests: _Requests, make: Make, num_workers: int) -> Iterator[tuple[Step, list[Batch]]]:
    """One pass over `requests`, grouped by step."""
    batches = DataLoader(
        _Reader(make),
        sampler=requests,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        multiprocessing_context=_workers_context() if num_workers else None,
        generator=torch.Generator(),  # otherwise each pass would draw a seed from the ambient one
    )
    per_step = requests.order.global_batch_size // (requests.data_ranks * requests.micro)
    items = iter(batches)
    for step, first in items:
        yield step, [first, *(batch for _, batch in islice(items, per_step - 1))]


def _workers_context() -> multiprocessing.context.BaseContext:
    """Workers are forked from a server that has imported this module and no more: no CUDA context, no second import.

    They are no children of this process either, so a killed one shows when its batch is waited for, not as an
    exception out of a signal handler in the middle of a training step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _as_it_is(item: tuple[Step, Batch]) -> tuple[Step, Batch]:
    return item
