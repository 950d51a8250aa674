"""Who may be in the set, as people say it: the table of sources, and the list of what is blocked."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mugv_ds.config.prepare_schema import ScreenSection
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.data.manifest import Record, read_records
from mugv_ds.data.paths import ManifestError, check_lexically

_MAX_BLOCKLIST_BYTES = 1 << 28
_WILD = re.compile(r"[*?\[]")
_SHA256, _HASH = re.compile("[0-9a-fA-F]{64}"), re.compile("[0-9a-fA-F]{16}")
_ANSWERS = {"yes": True, "no": False}


@dataclass(frozen=True)
class Source:
    """What a row of the table of sources says of the videos that it fits.

    Attributes:
        allowed: None where the row does not say.
    """

    licence: str | None = None
    allowed: bool | None = None
    consent: str | None = None
    origin: str | None = None
    note: str | None = None


class Sources:
    """The table of sources: for each path, the first row whose glob fits it. `*` also stands for slashes.

    Args:
        rows: (glob, source) in order.
    """

    def __init__(self, rows: Sequence[tuple[str, Source]] = ()) -> None:
        self._plain: dict[str, tuple[int, Source]] = {}
        self._wild: list[tuple[int, re.Pattern[str], Source]] = []
        for number, (glob, source) in enumerate(rows):
            if _WILD.search(glob):
                self._wild.append((number, re.compile(fnmatch.translate(glob)), source))
            else:
                self._plain.setdefault(glob, (number, source))

    @classmethod
    def read(cls, path: Path) -> "Sources":
        """Reads a CSV with `path` and any of licence, allowed (yes, no), consent, origin, note.

        Raises:
            ManifestError, PathError: it cannot be read or a row is wrong; the message names file and line.
        """
        lines: dict[str, int] = {}
        rows = []
        names = ("licence", "allowed", "consent", "origin", "note")
        for line, record in read_records(path, ("path",), names, _check_source):
            glob = record.pop("path")
            if glob in lines:
                raise ManifestError(
                    f"{path}:{line}: {glob!r} again, as in line {lines[glob]}: only the first row counts"
                )
            lines[glob] = line
            rows.append((glob, Source(**record)))
        if not rows:
            raise ManifestError(f"{path}:1: only a header, no sources")
        return cls(rows)

    def of(self, path: str) -> Source | None:
        """Returns what is said of a video, by its path relative to the folder of videos; None where no row fits."""
        number, source = self._plain.get(path, (None, None))
        for other, glob, wild in self._wild:
            if number is not None and other > number:
                break
            if glob.match(path):
                return wild
        return source


@dataclass(frozen=True)
class Blocklist:
    """What must not be in the set.

    Attributes:
        files: hex SHA-256 of files. hashes: uint64 [n], perceptual hashes of frames.
    """

    files: frozenset[str] = frozenset()
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def read(cls, path: Path) -> "Blocklist":
        """Reads a text file with 64 hex digits (SHA-256) or 16 (perceptual hash) a line; `#` starts a comment.

        Raises:
            ManifestError: it cannot be read, or a line is neither; the message names file and line.
        """
        files, hashes = set(), set()
        text = read_text_file(path, _MAX_BLOCKLIST_BYTES, ManifestError)
        for number, line in enumerate(text.splitlines(), 1):
            entry = line.partition("#")[0].strip()
            if _SHA256.fullmatch(entry):
                files.add(entry.lower())
            elif _HASH.fullmatch(entry):
                if not int(entry, 16):
                    raise ManifestError(
                        f"{path}:{number}: hash 0 is what flat frames have; it would block none, or all"
                    )
                hashes.add(int(entry, 16))
            elif entry:
                raise ManifestError(
                    f"{path}:{number}: {entry[:80]!r}: must be the SHA-256 of a file (64 hex digits) or a perceptual "
                    "hash (16)"
                )
        return cls(frozenset(files), np.array(sorted(hashes), np.uint64))


@dataclass(frozen=True)
class Screening:
    """All that is said of who may be in the set."""

    sources: Sources
    blocklist: Blocklist

    @classmethod
    def read(cls, config: ScreenSection) -> "Screening":
        """Reads the files that the config names.

        Raises:
            ManifestError, PathError: see `Sources.read` and `Blocklist.read`.
        """
        return cls(
            Sources.read(Path(config.sources)) if config.sources else Sources(),
            Blocklist.read(Path(config.blocklist)) if config.blocklist else Blocklist(),
        )


def _check_source(record: Record) -> None:
    """Checks a row and turns its `allowed` into a bool; messages lack the line.

    Raises:
        ManifestError, PathError: the row is wrong.
    """
    check_lexically(record["path"] or "", "path")
    if record["allowed"] is not None:
        if record["allowed"] not in _ANSWERS:
            raise ManifestError(f"allowed = {record['allowed']!r}: must be yes or no")
        record["allowed"] = _ANSWERS[record["allowed"]]
