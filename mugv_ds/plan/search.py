"""Finds the fastest way to train a config on some number of GPUs: every layout, level and micro-batch that is legal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.schema import DataSection, TrainConfig
from mugv_ds.data.run_data import Cost
from mugv_ds.models.flops import card_peak_tflops, step_flops
from mugv_ds.parallel.layout import Layout
from mugv_ds.plan.cost import Setup, StepTime, sample_cost, step_time
from mugv_ds.plan.describe import typical_shape
from mugv_ds.plan.levels import fill_device, usable_levels
from mugv_ds.plan.memory import GIB, MARGIN, Memory, usable_bytes
from mugv_ds.plan.steps import Bucket, Kind
from mugv_ds.plan.timing import Timing

# (parallel.activation_checkpointing, parallel.offload), from what keeps the most on the device to what keeps the least.
LEVELS = (
    ("off", "none"),
    ("light", "none"),
    ("selective", "none"),
    ("attention", "none"),
    ("attention", "attention_output"),
    ("attention", "all"),
    ("full", "none"),
)
_MOST_MICRO = 64  # samples (or pairs) of a micro-batch
_MULTIPLES = (1, 2, 3, 4, 6, 8)  # of the longest sample's tokens on a device, that `device_tokens` may be
_MORE_GPUS = 1 << 16  # at which the search for what would fit ends
_ALIKE = 0.002  # share of a step's time below which two ways are taken to be equally fast
SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class Limits:
    """What there is.

    Attributes:
        device: bytes of a device. host: bytes of host memory for each device.
    """

    device: float
    host: float

    @classmethod
    def of(cls, timing: Timing, device: float | None = None, host: float | None = None) -> "Limits":
        """Returns those of the calibrated machine. device, host: bytes that take the place of its own."""
        machine = timing.calibration.machine
        return cls(device or machine.memory_bytes, host or machine.host_memory_bytes / machine.devices)

    def hold(self, memory: Memory, devices: int) -> bool:
        """Whether one of so many devices and its part of the host hold this."""
        return memory.peak <= usable_bytes(self.device, devices) and memory.host * (1 + MARGIN) <= self.host


@dataclass(frozen=True)
class Way:
    """One way to train: a setup and its micro-batches, and what is predicted of it.

    Attributes:
        data: the config's section, with what the micro-batches take. buckets: kinds of steps.
        memory: of the device that holds the most. does_fit: whether there is as much. timing: of the machine.
    """

    setup: Setup
    data: DataSection = field(repr=False)
    buckets: tuple[Bucket, ...]
    memory: Memory
    does_fit: bool
    timing: Timing = field(repr=False)

    @cached_property
    def times(self) -> tuple[StepTime, ...]:
        """Returns the seconds of each kind of step."""
        return tuple(step_time(self.setup, bucket, self.timing) for bucket in self.buckets)

    @cached_property
    def seconds(self) -> float:
        """Returns those of the mean step."""
        return sum(bucket.share * time.total for bucket, time in zip(self.buckets, self.times, strict=True))

    @cached_property
    def terms(self) -> dict[str, float]:
        """Returns the seconds of the mean step by part."""
        sums: dict[str, float] = {}
        for bucket, time in zip(self.buckets, self.times, strict=True):
            for name, seconds in time.terms.items():
                sums[name] = sums.get(name, 0.0) + bucket.share * seconds
        return sums

    @property
    def asked_level(self) -> str:
        """Returns what the config has to ask for to get these levels."""
        return self.setup.levels[0] if len(set(self.setup.levels)) == 1 else "auto"

    @property
    def name(self) -> str:
        """Returns the layout and the level in words."""
        layout = self.setup.layout
        offload = "" if self.setup.offload == "none" else f" + offload {self.setup.offload}"
        return (
            f"data {layout.data} × sequence {layout.sequence} × pipeline {layout.pipeline}, {self.setup.level}{offload}"
        )

    @property
    def micro(self) -> str:
        """Returns the micro-batches, and how many of them a step has, of all shapes."""
        sizes = dict.fromkeys(f"{bucket.micro} × {bucket.accumulation}" for bucket in self.buckets)
        return ", ".join(list(sizes)[:3]) + ", …" * (len(sizes) > 3)

    def settings(self, config: TrainConfig) -> list[str]:
        """Returns the overrides that make a config train this way, as `--set` takes them; none that change nothing."""
        layout, data = self.setup.layout, self.data
        values = {
            "parallel.data": (config.fitted(layout.world_size).parallel.data, layout.data),
            "parallel.sequence": (config.parallel.sequence, layout.sequence),
            "parallel.pipeline": (config.parallel.pipeline, layout.pipeline),
            "parallel.activation_checkpointing": (config.parallel.activation_checkpointing, self.asked_level),
            "parallel.offload": (config.parallel.offload, self.setup.offload),
            "data.micro_batch_size": (config.data.micro_batch_size, data.micro_batch_size),
        }
        if data.budget is not None:
            values["data.budget.device_tokens"] = (config.data.budget.device_tokens, data.budget.device_tokens)
        return [f"{key}={value}" for key, (before, value) in values.items() if value != before]


class Figures(NamedTuple):
    """What a way gives. mfu: None for a card of unknown peak. days: to the config's last step."""

    step_seconds: float
    tokens_per_second: float
    samples_per_second: float
    mfu: float | None
    days: float
    gpu_hours: float
    money: float | None


