"""Starts one process a slot on this host, as `deepspeed --no_ssh` does, which it can replace on one host and on many.

tools/launch.py --hostfile hostfiles/localhost mugv_ds/train.py --config ds_configs/debug.json

Two things are different. A signal (SIGTERM, SIGINT, SIGUSR1) reaches the ranks at any moment, so that they save and end
by themselves; and when DeepSpeed's launcher is killed the exit status is that of its ranks, not 0.
"""

import argparse
import base64
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from mugv_ds.config import ConfigError, Status, exit_status
from mugv_ds.config.hostfile import parse_hostfile

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TOLD = signal.SIGUSR1  # what ranks are told with: it is held back in them until they listen
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_EVERY = 0.2  # seconds
_MOST_PROCESSES = 64  # of a host


class Launch:
    """DeepSpeed's launcher of one host, and its ranks.

    Args:
        command: of DeepSpeed's launcher.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._asked = False
        self._ranks: dict[int, bool] = {}  # pid → whether it was told to stop
        for number in _STOPPING:
            signal.signal(number, self._ask)
        # Ranks whose launcher is killed become children of this process, which can then say how they ended.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # Blocked signals stay so in children: SIGUSR1 waits in a rank until it listens, and never ends the launcher.
        # In a group of its own a Ctrl-C of the terminal comes to this process alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, [_TOLD])
        self._launcher = subprocess.Popen(command, process_group=0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [_TOLD])

    def _ask(self, _number: int, _frame) -> None:
        self._asked = True

    def wait(self) -> int:
        """Waits for the end of all; returns the exit status."""
        while self._launcher.poll() is None:
            self._look()
            time.sleep(_LOOK_EVERY)
        if self._launcher.returncode >= 0:
            if self._launcher.returncode not in tuple(Status):
                why = "the end of rank<k>.log in logging.dir may say why"
                print(
                    f"error: a rank ended with status {self._launcher.returncode}; {why}", file=sys.stderr, flush=True
                )
            return self._launcher.returncode
        print(f"error: the launcher (pid {self._launcher.pid}) was killed; its ranks stop", file=sys.stderr, flush=True)
        statuses = [self._ended(pid) for pid in self._ranks]
        return Status.AGAIN if set(statuses) == {Status.AGAIN} else Status.FAILED

    def _look(self) -> None:
        """Notes ranks that have been started, and tells each once if they are to stop."""
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended, which `wait` sees next
            for child in psutil.Process(self._launcher.pid).children():
                told = self._ranks.setdefault(child.pid, False)
                if self._asked and not told:
                    child.send_signal(_TOLD)
                    self._ranks[child.pid] = True

    def _ended(self, pid: int) -> int:
        """Waits for a rank that has become a child of this process."""
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except ChildProcessError:  # it had ended before its launcher, which alone knows how
            return Status.FAILED


def launcher_command(arguments: argparse.Namespace, *, module: bool = False) -> list[str]:
    """The command of DeepSpeed's launcher for this host.

    Args:
        arguments: of the command line. module: `arguments.script` is the name of a module, not the path of a file.

    Raises:
        ConfigError: the hostfile cannot be used, or has no host of this number, or there are to be no processes.
    """
    slots = _slots(arguments)
    if not 0 <= arguments.node_rank < len(slots):
        raise ConfigError(
            f"--node_rank {arguments.node_rank}: {arguments.hostfile} has {len(slots)} hosts, counted from 0"
        )
    address = arguments.master_addr or ("127.0.0.1" if len(slots) == 1 else next(iter(slots)))
    world = json.dumps({host: list(range(count)) for host, count in slots.items()})
    return [
        *(sys.executable, "-u", "-m", "mugv_ds.cli.deepspeed_launch"),
        f"--world_info={base64.urlsafe_b64encode(world.encode()).decode()}",
        f"--node_rank={arguments.node_rank}",
        f"--master_addr={address}",
        f"--master_port={arguments.master_port}",
        *(("--module", "--no_local_rank") if module else ()),  # the rank is in the environment, too
        arguments.script,
        *arguments.arguments,
    ]


def _slots(arguments: argparse.Namespace) -> dict[str, int]:
    """The processes of each host."""
    if arguments.nproc is None:
        return parse_hostfile(arguments.hostfile)
    if not 1 <= arguments.nproc <= _MOST_PROCESSES:
        raise ConfigError(f"--nproc {arguments.nproc}: must be 1 to {_MOST_PROCESSES}")
    return {"localhost": arguments.nproc}


def add_launch_options(parser: argparse._ActionsContainer) -> None:
    """Adds the options of a launch on several hosts."""
    parser.add_argument("--node_rank", type=int, default=0, help="place of this host in the hostfile, counted from 0")
    parser.add_argument("--master_addr", help="the first host (default: as the hostfile names it; 127.0.0.1 if alone)")
    parser.add_argument("--master_port", type=int, default=29500, help="a free port of the first host")


def start(arguments: argparse.Namespace, *, module: bool = False) -> int:
    """Starts the ranks of this host and waits for them; returns the exit status. See `launcher_command`."""
    return exit_status(lambda: Launch(launcher_command(arguments, module=module)).wait())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, one of `config.errors.Status` unless a rank was killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--hostfile", help="hosts and their slots")
    where.add_argument("--nproc", type=int, help="processes on this host, in place of a hostfile")
    add_launch_options(parser)
    parser.add_argument("script", help="mugv_ds/train.py or tools/reference.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    return start(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
