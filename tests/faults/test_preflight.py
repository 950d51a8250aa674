"""The preflight names the rank that falls short, in what and by how much; no rank is left behind."""

import re

import pytest

from tests.faults import inject
from tests.faults.conftest import configure
from tests.faults.runs import run
from tests.helpers.launcher import finish, launch

# Processes that share two cores with others are not equally fast.
ON = (
    "guard.preflight=true",
    "preflight.median_share=0.02",
    "preflight.checkpoint_mib=1",
    "preflight.checkpoint_mib_s=0.1",
)


def test_a_run_begins_where_nothing_falls_short(tmp_path, manifest, report):
    done = run(configure(tmp_path, manifest), 2, *ON, "schedule.steps=1", "schedule.warmup_steps=0")
    assert done.codes == [0, 0], done.output
    assert len(done.losses()) == 1
    assert "preflight: 2 ranks on 1 host" in done.output and "falls short" not in done.output
    for check in ("matrix product", "copy on the device", "all-to-all of the host", "all-reduce of the host"):
        assert re.search(rf"^  {check} +[\d.]+ ", done.output, re.MULTILINE), done.output
    assert not list((tmp_path / "checkpoints").glob(".preflight*"))


def test_a_rank_that_falls_short_is_named_with_what_and_by_how_much(tmp_path, manifest, report):
    done = run(configure(tmp_path, manifest), 2, *ON, faults={1: inject.unfit})
    assert done.codes == [1, 1], done.output
    said = [line for line in done.output.splitlines() if "falls short: " in line]
    assert all(re.match(r"rank 1 \(host \S+, local rank 1, CPU\) falls short: ", line) for line in said), said
    found = dict(line.partition("falls short: ")[2].split(": ", 1) for line in said)
    assert found.keys() == {"version of torch", "matrix product", "checkpoint.dir", "host's clock"}
    assert found["version of torch"].startswith("1.0, where others have ")
    assert re.match(r"\S+ TFLOP/s, 0\.0\d × the median \S+ TFLOP/s", found["matrix product"])
    assert "File too large" in found["checkpoint.dir"]
    assert re.match(r"100 s ahead of the median rank's, more than preflight.clock_skew_s = 1", found["host's clock"])
    assert not done.steps()
    report(
        40, "a machine that is slow, has another PyTorch, a wrong clock, no room", "named; nothing starts", done.seconds
    )


def test_a_rank_that_hangs_in_the_preflight_is_named_and_all_end(tmp_path, manifest, report):
    done = run(configure(tmp_path, manifest), 2, *ON, "preflight.timeout_s=4", faults={1: inject.hang_in_product})
    assert done.codes == [1, 1], done.output
    assert done.seconds < 40
    held_up = re.findall(r"rank (\d) has not moved since check 3 for 4 s; held up by (.*)", done.output)
    assert {rank for rank, _ in held_up} == {"0", "1"}
    assert all(by.startswith("rank 1 (host ") and "measure.py" in by for _, by in held_up), held_up
    report(40, "a rank hangs in the preflight, time-out 4 s", "the rank is named, status 1", done.seconds)


@pytest.mark.long
def test_by_the_launcher(tmp_path, manifest):
    """tools/preflight.py: reads no data, ends well; and with a checkpoint folder that cannot be one, badly."""
    config = configure(tmp_path, manifest, data={"manifest": "no/such/file.csv"})
    options = [word for on in ON for word in ("--set", on)]
    status, output = finish(launch(config, 2, *options, script="tools/preflight.py", ours=True))
    assert status == 0 and "preflight: nothing falls short" in output, output
    (tmp_path / "file").touch()
    options += ["--set", f"checkpoint.dir={tmp_path}/file/checkpoints"]
    status, output = finish(launch(config, 2, *options, script="tools/preflight.py", ours=True))
    assert status == 1, output
    assert re.search(
        r"rank 0 \(.*\) falls short: checkpoint.dir: failed: .*Not a directory.*; so do ranks 1 of this host", output
    ), output
