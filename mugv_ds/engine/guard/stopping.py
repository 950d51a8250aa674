"""Agreeing to stop: one rank was asked to, and all leave at the same place, so that none waits for another."""

from typing import Protocol

import torch
from torch import Tensor

from mugv_ds.config.console import say
from mugv_ds.config.errors import Stopped
from mugv_ds.engine.guard import signals


class Host(Protocol):
    """Collectives of all ranks on the host; see `engine.process.HostGroup`."""

    rank: int

    def rows(self, row: Tensor) -> Tensor: ...


def asked(host: Host) -> tuple[int, int] | None:
    """(rank, what it received) of the first rank that was asked to stop; None: none was. All ranks call it."""
    received = host.rows(torch.tensor([signals.SIGNALS.received])).flatten().tolist()
    return next(((rank, number) for rank, number in enumerate(received) if number), None)


def stop_if_asked(host: Host) -> None:
    """Ends a start before anything is trained, if a rank was asked to stop. All ranks call it.

    Raises:
        Stopped: one was; rank 0 says which.
    """
    if (found := asked(host)) is None:
        return
    rank, number = found
    line = f"before the first step: rank {rank} {signals.name(number)}; stopping"
    if host.rank == 0:
        say(line)
    raise Stopped(line)
