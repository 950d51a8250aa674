"""Faults, each a function that is called in a rank before it trains. Bind the arguments with functools.partial."""

import contextlib
import errno
import gc
import os
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from torch.distributed import distributed_c10d
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.store import Store
from mugv_ds.data import patience
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.guard.guard import Guard
from mugv_ds.engine.guard.watchdog import Watchdog
from mugv_ds.engine.loop import Trainer
from mugv_ds.models.layers import FeedForward
from mugv_ds.parallel.pipeline import DiTPipeline
from mugv_ds.preflight import probes, state


def signal_in_step(rank: int, *, step: int, number: signal.Signals, again: bool = False) -> None:
    """A signal between two micro-batches of a step and, if `again`, more before and after the state is saved."""
    share, train_step, save = Feed._share, Trainer._train_step, Store.save
    now = {"step": -1, "shared": 0}

    def stepping(self, at, *args):
        now.update(step=at, shared=0)
        return train_step(self, at, *args)

    def sharing(self, *args):
        now["shared"] += 1
        if now["step"] == step and now["shared"] == 2:
            os.kill(os.getpid(), number)
        return share(self, *args)

    def saving(self, *args):
        twice = again and now["step"] == step
        if twice:
            os.kill(os.getpid(), number)
        save(self, *args)
        if twice:
            os.kill(os.getpid(), number)

    Trainer._train_step, Feed._share, Store.save = stepping, sharing, saving


def scaled_loss(rank: int, *, factors: dict[int, float]) -> None:
    """The loss of this rank is multiplied at these data steps."""
    train_step, record = Trainer._train_step, DiTPipeline._record_loss
    now = {}

    def stepping(self, step, *args):
        now["factor"] = factors.get(self.guard.history.position(step), 1.0)
        return train_step(self, step, *args)

    def recording(self, output, given):
        loss = self.loss

        def scaled(*args):
            value, terms = loss(*args)
            return value * now.get("factor", 1.0), terms

        self.loss = scaled
        try:
            return record(self, output, given)
        finally:
            self.loss = loss

    Trainer._train_step, DiTPipeline._record_loss = stepping, recording


def at_step(rank: int, *, step: int, act) -> None:
    """`act` is called with the trainer right after a step."""
    train_step = Trainer._train_step

    def stepping(self, at, *args):
        taken = train_step(self, at, *args)
        if at == step:
            act(self)
        return taken

    Trainer._train_step = stepping


