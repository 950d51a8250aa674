"""Faults while a checkpoint is written, and checkpoints that are damaged afterwards."""

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.faults import inject
from tests.faults.conftest import configure, equal
from tests.faults.runs import SHAPES, Done, Run, run
from tests.helpers.dataset import write_dataset


def latest(folder: Path) -> str:
    return (folder / "checkpoints/latest").read_text().strip()


def test_a_run_killed_while_it_saves_loses_no_checkpoint(tmp_path, manifest, reference, report):
    """Killed four times, each time at another point of a save, in one folder."""
    config = configure(tmp_path, manifest)
    cases = [
        (2, "killed between shards and manifest", 0, "commit", 8, 4),
        (4, "killed before the rename", 0, "publish", 8, 4),
        (3, "killed between rename and `latest`", 0, "point_latest", 8, 8),
        (1, "kill -9 of a rank while it writes in the background", 1, "write_tensors", 10, 8),
    ]
    faults = [
        {rank: partial(inject.killed_in_save, function=function, step=at)} for _, _, rank, function, at, _ in cases
    ]
    left_over = tmp_path / "checkpoints/step-00000006.tmp"
    done = run(config, 2, faults=faults[0])
    for (number, name, rank, function, at, found), fault in zip(cases, [*faults[1:], None], strict=True):
        assert done.codes[rank] == -signal.SIGKILL and 0 not in done.codes, done.output
        assert (tmp_path / f"checkpoints/step-{at:08d}.tmp").exists() == (function != "point_latest")
        left_over.mkdir()
        done = run(config, 2, faults=fault)
        assert f"going on after step {found}\n" in done.output and not left_over.exists(), done.output
        outcome = "the new one is found" if found == at else "the one before is resumed"
        report(number, name, f"{outcome}; bitwise", done.restarted_in())
    assert done.codes == [0, 0] and equal(done, reference), done.output


def truncate(run_dir: Path) -> None:
    shard = run_dir / "step-00000010/rank-1.weight.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def flip_and_delete(run_dir: Path) -> None:
    shard = run_dir / "step-00000010/rank-0.weight.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (run_dir / "step-00000008/rank-1.weight.safetensors").unlink()


def empty_latest(run_dir: Path) -> None:
    (run_dir / "latest").write_text("")


def missing_latest(run_dir: Path) -> None:
    (run_dir / "latest").unlink()
    truncate(run_dir)


@pytest.mark.parametrize(
    ("damage", "numbers", "name", "found", "told"),
    [
        (truncate, [7], "a truncated shard", 8, ["step-00000010/rank-1"]),
        (
            flip_and_delete,
            [8, 9],
            "one flipped bit; a deleted shard",
            4,
            ["step-00000010/rank-0", "step-00000008/rank-1"],
        ),
        (empty_latest, [11], "`latest` empty", 10, ["latest: empty"]),
        (
            missing_latest,
            [11],
            "`latest` missing, and a truncated shard",
            8,
            ["latest: missing", "step-00000010/rank-1"],
        ),
    ],
)
def test_what_is_damaged_is_named_and_passed_over(
    tmp_path, manifest, reference, report, damage, numbers, name, found, told
):
    done = damaged(tmp_path, manifest, reference, damage)
    assert done.codes == [0, 0] and f"going on after step {found}\n" in done.output, done.output
    assert all(part in done.output for part in told)
    assert equal(done, reference)
    outcome = "the folder is scanned; bitwise" if found == 10 else "named, passed over; bitwise from the one before"
    for number in numbers:
        report(number, name, outcome, done.seconds)


def damaged(folder: Path, manifest: Path, reference: Done, damage) -> Done:
    """A run that goes on from a damaged copy of the reference's checkpoints."""
    config = configure(folder, manifest)
    for name in ("checkpoints", "steps-0.jsonl", "steps-1.jsonl"):
        source = reference.folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    damage(folder / "checkpoints")
    return run(config, 2)


