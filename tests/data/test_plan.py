"""What the steps of a run hold, from several streams."""

import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from threading import Barrier

import numpy as np
import pytest

from mugv_ds.config.errors import ConfigError
from mugv_ds.data.budget import BatchSize
from mugv_ds.data.plan import Companion, Plan, Stream

SMALL, MIDDLE, LARGE = (1, 4, 4), (2, 4, 4), (3, 4, 4)
STEPS = 400


def shapes(*counts):
    """int [n, 3]: as many rows of each shape as `counts` says, mixed, and one row that cannot be read."""
    rows = np.array([shape for shape, n in zip((SMALL, MIDDLE, LARGE), counts, strict=True) for _ in range(n)])
    return np.concatenate([[(0, 0, 0)], np.random.default_rng(0).permutation(rows)])


STREAMS = (
    Stream("images", 0, shapes(37, 0, 0), {SMALL: BatchSize(16, 2)}, share=((0, 0.5), (STEPS, 0.1))),
    Stream("clips", 0, shapes(0, 11, 5), {MIDDLE: BatchSize(16, 2), LARGE: BatchSize(8, 1)}, share=((0, 0.3),)),
    Stream("pairs", 2, shapes(6, 9, 3), dict.fromkeys((SMALL, MIDDLE, LARGE), BatchSize(8, 1)), item_size=2),
)
COMPANION = Companion(1, shapes(5, 1, 12), ratio=0.5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_unit_once_per_visit_in_every_stream(ranks):
    """On all ranks together; what is left of a stream is less than a step of each of its shapes."""
    plan, seen, positions = Plan(STREAMS, 1), defaultdict(Counter), Counter()
    for position in range(STEPS):
        step = plan.step(position)
        shares = [step.micro_batches(rank, ranks) for rank in range(ranks)]
        seen[step.stream].update(chain.from_iterable(chain.from_iterable(shares)))
        positions[step.stream] += 1
    for stream in STREAMS:
        refs = seen[stream.name]
        assert set(refs.values()) == {1} and {ref.source for ref in refs} == {stream.source}
        assert positions[stream.name] > 40
        for shape in stream.sizes:
            items = set(np.flatnonzero((stream.shapes == shape).all(axis=1)).tolist())
            by_visit = defaultdict(set)
            for ref in refs:
                if tuple(stream.shapes[ref.item]) == shape:
                    by_visit[ref.visit].add(ref.item)
            assert sorted(by_visit) == list(range(len(by_visit))) and len(by_visit) > 1
            assert all(by_visit[visit] == items for visit in range(len(by_visit) - 1)), (stream.name, shape)
            assert by_visit[len(by_visit) - 1] <= items


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_step_in_micro_batches_of_one_size(ranks):
    plan = Plan(STREAMS, 1, COMPANION)
    for position in range(60):
        step = plan.step(position)
        shares = [step.micro_batches(rank, ranks) for rank in range(ranks)]
        streamed, companions = step.counts(ranks)
        assert {len(share) for share in shares} == {streamed + companions}
        assert streamed * step.micro * ranks == step.item_size * len(step.refs)
        assert companions * step.micro * ranks == len(step.companions)
        for refs, part in ((step.refs, slice(0, streamed)), (step.companions, slice(streamed, None))):
            item = step.item_size if refs is step.refs else 1
            assert {len(batch) * item for share in shares for batch in share[part]} == {step.micro}
            assert tuple(chain.from_iterable(batch for share in shares for batch in share[part])) == refs
        assert step.samples == step.item_size * len(step.refs) + len(step.companions)


def test_companions_have_the_step_s_shape_and_follow_from_its_position():
    plan = Plan(STREAMS, 1, COMPANION)
    steps = [plan.step(position) for position in range(STEPS)]
    for step in steps:
        assert len(step.companions) == step.item_size * len(step.refs) // 2
        assert {ref.source for ref in step.companions} == {1}
        assert {tuple(COMPANION.shapes[ref.item]) for ref in step.companions} == {step.shape}
        assert {ref.visit for ref in step.companions} == {step.position}, "so no noise is drawn twice over steps"
    other = Plan(STREAMS, 1, COMPANION)
    assert [other.step(position) for position in reversed(range(STEPS))] == steps[::-1]
    drawn = Counter(ref.item for step in steps if step.shape == LARGE for ref in step.companions)
    assert len(drawn) == 12 and max(drawn.values()) < 3 * min(drawn.values())
    again = [Plan(STREAMS, 2, COMPANION).step(position).companions for position in range(20)]
    assert again != [step.companions for step in steps[:20]]


def test_what_comes_along_does_not_change_what_is_played():
    alone, together = Plan(STREAMS, 1), Plan(STREAMS, 1, COMPANION)
    assert [alone.step(i).refs for i in range(50)] == [together.step(i).refs for i in range(50)]
    assert alone.step(0).companions == ()


def test_a_step_has_at_least_one_companion():
    assert [Companion(1, COMPANION.shapes, 0.01).count(samples) for samples in (8, 300)] == [1, 3]


def test_a_stream_without_units_is_an_error():
    empty = Stream("clips", 0, np.zeros((4, 3), np.int32), {})
    with pytest.raises(ConfigError, match="clips: nothing of it can be read"):
        Plan([STREAMS[0], empty], 0)


def test_companions_of_every_shape_are_needed():
    with pytest.raises(ConfigError, match="no SFT sample has latents of 2×4×4"):
        Plan(STREAMS, 0, Companion(1, shapes(5, 0, 12), 0.5))
    Plan(STREAMS[:1], 0, Companion(1, shapes(5, 0, 12), 0.5))


def test_shares_that_vanish_together_are_an_error():
    never = Stream("images", 0, shapes(3, 0, 0), {SMALL: BatchSize(1, 1)}, share=((0, 0.0),))
    with pytest.raises(ConfigError, match="every group's share is 0"):
        Plan([never], 0)


def test_weights_of_streams_and_companions():
    """Companions are drawn as often as their weights say; the plan's identity changes with any of them."""
    random = np.random.default_rng(0)
    weighted = [replace(stream, weights=random.uniform(0.5, 2, len(stream.shapes))) for stream in STREAMS]
    chance = random.uniform(0.2, 5, len(COMPANION.shapes))
    plan = Plan(weighted, 1, replace(COMPANION, weights=chance))
    steps = [plan.step(position) for position in range(2000)]
    assert [Plan(weighted, 1, replace(COMPANION, weights=chance)).step(i) for i in (1999, 7)] == [steps[1999], steps[7]]
    for shape in {step.shape for step in steps}:
        items = np.flatnonzero((COMPANION.shapes == shape).all(axis=1))
        drawn = Counter(ref.item for step in steps if step.shape == shape for ref in step.companions)
        due = chance[items] / chance[items].sum() * drawn.total()
        assert (np.abs(np.array([drawn[item] for item in items.tolist()]) - due) < 6 * np.sqrt(due) + 1).all()
    plain = Plan(STREAMS, 1, COMPANION).identity()
    others = [
        Plan(weighted, 1, COMPANION).identity(),
        Plan(STREAMS, 1, replace(COMPANION, weights=chance)).identity(),
        Plan(weighted, 1, replace(COMPANION, weights=chance)).identity(),
    ]
    assert "the rows' weights" not in plain and all(other | plain == other for other in others)
    assert len({other["the rows' weights"] for other in others}) == 3


def played(plan, at_once):
    at_once.wait()
    return [plan.step(position) for position in range(STEPS)]


def test_threads_may_share_a_plan():
    """The loader's plans ahead of the loop that it reads for."""
    expected = [Plan(STREAMS, 1, COMPANION).step(position) for position in range(STEPS)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(3):
            plan, at_once = Plan(STREAMS, 1, COMPANION), Barrier(3)
            with ThreadPoolExecutor(3) as threads:
                for steps in threads.map(lambda _, plan=plan, at_once=at_once: played(plan, at_once), range(3)):
                    assert steps == expected
    finally:
        sys.setswitchinterval(interval)
