"""Rows of a preparation as its steps would write them, of good clips unless told otherwise; no video is decoded."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mugv_ds.prepare.rows import AESTHETIC, CAPTION, CLIP, COPY, FIT, SAFETY, TAGS, TEXT, VIDEO, VLM
from mugv_ds.prepare.select import UnitRows

EXTRAS = {"text": TEXT, "aesthetic": AESTHETIC, "safety": SAFETY, "vlm": VLM, "caption": CAPTION, "tags": TAGS}

_VIDEO = {
    "error": None,
    "codec": "h264",
    "width": 1280,
    "height": 720,
    "sample_aspect": 1.0,
    "rotation": 0,
    "hdr": False,
    "time_base": 1 / 24,
    "claimed": 10.0,
    "duration": 10.0,
    "frames": 240,
    "fps": 24.0,
    "bitrate": 0.1,
    "interlaced": 0.0,
    "bytes": 1000,
}
_CLIP = {
    "reason": None,
    "first_pts": 0,
    "last_pts": 119,
    "start": 0.0,
    "duration": 5.0,
    "frames": 120,
    "fps": 24.0,
    "width": 1280,
    "height": 720,
    "sharp_min": 400.0,
    "sharp_med": 500.0,
    "sharp_max": 600.0,
    "motion": 5.0,
    "area": 1.0,
    "repeated": 0.0,
    "shake": 0.001,
    "luma": 0.5,
    "dark": 0.1,
    "bright": 0.1,
}


def video_id(name: str) -> str:
    """Returns what looks like the SHA-256 of a file."""
    return hashlib.sha256(name.encode()).hexdigest()


def clip_id(name: str) -> str:
    """Returns what looks like a clip's id."""
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def hashes_of(name: str) -> list[int]:
    """Returns 8 hashes that are like no other clip's."""
    generator = np.random.Generator(np.random.PCG64(int(clip_id(name)[:8], 16)))
    return generator.integers(1, 1 << 63, 8, dtype=np.uint64).tolist()


def flipped(hashes: list[int], bits: int, seed: int = 0) -> list[int]:
    """Returns the hashes with as many bits of each changed."""
    generator = np.random.default_rng(seed)
    masks = [sum(1 << int(bit) for bit in generator.permutation(64)[:bits]) for _ in hashes]
    return [one ^ mask for one, mask in zip(hashes, masks, strict=True)]


def video(name: str, **values) -> dict:
    """Returns a row of `VIDEO`; its path is name.mp4 unless given."""
    return {"video": video_id(name), "path": f"{name}.mp4"} | _VIDEO | values


def clip(name: str, of: str, **values) -> dict:
    """Returns a row of `CLIP`, clip `name` of video `of`."""
    hashes = {"phash": hashes_of(name), "phash_mirror": hashes_of(f"{name} mirrored")}
    return {"clip": clip_id(name), "video": video_id(of)} | _CLIP | hashes | values


def unit(
    videos: list[dict],
    clips: list[dict],
    copies: Sequence[dict] = (),
    fits: list[dict] | None = None,
    **extras: list[dict],
) -> UnitRows:
    """Returns the rows of a unit. extras: step → rows, of which each names its clip, as those of `fits` do."""
    tables = {name: _of_clips(rows, EXTRAS[name]) for name, rows in extras.items()}
    fitted = None if fits is None else _of_clips(fits, FIT)
    return UnitRows(_table(videos, VIDEO), _table(clips, CLIP), tables, _table(copies, COPY), fitted)


def _of_clips(rows: list[dict], schema: pa.Schema) -> pa.Table:
    return _table([row | {"clip": clip_id(row["clip"])} for row in rows], schema)


def _table(rows: Sequence[dict], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema)
