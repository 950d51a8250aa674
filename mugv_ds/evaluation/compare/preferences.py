"""Votes as training sets: `pairs.csv`, which DPO reads, and `labels.csv`, which KTO reads, beside what they name."""

import csv
import io
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular
from mugv_ds.config.text_encoder import read_text_encoder, write_text_encoder
from mugv_ds.evaluation.compare.draw import Comparison, Side, file_digest
from mugv_ds.evaluation.compare.outcomes import Outcome
from mugv_ds.evaluation.results import Result, read_results
from mugv_ds.files.atomic import write_atomically

PAIRS, LABELS = "pairs.csv", "labels.csv"
_COLUMNS = ("sample_id", "source", "latent_path", "text_feat_path", "fps", "caption")

Row = dict[str, Any]


def write_preferences(
    folder: Path, results: Path, comparison: Comparison, found: Sequence[Outcome]
) -> tuple[dict[str, int], list[str]]:
    """Writes the training sets into a folder of their own, made anew, with the latents and text features.

    An item of which one side is better becomes a pair, the better one with rank 1. Of one whose sides are both good, or
    both bad, each video gets that label; a video that is in several items gets the label of most of them. What
    annotators are divided on is left out. Latents and features are hard links to those of the evaluation, or copies
    on another file system. A set that would be empty is not written.

    Args:
        results: folder of the evaluation. found: what is said, in answer to one question.

    Returns:
        How many rows each file has, and in words what was left out as divided.

    Raises:
        InputError: videos were made anew since, or their latents were not kept; nothing is written then. OSError: the
            file system failed.
    """
    pairs = [one for one in found if one.better() is not None]
    labels, divided = _labels(found)
    needed = {side.id: (one.item.job, side) for one in found for side in (one.item.left, one.item.right)}
    used = {side.id for one in pairs for side in (one.item.left, one.item.right)} | labels.keys()
    there = {(one.weights, one.job): one for one in read_results(results)}
    rows = _rows(results, {id_: needed[id_] for id_ in sorted(used)}, there)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if (info := read_text_encoder(results)) is not None:
        write_text_encoder(folder, info)
    for row, latent, features in rows.values():
        _link(latent, folder / row["latent_path"])
        _link(features, folder / row["text_feat_path"])
    ranked = []
    for one in pairs:
        sides = (one.item.left, one.item.right)
        for rank, side in enumerate(sides if one.choice == "left" else sides[::-1], 1):
            row = rows[side.id][0]
            ranked.append(row | {"sample_id": f"{one.item.id}-{rank}", "pair_id": one.item.id, "rank": rank})
    labelled = [rows[id_][0] | {"sample_id": id_, "label": label} for id_, label in sorted(labels.items())]
    for name, records, columns in ((PAIRS, ranked, ("pair_id", "rank")), (LABELS, labelled, ("label",))):
        if records:
            _write(folder / name, records, (*_COLUMNS, *columns))
    return {PAIRS: len(ranked), LABELS: len(labelled)}, [one.tie() for one in found if one.choice is None] + divided


def _labels(found: Sequence[Outcome]) -> tuple[dict[str, str], list[str]]:
    """Returns the label of each video that has one, and those that items are divided on, in words."""
    votes: dict[str, Counter[str]] = {}
    for one in found:
        if one.choice in ("both_good", "both_bad"):
            for side in (one.item.left, one.item.right):
                votes.setdefault(side.id, Counter())[one.choice.removeprefix("both_")] += 1
    divided = [
        f"video {id_}: {count['good']} items say good, as many bad"
        for id_, count in sorted(votes.items())
        if count["good"] == count["bad"]
    ]
    agreed = {id_: count.most_common(1)[0][0] for id_, count in votes.items() if count["good"] != count["bad"]}
    return agreed, divided


def _rows(
    results: Path, used: dict[str, tuple[str, Side]], there: dict[tuple[str, str], Result]
) -> dict[str, tuple[Row, Path, Path]]:
    """Returns what both sets say of each video, its latent and its text features.

    Raises:
        InputError: see `write_preferences`.
    """
    rows, without = {}, []
    for id_, (job, side) in used.items():
        one = there.get((side.weights, job))
        if one is None or file_digest(one.video) != side.digest:
            raise InputError(
                f"{results}: the video {job} of {side.weights} is not the one that was voted on; restore it, or "
                "compare the new ones"
            )
        if one.latent is None or one.text_features is None:
            without.append(one)
            continue
        row = {
            "source": "generated",
            "latent_path": f"latents/{side.weights}/{job}.pt",
            "text_feat_path": f"text_features/{one.text_features.name}",
            "fps": one.made["settings"]["fps"],
            "caption": one.prompt,
        }
        rows[id_] = row, one.latent, one.text_features
    if without:
        raise InputError(
            f"{results}: latents or text features of {len(without)} videos were not kept, the first is "
            f"{without[0].job} of {without[0].weights}; evaluate again with --keep-latents, then repeat this"
        )
    return rows


def _link(source: Path, target: Path) -> None:
    """Gives a regular file another name, or copies it where that cannot be; done once."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_regular(source) as stream:
        try:
            os.link(source.resolve(), target)
        except OSError:
            with write_atomically(target) as copy:
                shutil.copyfileobj(stream, copy, 1 << 20)


def _write(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with write_atomically(path) as stream:
        stream.write(text.getvalue().encode())
