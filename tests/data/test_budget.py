"""How many samples of each shape a step and a device hold."""

import math

import pytest

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import BudgetSection, DataSection
from mugv_ds.data.budget import BatchSize, Workload, batch_sizes

LARGEST = (15, 90, 160)
SHAPES = [(1, 45, 80), (6, 45, 80), (9, 60, 60), (15, 45, 80), (6, 90, 160), LARGEST]


def tokens(shape):
    return math.prod(shape) // 4 + 2


def flops(shape):
    return tokens(shape) * (24_000 + tokens(shape))


def load(data_ranks=4, sequence=1):
    return Workload(lambda shape: -(-tokens(shape) // sequence), flops, data_ranks)


def section(step=32, micro=1, **budget):
    return DataSection(
        manifest="train.csv",
        global_batch_size=step,
        micro_batch_size=micro,
        budget=BudgetSection(**{"shape": LARGEST, "multiple": 8, "device_tokens": tokens(LARGEST)} | budget)
        if budget
        else None,
    )


@pytest.mark.parametrize(("step", "multiple", "item_size"), [(32, 8, 1), (40, 8, 1), (64, 16, 2), (7, 4, 1)])
def test_steps_cost_the_same_up_to_half_a_multiple_or_3_percent(step, multiple, item_size):
    sizes = batch_sizes(SHAPES, section(step, 64, multiple=multiple, device_tokens=10**6), load(), item_size=item_size)
    budget = step // item_size * flops(LARGEST)
    for shape, size in sizes.items():
        assert size.step % multiple == 0
        assert abs(size.step * flops(shape) - budget) <= max(multiple / 2 * flops(shape), 0.03 * budget), shape
    assert list(sizes) == SHAPES and len({size.step for size in sizes.values()}) > 3


def test_a_step_never_holds_less_than_one_multiple():
    sizes = batch_sizes([LARGEST], section(2, multiple=16, device_tokens=10**6), load())
    assert sizes == {LARGEST: BatchSize(16, 1)}


@pytest.mark.parametrize("item_size", [1, 2])
@pytest.mark.parametrize("most", [2, 12, 1000])
def test_a_micro_batch_is_the_largest_that_fits_and_divides(most, item_size):
    ranks, limit = 4, 2 * tokens(LARGEST)
    sizes = batch_sizes(SHAPES, section(32, most, multiple=8, device_tokens=limit), load(ranks), item_size=item_size)
    assert len(sizes) == len(SHAPES)
    for shape, size in sizes.items():

        def fits(micro, shape=shape, step=size.step):
            return (
                micro * item_size <= most and micro * item_size * tokens(shape) <= limit and step % (ranks * micro) == 0
            )

        assert fits(size.micro) and not any(fits(micro) for micro in range(size.micro + 1, size.step + 1)), shape


def test_steps_of_many_samples_split_well():
    """1,500 samples of an odd number of tokens, or a few more or less: a device that holds 64 gets nearly as many."""
    for step in range(1490, 1510):
        data = section(step, 64, shape=(1, 45, 80), multiple=1, device_tokens=64 * tokens((1, 45, 80)))
        size = batch_sizes([(1, 45, 80)], data, load(1))[(1, 45, 80)]
        assert size.micro >= 32 and abs(size.step / step - 1) <= 0.03, step


def test_steps_do_not_depend_on_the_layout():
    data = section(32, 16, multiple=8, device_tokens=tokens(LARGEST))
    layouts = [load(ranks, sequence) for ranks in (1, 2, 4, 8) for sequence in (1, 4)]
    steps = [{shape: size.step for shape, size in batch_sizes(SHAPES, data, layout).items()} for layout in layouts]
    assert all(step == steps[0] for step in steps)
    # More sequence ranks hold more at once.
    assert (
        batch_sizes(SHAPES, data, load(1, 4))[(6, 45, 80)].micro > batch_sizes(SHAPES, data, load(1))[(6, 45, 80)].micro
    )


def test_without_a_budget_all_steps_are_alike():
    assert batch_sizes(SHAPES, section(32, 4), load(4)) == dict.fromkeys(SHAPES, BatchSize(32, 4))
    assert batch_sizes(SHAPES, section(32, 4), load(4), item_size=2) == dict.fromkeys(SHAPES, BatchSize(16, 2))


def test_companions_are_split_into_micro_batches_of_the_same_size():
    def companions(samples):
        return round(0.75 * samples)

    sizes = batch_sizes(SHAPES, section(32, 8), load(2), item_size=2, companions=companions)
    assert sizes == dict.fromkeys(SHAPES, BatchSize(16, 2)), "24 companions: 12 a rank, by 4 but not by 8"


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (section(multiple=6), {}, r"data\.budget\.multiple = 6: must be a multiple of the 4 data ranks"),
        (
            section(device_tokens=10_000),
            {},
            r"data\.budget\.device_tokens = 10000: latents of 15×45×80 take 13,502 tokens a device; raise it",
        ),
        (section(micro=2, device_tokens=15_000), {"item_size": 2}, r"latents of 9×60×60 take 16,204 tokens"),
        (section(30), {}, r"data\.global_batch_size = 30: must be a multiple of 4 data ranks × .*micro_batch_size 1"),
        (section(32, 16), {}, r"must be a multiple of 4 data ranks × data\.micro_batch_size 16"),
        (section(32, 1), {"item_size": 2}, r"data\.micro_batch_size = 1, .*multiples of 2, as pairs stay together"),
        (section(33, 2), {"item_size": 2}, r"data\.global_batch_size = 33: must be multiples of 2"),
        (
            section(32, 2),
            {"item_size": 2, "companions": lambda samples: 3 * samples // 8},
            r"reward\.data_ratio: gives 12 SFT samples beside 32, which 4 data ranks .* multiples of 2 cannot share",
        ),
    ],
    ids=["multiple", "tokens", "tokens of a pair", "step", "micro", "odd micro", "odd step", "companions"],
)
def test_what_cannot_be_split_is_refused(data, options, message):
    with pytest.raises(ConfigError, match=message):
        batch_sizes(SHAPES[:4], data, load(4), **options)
