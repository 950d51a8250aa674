"""Calibrations: their files, and what lies between their points."""

import json

import pytest

from mugv_ds.config.errors import InputError
from mugv_ds.plan.calibration import (
    AttentionPoint,
    Calibration,
    Curve,
    calibration_of,
    load_calibration,
    machine_name,
    shipped,
)
from tests.helpers.machine import ideal_machine


def test_a_curve_goes_through_its_points_and_is_a_power_between():
    curve = Curve([(10, 1.0), (1000, 10.0), (10, 3.0)])  # of one size the mean counts: 2
    assert [curve(size) for size in (10, 1000)] == pytest.approx([2, 10])
    assert curve(100) == pytest.approx((2 * 10) ** 0.5)
    assert curve(1) == pytest.approx(2), "what is smaller takes as long as starting"
    assert curve(5000) == pytest.approx(50), "what is larger goes on at the last rate"
    with pytest.raises(ValueError, match="nothing was measured"):
        Curve([])


def test_a_file_holds_all_of_it_and_a_point_takes_the_place_of_its_like(tmp_path):
    machine = ideal_machine()
    path = tmp_path / "machine.json"
    path.write_text(machine.to_json())
    assert load_calibration(path) == machine
    point = AttentionPoint(batch=1, tokens=256, heads=1, forward_s=9.0, backward_s=9.0)
    changed = machine.plus("attention", point)
    assert len(changed.attention) == len(machine.attention)
    assert [p for p in changed.attention if p.forward_s == 9.0] == [point]
    other = changed.plus("attention", point.model_copy(update={"heads": 3}))
    assert len(other.attention) == len(machine.attention) + 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["attention"][0].update(forward_s=-1), "attention.0.forward_s"),
        (lambda c: c["attention"][0].update(tokens=0), "attention.0.tokens"),
        (lambda c: c["machine"].pop("torch"), "machine.torch"),
        (lambda c: c.update(more=1), "more"),
        (lambda c: c["blocks"][0].update(level="some"), "blocks.0.level"),
    ],
)
def test_what_is_no_calibration_is_refused_by_key(tmp_path, change, named):
    content = json.loads(ideal_machine().to_json())
    change(content)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"machine.json: {named}: "):
        load_calibration(path)


def test_names(tmp_path):
    assert machine_name("NVIDIA H200", "2.11.0+cu130") == "nvidia-h200-torch2.11"
    assert machine_name("NVIDIA H100 80GB HBM3", "2.9.1") == "nvidia-h100-80gb-hbm3-torch2.9"
    assert calibration_of("Unheard-of 1") is None
    with pytest.raises(InputError, match="not shipped"):
        load_calibration("unheard-of")
    with pytest.raises(InputError, match=r"absent\.json"):
        load_calibration(tmp_path / "absent.json")


def test_what_is_shipped_is_named_after_its_machine_and_complete():
    for name in shipped():
        calibration = load_calibration(name)
        assert calibration.name == name
        assert calibration_of(calibration.machine.device) is not None
        assert all(getattr(calibration, section) for section in Calibration.model_fields if section != "machine")
