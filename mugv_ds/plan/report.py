"""A plan as lines for a terminal and as JSON."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mugv_ds.plan.calibration import Calibration
from mugv_ds.plan.memory import GIB
from mugv_ds.plan.search import Planner, Search, Way, why_slower
from mugv_ds.plan.timing import Cluster

TOP = 8  # ways that are shown
_FASTER = 3  # that are shown of those that do not fit


@dataclass(frozen=True)
class Plan:
    """What was asked and what was found.

    Attributes:
        config: name of its file. planner: of it. search: for the number of GPUs.
        others: the same for other numbers of GPUs. price: of a GPU hour. missing: manifests that are not there.
    """

    config: str
    planner: Planner
    search: Search
    others: tuple[Search, ...] = ()
    price: float | None = None
    missing: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[Way, ...]:
        """Returns the ways that are shown, the best first."""
        best = self.search.best
        rest = (way for way in self.search.fitting if way is not best)
        return () if best is None else (best, *rest)[:TOP]

    @property
    def faster(self) -> list[Way]:
        """Returns ways that would be faster than the best and do not fit."""
        limit = float("inf") if self.search.best is None else self.search.best.seconds
        return [way for way in self.search.ways if not way.does_fit and way.seconds < limit][:_FASTER]


def machine_line(calibration: Calibration, cluster: Cluster, gpus: int) -> str:
    """Says what the times are of."""
    machine = calibration.machine
    line = (
        f"{gpus} × {machine.device}; times by {calibration.name} (torch {machine.torch}, attention {machine.attention})"
    )
    if gpus > cluster.gpus_per_host:
        line += (
            f"; hosts of {cluster.gpus_per_host}, between which a GPU is taken to send {cluster.network / 1e9:.0f} "
            "GB/s (assumed, not measured: --network)"
        )
    return line


def lines(plan: Plan) -> Iterator[str]:
    """Yields the plan for a terminal."""
    planner, search = plan.planner, plan.search
    yield machine_line(planner.timing.calibration, planner.timing.cluster, search.gpus)
    if plan.missing:
        yield f"missing: {', '.join(plan.missing)}; planned for the shapes below in their place"
    if planner.config.reward is not None:
        yield "of a run that learns from a reward the updates alone are planned, not the rollouts"
    best = search.best
    if best is None:
        yield "nothing fits:"
        yield from (f"  {line}" for line in planner.what_would_fit(search))
        return
    yield ""
    yield from table(_way_rows(plan))
    for way in plan.faster:
        yield (
            f"would be faster ({way.seconds / best.seconds - 1:+.1%}), but does not fit: {way.name}: "
            f"{way.memory.peak / GIB:.1f} GiB a device, {way.memory.host / GIB:.1f} GiB of host memory for each"
        )
    for name, way in search.others.items():
        if way.seconds < best.seconds:
            yield f"with {name}: {way.name}: {way.seconds:.4g} s a step ({way.seconds / best.seconds - 1:+.1%})"
    for why, count in search.refused.items():
        yield f"not legal: {count} layouts, by {why}"
    yield ""
    yield f"the best, by latent shape (memory {_gib_parts(best)}):"
    yield from table(_shape_rows(best))
    yield ""
    yield from table(_term_rows(plan))
    yield ""
    settings = best.settings(planner.config)
    yield f"set: {' '.join(settings)}" if settings else "the config is set so already"


def _way_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    best, price = plan.shown[0], plan.price
    money = () if price is None else (f"cost at {price:g}",)
    yield (
        "", "data × sequence × pipeline", "level", "micro × accumulation", "s/step", "tokens/s", "MFU", "days",
        "GPU hours", *money, "GiB", "host GiB", "slower by",
    )  # fmt: skip
    for number, way in enumerate(plan.shown, 1):
        figures, layout = plan.planner.figures(way, price), way.setup.layout
        offload = "" if way.setup.offload == "none" else f" + {way.setup.offload}"
        yield (
            str(number),
            f"{layout.data} × {layout.sequence} × {layout.pipeline}",
            way.setup.level + offload,
            way.micro,
            f"{figures.step_seconds:.4g}",
            f"{figures.tokens_per_second:,.0f}",
            "" if figures.mfu is None else f"{figures.mfu:.1%}",
            f"{figures.days:,.2f}",
            f"{figures.gpu_hours:,.0f}",
            *(() if figures.money is None else (f"{figures.money:,.0f}",)),
            f"{way.memory.peak / GIB:.1f}",
            f"{way.memory.host / GIB:.1f}",
            "" if way is best else why_slower(way, best),
        )


def _shape_rows(way: Way) -> Iterator[tuple[str, ...]]:
    yield "stream", "latent", "tokens", "samples a step", "micro-batch", "accumulation", "s/step", "share of steps"
    for bucket, time in zip(way.buckets, way.times, strict=True):
        yield (
            bucket.stream,
            "×".join(map(str, bucket.shape)),
            f"{bucket.tokens:,}",
            f"{bucket.samples:,}" + f" + {bucket.companions:,}" * bool(bucket.companions),
            str(bucket.micro),
            str(bucket.accumulation),
            f"{time.total:.4g}",
            f"{bucket.share:.1%}",
        )


def _term_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    ways = plan.shown[:3]
    yield "seconds of the mean step", *(f"way {number}" for number in range(1, len(ways) + 1))
    for name in dict.fromkeys(name for way in ways for name in way.terms):
        if any(way.terms.get(name, 0.0) >= 5e-4 for way in ways):
            yield name, *(f"{way.terms.get(name, 0.0):.3f}" for way in ways)
    yield "all", *(f"{way.seconds:.3f}" for way in ways)


def _gib_parts(way: Way) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in way.memory.parts().items() if size / GIB >= 0.05)


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Returns the rows of a table as lines: text to the left, numbers to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_text = [any(row[i][:1].isalpha() for row in rows[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        ).rstrip()
        for row in rows
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """Returns the plan as values that JSON has: seconds and bytes."""
    planner, search = plan.planner, plan.search
    cluster = planner.timing.cluster
    return {
        "config": plan.config,
        "calibration": planner.timing.calibration.name,
        "device": planner.timing.calibration.machine.device,
        "gpus": search.gpus,
        "gpus_per_host": cluster.gpus_per_host,
        "network_bytes_per_second": cluster.network,
        "missing": list(plan.missing),
        "best": None if search.best is None else _way_json(plan, search.best),
        "ways": [_way_json(plan, way) for way in search.ways],
        "others": {name: _way_json(plan, way) for name, way in search.others.items()},
        "not_legal": search.refused,
        "would_fit": planner.what_would_fit(search) if search.best is None else [],
        "by_gpus": {str(other.gpus): other.best and _way_json(plan, other.best) for other in plan.others},
    }


def _way_json(plan: Plan, way: Way) -> dict[str, Any]:
    layout, figures = way.setup.layout, plan.planner.figures(way, plan.price)
    return {
        "data": layout.data,
        "sequence": layout.sequence,
        "pipeline": layout.pipeline,
        "activation_checkpointing": way.asked_level,
        "levels": way.setup.levels,
        "offload": way.setup.offload,
        "gradients": way.setup.gradients,
        "averages": way.setup.averages,
        "fits": way.does_fit,
        **figures._asdict(),
        "seconds": way.terms,
        "device_bytes": way.memory.parts(),
        "peak_bytes": way.memory.peak,
        "host_bytes": way.memory.host,
        "steps": [
            {
                "stream": bucket.stream,
                "shape": list(bucket.shape),
                "samples": bucket.samples,
                "companions": bucket.companions,
                "micro_batch": bucket.micro,
                "accumulation": bucket.accumulation,
                "share": bucket.share,
                "step_seconds": time.total,
                "seconds": time.terms,
                "hidden_seconds": time.hidden,
            }
            for bucket, time in zip(way.buckets, way.times, strict=True)
        ],
        "set": way.settings(plan.planner.config),
    }
