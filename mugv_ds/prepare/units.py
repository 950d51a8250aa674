"""Units of work, and the fragments that come of them: what resuming, Ray and the equality of bytes rest on.

A step's result for a unit is one Parquet file, its fragment, which is there as a whole or not at all. Its name holds
a key, the hash of all that the result follows from: step, version, the fields of the config that it declares, the
weights, and the keys of the fragments that it reads. So a fragment of the right name is done, and any other is stale.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.files.atomic import write_atomically

_KEY = 12  # hex digits
_NAME = re.compile(r"u(\d{6,})-([0-9a-f]{12})(?:\.(\d+))?\.parquet")


class FragmentError(InputError):
    """A fragment cannot be used. The message names it and what to do."""


@dataclass(frozen=True)
class Step:
    """One step of the preparation.

    Attributes:
        name: as in commands. version: raised whenever its results would differ.
        fields: dotted keys of the config that decide its result; sections or single values.
        reads: names of the steps whose fragments it reads.
    """

    name: str
    version: int
    fields: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    def key(self, config: PrepareConfig, reads: Iterable[str] = (), weights: str = "") -> str:
        """Returns the key of a fragment, given the keys of those that it reads and the hash of the weights."""
        return self.key_of(self.values(config), reads, weights)

    def values(self, config: PrepareConfig) -> dict[str, Any]:
        """Returns the values of the fields of a config, which are the same for all units, as JSON types.

        Raises:
            KeyError: there is no such field.
        """
        of_all = config.model_dump(mode="json") if self.fields else {}
        return {field: reduce(lambda value, name: value[name], field.split("."), of_all) for field in self.fields}

    def key_of(self, values: Mapping[str, Any], reads: Iterable[str] = (), weights: str = "") -> str:
        """Returns the key that `key` does, given the fields' values."""
        return digest(self.name, self.version, values, list(reads), weights)


def digest(*parts: Any) -> str:
    """Returns the first 12 hex digits of the SHA-256 of what can be written as JSON, whatever the order of keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:_KEY]


@dataclass(frozen=True)
class Fragments:
    """The fragments of one step in its folder of the working folder.

    Args:
        folder: such as work/clips; made when the first fragment is written.
    """

    folder: Path

    def path(self, unit: int, key: str, number: int = 0) -> Path:
        """Returns where a fragment is or would be; `number` counts those that were added to a unit later."""
        return self.folder / f"u{unit:06d}-{key}{f'.{number}' if number else ''}.parquet"

    def find(self, unit: int, key: str) -> list[Path]:
        """Returns the fragments of a unit that have this key, in the order in which they were added."""
        found, number = [], 0
        while (path := self.path(unit, key, number)).exists():
            found.append(path)
            number += 1
        return found

    def others(self, keys: Mapping[int, str]) -> list[Path]:
        """Returns what else lies in the folder: stale fragments, and what a killed process left half-written.

        Args:
            keys: unit → key of the fragments that count.
        """
        return [path for path in sorted(self.folder.glob("*")) if not self._counts(path, keys)]

    def write(self, unit: int, key: str, rows: pa.Table, number: int = 0) -> Path:
        """Writes a fragment; the same rows give the same bytes.

        Raises:
            OSError: the file system failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(unit, key, number)
        write_table(path, rows)
        return path

    @staticmethod
    def _counts(path: Path, keys: Mapping[int, str]) -> bool:
        name = _NAME.fullmatch(path.name)
        return name is not None and keys.get(int(name[1])) == name[2]


def write_table(path: Path, rows: pa.Table) -> None:
    """Writes a Parquet file atomically; the same rows give the same bytes.

    Raises:
        OSError: the file system failed.
    """
    with write_atomically(path) as stream:
        pq.write_table(rows.replace_schema_metadata(None), stream, compression="zstd", store_schema=False)


def read_table(path: Path, columns: Sequence[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """Reads a Parquet file that this room wrote.

    Args:
        columns: that are read; None for all. schema: what the columns must be, where it matters.

    Raises:
        FragmentError: it is damaged, or has other columns.
    """
    try:
        table = pq.read_table(path, columns=None if columns is None else list(columns), partitioning=None)
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise FragmentError(f"{path}: unreadable ({reason}); {_remedy(path)}") from None
    missing = [name for name in columns or () if name not in table.column_names]
    if missing or (schema is not None and not table.schema.equals(schema)):
        raise FragmentError(f"{path}: of another version of this tool; {_remedy(path)}")
    return table


def _remedy(path: Path) -> str:
    if _NAME.fullmatch(path.name):
        return "`prepare.py repair` has it made anew"
    return "delete it: the next run makes it anew"


def rows_of(paths: Iterable[Path], schema: pa.Schema) -> pa.Table:
    """Returns the rows of fragments, one after the other.

    Raises:
        FragmentError: see `read_table`.
    """
    return pa.concat_tables([read_table(path, schema=schema) for path in paths] or [schema.empty_table()])
