"""Judges from pixels which of the demo's shapes a video shows, of what colour, and where it moves.

Shape suffixes: F frames, H height, W width; the last dimension of 3 is RGB.
"""

from dataclasses import dataclass

import numpy as np

from mugv_ds.prepare.demo.motion import LEAST_MOTION, foreground, horizontal_motion
from mugv_ds.prepare.demo.scenes import COLOURS, DIRECTIONS, SHAPES, SIDEWAYS, STILLS, SUBJECTS, Subject

# Area of each shape of radius 1, from the distances in `scenes`: π, (2 · 0.85)², 3 √3 · 0.575².
_AREAS = {"circle": np.pi, "square": 2.89, "triangle": 3 * 3**0.5 * 0.575**2}
_LEAST_OVERLAP = 0.6  # intersection over union; clips by `scenes`, in mp4, had 0.94 and more, with other shapes to 0.85

_SUBJECTS = {subject.caption: subject for subject in (*SUBJECTS, *STILLS, *SIDEWAYS)}


@dataclass(frozen=True)
class Verdict:
    """What a video shows: keys of SHAPES, COLOURS and DIRECTIONS; None where nothing is seen, or nothing moves."""

    shape: str | None
    colour: str | None
    direction: str | None


def judge(frames: np.ndarray) -> Verdict:
    """Judges uint8 RGB frames [F, H, W, 3].

    The shape is that whose drawing, of the area and at the centroid of what stands out, overlaps it best on average
    over the frames; the colour that which is nearest to the median of what stands out; the direction that of the
    centroid's motion along the axis on which it is faster.
    """
    _, shown_FHW = foreground(frames)
    held = np.flatnonzero(shown_FHW.any(axis=(1, 2)))
    if not len(held):
        return Verdict(None, None, None)
    overlaps = {shape: np.mean([_overlap(shown_FHW[frame], shape) for frame in held]) for shape in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    median = np.median(frames[shown_FHW], axis=0)
    colour = min(COLOURS, key=lambda name: np.linalg.norm(median - COLOURS[name]))
    return Verdict(best if overlaps[best] >= _LEAST_OVERLAP else None, colour, _direction(frames))


def _overlap(shown_HW: np.ndarray, shape: str) -> float:
    """Returns the intersection over union of a mask with a shape of its area, drawn at its centroid."""
    rows, columns = np.nonzero(shown_HW)
    radius = np.sqrt(len(rows) / _AREAS[shape])
    x, y = np.arange(shown_HW.shape[1]) - columns.mean(), (np.arange(shown_HW.shape[0]) - rows.mean())[:, None]
    drawn_HW = SHAPES[shape](x, y, radius) < 0
    return (drawn_HW & shown_HW).sum() / (drawn_HW | shown_HW).sum()


def _direction(frames: np.ndarray) -> str | None:
    try:
        speeds = np.array([horizontal_motion(frames), horizontal_motion(frames.swapaxes(1, 2))])
    except ValueError:  # fewer than two frames show anything
        return None
    axis = int(abs(speeds).argmax())
    if abs(speeds[axis]) < LEAST_MOTION:
        return None
    step = tuple(int(np.sign(speeds[axis])) if place == axis else 0 for place in range(2))
    return next(name for name, towards in DIRECTIONS.items() if towards == step)


def demo_measures(frames: np.ndarray, prompt: str) -> dict[str, float]:
    """Measures how a video answers a caption of the demo: 1 where it does, else 0; nothing for other prompts.

    Args:
        frames: uint8 RGB [F, H, W, 3].
        prompt: see `scenes.Subject.caption`.

    Returns:
        shape and colour: whether they are those asked for. direction: whether it is the one asked for, or, for
        "sideways", left or right; left out for what stands still. right: whether it moves right, where it was asked to
        move to a side.
    """
    subject = _SUBJECTS.get(prompt.strip())
    if subject is None:
        return {}
    seen = judge(frames)
    return {
        "shape": float(seen.shape == subject.shape),
        "colour": float(seen.colour == subject.colour),
        **_motion_measures(subject, seen.direction),
    }


def _motion_measures(subject: Subject, seen: str | None) -> dict[str, float]:
    if subject.direction is None:
        return {}
    wanted = ("left", "right") if subject.sideways else (subject.direction,)
    found = {"direction": float(seen in wanted)}
    if subject.direction in ("left", "right"):
        found["right"] = float(seen == "right")
    return found
