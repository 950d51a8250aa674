"""Training on a real SLURM and over real ssh: jobs end, are told to stop, lose a node, and go on where they were."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mugv_ds.plan.records import read_scalars
from tests.cluster.conftest import NODES, ROOT, Cluster, Job, wait_for
from tests.helpers.dataset import write_config, write_dataset

pytestmark = pytest.mark.cluster
STEPS = 40


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), [(2, 4, 6), (1, 4, 4)] * 6)


def configure(folder: Path, manifest: Path) -> Path:
    return write_config(
        folder, manifest, parallel={"data": 2}, schedule={"kind": "constant", "steps": STEPS, "warmup_steps": 1},
        checkpoint={"dir": str(folder / "checkpoints"), "save_every": 5},
        logging={"dir": str(folder / "tensorboard"), "every": 1, "progress": False},
    )  # fmt: skip


def losses(folder: Path) -> list[tuple[int, float]]:
    return read_scalars(folder / "tensorboard")["train/loss"]


def steps_taken(folder: Path) -> int:
    """Steps of the process that runs, or ran last."""
    file = folder / "tensorboard/goodput.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return lines[-1]["step"] if lines else 0


def processes_of(config: Path) -> list[psutil.Process]:
    """Processes that have the config on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(config) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="session")
def undisturbed(cluster, manifest, tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of a job that nothing happens to."""
    config = configure(tmp_path_factory.mktemp("undisturbed"), manifest)
    job = Job.submit(cluster, config, "--slots", "1")
    assert job.finish() == "COMPLETED", job.said()
    found = losses(config.parent)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return found


def test_a_job_runs_to_its_end(undisturbed, cluster, manifest, tmp_path, report):
    """With as many processes a host as the allocation has CPUs there, where nobody says how many."""
    began = time.monotonic()
    config = configure(tmp_path, manifest)
    job = Job.submit(cluster, config, "--set", "parallel.data=4", "--set", "schedule.steps=3")
    assert job.finish() == "COMPLETED", job.said()
    assert "4 × CPU" in job.log.read_text() and "2 hosts, 4 slots" in job.log.read_text()
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3]
    report("sbatch tools/train.slurm, 2 nodes × 2 CPUs", "COMPLETED", time.monotonic() - began)


def test_a_job_that_is_told_to_stop_is_queued_again_and_goes_on(cluster, manifest, undisturbed, tmp_path, report):
    began = time.monotonic()
    job = Job.submit(cluster, configure(tmp_path, manifest), "--slots", "1")
    job.wait_until(lambda: steps_taken(tmp_path) >= 8)
    job.tell(signal.SIGUSR1)
    assert job.finish() == "COMPLETED", job.said()
    assert job.restarts() == 1
    assert losses(tmp_path) == undisturbed
    report("USR1 in the middle", "queued again; losses bitwise those of the undisturbed job", time.monotonic() - began)


def test_a_signal_at_any_point_of_the_start_queues_the_job_again(cluster, manifest, undisturbed, tmp_path, report):
    """At its imports, while it reads the data's index, loads weights, chooses an attention, and restores."""
    points = ["imports", "index", "loading", "attention", "restoring"]
    pauses = tmp_path / "pauses"
    pauses.mkdir()
    (pauses / points[0]).touch()
    path = os.pathsep.join([str(ROOT / "tests/cluster/pause"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    config = configure(tmp_path, manifest)
    job = Job.submit(cluster, config, "--slots", "1", PYTHONPATH=path, PAUSE_FOLDER=str(pauses))
    for number, point in enumerate(points):
        began = time.monotonic()
        if point == "restoring":  # there has to be something to restore
            job.wait_until(lambda: steps_taken(tmp_path) >= 7)
            job.tell(signal.SIGUSR1)
            job.wait_until(lambda: job.restarts() == len(points))
        job.wait_until((pauses / f"{point}.reached").exists)
        time.sleep(0.5)
        job.tell(signal.SIGUSR1)
        expected = number + 1 + (point == "restoring")
        job.wait_until(lambda expected=expected: job.restarts() == expected or job.state() in ("FAILED", "COMPLETED"))
        assert job.restarts() == expected, job.said()
        report(f"USR1 at the start: {point}", "queued again", time.monotonic() - began)
        for following in points[number + 1 : number + 2]:  # while the job waits to begin again
            (pauses / following).touch()
    assert job.finish() == "COMPLETED", job.said()
    assert losses(tmp_path) == undisturbed


def test_a_job_that_is_cancelled_leaves_nothing_behind(cluster, manifest, tmp_path, report):
    began = time.monotonic()
    config = configure(tmp_path, manifest)
    job = Job.submit(cluster, config, "--slots", "1")
    job.wait_until(lambda: steps_taken(tmp_path) >= 2)
    cluster.run("scancel", job.number)
    assert job.finish() == "CANCELLED", job.said()
    wait_for(lambda: not processes_of(config), job.said, 60.0)
    assert not list((ROOT / "hostfiles").glob(f"slurm_{job.number}"))
    report("scancel", "CANCELLED; no process is left", time.monotonic() - began)


def test_a_job_whose_node_dies_is_queued_again_and_goes_on(cluster: Cluster, manifest, undisturbed, tmp_path, report):
    """All processes of one node are killed at once, its daemon with them; the node comes back later."""
    began = time.monotonic()
    job = Job.submit(cluster, configure(tmp_path, manifest), "--slots", "1")
    job.wait_until(lambda: steps_taken(tmp_path) >= 8)
    node = NODES[1]
    cluster.daemons[node].kill()
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURMD_NODENAME") == node:
                process.kill()
        except psutil.Error:
            continue
    for stepd in psutil.process_iter():  # slurmstepd has no such variable, but the node in its title
        try:
            if stepd.name() == "slurmstepd" and str(cluster.folder / f"spool-{node}") in str(stepd.open_files()):
                stepd.kill()
        except psutil.Error:
            continue
    cluster.daemons[node].wait()
    job.wait_until(lambda: job.restarts() == 1 or job.state() in ("FAILED", "NODE_FAIL", "CANCELLED"))
    assert job.restarts() == 1, job.said()
    cluster.start(node)
    assert job.finish() == "COMPLETED", job.said()
    assert losses(tmp_path) == undisturbed
    report("kill -9 of all of a node", "queued again; losses bitwise", time.monotonic() - began)


def test_the_launcher_reaches_two_hosts_over_pdsh(cluster: Cluster, manifest, undisturbed, tmp_path, report):
    began = time.monotonic()
    config, hostfile = configure(tmp_path, manifest), tmp_path / "hosts"
    hostfile.write_text("".join(f"{node} slots=1\n" for node in NODES))
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    command = [
        deepspeed,
        "--hostfile",
        str(hostfile),
        "--launcher",
        "pdsh",
        "mugv_ds/train.py",
        "--config",
        str(config),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SSH
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert losses(tmp_path) == undisturbed
    report(
        "deepspeed --launcher pdsh, 2 hosts over ssh", "done; losses bitwise those of the job", time.monotonic() - began
    )


PATIENCE_SSH = 240.0
