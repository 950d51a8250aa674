"""Which ranks fall short of what is expected, and by how much: pure functions of what all ranks found."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mugv_ds.config.operation_schema import PreflightSection
from mugv_ds.preflight.probes import LABELS


@dataclass(frozen=True)
class Report:
    """What one rank found, of JSON types.

    Attributes:
        host, local_rank, device: where it runs.
        versions: see `state.versions`. free_share, is_gpu: of its device's memory. ahead_s: see `state.clock_ahead`.
        card, xids, unchecked: see `state.CardState`.
        rates: by the names of `probes.LABELS`, larger is better. checkpoint_mib_s: of its writing to checkpoint.dir.
        failed: check → why it could not be made.
    """

    host: str
    local_rank: int
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    is_gpu: bool = False
    free_share: float = 1.0
    ahead_s: float = 0.0
    card: Mapping[str, str] = field(default_factory=dict)
    xids: Sequence[int] = ()
    unchecked: Sequence[str] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    checkpoint_mib_s: float | None = None
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shortfall:
    """A rank that falls short in one check. text: by how much."""

    rank: int
    check: str
    text: str


@dataclass(frozen=True)
class Expected:
    """What rates are compared with. calibrated: by name. calibration: where these are from; None: nowhere."""

    calibrated: Mapping[str, float] = field(default_factory=dict)
    calibration: str | None = None

    def against(self, name: str, rates: Mapping[int, float]) -> tuple[float, str]:
        """Returns what a rate of the ranks is compared with, and what that is called."""
        if name in self.calibrated:
            return self.calibrated[name], "calibrated"
        return statistics.median_high(rates.values()), "median"


def judge(reports: Sequence[Report], bounds: PreflightSection, expected: Expected) -> list[Shortfall]:
    """Returns what falls short, in the order of the checks."""
    return [
        *_failures(reports),
        *_odd_versions(reports),
        *_slow(reports, bounds, expected),
        *_of_cards(reports, bounds),
        *_of_hosts(reports, bounds),
    ]


def _failures(reports: Sequence[Report]) -> Iterator[Shortfall]:
    for rank, report in enumerate(reports):
        for check, why in report.failed.items():
            yield Shortfall(rank, check, f"failed: {why}")


def _odd_versions(reports: Sequence[Report]) -> Iterator[Shortfall]:
    """Compares versions with those of most ranks, and of rank 0 where there is no majority."""
    of_ranks = [{**report.versions, "driver": report.card.get("driver", "none")} for report in reports]
    for name in sorted({name for versions in of_ranks for name in versions}):
        found = [versions.get(name, "none") for versions in of_ranks]
        usual = Counter(found).most_common(1)[0][0]
        for rank, own in enumerate(found):
            if own != usual:
                yield Shortfall(rank, f"version of {name}", f"{own}, where others have {usual}")


def rates_of(name: str, reports: Sequence[Report]) -> dict[int, float]:
    """Returns what the ranks measured of one kind, by rank."""
    return {rank: report.rates[name] for rank, report in enumerate(reports) if name in report.rates}


def _slow(reports: Sequence[Report], bounds: PreflightSection, expected: Expected) -> Iterator[Shortfall]:
    for name, (label, unit) in LABELS.items():
        if not (rates := rates_of(name, reports)):
            continue
        against, kind = expected.against(name, rates)
        least = getattr(bounds, f"{kind}_share")
        for rank, rate in rates.items():
            if rate < least * against:
                yield Shortfall(
                    rank,
                    label,
                    f"{rate:.3g} {unit}, {rate / against:.2f} × the {kind} {against:.3g} {unit}, less than "
                    f"preflight.{kind}_share = {least:g}",
                )
    for rank, report in enumerate(reports):
        rate, least = report.checkpoint_mib_s, bounds.checkpoint_mib_s
        if rate is not None and rate < least:
            yield Shortfall(
                rank, "checkpoint.dir", f"{rate:.3g} MiB/s, less than preflight.checkpoint_mib_s = {least:g}"
            )


def _of_cards(reports: Sequence[Report], bounds: PreflightSection) -> Iterator[Shortfall]:
    known = {rank: report.card["clock_mhz"] for rank, report in enumerate(reports) if "clock_mhz" in report.card}
    clocks = {rank: float(mhz) for rank, mhz in known.items()}
    usual = statistics.median_high(clocks.values()) if clocks else 0.0
    for rank, report in enumerate(reports):
        if clocks.get(rank, usual) < bounds.median_share * usual:
            text = f"{clocks[rank]:.0f} MHz at work, {clocks[rank] / usual:.2f} × the median {usual:.0f} MHz"
            yield Shortfall(rank, "GPU clock", f"{text}, less than preflight.median_share = {bounds.median_share:g}")
        if report.card.get("slowed") == "Active":
            yield Shortfall(rank, "GPU clock", "the hardware slows it down, for heat or power; see nvidia-smi -q")
        if int(report.card.get("ecc_errors", 0)):
            yield Shortfall(rank, "ECC errors", f"{report.card['ecc_errors']} uncorrected; reset or replace the GPU")
        if report.xids:
            numbers = ", ".join(map(str, sorted(set(report.xids))))
            yield Shortfall(rank, "Xid errors", f"{numbers} in the last {bounds.xid_hours:g} h, in the kernel's log")
        if report.is_gpu and report.free_share < bounds.free_memory_share:
            text = f"{report.free_share:.0%} free, less than preflight.free_memory_share = {bounds.free_memory_share:g}"
            yield Shortfall(rank, "GPU memory", f"{text}; another process uses it")


def _of_hosts(reports: Sequence[Report], bounds: PreflightSection) -> Iterator[Shortfall]:
    for rank, report in enumerate(reports):
        if abs(report.ahead_s) > bounds.clock_skew_s:
            side = "ahead of" if report.ahead_s > 0 else "behind"
            text = f"{abs(report.ahead_s):.3g} s {side} the median rank's, more than preflight.clock_skew_s"
            yield Shortfall(rank, "host's clock", f"{text} = {bounds.clock_skew_s:g}")


def lines(shortfalls: Sequence[Shortfall], reports: Sequence[Report]) -> Iterator[str]:
    """Yields a line for each check that ranks of one host fall short in, with the first one's numbers."""
    together: dict[tuple[str, str], list[Shortfall]] = {}
    for shortfall in shortfalls:
        together.setdefault((reports[shortfall.rank].host, shortfall.check), []).append(shortfall)
    for (host, check), found in together.items():
        first = reports[found[0].rank]
        where = f"host {host}, local rank {first.local_rank}, {first.device}"
        more = f"; so do ranks {', '.join(str(other.rank) for other in found[1:])} of this host" if found[1:] else ""
        yield f"rank {found[0].rank} ({where}) falls short: {check}: {found[0].text}{more}"


