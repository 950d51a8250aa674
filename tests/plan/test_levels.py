"""The level that "auto" gives each block: all that fits is kept, and no two levels would be faster."""

from dataclasses import replace
from itertools import product

import pytest

from mugv_ds.config import load_config
from mugv_ds.config.errors import ConfigError
from mugv_ds.models.kept_attention import ON_CPU
from mugv_ds.parallel.layout import Layout
from mugv_ds.plan.cost import Setup, level_name, step_time
from mugv_ds.plan.levels import choose_levels, fill_device, usable_levels, with_levels
from mugv_ds.plan.memory import GIB, KEPT, usable_bytes
from mugv_ds.plan.steps import Bucket, given_kinds
from mugv_ds.plan.timing import Timing
from tests.helpers.machine import ideal_machine

SHAPE = (15, 90, 160)


def case(depth=56, layout=(1, 4, 1), settings=()) -> tuple[Setup, list[Bucket]]:
    config = load_config("ds_configs/h200x4_54k.json", [f"model.depth={depth}", *settings])
    setup = Setup.of(config, Layout(*layout), SHAPE)
    (kind,) = given_kinds(config, [SHAPE])
    accumulation = layout[2]
    bucket = Bucket("train", kind.shape, 0, 54_002, accumulation, 1, accumulation)
    return setup, [bucket]


@pytest.fixture(scope="module")
def timing():
    return Timing(ideal_machine())


def chosen(setup, buckets, gib, timing, levels=tuple(KEPT)):
    return replace(setup, levels=choose_levels(setup, buckets, levels, gib * GIB, timing))


@pytest.mark.parametrize("gib", [60, 75, 90, 105, 120, 133.8, 150, 170])
def test_a_device_is_filled(timing, gib):
    setup, buckets = case()
    found = chosen(setup, buckets, gib, timing)
    peak = found.largest_memory(buckets).peak
    runs = found.runs(found.stages[0])
    if gib == 60:
        assert found.levels == ("full",) * 56, "nothing fits: what takes the least"
        return
    assert peak <= gib * GIB
    assert len(runs) <= 2
    if gib == 170:
        assert found.levels == ("off",) * 56
    elif len(runs) == 2:
        (less, few), (more, many) = runs
        assert KEPT[less] < KEPT[more]
        assert setup.memory(setup.stages[0], buckets, ((less, few - 1), (more, many + 1))).peak > gib * GIB


@pytest.mark.parametrize("gib", [9.2, 10, 12, 13, 13.5, 14, 15])
def test_nothing_that_fits_is_faster(timing, gib):
    """Against every level of every block of a small model."""
    setup, buckets = case(depth=4)

    def seconds(levels):
        return step_time(replace(setup, levels=levels), buckets[0], timing).total

    def fits(levels):
        return replace(setup, levels=levels).largest_memory(buckets).peak <= gib * GIB

    best = min((levels for levels in product(KEPT, repeat=4) if fits(levels)), key=seconds)
    found = chosen(setup, buckets, gib, timing)
    assert fits(found.levels)
    two = min((levels for levels in product(KEPT, repeat=4) if fits(levels) and len(set(levels)) < 3), key=seconds)
    assert seconds(found.levels) == pytest.approx(seconds(two), rel=1e-6)
    assert seconds(found.levels) <= 1.02 * seconds(best), (
        "a third level can use what is left over for less than a block"
    )


def test_a_stage_with_more_in_flight_keeps_less(timing):
    setup, buckets = case(layout=(1, 2, 2))
    found = chosen(setup, buckets, 100, timing)
    first, last = (sum(count * KEPT[level] for level, count in found.runs(stage)) for stage in found.stages)
    assert first < last
    for stage in found.stages:
        assert found.memory(stage, buckets).peak <= 100 * GIB


def test_without_a_calibration_the_products_that_run_again_decide():
    setup, buckets = case()
    found = chosen(setup, buckets, 120, None)
    assert set(found.levels) == {"attention", "light"}
    assert found.largest_memory(buckets).peak <= 120 * GIB


def test_attention_is_left_out_where_its_backend_gives_no_statistics():
    config = load_config("ds_configs/h200x4_54k.json", ['model.attention="flash4_padded"'])
    assert set(usable_levels(config)) == {"off", "light", "selective", "full"}
    named = load_config("ds_configs/h200x4_54k.json", ['model.attention="sdpa"'])
    assert "attention" not in usable_levels(named) and "attention" in usable_levels(named, tuple(ON_CPU))


def test_the_bound_is_the_users_or_what_is_left_of_the_device(timing):
    setup, buckets = case()
    config = load_config("ds_configs/h200x4_54k.json")
    total = 139.8 * GIB
    assert fill_device(config, setup, buckets, None, timing) == ("off",) * 56
    assert fill_device(config, setup, buckets, total, timing) == choose_levels(
        setup, buckets, usable_levels(config), usable_bytes(total, 4), timing
    )
    own = load_config("ds_configs/h200x4_54k.json", ["parallel.memory_gib=100"])
    assert fill_device(own, setup, buckets, total, timing) == chosen(setup, buckets, 100, timing).levels


def test_the_config_of_the_run_has_what_was_chosen():
    config = load_config("ds_configs/h200x4_54k.json", ["parallel.memory_gib=100"])
    levels = ("attention",) * 3 + ("light",) * 53
    run = with_levels(config, levels)
    assert run.parallel.levels(56) == levels and level_name(levels) == "3 attention + 53 light"
    assert run.parallel.memory_gib is None
    assert with_levels(config, ("off",) * 56).parallel.activation_checkpointing == "off"
    assert type(config).model_validate_json(run.model_dump_json(exclude_unset=True)) == run


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (['parallel.activation_checkpointing=["off","light"]'], "2 levels for the 56 blocks"),
        (["parallel.activation_checkpointing=[]"], "parallel.activation_checkpointing"),
        (['parallel.activation_checkpointing=["some"]'], "parallel.activation_checkpointing"),
        (["parallel.activation_checkpointing=off", "parallel.memory_gib=3"], "parallel.memory_gib"),
        (["model.precision=fp32"], "the memory of bf16 alone is predicted"),
        (["parallel.offload=all"], "parallel.offload"),
    ],
)
def test_what_cannot_be_is_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config("ds_configs/h200x4_54k.json", settings)
