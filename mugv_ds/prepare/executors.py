"""Where units of work run: in processes of this machine, or on a Ray cluster. The results are the same bytes.

A unit's function writes its own result to the file system and returns a few numbers, so no data go through here. A
process that dies harms its unit alone, which is tried once more.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pebble import ProcessExpired, ProcessPool

from mugv_ds.config.errors import InputError, Stopped, TrainingError

Job = TypeVar("Job")

_TRIES = 2  # of a unit whose process died
_WAIT_S = 0.5  # after which it is asked whether to stop


@dataclass(frozen=True)
class Done:
    """A unit that is done. job: as it was given. result: what its function returned."""

    job: Any
    result: Any


@dataclass(frozen=True)
class Crashed:
    """A unit whose process died each time. job: as it was given. why: the signal, in words."""

    job: Any
    why: str


class Stop:
    """Whether the run was asked to stop: SIGINT and SIGTERM set it, in the main thread of a command."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def listen(self) -> None:
        """Has SIGINT, SIGTERM and SIGUSR1 ask the run to stop; what is done stays, and the same command goes on."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: self._event.set())

    def check(self) -> None:
        """Raises Stopped if the run was asked to."""
        if self._event.is_set():
            raise Stopped("asked to stop; the same command goes on where it was")


class Executor(Protocol):
    """Runs the units of a step; a context, which ends what it has started."""

    def __enter__(self) -> "Executor": ...

    def __exit__(self, *_: object) -> None: ...

    def on_cpus(self, function: Callable[[Job], Any], jobs: Iterable[Job]) -> Iterator[Done | Crashed]:
        """Yields the jobs as they are done, each in a process with one CPU.

        Args:
            function: of a module. jobs: picklable.

        Raises:
            Stopped: the run was asked to stop. Exception: what `function` raised.
        """

    def on_devices(
        self, function: Callable[[Job, str], Any], jobs: Iterable[Job], devices: Sequence[str]
    ) -> Iterator[Done | Crashed]:
        """As `on_cpus`; each process keeps one of the devices, which its function is told, for all of its jobs."""


class Local:
    """Processes of this machine, which are kept from step to step until the executor is closed as a context.

    Args:
        workers: how many at a time use a CPU. stop: asked between units.
    """

    def __init__(self, workers: int, stop: Stop) -> None:
        self._workers, self._stop = workers, stop
        self._pools: dict[str, ProcessPool] = {}  # by device; "" for CPUs

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for pool in self._pools.values():
            if kind is None:
                pool.close()
            else:
                pool.stop()  # nobody waits for what is under way
            pool.join()
        self._pools.clear()

    def on_cpus(self, function: Callable[[Job], Any], jobs: Iterable[Job]) -> Iterator[Done | Crashed]:
        """See `Executor`."""
        yield from self._run({"": (self._workers, (function,))}, jobs)

    def on_devices(
        self, function: Callable[[Job, str], Any], jobs: Iterable[Job], devices: Sequence[str]
    ) -> Iterator[Done | Crashed]:
        """See `Executor`."""
        yield from self._run({device: (1, (_on_device, function, device)) for device in devices}, jobs)

    def _pool(self, name: str, size: int) -> ProcessPool:
        if name not in self._pools:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["mugv_ds.prepare.run"])  # then they start in no time
            self._pools[name] = ProcessPool(size, context=context, initializer=_begin)
        return self._pools[name]

    def _run(self, places: Mapping[str, tuple[int, tuple]], jobs: Iterable[Job]) -> Iterator[Done | Crashed]:
        """Runs the jobs in pools. places: name of a pool → its processes, and what is called with a job as last."""
        waiting, running = iter(jobs), {}

        def start(name: str, job: Any, tries: int) -> None:
            size, (function, *rest) = places[name]
            running[self._pool(name, size).schedule(function, (*rest, job))] = name, job, tries

        def start_next(name: str) -> None:
            for job in waiting:
                start(name, job, 1)
                return

        for name, (size, _) in places.items():
            for _ in range(size + 1):  # one more than run, so that none waits
                start_next(name)
        try:
            while running:
                self._stop.check()
                for future in wait(running, timeout=_WAIT_S, return_when=FIRST_COMPLETED).done:
                    name, job, tries = running.pop(future)
                    why = _death_of(future)
                    if why is None:
                        start_next(name)
                        yield Done(job, future.result())
                    elif tries < _TRIES:
                        start(name, job, tries + 1)
                    else:
                        start_next(name)
                        yield Crashed(job, why)
        finally:
            for future in running:
                future.cancel()


class Ray:
    """A Ray cluster: tasks for CPUs, actors for devices. Data never go through its object store.

    Args:
        address: of the cluster, or auto for one of this machine alone. stop: asked between units.

    Raises:
        InputError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, address: str, stop: Stop) -> None:
        try:
            import ray
        except ImportError:
            raise InputError('--ray needs the package ray: pip install "mugv_ds[prepare-cluster]"') from None
        self._stop, self._ray = stop, ray
        given = {"include_dashboard": False} if address == "auto" else {"address": address}
        environment = {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}
        try:
            ray.init(log_to_driver=False, runtime_env=environment, **given)
        except (ConnectionError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"--ray {address}: no cluster there ({reason}); start one, or take auto") from None

    def __enter__(self) -> "Ray":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def on_cpus(self, function: Callable[[Job], Any], jobs: Iterable[Job]) -> Iterator[Done | Crashed]:
        """See `Executor`."""
        task = self._ray.remote(num_cpus=1, max_retries=_TRIES - 1)(function)
        limit = 2 * int(self._ray.cluster_resources().get("CPU", 1))
        yield from self._run([lambda job: task.remote(job)] * limit, jobs)

    def on_devices(
        self, function: Callable[[Job, str], Any], jobs: Iterable[Job], devices: Sequence[str]
    ) -> Iterator[Done | Crashed]:
        """See `Executor`; on a cluster with GPUs there is an actor for each of them, whatever this machine has."""
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        on_gpus = gpus > 0 and devices[0].startswith("cuda")
        options = {"num_gpus": 1} if on_gpus else {"num_cpus": 1}
        count, device = (gpus, "cuda:0") if on_gpus else (1, "cpu")
        actor = self._ray.remote(**options, max_restarts=3, max_task_retries=_TRIES - 1)(_Actor)
        actors = [actor.remote(device) for _ in range(count)]
        yield from self._run([lambda job, one=one: one.call.remote(function, job) for one in actors], jobs)

    def _run(self, places: Sequence[Callable[[Job], Any]], jobs: Iterable[Job]) -> Iterator[Done | Crashed]:
        """Runs one job at each place at a time."""
        from ray.exceptions import RayError, RayTaskError

        waiting, running = iter(jobs), {}
        for place in places:
            for job in waiting:
                running[place(job)] = place, job
                break
        while running:
            self._stop.check()
            ready, _ = self._ray.wait(list(running), timeout=_WAIT_S)
            for reference in ready:
                place, job = running.pop(reference)
                for following in waiting:
                    running[place(following)] = place, following
                    break
                try:
                    yield Done(job, self._ray.get(reference))
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                except RayError as error:
                    yield Crashed(job, str(error).strip().partition("\n")[0])


class _Actor:
    """Keeps a device, and what its functions keep for it, from one job to the next."""

    def __init__(self, device: str) -> None:
        self._device = device

    def call(self, function: Callable[[Any, str], Any], job: Any) -> Any:
        return function(job, self._device)


def refuse_crashed(step: str, crashed: Sequence[Crashed]) -> None:
    """Raises TrainingError if units' processes died: all of them are named, and all others are done."""
    if crashed:
        named = "; ".join(f"{one.job}: {one.why}" for one in crashed[:5])
        more = f" and {len(crashed) - 5} more" if len(crashed) > 5 else ""
        raise TrainingError(
            f"{step}: {len(crashed)} units killed their processes twice, all others are done: {named}{more}; the "
            "kernel kills where memory runs out: take fewer --workers, or look at these"
        )


def _on_device(function: Callable[[Job, str], Any], device: str, job: Job) -> Any:
    return function(job, device)


def _begin() -> None:
    """Leaves signals that ask to stop to the parent, and ends this process when the parent is gone."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _death_of(future: Future) -> str | None:
    """Returns in words how the process of a job died; None if it did not."""
    error = future.exception()
    if not isinstance(error, ProcessExpired):
        return None
    code = error.exitcode
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with status {code}"
