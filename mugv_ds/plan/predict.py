"""What is predicted of a run's steps on the machine that it runs on, and of runs that were recorded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mugv_ds.config.errors import InputError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import Shape
from mugv_ds.data.run_data import RunData
from mugv_ds.parallel.layout import Layout
from mugv_ds.plan.calibration import calibration_of
from mugv_ds.plan.cost import Setup, StepTime, sample_cost, step_time
from mugv_ds.plan.levels import fill_device
from mugv_ds.plan.memory import GIB, Memory
from mugv_ds.plan.records import RunRecord
from mugv_ds.plan.steps import Bucket, given_kinds, kinds_of
from mugv_ds.plan.timing import Timing


class Step(NamedTuple):
    """A kind of step. seconds: None where no calibration says. peak_gib: of the fullest device."""

    seconds: float | None
    peak_gib: float


@dataclass(frozen=True)
class Steps:
    """Of a run. by_kind: (stream, shape) → its steps. line: about them, to print."""

    by_kind: dict[tuple[str, Shape], Step]
    line: str


def predict_steps(config: TrainConfig, layout: Layout, data: RunData, card: str) -> Steps:
    """Predicts the steps of a run in bf16. card: name of the device, whose calibration is taken if one is shipped."""
    buckets, setup = _planned(config, layout, data)
    calibration, seconds, why = calibration_of(card), [None] * len(buckets), f"no calibration of {card} is shipped"
    if calibration is not None:
        try:
            timing = Timing(calibration)
            seconds = [step_time(setup, bucket, timing).total for bucket in buckets]
        except InputError as error:
            why = str(error)
    peaks = [setup.largest_memory([bucket]) for bucket in buckets]
    by_kind = {
        (bucket.stream, bucket.shape): Step(s, peak.peak / GIB)
        for bucket, s, peak in zip(buckets, seconds, peaks, strict=True)
    }
    fullest, host = max(peak.peak for peak in peaks) / GIB, max(peak.host for peak in peaks) / GIB
    line = f"predicted: {fullest:.1f} GiB a device, {host:.1f} GiB of host memory a process"
    if None in seconds:
        return Steps(by_kind, f"{line}; no time: {why}")
    mean = sum(bucket.share * s for bucket, s in zip(buckets, seconds, strict=True))
    return Steps(by_kind, f"{line}, {mean:.3g} s a step on average")


def run_levels(
    config: TrainConfig,
    layout: Layout,
    data: RunData,
    *,
    card: str | None,
    memory: float | None,
    keeping: Sequence[str],
) -> tuple[str, ...]:
    """Chooses the level of each block of a run whose recompute level is "auto".

    Args:
        card: name of the device, whose calibration is taken if one is shipped. memory: bytes of it, None where there
            is no bound. keeping: backends of self-attention that give a log-sum-exp on it.
    """
    buckets, setup = _planned(config, layout, data)
    calibration = None if card is None else calibration_of(card)
    return fill_device(config, setup, buckets, memory, calibration and Timing(calibration), keeping)


def predict_host_memory(config: TrainConfig, layout: Layout, data: RunData) -> float:
    """Predicts the bytes of host memory that a process of a run takes at most."""
    buckets, setup = _planned(config, layout, data)
    return max(setup.largest_memory([bucket]).host for bucket in buckets)


def _planned(config: TrainConfig, layout: Layout, data: RunData) -> tuple[list[Bucket], Setup]:
    """Returns the kinds of a run's steps, and how it is trained."""
    cost = sample_cost(config)
    kinds = kinds_of(data.plan, config.schedule.steps)
    buckets = [kind.bucket(config, config.data, cost, layout.data) for kind in kinds]
    return buckets, Setup.of(config, layout, data.typical_shape)


@dataclass(frozen=True)
class Prediction:
    """Of one run that was recorded."""

    time: StepTime
    memory: Memory


def predict_record(record: RunRecord, timing: Timing) -> Prediction:
    """Predicts a run that was recorded.

    Raises:
        InputError: its config cannot be used.
    """
    config = record.train_config().fitted(record.world_size)
    layout = Layout.fit(config.parallel, record.world_size)
    (kind, *_) = given_kinds(config, [record.shape])
    bucket = kind.bucket(config, config.data, sample_cost(config), layout.data)
    setup = Setup.of(config, layout, record.shape)
    return Prediction(step_time(setup, bucket, timing), setup.largest_memory([bucket]))
