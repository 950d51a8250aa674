"""Draws textured moving scenes, at any time and size: raw footage whose truth is known.

`scenes` beside it draws flat shapes that captions describe; here it is sharpness, motion and colours that count.
Shape suffixes: H height, W width.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np

_MARGIN = 1.5  # the canvas is this many times as large as the frame, and is walked over without an end
_OCTAVES = (3, 6, 12, 24, 48, 96, 160)
_SHAPES = 200
_SPRITES = 3


class DrawnScene:
    """A canvas of coloured noise and shapes that the camera pans over, with sprites of other texture that swing.

    Args:
        seed: decides all of it. height, width: pixels.
        speed: of the camera, in short sides a second. contrast: of colours, in (0, 1].
    """

    def __init__(self, seed: int, height: int, width: int, *, speed: float = 0.06, contrast: float = 1.0) -> None:
        rng = np.random.default_rng([seed, 0xD4A3])
        self.height, self.width = height, width
        self._canvas = _texture(rng, int(height * _MARGIN), int(width * _MARGIN), contrast)
        angle = rng.uniform(0, 2 * np.pi)
        self._velocity = speed * min(height, width) * np.array([np.cos(angle), np.sin(angle)])
        self._start = rng.uniform(0, 1, 2) * self._canvas.shape[1::-1]
        side = min(height, width) // 3
        self._sprites = [
            (
                _texture(rng, side, side, contrast),
                rng.uniform(0.2, 0.8, 2),
                rng.uniform(0.02, 0.06, 2),
                rng.uniform(0, 6, 2),
            )
            for _ in range(_SPRITES)
        ]
        y, x = np.mgrid[:side, :side] - (side - 1) / 2
        self._cover = np.clip(side / 2 - np.hypot(x, y), 0, 1).astype(np.float32)

    def frame(self, seconds: float, offset: Sequence[float] = (0.0, 0.0)) -> np.ndarray:
        """Returns the frame at a time, uint8 RGB [H, W, 3]. offset: of the camera, right and down, in short sides."""
        x, y = self._start + self._velocity * seconds + np.multiply(offset, min(self.height, self.width))
        grid_x, grid_y = np.arange(self.width, dtype=np.float32) + x, np.arange(self.height, dtype=np.float32) + y
        high, wide = self._canvas.shape[:2]
        map_x, map_y = np.meshgrid((grid_x % wide).astype(np.float32), (grid_y % high).astype(np.float32))
        picture = cv2.remap(self._canvas, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        for texture, place, swing, phase in self._sprites:
            x, y = (place + swing * np.sin(2.5 * seconds + phase)) * (self.width, self.height) - texture.shape[0] / 2
            self._lay(picture, texture, x, y)
        return picture

    def _lay(self, picture: np.ndarray, texture: np.ndarray, x: float, y: float) -> None:
        """Lays a sprite over a picture, its left upper corner at (x, y); what reaches over the edge is cut away."""
        left, top, side = math.floor(x), math.floor(y), texture.shape[0] + 1
        move = np.float32([[1, 0, x - left], [0, 1, y - top]])
        rows, columns = slice(max(top, 0), max(top + side, 0)), slice(max(left, 0), max(left + side, 0))
        below = picture[rows, columns].astype(np.float32)
        shown = (
            slice(rows.start - top, rows.start - top + below.shape[0]),
            slice(columns.start - left, columns.start - left + below.shape[1]),
        )
        cover = cv2.warpAffine(self._cover, move, (side, side))[shown][..., None]
        above = cv2.warpAffine(texture, move, (side, side))[shown]
        picture[rows, columns] = np.rint(below + cover * (above - below))


def _texture(rng: np.random.Generator, height: int, width: int, contrast: float) -> np.ndarray:
    """Draws a texture that wraps around, uint8 RGB [height, width, 3]."""
    palette = rng.uniform(0, 255, (3, 3)) * contrast + 127 * (1 - contrast)
    weights = [_noise(rng, height, width) for _ in palette]
    total = sum(np.exp(4 * weight) for weight in weights)
    picture = sum(
        np.exp(4 * weight)[..., None] / total[..., None] * colour
        for weight, colour in zip(weights, palette, strict=True)
    )
    picture = np.clip(picture, 0, 255).astype(np.uint8)
    for _ in range(_SHAPES):
        centre = rng.integers(0, (width, height)).tolist()
        axes = rng.integers(2, max(min(height, width) // 16, 4), 2).tolist()
        colour = (rng.uniform(0, 255, 3) * contrast + 127 * (1 - contrast)).tolist()
        cv2.ellipse(picture, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour, -1, cv2.LINE_AA)
    return picture


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draws noise with as much in every octave, float32 [height, width], of about unit range."""
    total = np.zeros((height, width), np.float32)
    for cells in _OCTAVES:
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        wrapped = np.pad(grid, 2, mode="wrap")
        scale_y, scale_x = height / cells, width / cells
        large = cv2.resize(wrapped, None, fx=scale_x, fy=scale_y, interpolation=cv2.INTER_CUBIC)
        top, left = round(2 * scale_y), round(2 * scale_x)
        total += large[top : top + height, left : left + width] / len(_OCTAVES) ** 0.5
    return total
