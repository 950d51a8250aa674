"""What is measured of a video without any weights: pure functions of its pixels.

Shape suffixes: F frames, H height, W width; the last dimension of 3 is RGB.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
import torch

from mugv_ds.config.model import LATENT_STRIDE
from mugv_ds.data.pictures import dis_flow, sharpness

VERSION = 1  # of the measures; a change of what one gives must raise it, so that videos are measured anew

_MOST_PSNR = 100.0  # dB, of images that are equal


@dataclass(frozen=True)
class Measure:
    """A number of a video.

    Attributes:
        title: what to call it. unit: of it; empty where it has none.
        better: +1 where more is better, −1 where less is, 0 where neither says anything by itself.
        meaning: one line for who reads the table.
    """

    title: str
    unit: str
    better: int
    meaning: str


MEASURES = {
    "temporal_flickering": Measure(
        "Temporal flickering", "", 1, "1 − mean change between frames next to each other; motion lowers it too"
    ),
    "motion": Measure("Motion", "pixels a frame", 0, "mean length of the optical flow"),
    "exact_repeats": Measure("Exact repeats", "share", -1, "frames equal to the one before"),
    "brightness_drift": Measure("Brightness drift", "of full range", 0, "change of mean luma over the clip; 0 is best"),
    "saturation_drift": Measure("Saturation drift", "of full range", 0, "change of mean saturation; 0 is best"),
    "sharpness": Measure("Sharpness", "", 0, "variance of the Laplacian; noise raises it too"),
    "first_frame_psnr": Measure("First frame PSNR", "dB", 1, "of the first frame that the model made and the image"),
    "first_frame_ssim": Measure("First frame SSIM", "", 1, "of the first frame that the model made and the image"),
}

# What `prepare.demo.judge.demo_measures` gives of videos whose prompts are the demo's.
DEMO_MEASURES = {
    "shape": Measure("Shape", "share", 1, "the shape that was asked for"),
    "colour": Measure("Colour", "share", 1, "the colour that was asked for"),
    "direction": Measure("Direction", "share", 1, "moves as asked for; left or right where that is left open"),
    "right": Measure("Moves right", "share", 0, "of those asked to move to a side; better in the demo's preferences"),
}


def measure(frames: np.ndarray, image: np.ndarray | None = None) -> dict[str, float]:
    """Measures a video; what it cannot be asked for is left out.

    Args:
        frames: uint8 RGB [F, H, W, 3].
        image: uint8 RGB [H, W, 3] that it starts with; None: there is none, and no fidelity. The first frames show it
            and are not the model's: one of 8n + 1, else the eight of the first latent frame. It is the frame behind
            them that is compared.

    Returns:
        By the names of `MEASURES`, finite numbers. A lone frame has sharpness and fidelity only.

    Raises:
        ValueError: frames or image have another shape or dtype.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(f"frames must be uint8 [F, H, W, 3] with F ≥ 1, got {frames.dtype} {list(frames.shape)}")
    found = {"sharpness": mean_sharpness(frames)}
    if len(frames) > 1:
        found |= {
            "temporal_flickering": temporal_flickering(frames),
            "motion": motion(frames),
            "exact_repeats": exact_repeats(frames),
            "brightness_drift": brightness_drift(frames),
            "saturation_drift": saturation_drift(frames),
        }
    first_made = 1 if len(frames) % LATENT_STRIDE == 1 else LATENT_STRIDE
    if image is not None and first_made < len(frames):
        psnr, ssim = fidelity(frames[first_made], image)
        found |= {"first_frame_psnr": psnr, "first_frame_ssim": ssim}
    return {name: found[name] for name in MEASURES if name in found and math.isfinite(found[name])}


def temporal_flickering(frames: np.ndarray) -> float:
    """Returns 1 − mean |x[f+1] − x[f]| / 255 over pixels, channels and pairs of frames; VBench's temporal flickering.

    VBench (Huang et al. 2024) asks it of still scenes only: whatever moves lowers it as flicker does.
    """
    change = [cv2.norm(before, after, cv2.NORM_L1) / before.size for before, after in pairwise(frames)]
    return 1 - float(np.mean(change)) / 255


def motion(frames: np.ndarray) -> float:
    """Returns the mean length of DIS optical flow between frames next to each other, in pixels.

    It is rounded to a millionth: OpenCV's sums differ from call to call, after the tenth digit. Frames of less than 12
    pixels a side have none: NaN.
    """
    flow = dis_flow()
    return round(float(np.mean([flow(before, after) for before, after in pairwise(frames)])), 6)


def exact_repeats(frames: np.ndarray) -> float:
    """Returns the share of the frames after the first that equal the one before in every pixel."""
    return float(np.mean([np.array_equal(before, after) for before, after in pairwise(frames)]))


def brightness_drift(frames: np.ndarray) -> float:
    """Returns by how much mean luma rises from the first to the last frame, as a share of the full range.

    It is (F − 1) × the slope of the least-squares line through the frames' means, so that a flicker is no drift. Luma
    is 0.299 R + 0.587 G + 0.114 B (Rec. 601, as OpenCV has it).
    """
    return _rise([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).mean() / 255 for frame in frames])


def saturation_drift(frames: np.ndarray) -> float:
    """Returns by how much mean saturation rises over the clip, see `brightness_drift`.

    The saturation of a pixel is that of HSV, (max − min) / max of its channels; that of black is 0.
    """
    return _rise([cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)[..., 1].mean() / 255 for frame in frames])


def _rise(values_F: list[float]) -> float:
    return float(np.polyfit(np.arange(len(values_F)), values_F, 1)[0]) * (len(values_F) - 1)


def mean_sharpness(frames: np.ndarray) -> float:
    """Returns the mean over frames of the variance of the Laplacian (3 × 3) of luma."""
    return float(np.mean([sharpness(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)) for frame in frames]))


def fidelity(frame: np.ndarray, image: np.ndarray) -> tuple[float, float]:
    """Compares a frame with the image that it should be, both uint8 RGB [H, W, 3].

    Returns:
        PSNR = 10 log10(255² / MSE) over pixels and channels in dB, 100 at most; and SSIM (Wang et al. 2004: Gaussian
        window of 11 × 11, σ 1.5), the mean over pixels and channels.

    Raises:
        ValueError: their shapes differ.
    """
    if frame.shape != image.shape or image.dtype != np.uint8:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}, the frame uint8 {list(frame.shape)}")
    from torchmetrics.functional.image import structural_similarity_index_measure

    error = float(np.mean((frame.astype(np.float64) - image) ** 2))
    psnr = _MOST_PSNR if error == 0 else min(10 * math.log10(255**2 / error), _MOST_PSNR)
    pair = (torch.from_numpy(np.ascontiguousarray(one)).permute(2, 0, 1)[None].float() for one in (frame, image))
    return psnr, float(structural_similarity_index_measure(*pair, data_range=255.0))