def table(reports: Sequence[Report], bounds: PreflightSection, expected: Expected) -> list[str]:
    """Returns the lines of a table of what was measured, and then what could not be checked."""
    rows = [("check", "slowest", "of rank", "median", "at least", "")]
    for name, (label, unit) in LABELS.items():
        if rates := rates_of(name, reports):
            against, kind = expected.against(name, rates)
            least = f"{getattr(bounds, f'{kind}_share'):g} × {kind} {against:.3g}"
            rows.append(_row(label, rates, least, unit))
    written = {
        rank: report.checkpoint_mib_s for rank, report in enumerate(reports) if report.checkpoint_mib_s is not None
    }
    if written:
        rows.append(_row("checkpoint.dir", written, f"{bounds.checkpoint_mib_s:g}", "MiB/s"))
    free = {rank: 100 * report.free_share for rank, report in enumerate(reports)}
    rows.append(_row("free memory", free, f"{100 * bounds.free_memory_share:g}" if reports[0].is_gpu else "–", "%"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    unchecked = Counter(text for report in reports for text in report.unchecked)
    return [*shown, *(f"not checked on {count} of {len(reports)} ranks: {text}" for text, count in unchecked.items())]


def _row(label: str, rates: Mapping[int, float], least: str, unit: str) -> tuple[str, ...]:
    worst = min(rates, key=rates.__getitem__)
    median = statistics.median_high(rates.values())
    return label, f"{rates[worst]:.3g}", str(worst), f"{median:.3g}", least, unit
