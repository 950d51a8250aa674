from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest

from mugv_ds.data.buckets import Buckets, Order, group_by_shape, sort_by_shape
from mugv_ds.data.noise import generator

SHAPES = [(1, 45, 80), (6, 45, 80), (15, 90, 160)]
EPOCHS = 40
PINNED = (1, (6, 45, 80), (15, 7, 2, 1), (1, 1, 1, 1))
GRID = [
    # rows per bucket, global batch size of each, seed
    ((8,), (4,), 0),
    ((7, 9), (4, 4), 1),
    ((1,), (4,), 2),
    ((1, 3, 50), (8, 8, 8), 3),
    ((5, 2, 13), (1, 1, 1), 4),
    ((2, 3), (64, 64), 5),
    ((40, 7, 3), (24, 4, 1), 6),
    ((3, 50, 9), (64, 1, 8), 7),
]


def mixed(sizes):
    """int32 [n, 3]: as many rows of each shape as `sizes` says, the shapes mixed."""
    shapes = np.array([SHAPES[b] for b, n in enumerate(sizes) for _ in range(n)], dtype=np.int32)
    return shapes[np.argsort(np.arange(len(shapes)) * 7 % 11, kind="stable")]


def order(sizes, batches, seed=0):
    return Order(mixed(sizes), dict(zip(SHAPES, batches, strict=False)), seed)


def steps_of(o, epochs):
    """All steps of the first epochs."""
    steps = []
    while (step := o.step(len(steps))).epoch < epochs:
        steps.append(step)
    return steps


def assert_every_row_once_per_visit(o, shapes, batches, epochs):
    """Also that nothing is lost to rounding: what is still to come fills less than a step of the bucket."""
    steps = steps_of(o, epochs)
    seen = Counter(chain.from_iterable(zip(s.rows, s.visits, strict=True) for s in steps))
    assert set(seen.values()) == {1}
    for shape, rows in zip(*group_by_shape(shapes), strict=True):
        played = epochs * len(rows) // batches[shape] * batches[shape]
        per_visit = Counter(visit for row, visit in seen if tuple(shapes[row]) == shape)
        full, rest = divmod(played, len(rows))
        assert per_visit == Counter({v: n for v, n in enumerate([len(rows)] * full + [rest]) if n}), shape
    assert {row for row, _ in seen} <= set(np.flatnonzero(shapes.any(axis=1)).tolist())


@pytest.mark.parametrize(("sizes", "batches", "seed"), GRID)
def test_every_row_once_per_visit(sizes, batches, seed):
    assert_every_row_once_per_visit(
        order(sizes, batches, seed), mixed(sizes), dict(zip(SHAPES, batches, strict=False)), EPOCHS
    )


@pytest.mark.parametrize("seed", range(8))
def test_every_row_once_per_visit_of_random_sets(seed):
    """Random shapes, some unreadable rows, and a batch size of its own for each shape."""
    random = np.random.default_rng(seed)
    shapes = random.integers(0, 3, size=(random.integers(20, 120), 3), dtype=np.int32)
    shapes[~shapes.all(axis=1)] = 0
    batches = {shape: int(random.integers(1, 40)) for shape in group_by_shape(shapes)[0]}
    assert_every_row_once_per_visit(Order(shapes, batches, seed), shapes, batches, 12)


