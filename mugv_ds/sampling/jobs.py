"""The videos that are asked for: prompts from the command line, a text file or a CSV."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.data.video import video_name

_MAX_BYTES = 1 << 24
_COLUMNS = ("prompt", "image", "seed")
_MAX_SEED = 1 << 63


@dataclass(frozen=True)
class Job:
    """One video.

    Args:
        number: among all that were asked for, from 0.
        prompt: without the suffix.
        seed, draw: its noise is keyed by (seed, prompt, draw), so it does not depend on the other videos.
        image: that it starts with; None where it starts freely.
    """

    number: int
    prompt: str
    seed: int
    draw: int = 0
    image: Path | None = None

    @property
    def name(self) -> str:
        """Returns the name of its files, without their endings."""
        return video_name(self.number, self.prompt)


def make_jobs(prompts: Sequence[str], *, seed: int, repeat: int = 1, image: Path | None = None) -> list[Job]:
    """Makes `repeat` videos of each prompt, each from noise of its own.

    Raises:
        InputError: a prompt is blank, there is none, or a number makes no sense.
    """
    return _numbered([(prompt, image, seed) for prompt in prompts], repeat)


def read_jobs(path: Path, *, seed: int, repeat: int = 1, image: Path | None = None) -> list[Job]:
    """Reads prompts from a file: a CSV with the columns prompt and, if wanted, image and seed, or text with one a line.

    Args:
        path: it is a CSV if its name ends so. Images in it are relative to its folder.
        seed, image: of the rows that have none. repeat: see `make_jobs`.

    Raises:
        InputError: the file cannot be read, is larger than 16 MiB, or has no prompts, or a row cannot be used.
    """
    text = read_text_file(path, _MAX_BYTES).removeprefix("\ufeff")  # which spreadsheets write
    if "\0" in text:
        raise InputError(f"{path}: has NUL characters; is it a text file in UTF-8?")
    if path.suffix.lower() != ".csv":
        rows = [(line.strip(), image, seed) for line in io.StringIO(text, newline=None) if line.strip()]
    else:
        rows = _csv_rows(path, text, seed, image)
    if not rows:
        raise InputError(f"{path}: no prompts; write one a line")
    return _numbered(rows, repeat)


def _csv_rows(path: Path, text: str, seed: int, image: Path | None) -> list[tuple[str, Path | None, int]]:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns, *rows = [cells for cells in lines if cells] or [[]]
    except csv.Error as error:
        raise InputError(f"{path}, line {lines.line_num}: not a CSV: {error}") from None
    if "prompt" not in columns or set(columns) - set(_COLUMNS) or len(set(columns)) < len(columns):
        raise InputError(
            f"{path}: its columns must be prompt and, if wanted, image and seed, not {', '.join(columns)[:200]}"
        )
    found = []
    for number, cells in enumerate(rows, 2):
        row = dict(zip(columns, cells, strict=False))
        prompt, own_image, own_seed = (row.get(name, "").strip() for name in _COLUMNS)
        if len(cells) > len(columns) or not prompt:
            raise InputError(f"{path}, row {number}: must have a prompt, and no more cells than the header")
        if own_seed and not re.fullmatch("[0-9]{1,18}", own_seed):
            raise InputError(
                f"{path}, row {number}: seed {own_seed[:80]!r} must be a whole number from 0, of at most 18 digits"
            )
        found.append((prompt, path.parent / own_image if own_image else image, int(own_seed) if own_seed else seed))
    return found


def _numbered(rows: Sequence[tuple[str, Path | None, int]], repeat: int) -> list[Job]:
    if not 1 <= repeat <= 1 << 20:
        raise InputError(f"repeat {repeat}: must be at least 1")
    for prompt, _, seed in rows:
        if not prompt.strip():
            raise InputError("a prompt is empty: say what the video shows")
        if not _is_text(prompt):
            raise InputError(f"prompt {prompt[:80]!a}: is not UTF-8 text")
        if not 0 <= seed < _MAX_SEED:
            raise InputError(f"seed {seed}: must be a whole number from 0, below 2**63")
    draws = [(row, draw) for row in rows for draw in range(repeat)]
    return [Job(number, prompt, seed, draw, image) for number, ((prompt, image, seed), draw) in enumerate(draws)]


def _is_text(prompt: str) -> bool:
    """Tells whether a prompt is text: bytes of a command line that are none come as surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True
