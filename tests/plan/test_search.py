"""The search: what is legal, what is fastest, what fits, and what it says where nothing does."""

import time

import pytest

from mugv_ds.config import load_config
from mugv_ds.config.errors import InputError
from mugv_ds.parallel.layout import Layout
from mugv_ds.plan.memory import GIB, MARGIN, usable_bytes
from mugv_ds.plan.search import LEVELS, Limits, Planner, gpus_around, layouts, why_slower
from mugv_ds.plan.steps import given_kinds
from mugv_ds.plan.timing import Timing
from tests.helpers.machine import ideal_machine

SHAPES = [(15, 90, 160), (6, 45, 80)]


def planner(*settings, config="ds_configs/stage3.json", shapes=SHAPES, memory_gib=140.0, host_gib=128.0):
    config = load_config(config, settings)
    timing = Timing(ideal_machine())
    limits = Limits(memory_gib * GIB, host_gib * GIB)
    return Planner(config, given_kinds(config, shapes), timing, limits)


def test_layouts_are_all_that_divide():
    """By trying every triple."""
    found = {(layout.data, layout.sequence, layout.pipeline) for layout in layouts(heads=6, depth=3, gpus=12)}
    assert found == {
        (data, sequence, pipeline)
        for data in range(1, 13)
        for sequence in (1, 2, 3, 6)
        for pipeline in (1, 2, 3)
        if data * sequence * pipeline == 12
    }


def test_every_level_of_every_layout_is_looked_at_and_the_best_is_the_fastest_that_fits():
    search = planner().search(8)
    legal = len(list(layouts(48, 56, 8)))
    mixed = [way for way in search.ways if way.asked_level == "auto"]
    assert len(search.ways) - len(mixed) == legal * len(LEVELS)
    assert 0 < len(mixed) <= legal
    assert [way.seconds for way in search.ways] == sorted(way.seconds for way in search.ways)
    for way in search.ways:
        assert way.does_fit == (
            way.memory.peak <= usable_bytes(140 * GIB, 8) and way.memory.host * (1 + MARGIN) <= 128 * GIB
        )
        assert sum(way.terms.values()) == pytest.approx(way.seconds)
    assert search.best.does_fit
    assert search.best.seconds <= 1.002 * min(way.seconds for way in search.ways if way.does_fit)
    assert any(not way.does_fit and way.seconds < search.best.seconds for way in search.ways)


def test_a_step_holds_the_same_samples_on_every_layout():
    plan = planner()
    samples = {(b.shape, b.samples) for gpus in (4, 16) for way in plan.search(gpus).ways for b in way.buckets}
    assert len(samples) == len(SHAPES)


def test_the_settings_are_those_that_the_run_would_take():
    """What `set` names makes the config itself what was planned: the same micro-batches, time and memory."""
    plan = planner()
    best = plan.search(16).best
    again = planner(*best.settings(plan.config))
    as_set = again.as_set(16)
    assert [(b.micro, b.accumulation) for b in as_set.buckets] == [(b.micro, b.accumulation) for b in best.buckets]
    assert as_set.seconds == pytest.approx(best.seconds)
    assert as_set.memory == best.memory
    assert not as_set.settings(again.config)


def test_less_memory_takes_a_level_that_keeps_less_and_the_gpu_hours_follow():
    wide, narrow = (planner(memory_gib=gib) for gib in (140, 60))
    rich, poor = wide.search(8).best, narrow.search(8).best
    assert rich.seconds < poor.seconds
    assert poor.memory.peak <= usable_bytes(60 * GIB, 8)
    figures = narrow.figures(poor, price=2.0)
    assert figures.gpu_hours == pytest.approx(100_000 * poor.seconds * 8 / 3600)
    assert figures.days == pytest.approx(figures.gpu_hours / 8 / 24)
    assert figures.money == pytest.approx(2 * figures.gpu_hours)
    assert figures.mfu == pytest.approx(wide.figures(rich).mfu * rich.seconds / poor.seconds)
    assert "attention" not in why_slower(poor, rich).split(":")[0]


def test_without_host_memory_nothing_is_offloaded():
    """With samples of one step in host memory, which take little of it."""
    one = {"config": "ds_configs/h200x4_54k.json", "shapes": [(15, 90, 160)], "memory_gib": 100}
    assert {way.setup.offload for way in planner(**one).search(4).fitting} == {"none", "attention_output", "all"}
    assert {way.setup.offload for way in planner(**one, host_gib=3.5).search(4).fitting} == {"none"}


def test_what_would_fit_is_named_where_nothing_does():
    plan = planner(memory_gib=30)
    search = plan.search(4)
    assert search.best is None
    least, *more = plan.what_would_fit(search)
    assert least.startswith("the least that 4 GPUs can do with is ")
    (line,) = [line for line in more if "GPUs: " in line] or more
    gpus = int(line.split(" ")[0])
    assert plan.search(gpus).best is not None
    assert plan.search(gpus // 2).best is None


def test_fewer_averages_or_bf16_gradients_are_named_where_only_they_fit():
    shapes = [(1, 45, 80)]
    least = min(way.memory.peak for way in planner(memory_gib=1, shapes=shapes).search(4).ways) / GIB
    beside = -usable_bytes(0, 4) / GIB  # of CUDA and NCCL
    search = planner(memory_gib=(least - 2 + beside) * (1 + MARGIN), shapes=shapes, host_gib=1000.0).search(4)
    assert search.best is None
    assert set(search.others) == {"gradients accumulated in bf16", "no averages of the weights"}
    assert all(way.does_fit for way in search.others.values())


def test_layouts_that_cannot_split_a_step_are_counted():
    refused = planner().search(256).refused
    assert sum(refused.values()) > 0
    assert all(why.startswith("data.budget.multiple") for why in refused)
    plan = planner(config="ds_configs/h200x4_54k.json")
    assert {way.setup.layout.data for way in plan.search(4).ways} == {1}, "a step of one sample has one data rank"


def test_the_levels_are_those_that_the_attention_can_run():
    search = planner('model.attention="flash4_padded"', "parallel.activation_checkpointing=full").search(4)
    assert {level for way in search.ways for level in way.setup.levels} == {"off", "light", "selective", "full"}


def test_the_ways_of_a_config_as_it_is():
    way = planner("parallel.data=2", "parallel.sequence=4").as_set(8)
    assert way.setup.layout == Layout(2, 4, 1)
    with pytest.raises(InputError, match="start 8"):
        planner("parallel.data=2", "parallel.sequence=4").as_set(16)


def test_only_bf16_is_planned():
    with pytest.raises(InputError, match="only bf16 is planned"):
        planner("model.precision=fp32")


@pytest.mark.long
def test_a_thousand_gpus_and_35_shapes_take_seconds():
    """The bound is 10 s; a tenth of it is usual."""
    sizes = [(45, 80), (52, 69), (60, 60), (69, 52), (80, 45), (90, 160), (160, 90)]
    plan = planner("data.global_batch_size=1024", shapes=[(t, *size) for t in (1, 6, 9, 12, 15) for size in sizes])
    begin = time.process_time()
    assert plan.search(1024).best is not None
    assert time.process_time() - begin < 10


def test_gpus_that_throughput_is_shown_for():
    assert gpus_around(64) == [8, 16, 32, 64, 128]
    assert gpus_around(6) == [3, 6, 12]
    assert gpus_around(1) == [1, 2]