def freeze(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def see_late(rank: int) -> None:
    """The rank's watchdog takes 1.5 s longer than the others', as on a machine that is too busy to let it look."""
    start = Watchdog.start

    def later(self: Watchdog) -> None:
        self._timeout += 1.5
        start(self)

    Watchdog.start = later


def doze(trainer: Trainer) -> None:
    time.sleep(1000)


def perturb(trainer: Trainer) -> None:
    """One bit of one weight."""
    weight = trainer.engine.module.blocks[0].mlp.fc1.weight.data.view(torch.int32)
    weight[3, 5] ^= 1


def kill_worker(trainer: Trainer) -> None:
    """One of the loader's processes is killed."""
    (loading,) = (o for o in gc.get_objects() if type(o) is _MultiProcessingDataLoaderIter)
    os.kill(loading._workers[0].pid, signal.SIGKILL)


def freeze_in_step(rank: int, *, step: int, frozen: int) -> None:
    """SIGSTOP of one rank inside the forward pass of a step.

    On all ranks torch's default time-out of a group is 2 s: less than the watchdog's, as that of NCCL is by default.
    """
    distributed_c10d.default_pg_timeout = timedelta(seconds=2)
    train_step, forward = Trainer._train_step, FeedForward.forward
    now = {}

    def stepping(self, at, *args):
        now["step"] = at
        return train_step(self, at, *args)

    def freezing(self, *args):
        if rank == frozen and now["step"] == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return forward(self, *args)

    Trainer._train_step, FeedForward.forward = stepping, freezing


def signal_at_mark(rank: int, *, step: int, mark: int) -> None:
    """SIGUSR1 at one of the marks in the validations and previews after a step."""
    alive, now = Guard.alive, {"marks": 0}

    def marking(self, at):
        if at == step:
            now["marks"] += 1
            if now["marks"] == mark:
                os.kill(os.getpid(), signal.SIGUSR1)
        alive(self, at)

    Guard.alive = marking


def slow(rank: int, *, seconds: float) -> None:
    """The feed-forward layers take longer."""
    forward = FeedForward.forward

    def sleeping(self, *args):
        time.sleep(seconds)
        return forward(self, *args)

    FeedForward.forward = sleeping


def slow_and_perturbed(rank: int, *, seconds: float, step: int) -> None:
    """`slow`, and one bit of the weights differs after a step."""
    slow(rank, seconds=seconds)
    at_step(rank, step=step, act=perturb)


def troubled_and_stopped(rank: int, *, factors: dict[int, float], step: int) -> None:
    """`scaled_loss`, and a signal in a step."""
    scaled_loss(rank, factors=factors)
    signal_in_step(rank, step=step, number=signal.SIGTERM)


def measure_resources(rank: int, *, every: int) -> None:
    """Steps taken, resident bytes and open files go to `resources` in the run's folder."""
    process, train_step = psutil.Process(), Trainer._train_step

    def stepping(self, step, *args):
        taken = train_step(self, step, *args)
        if step % every == 0:
            gc.collect()
            with (self.config.checkpoint.folder.parent / "resources").open("a") as file:
                file.write(f"{step} {process.memory_info().rss} {process.num_fds()}\n")
        return taken

    Trainer._train_step = stepping


def killed_in_save(rank: int, *, function: str, step: int) -> None:
    """`kill -9` of this process when a save of `step` comes to one of the functions of `checkpoint.files`."""
    original = getattr(files, function)

    def killing(*args):
        unfinished = args[0].parent.name if function == "write_tensors" else f"step-{args[1]:08d}.tmp"
        if unfinished == f"step-{step:08d}.tmp":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(files, function, killing)


def failing_write(rank: int, *, step: int) -> None:
    """The disk fails under this rank's part of a checkpoint."""
    original = files.write_tensors

    def failing(path, tensors):
        if path.parent.name == f"step-{step:08d}.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path, tensors)

    files.write_tensors = failing


def limit_files(trainer: Trainer, after: int) -> None:
    """Calls `forbid_large_files` once the checkpoint of step `after` is there."""
    latest = Path(trainer.config.checkpoint.dir) / "latest"
    while latest.read_text().strip() != f"step-{after:08d}":  # a writer of this process may still be at it
        time.sleep(0.01)
    forbid_large_files()


def forbid_large_files() -> None:
    """From now on this process may write no file of more than 64 KiB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def spoil_weight(trainer: Trainer) -> None:
    """One master weight of this rank is infinite."""
    trainer.store.fragments[0].tensors["weight"].flatten()[0] = torch.inf


def fill_disk(trainer: Trainer, folder: Path) -> None:
    """No byte is free on the file system of a folder."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass


def impatient(rank: int, *, then: Callable[[int], None] | None = None) -> None:
    """A file system that is away is waited for half a second more, not some minutes."""
    patience._LONG_WAITS = (0.5,)
    if then is not None:
        then(rank)


def hide(trainer: Trainer, folder: Path) -> None:
    """A folder is gone."""
    folder.rename(folder.with_name("hidden"))


def unfit(rank: int) -> None:
    """A machine that multiplies slowly, has another PyTorch, a wrong clock, and no room for checkpoints."""
    product_call, clock_ahead, versions = probes.product_call, state.clock_ahead, state.versions

    def slow_product(*args):
        call = product_call(*args)
        return lambda: [call() for _ in range(200)]  # by a factor, however busy the machine is

    probes.product_call = slow_product
    state.clock_ahead = lambda host: clock_ahead(host, now=lambda: time.time() + 100)
    state.versions = lambda: versions() | {"torch": "1.0"}
    forbid_large_files()


def hang_in_product(rank: int) -> None:
    """The matrix product of the preflight does not come back."""
    probes.product_call = lambda *args: lambda: time.sleep(1000)


def _after_block(number: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The output of one block of the model is changed, in a run of one stage."""
    init = DiTPipeline.__init__

    def building(self, *args, **options):
        init(self, *args, **options)
        self.blocks[number].register_forward_hook(lambda block, given, x: change(x))

    DiTPipeline.__init__ = building


def collapsed(rank: int, *, block: int) -> None:
    """A block gives every token the mean of all."""
    _after_block(block, lambda x: x.mean(dim=1, keepdim=True).expand_as(x))


def massive_channel(rank: int, *, block: int, channel: int) -> None:
    """The weights of one channel of a block's feed-forward layer are far too large."""
    init = DiTPipeline.__init__

    def building(self, *args, **options):
        init(self, *args, **options)
        self.blocks[block].mlp.fc2.weight.data[channel] *= 1e5

    DiTPipeline.__init__ = building
