"""What clips score in the cheap steps, from the numbers that `probe` measured of the frames in them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mugv_ds.config.prepare_schema import BorderSection, PrepareConfig
from mugv_ds.prepare.frames import Crop, Shape
from mugv_ds.prepare.rows import CLIP, SIDES
from mugv_ds.prepare.split import Window
from mugv_ds.prepare.units import Step

# The splitting, too: both are quick, and a clip is of no use without its scores.
STEP = Step("clips", 1, ("probe.css_lags", "split", "borders", "encode.buckets"), reads=("videos",))

_SAMPLES = 8  # of a clip, that sharpness and hashes are of
_PAIRS = 3  # that motion is of: at the start, in the middle, at the end (published)
_REPEATED = 0.05  # mean difference to the frame before, below which a frame is the same
_SMOOTH = 9  # frames over whose mean motion is no jitter
_SAME_BORDER = 0.01  # of the side: borders that differ by less are the same one


def clip_id(video: str, first_pts: int, last_pts: int, crop: Sequence[int]) -> str:
    """Returns the id of a clip, 32 hex digits: BLAKE2b of what it is made of. It depends on no path and no order.

    Args:
        video: hex SHA-256. first_pts, last_pts: of its first and last frame. crop: lines at top, bottom, left, right.
    """
    parts = [video, str(first_pts), str(last_pts), ",".join(map(str, crop))]
    return hashlib.blake2b("|".join(parts).encode(), digest_size=16).hexdigest()


def score(row: Mapping[str, Any], windows: Sequence[Window], config: PrepareConfig) -> list[dict[str, Any]]:
    """Returns a row of `rows.CLIP` for each window.

    Args:
        row: of `rows.VIDEO`, without an error. windows: of `split`. config: its section borders counts.
    """
    return [_clip(row, window, config.borders) for window in windows]


def _clip(row: Mapping[str, Any], window: Window, options: BorderSection) -> dict[str, Any]:
    first, last = window.first, window.last
    pts, base = row["pts"], row["time_base"]
    samples = np.flatnonzero((np.asarray(row["sample"]) >= first) & (np.asarray(row["sample"]) <= last))
    border, edge = _borders(row, samples)
    crop = Crop() if window.reason else _crop(row, border, edge, options)
    shape = Shape(
        row["height"], row["width"], Fraction(row["sample_aspect"]).limit_denominator(10_000), row["rotation"]
    )
    height, width = shape.shown(crop)
    seconds = (pts[last] - pts[first]) * base
    duration = seconds + row["duration"] / row["frames"]
    clip = dict.fromkeys(CLIP.names) | {
        "clip": clip_id(row["video"], pts[first], pts[last], crop),
        "video": row["video"],
        "reason": window.reason,
        "first_pts": pts[first],
        "last_pts": pts[last],
        "start": (pts[first] - pts[0]) * base,
        "duration": duration,
        "frames": last - first + 1,
        "fps": (last - first) / seconds if seconds else None,
        "height": height,
        "width": width,
        **{f"crop_{side}": lines for side, lines in zip(SIDES, crop, strict=True)},
    }
    if window.reason is None:
        left = (row["height"] - crop.top - crop.bottom) * (row["width"] - crop.left - crop.right)
        clip |= {"area": left / (row["height"] * row["width"])}
        clip |= {f"border_{side}": value for side, value in zip(SIDES, border.tolist(), strict=True)}
        clip |= {f"border_edge_{side}": value for side, value in zip(SIDES, edge.tolist(), strict=True)}
        clip |= _of_samples(row, samples) | _of_frames(row, first, last)
    return clip


def _of_samples(row: Mapping[str, Any], samples: np.ndarray) -> dict[str, Any]:
    """Returns the scores that only some of the frames are measured for. samples: positions in their lists."""
    if not len(samples):
        return {"phash": [], "phash_mirror": []}
    picked = samples[np.linspace(0, len(samples) - 1, _SAMPLES).round().astype(int)]
    sharp = np.asarray(row["sharp"])[picked]
    # The flow of the last sample leads to the next one, which is no longer in the clip.
    within = samples[:-1] if len(samples) > 1 else samples[:0]
    flow = np.asarray(row["flow"], np.float64)[within]
    flow = flow[np.isfinite(flow)]
    motion = flow[np.linspace(0, len(flow) - 1, _PAIRS).round().astype(int)] if len(flow) else None
    return {
        "sharp_min": float(sharp.min()),
        "sharp_med": float(np.median(sharp)),
        "sharp_max": float(sharp.max()),
        "motion": None if motion is None else float(motion.mean()),
        "motion_min": None if motion is None else float(motion.min()),
        "motion_max": None if motion is None else float(motion.max()),
        "phash": [row["phash"][number] for number in picked],
        "phash_mirror": [row["phash_mirror"][number] for number in picked],
    }


def _of_frames(row: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    """Returns the scores that every frame is measured for."""
    values = {name: np.asarray(row[name][first : last + 1], np.float64) for name in ("luma", "dark", "bright")}
    changes = np.asarray(row["difference"][first + 1 : last + 1], np.float64)
    return {
        "repeated": float((changes < _REPEATED).mean()) if len(changes) else None,
        "shake": _shake(row, first, last),
        **{name: float(of_frames.mean()) for name, of_frames in values.items()},
    }


def _shake(row: Mapping[str, Any], first: int, last: int) -> float | None:
    """Returns the root mean square of the motion about its mean over 9 frames, as a share of the short side."""
    moves = np.asarray([row["shift_x"][first + 1 : last + 1], row["shift_y"][first + 1 : last + 1]], np.float64)
    if moves.shape[1] < _SMOOTH:
        return None
    padded = np.pad(moves, [(0, 0), (_SMOOTH // 2, _SMOOTH // 2)], mode="edge")
    smooth = np.lib.stride_tricks.sliding_window_view(padded, _SMOOTH, axis=1).mean(axis=-1)
    return float(np.sqrt(((moves - smooth) ** 2).sum(axis=0).mean()))


def _borders(row: Mapping[str, Any], samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shares of the sides that are border in all samples, and those of the borders' lines with an edge."""
    if not len(samples):
        return np.zeros(4), np.zeros(4)
    shares = np.asarray(row["border"], np.float64)[samples]
    edges = np.asarray(row["border_edge"], np.float64)[samples]
    least = shares.min(axis=0)
    # In a dark frame more seems to be border; its edge is another's.
    same = shares <= least + _SAME_BORDER
    return least, np.array([float(np.median(edges[same[:, side], side])) for side in range(4)])


def _crop(row: Mapping[str, Any], border: np.ndarray, edge: np.ndarray, options: BorderSection) -> Crop:
    """Returns the lines that are cut away, whole and even ones: chroma is halved."""
    sides = row["height"], row["height"], row["width"], row["width"]
    lines = [
        2 * math.ceil(side * share / 2) if share > options.least and sharp >= options.edge else 0
        for side, share, sharp in zip(sides, border, edge, strict=True)
    ]
    if lines[0] + lines[1] >= row["height"] or lines[2] + lines[3] >= row["width"]:
        return Crop()  # nothing but border; other scores reject it
    return Crop(*lines)
