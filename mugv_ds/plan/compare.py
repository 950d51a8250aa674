"""Predictions beside measurements: of one run, term by term, and of many that were recorded."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mugv_ds.config.errors import InputError
from mugv_ds.plan.calibration import Calibration
from mugv_ds.plan.cost import level_name
from mugv_ds.plan.memory import GIB
from mugv_ds.plan.predict import predict_record
from mugv_ds.plan.records import KERNELS, REST, RunRecord, kernel_seconds, read_scalars, steady
from mugv_ds.plan.search import Way
from mugv_ds.plan.timing import Timing

# Bounds of relative errors: of step times the median and the worst; of memory how far it may be too high and too low.
TIME_MEDIAN, TIME_WORST, MEMORY_WORST, MEMORY_UNDER = 0.05, 0.10, 0.05, 0.03
CHOICE_WORST = 0.03  # that what would be chosen may be slower than the fastest of all that ran


def compare_run(way: Way, folder: Path) -> Iterator[tuple[str, ...]]:
    """Yields rows that have each part of a prediction beside what a run measured.

    Kernels are of a profiled step (`logging.profile_step`), where the run has one: the seconds in which they ran on one
    device, whether something waited for them or not.

    Args:
        way: as which the run was planned, with one kind of steps. folder: its `logging.dir`.

    Raises:
        InputError: the run has no scalars.
    """
    scalars = {tag: [value for _, value in points] for tag, points in read_scalars(folder).items()}
    if "speed/seconds_per_step" not in scalars:
        raise InputError(f"{folder}: has no speed/seconds_per_step; name the logging.dir of a training run")
    yield "part", "predicted", "measured", "off by"
    yield _row("seconds of a step", way.seconds, steady(scalars["speed/seconds_per_step"]))
    if "memory/peak_gib" in scalars:
        yield _row("GiB of a device", way.memory.peak / GIB, max(scalars["memory/peak_gib"]))
    if "memory/host_gib" in scalars:
        yield _row("GiB of a process on the host", way.memory.host / GIB, max(scalars["memory/host_gib"]))
    yield _row("data, seconds of a step", way.terms["data"], steady(scalars["speed/data_wait_seconds"]))
    profiles = sorted(folder.glob("profile_step_*.json.gz"))
    measured = kernel_seconds(profiles[-1]) if profiles else {}
    predicted = kernels_predicted(way)
    for name in dict.fromkeys([*(kind for kind, _ in KERNELS), REST]):
        if measured or predicted.get(name):
            yield _row(f"{name}, seconds", predicted.get(name, 0.0), measured.get(name) if measured else None)
    if "pipeline bubble" in way.terms:
        yield _row("pipeline bubble, seconds", way.terms["pipeline bubble"], None)


def kernels_predicted(way: Way) -> dict[str, float]:
    """Returns the seconds that kernels are predicted to run, by the names of `records.KERNELS`."""
    terms, (time, *_) = way.terms, way.times
    names = ("products", "attention forward", "attention backward", "kernels", "exchange", "optimizer")
    kernels = {name: terms.get(name, 0.0) for name in names}
    kernels["reduction and gather"] = sum(terms[name] + time.hidden[name] for name in ("reduction", "gather"))
    kernels["offload"] = terms["offload"] + time.hidden["offload"] + terms["data"]
    return kernels


def _row(name: str, predicted: float, measured: float | None) -> tuple[str, ...]:
    if measured is None:
        return name, f"{predicted:.4g}", "", ""
    off = f"{predicted / measured - 1:+.1%}" if measured else ""
    return name, f"{predicted:.4g}", f"{measured:.4g}", off


@dataclass(frozen=True)
class Held:
    """A record and what was predicted of it: seconds of a step, GiB of a device and of a process on the host."""

    record: RunRecord
    seconds: float
    gib: float
    host_gib: float

    @property
    def time_error(self) -> float:
        """Returns the relative error of the step's seconds."""
        return self.seconds / self.record.measured.step_seconds - 1

    @property
    def memory_error(self) -> float | None:
        """Returns the relative error of the device's memory; None where it was not measured."""
        peak = self.record.measured.peak_gib
        return None if peak is None else self.gib / peak - 1


