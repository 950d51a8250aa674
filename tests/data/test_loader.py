import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from mugv_ds.data import noise
from mugv_ds.data.buckets import Order, micro_batches
from mugv_ds.data.loader import loader
from mugv_ds.data.sample import SampleError

ORDER = Order(np.array([(1, 4, 4)] * 7 + [(2, 4, 4)] * 6, dtype=np.int32), 4, 0)
WORKERS = [0, 2]


def draw(visits):
    """A batch as training makes them: rows, visits, and noise keyed by both."""
    return {
        "visits": torch.tensor(visits),
        "noise": torch.stack([noise.gaussian(0, str(row), visit, (3,)) for row, visit in visits]),
    }


def threads(visits):
    torch.rand(1)
    return torch.tensor([torch.get_num_threads(), torch.cuda.is_initialized()])


@dataclass(frozen=True)
class FailAt:
    row: int

    def __call__(self, visits):
        if self.row in [row for row, _ in visits]:
            raise SampleError(f"data/x.pt: row {self.row} is bad")
        return draw(visits)


@dataclass(frozen=True)
class DieAt:
    """Kills its own process at each of `visits`: the first time, or always if not `once`."""

    visits: tuple
    folder: Path
    once: bool

    def __call__(self, visits):
        for visit in set(visits) & set(self.visits):
            sentinel = self.folder / str(visit)
            if not (self.once and sentinel.exists()):
                sentinel.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return draw(visits)


def first_visit(index):
    return ORDER.step(index).rows[0], ORDER.step(index).visits[0]


def read(start, stop, *, workers=0, rank=0, ranks=1, micro=1, make=draw, pin=False):
    return loader(
        ORDER,
        start_step=start,
        stop_step=stop,
        data_rank=rank,
        data_ranks=ranks,
        micro=micro,
        make=make,
        sample_id="row-{}".format,
        num_workers=workers,
        pin=pin,
    )


def plain(steps):
    return [(step, [(b["visits"].tolist(), b["noise"].tolist()) for b in batches]) for step, batches in steps]


EXPECTED = plain((ORDER.step(i), [draw(b) for b in micro_batches(ORDER.step(i), 0, 1, 1)]) for i in range(12))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("start", [0, 5])
def test_resuming_is_going_on(workers, start):
    assert plain(read(start, 12, workers=workers)) == EXPECTED[start:]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_share_each_step(ranks, micro):
    by_rank = [list(read(0, 6, rank=rank, ranks=ranks, micro=micro)) for rank in range(ranks)]
    for index, shares in enumerate(zip(*by_rank, strict=True)):
        step = ORDER.step(index)
        assert all(got == step and len(batches) == 4 // ranks // micro for got, batches in shares)
        together = torch.cat([batch["visits"] for _, batches in shares for batch in batches])
        assert together.tolist() == [list(pair) for pair in zip(step.rows, step.visits, strict=True)]


def test_nothing_to_read():
    assert list(read(5, 5)) == []


@pytest.mark.parametrize("workers", WORKERS)
def test_ambient_random_state_is_left_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(read(0, 2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_have_one_thread_and_no_cuda():
    assert [batch.tolist() for _, batches in read(0, 1, workers=1, make=threads) for batch in batches] == [[1, 0]] * 4


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_keeps_its_class_and_message(workers):
    bad = ORDER.step(2).rows[1]
    with pytest.raises(SampleError, match=rf"data/x\.pt: row {bad} is bad"):
        list(read(0, 4, workers=workers, make=FailAt(bad)))


def test_killed_workers_are_replaced(tmp_path, caplog, impatient):
    """One restart is allowed in a row: two, with steps in between, are not too many."""
    killers = (first_visit(3), first_visit(8))
    with caplog.at_level(logging.WARNING):
        assert plain(read(0, 12, workers=2, make=DieAt(killers, tmp_path, once=True))) == EXPECTED
    assert {path.name for path in tmp_path.iterdir()} == {str(visit) for visit in killers}
    assert len(caplog.records) == 2
    for record in caplog.records:
        step = record.args[1]
        assert (
            f"step {step}, samples {[f'row-{row}' for row in ORDER.step(step).rows]}: read again, 1 of 1"
            in record.getMessage()
        )


def test_workers_that_die_again_and_again_end_the_run(tmp_path, caplog, impatient):
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(read(0, 2, workers=1, make=DieAt((first_visit(0),), tmp_path, once=False)))
    assert [record.args[3] for record in caplog.records] == [1]


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
