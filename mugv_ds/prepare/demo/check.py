"""Compares what a preparation made of the drawn footage with what must come of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mugv_ds.prepare.demo.footage import Expectation
from mugv_ds.prepare.rows import CLIP
from mugv_ds.prepare.run import Preparation

_ROUNDING = 1e-3  # seconds


@dataclass(frozen=True)
class Outcome:
    """What came of a source. wrong: what differs from its expectation, in words; empty if nothing does."""

    path: str
    found: str
    wrong: tuple[str, ...]


def outcomes(preparation: Preparation, expected: dict[str, Expectation]) -> Iterator[Outcome]:
    """Yields what came of each source, by name.

    Raises:
        FragmentError: a step has not run.
    """
    videos: dict[str, dict[str, Any]] = {}
    clips: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    ran = preparation.chain.extras
    for unit in preparation.chain.units():
        known = {row["clip"]: row for row in unit.read("clips").to_pylist()}
        probed = {row["video"]: row for row in unit.read("videos").to_pylist()}
        for row in preparation.read("select", unit.number).to_pylist():
            videos[row["path"]] = probed[row["video"]]
            clips.setdefault(row["path"], []).append((row, known.get(row["clip"], {})))
    for path, expectation in sorted(expected.items()):
        rows = clips.get(path, [])
        names = sorted({reason["name"] for row, _ in rows for reason in row["reasons"]})
        accepted = sum(row["accepted"] for row, _ in rows)
        found = f"{accepted} of {len(rows)} accepted" + (f"; {', '.join(names)}" if names else "")
        if not rows:
            yield Outcome(path, "nothing", ("is not in the set's decisions",))
            continue
        yield Outcome(path, found, tuple(_wrong(expectation, videos[path], rows, ran)))


def _wrong(
    expectation: Expectation,
    video: dict[str, Any],
    rows: list[tuple[dict[str, Any], dict[str, Any]]],
    ran: tuple[str, ...],
) -> Iterator[str]:
    whole = [(row, clip) for row, clip in rows if clip.get("reason") is None]
    reason = expectation.reason if expectation.step in (None, *ran) else None
    if reason is None and not any(row["accepted"] for row, _ in rows):
        yield "no clip of it is accepted"
    if reason is not None:
        # Rests of scenes are rejected as such, unless there is nothing else.
        lacking = [row for row, _ in whole or rows if reason not in {one["name"] for one in row["reasons"]}]
        if lacking:
            yield f"{len(lacking)} of its clips are not rejected as {reason}"
    for column, (low, high) in expectation.values.items():
        values = [clip[column] for _, clip in whole if clip] if column in CLIP.names else [video[column]]
        if wrong := [value for value in values if value is None or not low <= value <= high]:
            yield f"{column} = {wrong[0]}, expected {low:g} to {high:g}"
    for first, last in expectation.mixed:
        for _, clip in whole:
            start, end = clip["start"], clip["start"] + clip["duration"] - 1 / clip["fps"]
            inside = end >= first - _ROUNDING and start < last - _ROUNDING
            if first == last:
                inside = start < first - _ROUNDING and end >= first - _ROUNDING
            if inside:
                yield f"a clip from {start:.3f} to {end:.3f} s has frames of a transition ({first:.3f} to {last:.3f} s)"
