"""A private SLURM of two nodes, and an sshd, on loopback addresses of this machine; nothing of the system is used."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODES = ("127.0.0.2", "127.0.0.3")
PACKAGES = {
    "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge", "pdsh": "pdsh",
    "sshd": "openssh-server",
}  # fmt: skip
CONFIG = """
ClusterName=box
SlurmctldHost={host}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdTimeout=10
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SSHD = """
Port {port}
ListenAddress 127.0.0.2
ListenAddress 127.0.0.3
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
"""
SSH = """
Port {port}
IdentityFile {folder}/user_key
StrictHostKeyChecking no
UserKnownHostsFile {folder}/known_hosts
LogLevel ERROR
"""
PATIENCE = 300.0
_ROWS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[_ROWS] = []


@pytest.fixture
def report(request) -> Callable[..., None]:
    """Notes (what was done, what came of it, seconds) for the table at the end."""
    return lambda *row: request.config.stash[_ROWS].append(row)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_ROWS]
    if rows:
        terminalreporter.write_sep("=", "cluster")
        for what, outcome, seconds in rows:
            terminalreporter.write_line(f"{what:<62} {outcome:<62} {seconds:6.1f} s")


def binary(name: str) -> str | None:
    """The path of a program, also where a user's PATH does not have it."""
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(reached: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not reached():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.2)


@dataclass
class Cluster:
    """The running daemons. environment: that programs of it are started in. daemons: by name, with their commands."""

    folder: Path
    environment: dict[str, str]
    commands: dict[str, list[str]]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def start(self, name: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(self.commands[name], env=self.environment, stdout=out, stderr=out)

    def run(self, *command: str, check: bool = True, timeout: float = 60.0) -> str:
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def logs(self) -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@dataclass
class Job:
    """A job of `tools/train.slurm`."""

    cluster: Cluster
    number: str
    log: Path
    pending_since: float | None = None

    @classmethod
    def submit(cls, cluster: Cluster, config: Path, *options: str, **environment: str) -> "Job":
        """Submits a run of a config with a process on each of the two nodes."""
        log = config.parent / "job.log"
        command = ["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", f"--output={log}", "tools/train.slurm"]
        done = subprocess.run(
            [*command, *options, "--config", str(config)],
            cwd=ROOT, env=cluster.environment | environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return cls(cluster, done.stdout.strip(), log)

    def facts(self) -> dict[str, str]:
        """What SLURM knows of the job."""
        words = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self) -> str:
        return self.facts()["JobState"]

    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def said(self) -> str:
        return (self.log.read_text() if self.log.exists() else "no log") + self.cluster.logs()

    def hasten(self) -> None:
        """Has a job that was queued again begin after five seconds; SLURM has it wait for two minutes.

        Sooner, a node would take it for the one that has just ended, and refuse it.
        """
        if self.state() != "PENDING":
            self.pending_since = None
        elif self.pending_since is None:
            self.pending_since = time.monotonic()
        elif time.monotonic() > self.pending_since + 5:
            self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)

    def wait_until(self, reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline, self.said()
            self.hasten()
            time.sleep(0.3)

    def finish(self) -> str:
        """Waits for the end; returns the state."""
        self.wait_until(lambda: self.state() not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"))
        return self.state()

    def tell(self, number: signal.Signals) -> None:
        """Sends a signal to the job's script, as SLURM does before the time limit.

        On a busy machine the request is lost at times; a second signal changes nothing.
        """
        for _ in range(3):
            try:
                self.cluster.run(
                    "scancel", "--batch", f"--signal={number.name.removeprefix('SIG')}", self.number, timeout=20
                )
            except subprocess.TimeoutExpired:
                continue
            return
        raise AssertionError(self.said())


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """SLURM with two nodes, one process each, and an sshd for both."""
    missing = [package for name, package in PACKAGES.items() if binary(name) is None]
    if missing:
        pytest.skip(f"needs {' '.join(missing)} (Debian's packages)")
    folder = tmp_path_factory.mktemp("cluster")
    host, user = socket.gethostname(), subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    controller, *ports, ssh_port = free_ports(len(NODES) + 2)
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={node} NodeAddr={node} Port={port} CPUs=2 State=UNKNOWN"
        for node, port in zip(NODES, ports, strict=True)
    )
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, port=controller, user=user, nodes=nodes))
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(1024))
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder, port=ssh_port))
    (folder / "ssh_config").write_text(SSH.format(folder=folder, port=ssh_port))
    programs = folder / "bin"  # ssh as the launchers call it, with our keys
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    (programs / "ssh").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "NO_COLOR": "1"}
    munge = [
        f"--{name}={folder}/munge.{file}"
        for name, file in {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }.items()
    ]
    commands = {
        "munged": [binary("munged"), "--foreground", "--force", *munge],
        "slurmctld": [binary("slurmctld"), "-D", "-f", str(folder / "slurm.conf")],
        **{node: [binary("slurmd"), "-D", "-f", str(folder / "slurm.conf"), "-N", node] for node in NODES},
        "sshd": [binary("sshd"), "-D", "-f", str(folder / "sshd_config")],
    }
    made = Cluster(folder, environment, commands)
    privileges = Path("/run/sshd")  # where sshd gives up its own
    if os.geteuid() == 0:
        privileges.mkdir(exist_ok=True)
    try:
        made.start("munged")
        wait_for((folder / "munge.socket").exists, made.logs)
        for name in ("slurmctld", *NODES, "sshd"):
            made.start(name)
        idle = ["sinfo", "--noheader", "--format=%T %D"]
        wait_for(lambda: made.run(*idle, check=False).split() == ["idle", "2"], made.logs, 60.0)
        yield made
    finally:
        made.stop()
