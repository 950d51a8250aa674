"""What a checkpoint says of itself, `MANIFEST.json`: files and their hashes, which parts of which parameters are where,
and the state of the run. It carries its own hash, so a manifest that can be read is as it was written.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.text_encoder import TextEncoderInfo

MANIFEST_NAME = "MANIFEST.json"
FORMAT = 2
WEIGHT = "weight"  # the kind of the fp32 masters

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# The only names that are ever opened because a manifest says so: none leads out of the checkpoint's folder.
FileName = Annotated[
    str, StringConstraints(pattern=r"^rank-(0|[1-9][0-9]{0,6})\.[a-z][a-z_]{0,31}(0\.[0-9]{3})?\.safetensors$")
]


class BrokenCheckpointError(CheckpointError):
    """A checkpoint that is not as it was written. An older one may do."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FileEntry(_Part):
    """A file's size and SHA-256."""

    bytes: Count
    sha256: Digest


class Piece(_Part):
    """Elements `start` … `start + numel - 1` of a flattened parameter, in the files of a rank under the key `name`."""

    rank: Count
    start: Count
    numel: Size


class Parameter(_Part):
    """A parameter's shape, and its pieces, which cover every element once, in order."""

    shape: tuple[Size, ...]
    pieces: tuple[Piece, ...]

    @model_validator(mode="after")
    def _covered_once(self) -> "Parameter":
        end = 0
        for piece in self.pieces:
            if piece.start != end:
                what = "nowhere" if piece.start > end else "twice"
                raise ValueError(f"element {min(piece.start, end)} is saved {what}")
            end += piece.numel
        if end != math.prod(self.shape):
            raise ValueError(f"{end} elements are saved of {math.prod(self.shape)}")
        return self


class Counters(_Part):
    """Steps taken: by the engine, of them skipped, by the learning-rate schedule, by the optimizer."""

    global_steps: Count
    skipped_steps: Count
    schedule_steps: Count
    optimizer_steps: Count


class StartWeights(_Part):
    """The weights that the run started from: None for initial ones. digest: of the files, where the run needs it."""

    path: str | None
    digest: Digest | None


class SavedLayout(_Part):
    """The ranks that saved."""

    data: Size
    sequence: Size
    pipeline: Size


class Manifest(_Part):
    """One checkpoint.

    Attributes:
        step: optimizer steps taken, which is also the position in the data.
        kinds: of tensors that each parameter has: weight, exp_avg, exp_avg_sq and those that were registered; each
            rank has a file for each kind, so that who wants the weights reads and verifies nothing else.
        counters: of the model's engine. other_counters: of further engines, by the prefix of their parameters' names.
        began: kinds of averages that were switched on during the run, and after which step.
        start: the weights that the run started from.
        data: what the order of the samples is a function of beside the step, part by part (`RunData.order`).
        text_encoder: what made the text features; None where the data do not say, or the checkpoint is an older one.
        state: what the training loop gave to keep.
        config, config_sha256: the run's config, and the hash of its canonical JSON.
        versions: of what wrote it. git_commit: of this code, if it was in a repository.
    """

    format: Count = FORMAT
    step: Count
    kinds: tuple[str, ...]
    files: dict[FileName, FileEntry]
    parameters: dict[str, Parameter]
    counters: Counters
    other_counters: dict[str, Counters] = {}
    began: dict[str, Count]
    start: StartWeights
    data: dict[str, str]
    text_encoder: TextEncoderInfo | None = None
    layout: SavedLayout
    state: dict[str, Any]
    config: dict[str, Any]
    config_sha256: Digest
    versions: dict[str, str]
    git_commit: str | None

    @model_validator(mode="after")
    def _names_its_files(self) -> "Manifest":
        for name, parameter in self.parameters.items():
            for piece in parameter.pieces:
                for kind in self.kinds:
                    if (file := file_name(piece.rank, kind)) not in self.files:
                        raise ValueError(f"{name}: is in {file}, which is not one of its files")
        return self

    def files_of(self, kinds: Collection[str] | None) -> list[str]:
        """Returns the names of the files that hold these kinds; None: all of them."""
        wanted = self.kinds if kinds is None else kinds
        return sorted(file for file in self.files if file.split(".", 1)[1].removesuffix(".safetensors") in wanted)

    def dump(self) -> bytes:
        """The text of `MANIFEST.json`."""
        body = self.model_dump(mode="json")
        return json.dumps(body | {"sha256": digest(body)}, indent=1, allow_nan=False).encode()


def file_name(rank: int, kind: str) -> str:
    """Returns the name of the file with a rank's tensors of one kind."""
    return f"rank-{rank}.{kind}.safetensors"


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse(text: bytes, where: str) -> Manifest:
    """The manifest in `text`; `where` is what messages call it.

    Raises:
        BrokenCheckpointError: it is not as it was written. CheckpointError: a newer version wrote it.
    """
    try:
        body = json.loads(text)
        said = body.pop("sha256")
        version = body["format"]
        if not isinstance(version, int) or said != digest(body):
            raise ValueError("its own hash differs")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BrokenCheckpointError(f"{where}: not a whole manifest: {error!r}") from None
    if version != FORMAT:
        writer = body.get("versions", {}).get("mugv_ds", "another one")
        raise CheckpointError(
            f"{where}: format {version}, this version of mugv_ds reads {FORMAT}; resume or export it with the version "
            f"that wrote it ({writer})"
        )
    try:
        return Manifest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = re.sub(r"\s+", " ", ".".join(map(str, first["loc"])))
        raise BrokenCheckpointError(f"{where}: {key}: {first['msg']}") from None
