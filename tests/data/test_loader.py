import logging
import os
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
import torch

from mugv_ds.data import noise
from mugv_ds.data.budget import BatchSize
from mugv_ds.data.loader import _Packed, loader
from mugv_ds.data.plan import Plan, Stream
from mugv_ds.data.sample import SampleError
from tests.helpers.waiting import wait_until

SHAPES = np.array([(1, 4, 4)] * 7 + [(2, 4, 4)] * 6, dtype=np.int32)


def plan(micro):
    """Steps of four samples of one shape and of eight of the other, in micro-batches of `micro`."""
    sizes = {(1, 4, 4): BatchSize(4, micro), (2, 4, 4): BatchSize(8, micro)}
    return Plan([Stream("train", 0, SHAPES, sizes)], 0)


PLAN = plan(1)
WORKERS = [0, 2]


def draw(refs):
    """A batch as training makes them: refs, and noise keyed by them."""
    return {
        "refs": torch.tensor(refs),
        "noise": torch.stack([noise.gaussian(0, str(row), visit, (3,)) for _, row, visit in refs]),
    }


def threads(refs):
    torch.rand(1)
    return torch.tensor([torch.get_num_threads(), torch.cuda.is_initialized()])


@dataclass(frozen=True)
class FailAt:
    row: int

    def __call__(self, refs):
        if self.row in [ref.item for ref in refs]:
            raise SampleError(f"data/x.pt: row {self.row} is bad")
        return draw(refs)


@dataclass(frozen=True)
class DieAt:
    """Kills its own process at each of `refs`: the first time, or always if not `once`."""

    refs: tuple
    folder: Path
    once: bool

    def __call__(self, refs):
        for ref in set(refs) & set(self.refs):
            sentinel = self.folder / str(ref)
            if not (self.once and sentinel.exists()):
                sentinel.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return draw(refs)


def first_pick(index):
    return PLAN.step(index).refs[0]


def read(start, stop, *, workers=0, rank=0, ranks=1, micro=1, make=draw, pin=False):
    steps = plan(micro)
    return loader(
        lambda index: steps.step(index).micro_batches(rank, ranks),
        start_step=start,
        stop_step=stop,
        make=make,
        name=lambda ref: f"row-{ref.item}",
        num_workers=workers,
        pin=pin,
    )


def plain(steps):
    return [[(batch["refs"].tolist(), batch["noise"].tolist()) for batch in batches] for batches in steps]


EXPECTED = plain([draw([ref]) for ref in PLAN.step(i).refs] for i in range(12))


@dataclass(frozen=True)
class Noting:
    """Leaves a file for each micro-batch that it makes."""

    folder: Path

    def __call__(self, refs):
        (self.folder / f"{refs[0].item}-{refs[0].visit}").touch()
        return draw(refs)


def test_the_whole_next_step_is_here_while_one_is_at_work(tmp_path, monkeypatch):
    """Its eight micro-batches too, of which a worker makes two before they are asked for."""
    received, unpack = [], _Packed.unpack
    monkeypatch.setattr(_Packed, "unpack", lambda packed: received.append(packed) or unpack(packed))
    assert [len(plan(1).step(index).refs) for index in (1, 2)] == [4, 8]
    with closing(read(1, 3, workers=1, make=Noting(tmp_path))) as steps:
        next(steps)
        steps.begin()
        wait_until(lambda: len(received) == len(list(tmp_path.iterdir())) == 12)


def test_without_workers_a_step_is_read_when_it_is_asked_for(tmp_path):
    with closing(read(1, 3, make=Noting(tmp_path))) as steps:
        next(steps)
        assert len(list(tmp_path.iterdir())) == 4


class Pair(NamedTuple):
    first: torch.Tensor
    rest: tuple


def of_every_kind(refs):
    odd = torch.arange(15, dtype=torch.int16).view(3, 5)
    numbers = {"none": torch.empty(0, 4), "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "text": "as it is"}
    return [Pair(torch.tensor(refs[0].item), (torch.tensor([True, False]), odd.T)), numbers]


def tensors_of(made):
    (pair, numbers) = made
    return [pair.first, *pair.rest, numbers["none"], numbers["half"]]


def test_a_batch_comes_over_whole_in_one_piece():
    """Each tensor that is handed over costs a connection, so all come in one, with their dtypes and shapes."""
    (here,), (there,) = (next(read(0, 1, workers=workers, make=of_every_kind))[:1] for workers in WORKERS)
    assert type(there) is list and type(there[0]) is Pair and there[1]["text"] == "as it is"
    for own, handed in zip(tensors_of(here), tensors_of(there), strict=True):
        assert (own.dtype, own.shape) == (handed.dtype, handed.shape) and torch.equal(own, handed)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors_of(there)}) == 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors_of(here)}) > 1


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("start", [0, 5])
def test_resuming_is_going_on(workers, start):
    assert plain(read(start, 12, workers=workers)) == EXPECTED[start:]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_share_each_step(ranks, micro):
    by_rank = [list(read(0, 6, rank=rank, ranks=ranks, micro=micro)) for rank in range(ranks)]
    for index, shares in enumerate(zip(*by_rank, strict=True)):
        refs = PLAN.step(index).refs
        assert {len(batch["refs"]) for batches in shares for batch in batches} == {micro}
        assert {len(batches) for batches in shares} == {len(refs) // ranks // micro}
        together = torch.cat([batch["refs"] for batches in shares for batch in batches])
        assert together.tolist() == [list(ref) for ref in refs]


def test_nothing_to_read():
    assert list(read(5, 5)) == []


@pytest.mark.parametrize("workers", WORKERS)
def test_ambient_random_state_is_left_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(read(0, 2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_have_one_thread_and_no_cuda():
    assert [batch.tolist() for batches in read(0, 1, workers=1, make=threads) for batch in batches] == [[1, 0]] * len(
        PLAN.step(0).refs
    )


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_keeps_its_class_and_message(workers):
    bad = PLAN.step(2).refs[1].item
    with pytest.raises(SampleError, match=rf"data/x\.pt: row {bad} is bad"):
        list(read(0, 4, workers=workers, make=FailAt(bad)))


def test_killed_workers_are_replaced(tmp_path, caplog, impatient):
    """One restart is allowed in a row: two, with steps in between, are not too many."""
    killers = (first_pick(3), first_pick(8))
    with caplog.at_level(logging.WARNING):
        assert plain(read(0, 12, workers=2, make=DieAt(killers, tmp_path, once=True))) == EXPECTED
    assert {path.name for path in tmp_path.iterdir()} == {str(ref) for ref in killers}
    assert len(caplog.records) == 2
    for record in caplog.records:
        step = record.args[1]
        assert (
            f"step {step}, samples {[f'row-{ref.item}' for ref in PLAN.step(step).refs]}: read again, 1 of 1"
            in record.getMessage()
        )


def test_workers_that_die_again_and_again_end_the_run(tmp_path, caplog, impatient):
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(read(0, 2, workers=1, make=DieAt((first_pick(0),), tmp_path, once=False)))
    assert [record.args[3] for record in caplog.records] == [1]


@pytest.mark.long
def test_workers_end_with_the_run(tmp_path):
    code = """
import time
from tests.data.test_loader import read
steps = read(0, 12, workers=2)
next(steps)
print("reading", flush=True)
time.sleep(60)
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "reading\n"
        helpers = psutil.Process(run.pid).children(recursive=True)
        assert len(helpers) >= 2
        run.kill()
        _, left = psutil.wait_procs(helpers, timeout=20)
        for helper in left:
            helper.kill()
        assert not left
