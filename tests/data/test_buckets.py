from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest

from mugv_ds.data.buckets import Order, micro_batches

SHAPES = [(1, 45, 80), (6, 45, 80), (15, 90, 160)]
EPOCHS = 40
PINNED = (1, (6, 45, 80), (15, 7, 2, 1), (1, 1, 1, 1))
GRID = [
    # rows per bucket, global batch size, seed
    ((8,), 4, 0),
    ((7, 9), 4, 1),
    ((1,), 4, 2),
    ((1, 3, 50), 8, 3),
    ((5, 2, 13), 1, 4),
    ((2, 3), 64, 5),
]


def mixed(sizes):
    """int32 [n, 3]: as many rows of each shape as `sizes` says, the shapes mixed."""
    shapes = np.array([SHAPES[b] for b, n in enumerate(sizes) for _ in range(n)], dtype=np.int32)
    return shapes[np.argsort(np.arange(len(shapes)) * 7 % 11, kind="stable")]


def order(sizes, batch, seed=0):
    return Order(mixed(sizes), batch, seed)


def steps_of(o, epochs):
    """All steps of the first epochs."""
    steps = []
    while (step := o.step(len(steps))).epoch < epochs:
        steps.append(step)
    return steps


@pytest.mark.parametrize(("sizes", "batch", "seed"), GRID)
def test_every_row_once_per_visit(sizes, batch, seed):
    steps = steps_of(order(sizes, batch, seed), EPOCHS)
    seen = Counter(chain.from_iterable(zip(s.rows, s.visits, strict=True) for s in steps))
    assert set(seen.values()) == {1}
    # Nothing is lost to rounding: what is still to come fills less than a step of the bucket.
    assert len(seen) == sum(EPOCHS * size // batch * batch for size in sizes)
    complete = (EPOCHS * min(sizes) - batch) // min(sizes)  # visits that every bucket has been through
    rows = sum(sizes)
    per_visit = Counter(visit for _, visit in seen)
    assert [per_visit[visit] for visit in range(complete)] == [rows] * max(complete, 0)


@pytest.mark.parametrize(("sizes", "batch", "seed"), GRID)
def test_steps_have_one_shape_and_full_size_and_epochs_follow_each_other(sizes, batch, seed):
    shapes, o = mixed(sizes), order(sizes, batch, seed)
    steps = [o.step(i) for i in range(60)]
    assert [s.index for s in steps] == list(range(60))
    for s in steps:
        assert len(s.rows) == len(s.visits) == batch
        assert {tuple(shapes[row]) for row in s.rows} == {s.shape}
    assert all(a.epoch <= b.epoch for a, b in pairwise(steps))
    for epoch in {s.epoch for s in steps[:-1]} - {steps[-1].epoch}:
        expected = sum((epoch + 1) * n // batch - epoch * n // batch for n in sizes)
        assert sum(s.epoch == epoch for s in steps) == expected


def test_any_order_of_lookups_gives_the_same_steps():
    forward = [order((7, 9, 2), 4).step(i) for i in range(30)]
    one = order((7, 9, 2), 4)
    assert [one.step(i) for i in reversed(range(30))] == forward[::-1]


def test_seed_and_epoch_change_the_order():
    a, b = order((64,), 4, 0), order((64,), 4, 1)
    rows = [[o.step(i).rows for i in range(16)] for o in (a, b)]
    assert rows[0] != rows[1]
    assert [a.step(16 + i).rows for i in range(16)] != rows[0]
    assert sorted(chain(*rows[0])) == sorted(chain(*rows[1])) == list(range(64))


def test_buckets_are_mixed_within_an_epoch():
    shapes = [order((40, 40), 4).step(i).shape for i in range(20)]
    assert sum(a != b for a, b in pairwise(shapes)) > 3


def test_order_is_pinned():
    """A change here, as by a new release of numpy, changes what resumed runs read."""
    step = order((7, 9), 4, 6309).step(5)
    assert (step.epoch, step.shape, step.rows, step.visits) == PINNED


def test_unreadable_rows_are_left_out():
    shapes = np.array([SHAPES[0], (0, 0, 0), SHAPES[0]], dtype=np.int32)
    assert {row for i in range(6) for row in Order(shapes, 2, 0).step(i).rows} == {0, 2}
    with pytest.raises(ValueError, match="no row"):
        Order(np.zeros((3, 3), np.int32), 2, 0)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_ranks_partition_the_step(ranks, micro):
    step = order((20,), 8).step(3)
    shares = [micro_batches(step, rank, ranks, micro) for rank in range(ranks)]
    assert {len(batch) for share in shares for batch in share} == {micro}
    assert {len(share) for share in shares} == {8 // ranks // micro}
    together = list(chain.from_iterable(chain.from_iterable(shares)))
    assert together == list(zip(step.rows, step.visits, strict=True))


@pytest.mark.parametrize(("ranks", "micro"), [(3, 1), (2, 3), (1, 16)])
def test_uneven_split_is_refused(ranks, micro):
    with pytest.raises(ValueError, match=rf"global_batch_size = 8: must be a multiple of {ranks} data ranks"):
        micro_batches(order((20,), 8).step(0), 0, ranks, micro)
