"""The profile of one step. A whole run that writes one is in `test_training`."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from mugv_ds.config.schema import LoggingSection
from mugv_ds.engine.profile import profiled


def run(folder, step: int, rank: int = 0) -> None:
    process = SimpleNamespace(rank=rank, device=torch.device("cpu"))
    with profiled(LoggingSection(dir=str(folder), profile_step=3), step, process):
        torch.ones(1000, 1000) @ torch.ones(1000, 1000)


def test_the_step_leaves_a_table_and_a_trace(tmp_path):
    run(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"profile_step_3.txt", "profile_step_3.json.gz"}
    table = (tmp_path / "profile_step_3.txt").read_text()
    first = next(line for line in table.splitlines() if "aten::" in line)
    assert "aten::mm" in first, "the product takes the longest"
    with gzip.open(tmp_path / "profile_step_3.json.gz") as file:
        assert "aten::mm" in {event["name"] for event in json.load(file)["traceEvents"]}


@pytest.mark.parametrize(("step", "rank"), [(2, 0), (4, 0), (3, 1)])
def test_other_steps_and_ranks_leave_nothing(tmp_path, step, rank):
    run(tmp_path, step, rank)
    assert not list(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    run(tmp_path / "nowhere", 3)
    assert "the profile of step 3 could not be written" in caplog.text


def test_what_fails_inside_is_passed_on(tmp_path):
    process = SimpleNamespace(rank=0, device=torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), profiled(LoggingSection(dir=str(tmp_path), profile_step=1), 1, process):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
