"""Curves and the record of incidents are optional: a disk that does not take them ends no run and costs no step.

And the account of where the time went adds up over kills.
"""

import json
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from mugv_ds.cli import goodput as command
from tests.faults import inject
from tests.faults.conftest import configure
from tests.faults.runs import STEPS, Run, run


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
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
    found = sorted(line.split(": ")[1] for line in warnings(done.output))
    account = f"{small_disk}/tensorboard/goodput.jsonl"  # whose lines may still fit in the page that it has
    assert [what for what in found if what != account] == sorted(
        [f"logging.dir = {small_disk}/tensorboard", str(incidents)]
    )
    report(38, "a full disk under curves and incidents", "warned of once each; no step lost", done.seconds)


def test_a_folder_for_curves_that_cannot_be_made_is_warned_of(tmp_path, manifest):
    (tmp_path / "file").write_text("in the way")
    done = run(configure(tmp_path / "run", manifest, logging={"dir": str(tmp_path / "file/tensorboard")}), 2)
    assert done.codes == [0, 0], done.output
    found = {line.split(": ")[1] for line in warnings(done.output)}
    assert found == {f"logging.dir = {tmp_path}/file/tensorboard", f"{tmp_path}/file/tensorboard/goodput.jsonl"}


@pytest.mark.long
def test_the_table_of_a_run_that_was_killed_adds_up_to_the_wall_time(tmp_path, manifest, capsys):
    config = configure(tmp_path, manifest, checkpoint={"save_every": 2})
    began = time.time()
    killed = Run(config, 2)
    killed.wait_for(lambda: killed.taken() >= 6)
    for rank in killed.ranks:
        rank.kill()
    killed.finish()
    done = run(config, 2)
    ended = time.time()
    assert done.codes == [0, 0], done.output
    assert command.main([str(tmp_path / "tensorboard"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 10 and report["starts"] == 2
    assert sum(report["seconds"].values()) == pytest.approx(report["wall"], rel=0.01)
    assert report["wall"] == pytest.approx(ended - began, abs=2.0), "but for starting and ending Python"
    assert report["seconds"]["replayed"] > 0 and report["seconds"]["down"] > -0.02
