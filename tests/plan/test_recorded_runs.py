"""The planner against runs on GPUs that its calibration did not see, and docs/planning.md against the planner."""

from pathlib import Path

import pytest

from mugv_ds.plan.calibration import load_calibration, shipped
from mugv_ds.plan.compare import Held, broken, hold, markdown
from mugv_ds.plan.records import read_record

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "tests/plan/runs").glob("*.json"))


@pytest.fixture(scope="module")
def held() -> list[Held]:
    return hold([read_record(path) for path in RUNS], [load_calibration(name) for name in shipped()])


def test_predictions_are_within_their_bounds(held):
    """Step time 5% in the median and 10% at worst; memory 5%, and never more than 3% too little."""
    assert len(held) >= 12
    assert not broken(held)


def test_the_runs_are_others_than_what_was_calibrated(held):
    """By the tokens of a sample, and by how many ranks share it."""
    points = {point.tokens for name in shipped() for point in load_calibration(name).attention}
    assert not points & {one.record.tokens for one in held}
    assert {one.record.world_size for one in held} >= {1, 2}
    assert max(one.record.tokens for one in held) > 500_000


def test_host_memory_is_as_predicted(held):
    measured = [one for one in held if one.record.measured.host_gib is not None]
    assert len(measured) > 5
    for one in measured:
        assert one.host_gib == pytest.approx(one.record.measured.host_gib, rel=0.15), one.record.name


def test_the_table_of_the_documentation_is_that_of_the_command(held):
    """`tools/plan.py --validate tests/plan/runs/*.json` prints it."""
    assert "\n".join(markdown(held)) in (ROOT / "docs/planning.md").read_text()
