"""The numbers of a report, gathered unit by unit, in any order, in memory that does not grow with the clips."""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.select import Limit, Scores, UnitRows, limits
from mugv_ds.prepare.whatif import Counts

EXAMPLES = 12  # of a reason
GROUPS = 20  # of duplicates that are shown

_BINS = 2000
_ERRORS = 200  # that are listed
_TAGS = 40

# What is shown of all clips beside the scores that have bounds: the score, and the range that its histogram spans.
_SHOWN = {"clip_duration": (0.1, 100.0, True), "sharp_med": (1.0, 20_000.0, True)}


@dataclass(frozen=True)
class Example:
    """A clip that is shown.

    Attributes:
        unit: number of its unit of videos. clip: its row of `rows.CLIP`. path: of its video.
        reason: the row of `rows.REASON` that it is an example of, or None.
    """

    unit: int
    clip: Mapping[str, Any]
    path: str
    reason: Mapping[str, Any] | None = None


class Histogram:
    """Counts of a score in equal bins between two ends, on a logarithmic scale if asked, and of what lies beyond.

    Args:
        low, high: ends, > 0 on a logarithmic scale. log: whether it is one.
    """

    def __init__(self, low: float, high: float, log: bool) -> None:
        self.low, self.high, self.log = low, high, log
        self.counts = np.zeros(_BINS + 2, np.int64)  # below, the bins, above
        self.least, self.most = math.inf, -math.inf  # of the values

    def add(self, values: np.ndarray) -> None:
        """Counts values, float64; NaN is left out."""
        values = values[~np.isnan(values)]
        self.least, self.most = (
            min(self.least, values.min(initial=math.inf)),
            max(self.most, values.max(initial=-math.inf)),
        )
        place = self._scaled(np.maximum(values, 1e-300) if self.log else values)
        bins = np.clip(np.floor(place * _BINS), -1, _BINS).astype(np.int64)
        bins[values == self.high] = _BINS - 1
        np.add.at(self.counts, bins + 1, 1)

    @property
    def total(self) -> int:
        """Returns how many values were counted."""
        return int(self.counts.sum())

    @property
    def edges(self) -> np.ndarray:
        """Returns the ends of the bins, float64 [bins + 1]."""
        share = np.linspace(0, 1, _BINS + 1)
        return self.low * (self.high / self.low) ** share if self.log else self.low + (self.high - self.low) * share

    def place(self, value: float) -> float:
        """Returns where a value lies between the ends, 0 to 1; beyond them it is moved to the nearer one."""
        return float(np.clip(self._scaled(np.array(max(value, 1e-300) if self.log else value)), 0, 1))

    def quantile(self, share: float) -> float | None:
        """Returns the value below which this share lies, to half a bin; None where nothing was counted."""
        if not self.total:
            return None
        edges, place = self.edges, int(np.searchsorted(np.cumsum(self.counts), share * self.total))
        middle = (edges[max(place - 1, 0)] + edges[min(place, _BINS)]) / 2
        return float(min(max(middle, self.least), self.most))

    def below(self) -> np.ndarray:
        """Returns how many values lie below each edge, int64 [bins + 1]."""
        return np.cumsum(self.counts)[:-1]

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        if self.log:
            return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)


@dataclass
class Bounded:
    """A score with a bound.

    Attributes:
        limit: score and bound. all: of all clips.
        free: of the clips that no other bound rejects, for the share that would be kept under another bound.
    """

    limit: Limit
    all: Histogram
    free: Histogram


@dataclass
class Licence:
    """Of one licence and origin: files, and milliseconds of clips and of accepted ones."""

    clips: int = 0
    milliseconds: int = 0
    accepted: int = 0
    accepted_milliseconds: int = 0


