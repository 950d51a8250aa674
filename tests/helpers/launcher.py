"""Runs training through the deepspeed launcher, as a user does."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.distributed import free_port

ROOT = Path(__file__).parents[2]


def launch(
    config: Path, slots: int, *arguments: str, script: str = "mugv_ds/train.py", ours: bool = False
) -> subprocess.Popen:
    """Starts a run. ours: by `tools/launch.py`, in place of `deepspeed`."""
    hostfile = config.parent / "hostfile"
    hostfile.write_text(f"localhost slots={slots}\n")
    command = [sys.executable, *(["tools/launch.py"] if ours else ["-m", "deepspeed.launcher.runner", "--no_ssh"])]
    command += ["--hostfile", str(hostfile)]
    command += ["--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command += [script, "--config", str(config), *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen, seconds: float = 150) -> tuple[int, str]:
    output, _ = run.communicate(timeout=seconds)
    return run.returncode, output
