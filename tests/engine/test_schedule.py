"""The learning-rate schedule against its closed form."""

import math

import pytest

from mugv_ds.config.schema import ScheduleSection
from mugv_ds.engine.schedule import rate_factor


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_warm_up_rises_linearly_to_the_peak(kind):
    section = ScheduleSection(kind=kind, warmup_steps=4, steps=20)
    assert [rate_factor(section, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate_factor(section, 4) == 1.0


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_decay_ends_at_the_final_ratio(final):
    cosine = ScheduleSection(kind="cosine", warmup_steps=10, steps=110, final_lr_ratio=final)
    linear = ScheduleSection(kind="linear", warmup_steps=10, steps=110, final_lr_ratio=final)
    for section in (cosine, linear):
        assert rate_factor(section, 110) == rate_factor(section, 500) == pytest.approx(final)
        assert rate_factor(section, 60) == pytest.approx((1 + final) / 2)
    assert rate_factor(linear, 35) == pytest.approx(final + (1 - final) * 0.75)
    assert rate_factor(cosine, 35) == pytest.approx(final + (1 - final) * (1 + math.cos(math.pi / 4)) / 2)


def test_constant_stays():
    section = ScheduleSection(kind="constant", warmup_steps=0, steps=5)
    assert {rate_factor(section, step) for step in range(20)} == {1.0}
