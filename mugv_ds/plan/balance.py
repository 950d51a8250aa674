"""How evenly the plan of a run loads the data ranks, and how much its steps differ: counted, before anything starts.

Costs are the model FLOPs of what each data rank reads, micro-batch by micro-batch; or the predicted seconds of a
device, where `data.budget.by` says so.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.manifest import Index, Shape
from mugv_ds.data.plan import Plan, Stream
from mugv_ds.data.readers import AnnotatedSamples, Reader
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import SampleCost
from mugv_ds.plan.cost import sample_cost
from mugv_ds.plan.steps import kinds_of

MOST_STEPS = 2000  # looked at unless asked for
PARTS = 5  # of the run, for which shares are shown

Cost = Callable[[Shape], float]  # of a sample, in FLOPs or seconds


@dataclass(frozen=True)
class Balance:
    """What was found in some steps.

    Attributes:
        positions: int [steps], of the steps in the run.
        costs: float64 [steps, data ranks], of each rank's micro-batches.
    """

    positions: np.ndarray
    costs: np.ndarray

    @property
    def mean(self) -> float:
        """Returns the cost of the mean step."""
        return float(self.costs.sum(axis=1).mean())

    @property
    def between_ranks(self) -> float:
        """max/mean − 1 over the ranks of a step, in the worst step."""
        return float((self.costs.max(axis=1) / self.costs.mean(axis=1)).max() - 1)

    @property
    def between_steps(self) -> float:
        """|cost/mean − 1| of the step that is furthest from the mean step."""
        return float(np.abs(self.costs.sum(axis=1) / self.mean - 1).max())


@dataclass(frozen=True)
class Rows:
    """Rows of all manifests. unreadable: without a latent. never: of the others, those that no step can hold."""

    total: int
    unreadable: int
    never: int


def balance_report(config: TrainConfig, data_ranks: int, steps: int | None = None) -> str:
    """A table by stream and latent shape, the imbalances, the rows left out, and the shares of the streams.

    Args:
        steps: to look at; None for one epoch, at most 2,000.

    Raises:
        ConfigError: the config cannot run on so many data ranks. ManifestError: a manifest cannot be used.
    """
    costs = sample_cost(config)
    data = RunData(config, costs, data_ranks)
    indexes, readers, plan = (data.train, *data.sources), data.readers.readers, data.plan
    cost, run = costs.cost, config.schedule.steps
    positions = choose_positions(plan, run, steps or min(epoch(plan), MOST_STEPS))
    balance = measure(plan, readers, cost, positions, data_ranks)
    rows = count_rows(plan, indexes, readers, run)
    lines = [
        *_align(_bucket_lines(config, plan, costs, balance, data_ranks)),
        f"steps looked at: {len(positions):,} of {run:,}, from {positions[0]:,} to {positions[-1]:,}",
        f"imbalance between {data_ranks} data ranks (max/mean - 1, worst step): {balance.between_ranks:.2%}",
        f"imbalance between steps (largest |cost/mean - 1|): {balance.between_steps:.2%}",
        f"rows that are never played: {rows.never:,} of {rows.total:,}, {rows.never / rows.total:.2%}",
        f"rows that are not played in every epoch, being fewer of their shape than a step: {seldom_played(plan):,}",
        f"rows whose latent could not be read: {rows.unreadable:,}, {rows.unreadable / rows.total:.2%}",
    ]
    if len(plan.streams) > 1:
        lines += _align(_share_lines(plan, run))
    return "\n".join(lines)


def measure(plan: Plan, readers: Sequence[Reader], cost: Cost, positions: np.ndarray, data_ranks: int) -> Balance:
    """The balance of the steps at these positions: int [steps]."""
    costs_of = [_unit_costs(reader, cost) for reader in readers]
    costs = []
    for position in positions.tolist():
        step = plan.step(position)
        costs.append(
            [
                sum(costs_of[ref.source][ref.item] for batch in step.micro_batches(rank, data_ranks) for ref in batch)
                for rank in range(data_ranks)
            ]
        )
    return Balance(positions, np.array(costs))


def count_rows(plan: Plan, indexes: Sequence[Index], readers: Sequence[Reader], steps: int) -> Rows:
    """Counts the rows that no step of a run of so many steps can hold.

    Such a row is of no stream, or of one that has no share at any step; or, to come along, of
    a shape that no stream has.
    """
    playing = [stream for stream in plan.streams if _shares(stream, np.arange(steps)).any()]
    shapes = {shape for stream in playing for shape in group_by_shape(stream.shapes)[0]}
    total, unreadable, held = 0, 0, 0
    for number, (index, reader) in enumerate(zip(indexes, readers, strict=True)):
        rows = reader.rows if isinstance(reader, AnnotatedSamples) else np.arange(len(index))
        can = np.zeros(len(index), bool)
        for stream in playing:
            if stream.source == number:
                can[rows[stream.shapes.any(axis=1)]] = True
        if plan.companion is not None and plan.companion.source == number:
            for shape, items in zip(*group_by_shape(plan.companion.shapes), strict=True):
                can[items] |= shape in shapes
        total += len(index)
        unreadable += int((~index.shapes().any(axis=1)).sum())
        held += int(can.sum())
    return Rows(total, unreadable, total - unreadable - held)


def seldom_played(plan: Plan) -> int:
    """Counts the rows of latent shapes that have fewer than a step holds; such a step comes in some epochs only."""
    return sum(
        stream.item_size * len(items)
        for stream, per_epoch in zip(plan.streams, plan.per_epoch, strict=True)
        for shape, items in zip(*group_by_shape(stream.shapes), strict=True)
        if per_epoch[shape] < stream.sizes[shape].step
    )


def epoch(plan: Plan) -> int:
    """Steps that hold as many items as all streams have."""
    samples = (stream.item_size * stream.shapes.any(axis=1).sum() for stream in plan.streams)
    return math.ceil(sum(n / mean for n, mean in zip(samples, plan.mean_samples, strict=True)))


def choose_positions(plan: Plan, run: int, steps: int) -> np.ndarray:
    """The first steps of a run; or, where shares change over it, a step out of each of as many equal parts.

    It is drawn, because streams take turns: of steps at equal distances all could be of one stream.

    Returns:
        int [min(run, steps)], ascending.
    """
    if all(len({share for _, share in stream.share}) == 1 for stream in plan.streams):
        return np.arange(min(run, steps))
    edges = np.linspace(0, run, min(run, steps) + 1).astype(int)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def _unit_costs(reader: Reader, cost: Cost) -> list[float]:
    """Of every item; 0 where it cannot be read."""
    shapes = reader.shapes
    costs = np.zeros(len(shapes))
    for shape, items in zip(*group_by_shape(shapes), strict=True):
        costs[items] = reader.item_size * cost(shape)
    return costs.tolist()


def _shares(stream: Stream, positions: np.ndarray) -> np.ndarray:
    """The share that the config gives a stream at each position, as it stands there."""
    return np.interp(positions, *zip(*stream.share, strict=True))


def _bucket_lines(
    config: TrainConfig, plan: Plan, costs: SampleCost, balance: Balance, data_ranks: int
) -> Iterable[tuple[str, ...]]:
    unit, scale = ("TFLOP", 1e12) if costs.unit == "FLOP" else ("device seconds", 1.0)
    yield (
        "stream", "latent", "rows or pairs", "tokens", "samples a step", "micro-batch", "accumulation",
        f"{unit} a step", "of the mean",
    )  # fmt: skip
    for kind in kinds_of(plan, config.schedule.steps):
        bucket = kind.bucket(config, config.data, costs, data_ranks)
        cost = (bucket.samples + bucket.companions) * costs.cost(bucket.shape)
        yield (
            bucket.stream,
            "×".join(map(str, bucket.shape)),
            f"{bucket.items:,}",
            f"{bucket.tokens:,}",
            f"{bucket.samples:,}" + f" + {bucket.companions:,}" * bool(bucket.companions),
            f"{bucket.micro}",
            f"{bucket.accumulation}",
            f"{cost / scale:,.3f}",
            f"{cost / balance.mean:.3f}",
        )


def _share_lines(plan: Plan, run: int) -> Iterable[tuple[str, ...]]:
    """Of the streams' samples, by parts of the run: what is planned and what the config asks for.

    Each step of a stream counts as many samples as its mean step holds.
    """
    parts = np.array_split(np.arange(run), min(PARTS, run))
    yield "share of samples (asked for)", *(f"{part[0]:,}–{part[-1]:,}" for part in parts)
    playing = np.array([plan.turn(position) for position in range(run)])
    planned = np.stack([(playing == number) * mean for number, mean in enumerate(plan.mean_samples)])
    asked = np.stack([_shares(stream, np.arange(run)) for stream in plan.streams])
    asked = asked / asked.sum(axis=0)
    for number, stream in enumerate(plan.streams):
        yield (
            stream.name,
            *(
                f"{planned[number, part].sum() / planned[:, part].sum():.1%} ({asked[number, part].mean():.1%})"
                for part in parts
            ),
        )


def _align(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The rows of a table as lines: the first column to the left, the others to the right."""
    rows = list(rows)
    first, *rest = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], rest, strict=True))])
        for row in rows
    ]
