"""What the launchers, DeepSpeed's and ours, make of a run that is asked to stop, and a run of launchers that end."""

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import configure
from tests.helpers.dataset import write_dataset
from tests.helpers.launcher import finish, launch


def processes(run: subprocess.Popen, part: str) -> list[psutil.Process]:
    return [child for child in psutil.Process(run.pid).children(recursive=True) if part in child.cmdline()]


def wait_until(holds, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while not holds():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_checkpoint(folder: Path, run: subprocess.Popen) -> None:
    """Until there is a new one after a step: the run is in its loop."""
    before = {*folder.glob("step-*[0-9]"), folder / "step-00000000"}
    wait_until(lambda: set(folder.glob("step-*[0-9]")) - before, run)


def listens(process: psutil.Process) -> bool:
    """Whether a process has a handler for SIGUSR1."""
    caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def stopped_at(output: str, why: str = "got SIGTERM") -> int:
    """The step after which it said that a rank was asked to stop."""
    (found,) = re.findall(rf"step (\d+): rank \d {why}; stopping", output)
    return int(found)


def all_end(ranks: list[psutil.Process]) -> bool:
    """Whether they end by themselves within half a minute."""
    return not psutil.wait_procs(ranks, timeout=30)[1]


def endless(folder: Path, manifest: Path, **sections: dict) -> Path:
    return configure(folder, manifest, schedule={"steps": 100_000}, checkpoint={"save_every": 30}, **sections)


@pytest.mark.long
def test_the_launcher_and_its_ranks_can_be_told_to_stop(tmp_path, manifest, report):
    """If one rank is told, status 75 reaches the shell; if the launcher is, all is saved, but it returns 1 itself."""
    config = endless(tmp_path, manifest, data={"num_workers": 1})
    checkpoints = tmp_path / "checkpoints"
    run = launch(config, 2)
    wait_for_checkpoint(checkpoints, run)
    begin = time.monotonic()
    processes(run, "--local_rank=1")[0].send_signal(signal.SIGTERM)
    status, output = finish(run)
    assert status == 75, output
    first = stopped_at(output)
    report(12, "SIGTERM to one rank under the launcher", "saved; the launcher returns 75", time.monotonic() - begin)

    run = launch(config, 2)
    wait_for_checkpoint(checkpoints, run)
    begin = time.monotonic()
    processes(run, "deepspeed.launcher.launch")[0].send_signal(signal.SIGTERM)
    status, output = finish(run)
    assert status == 1 and f"going on after step {first}\n" in output
    assert stopped_at(output) > first and "Traceback" not in output
    assert time.monotonic() - begin < 25, "the launcher kills what has not ended after 30 s"
    report(12, "SIGTERM to the launcher", "saved; the launcher returns 1", time.monotonic() - begin)
    assert sorted(checkpoints.glob(f"*{stopped_at(output)}"))


@pytest.mark.parametrize(
    ("fault", "ours", "expected", "outcome"),
    [
        pytest.param(
            "SIGTERM to the outer deepspeed",
            False,
            -signal.SIGTERM,
            "saved; the shell sees the signal",
            marks=pytest.mark.long,
        ),
        pytest.param("kill -9 of the inner launcher", False, 0, "saved; deepspeed returns 0", marks=pytest.mark.long),
        pytest.param(
            "kill -9 of the inner launcher of tools/launch.py", True, 75, "saved; status 75", marks=pytest.mark.long
        ),
        ("SIGTERM to tools/launch.py", True, 75, "saved; status 75"),
    ],
)
def test_no_rank_outlives_its_launcher(tmp_path, manifest, report, fault, ours, expected, outcome):
    """Each of them makes the ranks save and end by themselves; `deepspeed` alone says 0 where it should not."""
    run = launch(endless(tmp_path, manifest), 2, ours=ours)
    wait_for_checkpoint(tmp_path / "checkpoints", run)
    ranks = [rank for number in (0, 1) for rank in processes(run, f"--local_rank={number}")]
    begin = time.monotonic()
    if fault.startswith("SIGTERM"):
        run.send_signal(signal.SIGTERM)
    else:
        processes(run, "mugv_ds.cli.deepspeed_launch" if ours else "deepspeed.launcher.launch")[0].kill()
    ended = all_end(ranks)
    for rank in [] if ended else ranks:
        rank.kill()
    status, output = finish(run)
    assert len(ranks) == 2 and ended, output
    assert status == expected, output
    told = "got SIGUSR1" if fault.endswith("tools/launch.py") and "SIGTERM" in fault else "lost its launcher"
    assert (tmp_path / f"checkpoints/step-{stopped_at(output, told):08d}/MANIFEST.json").exists()
    report(35, fault, outcome, time.monotonic() - begin)


@pytest.mark.parametrize("whom", [pytest.param("a rank", marks=pytest.mark.long), "tools/launch.py"])
def test_a_run_that_is_starting_stops(tmp_path, manifest, report, whom):
    """The ranks are told while they import the package, our launcher before it has started one."""
    run = launch(endless(tmp_path, manifest), 2, ours=whom != "a rank")
    if whom == "a rank":
        wait_until(lambda: any(map(listens, processes(run, "--local_rank=1"))), run)
        told = processes(run, "--local_rank=1")[0]
    else:
        told = psutil.Process(run.pid)
        wait_until(lambda: listens(told), run)
    begin = time.monotonic()
    told.send_signal(signal.SIGUSR1)
    status, output = finish(run)
    assert status == 75, output
    assert re.search(r"before the first step: rank \d got SIGUSR1; stopping", output) and "Traceback" not in output
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    report(36, f"SIGUSR1 to {whom} during the start", "status 75, nothing trained", time.monotonic() - begin)


@pytest.mark.long
def test_a_long_validation_is_left(tmp_path, report):
    """The one before the first step, which takes several seconds."""
    manifest = write_dataset(tmp_path / "data", [(2, 4, 6)] * 4)
    held_out = write_dataset(tmp_path / "held_out", [(2, 4, 6)] * 1500)
    run = launch(endless(tmp_path / "run", manifest, data={"val_manifest": str(held_out)}), 2)
    lines = []
    while not lines or "starting fresh" not in lines[-1]:
        lines.append(run.stdout.readline())
        assert lines[-1], lines
    time.sleep(1)
    begin = time.monotonic()
    processes(run, "--local_rank=1")[0].send_signal(signal.SIGUSR1)
    status, output = finish(run)
    assert status == 75, output
    assert stopped_at(output, "got SIGUSR1") == 0 and "validation loss" not in output
    report(37, "SIGUSR1 in a validation", "left between two parts; status 75", time.monotonic() - begin)
