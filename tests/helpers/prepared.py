"""A small set, made by the steps from encoding on, of films whose clips and captions are given."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from safetensors.torch import save_file

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.files.fingerprint import fingerprint
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.prepare.embed import Embedder, extend_text_plan, text_unit_of, write_null_text
from mugv_ds.prepare.encode import Codec, Encoder, encode_key, extend_plan, fit_clips, unit_of, units_in
from mugv_ds.prepare.manifest import Parts, write_manifest
from mugv_ds.prepare.rows import CAPTION, EMBED_PLAN, ENCODE_PLAN, LABEL, SELECT
from mugv_ds.prepare.units import Fragments, read_table
from tests.helpers.film import clip_row, draw_film, tables, video_row, write_film

SIZE = (32, 48)
CONFIG = {
    "encode": {
        "buckets": [
            {"height": 32, "width": 48, "frames": 16, "fps": 24},
            {"height": 32, "width": 48, "frames": 8, "fps": 24},
        ],
        "device": "cpu",
    },
    "embed": {"text_encoder": "hash", "channels": 16, "max_tokens": 40, "suffix": " in colour"},
    "validation": {"share": 0.25},
}
_COLOURS = ("red", "green", "blue", "white", "black", "amber", "violet", "teal")


def fit_codec(films: Sequence[np.ndarray], blocks: int = 200) -> LinearCodec:
    """As `LinearCodec.fit` of films [8n, H, W, 3], from few blocks and in a fraction of the time."""
    films = [film[: len(film) // 8 * 8] for film in films]
    every_NP = np.concatenate(
        [rearrange(film, "(t p) (h q) (w r) c -> (t h w) (c p q r)", p=8, q=8, r=8) for film in films]
    )
    chosen_NP = every_NP[:: max(len(every_NP) // blocks, 1)].astype(np.float32) / 127.5 - 1
    codec = LinearCodec()
    codec.mean.copy_(torch.from_numpy(chosen_NP.mean(axis=0)))
    centred_NP = torch.from_numpy(chosen_NP).double() - codec.mean
    variance_N, vectors_NN = torch.linalg.eigh(centred_NP @ centred_NP.T)  # far smaller than of the values of a block
    singular_C, vectors_NC = variance_N[-24:].flip(0).sqrt(), vectors_NN[:, -24:].flip(1)
    codec.basis.copy_((centred_NP.T @ vectors_NC / singular_C).T)
    codec.scale.copy_(singular_C / len(chosen_NP) ** 0.5)
    return codec


@dataclass
class PreparedSet:
    """Films of 24 frames a second, a clip or more of each, and what becomes of them.

    Args:
        root: folder in which videos, work and out are made. count: of the films. per_part: films of a unit.
        lengths: frames of the films, in turn; those of fewer than 16 go to the bucket of 8.
    """

    root: Path
    count: int = 8
    per_part: int = 3
    lengths: tuple[int, ...] = (20, 20, 20, 12)
    fps: float = 24.0
    config: PrepareConfig = field(default_factory=lambda: PrepareConfig.model_validate_json(json.dumps(CONFIG)))
    labels: list[dict] = field(default_factory=list)
    together: list[tuple[str, str]] = field(default_factory=list)
    accepted: set[str] | None = None  # clips; None for all
    codec: Codec | None = None  # None: fitted to the films

    def __post_init__(self) -> None:
        self.videos, self.work, self.out = (self.root / name for name in ("videos", "work", "out"))
        for folder in (self.videos, self.work, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        self.films = [
            draw_film(f"set {i}", self.lengths[i % len(self.lengths)], SIZE, step=1.5) for i in range(self.count)
        ]
        self.codec_path = self.root / "codec.safetensors"
        if self.codec is None:
            self.codec = fit_codec(self.films)
        save_file(self.codec.state_dict(), self.codec_path)
        self.encoder = HashTextEncoder(self.config.embed.channels, self.config.embed.max_tokens)
        self.rows = [
            video_row(write_film(self.videos / f"{i}.mp4", film, np.arange(len(film)) / self.fps))
            for i, film in enumerate(self.films)
        ]
        self.clips = [clip_row(row, SIZE) for row in self.rows]

    @cached_property
    def parts(self) -> list[dict[str, pa.Table]]:
        """The fragments of each unit of videos."""
        found = []
        for start in range(0, self.count, self.per_part):
            numbers = range(start, min(start + self.per_part, self.count))
            part = tables([self.rows[i] for i in numbers], [self.clips[i] for i in numbers])
            part["fit"] = fit_clips(part["clips"], part["videos"], self.config.encode)
            part["select"] = pa.Table.from_pylist([self.selected(i) for i in numbers], SELECT)
            captions = [{"clip": self.clips[i]["clip"], "caption": self.caption(i), "source": "file"} for i in numbers]
            part["caption"] = pa.Table.from_pylist(captions, CAPTION)
            found.append(part)
        return found

    def accept(self, clips: Sequence[str]) -> None:
        """Selects these clips alone."""
        self.accepted = set(clips)
        self.__dict__.pop("parts", None)

    def caption(self, i: int) -> str:
        return f'clouds of {_COLOURS[i % 8]}, "number {i}",\nthat drift'

    def selected(self, i: int) -> dict:
        clip = self.clips[i]
        return {
            "clip": clip["clip"],
            "video": clip["video"],
            "path": self.rows[i]["path"],
            "licence": "CC-BY" if i % 2 else "CC0",
            "origin": "drawn",
            "accepted": self.accepted is None or clip["clip"] in self.accepted,
            "weight": 1.0 + i / 4,
            "group": _COLOURS[i % 8],
        }

    def read(self, step: str, unit: int, columns: Sequence[str]) -> pa.Table:
        if step in ("encode", "embed"):
            return read_table(Fragments(self.work / step).path(unit, self.key(step, unit)), list(columns))
        return self.parts[unit][step].select(list(columns))

    def key(self, step: str, unit: int) -> str | None:
        return self.keys[step].get(unit)

    def run(self) -> dict:
        """Encodes, embeds and writes the manifest, which is returned."""
        encode, embed = self.config.encode, self.config.embed
        fits = [(number, part["fit"]) for number, part in enumerate(self.parts)]
        self.encode_plan = extend_plan(ENCODE_PLAN.empty_table(), fits, encode)
        texts = [(number, part["select"]["clip"].to_pylist()) for number, part in enumerate(self.parts)]
        self.embed_plan = extend_text_plan(EMBED_PLAN.empty_table(), texts, embed)
        self.keys = {"encode": {}, "embed": {}}
        encoder = Encoder(self.codec, self.videos, self.out, encode)
        for number, rows in units_in(self.encode_plan):
            unit = unit_of(rows, self.read, encode)
            self.keys["encode"][number] = encode_key(rows, fingerprint([self.codec_path]), encode)
            self._once("encode", number, encoder, unit)
        embedder = Embedder(self.encoder, self.out, embed)
        for number, rows in units_in(self.embed_plan):
            unit = text_unit_of(rows, self.read)
            self.keys["embed"][number] = unit.key(self.encoder.info, embed)
            self._once("embed", number, embedder, unit)
        write_null_text(self.encoder, self.out, embed)
        return self.write()

    def _once(self, step: str, number: int, make, unit) -> None:
        fragments, key = Fragments(self.work / step), self.keys[step][number]
        if not fragments.path(number, key).exists():
            fragments.write(number, key, make(unit))

    def write(self) -> dict:
        """Writes the manifest, which is returned."""
        labels = pa.Table.from_pylist(self.labels, LABEL)
        parts = Parts(
            len(self.parts), self.encode_plan, self.embed_plan, self.read, self.key, (), labels, self.together
        )
        about = {"codec": fingerprint([self.codec_path])}
        return write_manifest(self.out, parts, self.config, about)
