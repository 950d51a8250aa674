"""What there is to know of a rank without timing anything: versions, its card's state, memory, its host's clock."""

import errno
import hashlib
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

import mugv_ds
import mugv_kernels

_SMI_SECONDS = 20.0  # that nvidia-smi may take
# What is asked of nvidia-smi, and what each answer is called here.
_QUERIES = {
    "driver_version": "driver",
    "clocks.sm": "clock_mhz",
    "ecc.errors.uncorrected.volatile.total": "ecc_errors",
    "clocks_event_reasons.hw_slowdown": "slowed",
    "pci.bus_id": "place",
}
KMSG = Path("/dev/kmsg")
_KMSG_RECORD = 1 << 13  # bytes; the kernel hands over one record a read
_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)")
# Those that a program's own faults cause (NVIDIA, "Xid Errors": illegal accesses, and the end of what made them).
_OF_PROGRAMS = {13, 31, 43, 45}
_CLOCK_ROUNDS = 5


class Host(Protocol):
    """Collectives of all ranks on the host; see `engine.process.HostGroup`."""

    rank: int

    def gather(self, value: Any) -> list[Any]: ...


def versions() -> dict[str, str]:
    """Returns what has to be the same on all ranks; `code` is a digest of this package's own source."""
    found = {"python": platform.python_version(), "mugv_ds": mugv_ds.__version__, "code": code_digest()}
    found |= {name: _installed(name) for name in ("torch", "deepspeed", "triton")}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def code_digest() -> str:
    """Returns the first 12 digits of SHA-256 over the Python files of the package and its kernels."""
    digest = hashlib.sha256()
    for package in (mugv_ds, mugv_kernels):
        folder = Path(package.__file__).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def free_share(device: torch.device) -> float:
    """Returns the share of the device's memory that is free; on a CPU, that which programs could have."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free / total
    memory = psutil.virtual_memory()
    return memory.available / memory.total


def clock_ahead(host: Host, now: Callable[[], float] = time.time) -> float:
    """Returns the seconds that this rank's clock is ahead of the median rank's. All ranks call it together.

    All read their clocks when they have heard of one another; of some rounds the smallest difference counts, so that a
    rank that was held up for a moment is not taken for one whose clock is wrong.
    """
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        host.gather(None)
        times = host.gather(now())
        rounds.append(times[host.rank] - sorted(times)[(len(times) - 1) // 2])
    return min(rounds, key=abs)


@dataclass(frozen=True)
class CardState:
    """Of a GPU. card: what nvidia-smi says. xids: errors of it. unchecked: what could not be looked at."""

    card: dict[str, str]
    xids: tuple[int, ...]
    unchecked: tuple[str, ...]


def look_at(device: torch.device, xid_hours: float) -> CardState:
    """Reads what driver and kernel say of a GPU; its clock is that of now, so it should be busy.

    Args:
        xid_hours: age of the Xid errors that count; see `recent_xids`.
    """
    if device.type != "cuda":
        return CardState({}, (), ("GPU clock, ECC and Xid errors: there is no GPU",))
    try:
        known = ask_driver(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (OSError, subprocess.SubprocessError) as error:
        return CardState({}, (), (f"GPU clock, ECC and Xid errors: nvidia-smi: {error}",))
    unchecked = [f"{name}: the card does not say" for name, value in known.items() if "N/A" in value]
    xids: list[int] = []
    try:
        xids = recent_xids(known.pop("place"), xid_hours)
    except OSError as error:
        unchecked.append(f"Xid errors: {KMSG}: {error.strerror}")
    known = {name: value for name, value in known.items() if "N/A" not in value}
    return CardState(known, tuple(xids), tuple(unchecked))


def ask_driver(uuid: str) -> dict[str, str]:
    """Returns what nvidia-smi says of a card, by the names of `_QUERIES`.

    Raises:
        OSError: there is no nvidia-smi. SubprocessError: it failed, or took too long.
    """
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SMI_SECONDS)
    return dict(zip(_QUERIES.values(), (cell.strip() for cell in done.stdout.split(",")), strict=True))


def recent_xids(place: str, hours: float, log: Sequence[str] | None = None) -> list[int]:
    """Returns the numbers of the Xid errors that the kernel has logged of a card, but those that programs cause.

    Args:
        place: of the card, as nvidia-smi has it, such as 00000000:1B:00.0. hours: age at most.
        log: records in place of the kernel's.

    Raises:
        OSError: the kernel's log cannot be read.
    """
    oldest = (time.clock_gettime(time.CLOCK_MONOTONIC) - hours * 3600) * 1e6  # microseconds since the host started
    domain_and_bus = place.lower().rpartition(":")[0][-7:]  # the kernel's names have four digits of the domain
    found = []
    for record in kernel_log() if log is None else log:
        match = _XID.search(record)
        if match is None or float(record.split(",")[2]) < oldest:
            continue
        if match[1].lower().startswith(domain_and_bus) and int(match[2]) not in _OF_PROGRAMS:
            found.append(int(match[2]))
    return found


def kernel_log() -> list[str]:
    """Returns the records of the kernel's log, "priority,sequence,microseconds,flags;text".

    Raises:
        OSError: it cannot be read.
    """
    records, descriptor = [], os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                records.append(os.read(descriptor, _KMSG_RECORD).decode(errors="replace"))
            except BlockingIOError:  # that was the last
                return records
            except OSError as error:
                if error.errno != errno.EPIPE:  # else this one was overwritten; the next read has the oldest left
                    raise
    finally:
        os.close(descriptor)
