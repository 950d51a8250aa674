"""What is compared with what, and which side each video is on: drawn once from a seed, and kept from who votes.

A folder of comparison holds

    comparison.json    the draw: which weights and video every id means; nothing that a voter's browser loads names it
    page/              index.html, and media/ under ids that say nothing
    votes/             a JSON file for each voter
    report/            what came of it, with pairs.csv and labels.csv once there are votes
"""

import hashlib
import itertools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular, read_text_file
from mugv_ds.evaluation.results import FileName, Result, WeightsName, read_results
from mugv_ds.files.atomic import write_atomically

COMPARISON_NAME = "comparison.json"
_MAX_BYTES = 1 << 26

Question = Literal["overall", "motion", "physics", "match"]
Choice = Literal["left", "right", "both_good", "both_bad", "skip"]
Opaque = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]

QUESTIONS: tuple[Question, ...] = ("overall", "motion", "physics", "match")


class Side(BaseModel):
    """A video of an item. id: of its file in the page. weights: that made it. digest: SHA-256 of the mp4."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Opaque
    weights: WeightsName
    digest: Digest


class Item(BaseModel):
    """Two videos of one prompt. image: id of the first frame's file, where the two were given one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Opaque
    job: FileName
    prompt: str
    image: Opaque | None
    left: Side
    right: Side


class Comparison(BaseModel):
    """What is compared, in the order in which it is shown.

    Attributes:
        results: folder of the evaluation, as it was given.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    results: str
    seed: int
    weights: tuple[WeightsName, ...]
    questions: tuple[Question, ...] = Field(min_length=1)
    items: tuple[Item, ...] = Field(min_length=1)

    @cached_property
    def id(self) -> str:
        """Returns the digest by which votes say what they are of; where the evaluation lies does not count."""
        return hashlib.sha256(self.model_dump_json(exclude={"results"}).encode()).hexdigest()


def draw(
    results: Path, weights: Sequence[str], questions: Sequence[Question], *, seed: int, limit: int | None = None
) -> tuple[Comparison, dict[str, Path]]:
    """Draws the items: each prompt for every two of the weights, their order and sides by hashes of the seed.

    So a side does not depend on which other items there are, nor on the versions of libraries.

    Args:
        results: folder of the evaluation. weights: names of two or more. questions: that are asked of each item.
        limit: the most items to draw; None for all.

    Returns:
        The comparison, and the file of every id in it.

    Raises:
        InputError: a name is unknown or given twice, two weights have no video of the same prompt, or a file cannot be
            read.
    """
    found = {(one.weights, one.job): one for one in read_results(results)}
    known = list(dict.fromkeys(name for name, _ in found))
    for name in weights:
        if name not in known:
            raise InputError(f"{results}: has no videos of {name!r}; there are some of {', '.join(known) or 'none'}")
    if len(weights) < 2 or len(set(weights)) < len(weights):
        raise InputError(f"weights {', '.join(weights)}: name two or more, each once")
    files: dict[str, Path] = {}
    drawn = []
    sides: dict[tuple[str, str], Side] = {}
    for first, second in itertools.combinations(weights, 2):
        shared = [job for name, job in found if name == first and (second, job) in found]
        if not shared:
            raise InputError(f"{results}: {first} and {second} have no video of the same prompt; evaluate both")
        for job in shared:
            both = []
            for name in (first, second):
                if (name, job) not in sides:
                    sides[name, job] = _side(found[name, job], seed)
                both.append(sides[name, job])
                files[both[-1].id] = found[name, job].video
            drawn.append(_item(found[first, job], both, seed, files))
    drawn.sort(key=lambda item: _hash(seed, "order", item.id))
    drawn = drawn[:limit]
    shown = {id_ for item in drawn for id_ in (item.left.id, item.right.id, item.image)}
    comparison = Comparison(
        results=str(results), seed=seed, weights=tuple(weights), questions=tuple(questions), items=tuple(drawn)
    )
    return comparison, {id_: path for id_, path in sorted(files.items()) if id_ in shown}


def _side(result: Result, seed: int) -> Side:
    digest = file_digest(result.video)
    return Side(
        id=_hash(seed, "video", f"{result.weights}/{result.job}/{digest}")[:16], weights=result.weights, digest=digest
    )


def _item(result: Result, both: list[Side], seed: int, files: dict[str, Path]) -> Item:
    """Returns an item of two sides in the order of the weights, and adds its first frame to the files."""
    id_ = _hash(seed, "item", f"{both[0].id}/{both[1].id}")[:16]
    if int(_hash(seed, "side", id_), 16) % 2:
        both = both[::-1]
    image = None
    if result.image is not None:
        image = _hash(seed, "image", f"{result.job}/{file_digest(result.image)}")[:16]
        files[image] = result.image
    return Item(id=id_, job=result.job, prompt=result.prompt, image=image, left=both[0], right=both[1])


def _hash(seed: int, what: str, of: str) -> str:
    return hashlib.sha256(f"{seed}\0{what}\0{of}".encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the hex SHA-256 of a regular file.

    Raises:
        InputError: it is missing, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes `comparison.json` into a folder.

    Raises:
        OSError: the file system failed.
    """
    with write_atomically(folder / COMPARISON_NAME) as stream:
        stream.write((comparison.model_dump_json(indent=1) + "\n").encode())


def read_comparison(folder: Path) -> Comparison:
    """Reads `comparison.json`.

    Raises:
        InputError: it is missing, or is not what `write_comparison` wrote.
    """
    path = folder / COMPARISON_NAME
    if not path.exists():
        raise InputError(f"{folder}: holds no {COMPARISON_NAME}; name the folder that `compare.py build` wrote")
    try:
        return Comparison.model_validate_json(read_text_file(path, _MAX_BYTES))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}") from None
