"""Judging motion from pixels: how fast, and which way, what stands out from the background moves."""

import numpy as np

from mugv_ds.prepare.demo.scenes import BACKGROUND

LEAST_MOTION = 0.1  # pixels a frame; less is no motion. The demo's shapes move 0.375 or more.

_CONTRAST = 64  # levels, in any channel, from which a pixel is no background; the shapes differ by 180 or more
_LEAST_AREA = 0.01  # share of a frame that must stand out


def horizontal_motion(video: np.ndarray, background: tuple[int, int, int] = BACKGROUND) -> float:
    """Speed of the foreground's centroid along x in pixels a frame, rightwards positive: a least-squares line through
    the centroids of the frames that show something.

    Args:
        video: uint8 RGB [F, H, W, 3].
        background: its RGB colour. A pixel's weight in the centroid is its largest difference from it.

    Raises:
        ValueError: `video` is something else, or less than two of its frames show anything.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video must be uint8 [F, H, W, 3], got {video.dtype} {list(video.shape)}")
    difference = abs(video.astype(np.int16) - np.array(background, np.int16)).max(axis=-1)
    foreground = difference >= _CONTRAST
    frames = np.flatnonzero(foreground.mean(axis=(1, 2)) >= _LEAST_AREA)
    if len(frames) < 2:
        raise ValueError(f"{len(frames)} of {len(video)} frames show anything: two are needed to see motion")
    columns = np.where(foreground, difference, 0)[frames].sum(axis=1)  # [frames, W]
    centroids = columns @ np.arange(video.shape[2]) / columns.sum(axis=1)
    return float(np.polyfit(frames, centroids, 1)[0])
