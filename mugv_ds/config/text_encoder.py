"""What made text features, `text_encoder.json`: beside a data set's CSVs, and beside weights that were trained on them.

Features of another encoder are numbers of the same shape that mean something else, so what uses features compares. A
folder without the file claims nothing, and is taken as it is.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_text_file

TEXT_ENCODER_NAME = "text_encoder.json"
_MAX_BYTES = 1 << 16

logger = logging.getLogger(__name__)


class TextEncoderInfo(BaseModel):
    """A text encoder, and how it was used."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: Literal["t5", "hash"] = Field(description="T5, or the demo's encoder without weights.")
    name: str = Field(description="What to call it: the hub's name, or its folder's; says nothing of what it computes.")
    revision: str | None = Field(None, description="The hub's commit; None where it is not known.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        description="The narrower of the dtypes that its weights are stored in and that it computed in."
    )
    max_tokens: int = Field(ge=1, description="Where longer texts are cut.")
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of what it computes, wherever it lies.")

    def __str__(self) -> str:
        revision = f" at {self.revision[:12]}" if self.revision else ""
        return (
            f"{self.kind} {self.name}{revision} ({self.dtype}, {self.max_tokens} tokens, fingerprint "
            f"{self.fingerprint[:12]})"
        )

    def to_bytes(self) -> bytes:
        """Returns what `text_encoder.json` holds."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    def makes_same(self, other: "TextEncoderInfo") -> bool:
        """Tells whether the features of the same text are the same up to the rounding of the dtype."""
        return all(getattr(self, name) == getattr(other, name) for name in ("kind", "fingerprint", "max_tokens"))


def write_text_encoder(folder: str | Path, info: TextEncoderInfo) -> None:
    """Writes `text_encoder.json` into a folder of text features, or of weights.

    Raises:
        OSError: the file system failed.
    """
    (Path(folder) / TEXT_ENCODER_NAME).write_bytes(info.to_bytes())


def read_text_encoder(folder: str | Path) -> TextEncoderInfo | None:
    """Returns what a folder's `text_encoder.json` says; None where there is none.

    Raises:
        InputError: the file cannot be read, or does not hold a `TextEncoderInfo`.
    """
    file = Path(folder) / TEXT_ENCODER_NAME
    if not file.exists():
        return None
    try:
        return TextEncoderInfo.model_validate_json(read_text_file(file, _MAX_BYTES))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "content"
        raise InputError(
            f"{file}: {key}: {first['msg']}; restore it, or remove it to claim nothing of what made the text features"
        ) from None


def agree(
    claims: Mapping[str, TextEncoderInfo | None], remedy: str, error: type[InputError] = InputError
) -> TextEncoderInfo | None:
    """Returns the text encoder of all that are named, the first's where several say one; None where none does.

    Another dtype is warned of: the features then differ by rounding.

    Args:
        claims: what to call each → what it says. remedy: what the message tells the user to do.
        error: class of what is raised.

    Raises:
        InputError: two of them are of different encoders, or cut texts at different lengths; both are named.
    """
    said = [(what, info) for what, info in claims.items() if info is not None]
    for what, other in said[1:]:
        first, info = said[0]
        both = f"{first}: text features of {info}; {what}: of {other}"
        if not info.makes_same(other):
            raise error(f"{both}; {remedy}")
        if info.dtype != other.dtype:
            logger.warning("%s; the two differ by rounding: better to use one dtype", both)
    return said[0][1] if said else None


def check_text_encoder(weights: str | Path, info: TextEncoderInfo) -> TextEncoderInfo | None:
    """Compares the encoder of prompts with the one whose features weights were trained on; another dtype is warned of.

    Args:
        weights: file or folder, with `text_encoder.json` beside the file or in the folder. info: of the encoder.

    Returns:
        What the weights were trained on; None where that is not known.

    Raises:
        InputError: it is another model, or cuts texts at another length; or the file cannot be read.
    """
    weights = Path(weights)
    trained = read_text_encoder(weights if weights.is_dir() else weights.parent)
    agree({str(weights): trained, "prompts": info}, "encode prompts as the captions of the training were")
    return trained
