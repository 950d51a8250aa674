"""An hour of the debug run in which all its processes are killed three times: where the time went."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mugv_ds.cli import goodput
from tests.helpers.launcher import ROOT, finish

SECONDS = 3600
KILLS = 3


def start(folder: Path) -> subprocess.Popen:
    """Starts the run, or goes on with it, on the demo's samples; a worker a rank reads them."""
    settings = (
        f"checkpoint.dir={folder}/checkpoints",
        "checkpoint.save_every=50",
        f"logging.dir={folder}/tensorboard",
        "logging.eval_every=5000",
        "logging.progress=false",
        "data.num_workers=1",
        "optimizer.lr=3e-4",  # the config's, which falls within 400 steps, would make the loss jump in so many
        "schedule.steps=1000000",
    )
    command = [sys.executable, "tools/launch.py", "--nproc", "2"]
    command += ["mugv_ds/train.py", "--config", "ds_configs/debug.json"]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill(run: subprocess.Popen) -> None:
    """Kills the launcher and all that it started, as the loss of a node does."""
    of_run = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    for process in of_run:
        process.kill()
    psutil.wait_procs(of_run)
    run.communicate()


@pytest.mark.hour
def test_an_hour_with_three_kills_is_useful(tmp_path, capsys):
    if not (ROOT / "data/demo/train.csv").exists():
        pytest.skip("needs the demo data: make demo-data")
    began = time.time()
    for number in range(1, KILLS + 1):
        run = start(tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            run.communicate(timeout=began + number * SECONDS / (KILLS + 1) - time.time())
        kill(run)
    run = start(tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        run.communicate(timeout=began + SECONDS - time.time())
    run.send_signal(signal.SIGTERM)
    _, output = finish(run)
    wall = time.time() - began
    assert goodput.main([str(tmp_path / "tensorboard"), "--json"]) == 0, output
    report = json.loads(capsys.readouterr().out)
    with capsys.disabled():
        print(f"\n{wall:.1f} s by the clock")
        goodput.main([str(tmp_path / "tensorboard")])
    assert report["starts"] == KILLS + 1
    assert sum(report["seconds"].values()) == pytest.approx(report["wall"], rel=0.01)
    assert report["wall"] == pytest.approx(wall, rel=0.01)
    assert report["seconds"]["useful"] >= 0.97 * report["wall"]
