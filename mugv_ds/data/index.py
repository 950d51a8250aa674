"""The index of a manifest: files that are memory-mapped, so that all processes of a host share their pages.

They lie in one folder, named by the CSV's digest and the version of their format:

    .arrow        the columns of the CSV
    .shapes.npy   int32 [rows, 3], (T, H, W) of every row's latent; zeros where it could not be read
    .buckets.npy  int32, the rows whose latents could be read, sorted by shape
    .places.npy   `PLACES` [rows], where the tensors of every row lie in shards; absent if no row has one in a shard
    .json         facts by which the others are checked; written last, without it there is no index
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets.table import MemoryMappedTable

from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.model import LATENT_STRIDE as STRIDE
from mugv_ds.data.buckets import Buckets, Shape, sort_by_shape
from mugv_ds.data.paths import SHARD_SUFFIX, split_key
from mugv_ds.data.shards import DTYPES, Entry
from mugv_ds.data.storage import Files, Folder, Range
from mugv_ds.files.atomic import write_atomically

VERSION = 3  # part of the files' names: a change of what they hold must raise it
_IN_A_SHARD = f"{SHARD_SUFFIX}#"
_NUMBER = pa.int16()  # of a value in a chunk, which has 10,000 rows


def _few(value: pa.DataType, number: pa.DataType = _NUMBER) -> pa.DataType:
    """The type of a column with few values: each chunk of rows has them once, and for every row the number of one."""
    return pa.dictionary(number, value)


SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        **dict.fromkeys(("source", "kind", "label"), _few(pa.string(), pa.int8())),
        **dict.fromkeys(("latent_path", "text_feat_path", "caption", "pair_id"), _few(pa.string())),
        **dict.fromkeys(("fps", "weight"), _few(pa.float64())),
        "rank": _few(pa.int32()),
    }
)
CODES = ("", *DTYPES)  # of dtypes; 0: not in a shard, or not read
PLACES = np.dtype(
    [
        *(("latent_offset", "<u4"), ("latent_crc", "<u4"), ("text_offset", "<u4"), ("text_crc", "<u4")),
        *(("text_tokens", "<u2"), ("text_channels", "<u2"), ("latent_dtype", "u1"), ("text_dtype", "u1")),
    ]
)


@dataclass(frozen=True)
class Row:
    """One sample of the manifest.

    Attributes:
        sample_id: unique in the manifest.
        source: "generated" (latent already normalised) or "real" (raw).
        latent_path, text_feat_path: as in the CSV; `Index.files` opens them up.
        latent_shape: (T, H, W) of the latent; (0, 0, 0) where it could not be read.
        latent_entry, text_entry: where they lie in shards; None for files of their own, and where it could not be read.
        fps: frames a second, None where the manifest does not say.
        caption, kind, label, pair_id, rank, weight: as in the CSV, None where it does not say.
    """

    sample_id: str
    source: str
    latent_path: str
    text_feat_path: str
    latent_shape: Shape
    latent_entry: Entry | None
    text_entry: Entry | None
    fps: float | None
    caption: str | None
    kind: str | None
    label: str | None
    pair_id: str | None
    rank: int | None
    weight: float | None

    @property
    def height(self) -> int:
        """Pixels; those of the CSV, which are multiples of 8, or 8 × the latent's."""
        return STRIDE * self.latent_shape[1]

    @property
    def width(self) -> int:
        """Pixels, as `height`."""
        return STRIDE * self.latent_shape[2]


@dataclass(frozen=True)
class Facts:
    """What was true of an index when it was complete.

    Attributes:
        root: where its paths lead. rows: of the CSV. csv_bytes: size of the CSV. arrow_bytes: size of the Arrow file.
        shapes, buckets, sample_ids: hex SHA-256 of what decides the order of training.
        places: hex SHA-256 of where tensors lie in shards, None if no row has one in a shard.
    """

    root: str
    rows: int
    csv_bytes: int
    arrow_bytes: int
    shapes: str
    buckets: str
    sample_ids: str
    places: str | None

    @classmethod
    def of(cls, path: Path) -> "Facts":
        """Reads the facts of the index at `path`.

        Raises:
            OSError: there are none, or they cannot be read. ValueError, TypeError: they are damaged.
        """
        return cls(**json.loads(path.with_suffix(".json").read_text()))


