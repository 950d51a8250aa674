"""The index of a manifest: files that are memory-mapped, so that all processes of a host share their pages.

They lie in one folder, named by the CSV's digest and the version of their format:

    .arrow        the columns of the CSV
    .shapes.npy   int32 [rows, 3], (T, H, W) of every row's latent; zeros where it could not be read
    .buckets.npy  int32, the rows whose latents could be read, sorted by shape
    .json         facts by which the others are checked; written last, without it there is no index
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value

from mugv_ds.config.model import LATENT_STRIDE as STRIDE
from mugv_ds.data.buckets import Buckets, Shape, sort_by_shape
from mugv_ds.data.paths import resolve
from mugv_ds.files.atomic import write_atomically

VERSION = 2  # part of the files' names: a change of what they hold must raise it
FEATURES = Features(
    {
        **dict.fromkeys(
            (
                *("sample_id", "source", "latent_path", "text_feat_path"),
                *("caption", "kind", "label", "pair_id"),
            ),
            Value("string"),
        ),
        "fps": Value("float64"),
        "rank": Value("int32"),
    }
)


@dataclass(frozen=True)
class Row:
    """One sample of the manifest.

    Attributes:
        sample_id: unique in the manifest.
        source: "generated" (latent already normalised) or "real" (raw).
        latent_path, text_feat_path: relative to the CSV's folder; `Index.resolve` opens them up.
        latent_shape: (T, H, W) of the latent; (0, 0, 0) where it could not be read.
        fps: frames a second, None where the manifest does not say.
        caption, kind, label, pair_id, rank: as in the CSV, None where it does not say.
    """

    sample_id: str
    source: str
    latent_path: str
    text_feat_path: str
    latent_shape: Shape
    fps: float | None
    caption: str | None
    kind: str | None
    label: str | None
    pair_id: str | None
    rank: int | None

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
        root: folder of the CSV. rows: of the CSV. csv_bytes: size of the CSV. arrow_bytes: size of the Arrow file.
        shapes, buckets, sample_ids: hex SHA-256 of what decides the order of training.
    """

    root: str
    rows: int
    csv_bytes: int
    arrow_bytes: int
    shapes: str
    buckets: str
    sample_ids: str

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
        root: folder that the rows' paths are relative to.

    Attributes:
        root: as given.
        digest: SHA-256 of the CSV, in hex; the identity of the data set.

    Raises:
        OSError, ValueError, TypeError: a file of the index is missing or damaged.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.root = root
        self.digest = digest_of(path)
        self._path = path
        self._facts = Facts.of(path)
        self._columns = open_columns(path)

    def __reduce__(self) -> tuple:
        return Index, (self._path, self.root)

    def __len__(self) -> int:
        return self._facts.rows

    @property
    def content(self) -> str:
        """Hex SHA-256 of what ranks must agree on: the CSV, the number of its rows and the shapes of the latents.

        Two ranks that built the index for themselves differ in it where one could read a latent that the other could
        not.
        """
        return hashlib.sha256(f"{self.digest} {self._facts.rows} {self._facts.shapes}".encode()).hexdigest()

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
        record = {name: column[i].as_py() for name, column in self._columns.items()}
        return Row(latent_shape=tuple(self._shapes[i].tolist()), **record)

    def shapes(self) -> np.ndarray:
        """(T, H, W) of every row's latent: int32 [n, 3], memory-mapped and read-only; zeros where it could not be read.

        It is the same array at each call, and its pages are shared by the processes of a host.
        """
        return self._shapes

    def buckets(self) -> Buckets:
        """The rows of each latent shape, memory-mapped; the same object at each call."""
        return self._buckets

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the CSV that rows have too, memory-mapped; null where the CSV does not say.

        Raises:
            KeyError: there is no such column.
        """
        return self._columns[name]

    def resolve(self, relative: str) -> Path:
        """The file that a row's path names; see `resolve`."""
        return resolve(self.root, relative)

    @cached_property
    def _shapes(self) -> np.ndarray:
        return _mapped(self._path.with_suffix(".shapes.npy"))

    @cached_property
    def _buckets(self) -> Buckets:
        return Buckets(self._shapes, _mapped(self._path.with_suffix(".buckets.npy")))


def digest_of(path: Path) -> str:
    """Hex SHA-256 of the CSV whose index is at `path`."""
    return path.name.partition(".")[0]


def open_columns(path: Path) -> dict[str, pa.ChunkedArray]:
    """The columns of an Arrow file, memory-mapped.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    table = Dataset.from_file(str(path)).data
    # Rows are taken from the columns directly: the formatting of `Dataset` takes several times as long.
    return dict(zip(table.column_names, table.columns, strict=True))


def complete(path: Path, shapes: np.ndarray, csv_path: Path, csv_bytes: int) -> None:
    """Makes an index of the Arrow file at `path`.

    Args:
        path: Arrow file with the columns of the CSV.
        shapes: int32 [rows, 3], (T, H, W) of every row's latent.
        csv_path: the CSV. csv_bytes: its size.

    Raises:
        OSError: the file system failed.
    """
    buckets = sort_by_shape(shapes)
    write_array(path.with_suffix(".shapes.npy"), shapes)
    write_array(path.with_suffix(".buckets.npy"), buckets)
    facts = Facts(
        root=str(csv_path.parent.resolve()),
        rows=len(shapes),
        csv_bytes=csv_bytes,
        arrow_bytes=path.stat().st_size,
        shapes=_digest(shapes),
        buckets=_digest(buckets),
        sample_ids=digest_of_strings(open_columns(path)["sample_id"]),
    )
    with write_atomically(path.with_suffix(".json")) as stream:
        stream.write(json.dumps(asdict(facts), indent=1).encode())


def fault(path: Path) -> str | None:
    """Why the index at `path` is not to be believed; None if it is as it was when it was complete.

    What decides the order of training is read and compared by its digests: 0.1 s for a million rows.
    """
    try:
        index, facts = Index(path, path.parent), Facts.of(path)
        shapes, buckets = index.shapes(), _mapped(path.with_suffix(".buckets.npy"))
        ids = index.column("sample_id")
        if path.stat().st_size != facts.arrow_bytes:
            return f"{path}: {path.stat().st_size} bytes, not the {facts.arrow_bytes} that were written"
        if len(ids) != facts.rows or shapes.shape != (facts.rows, 3):
            return f"{path}: {len(ids)} rows, {len(shapes)} shapes, not the {facts.rows} of the CSV"
        found = {"shapes": _digest(shapes), "buckets": _digest(buckets), "sample_ids": digest_of_strings(ids)}
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
