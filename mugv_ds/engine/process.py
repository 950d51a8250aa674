"""This process among all of a run, and what they tell one another on the host."""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mugv_ds.config.errors import ConfigError, PeerError
from mugv_ds.config.load import leaves
from mugv_ds.config.schema import TrainConfig
from mugv_ds.parallel.layout import Layout, RankCoordinates, sequence_group

_AFTER_WATCHDOG = timedelta(minutes=5)

T = TypeVar("T")


class HostGroup:
    """Collectives of all ranks on the host, over gloo: no device waits for them, and they work where a device is stuck.

    All ranks call each method together and in the same order. Values travel as JSON, so that no rank runs what another
    sent. Two threads of a process must not share one.

    Args:
        group: of all ranks, on gloo.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)

    def rows(self, row: Tensor) -> Tensor:
        """Gathers a row [n] of every rank, of one length and dtype everywhere, as [world, n]."""
        rows = torch.empty(self.world_size, len(row), dtype=row.dtype)
        dist.all_gather(list(rows), row, group=self._group)
        return rows

    def gather(self, value: Any) -> list[Any]:
        """Gathers a value of every rank that JSON can carry."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.rows(torch.tensor([len(text)])).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = self.rows(padded).numpy()
        return [json.loads(texts[rank, :length].tobytes()) for rank, length in enumerate(lengths)]

    def all(self, value: bool) -> bool:
        """Tells whether a value is true on all ranks."""
        return bool(self.rows(torch.tensor([value], dtype=torch.uint8)).all())

    def attempt(self, function: Callable[[], T]) -> T:
        """Calls `function` on this rank and returns its result once it has succeeded on every rank.

        Raises:
            Exception: what `function` raised here. PeerError: it failed on another rank.
        """
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            failure = error
        self.raise_together(failure)
        return result

    def raise_together(self, failure: Exception | None) -> None:
        """Raises `failure` where there is one and, if any rank has one, PeerError elsewhere."""
        self.raise_if(self.rows(torch.tensor([failure is not None], dtype=torch.uint8)).flatten().tolist(), failure)

    def raise_if(self, failed: Sequence[float], failure: Exception | None) -> None:
        """Does what `raise_together` does, where every rank knows already which ones failed."""
        if failure is not None:
            raise failure
        if any(failed):
            first = next(rank for rank, value in enumerate(failed) if value)
            raise PeerError(f"rank {first} failed, and says why")

    def first(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0; its result, of the types that JSON has, is returned on all ranks.

        Raises:
            Exception: on rank 0, what `function` raised. PeerError: on the others.
        """
        result = self.attempt(function if self.rank == 0 else lambda: None)
        return self.gather(result)[0]

    def first_then_all(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 and then, what it prepared being there, on the others.

        Raises:
            Exception: what `function` raised here. PeerError: it failed on another rank.
        """
        result = self.attempt(function if self.rank == 0 else lambda: None)
        others = self.attempt(function if self.rank != 0 else lambda: None)
        return result if self.rank == 0 else others

    def agree(self, function: Callable[[], Any], error: type[Exception]) -> list[Any]:
        """Calls `function` on every rank; returns the results of all, or fails with one line for all.

        Raises:
            error: on rank 0, naming the ranks on which it failed and why. PeerError: on the others.
        """
        failure = None
        try:
            message = {"result": function()}
        except Exception as cause:
            failure, message = cause, {"error": str(cause) or repr(cause)}
        messages = self.gather(message)
        ranks_of: dict[str, list[str]] = {}
        for rank, message in enumerate(messages):
            if "error" in message:
                ranks_of.setdefault(message["error"], []).append(str(rank))
        if ranks_of:
            text = "; ".join(
                why if len(ranks) == self.world_size else f"rank {', '.join(ranks)}: {why}"
                for why, ranks in ranks_of.items()
            )
            raise (error if self.rank == 0 else PeerError)(text) from failure
        return [message["result"] for message in messages]


@dataclass(frozen=True)
class Process:
    """This process among all.

    Attributes:
        rank: global. layout: of all ranks. coordinates: of this one in it. device: that it computes on.
        group: the ranks that share a sequence; None where it is not shared.
        host: what the main threads exchange on the host. background: likewise the threads that write checkpoints.
    """

    rank: int
    layout: Layout
    coordinates: RankCoordinates
    device: torch.device
    group: dist.ProcessGroup | None
    host: HostGroup
    background: HostGroup

    @property
    def sequence_source(self) -> int:
        """The global rank that reads for this one's sequence group."""
        return self.rank - self.coordinates.sequence


def start_process(config: TrainConfig) -> Process:
    """Joins the process group that the launcher describes in the environment.

    Raises:
        ConfigError: the layout does not fit the number of processes, or the ranks' configs differ.
        PeerError: another rank's config differs.
    """
    # DeepSpeed 0.19 calls a collective that torch 2.13 has renamed, and every rank would say so.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    device = _device()
    # Later than the watchdog, which can say who holds the run up.
    timeout = timedelta(seconds=config.guard.timeout_s) + _AFTER_WATCHDOG
    deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl", verbose=False, timeout=timeout)
    host, background = (HostGroup(dist.new_group(backend="gloo", timeout=timeout)) for _ in range(2))
    check_same_config(config, host)
    layout = Layout.fit(config.parallel, host.world_size)
    rank = dist.get_rank()
    group = sequence_group(layout, rank)
    return Process(rank, layout, layout.coordinates(rank), device, group, host, background)


def _device() -> torch.device:
    """The device of this process; on a CPU, where processes share the cores, this sets how many threads one takes."""
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    device = torch.device(accelerator.device_name(local_rank))
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled at start; gloo does what a CPU run needs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_processes = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max((os.cpu_count() or 1) // local_processes, 1))
    else:
        accelerator.set_device(local_rank)
    return device


def check_same_config(config: TrainConfig, host: HostGroup) -> None:
    """Compares every rank's config with rank 0's.

    Raises:
        ConfigError: on a rank whose config differs; names the keys. PeerError: on the others.
    """
    check_same(dict(leaves(config.model_dump(mode="json"))), host, "all ranks must be started with one config")


def check_same(own: dict[str, Any], host: HostGroup, remedy: str) -> None:
    """Compares what this rank has under each key with what rank 0 has.

    Args:
        own: of JSON types. remedy: what the message tells the user to do.

    Raises:
        ConfigError: on a rank where something differs; names the keys. PeerError: on the others.
    """
    first = host.gather(own if host.rank == 0 else None)[0]
    different = [
        f"{key} = {own.get(key)!r} on rank {host.rank}, {first.get(key)!r} on rank 0"
        for key in sorted(own.keys() | first.keys())
        if own.get(key) != first.get(key)
    ]
    host.raise_together(ConfigError(f"{'; '.join(different)}: {remedy}") if different else None)
