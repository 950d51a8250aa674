"""The lagged colour–structure score, which tells two shots apart, and so finds gradual transitions too.

Frames are compared by their colours and by their structure, as Koala-36M does (Wang et al. 2024, arXiv 2410.08260,
section 4.1), with the frame before and also with earlier ones: over a second, a slow dissolve is as large as a cut.
Ours are also that colours are counted in each quarter of the picture, without which two shots of one street or face are
too much alike, and the coefficients of the linear decision, which tools/fit_css.py fits.

Shape suffixes: H height, W width.
"""

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from mugv_ds.prepare.css_coefficients import COEFFICIENTS

_BINS = 8  # of each of blue, green and red
_SIDE = 128  # at which structure is compared
_CANNY = 100, 200  # thresholds of edges
_WINDOW = 7, 7  # of SSIM, of even weights
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # SSIM's constants (Wang et al. 2004)
_MOST_FRAMES = 300  # that are remembered: at more than 300 frames a second the lag of a second is shorter
_TOLERANCE_S = 0.02  # by which the first frame may be later than a lag asks for


class Look(NamedTuple):
    """What two frames are compared by. colours: unit vector. picture, mean, variance: float32 [128, 128]."""

    colours: np.ndarray
    picture: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def look(frame: np.ndarray, grey: np.ndarray) -> Look:
    """Returns what a frame is compared by.

    Args:
        frame: uint8 BGR [H, W, 3]. grey: its luma, uint8 [128, 128].
    """
    middle = frame.shape[0] // 2, frame.shape[1] // 2
    quarters = [half[:, columns] for half in (frame[: middle[0]], frame[middle[0] :]) for columns in _halves(middle[1])]
    counts = [cv2.calcHist([part], [0, 1, 2], None, [_BINS] * 3, [0, 256] * 3).ravel() for part in quarters]
    colours = np.concatenate(counts)
    colours -= colours.mean()
    colours /= np.linalg.norm(colours) + 1e-9
    picture = np.float32(np.maximum(grey, cv2.Canny(grey, *_CANNY)))
    mean = cv2.boxFilter(picture, -1, _WINDOW)
    return Look(colours, picture, mean, cv2.boxFilter(picture * picture, -1, _WINDOW) - mean * mean)


def _halves(middle: int) -> tuple[slice, slice]:
    return slice(None, middle), slice(middle, None)


def compare(earlier: Look, later: Look) -> tuple[float, float]:
    """Returns the correlation of the histograms of the four quarters' colours, and the SSIM of the pictures."""
    covariance = cv2.boxFilter(earlier.picture * later.picture, -1, _WINDOW) - earlier.mean * later.mean
    means = earlier.mean * later.mean
    numerator = (2 * means + _C1) * (2 * covariance + _C2)
    denominator = (earlier.mean**2 + later.mean**2 + _C1) * (earlier.variance + later.variance + _C2)
    return float(earlier.colours @ later.colours), float((numerator / denominator).mean())


def decide(colour: float, structure: float, seconds: float, coefficients: Mapping | None = None) -> float:
    """Returns the score of two frames that lie so far apart: positive where they are of different shots.

    Args:
        colour, structure: of `compare`; numbers or arrays of them. seconds: between the two, of all alike.
        coefficients: lag in seconds → constant, that of the colour, that of the structure; None for the fitted ones.
    """
    coefficients = coefficients or COEFFICIENTS
    nearest = min(coefficients, key=lambda lag: abs(np.log(lag / seconds)))
    constant, of_colour, of_structure = coefficients[nearest]
    return constant + of_colour * colour + of_structure * structure


def partner(times: Sequence[float], number: int, lag: float | None) -> int | None:
    """Returns the number of the frame that a frame is compared with; None where the video has not gone on for as long.

    Args:
        times: of the frames up to this one, in seconds; they rise. number: of the frame. lag: in seconds; None for the
            frame before.
    """
    if lag is None:
        return number - 1 if number else None
    wanted = times[number] - lag
    if wanted < times[0] - _TOLERANCE_S:
        return None
    after = bisect_left(times, wanted, 0, number)
    nearest = after if after == 0 or times[after] - wanted < wanted - times[after - 1] else after - 1
    return max(min(nearest, number - 1), number - _MOST_FRAMES, 0)


class Lagged:
    """Compares frame after frame with earlier ones.

    Args:
        lags: in seconds, besides which there is always the frame before.
    """

    def __init__(self, lags: Sequence[float]) -> None:
        self.lags = (None, *lags)
        self._times = array("d")
        self._looks: deque[Look] = deque(maxlen=_MOST_FRAMES + 1)

    def add(self, seconds: float, frame: np.ndarray, grey: np.ndarray) -> list[tuple[float, float, float] | None]:
        """Returns colour, structure and seconds between, see `decide`, of the next frame for each lag.

        None stands where there is no frame to compare it with.

        Args:
            seconds: its time. frame, grey: see `look`.
        """
        self._times.append(seconds)
        self._looks.append(look(frame, grey))
        number, compared = len(self._times) - 1, []
        for lag in self.lags:
            other = partner(self._times, number, lag)
            if other is None:
                compared.append(None)
            else:
                pair = compare(self._looks[other - number - 1], self._looks[-1])
                compared.append((*pair, seconds - self._times[other]))
        return compared
