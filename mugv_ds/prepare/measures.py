"""What is measured of single frames and of pairs: borders, jitter, hashes, light; the rest is in `data.pictures`.

Shape suffixes: H height, W width. Frames are uint8 in full range; grey ones are luma.
"""

from typing import NamedTuple

import cv2
import numpy as np

cv2.setNumThreads(1)  # there are as many processes as cores

_DARK, _BRIGHT = 16, 239  # luma below and above which a pixel is dark or bright
_FLAT = 8  # range of luma between the 2nd and the 98th percentile up to which a line is flat
_LINES = 8  # that are looked at together
_MOST_BORDER = 0.5  # of a side, at which looking for borders ends
_EDGE = 16  # difference of luma of a border and what is beside it
_BESIDE = 0.02  # of the side, what is beside a border
_SMALL_HEIGHT, _SMALL_WIDTH = 90, 160  # at which frames are compared
_HASH_SIDE, _HASH_BITS = 32, 8
_LEAST_CONTRAST = 2.0  # standard deviation of luma of a hashed frame; a flatter one has no hash


class Light(NamedTuple):
    """mean: of luma, in [0, 1]. range: from its 2nd to its 98th percentile, of 255. dark, bright: shares of pixels."""

    mean: float
    range: float
    dark: float
    bright: float


class Borders(NamedTuple):
    """Of top, bottom, left and right.

    Attributes:
        share: of the side that is flat, and of the luma of its outermost line. level: that luma, in [0, 255].
        edge: share of the border's line along which the picture beside it differs.
    """

    share: tuple[float, float, float, float]
    level: tuple[float, float, float, float]
    edge: tuple[float, float, float, float]


def fitted(height: int, width: int, short: int) -> tuple[int, int]:
    """Returns height and width that have this short side; the given ones if theirs is shorter."""
    scale = min(short / min(height, width), 1.0)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def light(grey: np.ndarray) -> Light:
    """Measures the luma [H, W] of a frame."""
    counts = np.bincount(grey.ravel(), minlength=256)
    total = np.cumsum(counts) / grey.size
    low, high = np.searchsorted(total, (0.02, 0.98))
    mean = float(counts @ np.arange(256)) / grey.size / 255
    return Light(mean, float(high - low), float(total[_DARK - 1]), float(1 - total[_BRIGHT]))


def small(grey: np.ndarray) -> np.ndarray:
    """Returns luma at 90 × 160, where frames are compared."""
    return cv2.resize(grey, (_SMALL_WIDTH, _SMALL_HEIGHT), interpolation=cv2.INTER_AREA)


def difference(before: np.ndarray, after: np.ndarray) -> float:
    """Returns the mean absolute difference of two frames, in [0, 255]."""
    return float(cv2.norm(before, after, cv2.NORM_L1)) / before.size


class Shift:
    """Measures how far the whole picture moved, by the phase correlation of small frames.

    Args:
        height, width: of the frames as they are, whose short side is the unit.
    """

    def __init__(self, height: int, width: int) -> None:
        self._window = cv2.createHanningWindow((_SMALL_WIDTH, _SMALL_HEIGHT), cv2.CV_32F)
        self._unit = width / _SMALL_WIDTH / min(height, width), height / _SMALL_HEIGHT / min(height, width)

    def between(self, before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
        """Returns the motion to the right and downwards, as shares of the short side, of two frames of `small`."""
        (x, y), _ = cv2.phaseCorrelate(np.float32(before), np.float32(after), self._window)
        return x * self._unit[0], y * self._unit[1]


def hashes(grey: np.ndarray) -> tuple[int, int]:
    """Returns the perceptual hash of luma [H, W], and that of its mirror image.

    A bit says whether one of the 8 × 8 lowest frequencies of the cosine transform at 32 × 32 is above their median
    (pHash, Zauner 2010). A flat frame has none: 0.
    """
    picture = np.float32(cv2.resize(grey, (_HASH_SIDE, _HASH_SIDE), interpolation=cv2.INTER_AREA))
    if picture.std() < _LEAST_CONTRAST:
        return 0, 0
    low = cv2.dct(picture)[:_HASH_BITS, :_HASH_BITS]
    mirrored = low * np.float32([1, -1] * (_HASH_BITS // 2))  # what is odd from left to right changes its sign
    return _bits(low), _bits(mirrored)


def _bits(coefficients: np.ndarray) -> int:
    above = coefficients > np.median(coefficients)
    return int.from_bytes(np.packbits(above).tobytes(), "big")


def borders(grey: np.ndarray) -> Borders:
    """Finds flat borders of luma [H, W]: lines of one level from the outside inwards. In a flat frame all is border."""
    top = _border(grey)
    bottom = _border(grey[::-1])
    rows = slice(top[0], grey.shape[0] - bottom[0]) if top[0] + bottom[0] < grey.shape[0] else slice(None)
    across = np.ascontiguousarray(grey[rows].T)
    left, right = _border(across), _border(across[::-1])
    height, width = grey.shape
    found = zip((top, bottom, left, right), (height, height, width, width), strict=True)
    share, level, edge = zip(*((lines / side, level, edge) for (lines, level, edge), side in found), strict=True)
    return Borders(share, level, edge)


def _border(grey: np.ndarray) -> tuple[int, float, float]:
    """Returns how many lines at the top are flat and of one level, that level, and how much of the edge differs."""
    most = int(len(grey) * _MOST_BORDER)
    level = float(np.median(grey[0]))
    lines = 0
    while lines < most:
        part = grey[lines : min(lines + _LINES, most)]
        low, middle, high = np.percentile(part, (2, 50, 98), axis=1)
        flat = (high - low <= _FLAT) & (abs(middle - level) <= _FLAT)
        if not flat.all():
            lines += int(flat.argmin())
            break
        lines += len(part)
    beside = grey[lines : lines + max(round(len(grey) * _BESIDE), 1)]
    return lines, level, float((abs(beside.mean(axis=0) - level) > _EDGE).mean()) if lines else 0.0
