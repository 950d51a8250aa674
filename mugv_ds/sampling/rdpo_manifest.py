"""The CSVs of pairs that `rdpo` made: what the manifest says of a clip is said of both of its sides.

Whole source videos are held out, so that no clip of a training video is among the held-out ones.
"""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mugv_ds.config.errors import InputError
from mugv_ds.data.manifest import REQUIRED_COLUMNS, Record, column_names, read_records
from mugv_ds.files.atomic import write_atomically
from mugv_ds.sampling.rdpo import PairFiles, Unit, error_key

PAIRS, HELD_OUT = "pairs.csv", "pairs_val.csv"
PROVENANCE_NAME = "provenance.parquet"  # of a preparation, beside its manifest

_ORIGIN = ("video", "licence", "origin")  # of provenance
_OURS = ("pair_id", "rank", "real_id", "reconstruction_error")
_DROPPED = (*REQUIRED_COLUMNS, *_OURS, "label")  # a label is one of the clip as it was
_MOST_VAL = 0.9


def read_rows(
    manifest: Path, rows: Sequence[int], video_column: str | None
) -> tuple[dict[int, Record], dict[int, str]]:
    """Reads what the CSV says of some rows, all columns as text, and which source videos they are of.

    Where a preparation's `provenance.parquet` lies beside the CSV, its video, licence and origin are added to the
    columns. The source video is what `video_column` says or, without one, that of the provenance; a row of which
    neither says anything is a video of its own.

    Returns:
        By the row's number: its columns, None where they are empty; its source video.

    Raises:
        InputError: the CSV has no such column, or the provenance cannot be read.
    """
    names, wanted = column_names(manifest), set(rows)
    if video_column is not None and video_column not in names:
        raise InputError(f"{manifest}: no column {video_column!r} (--video-column); it has {', '.join(names)[:300]}")
    others = [name for name in names if name not in REQUIRED_COLUMNS]
    records = read_records(manifest, REQUIRED_COLUMNS, others, lambda record: None)
    found = {i: record for i, (_, record) in enumerate(islice(records, max(rows) + 1)) if i in wanted}
    origins = _origins(manifest.with_name(PROVENANCE_NAME), [record["sample_id"] for record in found.values()])
    videos = {}
    for i, record in found.items():
        record |= {name: value for name, value in origins.get(record["sample_id"], {}).items() if not record.get(name)}
        videos[i] = record.get(video_column or "video") or record["sample_id"]
    return found, videos


def _origins(path: Path, sample_ids: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """Returns video, licence and origin of samples by their ids; empty where there is no provenance."""
    if not path.exists():
        return {}
    try:
        table = pq.read_table(path, columns=["sample", *_ORIGIN], filters=pc.field("sample").isin(sample_ids))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a preparation's provenance ({str(error).partition(chr(10))[0]})") from error
    return {row.pop("sample"): row for row in table.to_pylist()}


def held_out_videos(videos: Mapping[int, str], share: float, seed: int) -> set[str]:
    """Draws a share of the source videos, by their hashes; at least one, and not all, unless the share is 0.

    Raises:
        InputError: the share makes no sense, or there are too few videos.
    """
    if not 0 <= share <= _MOST_VAL:
        raise InputError(f"--val-share {share:g}: must be 0 to {_MOST_VAL}")
    names = sorted(set(videos.values()), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    if share and len(names) < 2:
        raise InputError(f"--val-share {share:g}: all clips are of one source video; take more rows, or a share of 0")
    return set(names[: min(max(round(share * len(names)), 1), len(names) - 1)]) if share else set()


def write_pairs(
    files: PairFiles,
    units: Sequence[Unit],
    records: Mapping[int, Record],
    videos: Mapping[int, str],
    held_out: set[str],
) -> tuple[dict[str, int], list[float]]:
    """Writes `pairs.csv` and, if any are held out, `pairs_val.csv`, in the order of the manifest.

    Args:
        records, videos: see `read_rows`. held_out: names of source videos.

    Returns:
        How many pairs each file has, and how far each better side is from its clip, see `rdpo.error_key`.

    Raises:
        InputError: a shard is damaged.
    """
    unit_of = {row: unit for unit in units for row in unit.rows}
    errors = {
        row: float(error)
        for unit in units
        for row, error in zip(unit.rows, files.load("better", unit, list(map(error_key, unit.rows))), strict=True)
    }
    carried = [name for name in dict.fromkeys((*next(iter(records.values())), *_ORIGIN)) if name not in _DROPPED]
    carried = [name for name in carried if any(record.get(name) for record in records.values())]
    counts, columns = {}, (*REQUIRED_COLUMNS, *carried, *_OURS)
    for name, is_val in ((PAIRS, False), (HELD_OUT, True)):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        rows = [row for row in sorted(unit_of) if (videos[row] in held_out) == is_val]
        for row in rows:
            writer.writerows(_sides(files, unit_of[row], row, records[row], carried, errors[row]))
        path = files.folder / name
        if rows:
            with write_atomically(path) as stream:
                stream.write(text.getvalue().encode())
            counts[name] = len(rows)
        else:
            path.unlink(missing_ok=True)  # of another share
    return counts, [errors[row] for row in sorted(errors)]


def _sides(
    files: PairFiles, unit: Unit, row: int, record: Record, carried: Sequence[str], error: float
) -> list[dict[str, str | int | None]]:
    """Returns the two rows of a pair."""
    clip = record["sample_id"]
    both = {name: record.get(name) for name in carried}
    both |= {"source": "generated", "text_feat_path": files.reference("text_features", unit, row)}
    both |= {"pair_id": clip, "real_id": clip}
    return [
        {"sample_id": f"{clip}-{side}", "latent_path": files.reference(side, unit, row), "rank": rank}
        | both
        | {"reconstruction_error": f"{error:.6g}" if side == "better" else None}
        for rank, side in enumerate(("better", "worse"), 1)
    ]
