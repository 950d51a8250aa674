"""Curves and the record of incidents are optional: a disk that does not take them ends no run and costs no step."""

import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.faults import inject
from tests.faults.conftest import configure
from tests.faults.runs import STEPS, run


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def warnings(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("warning: ") and "the run goes on without" in line]


def test_a_disk_that_is_full_under_them_costs_no_step(tmp_path, small_disk, manifest, report):
    """It fills up after three steps; the first incident comes later."""
    config = configure(tmp_path / "run", manifest, logging={"dir": str(small_disk / "tensorboard")})
    incidents = tmp_path / "run/checkpoints/incidents.jsonl"
    incidents.parent.mkdir()
    incidents.symlink_to(small_disk / "incidents.jsonl")
    faults = {
        0: partial(inject.at_step, step=2, act=partial(inject.fill_disk, folder=small_disk)),
        1: partial(inject.scaled_loss, factors={4: float("nan"), 6: float("nan")}),
    }
    done = run(config, 2, faults=faults)
    assert done.codes == [0, 0], done.output
    assert [position for position, _ in done.losses()] == list(range(STEPS))
    found = warnings(done.output)
    assert len(found) == 2 and {line.split(": ")[1] for line in found} == {
        f"logging.dir = {small_disk}/tensorboard",
        str(incidents),
    }
    report(38, "a full disk under curves and incidents", "warned of once each; no step lost", done.seconds)


def test_a_folder_for_curves_that_cannot_be_made_is_warned_of(tmp_path, manifest):
    (tmp_path / "file").write_text("in the way")
    done = run(configure(tmp_path / "run", manifest, logging={"dir": str(tmp_path / "file/tensorboard")}), 2)
    assert done.codes == [0, 0], done.output
    (warning,) = warnings(done.output)
    assert f"logging.dir = {tmp_path}/file/tensorboard" in warning
