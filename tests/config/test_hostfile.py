"""Hostfiles, and what the launcher above a training process was told about them."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deepspeed.launcher import runner

from mugv_ds.config import hostfile
from mugv_ds.config.hostfile import HostfileError, LauncherOptions, parse_hostfile, read_launcher_command

ROOT = Path(__file__).resolve().parents[2]
CHILD = "import sys; from mugv_ds.config.hostfile import check_launcher; check_launcher(int(sys.argv[1]))"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def executable(path, text):
    write(path, text).chmod(0o755)
    return path


def tool(name, *args, **env):
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


def test_good_file(tmp_path):
    text = "# two kinds of machine\n\nbig-1.example  slots=8\nsmall_2\tslots=2  # on loan\r\n10.0.0.3 slots=1024"
    hosts = parse_hostfile(write(tmp_path / "hosts", text))
    assert list(hosts.items()) == [("big-1.example", 8), ("small_2", 2), ("10.0.0.3", 1024)]


BAD_LINES = {
    "ssh option": ("-oProxyCommand=id slots=1", "starts with '-'"),
    "semicolon": ("a;reboot slots=1", "has characters other than"),
    "substitution": ("$(reboot) slots=1", "has characters other than"),
    "comma": ("a,b slots=1", "has characters other than"),
    "NUL": ("a\0b slots=1", "has characters other than"),
    "not ASCII": ("hôst slots=1", "has characters other than"),
    "duplicate": ("first slots=1", "first is listed twice"),
    "no slots": ("other", "does not read 'host slots=N'"),
    "zero": ("other slots=0", "slots = 0: must be 1..1024"),
    "one too many": ("other slots=1025", "slots = 1025: must be 1..1024"),
    "a hundred billion": ("other slots=100000000000", "slots = 100000000000: must be 1..1024"),
    "thousands of digits": ("other slots=" + "9" * 5000, "does not read 'host slots=N'"),
    "negative": ("other slots=-1", "does not read 'host slots=N'"),
    "more words": ("other slots=1 max_slots=2", "does not read 'host slots=N'"),
    "spaces": ("other slots = 1", "does not read 'host slots=N'"),
}


@pytest.mark.parametrize(("line", "expected"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line(tmp_path, line, expected):
    path = write(tmp_path / "hosts", f"# hosts\nfirst slots=1\n{line}\n")
    with pytest.raises(HostfileError) as caught:
        parse_hostfile(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert expected in str(caught.value)


def test_bad_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    write(tmp_path / "empty", "# nothing yet\n\n")
    expected = {
        "none": "no such file",
        ".": "not a regular",
        "fifo": "not a regular",
        "binary": "UTF-8",
        "empty": "no host",
    }
    for name, problem in expected.items():
        with pytest.raises(HostfileError, match=problem):
            parse_hostfile(tmp_path / name)


def test_files_in_the_repository():
    slots = {path.name: list(parse_hostfile(path).values()) for path in (ROOT / "hostfiles").iterdir()}
    assert slots == {"localhost": [2], "one_node": [8], "many_nodes": [8, 8, 8, 8]}


COMMANDS = {
    "long": (["--hostfile", "h", "train.py"], LauncherOptions("h", False)),
    "equals": (["--hostfile=h", "train.py"], LauncherOptions("h", False)),
    "short": (["-H", "h", "train.py"], LauncherOptions("h", False)),
    "short, attached": (["-Hh", "train.py"], LauncherOptions("h", False)),
    "abbreviated": (["--hostf", "h", "train.py"], LauncherOptions("h", False)),
    "none": (["--num_gpus", "2", "train.py"], LauncherOptions(None, True)),
    "only the script's": (["--no_ssh", "train.py", "--hostfile", "h"], LauncherOptions(None, False)),
    "script's after ours": (["-H", "h", "train.py", "--num_gpus", "1"], LauncherOptions("h", False)),
    "values before": (
        ["--master_addr", "h2", "--no_ssh", "--node_rank=0", "-H", "h", "t.py"],
        LauncherOptions("h", False),
    ),
    "include": (["-H", "h", "-i", "a:0", "train.py"], LauncherOptions("h", True)),
    "exclude": (["--exclude=a", "-H", "h", "train.py"], LauncherOptions("h", True)),
    "nodes": (["-H", "h", "--num_nodes", "1", "train.py"], LauncherOptions("h", True)),
    "accelerators": (["-H", "h", "--num_accelerators", "1", "train.py"], LauncherOptions("h", True)),
}


@pytest.mark.parametrize(("arguments", "expected"), COMMANDS.values(), ids=COMMANDS.keys())
def test_launcher_command(arguments, expected):
    assert read_launcher_command(["/v/bin/python3", "/v/bin/deepspeed", *arguments]) == expected
    assert read_launcher_command(["python", "-u", "-m", "deepspeed.launcher.runner", *arguments]) == expected
    theirs = runner.parse_args(arguments).hostfile
    assert theirs == (expected.hostfile or runner.DLTS_HOSTFILE)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["make", "deepspeed", "-H", "h"],
        ["python", "-m", "deepspeed.launcher.launch", "--hostfile", "h", "train.py"],
        ["python", "tools/run.py", "deepspeed", "--hostfile", "h", "train.py"],
        ["python"],
    ],
)
def test_not_the_launcher(command):
    assert read_launcher_command(command) is None


def test_launcher_options_are_those_of_the_installed_deepspeed(monkeypatch):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, args=None: parsers.append(self))
    runner.parse_args([])

    def options(parser):
        return {word: action.nargs for action in parser._actions for word in action.option_strings} | {
            "--help": 0,
            "-h": 0,
        }

    assert options(hostfile._launcher_parser()) == options(parsers[0])


def launch(folder, *arguments, world_size):
    """A real process named `deepspeed`, in `folder`, whose child, in another folder, checks it."""
    child = f"subprocess.run([sys.executable, '-c', {CHILD!r}, '{world_size}'], cwd='/').returncode"
    script = executable(folder / "deepspeed", f"#!{sys.executable}\nimport subprocess, sys\nsys.exit({child})\n")
    return subprocess.run([script, *arguments, "t.py"], cwd=folder, capture_output=True, text=True, timeout=60)


def test_check_launcher_from_a_child(tmp_path):
    write(tmp_path / "hosts", "localhost slots=2\n")
    write(tmp_path / "evil", "-oProxyCommand=id slots=2\n")
    cases = [
        (["--hostfile", "hosts"], 2, None),
        (["--hostfile", "hosts"], 1, f"{tmp_path}/hosts: has 2 slots, but 1 processes were started"),
        (["--hostfile", "hosts", "--num_gpus=1"], 1, None),
        (["--hostfile=gone"], 1, f"{tmp_path}/gone: no such file"),
        (["-H", "evil"], 2, f"{tmp_path}/evil:1: '-oProxyCommand=id' starts with '-'"),
        (["--num_gpus=2"], 2, None),
    ]
    for arguments, world_size, error in cases:
        done = launch(tmp_path, *arguments, world_size=world_size)
        assert (done.returncode == 0) == (error is None), done.stderr
        assert error is None or error in done.stderr


def test_a_relative_hostfile_lies_in_the_folder_of_the_launcher(tmp_path, monkeypatch):
    """Not in that of this process, where another file has the same name; an absolute path is taken as it is."""
    launcher, here = tmp_path / "launcher", tmp_path / "here"
    for folder, slots in ((launcher, 2), (here, 3)):
        folder.mkdir()
        write(folder / "hosts", f"localhost slots={slots}\n")
    monkeypatch.chdir(here)
    hostfile._check_options(LauncherOptions("hosts", False), launcher, 2)
    hostfile._check_options(LauncherOptions("../here/hosts", False), launcher, 3)
    hostfile._check_options(LauncherOptions(str(here / "hosts"), False), launcher, 3)
    hostfile._check_options(LauncherOptions("hosts", True), launcher, 1)
    with pytest.raises(HostfileError, match="launcher/hosts: has 2 slots, but 3 processes were started"):
        hostfile._check_options(LauncherOptions("hosts", False), launcher, 3)


def test_check_launcher_without_one():
    hostfile.check_launcher(1)


def test_missing_hostfile_under_the_real_launcher(tmp_path):
    script = write(tmp_path / "train.py", f"import sys\nsys.argv = ['', '1']\n{CHILD}\n")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "gone", "--num_gpus=1", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"HostfileError: {tmp_path}/gone: no such file" in done.stderr


def test_check_hostfile_tool(tmp_path):
    good = tool("check_hostfile.py", write(tmp_path / "good", "a slots=2\nb slots=3\n"))
    assert (good.returncode, good.stdout) == (0, "2 hosts, 5 slots\n")
    bad = tool("check_hostfile.py", write(tmp_path / "bad", "a slots=0\n"))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"{tmp_path}/bad:1: slots = 0: must be 1..1024\n"


@pytest.fixture
def slurm(tmp_path):
    """The environment of an allocation of two hosts, with a `scontrol` that knows them."""
    script = """#!/bin/sh
    [ "$*" = "show hostnames n[1-2]" ] && printf 'n1\\nn2\\n' && exit 0
    echo "Invalid hostlist: $3" >&2; exit 1
    """
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "scontrol", script)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    return {"PATH": path, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}


def test_slurm_hostfile(tmp_path, slurm):
    done = tool("slurm_hostfile.py", tmp_path / "hosts", **slurm)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/hosts: 2 hosts, 16 slots\n")
    assert parse_hostfile(tmp_path / "hosts") == {"n1": 8, "n2": 8}
    assert tool("slurm_hostfile.py", tmp_path / "hosts", "--slots=4", **slurm).returncode == 0
    assert parse_hostfile(tmp_path / "hosts") == {"n1": 4, "n2": 4}
    cpus = slurm | {"SLURM_GPUS_ON_NODE": "", "SLURM_CPUS_ON_NODE": "3"}
    assert tool("slurm_hostfile.py", tmp_path / "hosts", **cpus).returncode == 0
    assert parse_hostfile(tmp_path / "hosts") == {"n1": 3, "n2": 3}, "without GPUs as many as CPUs"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set"),
        ({"SLURM_JOB_NODELIST": "x["}, "scontrol show hostnames x[: Invalid hostlist: x["),
        ({"SLURM_GPUS_ON_NODE": "0"}, "neither SLURM_GPUS_ON_NODE nor SLURM_CPUS_ON_NODE is set"),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_CPUS_ON_NODE": "x"}, "hosts:1: "),
        ({"PATH": "/nowhere"}, "No such file or directory: 'scontrol'"),
    ],
)
def test_slurm_hostfile_fails(tmp_path, slurm, env, expected):
    done = tool("slurm_hostfile.py", tmp_path / "hosts", **{**slurm, **env})
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1


# Says what it was started with where that is the launch of a host.
PYTHON = f"""#!/bin/bash
[ "$1" = tools/launch.py ] || exec {sys.executable} "$@"
cat "$3"; printf "<%s>" "$@"; echo
"""


def write_named_config(folder: Path) -> str:
    """A config whose checkpoints go to `checkpoints` in the folder."""
    values = {"extends": str(ROOT / "ds_configs/debug.json"), "checkpoint": {"dir": str(folder / "checkpoints")}}
    write(folder / "a b.json", json.dumps(values))
    return "a b.json"


def test_a_job_that_is_queued_again_must_find_its_checkpoint(tmp_path, slurm):
    """Neither at first nor if it was stopped before it saved; but from then on, also when the file system is gone."""
    binaries, log, checkpoints = tmp_path / "bin", tmp_path / "started", tmp_path / "checkpoints"
    script = f"""#!/bin/bash
    echo "$@" >>{log}
    if [ -e {tmp_path}/saves ]; then mkdir -p {checkpoints} && touch {checkpoints}/latest; fi
    exit $(cat {tmp_path}/status)
    """
    executable(binaries / "srun", script)
    executable(binaries / "scontrol", '#!/bin/sh\n[ "$1" = requeue ] && exit\n' + (binaries / "scontrol").read_text())
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "hostfiles").mkdir()
    command = ["bash", "tools/train.slurm", "--config", write_named_config(tmp_path)]

    def job(status: int) -> bool:
        """One start of the job; returns whether it had to find a checkpoint."""
        write(tmp_path / "status", str(status))
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **slurm}, timeout=60)
        assert done.returncode == status
        return "--set checkpoint.resume=must" in log.read_text().splitlines()[-1]

    assert not job(75)
    (tmp_path / "saves").touch()
    assert not job(75) and job(75)
    shutil.rmtree(checkpoints)
    (tmp_path / "saves").unlink()
    assert job(2), "the mount is gone"
    assert job(0) and not job(0), "a run that is done leaves no mark behind"


def test_slurm_script_starts_one_launcher_a_host(tmp_path, slurm):
    binaries = tmp_path / "bin"
    executable(binaries / "srun", '#!/bin/bash\nshift 2\nfor i in 0 1; do SLURM_PROCID=$i "$@" || exit; done\n')
    executable(binaries / "python", PYTHON)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "hostfiles").mkdir()
    done = subprocess.run(
        ["bash", "tools/train.slurm", "--config", write_named_config(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, **slurm},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    start = "<tools/launch.py><--hostfile><hostfiles/slurm_7><--node_rank>"
    rest = "<--master_addr><n1><mugv_ds/train.py><--config><a b.json>"
    hosts = ["n1 slots=8", "n2 slots=8"]
    assert done.stdout.splitlines()[1:] == [*hosts, f"{start}<0>{rest}", *hosts, f"{start}<1>{rest}"]
    assert not (tmp_path / "hostfiles" / "slurm_7").exists()


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False), (2, False), (0, False)])
def test_slurm_script_passes_the_signal_on_and_requeues_what_was_saved(tmp_path, slurm, status, requeued):
    binaries, told = tmp_path / "bin", tmp_path / "told"
    waiting = f"touch {tmp_path}/running; until [ -e {told} ]; do sleep 0.05; done; sleep 0.3; exit {status}"
    executable(binaries / "srun", f'#!/bin/bash\ncase "$*" in *pkill*) echo "$@" >{told};; *) {waiting};; esac\n')
    hosts = (binaries / "scontrol").read_text()
    requeue = f'#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >{tmp_path}/requeued && exit\n'
    executable(binaries / "scontrol", requeue + hosts)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / "hostfiles").mkdir()
    environment = {**os.environ, **slurm}
    command = ["bash", "tools/train.slurm", "--config", write_named_config(tmp_path)]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True) as job:
        deadline = time.monotonic() + 60
        while not (tmp_path / "running").exists():
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == status
    assert "--nodelist=n1 pkill -USR1 -f ^python tools/launch.py" in told.read_text()
    assert (tmp_path / "requeued").exists() == requeued
    assert not (tmp_path / "hostfiles" / "slurm_7").exists()