class Index:
    """The rows of a manifest, memory-mapped; cheap to pickle and to open in many processes.

    Args:
        path: Arrow file of `build_index`.
        root: folder of the CSV.
        files: where the rows' paths lead.

    Attributes:
        root, files: as given.
        digest: SHA-256 of the CSV, in hex; the identity of the data set.

    Raises:
        OSError, ValueError, TypeError: a file of the index is missing or damaged.
    """

    def __init__(self, path: Path, root: Path, files: Files) -> None:
        self.root, self.files = root, files
        self.digest = digest_of(path)
        self._path = path
        self._facts = Facts.of(path)
        self._columns = open_columns(path)
        self._recent: tuple[int, Row | None] = -1, None

    def __reduce__(self) -> tuple:
        return Index, (self._path, self.root, self.files)

    def __len__(self) -> int:
        return self._facts.rows

    @property
    def content(self) -> str:
        """Hex SHA-256 of what ranks must agree on: the CSV, the number of its rows, the latents' shapes and the shards.

        Two ranks that built the index for themselves differ in it where one could read a latent that the other could
        not.
        """
        parts = (self.digest, self._facts.rows, self._facts.shapes, self._facts.places)
        return hashlib.sha256(" ".join(str(part) for part in parts if part is not None).encode()).hexdigest()

    def ids_digest(self) -> str:
        """Hex SHA-256 of the sample ids in the order of the rows."""
        return self._facts.sample_ids

    def row(self, i: int) -> Row:
        """Row `i` of the CSV, counted from 0 without the header.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.root}: row {i} of {len(self)}")
        number, row = self._recent  # who reads a sample asks for its row several times
        if number != i:
            row = self._read_row(i)
            self._recent = i, row
        return row

    def _read_row(self, i: int) -> Row:
        record = {name: column[i].as_py() for name, column in self._columns.items()}
        for name in ("latent_path", "text_feat_path"):
            record[name] = whole_path(record[name], record["sample_id"])
        shape = tuple(self._shapes[i].tolist())
        return Row(latent_shape=shape, **self._entries(i, shape), **record)

    def _entries(self, i: int, shape: Shape) -> dict[str, Entry | None]:
        """Where the tensors of a row lie in shards, by the names of `Row`."""
        if self._places is None:
            return {"latent_entry": None, "text_entry": None}
        place = dict(zip(PLACES.names, self._places[i].item(), strict=True))
        return {
            f"{side}_entry": _entry(CODES[place[f"{side}_dtype"]], dims, place[f"{side}_offset"], place[f"{side}_crc"])
            for side, dims in (
                ("latent", (LATENT_CHANNELS, *shape)),
                ("text", (place["text_tokens"], place["text_channels"])),
            )
        }

    def fetch(self, wanted: Iterable[tuple[int, bool]]) -> None:
        """Gets the tensors in shards of rows that are about to be read, where that saves time; see `Files.fetch`.

        Args:
            wanted: row, and whether its text features are read too.
        """
        self.files.fetch(chain.from_iterable(self._ranges(i, with_text) for i, with_text in wanted))

    def _ranges(self, i: int, with_text: bool) -> Iterator[Range]:
        row = self.row(i)
        text = [(row.text_feat_path, row.text_entry)] if with_text else []
        for path, entry in [(row.latent_path, row.latent_entry), *text]:
            if entry is not None:
                yield Range(split_key(path)[0], entry.offset, entry.size, entry.crc)

    def shapes(self) -> np.ndarray:
        """(T, H, W) of every row's latent: int32 [n, 3], memory-mapped and read-only; zeros where it could not be read.

        It is the same array at each call, and its pages are shared by the processes of a host.
        """
        return self._shapes

    def places(self) -> np.ndarray | None:
        """Where the tensors of every row lie in shards: `PLACES` [rows], memory-mapped; None if none lies in one."""
        return self._places

    def buckets(self) -> Buckets:
        """The rows of each latent shape, memory-mapped; the same object at each call."""
        return self._buckets

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the CSV that rows have too; null where the CSV does not say.

        Raises:
            KeyError: there is no such column.
        """
        column = self._columns[name]
        return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column

    @cached_property
    def _shapes(self) -> np.ndarray:
        return _mapped(self._path.with_suffix(".shapes.npy"))

    @cached_property
    def _buckets(self) -> Buckets:
        return Buckets(self._shapes, _mapped(self._path.with_suffix(".buckets.npy")))

    @cached_property
    def _places(self) -> np.ndarray | None:
        return None if self._facts.places is None else _mapped(self._path.with_suffix(".places.npy"))


