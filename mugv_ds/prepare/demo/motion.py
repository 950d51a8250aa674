"""Measures motion from pixels: how fast, and which way, what stands out from the background moves.

Shape suffixes: F frames, H height, W width.
"""

import numpy as np

from mugv_ds.prepare.demo.scenes import BACKGROUND

LEAST_MOTION = 0.1  # pixels a frame; less is no motion. The demo's shapes move 0.375 or more.

_CONTRAST = 64  # difference in any channel from which a pixel is foreground; the shapes differ by 180 or more
_LEAST_AREA = 0.01  # share of a frame's pixels that must be foreground for the frame to count


def foreground(video: np.ndarray, background: tuple[int, int, int] = BACKGROUND) -> tuple[np.ndarray, np.ndarray]:
    """Returns the largest difference of each pixel from the background, int16 [F, H, W], and whether it is foreground.

    Raises:
        ValueError: `video` is not uint8 [F, H, W, 3].
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"video must be uint8 [F, H, W, 3], got {video.dtype} {list(video.shape)}")
    difference_FHW = abs(video.astype(np.int16) - np.array(background, np.int16)).max(axis=-1)
    foreground_FHW = difference_FHW >= _CONTRAST
    return difference_FHW, foreground_FHW


def horizontal_motion(video: np.ndarray, background: tuple[int, int, int] = BACKGROUND) -> float:
    """Measures the speed of the foreground's centroid along x in pixels a frame; to the right is positive.

    It is the slope of a least-squares line through the centroids of the frames that show something.

    Args:
        video: uint8 RGB [F, H, W, 3].
        background: RGB colour of the background. A pixel's weight in the centroid is its largest difference from it.

    Raises:
        ValueError: `video` has another shape or dtype, or fewer than two of its frames show anything.
    """
    difference_FHW, foreground_FHW = foreground(video, background)
    frames = np.flatnonzero(foreground_FHW.mean(axis=(1, 2)) >= _LEAST_AREA)
    if len(frames) < 2:
        raise ValueError(f"{len(frames)} of {len(video)} frames show anything: two are needed to see motion")
    columns_FW = np.where(foreground_FHW, difference_FHW, 0)[frames].sum(axis=1)  # of the frames that count
    centroid_F = columns_FW @ np.arange(video.shape[2]) / columns_FW.sum(axis=1)
    return float(np.polyfit(frames, centroid_F, 1)[0])
