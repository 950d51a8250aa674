"""What a rank measures before a run: its own speed, and that of its links to the others of its host and to other hosts.

A collective is as slow as its slowest member, on all of them. So ranks also exchange in pairs, with one neighbour and
then with the other: the better of the two says what a rank can do by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mugv_ds.plan.calibration import Calibration
from mugv_ds.preflight.measure import Clock, collective_call, copy_call, exchange_call, product_call, ring_partners

_ENOUGH_SECONDS = 0.2  # that the passes of one measurement may take together
_MIB = 1 << 20
_TERA, _GIGA = 1e12, 1e9
_COPIES = ("on_device", "to_host", "to_device")
_COLLECTIVES = ("all_to_all", "all_reduce")


@dataclass(frozen=True)
class Sizes:
    """What is measured. product: (rows, width in, width out). copied, exchanged: bytes. dtype: of the product."""

    product: tuple[int, int, int]
    copied: int
    exchanged: int
    dtype: torch.dtype

    @property
    def flops(self) -> float:
        """Returns those of the product."""
        rows, width_in, width_out = self.product
        return 2.0 * rows * width_in * width_out


# Of a GPU those that `tools/calibrate.py` measures too.
ON_GPU = Sizes((32768, 3456, 13824), 256 * _MIB, 128 * _MIB, torch.bfloat16)
ON_CPU = Sizes((256, 1024, 1024), 16 * _MIB, _MIB, torch.float32)


class Probes:
    """The measurements of one rank. All ranks make them together, and each of all in the same order.

    Args:
        rank: of this process. hosts: the ranks of each host, in order. device: of this rank.
    """

    def __init__(self, rank: int, hosts: list[list[int]], device: torch.device) -> None:
        self._rank, self._hosts = rank, hosts
        self._own = next(ranks for ranks in hosts if rank in ranks)
        self._sizes = ON_GPU if device.type == "cuda" else ON_CPU
        self._device, self._clock = device, Clock(device, _ENOUGH_SECONDS)
        # NCCL makes a group's communicator at its first call, in which all of its ranks must take part.
        dist.all_reduce(torch.zeros(1, device=device))
        made = [dist.new_group(ranks) for ranks in hosts] if len(hosts) > 1 else [None]
        self._group = made[hosts.index(self._own) if len(hosts) > 1 else 0]

    def all(self) -> dict[str, Callable[[], float | None]]:
        """Returns the measurements by name, see `LABELS`; each returns a rate, or None where this rank has no part."""
        copies = _COPIES if self._device.type == "cuda" else _COPIES[:1]
        probes = {"product": self.product, **{kind: lambda kind=kind: self.copy(kind) for kind in copies}}
        if max(map(len, self._hosts)) > 1:
            probes["host_exchange"] = lambda: self.exchange(self._own)
            for kind in _COLLECTIVES:
                probes[f"host_{kind}"] = lambda kind=kind: self.collective(kind, self._group)
        if len(self._hosts) > 1:
            place = self._own.index(self._rank)
            alike = [ranks[place] for ranks in self._hosts if place < len(ranks)]
            probes["exchange"] = lambda: self.exchange(alike)
            for kind in _COLLECTIVES:
                probes[kind] = lambda kind=kind: self.collective(kind, None)
        return probes

    def product(self) -> float:
        """Measures a matrix product, in TFLOP/s."""
        (seconds,) = self._clock(product_call(*self._sizes.product, self._sizes.dtype, self._device))
        return self._sizes.flops / seconds / _TERA

    def busy(self, seconds: float) -> Callable[[], None]:
        """Keeps a GPU at work for about so long; returns what waits for the end of it."""
        if self._device.type == "cuda":
            call = product_call(*self._sizes.product, self._sizes.dtype, self._device)
            (once,) = self._clock(call)
            for _ in range(int(seconds / once)):
                call()
        return self._clock.wait

    def copy(self, kind: str) -> float:
        """Measures a copy, see `measure.copy_call`, in GB/s."""
        (seconds,) = self._clock(copy_call(kind, self._sizes.copied, self._device))
        return self._sizes.copied / seconds / _GIGA

    def collective(self, kind: str, group: dist.ProcessGroup | None) -> float | None:
        """Measures a collective, in GB/s of what one rank sends or has; of the ranks' times the longest is taken."""
        if dist.get_world_size(group) == 1:
            return None
        seconds = self._met(collective_call(kind, self._sizes.exchanged, group, self._device))
        slowest = torch.tensor(seconds, device=self._device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        return self._sizes.exchanged / slowest.item() / _GIGA

    def exchange(self, ranks: list[int]) -> float | None:
        """Measures exchanges with the neighbours in a ring of ranks; returns the better, in GB/s in each direction."""
        rates = []
        for other in ring_partners(ranks, self._rank):
            if other is not None:
                seconds = self._met(exchange_call(self._sizes.exchanged, other, self._device))
                rates.append(self._sizes.exchanged / seconds / _GIGA)
        return max(rates, default=None)

    def _met(self, call: Callable[[], object]) -> float:
        """Returns the seconds of a call that all make: of the second of two, as the first waits for who comes late."""
        _, seconds = self._clock.fixed(call, call)
        return seconds


# What tables call the measurements, and their units.
LABELS = {
    "product": ("matrix product", "TFLOP/s"),
    "on_device": ("copy on the device", "GB/s"),
    "to_host": ("copy to the host", "GB/s"),
    "to_device": ("copy to the device", "GB/s"),
    "host_exchange": ("exchange on the host", "GB/s"),
    "host_all_to_all": ("all-to-all of the host", "GB/s"),
    "host_all_reduce": ("all-reduce of the host", "GB/s"),
    "exchange": ("exchange between hosts", "GB/s"),
    "all_to_all": ("all-to-all of all", "GB/s"),
    "all_reduce": ("all-reduce of all", "GB/s"),
}


def calibrated_rates(calibration: Calibration, ranks: int) -> dict[str, float]:
    """Returns the rates that a calibration has for what is measured on a GPU, by name; exchanges are not among them.

    Args:
        ranks: of a host.
    """
    rates, (rows, width_in, width_out) = {}, ON_GPU.product
    for point in calibration.products:
        if (point.rows, point.width_in, point.width_out) == (rows, width_in, width_out):
            rates["product"] = ON_GPU.flops / point.forward_s / _TERA
    for point in calibration.copies:
        if point.bytes == ON_GPU.copied:
            rates[point.kind] = point.bytes / point.seconds / _GIGA
    for point in calibration.collectives:
        if point.kind in _COLLECTIVES and (point.ranks, point.bytes) == (ranks, ON_GPU.exchanged):
            rates[f"host_{point.kind}"] = point.bytes / point.seconds / _GIGA
    return rates
