"""Votes as browsers send and export them: checked, and kept as one file for each voter.

Votes are untrusted wherever they come from: bounded in size, of known items and questions, each answered once.
"""

import threading
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_bytes_file
from mugv_ds.evaluation.compare.draw import Choice, Comparison, Digest, Opaque, Question
from mugv_ds.files.atomic import write_atomically

MAX_BYTES = 4 << 20  # 40,000 votes
_MOST_VOTERS = 1000


def _shown(name: str) -> str:
    """Returns the name of an annotator, composed and stripped.

    Raises:
        ValueError: it is blank, or holds what cannot be shown.
    """
    name = unicodedata.normalize("NFKC", name).strip()
    if not name or not name.isprintable():
        raise ValueError("must be a name that can be printed")
    return name


class Vote(BaseModel):
    """What somebody says of an item, in answer to a question."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    item: Opaque
    question: Question
    choice: Choice


class Votes(BaseModel):
    """All that one voter says.

    Attributes:
        comparison: id of what the votes are of. voter: drawn by the browser, so that two people of one name differ.
        revision: counts the changes, those that undo others too.
        votes: in the order in which they were given.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    comparison: Digest
    voter: str = Field(pattern="^[0-9a-f]{32}$")
    annotator: Annotated[str, Field(max_length=80), AfterValidator(_shown)]
    revision: int = Field(ge=0, lt=1 << 53)
    votes: tuple[Vote, ...]

    @property
    def key(self) -> str:
        """Returns the annotator's name as names are told apart."""
        return self.annotator.casefold()


class Conflict(InputError):
    """Votes that must not take the place of others.

    Args:
        message: why. reason: "name", if another voter has the name, or "stale". stored: the votes that stay.
    """

    def __init__(self, message: str, reason: str, stored: Votes) -> None:
        super().__init__(message)
        self.reason, self.stored = reason, stored


def parse_votes(content: bytes, comparison: Comparison, name: str) -> Votes:
    """Checks votes.

    Args:
        content: JSON; whoever reads it takes at most `MAX_BYTES`. name: what to call it in a message.

    Raises:
        InputError: it is not of the form, of another comparison, or answers what is not asked or twice.
    """
    try:
        votes = Votes.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))[:100]
        raise InputError(f"{name}: not votes: {f'{key}: ' if key else ''}{first['msg'][:200]}") from None
    if votes.comparison != comparison.id:
        raise InputError(f"{name}: votes of another comparison, or of other videos; import them where they were given")
    items, said = {item.id for item in comparison.items}, set()
    for vote in votes.votes:
        if vote.item not in items:
            raise InputError(f"{name}: there is no item {vote.item}")
        if vote.question not in comparison.questions:
            raise InputError(f"{name}: the question {vote.question!r} is not asked here")
        if (vote.item, vote.question) in said:
            raise InputError(f"{name}: answers the question {vote.question!r} of item {vote.item} twice")
        said.add((vote.item, vote.question))
    return votes


class Box:
    """The folder of votes; threads may store at once."""

    def __init__(self, folder: Path, comparison: Comparison) -> None:
        self.folder, self.comparison = folder, comparison
        self._lock = threading.Lock()

    def read(self) -> list[Votes]:
        """Returns the votes of all voters, in order of their names.

        Raises:
            InputError: a file cannot be used; it is named.
        """
        paths = sorted(self.folder.glob("*.json"))
        try:
            votes = [parse_votes(read_bytes_file(path, MAX_BYTES), self.comparison, str(path)) for path in paths]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}") from None
        return sorted(votes, key=lambda one: (one.key, one.voter))

    def store(self, votes: Votes) -> None:
        """Keeps a voter's votes in place of earlier ones, on the disk when this returns.

        Raises:
            Conflict: another voter has the name, or what is there is of a later revision, or differs in the same.
            InputError: there are too many voters, or a file of the folder cannot be used. OSError: see the file system.
        """
        with self._lock:
            others = self.read()
            for other in others:
                if other.voter != votes.voter and other.key == votes.key:
                    raise Conflict(f"annotator {other.annotator!r} has voted from another browser", "name", other)
                if other.voter == votes.voter and (
                    other.revision > votes.revision or (other.revision == votes.revision and other != votes)
                ):
                    raise Conflict(f"later votes of {other.annotator!r} are there already", "stale", other)
            if len(others) >= _MOST_VOTERS and all(other.voter != votes.voter for other in others):
                raise InputError(f"{self.folder}: at most {_MOST_VOTERS} voters are kept")
            self.folder.mkdir(exist_ok=True)
            with write_atomically(self.folder / f"{votes.voter}.json") as stream:
                stream.write((votes.model_dump_json(indent=1) + "\n").encode())


def import_votes(box: Box, files: Sequence[Path], name: str | None = None) -> list[Votes]:
    """Stores votes that browsers have exported, all or none that are wrong; returns them.

    Args:
        name: of the annotator, in place of what the files say.

    Raises:
        InputError: a file cannot be used, or its votes must not be stored; the message names it.
    """
    read = []
    for path in files:
        try:
            content = read_bytes_file(path, MAX_BYTES)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        votes = parse_votes(content, box.comparison, str(path))
        if name is not None:
            votes = parse_votes(
                votes.model_copy(update={"annotator": name}).model_dump_json().encode(), box.comparison, "--as"
            )
        read.append(votes)
    for path, votes in zip(files, read, strict=True):
        try:
            box.store(votes)
        except Conflict as error:
            what = "give another name with --as" if error.reason == "name" else "they stay"
            raise InputError(f"{path}: {error}; {what}") from None
    return read
