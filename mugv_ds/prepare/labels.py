"""What people say of clips, from a CSV: good or bad for KTO, pairs of better and worse for DPO."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from mugv_ds.data.manifest import CHOICES, Record, read_records, whole_number
from mugv_ds.data.paths import ManifestError
from mugv_ds.prepare.rows import LABEL

_ID = re.compile("[0-9a-f]{32}")
_MAX_NAME = 200  # characters of a pair_id, axis or annotator


@dataclass(frozen=True)
class Labels:
    """What annotators agree on.

    Attributes:
        rows: as `rows.LABEL`, in order of clips.
        ties: for people, what was dropped because as many said one thing as the other, in order.
    """

    rows: pa.Table
    ties: tuple[str, ...]


@dataclass
class _Clip:
    line: int
    bad: dict[str, bool] = field(default_factory=dict)  # annotator → whether any axis is bad
    said: dict[tuple[str, str], int] = field(default_factory=dict)  # (annotator, axis) → line


@dataclass
class _Pair:
    line: int
    ranks: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)  # annotator → clip → (rank, line)


def read_labels(path: Path, known: Collection[str]) -> Labels:
    """Reads a CSV with `id` and any of label (good, bad), pair_id, rank, axis, annotator.

    A row labels a clip, or ranks it in a pair, or both; the lower rank is the better one. Of one annotator, any axis
    that is bad makes the clip bad, as published. Of several, the majority counts, for labels as for pairs; ties are
    dropped. A clip may be in one pair only, as a row of a manifest names one.

    Args:
        known: ids of the clips that there are, accepted or not.

    Raises:
        ManifestError: the file cannot be read, a row is wrong, an id is unknown, somebody says two things of the same,
            or a pair has other than two clips; the message names file and line.
    """
    clips: dict[str, _Clip] = {}
    pairs: dict[str, _Pair] = {}
    line = 1
    for line, record in read_records(path, ("id",), ("label", "pair_id", "rank", "axis", "annotator"), _check):
        if record["id"] not in known:
            raise ManifestError(f"{path}:{line}: no clip has the id {record['id']}")
        if record["label"] is not None:
            _add_label(path, line, record, clips.setdefault(record["id"], _Clip(line)))
        if record["pair_id"] is not None:
            _add_rank(path, line, record, pairs.setdefault(record["pair_id"], _Pair(line)))
    if not clips and not pairs:
        raise ManifestError(f"{path}:{line}: only a header, no labels")
    ties: list[str] = []
    labels = {name: label for name, clip in clips.items() if (label := _majority(clip, name, ties))}
    ranks: dict[str, tuple[str, int, int]] = {}  # clip → (pair, rank, line)
    for name, pair in pairs.items():
        for place, clip in enumerate(_better_first(path, name, pair, ties), 1):
            if clip in ranks:
                raise ManifestError(
                    f"{path}:{pair.line}: clip {clip} of pair {name!r} is in pair {ranks[clip][0]!r} too, of line "
                    f"{ranks[clip][2]}; a clip can be in one pair"
                )
            ranks[clip] = (name, place, pair.line)
    ids = sorted({*labels, *ranks})
    columns = {
        "clip": ids,
        "label": [labels.get(one) for one in ids],
        "pair_id": [ranks[one][0] if one in ranks else None for one in ids],
        "rank": [ranks[one][1] if one in ranks else None for one in ids],
    }
    return Labels(pa.table(columns, schema=LABEL), tuple(sorted(ties)))


def _add_label(path: Path, line: int, record: Record, clip: _Clip) -> None:
    annotator, axis = record["annotator"] or "", record["axis"] or ""
    if (annotator, axis) in clip.said:
        raise ManifestError(
            f"{path}:{line}: {_who(annotator)} has labelled clip {record['id']} in line {clip.said[annotator, axis]} "
            f"already{f', axis {axis!r}' if axis else ''}"
        )
    clip.said[annotator, axis] = line
    clip.bad[annotator] = clip.bad.get(annotator, False) or record["label"] == "bad"


def _add_rank(path: Path, line: int, record: Record, pair: _Pair) -> None:
    ranks = pair.ranks.setdefault(record["annotator"] or "", {})
    if record["id"] in ranks:
        raise ManifestError(
            f"{path}:{line}: {_who(record['annotator'])} has ranked clip {record['id']} of pair {record['pair_id']!r} "
            f"in line {ranks[record['id']][1]} already"
        )
    ranks[record["id"]] = (record["rank"], line)


def _majority(clip: _Clip, name: str, ties: list[str]) -> str | None:
    """Returns what most annotators say of a clip; None, and a line in `ties`, where as many say the other."""
    votes = Counter("bad" if bad else "good" for bad in clip.bad.values())
    if votes["good"] == votes["bad"]:
        ties.append(f"clip {name}: {votes['good']} say good, {votes['bad']} bad")
        return None
    return votes.most_common(1)[0][0]


def _better_first(path: Path, name: str, pair: _Pair, ties: list[str]) -> list[str]:
    """Returns the two clips of a pair, the better one first; none, and a line in `ties`, where as many say the other.

    Raises:
        ManifestError: it has other than two clips, or an annotator gives both the same rank.
    """
    both = sorted({clip for ranks in pair.ranks.values() for clip in ranks})
    votes: Counter[str] = Counter()
    for annotator, ranks in pair.ranks.items():
        line = max(line for _, line in ranks.values())
        if len(both) != 2 or len(ranks) != 2:
            found = len(both) if len(ranks) == len(both) or len(both) > 2 else len(ranks)
            raise ManifestError(
                f"{path}:{line}: pair {name!r} has {found} clip{'s' * (found != 1)} by {_who(annotator)}; give it two, "
                "a better and a worse one"
            )
        (one, first), (other, second) = ((ranks[clip][0], clip) for clip in both)
        if one == other:
            raise ManifestError(
                f"{path}:{line}: pair {name!r} has rank {one} twice by {_who(annotator)}; give the better clip the "
                "lower rank"
            )
        votes[first if one < other else second] += 1
    first, second = sorted(both, key=lambda clip: -votes[clip])
    if votes[first] == votes[second]:
        ties.append(f"pair {name}: {votes[first]} say one is better, {votes[second]} the other")
        return []
    return [first, second]


def _who(annotator: str | None) -> str:
    return f"annotator {annotator!r}" if annotator else "who gave no name"


def _check(record: Record) -> None:
    """Checks a row and turns its rank into a number; messages lack the line.

    Raises:
        ManifestError: the row is wrong.
    """
    if not _ID.fullmatch(record["id"] or ""):
        raise ManifestError(f"id {(record['id'] or '')[:80]!r}: must be the 32 hex digits of a clip")
    if record["label"] not in (*CHOICES["label"], None):
        raise ManifestError(f"unknown label {record['label'][:80]!r}: must be {' or '.join(CHOICES['label'])}")
    for name in ("pair_id", "axis", "annotator"):
        if len(record[name] or "") > _MAX_NAME:
            raise ManifestError(f"{name} has {len(record[name])} characters; at most {_MAX_NAME} are allowed")
    if (record["pair_id"] is None) != (record["rank"] is None):
        raise ManifestError("pair_id and rank go together; give both or neither")
    if record["label"] is None and record["pair_id"] is None:
        raise ManifestError("neither label nor pair_id: the row says nothing")
    if record["axis"] is not None and record["label"] is None:
        raise ManifestError(f"axis {record['axis'][:80]!r} without a label")
    if record["rank"] is not None:
        record["rank"] = whole_number("rank", record["rank"])
