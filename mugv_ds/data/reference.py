"""The cache of the reference's losses: one Parquet file with a row for each visit of a sample.

The reference does not learn, and a sample's noise and timestep follow from its id and visit. So its losses are computed
once, ahead of the run, and no second model is resident while the policy trains. What they were computed from is the
file's key; a run with another key must not use them.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from mugv_ds.config.errors import InputError
from mugv_ds.files.atomic import write_atomically

REFERENCE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("visit", pa.int32(), nullable=False),  # how many times the sample was visited before
        pa.field("timestep", pa.float32(), nullable=False),  # [0, 1000]
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("content", pa.uint32(), nullable=False),  # of what was read, see `data.readers.content_of`
    ]
)
# A cell of the losses as they are used, [rows, visits]; the loss is NaN where it is not known.
REFERENCE_DTYPE = np.dtype([("loss", np.float64), ("content", np.uint32)])
_METADATA = b"mugv_ds.reference"
_VERSION = 2
_MAX_VALUES = 1 << 28  # 2 GiB of losses, 67 million samples of 4 visits: a file that asks for more is not one of ours
_SHOWN = 40  # characters of a key's value in a message
_REMEDY = "make it with make reference CONFIG=…"


class KeyMismatch(InputError):
    """The losses belong to another run. The message names the file, what differs and both values, shortened."""


@dataclass(frozen=True)
class ReferenceKey:
    """What the losses were computed from; equal keys mean equal losses.

    Attributes:
        weights: of the reference. data: of the manifest. noise: what timesteps and noise follow from.
    """

    weights: str
    data: str
    noise: str


@dataclass(frozen=True)
class _Header(ReferenceKey):
    """The file's metadata, as JSON."""

    version: int


def write_reference(path: str | Path, key: ReferenceKey, table: pa.Table) -> None:
    """Writes the cache, sorted by sample id and visit, and puts it in place when it is complete.

    Args:
        path: the file; its folder is made if need be.
        key: what the losses were computed from.
        table: columns that can be cast to those of `REFERENCE_SCHEMA` without loss.

    Raises:
        InputError: a (sample id, visit) is there twice, a visit is negative or a loss is not finite.
        ValueError: other columns, or nulls in them.
        OSError: the file system failed.
    """
    path = Path(path)
    table = table.cast(REFERENCE_SCHEMA).sort_by([("sample_id", "ascending"), ("visit", "ascending")])
    if problem := _problem(table):
        raise InputError(f"{path}: {problem}; nothing was written")
    header = json.dumps(asdict(_Header(**asdict(key), version=_VERSION)))
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"store_schema": False, "write_page_checksum": True}  # Parquet's own types are enough
    with write_atomically(path) as stream, pq.ParquetWriter(stream, REFERENCE_SCHEMA, **options) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_METADATA: header})


def read_reference(path: str | Path, key: ReferenceKey, sample_ids: Sequence[str]) -> np.ndarray:
    """Returns the cache as `REFERENCE_DTYPE` [samples, visits]; visits is the highest one plus 1.

    Args:
        path: a file of `write_reference`.
        key: of this run.
        sample_ids: the rows of the result, each id once.

    Raises:
        KeyMismatch: the losses were computed from something else.
        InputError: the file is missing, damaged or no such cache, or knows other samples.
        OSError: the file system failed.
    """
    path = Path(path)
    table = _read(path, key)
    if problem := _problem(table):
        raise InputError(f"{path}: {problem}; {_REMEDY}")
    rows = pc.index_in(table["sample_id"], pa.array(sample_ids, pa.string()))
    if rows.null_count:
        stranger = table["sample_id"].filter(rows.is_null())[0]
        raise InputError(f"{path}: sample {stranger.as_py()!r} is not in the manifest; {_REMEDY}")
    visit = table["visit"].to_numpy()
    visits = int(visit.max(initial=-1)) + 1
    if len(sample_ids) * visits > _MAX_VALUES:
        raise InputError(f"{path}: {visits} visits of {len(sample_ids)} samples are too many; {_REMEDY}")
    cells = unknown(len(sample_ids), visits)
    for name in REFERENCE_DTYPE.names:
        cells[name][rows.to_numpy(), visit] = table[name].to_numpy()
    return cells


def unknown(rows: int, visits: int) -> np.ndarray:
    """Returns cells [rows, visits] of which no loss is known."""
    cells = np.zeros((rows, visits), REFERENCE_DTYPE)
    cells["loss"] = np.nan
    return cells


def _read(path: Path, key: ReferenceKey) -> pa.Table:
    """The table of a file with this key; its values are not checked."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; {_REMEDY}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_key(path, file.metadata.metadata or {}, key)
            if not file.schema_arrow.equals(REFERENCE_SCHEMA):
                columns = ", ".join(f"{field.name} {field.type}" for field in file.schema_arrow)
                raise InputError(f"{path}: not the columns of a reference's losses: {columns}; {_REMEDY}")
            if file.metadata.num_rows > _MAX_VALUES:
                raise InputError(f"{path}: {file.metadata.num_rows} rows are too many; {_REMEDY}")
            table = file.read()
            table.validate(full=True)  # text that is not UTF-8
            return table
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: not a sound Parquet file ({reason}); {_REMEDY}") from error


def _check_key(path: Path, metadata: dict[bytes, bytes], key: ReferenceKey) -> None:
    try:
        header = TypeAdapter(_Header).validate_json(metadata.get(_METADATA, b""))
    except ValueError:
        raise InputError(f"{path}: not a file of a reference's losses; {_REMEDY}") from None
    if header.version != _VERSION:
        raise InputError(f"{path}: written in version {header.version}, this program reads {_VERSION}; {_REMEDY}")
    names = [field.name for field in fields(key)]
    pairs = [(name, getattr(header, name), getattr(key, name)) for name in names]
    differences = [f"other {name}, {_contrast(theirs, ours)}" for name, theirs, ours in pairs if theirs != ours]
    if differences:
        raise KeyMismatch(f"{path}: computed from {' and '.join(differences)}; {_REMEDY}")


def _contrast(theirs: str, ours: str) -> str:
    """Both values around the place where they begin to differ."""
    first = next(i for i, (a, b) in enumerate(itertools.zip_longest(theirs, ours)) if a != b)
    begin = max(0, first - _SHOWN // 2)
    theirs, ours = (
        "…" * (begin > 0) + text[begin : begin + _SHOWN] + "…" * (len(text) > begin + _SHOWN) for text in (theirs, ours)
    )
    return f"{theirs!r} where this run has {ours!r}"


def _problem(table: pa.Table) -> str | None:
    """The first row whose visit or loss cannot be, or that does not follow the one before by (sample id, visit)."""
    ids, visit, loss = table["sample_id"], table["visit"].to_numpy(), table["loss"].to_numpy()
    same_id, later_id = pc.equal(ids[1:], ids[:-1]).to_numpy(), pc.greater(ids[1:], ids[:-1]).to_numpy()
    follows = later_id | (same_id & (visit[1:] > visit[:-1]))
    for problem, wrong in (
        ("a negative visit", visit < 0),
        ("a loss that is not finite", ~np.isfinite(loss)),
        ("more than one loss, or is out of order", np.append(False, ~follows)),
    ):
        if wrong.any():
            row = int(wrong.argmax())
            return f"sample {ids[row].as_py()!r}, visit {visit[row]}, has {problem}"
    return None