@pytest.mark.parametrize(("sizes", "batches", "seed"), GRID)
def test_steps_have_one_shape_and_full_size_and_epochs_follow_each_other(sizes, batches, seed):
    shapes, o, of = mixed(sizes), order(sizes, batches, seed), dict(zip(SHAPES, batches, strict=False))
    steps = [o.step(i) for i in range(60)]
    assert [s.index for s in steps] == list(range(60))
    for s in steps:
        assert len(s.rows) == len(s.visits) == of[s.shape]
        assert {tuple(shapes[row]) for row in s.rows} == {s.shape}
    assert all(a.epoch <= b.epoch for a, b in pairwise(steps))
    for epoch in {s.epoch for s in steps[:-1]} - {steps[-1].epoch}:
        expected = sum((epoch + 1) * n // batch - epoch * n // batch for n, batch in zip(sizes, batches, strict=True))
        assert sum(s.epoch == epoch for s in steps) == expected


def test_the_mean_step_is_that_of_an_epoch():
    o = order((40, 24), (8, 3))
    assert o.samples_per_step == np.mean([len(s.rows) for s in steps_of(o, 1)]) == 64 / 13


def test_any_order_of_lookups_gives_the_same_steps():
    forward = [order((7, 9, 2), (4, 8, 1)).step(i) for i in range(30)]
    one = order((7, 9, 2), (4, 8, 1))
    assert [one.step(i) for i in reversed(range(30))] == forward[::-1]


def test_seed_and_epoch_change_the_order():
    a, b = order((64,), (4,), 0), order((64,), (4,), 1)
    rows = [[o.step(i).rows for i in range(16)] for o in (a, b)]
    assert rows[0] != rows[1]
    assert [a.step(16 + i).rows for i in range(16)] != rows[0]
    assert sorted(chain(*rows[0])) == sorted(chain(*rows[1])) == list(range(64))


def test_buckets_are_mixed_within_an_epoch():
    shapes = [order((40, 40), (4, 4)).step(i).shape for i in range(20)]
    assert sum(a != b for a, b in pairwise(shapes)) > 3


def test_order_is_pinned():
    """A change here, as by a new release of numpy, changes what resumed runs read."""
    step = order((7, 9), (4, 4), 6309).step(5)
    assert (step.epoch, step.shape, step.rows, step.visits) == PINNED


def test_unreadable_rows_are_left_out():
    shapes = np.array([SHAPES[0], (0, 0, 0), SHAPES[0]], dtype=np.int32)
    assert {row for i in range(6) for row in Order(shapes, {SHAPES[0]: 2}, 0).step(i).rows} == {0, 2}
    with pytest.raises(ValueError, match="no row"):
        Order(np.zeros((3, 3), np.int32), {}, 0)


@pytest.mark.parametrize(("sizes", "batches", "seed"), GRID)
def test_steps_are_those_of_the_definition(sizes, batches, seed):
    """Each step is cut from the whole stream of its bucket, in the order that the head of the module defines."""
    shapes, by_shape = mixed(sizes), dict(zip(SHAPES, batches, strict=False))
    streams, played = {}, Counter()
    for shape, rows in zip(*group_by_shape(shapes), strict=True):
        permuted = (generator("visit", seed, *shape, visit).permutation(rows) for visit in range(EPOCHS))
        streams[shape] = [(row, visit) for visit, part in enumerate(permuted) for row in part.tolist()]
    for epoch in range(EPOCHS):
        playlist = [
            (shape, k)
            for shape in sorted(streams)
            for k in range(*(e * (len(streams[shape]) // EPOCHS) // by_shape[shape] for e in (epoch, epoch + 1)))
        ]
        order_of_epoch = generator("epoch", seed, epoch).permutation(np.arange(len(playlist)))
        played[epoch] = [playlist[i] for i in order_of_epoch]
    expected = [
        tuple(streams[shape][k * by_shape[shape] : (k + 1) * by_shape[shape]])
        for epoch in range(EPOCHS)
        for shape, k in played[epoch]
    ]
    o = order(sizes, batches, seed)
    for i in np.random.default_rng(0).permutation(len(expected))[:200].tolist() + list(range(min(len(expected), 300))):
        step = o.step(i)
        assert tuple(zip(step.rows, step.visits, strict=True)) == expected[i]


def test_rows_of_shape():
    shapes = np.array([SHAPES[1], (0, 0, 0), SHAPES[0], SHAPES[1]], dtype=np.int32)
    buckets = Buckets(shapes, sort_by_shape(shapes))
    assert list(buckets.by_shape) == SHAPES[:2]
    assert [buckets.rows_of_shape(shape).tolist() for shape in SHAPES] == [[2], [0, 3], []]
    assert {buckets.rows_of_shape(shape).dtype for shape in SHAPES} == {np.dtype(np.int32)}
    assert buckets.rows_of_shape((0, 0, 0)).tolist() == []


def test_order_of_given_buckets_is_that_of_their_shapes():
    shapes, batch = mixed((7, 9)), dict(zip(SHAPES, (4, 4), strict=False))
    one, other = Order(shapes, batch, 0), Order(Buckets(shapes, sort_by_shape(shapes)), batch, 0)
    assert [one.step(i) for i in range(30)] == [other.step(i) for i in range(30)]


def test_one_permutation_of_each_row_is_made_for_an_epoch_and_kept(monkeypatch):
    """While a loader reads ahead into the next epoch there are two; then the older is given up, and not made again."""
    o, made = order((70, 90), (4, 4)), []
    permute = o._permute
    monkeypatch.setattr(o, "_permute", lambda bucket, visit: made.append((bucket, visit)) or permute(bucket, visit))
    per_epoch = (70 + 90) // 4
    for i in range(3 * per_epoch):
        o.step(i + 3)  # read ahead
        o.step(i)
        held = sum(len(rows) for permuted in o._permuted.values() for rows in permuted.values())
        assert held <= (160 if 10 < i % per_epoch < per_epoch - 4 else 320)
    assert made == sorted(set(made), key=made.index), "none is made twice"
    assert {visit for _, visit in made} <= {0, 1, 2, 3}


def weighted(sizes, batches, weights, seed=0):
    shapes = mixed(sizes)
    return shapes, Order(shapes, dict(zip(SHAPES, batches, strict=False)), seed, weights)


def drawn_weights(sizes, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 5, sum(sizes))


@pytest.mark.parametrize(
    ("sizes", "batches", "seed"), [((40, 30, 8), (4, 4, 2), 0), ((3, 200), (8, 16), 5), ((9,), (1,), 1)]
)
def test_rows_are_played_in_proportion_to_their_weights(sizes, batches, seed):
    """To a few times over any number of epochs, not by chance; and never twice under one visit number."""
    weights = drawn_weights(sizes, seed)
    shapes, o = weighted(sizes, batches, weights, seed)
    epochs = 60
    steps = steps_of(o, epochs)
    seen = Counter(chain.from_iterable(zip(s.rows, s.visits, strict=True) for s in steps))
    assert set(seen.values()) == {1}
    played = Counter(row for row, _ in seen)
    for shape, rows in zip(*group_by_shape(shapes), strict=True):
        due = epochs * o.per_epoch[shape] * weights[rows] / weights[rows].sum()
        batch = dict(zip(SHAPES, batches, strict=False))[shape]
        assert (
            np.abs([played[row] for row in rows.tolist()] - due).max()
            < 3 + batch * weights[rows].max() / weights[rows].sum() + 1
        )
    total = sum(o.per_epoch.values())
    assert abs(total - sum(sizes)) <= len(sizes), "an epoch is as long as without weights"
    share = np.array([weights[rows].sum() for rows in group_by_shape(shapes)[1]]) / weights.sum()
    assert np.abs(np.array(list(o.per_epoch.values())) - share * sum(sizes)).max() <= 1


def test_within_a_visit_a_row_comes_as_often_as_its_weight_rounded_down_or_up():
    weights = np.array([0.25, 0.5, 1.0, 2.5, 5.0, 0.75])
    _, o = weighted((6,), (1,), weights)
    steps = steps_of(o, 80)
    assert o.per_epoch == {SHAPES[0]: 6}
    for epoch in range(80):
        counts = Counter(row for s in steps if s.epoch == epoch for row in s.rows)
        due = weights * 6 / weights.sum()
        assert all(np.floor(x) <= counts[row] <= np.ceil(x) for row, x in enumerate(due)), epoch


def test_weights_change_nothing_else():
    """Any order of lookups gives the same steps, steps are whole, and weights that are alike play as often."""
    sizes, batches = (7, 90, 12), (4, 8, 1)
    weights = drawn_weights(sizes)
    shapes, one = weighted(sizes, batches, weights)
    forward = [one.step(i) for i in range(80)]
    _, other = weighted(sizes, batches, weights)
    assert [other.step(i) for i in reversed(range(80))] == forward[::-1]
    for s in forward:
        assert len(s.rows) == dict(zip(SHAPES, batches, strict=True))[s.shape] and {
            tuple(shapes[r]) for r in s.rows
        } == {s.shape}
    assert [weighted(sizes, batches, 3 * weights)[1].step(i).rows for i in range(20)] == [s.rows for s in forward[:20]]
    assert [weighted(sizes, batches, weights, 1)[1].step(i).rows for i in range(20)] != [s.rows for s in forward[:20]]
    alike = steps_of(weighted(sizes, batches, np.ones(109))[1], 12)
    assert max(Counter(chain.from_iterable(s.rows for s in alike)).values()) <= 13
