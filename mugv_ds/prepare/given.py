"""Captions that somebody wrote: a CSV for many videos, or a file beside each."""

import json
import sqlite3
import uuid
from collections.abc import Iterable
from contextlib import closing
from itertools import islice
from pathlib import Path

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.data.manifest import ManifestError, Record, hash_csv, read_records
from mugv_ds.data.paths import PathError, check_lexically, resolve
from mugv_ds.prepare.views import ClipView

_MAX_SIDECAR_BYTES = 1 << 16
_ROWS = 1000
_TABLE = "CREATE TABLE {} (key TEXT PRIMARY KEY, line INTEGER, caption TEXT) WITHOUT ROWID"


class CaptionFile:
    """The captions of a CSV with the columns caption, and id (of a clip) or path (of a video).

    They are looked up in a database in the working folder, which is made once for each content of the CSV: so they cost
    no memory, however many there are.

    Args:
        path: the CSV. work: the working folder, of which `given/` is used.

    Raises:
        ManifestError, PathError: it cannot be read; or a row has both id and path or neither, a path that leads out, no
            caption, or the id or path of an earlier row. The message names the line.
    """

    def __init__(self, path: Path, work: Path) -> None:
        self._csv = path
        self._path = work / "given" / f"{hash_csv(path)}.sqlite"
        if not self._path.exists():
            self._build()

    def find(self, clip: ClipView) -> str | None:
        """Returns the caption of a clip, or else of its video; None if there is neither."""
        query = "SELECT caption FROM given WHERE key IN (?, ?) ORDER BY key LIMIT 1"  # "id" comes before "path"
        with self._open() as database:
            found = database.execute(query, (f"id:{clip.clip}", f"path:{clip.relative}")).fetchone()
        return found[0] if found else None

    def check_known(self, clips: Iterable[tuple[str, str]]) -> None:
        """Checks that every row is about something that is there; memory does not grow with their number.

        Args:
            clips: id, and path of the video relative to the folder of videos, of every clip; and of every video that
                has none, with an empty id.

        Raises:
            ManifestError: a row is not. The message names the first.
        """
        keys = (((f"id:{clip}",), (f"path:{path}",)) for clip, path in clips)
        with self._open() as database:
            database.execute("CREATE TEMP TABLE known (key TEXT PRIMARY KEY) WITHOUT ROWID")
            while batch := [key for pair in islice(keys, _ROWS) for key in pair]:
                database.executemany("INSERT OR IGNORE INTO known VALUES (?)", batch)
            missing = "FROM given WHERE key NOT IN (SELECT key FROM known)"
            count = database.execute(f"SELECT count(*) {missing}").fetchone()[0]
            if count:
                key, line = database.execute(f"SELECT key, line {missing} ORDER BY line LIMIT 1").fetchone()
                kind, _, value = key.partition(":")
                what = "clip has this id" if kind == "id" else "video has this path"
                raise ManifestError(
                    f"{self._csv}:{line}: no {what}: {value[:200]!r} ({count:,} such rows); ids change with where a "
                    "video is cut, paths do not"
                )

    def _open(self) -> closing:
        return closing(sqlite3.connect(f"{self._path.absolute().as_uri()}?immutable=1", uri=True))

    def _build(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with closing(sqlite3.connect(temporary)) as database:
                database.execute(_TABLE.format("given"))
                for line, record in read_records(self._csv, ("caption",), ("id", "path"), _check):
                    self._insert(database, line, record)
                database.commit()
            temporary.replace(self._path)  # a crash of the machine may leave a damaged one: it lies beside nothing
        finally:
            temporary.unlink(missing_ok=True)

    def _insert(self, database: sqlite3.Connection, line: int, record: Record) -> None:
        kind = "id" if record["id"] else "path"
        key = f"{kind}:{record[kind]}"
        try:
            database.execute("INSERT INTO given VALUES (?, ?, ?)", (key, line, record["caption"]))
        except sqlite3.IntegrityError:
            first = database.execute("SELECT line FROM given WHERE key = ?", (key,)).fetchone()[0]
            raise ManifestError(f"{self._csv}:{line}: duplicate {kind}, first used in line {first}") from None


def _check(record: Record) -> None:
    if (record["id"] is None) == (record["path"] is None):
        raise ManifestError("must have an id or a path, and not both")
    if record["path"] is not None:
        check_lexically(record["path"])
    if not (record["caption"] or "").strip():
        raise ManifestError("blank caption")


def sidecar_caption(root: Path, video: str) -> str | None:
    """Returns the caption in NAME.txt, or else in NAME.json, beside a video NAME.mp4; None if there is neither.

    Args:
        root: folder of the videos. video: path of the video in it.

    Raises:
        InputError: there is one that is no regular file in the folder of videos, larger than 64 KiB, not UTF-8, or JSON
            without "caption". The message names it relative to the folder of videos.
    """
    for suffix in (".txt", ".json"):
        relative = str(Path(video).with_suffix(suffix))
        try:
            path = resolve(root, relative)
            if not path.exists():
                continue
            text = read_text_file(path, _MAX_SIDECAR_BYTES)
        except PathError:
            raise InputError(f"{relative}: leads out of the folder of videos, or is no regular file") from None
        except InputError as error:
            raise InputError(f"{relative}: {str(error).removeprefix(f'{path}: ')}") from None
        if suffix == ".txt":
            return text
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise InputError(f"{relative}: not JSON") from None
        if not isinstance(found, dict) or not isinstance(found.get("caption"), str):
            raise InputError(f'{relative}: must be {{"caption": "…"}}')
        return found["caption"]
    return None
