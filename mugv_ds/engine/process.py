"""This process among all of a run, and what they tell one another on the host."""

import json
import os
import resource
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed import distributed_c10d

from mugv_ds.config.environment import LaunchEnvironment, read_environment
from mugv_ds.config.errors import ConfigError, PeerError, status_of
from mugv_ds.config.load import leaves
from mugv_ds.config.run import RunConfig
from mugv_ds.config.schema import ParallelSection
from mugv_ds.engine.trackers import check_trackers
from mugv_ds.parallel.layout import Layout, RankCoordinates, sequence_group

_PATIENCE_SECONDS = 1.0  # between two looks at whether rank 0 is done
_AFTER_WATCHDOG = timedelta(minutes=5)
_MOST_FILES = 65_536  # some programs walk over all descriptors that they may have

T = TypeVar("T")


class HostGroup(ABC):
    """Collectives of all ranks on the host: no device waits for them, and they work where a device is stuck.

    All ranks call each method together and in the same order. Values travel as JSON, so that no rank runs what another
    sent. Two threads of a process must not share one.

    Attributes:
        rank: of this process. world_size: number of ranks.
    """

    rank: int
    world_size: int

    @abstractmethod
    def rows(self, row: Tensor) -> Tensor:
        """Gathers a row [n] of every rank, of one length and dtype everywhere, as [world, n]."""

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
            Exception: what `function` raised here. PeerError: it failed on another rank, with its exit status.
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
        own = 0 if failure is None else status_of(failure)
        self.raise_if(self.rows(torch.tensor([own], dtype=torch.uint8)).flatten().tolist(), failure)

    def raise_if(self, statuses: Sequence[float], failure: Exception | None) -> None:
        """Does what `raise_together` does, where every rank knows already which ones failed.

        The failures take the worst status among them, on all ranks: the launcher passes on that of any.

        Args:
            statuses: of each rank, the exit status of its failure; 0 where there is none.
        """
        failed = [(int(status), rank) for rank, status in enumerate(statuses) if status]
        if not failed:
            return
        status, first = min(failed)
        if failure is None:
            raise PeerError(f"rank {first} failed, and says why", status)
        failure.status = status
        raise failure

    def first(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0; its result, of the types that JSON has, is returned on all ranks.

        Raises:
            Exception: on rank 0, what `function` raised. PeerError: on the others.
        """
        result = self.attempt(function if self.rank == 0 else lambda: None)
        return self.gather(result)[0]

    def first_then_all(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0 and then, what it prepared being there, on the others.

        However long rank 0 takes, as for the index of millions of files, no collective waits for it for more than a
        second, so that none of them runs into its time-out.

        Raises:
            Exception: what `function` raised here. PeerError: it failed on another rank.
        """
        result = self.wait_for_first(function)
        others = self.attempt(function if self.rank != 0 else lambda: None)
        return result if self.rank == 0 else others

    def wait_for_first(self, function: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T | None:
        """Calls `function` on rank 0, in a thread, and returns its result there, and None on the others.

        Args:
            meanwhile: called on all ranks about once a second until then. What it raises is raised once the thread has
                come to its end.

        Raises:
            Exception: what `function` raised here. PeerError: it failed on rank 0.
        """
        with ThreadPoolExecutor(1, "first") as thread:
            first = thread.submit(function if self.rank == 0 else lambda: None)
            wait([first], timeout=_PATIENCE_SECONDS)
            while not self.all(first.done()):
                meanwhile()
                wait([first], timeout=_PATIENCE_SECONDS)
        return self.attempt(first.result)

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
            said = error(text)
            raise (said if self.rank == 0 else PeerError(text, status_of(said))) from failure
        return [message["result"] for message in messages]


class GlooGroup(HostGroup):
    """Collectives over a gloo mesh, in which every rank has a connection to every other: quick, for every step.

    Args:
        group: of all ranks, on gloo.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)

    def rows(self, row: Tensor) -> Tensor:
        rows = torch.empty(self.world_size, len(row), dtype=row.dtype)
        dist.all_gather(list(rows), row, group=self._group)
        return rows


class StoreGroup(HostGroup):
    """Collectives over the store of the launch, which rank 0 holds: one connection a rank, for what is rare.

    Args:
        name: that no other such group has. rank, world_size: of this process and of all.
        store: a connection to the launch's store that nobody else uses.
    """

    def __init__(self, name: str, rank: int, world_size: int, store: dist.Store) -> None:
        self.rank, self.world_size = rank, world_size
        self._store, self._calls = dist.PrefixStore(name, store), 0

    def rows(self, row: Tensor) -> Tensor:
        self._calls += 1
        own = row.contiguous().view(torch.uint8).numpy().tobytes()
        if self.rank == 0:
            keys = [f"{self._calls}/{rank}" for rank in range(1, self.world_size)]
            whole = b"".join([own, *(self._store.get(key) for key in keys)])
            self._store.set(f"{self._calls}/all", whole)
            for key in [*keys, f"{self._calls - 1}/all"]:  # which all have read, being here
                self._store.delete_key(key)
        else:
            self._store.set(f"{self._calls}/{self.rank}", own)
            whole = self._store.get(f"{self._calls}/all")
        return torch.frombuffer(bytearray(whole), dtype=torch.uint8).view(row.dtype).view(self.world_size, len(row))


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

    @property
    def card(self) -> str | None:
        """Returns the name of this process's GPU; None on a CPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None


def start_process(config: RunConfig) -> Process:
    """Joins the process group that the launcher describes in the environment, for a training run.

    Raises:
        ConfigError, PeerError: see `join_launch`; also if rank 0 lacks the library of a tracker.
    """
    process = join_launch(config.parallel, config.guard.timeout_s, dict(leaves(config.model_dump(mode="json"))))
    process.host.first(lambda: check_trackers(config.logging.trackers))
    return process


@contextmanager
def alone() -> Iterator[dist.ProcessGroup]:
    """Gives this process a group by itself, as `DistributedOptimizer` needs one, where there is no launch."""
    _leave_out_shared_memory()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo", verbose=False)  # takes the group that there is
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def join_launch(parallel: ParallelSection, timeout_s: float, settings: dict[str, Any]) -> Process:
    """Joins the process group that the launcher describes in the environment.

    Args:
        parallel: the layout. timeout_s: see `guard.timeout_s`; collectives wait 5 minutes longer.
        settings: what all ranks must have been started with, of JSON types.

    Raises:
        ConfigError: the environment is not that of a launch, rank 0 cannot be reached or its port is taken, the layout
            does not fit the number of processes, or the ranks' settings differ.
        PeerError: another rank's settings differ.
    """
    environment = read_environment()
    raise_file_limit()
    # DeepSpeed 0.19 calls a collective that torch 2.13 has renamed, and every rank would say so.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    device = _device(environment)
    # Later than the watchdog, which can say who holds the run up.
    timeout = timedelta(seconds=timeout_s) + _AFTER_WATCHDOG
    bound_groups(timeout)
    _join(environment, "gloo" if device.type == "cpu" else "nccl", timeout)
    host = GlooGroup(dist.new_group(backend="gloo"))
    store = dist.TCPStore(environment.master_addr, environment.master_port, is_master=False, timeout=timeout)
    background = StoreGroup("background", host.rank, host.world_size, store)
    check_same(settings, host, "all ranks must be started with one config")
    layout = Layout.fit(parallel, host.world_size)
    rank = dist.get_rank()
    group = sequence_group(layout, rank)
    return Process(rank, layout, layout.coordinates(rank), device, group, host, background)


def bound_groups(timeout: timedelta) -> None:
    """Gives every process group that is made from now on this time-out, DeepSpeed's and those of a sequence included.

    Left alone they take torch's, for NCCL 10 minutes. That is less than the watchdog waits: a rank that hangs inside a
    step would end the others with an abort that names nobody. Torch has no call for it; it looks these two up when a
    group is made without a time-out of its own.
    """
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout


def raise_file_limit() -> None:
    """Raises the soft limit of open files towards the hard one.

    A rank holds up to one connection to every other in the gloo mesh of `Process.host`, on a CPU also in those of
    DeepSpeed, and rank 0 three more to every rank, as it holds the store: with 512 ranks 511 and 2,044, where many
    systems allow 1,024 at first.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _join(environment: LaunchEnvironment, backend: str, timeout: timedelta) -> None:
    """Joins the default process group.

    Raises:
        ConfigError: rank 0 cannot listen at the launch's address, or is not reached there.
    """
    try:
        deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        at = f"MASTER_ADDR:MASTER_PORT = {environment.master_addr}:{environment.master_port}"
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"{at}: {why}; name the first host and one of its free ports (--master_addr, --master_port)"
        ) from error


def _device(environment: LaunchEnvironment) -> torch.device:
    """The device of this process; on a CPU, where processes share the cores, this sets how many threads one takes."""
    accelerator = get_accelerator()
    device = torch.device(accelerator.device_name(environment.local_rank))
    if device.type == "cpu":
        _leave_out_shared_memory()
        torch.set_num_threads(max((os.cpu_count() or 1) // environment.local_size, 1))
    else:
        accelerator.set_device(environment.local_rank)
    return device


def _leave_out_shared_memory() -> None:
    """Has DeepSpeed not compile its shared-memory collectives at start; gloo does what a CPU run needs."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


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
