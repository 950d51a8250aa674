"""Latents against the videos that they were made of: which pixels were encoded, of which times, and how well.

What may have gone wrong is put as hypotheses: of each the frames of the source are known that would have been encoded,
and the one whose frames are nearest to the decoded ones holds.

Shape suffixes: F frames, H and W height and width.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mugv_ds.data.paths import resolve
from mugv_ds.data.video import contact_sheet, spaced, to_frames
from mugv_ds.prepare.encode import mean_luma
from mugv_ds.prepare.frames import VideoError, open_video, read_frames
from mugv_ds.prepare.rows import SIDES

RIGHT = "right"
_RATES = (8, 10, 12, 15, 16, 20, 24, 25, 30, 48, 50, 60)
_OFFSETS = (-2, -1, 1, 2)
_SMALL = 96  # pixels of the short side on which times are compared
_LOOKED_AT = 8  # frames on which pixels are compared
_LEAST_MSE = 0.05  # of 8-bit values, below the rounding of pixels

Hypotheses = dict[str, float]  # name → mean squared error, of 8-bit values


@dataclass(frozen=True)
class Compared:
    """A sample beside its source.

    Attributes:
        sample, bucket: of it. psnr: in dB, of 8-bit pixels. luma: mean of the source's and of the decoded frames, in
            [0, 1]. late: largest distance of a source frame from its time, in frames of the set.
        pixels, times: errors under each hypothesis of what was encoded; of a still there are no times.
        source, decoded: some of the frames, uint8 RGB [f, H, W, 3].
    """

    sample: str
    bucket: str
    psnr: float
    luma: tuple[float, float]
    late: float
    pixels: Hypotheses
    times: Hypotheses
    source: np.ndarray
    decoded: np.ndarray


@torch.no_grad()
def decode_latent(codec: Any, latent: Tensor, frames: int) -> np.ndarray:
    """Returns the frames of a normalised latent [24, T, h, w], uint8 RGB [frames, H, W, 3]."""
    device = next(codec.buffers()).device
    windows = codec.decode_windows(latent[None].to(device))
    return np.concatenate([to_frames(window)[0].cpu().numpy() for window in windows])[:frames]


def compare(decoded: np.ndarray, provenance: Mapping[str, Any], fps: float, videos: Path) -> Compared:
    """Compares the decoded frames of a sample, uint8 RGB [F, H, W, 3], with its source.

    Args:
        provenance: its row of `PROVENANCE`. fps: that the set claims. videos: folder of the videos.

    Raises:
        VideoError, PathError: the source cannot be used. OSError: it cannot be read.
    """
    path = resolve(videos, provenance["path"])
    seconds, pts = _times(path)
    start = int(np.searchsorted(pts, provenance["start_pts"]))
    if start == len(pts) or pts[start] != provenance["start_pts"]:
        raise VideoError("decode_error", f"{path}: has no frame at pts {provenance['start_pts']}; was it replaced?")
    count = len(decoded)
    wanted = seconds[start] + np.arange(count) / fps
    picks = {RIGHT: _nearest(seconds, wanted)}
    if count > 1:
        for offset in _OFFSETS:
            name = f"{abs(offset)} frame{'s' * (abs(offset) > 1)} {'late' if offset > 0 else 'early'}"
            picks[name] = picks[RIGHT] + offset
        own = (len(seconds) - 1) / (seconds[-1] - seconds[0])
        for rate in (*_RATES, own):
            if (count - 1) * abs(fps / rate - 1) >= 1:  # nearer ones differ by less than a frame at the end
                later = seconds[start] + np.arange(count) / rate
                inside = later <= seconds[-1] + 0.5 / own
                picks[f"{rate:.4g} frames a second"] = np.where(inside, _nearest(seconds, later), len(seconds))
    needed = sorted({i for pick in picks.values() for i in pick.tolist() if 0 <= i < len(pts)})
    crop = [provenance[f"crop_{side}"] for side in SIDES]
    read = read_frames(path, [int(pts[i]) for i in needed], crop=crop, size=decoded.shape[1:3])
    frames = dict(zip(needed, read, strict=True))
    source = np.stack([frames[i] for i in picks[RIGHT].tolist()])
    errors = np.square(source.astype(np.float32) - decoded).mean(axis=(1, 2, 3))
    return Compared(
        sample=provenance["sample"],
        bucket=provenance["bucket"],
        psnr=10 * math.log10(255**2 / max(float(errors.mean()), _LEAST_MSE)),
        luma=(mean_luma(source), mean_luma(decoded)),
        late=float(np.abs(seconds[picks[RIGHT]] - wanted).max()) * fps,
        pixels=_pixel_errors(source, decoded),
        times=_time_errors(frames, picks, decoded) if count > 1 else {},
        source=source[spaced(count, 6)],
        decoded=decoded[spaced(count, 6)],
    )


def likeliest(found: Iterable[Hypotheses]) -> tuple[str, float]:
    """Returns the hypothesis with the least error over several samples, and its error as a share of the right one's.

    Errors of one sample are compared with one another, so that no sample counts more than others: it is the likelihood
    under noise of each sample's own strength.
    """
    ratios: dict[str, list[float]] = {}
    for errors in found:
        right = max(errors[RIGHT], _LEAST_MSE)
        for name, error in errors.items():
            ratios.setdefault(name, []).append(math.log(max(error, _LEAST_MSE) / right))
    most = max(map(len, ratios.values()))
    mean = {name: sum(values) / len(values) for name, values in ratios.items() if 2 * len(values) >= most}
    name = min(mean, key=lambda name: (mean[name], name != RIGHT))
    return name, math.exp(mean[name])


def write_sheet(path: Path, compared: Sequence[Compared]) -> None:
    """Writes a PNG with a row a sample: its decoded frames below those of the source."""
    rows = (
        (f"{one.bucket} {one.sample}: source above, decoded below, {one.psnr:.1f} dB", _stacked(one))
        for one in compared
    )
    contact_sheet(path, rows)


def _stacked(one: Compared) -> np.ndarray:
    return np.concatenate([one.source, one.decoded], axis=1)


def _pixel_errors(source: np.ndarray, decoded: np.ndarray) -> Hypotheses:
    """Returns the errors where other pixels were encoded than those of the right frames."""
    chosen = spaced(len(source), min(len(source), _LOOKED_AT))
    shown, given = source[chosen].astype(np.float32), decoded[chosen].astype(np.float32)
    encoded: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        RIGHT: lambda x: x,
        "pixels in [0, 1] in place of [−1, 1]": lambda x: (x + 255) / 2,
        "BGR in place of RGB": lambda x: x[..., ::-1],
        "mirrored": lambda x: x[:, :, ::-1],
        "upside down": lambda x: x[:, ::-1],
    }
    return {name: float(np.square(change(shown) - given).mean()) for name, change in encoded.items()}


def _time_errors(frames: Mapping[int, np.ndarray], picks: Mapping[str, np.ndarray], decoded: np.ndarray) -> Hypotheses:
    """Returns the errors where frames of other times were encoded. One is left out that the source has too few for.

    Args:
        frames: of the source, by number. picks: hypothesis → number of the frame that each decoded one would be.
    """
    small = {i: _shrunk(frame) for i, frame in frames.items()}
    given = [_shrunk(frame) for frame in decoded]
    right = [float(np.square(small[i] - frame).mean()) for i, frame in zip(picks[RIGHT].tolist(), given, strict=True)]
    found = {}
    for name, pick in picks.items():
        inside = [j for j, i in enumerate(pick.tolist()) if i in small]
        if 2 * len(inside) < len(given):
            continue
        error = sum(float(np.square(small[int(pick[j])] - given[j]).mean()) for j in inside)
        # The share of the right frames' error over the same ones, so that hypotheses can be compared.
        found[name] = error / max(sum(right[j] for j in inside), _LEAST_MSE) * sum(right) / len(right)
    return found


def _times(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the presentation times of a video's frames in seconds and in units of its time base, from its packets."""
    with open_video(path) as (container, stream):
        pts = np.array(sorted({packet.pts for packet in container.demux(stream) if packet.pts is not None}), np.int64)
        if not len(pts):
            raise VideoError("unreadable", f"{path}: its packets have no times")
        return pts * float(stream.time_base), pts


def _nearest(seconds: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the numbers of the frames nearest in time; of two as near the earlier."""
    distances = np.abs(seconds[None, :] - wanted[:, None])
    return np.argmax(distances <= distances.min(axis=1, keepdims=True) + 1e-6, axis=1)


def _shrunk(frame: np.ndarray) -> np.ndarray:
    """Returns luma of a frame at a short side of at most 96 pixels, float32 [h, w]."""
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    scale = min(_SMALL / min(luma.shape), 1.0)
    size = tuple(max(round(side * scale), 1) for side in luma.shape[::-1])
    return cv2.resize(luma, size, interpolation=cv2.INTER_AREA)
