"""Sharpness and motion of pictures, of videos that come in and of those that are sampled. Needs OpenCV.

Shape suffixes: H height, W width.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

cv2.setNumThreads(1)  # there are as many processes as cores

_LEAST_FLOW_SIDE = 12  # pixels, of OpenCV's

Flow = Callable[[np.ndarray, np.ndarray], float]


def sharpness(grey: np.ndarray) -> float:
    """Returns the variance of the Laplacian (3 × 3, OpenCV's) of luma [H, W]."""
    _, deviation = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))
    return float(deviation[0, 0]) ** 2


def dis_flow() -> Flow:
    """Returns DIS optical flow (Kroeger et al. 2016; preset FAST): the mean length between two frames, in pixels.

    Frames of less than 12 pixels a side have none: NaN.
    """
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def flow(before: np.ndarray, after: np.ndarray) -> float:
        if min(before.shape[:2]) < _LEAST_FLOW_SIDE:
            return math.nan
        before, after = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after))
        x, y = cv2.split(method.calc(before, after, None))
        return float(cv2.mean(cv2.magnitude(x, y))[0])

    return flow
