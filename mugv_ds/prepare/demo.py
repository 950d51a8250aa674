"""A small captioned data set with nothing to download: coloured shapes that move, on a dark background.

Clips are drawn, written as mp4, read back, and encoded by a linear codec fitted on them; captions are encoded by
`HashTextEncoder`. Shape, colour, place and direction are kept few and clear enough that a 288-wide model learns them
in minutes on a CPU.
"""

import csv
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mugv_ds.data.noise import generator
from mugv_ds.data.video import read_mp4, write_mp4
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import NEGATIVE_PROMPT, PROMPT_SUFFIX, HashTextEncoder, save_features

SIDE = 48  # pixels
FRAMES = 16
FPS = 8.0
TEXT_CHANNELS = 64
MAX_TEXT_TOKENS = 40

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

_SPEED = 0.75  # pixels a frame
_RADIUS = (12.0, 13.0)  # range; pixels from the centre to a shape's rim, roughly
_JITTER = 1.0  # most that a path's middle is off the picture's centre on each axis, pixels
_FIT_CLIPS = 200  # more do not change the codec visibly
_MARKER = "demo.json"
_FOLDERS = ("videos", "latents", "text_features")
_COLUMNS = (
    *("sample_id", "source", "latent_path", "text_feat_path"),
    *("fps", "height", "width", "num_frames", "caption", "kind"),
)


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
    """What a clip shows: keys of SHAPES, COLOURS and DIRECTIONS."""

    shape: str
    colour: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"

    @property
    def features_path(self) -> str:
        return f"text_features/{self.colour}_{self.shape}_{self.direction}_text.pt"


SUBJECTS = [Subject(*keys) for keys in itertools.product(SHAPES, COLOURS, DIRECTIONS)]


@dataclass(frozen=True)
class Clip:
    """One clip to draw.

    Attributes:
        name: sample id and stem of its files.
        subject: what it shows.
        middle: (x, y) of the shape's centre half-way through the clip, pixels.
        radius: pixels.
    """

    name: str
    subject: Subject
    middle: tuple[float, float]
    radius: float

    @property
    def latent_path(self) -> str:
        return f"latents/{self.name}.pt"


def make_demo_data(out_dir: str | Path, *, clips: int = 720, held_out: int = 64, seed: int = 0) -> None:
    """Writes the data set: train.csv, val.csv, videos/, latents/, text_features/ and codec.safetensors.

    Returns at once if `out_dir` holds the finished data set of the same arguments; one that is unfinished or of other
    arguments is made anew.

    Args:
        out_dir: folder to write, made if missing.
        clips: training clips, about as many of each combination of shape, colour and direction.
        held_out: clips of val.csv: combinations as in training, at places and in sizes that are not.
        seed: of everything drawn.

    Raises:
        ValueError: a number of clips is below 1, they are too few to fit the codec, or `out_dir` holds other files.
    """
    if clips < 1 or held_out < 1:
        raise ValueError(f"clips = {clips} and held_out = {held_out}: must both be at least 1")
    out_dir = Path(out_dir)
    arguments = {"clips": clips, "held_out": held_out, "seed": seed}
    if _read_marker(out_dir) == {"arguments": arguments, "finished": True}:
        return
    _clear(out_dir, arguments)
    train = draw_clips("clip", clips, seed)
    val = draw_clips("held_out", held_out, seed)
    _write_features(out_dir)
    pixels = torch.stack([_film(clip, out_dir) for clip in (*train, *val)])
    codec = LinearCodec.fit(pixels[: min(clips, _FIT_CLIPS)])
    codec.save(out_dir / "codec.safetensors")
    for clip, video in zip((*train, *val), pixels, strict=True):
        torch.save(codec.encode(video[None])[0], out_dir / clip.latent_path)
    _write_manifest(out_dir / "train.csv", train)
    _write_manifest(out_dir / "val.csv", val)
    _write_marker(out_dir, arguments, finished=True)


