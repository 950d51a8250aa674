"""Coloured shapes that move on a dark background: what a clip shows, how it is drawn at random, and its pixels.

Shapes, colours, places and directions are few and clear enough that a 288-wide model learns them in minutes on a CPU.
Every video lasts two seconds. At one zoom all shapes move at one speed in pixels a second, so that how far they move in
a frame follows from the frames a second, which the model is told.

Shape suffixes: F frames, H height, W width; the last dimension of 3 is RGB.
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

# These hold at zoom 1.
_SPEED = 6.0  # pixels a second
_RADIUS = (12.0, 13.0)  # from … to; pixels from the centre to a shape's rim, roughly
_JITTER = 1.0  # pixels that a path's middle is at most off the picture's centre on each axis


def _circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(x, y) - radius


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.85 * radius


def _triangle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Returns the distance to an equilateral triangle that points up."""
    inner = 0.575 * radius
    return np.maximum(y, np.sqrt(0.75) * abs(x) - 0.5 * y) - inner


# Each function returns the signed distance to the rim, negative inside, of points (x, y) relative to the centre.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
}


@dataclass(frozen=True)
class Subject:
    """The subject of a clip: what it shows, and what its caption says of it.

    Attributes:
        shape, colour: keys of SHAPES and COLOURS.
        direction: key of DIRECTIONS; None for a shape that stands still, of whose motion the caption says nothing.
        sideways: whether the caption says "sideways", which leaves open whether `direction` is left or right.
    """

    shape: str
    colour: str
    direction: str | None
    sideways: bool = False

    @property
    def caption(self) -> str:
        """Returns the caption, such as "a red circle moving left"."""
        looks = f"a {self.colour} {self.shape}"
        return looks if self._motion is None else f"{looks} moving {self._motion}"

    @property
    def features_path(self) -> str:
        """Returns the path of the caption's text features, relative to the data set's folder."""
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
    """The size and length of a clip.

    Attributes:
        frames: number of frames; 1 for an image.
        height, width: in pixels; multiples of 8.
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
    """A clip that `render` can draw.

    Attributes:
        name: sample id, and stem of its files' names.
        subject: what it shows.
        format: its size and length.
        middle: (x, y) of the shape's centre half-way through the clip, in pixels.
        radius: of the shape, in pixels.
    """

    name: str
    subject: Subject
    format: Format
    middle: tuple[float, float]
    radius: float

    @property
    def latent_path(self) -> str:
        """Returns the path of the latent, relative to the data set's folder."""
        return f"latents/{self.name}.pt"


def draw_clips(
    split: str, count: int, seed: int, *, subjects: Sequence[Subject] = SUBJECTS, formats: Sequence[Format] = SQUARE
) -> list[Clip]:
    """Draws `count` clips of a split at random.

    A clip depends on (split, seed, its number), the subjects and the formats only. All subjects come once before any
    comes again, in an order that is new each time; the formats take turns.
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
    """Returns the clip moving right and the clip moving left, with all else equal."""

    def towards(direction: str) -> Clip:
        return replace(clip, name=f"{clip.name}_{direction}", subject=replace(clip.subject, direction=direction))

    return towards("right"), towards("left")


def centred(clip: Clip) -> Clip:
    """Returns the clip with its path through the centre of the picture, and the radius in the middle of the range."""
    size = clip.format
    return replace(clip, middle=(size.width / 2, size.height / 2), radius=size.zoom * sum(_RADIUS) / 2)


def render(clip: Clip) -> np.ndarray:
    """Draws a clip as uint8 RGB [F, H, W, 3], with the shape's rim anti-aliased."""
    size = clip.format
    step_x, step_y = DIRECTIONS[clip.subject.direction] if clip.subject.direction else (0, 0)
    per_frame = size.zoom * _SPEED / size.fps
    travelled_F11 = (per_frame * (np.arange(size.frames) - (size.frames - 1) / 2))[:, None, None]
    # Pixels' centres, relative to the shape's.
    x_F1W = np.arange(size.width) + 0.5 - (clip.middle[0] + step_x * travelled_F11)
    y_FH1 = (np.arange(size.height) + 0.5)[:, None] - (clip.middle[1] + step_y * travelled_F11)
    # A pixel through which the rim passes is covered in part, by the distance of its centre from the rim.
    cover_FHW1 = np.clip(0.5 - SHAPES[clip.subject.shape](x_F1W, y_FH1, clip.radius), 0, 1)[..., None]
    colour, background = np.array(COLOURS[clip.subject.colour]), np.array(BACKGROUND)
    return (background + cover_FHW1 * (colour - background)).round().astype(np.uint8)