def hold(records: Sequence[RunRecord], calibrations: Sequence[Calibration]) -> list[Held]:
    """Predicts every record by the calibration of its card, in the records' order.

    Raises:
        InputError: there is none of its card.
    """
    timings = {calibration.machine.device: Timing(calibration) for calibration in calibrations}
    held = []
    for record in records:
        if record.machine.device not in timings:
            raise InputError(f"record {record.name}: ran on {record.machine.device}, of which there is no calibration")
        prediction = predict_record(record, timings[record.machine.device])
        held.append(Held(record, prediction.time.total, prediction.memory.peak / GIB, prediction.memory.host / GIB))
    return held


def broken(held: Sequence[Held]) -> list[str]:
    """Says which bounds the predictions break."""
    times = [abs(one.time_error) for one in held]
    found = []
    if statistics.median(times) > TIME_MEDIAN:
        found.append(f"step time: off by {statistics.median(times):.1%} in the median, more than {TIME_MEDIAN:.0%}")
    for one in held:
        if abs(one.time_error) > TIME_WORST:
            found.append(f"{one.record.name}: step time off by {one.time_error:+.1%}, more than {TIME_WORST:.0%}")
        if one.memory_error is not None and not -MEMORY_UNDER <= one.memory_error <= MEMORY_WORST:
            found.append(
                f"{one.record.name}: memory off by {one.memory_error:+.1%}, not within −{MEMORY_UNDER:.0%} and "
                f"+{MEMORY_WORST:.0%}"
            )
    for taken, best in choices(held):
        slower = taken.record.measured.step_seconds / best.record.measured.step_seconds - 1
        if slower > CHOICE_WORST:
            found.append(f"{taken.record.name} would be chosen, and is {slower:.1%} slower than {best.record.name}")
    return found


def choices(held: Sequence[Held]) -> list[tuple[Held, Held]]:
    """Returns, of runs of the same work in several ways, the one that the planner would choose and the fastest.

    The same work is the same model, samples and GPUs; there have to be three ways at least.
    """
    groups: dict[str, list[Held]] = {}
    for one in held:
        config = one.record.train_config()
        work = config.model, config.data.global_batch_size, one.record.shape, one.record.world_size, config.ema
        groups.setdefault(repr(work), []).append(one)
    return [
        (min(group, key=lambda one: one.seconds), min(group, key=lambda one: one.record.measured.step_seconds))
        for group in groups.values()
        if len(group) > 2
    ]


def markdown(held: Sequence[Held]) -> Iterator[str]:
    """Yields the table of docs/planning.md."""
    yield (
        "| run | GPUs | data × sequence × pipeline | level | blocks | tokens | micro × accumulation | s/step "
        "| predicted | off by | GiB | predicted | off by | host GiB | predicted |"
    )
    yield "|---" * 15 + "|"
    for one in held:
        record, measured = one.record, one.record.measured
        config = record.train_config()
        parallel, dit = config.parallel, config.model.dit()
        data = record.world_size // parallel.sequence // parallel.pipeline
        offload = "" if parallel.offload == "none" else f" + {parallel.offload}"
        micro = config.data.micro_batch_size
        cells = (
            record.name,
            str(record.world_size),
            f"{data} × {parallel.sequence} × {parallel.pipeline}",
            level_name(parallel.levels(dit.depth)) + offload,
            str(dit.depth),
            f"{record.tokens:,}",
            f"{micro} × {config.data.global_batch_size // micro // data}",
            f"{measured.step_seconds:.3f}",
            f"{one.seconds:.3f}",
            f"{one.time_error:+.1%}",
            "–" if measured.peak_gib is None else f"{measured.peak_gib:.1f}",
            f"{one.gib:.1f}",
            "–" if one.memory_error is None else f"{one.memory_error:+.1%}",
            "–" if measured.host_gib is None else f"{measured.host_gib:.1f}",
            f"{one.host_gib:.1f}",
        )
        yield f"| {' | '.join(cells)} |"
    times = [abs(one.time_error) for one in held]
    memory = [one.memory_error for one in held if one.memory_error is not None]
    yield ""
    yield (
        f"Step time: off by {statistics.median(times):.1%} in the median and {max(times):.1%} at worst; memory: from "
        f"{min(memory):+.1%} to {max(memory):+.1%}."
    )
    for taken, best in choices(held):
        slower = taken.record.measured.step_seconds / best.record.measured.step_seconds - 1
        yield f"Of the ways to do the work of {best.record.name} {taken.record.name} is chosen: {slower:+.1%}."
