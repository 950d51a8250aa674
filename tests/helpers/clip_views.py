"""Clips of frames that lie in memory, for the steps that look at clips."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mugv_ds.prepare.views import ClipView


def clip_view(number: int, frames: np.ndarray | None = None, *, root: Path = Path("videos"), **fields) -> ClipView:
    """Returns a clip of uint8 RGB frames [N, H, W, 3], which are its source's; of flat grey, if there are none.

    Args:
        number: makes the ids. fields: of `ClipView`, instead of those that follow from the frames.
    """
    if frames is None:
        frames = np.full((8, 36, 64, 3), 10 * (number % 25), np.uint8)

    def read(path: Path, pts: Sequence[int], *, crop, size: tuple[int, int]) -> list[np.ndarray]:
        return [cv2.resize(frames[time], size[::-1], interpolation=cv2.INTER_AREA) for time in pts]

    given = {
        "clip": f"{number:032x}",
        "video": f"{number:064x}",
        "root": root,
        "relative": f"{number}.mp4",
        "pts": range(len(frames)),
        "height": frames.shape[1],
        "width": frames.shape[2],
        "read": read,
        "duration": 4.0,
    }
    return ClipView(**(given | fields))


def broken_clip(number: int, root: Path = Path("videos")) -> ClipView:
    """Returns a clip whose video cannot be decoded."""

    def read(path: Path, pts: Sequence[int], *, crop, size: tuple[int, int]) -> list[np.ndarray]:
        raise ValueError(f"decode_error: {path}: Invalid data")

    return clip_view(number, root=root, read=read)
