"""What the deepspeed launcher makes of a run that is asked to stop."""

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil

from tests.faults.conftest import configure
from tests.helpers.launcher import finish, launch


def processes(run: subprocess.Popen, part: str) -> list[psutil.Process]:
    return [child for child in psutil.Process(run.pid).children(recursive=True) if part in child.cmdline()]


def wait_for_checkpoint(folder: Path, run: subprocess.Popen) -> None:
    """Until there is a new one: the run is in its loop."""
    before = set(folder.iterdir()) if folder.exists() else set()
    deadline = time.monotonic() + 150
    while not (folder.exists() and {path for path in folder.iterdir() if path.is_dir()} - before):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def stopped_at(output: str) -> int:
    (found,) = re.findall(r"step (\d+): rank \d got SIGTERM; stopping", output)
    return int(found)


def test_the_launcher_and_its_ranks_can_be_told_to_stop(tmp_path, manifest, report):
    """If one rank is told, status 75 reaches the shell; if the launcher is, all is saved, but it returns 1 itself."""
    config = configure(
        tmp_path, manifest, schedule={"steps": 100_000}, checkpoint={"save_every": 30}, data={"num_workers": 1}
    )
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