def digest_of(path: Path) -> str:
    """Hex SHA-256 of the CSV whose index is at `path`."""
    return path.name.partition(".")[0]


def open_columns(path: Path) -> dict[str, pa.ChunkedArray]:
    """The columns of an Arrow file, memory-mapped.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    table = MemoryMappedTable.from_file(str(path)).table
    return dict(zip(table.column_names, table.columns, strict=True))


def kept_path(path: str, sample_id: str) -> str:
    """A path as the index keeps it: without a key that is the sample's id, so that rows of a shard have the same."""
    shard = path.removesuffix(sample_id)
    return shard if shard.endswith(_IN_A_SHARD) else path


def whole_path(kept: str, sample_id: str) -> str:
    """The path of the CSV of what `kept_path` made of it."""
    return kept + sample_id if kept.endswith(_IN_A_SHARD) else kept


def _entry(dtype: str, shape: tuple[int, ...], offset: int, crc: int) -> Entry | None:
    return Entry(dtype, shape, offset, prod(shape) * DTYPES[dtype].itemsize, crc) if dtype else None


def complete(path: Path, shapes: np.ndarray, places: np.ndarray | None, root: str, csv_bytes: int) -> None:
    """Makes an index of the Arrow file at `path`.

    Args:
        path: Arrow file with the columns of the CSV.
        shapes: int32 [rows, 3], (T, H, W) of every row's latent.
        places: `PLACES` [rows]; None if no row has a tensor in a shard.
        root: where its paths lead. csv_bytes: size of the CSV.

    Raises:
        OSError: the file system failed.
    """
    buckets = sort_by_shape(shapes)
    write_array(path.with_suffix(".shapes.npy"), shapes)
    write_array(path.with_suffix(".buckets.npy"), buckets)
    if places is not None:
        write_array(path.with_suffix(".places.npy"), places)
    facts = Facts(
        root=root,
        rows=len(shapes),
        csv_bytes=csv_bytes,
        arrow_bytes=path.stat().st_size,
        shapes=_digest(shapes),
        buckets=_digest(buckets),
        sample_ids=digest_of_strings(open_columns(path)["sample_id"]),
        places=None if places is None else _digest(places),
    )
    with write_atomically(path.with_suffix(".json")) as stream:
        stream.write(json.dumps(asdict(facts), indent=1).encode())


def fault(path: Path) -> str | None:
    """Why the index at `path` is not to be believed; None if it is as it was when it was complete.

    What decides the order of training is read and compared by its digests: 0.1 s for a million rows.
    """
    try:
        index, facts = Index(path, path.parent, Folder(path.parent)), Facts.of(path)
        shapes, buckets = index.shapes(), _mapped(path.with_suffix(".buckets.npy"))
        ids = index.column("sample_id")
        if path.stat().st_size != facts.arrow_bytes:
            return f"{path}: {path.stat().st_size} bytes, not the {facts.arrow_bytes} that were written"
        if len(ids) != facts.rows or shapes.shape != (facts.rows, 3):
            return f"{path}: {len(ids)} rows, {len(shapes)} shapes, not the {facts.rows} of the CSV"
        found = {"shapes": _digest(shapes), "buckets": _digest(buckets), "sample_ids": digest_of_strings(ids)}
        if (places := index.places()) is not None:
            found["places"] = _digest(places) if (places.dtype, len(places)) == (PLACES, facts.rows) else ""
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{path}: {str(error).partition(chr(10))[0]}"
    return next((f"{path}: its {name} are damaged" for name, is_ in found.items() if is_ != getattr(facts, name)), None)


def digest_of_strings(column: pa.ChunkedArray) -> str:
    """Hex SHA-256 of strings in their order, however Arrow has cut them into chunks.

    It is that of two digests: of the strings' lengths in bytes (int32), and of their UTF-8 bytes one after the other.
    """
    lengths, text = hashlib.sha256(), hashlib.sha256()
    for chunk in column.chunks:
        if len(chunk):
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            lengths.update(np.diff(ends))
            text.update(memoryview(data)[ends[0] : ends[-1]])
    return hashlib.sha256(lengths.digest() + text.digest()).hexdigest()


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a `.npy` file atomically.

    Raises:
        OSError: the file system failed.
    """
    with write_atomically(path) as stream:
        np.save(stream, array, allow_pickle=False)


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
