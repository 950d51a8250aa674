"""Compares weights by what is measured of their videos: means, and differences of each two, with intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from mugv_ds.evaluation.measures import Measure
from mugv_ds.evaluation.results import Result
from mugv_ds.files.atomic import write_changed

CONFIDENCE = 0.95
RESAMPLES = 10_000
LEAST_PROMPTS = 6  # fewer can agree by chance in more than 5% of cases (2 · 2⁻⁵), whatever an interval says
_SEED = 0
_AT_ONCE = 1 << 22  # numbers that are drawn at once, which bounds the memory
_TEMPLATE = "report.html"


@dataclass(frozen=True)
class Interval:
    """A mean over prompts and its bootstrap interval.

    Attributes:
        low, high: None where there are fewer than `LEAST_PROMPTS` to draw from. prompts: number of them.
    """

    mean: float
    low: float | None
    high: float | None
    prompts: int

    @property
    def excludes_zero(self) -> bool:
        """Tells whether zero lies outside; never where there is no interval."""
        return self.low is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Difference:
    """By how much a measure of some weights is above that of others, over the prompts that both have it of."""

    weights: str
    minus: str
    interval: Interval


@dataclass(frozen=True)
class Line:
    """A measure. means: by the weights' name, of those that have it. differences: of each two."""

    name: str
    measure: Measure
    means: dict[str, Interval]
    differences: list[Difference]


@dataclass(frozen=True)
class Table:
    """What an evaluation found. videos: by the weights' name, how many are there. wanted: how many there should be."""

    videos: dict[str, int]
    wanted: int
    lines: list[Line]

    def as_json(self) -> dict[str, Any]:
        """Returns it of JSON types."""
        lines = {}
        for line in self.lines:
            differences = [
                {
                    "weights": difference.weights,
                    "minus": difference.minus,
                    **asdict(difference.interval),
                    "excludes_zero": difference.interval.excludes_zero,
                }
                for difference in line.differences
            ]
            means = {name: asdict(interval) for name, interval in line.means.items()}
            lines[line.name] = {**asdict(line.measure), "means": means, "differences": differences}
        bootstrap = {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": _SEED}
        return {"videos": self.videos, "wanted": self.wanted, "bootstrap": bootstrap, "measures": lines}


def bootstrap(values_P: np.ndarray) -> Interval:
    """Returns the mean of one value a prompt, and its percentile bootstrap interval (Efron 1979).

    Prompts are drawn with replacement, `RESAMPLES` times, from a seed of its own: the same values give the same
    interval. Of two weights it is given the differences, so that both are drawn with the same prompts (paired).

    Args:
        values_P: float [P], P ≥ 1.
    """
    prompts = len(values_P)
    mean = float(np.mean(values_P))
    if prompts < LEAST_PROMPTS:
        return Interval(mean, None, None, prompts)
    rng, means = np.random.default_rng(_SEED), []
    for _ in range(-(-RESAMPLES * prompts // _AT_ONCE)):
        count = min(_AT_ONCE // prompts or 1, RESAMPLES - sum(map(len, means)))
        means.append(values_P[rng.integers(prompts, size=(count, prompts))].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high), prompts)


def make_table(
    results: Sequence[Result],
    measured: Mapping[tuple[str, str], Mapping[str, float]],
    measures: Mapping[str, Measure],
    *,
    weights: Sequence[str],
    wanted: int,
) -> Table:
    """Compares weights.

    Videos of one prompt and image, which differ by their noise, count as one value, their mean: they are no
    independent draws of what users ask for.

    Args:
        results: the videos. measured: by (weights, job), the measures of each.
        measures: of which a line is made each, in this order; one that no video has is left out.
        weights: in their order. wanted: number of videos that each should have.
    """
    prompts = {one.job: (one.prompt, str(one.image)) for one in results}
    videos = {name: sum(one.weights == name for one in results) for name in weights}
    lines = []
    for name, measure in measures.items():
        values = {one: {} for one in weights}
        for (one, job), found in measured.items():
            if name in found:
                values[one][job] = found[name]
        means = {one: bootstrap(_by_prompt(of, prompts)) for one, of in values.items() if of}
        differences = []
        for first, second in combinations(means, 2):
            both = {job: values[second][job] - values[first][job] for job in values[second].keys() & values[first]}
            if both:
                differences.append(Difference(second, first, bootstrap(_by_prompt(both, prompts))))
        if means:
            lines.append(Line(name, measure, means, differences))
    return Table(videos, wanted, lines)


def _by_prompt(values: Mapping[str, float], prompts: Mapping[str, tuple[str, str]]) -> np.ndarray:
    """Returns the mean of the jobs' values for each prompt, in an order that does not depend on the jobs'."""
    groups: dict[tuple[str, str], list[float]] = {}
    for job in sorted(values):
        groups.setdefault(prompts[job], []).append(values[job])
    return np.array([np.mean(group) for group in groups.values()])


def text_lines(table: Table) -> Iterator[str]:
    """Yields the table for a terminal."""
    heads = [f"{name} ({count} of {table.wanted})" for name, count in table.videos.items()]
    rows = [
        [line.measure.title, *(_interval(line.means.get(name)) for name in table.videos), line.measure.unit]
        for line in table.lines
    ]
    yield from _columns([["measure", *heads, "unit"], *rows])
    if len(table.videos) > 1:
        yield ""
        yield f"differences, and the {CONFIDENCE:.0%} interval over prompts; * excludes zero"
        yield from _columns(
            [
                line.measure.title,
                f"{difference.weights} − {difference.minus}",
                _interval(difference.interval, signed=True),
                "*" if difference.interval.excludes_zero else "",
            ]
            for line in table.lines
            for difference in line.differences
        )


def _columns(rows: Any) -> Iterator[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _interval(interval: Interval | None, signed: bool = False) -> str:
    if interval is None:
        return "–"
    if interval.low is None:
        return _number(interval.mean, signed)
    return f"{_number(interval.mean, signed)} [{_number(interval.low, signed)}, {_number(interval.high, signed)}]"


def _number(value: float, signed: bool = False) -> str:
    """Writes a number with four digits that count."""
    text = f"{value:+.4g}" if signed else f"{value:.4g}"
    return text.replace("-", "−")


def write_table(folder: Path, table: Table, facts: Mapping[str, Any]) -> None:
    """Writes `table.json`, and `table.html`, a page that needs nothing else.

    Args:
        facts: what else the page says: a title → text or number.

    Raises:
        OSError: the file system failed.
    """
    write_changed(folder / "table.json", (json.dumps(table.as_json(), indent=2) + "\n").encode())
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"interval": _interval, "number": _number}
    page = environment.get_template(_TEMPLATE).render(table=table, facts=facts, confidence=CONFIDENCE)
    write_changed(folder / "table.html", page.encode())
