"""Checks every rank's machine before a run: all ranks measure together, and rank 0 names those that fall short."""

import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from mugv_ds.config.console import say
from mugv_ds.config.environment import read_environment
from mugv_ds.config.errors import Status, TrainingError
from mugv_ds.config.run import RunConfig
from mugv_ds.engine.guard.stopping import stop_if_asked
from mugv_ds.engine.guard.watchdog import Watchdog
from mugv_ds.engine.process import Process
from mugv_ds.plan.calibration import calibration_of
from mugv_ds.preflight import state
from mugv_ds.preflight.judge import Expected, Report, judge, lines, table
from mugv_ds.preflight.probes import LABELS, Probes, calibrated_rates

_AT_WORK_SECONDS = 2.0  # of the card, while its clock is read
_MIB = 1 << 20

T = TypeVar("T")


class Writable(Protocol):
    """Where a run's checkpoints go; see `checkpoint.places.Place`."""

    def probe(self, name: str, count: int) -> float: ...


def preflight(config: RunConfig, process: Process, place: Writable) -> None:
    """Checks the machines of all ranks against the bounds of the section preflight. All ranks call it together.

    Between two checks the ranks meet. A rank that hangs in one is named by the watchdog when `preflight.timeout_s` are
    over, and all exit with status 1.

    Args:
        place: where the run's checkpoints go.

    Raises:
        TrainingError: on rank 0, a rank falls short; a line for each says in what. PeerError: on the others.
        Stopped: a rank was asked to stop.
    """
    began, host, local_rank = time.monotonic(), process.host, read_environment().local_rank
    device = process.card or "CPU"
    about = {"host": socket.gethostname(), "local_rank": local_rank, "device": device}
    name = f"rank {process.rank} (host {about['host']}, local rank {local_rank}, {device})"
    timeout = config.preflight.timeout_s
    watchdog = Watchdog(host, name, timeout, mark="check", status=Status.FAILED)
    watchdog.start()
    try:
        hosts = _hosts(host.gather(local_rank))
        found = _Checks(config, process, place, hosts, watchdog).run()
        reports = [Report(**report) for report in host.gather(asdict(Report(**about, **found)))]
    finally:
        watchdog.close()
    seconds = time.monotonic() - began
    host.attempt(lambda: _judge(reports, config, hosts, process.card, seconds) if process.rank == 0 else None)


def _judge(reports: list[Report], config: RunConfig, hosts: list[list[int]], card: str | None, seconds: float) -> None:
    """Prints what was measured; see `preflight` for the errors."""
    calibration, expected = None if card is None else calibration_of(card), Expected()
    if calibration is not None:
        expected = Expected(calibrated_rates(calibration, max(map(len, hosts))), calibration.name)
    against = f"calibration {expected.calibration}" if calibration else "no calibration of this device"
    say(f"preflight: {len(reports)} ranks on {len(hosts)} host{'s' * (len(hosts) > 1)}, {seconds:.0f} s; {against}")
    for line in table(reports, config.preflight, expected):
        say(f"  {line}")
    shortfalls = judge(reports, config.preflight, expected)
    for line in lines(shortfalls, reports):
        say(line, error=True)
    if shortfalls:
        ranks = ", ".join(map(str, sorted({shortfall.rank for shortfall in shortfalls})))
        raise TrainingError(
            f"preflight: rank {ranks}: falls short, see above; leave its host out, or set other bounds in the "
            "section preflight"
        )


def _hosts(local_ranks: list[int]) -> list[list[int]]:
    """The ranks of each host: one begins where the local ranks do."""
    hosts: list[list[int]] = []
    for rank, local in enumerate(local_ranks):
        if local == 0 or not hosts:
            hosts.append([])
        hosts[-1].append(rank)
    return hosts


class _Checks:
    """The checks of one rank, one after the other; what cannot be checked is noted, not raised."""

    def __init__(
        self, config: RunConfig, process: Process, place: Writable, hosts: list[list[int]], watchdog: Watchdog
    ) -> None:
        self._bounds, self._process, self._place, self._watchdog = config.preflight, process, place, watchdog
        self._probes = Probes(process.rank, hosts, process.device)
        self._failed: dict[str, str] = {}
        self._count = 0

    def run(self) -> dict[str, Any]:
        """Returns the fields of a `Report`."""
        device, host = self._process.device, self._process.host
        found = {
            "versions": self._check("versions", state.versions),
            "is_gpu": device.type == "cuda",
            "free_share": self._check("free memory", lambda: state.free_share(device)),
            "rates": {name: self._check(LABELS[name][0], probe) for name, probe in self._probes.all().items()},
            "checkpoint_mib_s": self._check("checkpoint.dir", self._write),
            "ahead_s": self._check("host's clock", lambda: state.clock_ahead(host)),
        }
        found["rates"] = {name: rate for name, rate in found["rates"].items() if rate is not None}
        if (card := self._check("GPU", self._look)) is not None:
            found |= asdict(card)
        return {name: value for name, value in found.items() if value is not None} | {"failed": self._failed}

    def _check(self, name: str, check: Callable[[], T]) -> T | None:
        """What a check returns, once all ranks have come to it; None where it fails."""
        stop_if_asked(self._process.host)
        self._count += 1
        self._watchdog.reached(self._count)
        try:
            return check()
        except Exception as error:  # of driver, library or file system: the report says so
            self._failed[name] = " ".join(str(error).split())[:300] or type(error).__name__
            return None

    def _write(self) -> float:
        count = self._bounds.checkpoint_mib
        return count / self._place.probe(f".preflight-{self._process.rank}", count * _MIB)

    def _look(self) -> state.CardState:
        finish = self._probes.busy(_AT_WORK_SECONDS)
        card = state.look_at(self._process.device, self._bounds.xid_hours)
        finish()
        return card