def demo_prompts() -> list[str]:
    """Eight prompts that the data set teaches: every shape, colour and direction is among them."""
    return [
        "a red circle moving left",
        "a green square moving right",
        "a blue triangle moving up",
        "a yellow circle moving down",
        "a magenta square moving left",
        "a white triangle moving right",
        "a green circle moving up",
        "a blue square moving down",
    ]


def draw_clips(split: str, count: int, seed: int) -> list[Clip]:
    """`count` clips of a split; each depends on (split, seed, its number) only.

    All subjects come once before any comes again, in an order that is new each time.
    """
    clips = []
    for number in range(count):
        turn, place = divmod(number, len(SUBJECTS))
        order = generator("demo order", split, seed, turn).permutation(len(SUBJECTS))
        rng = generator("demo clip", split, seed, number)
        x, y = SIDE / 2 + rng.uniform(-_JITTER, _JITTER, size=2)
        clips.append(Clip(f"{split}_{number:05d}", SUBJECTS[order[place]], (x, y), rng.uniform(*_RADIUS)))
    return clips


def render(clip: Clip) -> np.ndarray:
    """Draws a clip: uint8 RGB [FRAMES, SIDE, SIDE, 3], the shape's rim anti-aliased."""
    step_x, step_y = DIRECTIONS[clip.subject.direction]
    travelled = (_SPEED * (np.arange(FRAMES) - (FRAMES - 1) / 2))[:, None, None]
    pixel = np.arange(SIDE) + 0.5  # centres
    x = pixel[None, None, :] - (clip.middle[0] + step_x * travelled)
    y = pixel[None, :, None] - (clip.middle[1] + step_y * travelled)
    # A pixel is covered in proportion as the rim crosses it.
    cover = np.clip(0.5 - SHAPES[clip.subject.shape](x, y, clip.radius), 0, 1)[..., None]
    colour, background = np.array(COLOURS[clip.subject.colour]), np.array(BACKGROUND)
    return (background + cover * (colour - background)).round().astype(np.uint8)


def _film(clip: Clip, out_dir: Path) -> Tensor:
    """Writes a clip's video and reads it back: [3, F, H, W] in [−1, 1]."""
    path = out_dir / "videos" / f"{clip.name}.mp4"
    write_mp4(path, render(clip), FPS)
    frames, _ = read_mp4(path)
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def _write_features(out_dir: Path) -> None:
    """Text features of every caption, and of the negative prompt."""
    encode = HashTextEncoder(TEXT_CHANNELS, MAX_TEXT_TOKENS)
    texts = {"text_features/negative.pt": NEGATIVE_PROMPT}
    texts |= {subject.features_path: subject.caption + PROMPT_SUFFIX for subject in SUBJECTS}
    for path, y, mask in zip(texts, *encode(list(texts.values())), strict=True):
        save_features(out_dir / path, y, mask)


def _write_manifest(path: Path, clips: list[Clip]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for clip in clips:
            paths = (clip.name, "generated", clip.latent_path, clip.subject.features_path)
            writer.writerow((*paths, FPS, SIDE, SIDE, FRAMES, clip.subject.caption, "video"))


def _read_marker(out_dir: Path) -> dict | None:
    path = out_dir / _MARKER
    return json.loads(path.read_text()) if path.is_file() else None


def _write_marker(out_dir: Path, arguments: dict, *, finished: bool) -> None:
    """Says what the folder holds; renamed into place, so that it is never half a file."""
    temporary = out_dir / f"{_MARKER}.tmp"
    temporary.write_text(json.dumps({"arguments": arguments, "finished": finished}))
    temporary.replace(out_dir / _MARKER)


def _clear(out_dir: Path, arguments: dict) -> None:
    """Empty folders in `out_dir`, and a marker that says it is unfinished. Only a demo data set is ever overwritten."""
    if out_dir.exists() and _read_marker(out_dir) is None and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir}: holds files but no {_MARKER}, so it is no demo data set; name another folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    _write_marker(out_dir, arguments, finished=False)
    for name in _FOLDERS:
        folder = out_dir / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
