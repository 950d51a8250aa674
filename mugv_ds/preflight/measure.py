"""Timing what a device does: matrix products, copies, exchanges with others. For the preflight and for calibration."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

_REPEATS = 20  # most passes that a median is taken of
_CYCLES = 2e9  # of a GPU's clock, a second, or somewhat more


class Clock:
    """Times calls on a device. enough: seconds that the passes of one measurement may take together."""

    def __init__(self, device: torch.device, enough: float) -> None:
        self.device, self._enough = device, enough

    def wait(self) -> None:
        """Waits until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, *calls: Callable[[], object], warm: bool = True) -> list[float]:
        """Returns the median seconds that the device takes for each of some calls; see `both`."""
        return self.both(*calls, warm=warm)[0]

    def both(self, *calls: Callable[[], object], warm: bool = True) -> tuple[list[float], list[float]]:
        """Returns the median seconds of each of some calls, which are made one after the other, all of them again.

        The device is kept busy until the host has launched all calls, so that it does not have to wait for the host
        between them.

        Args:
            warm: whether a first pass, which may compile, is left out.

        Returns:
            Those of the device, and those in which the host launched them; 0 where the two are the same.
        """
        if warm:
            self.once(calls)
        first = self.once(calls)
        ahead = 1.5 * sum(first[1])
        repeats = int(self._enough / max(sum(first[0]) + ahead, 1e-9))
        passes = [self.once(calls, ahead) for _ in range(min(repeats, _REPEATS))] or [first]
        device, host = zip(*passes, strict=True)
        return tuple([statistics.median(times) for times in zip(*of, strict=True)] for of in (device, host))

    def once(self, calls: Sequence[Callable[[], object]], ahead: float = 0.0) -> tuple[list[float], list[float]]:
        """Makes the calls; returns their seconds on the device and on the host. ahead: seconds that the host gets."""
        marks = []
        if self.device.type != "cuda":
            for call in calls:
                marks.append(time.perf_counter())
                call()
            marks.append(time.perf_counter())
            return [after - before for before, after in pairwise(marks)], [0.0] * len(calls)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        self.wait()
        if ahead:
            torch.cuda._sleep(int(ahead * _CYCLES))
        events[0].record()
        for event, call in zip(events[1:], calls, strict=True):
            marks.append(time.perf_counter())
            call()
            event.record()
        marks.append(time.perf_counter())
        self.wait()
        return (
            [a.elapsed_time(b) / 1000 for a, b in pairwise(events)],
            [after - before for before, after in pairwise(marks)],
        )

    def fixed(self, *calls: Callable[[], object], repeats: int = 10) -> list[float]:
        """Returns the median seconds of the calls over as many passes on all ranks, which wait for one another."""
        times = [self.once(calls)[0] for _ in range(repeats + 2)]
        return [statistics.median(of) for of in zip(*times[2:], strict=True)]


def product_call(rows: int, width_in: int, width_out: int, dtype: torch.dtype, device: torch.device) -> Callable:
    """Returns what multiplies tokens [rows, width_in] with a weight [width_out, width_in]."""
    x, weight = (torch.randn(count, width_in, dtype=dtype, device=device) for count in (rows, width_out))
    return lambda: torch.nn.functional.linear(x, weight)


def copy_call(kind: str, count: int, device: torch.device) -> Callable[[], Tensor]:
    """Returns what copies so many bytes: "on_device", or "to_host" and "to_device" between it and pinned memory."""
    here, there = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    if kind != "on_device":
        there = torch.empty(count, dtype=torch.uint8, pin_memory=device.type == "cuda")
    to, source = (here, there) if kind == "to_device" else (there, here)
    return lambda: to.copy_(source, non_blocking=True)


def collective_call(
    kind: str, count: int, group: dist.ProcessGroup | None, device: torch.device
) -> Callable[..., object]:
    """Returns what runs a collective of so many bytes in a group (None: of all), asynchronously on request.

    Args:
        kind: "all_to_all", "reduce_scatter", "all_gather" or "all_reduce"; see `plan.calibration.CollectivePoint`.
    """
    ranks = dist.get_world_size(group)
    whole = torch.ones(count // 2 // ranks * ranks, dtype=torch.bfloat16, device=device)
    other, part = torch.empty_like(whole), torch.empty_like(whole[: len(whole) // ranks])
    given = {
        "all_to_all": (dist.all_to_all_single, other, whole),
        "reduce_scatter": (dist.reduce_scatter_tensor, part, whole),
        "all_gather": (dist.all_gather_into_tensor, whole, part),
        "all_reduce": (dist.all_reduce, whole),
    }
    function, *tensors = given[kind]
    return lambda **how: function(*tensors, group=group, **how)


def exchange_call(count: int, other: int, device: torch.device) -> Callable[[], None]:
    """Returns what sends so many bytes to another rank and receives as many from it, at the same time."""
    sent, received = (torch.ones(count, dtype=torch.uint8, device=device) for _ in range(2))

    def exchange() -> None:
        both = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(both):
            work.wait()

    return exchange


def ring_partners(ranks: Sequence[int], rank: int) -> list[int | None]:
    """Returns whom a rank of a ring exchanges with in each of two rounds: one neighbour, then the other.

    A rank that is slow in both rounds is slow itself; one that is slow in one round has a slow neighbour. None: it
    pauses, as one rank of an odd number does. Of two ranks there is one round.
    """
    place, count = ranks.index(rank), len(ranks)
    step = 1 if place % 2 == 0 else -1
    others = [place + step, place - step][: count - 1]
    if count % 2 == 0:
        others = [other % count for other in others]
    return [ranks[other] if 0 <= other < count else None for other in others]
