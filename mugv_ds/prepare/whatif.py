"""Questions to a preparation that change nothing: what other bounds would do, and why a clip is in or out."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.rows import DUPLICATE
from mugv_ds.prepare.screen import Screening
from mugv_ds.prepare.select import Limit, Scores, Selection, UnitRows, Units, limits

# What selection alone depends on; all else is measured, and would have to be measured again.
FREE = ("select", "screen", "balance", "vlm.threshold", "dedup.per_source", "dedup.per_source_mean")


@dataclass
class Counts:
    """What became of a set of clips. Rests of scenes count as clips that were rejected.

    Attributes:
        clips: all. accepted: of them. seconds: of all. accepted_seconds: of those accepted.
        reasons: name → clips that have it. alone: name → clips that have no other.
        files: name → videos without clips, and copies, that have it.
    """

    clips: int = 0
    accepted: int = 0
    milliseconds: int = 0  # whole, so that their sum does not depend on the order
    accepted_milliseconds: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    alone: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        """Returns the seconds of all clips."""
        return self.milliseconds / 1000

    @property
    def accepted_seconds(self) -> float:
        """Returns the seconds of the accepted clips."""
        return self.accepted_milliseconds / 1000

    def add(self, rows: UnitRows, selected: pa.Table) -> None:
        """Counts a unit. selected: its rows.SELECT."""
        count = len(rows.clips)
        for reasons in selected["reasons"][count:].to_pylist():
            self.files.update({reason["name"] for reason in reasons})
        clips = selected[:count]
        for reasons in clips.filter(pc.invert(clips["accepted"]))["reasons"].to_pylist():
            names = {reason["name"] for reason in reasons}
            self.reasons.update(names)
            if len(names) == 1:
                self.alone.update(names)
        milliseconds = pc.fill_null(pc.round(pc.multiply(rows.clips["duration"], 1000.0)), 0.0).cast(pa.int64())
        self.clips += count
        self.accepted += pc.sum(clips["accepted"]).as_py() or 0
        self.milliseconds += pc.sum(milliseconds).as_py() or 0
        self.accepted_milliseconds += pc.sum(milliseconds.filter(clips["accepted"])).as_py() or 0


@dataclass(frozen=True)
class WhatIf:
    """What there is, and what there would be.

    Attributes:
        unscored: clips that would be let in but have not been seen by the optional steps, which a real run would ask;
            they are counted as rejected (unmeasured).
    """

    now: Counts
    then: Counts
    unscored: int

    def lines(self) -> Iterator[str]:
        """Yields a table for people."""
        rows = [
            ("clips", self.now.clips, self.then.clips),
            ("accepted", self.now.accepted, self.then.accepted),
            ("accepted hours", self.now.accepted_seconds / 3600, self.then.accepted_seconds / 3600),
        ]
        rows += [
            (name, self.now.reasons[name], self.then.reasons[name])
            for name in sorted({*self.now.reasons, *self.then.reasons})
        ]
        yield f"{'':28}{'now':>12}{'then':>12}{'change':>12}"
        for name, now, then in rows:
            form = ",.2f" if isinstance(now, float) else ",d"
            yield f"{name:28}{now:>12{form}}{then:>12{form}}{then - now:>+12{form}}"
        if self.unscored:
            yield f"clips that optional steps would have to look at first: {self.unscored:,}"


def check_free(now: PrepareConfig, then: PrepareConfig) -> None:
    """Refuses changes that would need more than deciding anew.

    Raises:
        ConfigError: another key than those of `FREE` has changed.
    """
    before = dict(_leaves(now.model_dump()))
    for key, value in _leaves(then.model_dump()):
        if value != before[key] and not any(key == free or key.startswith(f"{free}.") for free in FREE):
            raise ConfigError(
                f"{key}: what-if answers for {', '.join(FREE)}; under another {key} clips would have to be measured "
                "anew: use run"
            )


def what_if(
    units: Units,
    now: PrepareConfig,
    then: PrepareConfig,
    screening: Screening,
    then_screening: Screening,
    pairs: pa.Table,
) -> WhatIf:
    """Counts what selection accepts under two configs; nothing is written.

    Args:
        units: see `Selection.of`. now, then: the configs; and what their sections `screen` say. pairs: as `rows.PAIR`.

    Raises:
        ConfigError: see `check_free`.
    """
    check_free(now, then)
    first = Selection.of(units, now, screening, pairs)
    second = Selection.of(units, then, then_screening, pairs, first.ranks)
    counts, unscored = (Counts(), Counts()), 0
    for rows in units():
        before, after = first.table(rows), second.table(rows)
        counts[0].add(rows, before)
        counts[1].add(rows, after)
        unscored += _unscored(rows, after) - _unscored(rows, before)
    return WhatIf(*counts, max(unscored, 0))


@dataclass(frozen=True)
class Explanation:
    """All that is known of a clip, or of a file without clips.

    Attributes:
        clip: its row of `rows.CLIP`, or None. selected: its row of `rows.SELECT`.
        detail: what was found of a video that is in error, or None.
        scores: (bound, score; NaN where it has none) of each bound that holds.
        extras: step → its row. duplicates: rows of `rows.DUPLICATE` that name it, on either side.
    """

    clip: dict[str, Any] | None
    selected: dict[str, Any]
    detail: str | None
    scores: list[tuple[Limit, float]]
    extras: dict[str, dict[str, Any]]
    duplicates: list[dict[str, Any]]

    def lines(self) -> Iterator[str]:
        """Yields the explanation for people; what came from outside is shown with its control characters escaped."""
        selected, clip = self.selected, self.clip
        verdict = "accepted" if selected["accepted"] else "rejected"
        yield f"{'clip ' + clip['clip'] if clip else 'file'}: {verdict}"
        yield f"  video {selected['video']}, {selected['path']!r}"
        if selected["licence"] or selected["origin"]:
            yield f"  licence {selected['licence']!r}, origin {selected['origin']!r}"
        if clip:
            yield (
                f"  from {clip['start'] or 0:.3f} s on {clip['duration'] or 0:.3f} s, pts {clip['first_pts']} to "
                f"{clip['last_pts']}, {clip['width']}×{clip['height']}"
            )
        for reason in selected["reasons"]:
            yield f"  REASON {reason['name']}: {reason['field']} ({reason['step']}){_told(reason)}"
        if self.detail is not None:
            yield f"  found: {self.detail!r}"
        for limit, score in self.scores:
            shown = "–" if score != score else f"{score:.6g}"
            yield f"  {limit.score:12} {shown:>12}   {_range(limit.bound.low, limit.bound.high)}"
        if selected["composite"] is not None:
            group = f"weight {selected['weight']}, group {selected['group']!r}"
            yield f"  {'composite':12} {selected['composite']:>12.4f}   {group}"
        for step, row in self.extras.items():
            values = ", ".join(f"{name} {value!r}" for name, value in row.items() if name not in ("clip", "embedding"))
            yield f"  {step}: {values}"
        for row in self.duplicates:
            yield f"  {row['clip']} gives way to {row['of']} ({row['kind']}, {row['distance']:.4g})"


def explain(target: str, units: Units, selection: Selection) -> list[Explanation]:
    """Returns all that is known of a clip (32 hex digits), a video (64), or the file at a path, clip by clip.

    Raises:
        InputError: there is no such thing.
    """
    found = []
    for rows in units():
        selected = selection.table(rows)
        named = [pc.equal(selected[name], target).fill_null(False) for name in ("clip", "video", "path")]
        places = pc.indices_nonzero(pc.or_(pc.or_(*named[:2]), named[2])).to_pylist()
        if places:
            found += _explained(places, rows, selected, selection)
    if not found:
        raise InputError(f"{target!r}: no clip, video or path of this preparation; clips have 32 hex digits, videos 64")
    return found


def _explained(
    places: Iterable[int], rows: UnitRows, selected: pa.Table, selection: Selection
) -> Iterator[Explanation]:
    scores, bounds = Scores(rows), limits(selection.config, rows.extras)
    values = [(limit, scores[limit.score]) for limit in bounds]
    extras = {step: {row["clip"]: row for row in table.to_pylist()} for step, table in rows.extras.items()}
    details = dict(zip(*(rows.videos[name].to_pylist() for name in ("video", "detail")), strict=True))
    for place in places:
        row = selected.slice(place, 1).to_pylist()[0]
        clip = rows.clips.slice(place, 1).to_pylist()[0] if place < len(rows.clips) else None
        name = row["clip"]
        yield Explanation(
            clip,
            row,
            details.get(row["video"]),
            [(limit, float(value[place])) for limit, value in values],
            {step: found[name] for step, found in extras.items() if name in found},
            _naming(selection.duplicates, name),
        )


def _naming(duplicates: pa.Table, clip: str | None) -> list[dict[str, Any]]:
    if clip is None:
        return DUPLICATE.empty_table().to_pylist()
    return duplicates.filter(pc.or_(pc.equal(duplicates["clip"], clip), pc.equal(duplicates["of"], clip))).to_pylist()


def _unscored(rows: UnitRows, selected: pa.Table) -> int:
    """Returns how many clips lack nothing but scores of optional steps."""
    return sum(
        bool(reasons) and all(one["name"] == "unmeasured" and one["step"] in rows.extras for one in reasons)
        for reasons in selected["reasons"].to_pylist()
    )


def _told(reason: dict[str, Any]) -> str:
    value = "" if reason["value"] is None else f" is {reason['value']:.6g}"
    bound = "" if reason["low"] is None and reason["high"] is None else f", {_range(reason['low'], reason['high'])}"
    return value + bound


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "no bound"
    return f"must lie in [{'−∞' if low is None else f'{low:.6g}'}, {'∞' if high is None else f'{high:.6g}'}]"


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and not prefix:
            yield from _leaves(value, f"{name}.")
        else:
            yield f"{prefix}{name}", value
