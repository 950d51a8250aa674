"""Reads, checks and writes hostfiles: which hosts take part, and with how many slots (processes) each."""

import argparse
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NoReturn

import psutil

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_text_file

MAX_SLOTS = 1024
_MAX_BYTES = 1 << 20
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[0-9]{1,18})")
_HOST = re.compile(r"[A-Za-z0-9._-]+")


class HostfileError(InputError):
    """A hostfile cannot be used for a launch. The message names the file and line, and what is wrong."""


def parse_hostfile(path: str | Path) -> dict[str, int]:
    """Reads lines of the form `host slots=8`; blank lines and `#` comments are skipped.

    It is stricter than DeepSpeed's reader, because host names end up in command lines of ssh and pdsh.

    Returns:
        The slots of each host, in the order of the file, which is the order of the ranks.

    Raises:
        HostfileError: there is no such file, it names no host, or a line is malformed, names a host twice, names one
            that a shell or ssh could take for something else, or has slots outside 1..1024.
    """
    path = Path(path)
    if not path.is_file():
        raise HostfileError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    text = read_text_file(path, _MAX_BYTES, HostfileError)
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        try:
            host, slots = _parse_entry(entry)
        except HostfileError as error:
            raise HostfileError(f"{path}:{number}: {error}") from None
        if host in hosts:
            raise HostfileError(f"{path}:{number}: {host} is listed twice; give all its slots on one line")
        hosts[host] = slots
    if not hosts:
        raise HostfileError(f"{path}: names no host; add a line such as 'localhost slots=2'")
    return hosts


def _parse_entry(entry: str) -> tuple[str, int]:
    """Returns host and slots of one line."""
    match = _LINE.fullmatch(entry)
    if match is None:
        raise HostfileError(f"{entry!r} does not read 'host slots=N'")
    host, slots = match["host"], int(match["slots"])
    if host.startswith("-"):
        raise HostfileError(f"{host!r} starts with '-', which ssh takes for an option")
    if not _HOST.fullmatch(host):
        raise HostfileError(f"{host!r} has characters other than letters, digits, '.', '_' and '-'")
    if not 1 <= slots <= MAX_SLOTS:
        raise HostfileError(f"slots = {slots}: must be 1..{MAX_SLOTS}")
    return host, slots


def check_launcher(world_size: int) -> None:
    """Checks, from inside a training process, the hostfile that its `deepspeed` launcher was given.

    The launcher only warns when that file is missing, and goes on with the local devices. The check passes where no
    launcher is among the parents, as on the remote hosts of a pdsh launch, and where no hostfile was given.

    Args:
        world_size: number of processes of the run.

    Raises:
        HostfileError: the file is missing or bad, or its slots are not `world_size` though no filter was given.
    """
    for parent in psutil.Process().parents():
        try:
            options = read_launcher_command(parent.cmdline())
            folder = parent.cwd() if options else ""
        except psutil.Error:  # gone, or another user's: either way not the launcher, which runs as this user
            continue
        if options:
            _check_options(options, Path(folder), world_size)
            return


@dataclass(frozen=True)
class LauncherOptions:
    """The `deepspeed` launcher's options about hosts.

    Args:
        hostfile: the path as it was given, or None.
        filtered: whether only a part of the hostfile's slots is used.
    """

    hostfile: str | None
    filtered: bool


def read_launcher_command(command: Sequence[str]) -> LauncherOptions | None:
    """Reads the `deepspeed` launcher's options from the command line of a process; None if it is another program's.

    Raises:
        HostfileError: it is the launcher's, with options that the supported version does not have.
    """
    arguments = _launcher_arguments(command)
    if arguments is None:
        return None
    known = _launcher_parser().parse_args(arguments)
    filtered = bool(known.include or known.exclude) or known.num_nodes > 0 or known.num_gpus > 0
    return LauncherOptions(known.hostfile, filtered)


def _check_options(options: LauncherOptions, folder: Path, world_size: int) -> None:
    if options.hostfile is None:
        return
    path = folder / options.hostfile
    slots = sum(parse_hostfile(path).values())
    if slots != world_size and not options.filtered:
        raise HostfileError(f"{path}: has {slots} slots, but {world_size} processes were started")


def _launcher_arguments(command: Sequence[str]) -> Sequence[str] | None:
    """Returns what follows the launcher in `python [flags] …/deepspeed …` or `python -m deepspeed.launcher.runner …`.

    It is None for any other command.
    """
    if not command or not PurePath(command[0]).name.startswith("python"):
        return None
    for index, word in enumerate(command[1:], start=1):
        if PurePath(word).name in ("deepspeed", "ds") or word == "deepspeed.launcher.runner":
            return command[index + 1 :]
        if not word.startswith("-"):  # the program that this Python runs is another one
            return None
    return None


class _LauncherParser(argparse.ArgumentParser):
    """Raises HostfileError where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise HostfileError(f"the command line of the deepspeed launcher: {message}")


def _launcher_parser() -> argparse.ArgumentParser:
    """Returns a parser of all options of DeepSpeed 0.19.8's launcher, to know where the training script's own begin."""
    parser = _LauncherParser(prog="deepspeed", add_help=False)
    parser.add_argument("-H", "--hostfile")
    parser.add_argument("-i", "--include")
    parser.add_argument("-e", "--exclude")
    parser.add_argument("--num_nodes", type=int, default=-1)
    parser.add_argument("--num_gpus", "--num_accelerators", type=int, default=-1)
    for valued in (
        *("--master_port", "--master_addr", "--node_rank", "--launcher", "--launcher_args", "--enable_each_rank_log"),
        *("--autotuning", "--bind_core_list", "--ssh_port", "--venv_script", "--log_level"),
    ):
        parser.add_argument(valued)
    for flag in (
        *("--module", "--no_python", "--no_local_rank", "--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid"),
        "--bind_cores_to_rank",
    ):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("user_script")
    parser.add_argument("user_args", nargs=argparse.REMAINDER)
    return parser


def write_slurm_hostfile(path: str | Path, slots: int | None = None) -> dict[str, int]:
    """Writes the hosts of the current SLURM allocation to `path`, and reads the file back as a check.

    Args:
        path: file to write.
        slots: processes a host; by default SLURM_GPUS_ON_NODE or, in an allocation without GPUs, SLURM_CPUS_ON_NODE.

    Returns:
        The slots of each host, as `parse_hostfile`.

    Raises:
        HostfileError: this is not inside an allocation, the number of slots is not known, `scontrol` fails, the file
            cannot be written, or a host or number is bad.
    """
    given = (os.environ.get(f"SLURM_{what}_ON_NODE") for what in ("GPUS", "CPUS"))
    count = next((number for number in given if number not in (None, "", "0")), None) if slots is None else slots
    if count is None:
        raise HostfileError(
            "neither SLURM_GPUS_ON_NODE nor SLURM_CPUS_ON_NODE is set: run this inside a SLURM allocation (sbatch or "
            "salloc), or give the slots of a host (--slots)"
        )
    lines = [f"{host} slots={count}\n" for host in _slurm_hosts()]
    try:
        Path(path).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise HostfileError(f"{path}: {error.strerror}") from None
    return parse_hostfile(path)


def _slurm_hosts() -> list[str]:
    """Returns the hosts of the current SLURM allocation."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise HostfileError("SLURM_JOB_NODELIST is not set: run this inside a SLURM allocation (sbatch or salloc)")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    except subprocess.CalledProcessError as error:
        raise HostfileError(f"{' '.join(command)}: {error.stderr.strip()}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostfileError(f"{' '.join(command)}: {error}") from None
