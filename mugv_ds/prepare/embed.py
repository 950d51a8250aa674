"""From captions to shards of text features, and what stands for no caption.

Features differ in the last bits with their batch mates, so batches are a function of the unit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from mugv_ds.config.prepare_schema import EmbedSection
from mugv_ds.config.text_encoder import TEXT_ENCODER_NAME, TextEncoderInfo
from mugv_ds.data.shards import write_shard
from mugv_ds.files.atomic import write_atomically
from mugv_ds.models.text import NEGATIVE_PROMPT, HashTextEncoder, T5TextEncoder, save_features
from mugv_ds.prepare.encode import Read, cut_units, facts_of, found_in, next_unit
from mugv_ds.prepare.rows import EMBED, EMBED_PLAN
from mugv_ds.prepare.units import digest

NULL_TEXT_PATH = "text_features/negative.pt"  # that configs name as data.null_text_path
EMBED_VERSION = 1  # raised whenever features would differ

_MIB = 1 << 20
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_AT_ONCE = 32  # captions whose padded features are held

TextEncoder = T5TextEncoder | HashTextEncoder


def extend_text_plan(
    plan: pa.Table, parts: Iterable[tuple[int, pa.Array | Sequence[str]]], section: EmbedSection
) -> pa.Table:
    """Returns the plan with the clips that it lacks, in new units at its end; its rows stay as they are.

    Args:
        plan: of `EMBED_PLAN`; its `schema.empty_table()` at the beginning.
        parts: unit of videos, and the ids of its clips that are to be embedded; in ascending order.
    """
    found = found_in((part, pa.table({"clip": pa.array(clips, pa.string())})) for part, clips in parts)
    longest = section.max_tokens * section.channels * _DTYPES[section.dtype].itemsize
    tables, unit = [plan], next_unit(plan)
    for rows in cut_units(found, plan["clip"], section.shard_mb * _MIB // longest):
        tables.append(pa.table([[unit] * len(rows), rows["clip"], rows["part"]], schema=EMBED_PLAN))
        unit += 1
    return pa.concat_tables(tables).combine_chunks()


@dataclass(frozen=True)
class EmbedUnit:
    """The captions of a shard: of clips in the order of their ids, None where a clip has none."""

    number: int
    captions: tuple[tuple[str, str | None], ...]

    @property
    def shard(self) -> str:
        """Returns the shard's path, relative to the folder of the set."""
        return f"text_features/u{self.number:06d}.safetensors"

    def key(self, info: TextEncoderInfo, section: EmbedSection) -> str:
        """Returns the key of the fragment. info: of the encoder."""
        made_by = (info.fingerprint, info.dtype, info.max_tokens, section.dtype, section.suffix)
        return digest("embed", EMBED_VERSION, made_by, self.captions)


def text_unit_of(rows: pa.Table, read: Read) -> EmbedUnit:
    """Returns a unit of the plan with its captions.

    Args:
        rows: of `EMBED_PLAN`, those of the unit. read: of the step "caption", by unit of videos.
    """
    found: dict[str, str | None] = {}
    for part in pc.unique(rows["part"]).to_pylist():
        captions = read("caption", part, ["clip", "caption"])
        captions = captions.filter(pc.is_in(captions["clip"], rows["clip"]))
        found |= zip(captions["clip"].to_pylist(), captions["caption"].to_pylist(), strict=True)
    return EmbedUnit(rows["unit"][0].as_py(), tuple((clip, found.get(clip)) for clip in rows["clip"].to_pylist()))


class Embedder:
    """Embeds units of captions.

    Args:
        encoder: of texts. out: folder of the set. section: of the config.
    """

    def __init__(self, encoder: TextEncoder, out: Path, section: EmbedSection) -> None:
        self._encoder, self._out, self._section = encoder, out, section

    def __call__(self, unit: EmbedUnit) -> pa.Table:
        """Writes the shard of a unit, and returns its rows of `EMBED`.

        Raises:
            InputError: features are not finite. OSError: the shard could not be written.
        """
        rows = {clip: self._row(clip, caption) for clip, caption in unit.captions}
        texts = {clip: caption + self._section.suffix for clip, caption in unit.captions if not rows[clip].get("error")}
        features = {}
        ids = list(texts)
        for start in range(0, len(ids), _AT_ONCE):
            clips = ids[start : start + _AT_ONCE]
            feature_BLC, mask_BL = self._encoder([texts[clip] for clip in clips])
            for clip, feature_LC, mask_L in zip(clips, feature_BLC, mask_BL, strict=True):
                features[clip] = feature_LC[mask_L].to(_DTYPES[self._section.dtype])
        if features:
            path = self._out / unit.shard
            path.parent.mkdir(parents=True, exist_ok=True)
            write_shard(path, features)
            facts = {"shard": unit.shard, **facts_of(path)}
            rows |= {clip: rows[clip] | facts | {"tokens": len(feature)} for clip, feature in features.items()}
        return pa.Table.from_pylist(list(rows.values()), EMBED)

    def _row(self, clip: str, caption: str | None) -> dict:
        """Returns what is known of a caption before it is embedded."""
        length = self._encoder.length(caption + self._section.suffix) if caption and caption.strip() else 0
        beyond = max(length - self._encoder.max_tokens, 0)
        if not length:
            return {"clip": clip, "error": "no caption"}
        if beyond and isinstance(self._encoder, HashTextEncoder):
            return {"clip": clip, "error": f"a caption of {length} words, at most {self._encoder.max_tokens} are taken"}
        return {"clip": clip, "cut": beyond}


def write_null_text(encoder: TextEncoder, out: Path, section: EmbedSection, text: str = NEGATIVE_PROMPT) -> None:
    """Writes what a set has once: the features of no caption, and `text_encoder.json`.

    Args:
        text: whose features the trainer takes where it drops a caption, and the sampler as the negative prompt.

    Raises:
        InputError: the text is too long for the encoder. OSError: the file system failed.
    """
    features, mask = encoder([text])
    path = out / NULL_TEXT_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as stream:
        save_features(stream, features[0].to(_DTYPES[section.dtype]), mask[0])
    with write_atomically(out / TEXT_ENCODER_NAME) as stream:
        stream.write(encoder.info.to_bytes())