class Summary:
    """All that a report tells of clips and files.

    Args:
        config: of the preparation. ran: the optional steps that ran. duplicates: as `rows.DUPLICATE`.

    Attributes:
        counts: see `Counts`. videos, copies, undecoded: files. passed_cheap: clips that no cheap score rejects.
        whole: clips without the rests of scenes. bounded: by score. shown: score → histogram, of those without bound.
        sizes: (width, height) → clips. tags: tag → clips; weighed: tag → the sum of accepted clips' weights.
        licences: (licence, origin) → their numbers. errors: (path, error, detail) of the first files by path.
        examples: reason → clips, of the lowest ids, which are random and the same whatever the order of work.
        groups: (of, members) of the largest groups of duplicates, the largest first; known: the rows of these.
    """

    def __init__(self, config: PrepareConfig, ran: Iterable[str], duplicates: pa.Table) -> None:
        self.counts = Counts()
        self.videos = self.copies = self.whole = self.passed_cheap = self.undecoded = self.bytes = 0
        self.bounded = {limit.score: _bounded(limit) for limit in limits(config, tuple(ran))}
        self.shown = {name: Histogram(*axis) for name, axis in _SHOWN.items() if name not in self.bounded}
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.tags: Counter[str] = Counter()
        self._weighed: Counter[str] = Counter()
        self.licences: dict[tuple[str, str], Licence] = {}
        self._errors: list[tuple[str, str, str]] = []
        self.steps: dict[str, str] = {}  # reason → step
        self._examples: dict[str, list[tuple[str, Example]]] = {}
        members: dict[str, list[dict[str, Any]]] = {}
        for row in duplicates.to_pylist():
            members.setdefault(row["of"], []).append(row)
        self.group_sizes = Counter(len(rows) + 1 for rows in members.values())
        self.groups = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))[:GROUPS]
        wanted = {of for of, _ in self.groups} | {row["clip"] for _, rows in self.groups for row in rows[:EXAMPLES]}
        self._wanted = pa.array(sorted(wanted), pa.string())
        self.known: dict[str, Example] = {}

    def add(self, number: int, rows: UnitRows, selected: pa.Table) -> None:
        """Takes a unit. number: of it. selected: its rows.SELECT."""
        scores, count = Scores(rows), len(rows.clips)
        self.counts.add(rows, selected)
        self.videos += len(rows.videos)
        self.copies += len(rows.copies)
        self.bytes += pc.sum(rows.videos["bytes"]).as_py() or 0
        whole = np.asarray(pc.is_null(rows.clips["reason"]), bool)
        self.whole += int(whole.sum())
        reasons = selected["reasons"].to_pylist()
        costly = {*rows.extras, "dedup", "select"}
        self.passed_cheap += sum(all(one["step"] in costly for one in some) for some in reasons[:count])
        for score, bounded in self.bounded.items():
            values = scores[score][:count]
            bounded.all.add(values)
            own = (bounded.limit.step, score)
            free = [all((one["step"], one["field"]) == own for one in some) for some in reasons[:count]]
            bounded.free.add(values[np.array(free, bool)])
        for score, histogram in self.shown.items():
            values = scores.clip_duration() if score == "clip_duration" else scores[score]
            histogram.add(values[:count][whole])
        self._files(rows.videos)
        self._clips(number, rows, selected, reasons)

    @property
    def weighed(self) -> dict[str, float]:
        """Returns tag → the sum of the weights of accepted clips."""
        return {tag: total / 2**40 for tag, total in self._weighed.items()}

    @property
    def errors(self) -> list[tuple[str, str, str]]:
        """Returns (path, error, detail) of the first files by path."""
        return sorted(self._errors)[:_ERRORS]

    @property
    def examples(self) -> dict[str, list[Example]]:
        """Returns reason → examples."""
        return {name: [example for _, example in some] for name, some in sorted(self._examples.items())}

    def frequent_tags(self) -> list[str]:
        """Returns the most frequent tags, the most frequent first."""
        return [tag for tag, _ in sorted(self.tags.items(), key=lambda item: (-item[1], item[0]))[:_TAGS]]

    def _files(self, videos: pa.Table) -> None:
        failed = videos.filter(pc.is_valid(videos["error"])).select(["path", "error", "detail"])
        self.undecoded += len(failed)
        self._errors += [(row["path"], row["error"], row["detail"] or "") for row in failed.to_pylist()]
        self._errors = heapq.nsmallest(_ERRORS, self._errors)

    def _clips(self, number: int, rows: UnitRows, selected: pa.Table, reasons: list[list[dict[str, Any]]]) -> None:
        """Counts what is not told by histograms, and picks the examples."""
        paths, accepted = selected["path"].to_pylist(), selected["accepted"].to_pylist()
        weights = selected["weight"].to_pylist()
        columns = ("clip", "duration", "width", "height")
        ids, durations, widths, heights = (rows.clips[name].to_pylist() for name in columns)
        of = [
            (a or "not stated", b or "not stated")
            for a, b in zip(*(selected[n].to_pylist() for n in ("licence", "origin")), strict=True)
        ]
        tags = rows.extras.get("tags")
        tagged = {} if tags is None else dict(zip(tags["clip"].to_pylist(), tags["tags"].to_pylist(), strict=True))
        chosen: dict[int, None] = {}
        for i, clip in enumerate(ids):
            milliseconds = round((durations[i] or 0) * 1000)
            licence = self.licences.setdefault(of[i], Licence())
            licence.clips += 1
            licence.milliseconds += milliseconds
            if accepted[i]:
                licence.accepted += 1
                licence.accepted_milliseconds += milliseconds
                self.sizes[widths[i], heights[i]] += 1
            for tag in tagged.get(clip) or ():
                self.tags[tag] += 1
                if weights[i] is not None:
                    self._weighed[tag] += round(weights[i] * 2**40)
            for name in {one["name"] for one in reasons[i]}:
                known = self._examples.get(name, ())
                if len(known) < EXAMPLES or clip < known[-1][0]:
                    chosen[i] = None
        for place in np.flatnonzero(np.asarray(pc.is_in(rows.clips["clip"], value_set=self._wanted))).tolist():
            self.known[ids[place]] = Example(number, _row(rows.clips, place), paths[place])
        for place in chosen:
            row = _row(rows.clips, place)
            for reason in {one["name"]: one for one in reasons[place]}.values():
                some = [
                    *self._examples.get(reason["name"], ()),
                    (ids[place], Example(number, row, paths[place], reason)),
                ]
                self._examples[reason["name"]] = sorted(some, key=lambda item: item[0])[:EXAMPLES]
        for some in reasons:
            for one in some:
                self.steps.setdefault(one["name"], one["step"])


def _row(clips: pa.Table, place: int) -> dict[str, Any]:
    return clips.slice(place, 1).to_pylist()[0]


def _bounded(limit: Limit) -> Bounded:
    return Bounded(limit, Histogram(*limit.axis), Histogram(*limit.axis))