@dataclass(frozen=True)
class Search:
    """What was found for one number of GPUs.

    Attributes:
        ways: all that are legal, the fastest first: with the averages and gradients that the config asks for.
        others: the fastest that fits only with fewer averages or with bf16 gradients, by what is different.
        refused: how many layouts are not legal, by why.
    """

    gpus: int
    ways: tuple[Way, ...]
    others: dict[str, Way]
    refused: dict[str, int]

    @cached_property
    def fitting(self) -> tuple[Way, ...]:
        return tuple(way for way in self.ways if way.does_fit)

    @property
    def best(self) -> Way | None:
        """Returns the fastest that fits; of those as fast as it, one without offload, and with memory to spare."""
        if not self.fitting:
            return None
        limit = self.fitting[0].seconds * (1 + _ALIKE)
        alike = (way for way in self.fitting if way.seconds <= limit)
        return min(alike, key=lambda way: (way.setup.offload != "none", way.memory.peak))


class Planner:
    """Plans a config.

    Args:
        config: the run. kinds: of its steps. timing: of the machine. limits: of its memory.
    """

    def __init__(self, config: TrainConfig, kinds: Sequence[Kind], timing: Timing, limits: Limits) -> None:
        if config.model.precision != "bf16":
            raise InputError(f'model.precision = "{config.model.precision}": only bf16 is planned; set it to bf16')
        self.config, self.kinds, self.timing, self.limits = config, kinds, timing, limits
        self._cost: Cost = sample_cost(config)
        self._base = Setup.of(config, Layout(), typical_shape(kinds, self._cost.cost))
        self._buckets: dict[tuple, tuple[Bucket, ...]] = {}

    def search(self, gpus: int) -> Search:
        """Looks at every legal way to use so many GPUs.

        Raises:
            InputError: the calibration does not say how devices exchange.
        """
        ways, others, refused = [], {}, {}
        own = self._base.averages, self._base.gradients
        for layout in layouts(self._base.dit.num_heads, self._base.dit.depth, gpus):
            options = list(self._options(layout, refused))
            for levels, offload in self._levels():
                setup = replace(self._base, layout=layout, levels=levels, offload=offload)
                for data, buckets in options:
                    ways.append(self._way(setup, data, buckets))
                    for averages, gradients in self._variants() if not ways[-1].does_fit else ():
                        less = self._way(replace(setup, averages=averages, gradients=gradients), data, buckets)
                        name = _difference(averages, gradients, own)
                        if less.does_fit and (name not in others or less.seconds < others[name].seconds):
                            others[name] = less
            for data, buckets in options:
                mixed = self._way(self._filled(replace(self._base, layout=layout), buckets), data, buckets)
                if mixed.asked_level == "auto":
                    ways.append(mixed)
        ways.sort(key=lambda way: (way.seconds, way.memory.peak, way.name))
        return Search(gpus, tuple(_one_of_each(ways)), others, refused)

    def as_set(self, gpus: int) -> Way:
        """Returns the way that the config itself asks for on so many GPUs.

        Raises:
            ConfigError: it cannot run on so many.
        """
        config = self.config.fitted(gpus)
        layout = Layout.fit(config.parallel, gpus)
        setup = replace(self._base, layout=layout, offload=config.parallel.offload)
        costs = replace(self._cost, sequence=layout.sequence)
        buckets = tuple(kind.bucket(config, config.data, costs, layout.data) for kind in self.kinds)
        if config.parallel.activation_checkpointing == "auto":
            setup = self._filled(setup, buckets)
        return self._way(setup, config.data, buckets)

    def _filled(self, setup: Setup, buckets: tuple[Bucket, ...]) -> Setup:
        """Returns the setup with the levels of "auto"."""
        return replace(setup, levels=fill_device(self.config, setup, buckets, self.limits.device, self.timing))

    def _way(self, setup: Setup, data: DataSection, buckets: tuple[Bucket, ...]) -> Way:
        memory = setup.largest_memory(buckets)
        does_fit = self.limits.hold(memory, setup.layout.world_size)
        return Way(setup, data, buckets, memory, does_fit, self.timing)

    def _levels(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Those that the config's attention can run, the same for all blocks; and what is offloaded with them."""
        usable = usable_levels(self.config)
        for level, offload in LEVELS:
            if level in usable:
                yield (level,) * self._base.dit.depth, offload

    def _variants(self) -> Iterator[tuple[int, str]]:
        """(averages, gradients) that take less than what the config has."""
        averages = self._base.averages
        if self._base.gradients == "fp32":
            yield averages, "bf16"
        if averages:
            yield 0, self._base.gradients

    def _options(self, layout: Layout, refused: dict[str, int]) -> Iterator[tuple[DataSection, tuple[Bucket, ...]]]:
        """Yields the micro-batches that a layout can have, each once: the section that asks for them, and the steps."""
        seen, reasons = set(), {}
        for data in self._sections(layout):
            costs = replace(self._cost, sequence=layout.sequence)
            try:
                buckets = tuple(kind.bucket(self.config, data, costs, layout.data) for kind in self.kinds)
            except ConfigError as error:
                reasons[str(error)] = None
                continue
            sizes = tuple(bucket.micro for bucket in buckets)
            if sizes not in seen:
                seen.add(sizes)
                if data.budget is not None:  # no larger a bound than it takes
                    most = max(self.config.data.micro_batch_size, *sizes)
                    data = data.model_copy(update={"micro_batch_size": most})
                yield data, buckets
        if not seen and reasons:
            why = next(iter(reasons)).split(":")[0]
            refused[why] = refused.get(why, 0) + 1

    def _sections(self, layout: Layout) -> Iterator[DataSection]:
        """Yields data sections that differ in what sets the micro-batches, that of the config first."""
        data = self.config.data
        yield data
        item = max(kind.item_size for kind in self.kinds)
        if data.budget is None:
            for micro in range(item, item * _MOST_MICRO + 1, item):
                if data.global_batch_size % (micro * layout.data) == 0:
                    yield data.model_copy(update={"micro_batch_size": micro})
            return
        costs = replace(self._cost, sequence=layout.sequence)
        longest = max(kind.item_size * costs.tokens(kind.shape) for kind in self.kinds)
        for tokens in sorted({longest * times for times in _MULTIPLES}):
            budget = data.budget.model_copy(update={"device_tokens": tokens})
            yield data.model_copy(update={"budget": budget, "micro_batch_size": item * _MOST_MICRO})

    def figures(self, way: Way, price: float | None = None) -> Figures:
        """Returns what a way gives. price: of a GPU hour."""
        gpus, steps = way.setup.layout.world_size, self.config.schedule.steps
        samples = sum(b.share * (b.samples + b.companions) for b in way.buckets)
        tokens = sum(b.share * (b.samples + b.companions) * b.tokens for b in way.buckets)
        flops = sum(
            b.share
            * step_flops(self.config, b.shape, samples=b.samples + b.companions, companions=b.companions).model_flops
            for b in way.buckets
        )
        peak = self.config.logging.peak_tflops or card_peak_tflops(self.timing.calibration.machine.device)
        hours = steps * way.seconds / 3600 * gpus
        return Figures(
            step_seconds=way.seconds,
            tokens_per_second=tokens / way.seconds,
            samples_per_second=samples / way.seconds,
            mfu=None if peak is None else flops / way.seconds / gpus / peak / 1e12,
            days=steps * way.seconds / SECONDS_PER_DAY,
            gpu_hours=hours,
            money=None if price is None else hours * price,
        )

    def what_would_fit(self, search: Search) -> list[str]:
        """Says what would fit, where nothing does."""
        lines = []
        if search.ways:
            least = min(search.ways, key=lambda way: max(way.memory.peak, 0.0))
            lines.append(
                f"the least that {search.gpus} GPUs can do with is {least.memory.peak / GIB:.1f} GiB a device and "
                f"{least.memory.host / GIB:.1f} GiB of host memory for each ({least.name}); there are "
                f"{usable_bytes(self.limits.device, search.gpus) / GIB:.1f} and "
                f"{self.limits.host / GIB / (1 + MARGIN):.1f}"
            )
        lines += [
            f"{name}: {way.name} fits, {way.memory.peak / GIB:.1f} GiB a device" for name, way in search.others.items()
        ]
        gpus = search.gpus
        while not lines[1:] and gpus < _MORE_GPUS:
            gpus *= 2
            more = self.search(gpus)
            if more.best is not None:
                lines.append(f"{gpus} GPUs: {more.best.name} fits, {more.best.memory.peak / GIB:.1f} GiB a device")
        return lines or [f"no layout of {search.gpus} GPUs is legal: {', '.join(search.refused)}"]


def layouts(heads: int, depth: int, gpus: int) -> Iterator[Layout]:
    """Yields all layouts of so many GPUs: sequence ranks divide the heads, and each stage has a block."""
    for sequence in (n for n in range(1, heads + 1) if heads % n == 0 and gpus % n == 0):
        for pipeline in (n for n in range(1, depth + 1) if gpus // sequence % n == 0):
            yield Layout(gpus // sequence // pipeline, sequence, pipeline)


def _difference(averages: int, gradients: str, own: tuple[int, str]) -> str:
    changed = ["no averages of the weights"] if averages != own[0] else []
    return ", ".join(changed + ([f"gradients accumulated in {gradients}"] if gradients != own[1] else []))


def _one_of_each(ways: Sequence[Way]) -> Iterator[Way]:
    """Of ways that differ in their micro-batches alone, the fastest that fits, or else the one that takes the least."""
    chosen: dict[tuple, Way] = {}
    for way in ways:
        key = way.setup.layout, way.asked_level, way.setup.offload
        before = chosen.get(key)
        if before is None or (not before.does_fit and (way.does_fit or way.memory.peak < before.memory.peak)):
            chosen[key] = way
    return iter(sorted(chosen.values(), key=lambda way: (way.seconds, way.memory.peak, way.name)))


def why_slower(way: Way, best: Way) -> str:
    """Says which parts of a step make a way slower than the best, the largest first."""
    names = dict.fromkeys((*best.terms, *way.terms))
    more = {name: way.terms.get(name, 0.0) - best.terms.get(name, 0.0) for name in names}
    total = way.seconds - best.seconds
    largest = sorted((name for name in more if more[name] > 0.1 * abs(total)), key=lambda name: -more[name])[:3]
    parts = ", ".join(f"{name} {more[name]:+.3g} s" for name in largest) or "as fast"
    return f"{way.seconds / best.seconds - 1:+.1%}: {parts}"


def gpus_around(gpus: int) -> list[int]:
    """Returns the numbers of GPUs that throughput is shown for: this one, divided and multiplied by powers of two."""
    return sorted({gpus, *(gpus >> n for n in range(1, 4) if gpus % (1 << n) == 0), 2 * gpus})
