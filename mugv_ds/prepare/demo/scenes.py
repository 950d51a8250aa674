"""Coloured shapes that move on a dark background: what a clip shows, how it is drawn at random, and its pixels.

Shape, colour, place and direction are kept few and clear enough that a 288-wide model learns them in minutes on a CPU.
Every clip lasts two seconds, and in all pictures of one zoom shapes move at one speed in pixels a second; what a frame
moves follows from the frames a second, which the model is told.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mugv_ds.data.noise import generator

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 40),
    "magenta": (220, 60, 220),
    "white": (240, 240, 240),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y downwards
BACKGROUND = (16, 16, 24)

# At zoom 1.
_SPEED = 6.0  # pixels a second
_RADIUS = (12.0, 13.0)  # range; pixels from the centre to a shape's rim, roughly
_JITTER = 1.0  # most that a path's middle is off the picture's centre on each axis, pixels


def _circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(x, y) - radius


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.85 * radius


def _triangle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Equilateral, pointing up."""
    inner = 0.575 * radius
    return np.maximum(y, np.sqrt(0.75) * abs(x) - 0.5 * y) - inner


# Signed distance to the rim, negative inside, of points (x, y) relative to the centre.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
}


@dataclass(frozen=True)
class Subject:
    """What a clip shows, and what its caption says of it.

    Attributes:
        shape, colour: keys of SHAPES and COLOURS.
        direction: key of DIRECTIONS; None stands still, and the caption says nothing of motion.
        sideways: the caption says "sideways", which leaves open whether `direction` is left or right.
    """

    shape: str
    colour: str
    direction: str | None
    sideways: bool = False

    @property
    def caption(self) -> str:
        looks = f"a {self.colour} {self.shape}"
        return looks if self._motion is None else f"{looks} moving {self._motion}"

    @property
    def features_path(self) -> str:
        """The file of the caption's text features, relative to the data set."""
        words = (word for word in (self.colour, self.shape, self._motion) if word is not None)
        return f"text_features/{'_'.join(words)}_text.pt"

    @property
    def _motion(self) -> str | None:
        return "sideways" if self.sideways else self.direction


SUBJECTS = [Subject(*keys) for keys in itertools.product(SHAPES, COLOURS, DIRECTIONS)]
STILLS = [Subject(*keys, None) for keys in itertools.product(SHAPES, COLOURS)]
SIDEWAYS = [Subject(*keys, "right", sideways=True) for keys in itertools.product(SHAPES, COLOURS)]  # see `twins`


@dataclass(frozen=True)
class Format:
    """How large and how long a clip is.

    Attributes:
        frames: 1 for an image.
        height, width: pixels; multiples of 8.
        fps: frames a second.
        zoom: size and speed of the shapes, relative to those in a picture of 48×48.
    """

    frames: int
    height: int
    width: int
    fps: float
    zoom: float = 1.0

    @property
    def kind(self) -> str:
        return "image" if self.frames == 1 else "video"


IMAGES = (Format(1, 48, 48, 8.0), Format(1, 40, 56, 8.0))
SHORT = (Format(16, 48, 48, 8.0), Format(16, 40, 56, 8.0))
LONG = (Format(32, 48, 48, 16.0), Format(32, 40, 56, 16.0))
LARGE = (Format(32, 64, 64, 16.0, zoom=4 / 3), Format(32, 56, 72, 16.0, zoom=4 / 3))
SQUARE = SHORT[:1]


@dataclass(frozen=True)
class Clip:
    """One clip to draw.

    Attributes:
        name: sample id and stem of its files.
        subject: what it shows.
        format: its size.
        middle: (x, y) of the shape's centre half-way through the clip, pixels.
        radius: pixels.
    """

    name: str
    subject: Subject
    format: Format
    middle: tuple[float, float]
    radius: float

    @property
    def latent_path(self) -> str:
        return f"latents/{self.name}.pt"


def draw_clips(
    split: str, count: int, seed: int, *, subjects: Sequence[Subject] = SUBJECTS, formats: Sequence[Format] = SQUARE
) -> list[Clip]:
    """`count` clips of a split; each depends on (split, seed, its number), the subjects and the formats only.

    All subjects come once before any comes again, in an order that is new each time; the formats take turns.
    """
    clips = []
    for number in range(count):
        turn, place = divmod(number, len(subjects))
        order = generator("demo order", split, seed, turn).permutation(len(subjects))
        rng = generator("demo clip", split, seed, number)
        size = formats[number % len(formats)]
        off_x, off_y = size.zoom * rng.uniform(-_JITTER, _JITTER, size=2)
        middle = (size.width / 2 + off_x, size.height / 2 + off_y)
        radius = size.zoom * rng.uniform(*_RADIUS)
        clips.append(Clip(f"{split}_{number:05d}", subjects[order[place]], size, middle, radius))
    return clips


def twins(clip: Clip) -> tuple[Clip, Clip]:
    """The clip moving right and the clip moving left, all else equal."""

    def towards(direction: str) -> Clip:
        return replace(clip, name=f"{clip.name}_{direction}", subject=replace(clip.subject, direction=direction))

    return towards("right"), towards("left")


def centred(clip: Clip) -> Clip:
    """The clip with its path through the centre of the picture, and the radius in the middle of the range."""
    size = clip.format
    return replace(clip, middle=(size.width / 2, size.height / 2), radius=size.zoom * sum(_RADIUS) / 2)


def render(clip: Clip) -> np.ndarray:
    """Draws a clip: uint8 RGB [frames, height, width, 3], the shape's rim anti-aliased."""
    size = clip.format
    step_x, step_y = DIRECTIONS[clip.subject.direction] if clip.subject.direction else (0, 0)
    per_frame = size.zoom * _SPEED / size.fps
    travelled = (per_frame * (np.arange(size.frames) - (size.frames - 1) / 2))[:, None, None]
    x = np.arange(size.width) + 0.5 - (clip.middle[0] + step_x * travelled)  # of pixels' centres: [F, 1, W]
    y = (np.arange(size.height) + 0.5)[:, None] - (clip.middle[1] + step_y * travelled)  # [F, H, 1]
    # A pixel is covered in proportion as the rim crosses it.
    cover = np.clip(0.5 - SHAPES[clip.subject.shape](x, y, clip.radius), 0, 1)[..., None]
    colour, background = np.array(COLOURS[clip.subject.colour]), np.array(BACKGROUND)
    return (background + cover * (colour - background)).round().astype(np.uint8)