def all_bad(run_dir: Path) -> None:
    for shard in run_dir.glob("step-*/rank-0.weight.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])


def leading_out(run_dir: Path) -> None:
    (run_dir / "latest").write_text("../../elsewhere")


@pytest.mark.parametrize(
    ("damage", "number", "name", "error"),
    [
        (all_bad, 10, "every checkpoint is bad", "none of its checkpoints is sound"),
        (leading_out, 11, "`latest` leads out of the folder", "latest: names '../../elsewhere', which is not"),
    ],
)
def test_a_run_is_never_started_over_in_silence(tmp_path, manifest, reference, report, damage, number, name, error):
    done = damaged(tmp_path, manifest, reference, damage)
    assert done.codes == [2, 2]
    (line,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert error in line and "Traceback" not in done.output
    report(number, name, "fatal, in one line", done.seconds)


@pytest.mark.parametrize(
    ("number", "name", "fault", "error"),
    [
        (
            5,
            "RLIMIT_FSIZE on one rank",
            partial(inject.at_step, step=5, act=partial(inject.limit_files, after=4)),
            r"rank 1: .*too large",
        ),
        (29, "the background writer fails on one rank", partial(inject.failing_write, step=8), r"rank 1: .*error"),
        (
            23,
            "an infinity in a parameter",
            partial(inject.at_step, step=7, act=inject.spoil_weight),
            "NaN or an infinity",
        ),
    ],
)
def test_a_save_that_fails_on_one_rank_is_committed_by_none(
    tmp_path, manifest, reference, report, number, name, fault, error
):
    config = configure(tmp_path, manifest)
    done = run(config, 2, faults={1: fault})
    assert done.codes == [2, 2], done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert re.search(error, line) and latest(tmp_path) == "step-00000004"
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    report(number, name, "no rank commits, `latest` is as before, all end", done.seconds)
    if number == 5:
        resumed = run(config, 2)
        assert resumed.codes == [0, 0] and equal(resumed, reference), resumed.output


@pytest.fixture
def small_disk(tmp_path, reference) -> Iterator[Path]:
    """A file system on which one checkpoint fits, and not a second."""
    needed = sum(file.stat().st_size for file in (reference.folder / "checkpoints/step-00000004").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={needed * 3 // 2}", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_is_foreseen(tmp_path, manifest, report, small_disk):
    config = configure(tmp_path, manifest, checkpoint={"dir": str(small_disk / "checkpoints")})
    done = run(config, 2)
    assert done.codes == [2, 2], done.output
    assert "warning:" in done.output and "less than two checkpoints" in done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert "a checkpoint takes" in line and "are free" in line
    assert (small_disk / "checkpoints/latest").read_text().strip() == "step-00000000"
    report(6, "a full disk", "warned of at the start; no rank commits, `latest` is as before", done.seconds)


def test_a_second_run_is_refused_the_folder(tmp_path, manifest, report):
    config = configure(tmp_path, manifest)
    first = Run(config, 2, faults={0: partial(inject.at_step, step=1, act=inject.doze)})
    first.wait_for(lambda: first.taken() >= 2)
    second = run(config, 2)
    assert second.codes == [2, 2]
    (line,) = [line for line in second.output.splitlines() if line.startswith("error:")]
    assert "checkpoints/lock: another run uses this folder" in line
    for rank in first.ranks:
        rank.kill()
    first.finish()
    third = run(config, 2, "schedule.steps=1")
    assert third.codes == [0, 0], third.output
    report(31, "a second run in one folder", "refused by the lock, which a killed run gives free", second.seconds)


@pytest.mark.long
def test_fewer_and_more_data_ranks_play_the_same_samples(tmp_path, manifest, reference, report):
    config = configure(tmp_path, manifest)
    stop = partial(inject.signal_in_step, number=signal.SIGTERM)
    assert run(config, 2, faults={0: partial(stop, step=3)}).codes == [75, 75]
    one = run(config, 1, "parallel.data=1", faults={0: partial(stop, step=6)})
    assert one.codes == [75], one.output
    done = run(config, 2)
    assert done.codes == [0, 0] and "going on after step 7\n" in done.output, done.output
    assert [position for position, _ in done.losses()] == [position for position, _ in reference.losses()]
    losses = [[float.fromhex(loss) for _, loss in of.losses()] for of in (done, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    report(18, "2, then 1, then 2 data ranks", "the same samples; losses within 1e-5", done.restarted_in())


@pytest.mark.long
def test_a_run_that_lost_ranks_goes_on_with_those_that_are_left_and_grows_back(tmp_path, manifest, reference, report):
    """4 ranks, of which one is killed; 3, of which one is left over, as a step's 4 samples take 2; and 4 again."""
    config = configure(tmp_path, manifest, parallel={"data": "fit"}, checkpoint={"save_every": 2})
    lost = run(config, 4, faults={3: partial(inject.at_step, step=5, act=inject.die)})
    assert lost.codes[3] == -signal.SIGKILL and 0 not in lost.codes, lost.output
    fewer = run(config, 3, faults={0: partial(inject.signal_in_step, step=6, number=signal.SIGTERM)})
    assert fewer.codes == [75, 75, 0], fewer.output
    assert re.search("going on after step [24]\n", fewer.output), fewer.output  # the save of 4 may not be complete
    assert (
        "note: 1 of 3 processes are left over and end: the samples of a step are split over 2 replicas" in fewer.output
    )
    done = run(config, 4)
    assert done.codes == [0] * 4 and "going on after step 7\n" in done.output, done.output
    assert [position for position, _ in done.losses()] == [position for position, _ in reference.losses()]
    losses = [[float.fromhex(loss) for _, loss in of.losses()] for of in (done, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    report(
        40,
        "4 ranks, one killed; 3; 4 again, with parallel.data = fit",
        "the same samples; losses within 1e-5",
        done.restarted_in(),
    )


@pytest.mark.long
def test_data_that_vanishes_ends_the_run_which_resumes_when_it_is_back(tmp_path, reference, report):
    data = tmp_path / "data"
    config = configure(tmp_path / "run", write_dataset(data, SHAPES))
    hide = partial(inject.at_step, step=5, act=partial(inject.hide, folder=data))
    done = run(config, 2, faults={0: partial(inject.impatient, then=hide), 1: inject.impatient})
    assert done.codes == [75, 75] and "the file system has been away for minutes" in done.output, done.output
    data.with_name("hidden").rename(data)
    resumed = run(config, 2)
    assert resumed.codes == [0, 0] and equal(resumed, reference), resumed.output
    report(34, "the data's file system vanishes", "waited for, then status 75; bitwise when resumed", done.seconds)
