"""Monitors change no bit of a run, and raise an alarm when activations go astray."""

from functools import partial

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults import inject
from tests.faults.conftest import configure, equal
from tests.faults.runs import Done, run

WATCHED = ("monitor.every=5", "schedule.steps=20", "checkpoint.save_every=0")


def test_a_monitored_run_is_bitwise_the_one_without(tmp_path, manifest, reference):
    done = run(configure(tmp_path, manifest), 2, "monitor.every=1")
    assert done.codes == [0, 0], done.output
    assert equal(done, reference)
    assert not done.incidents("alarm")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("monitor/")}
    assert {"monitor/mean_share/block_00", "monitor/gradient_norm/attention"} <= tags
    assert [event.step for event in events.Scalars("monitor/logit/block_01")] == list(range(1, 11))


def watched(folder, manifest, *overrides: str, fault=None) -> Done:
    done = run(configure(folder, manifest), 2, *WATCHED, *overrides, faults=dict.fromkeys((0, 1), fault))
    assert done.codes == [0, 0], done.output
    return done


def test_a_collapse_is_alarmed(tmp_path, manifest, report):
    done = watched(tmp_path, manifest, fault=partial(inject.collapsed, block=1))
    found = done.incidents("alarm")
    assert {alarm["monitor"] for alarm in found} == {"mean_share"}
    assert found[0]["step"] == 5 and found[0]["block"] == 1 and float(found[0]["value"]) == pytest.approx(1)
    assert "step 5: alarm: share of the token mean in the residual stream's energy is 1 in block 1" in done.output
    report(41, "a block that gives every token the mean of all", "alarmed at the first monitored step", done.seconds)


def test_a_massive_channel_is_alarmed(tmp_path, manifest, report):
    done = watched(tmp_path, manifest, fault=partial(inject.massive_channel, block=0, channel=7))
    found = {alarm["monitor"]: alarm for alarm in reversed(done.incidents("alarm"))}
    assert "channel_share" in found and found["channel_share"]["step"] <= 20, found
    assert float(found["channel_share"]["value"]) > 0.5
    report(41, "weights of one channel × 100,000", "alarmed within 20 steps", done.seconds)


def test_a_run_that_is_well_has_no_alarm(tmp_path, manifest):
    assert not watched(tmp_path, manifest).incidents("alarm")
