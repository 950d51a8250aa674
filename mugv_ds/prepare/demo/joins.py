"""Joins shots by cuts, dissolves, fades and wipes at known frames, on which what finds them is fitted and tested.

Shape suffixes: F frames, H height, W width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

KINDS = ("cut", "dissolve", "fade", "wipe")
_SHARES = (0.25, 0.45, 0.18, 0.12)  # of the kinds in a film that is joined at random
_DISSOLVE, _FADE, _BLACK, _WIPE = (8, 50), (6, 24), (0, 10), (8, 30)  # frames, from … to; of a fade, out and in again
_PURE = 12  # frames of a shot that are in no transition, at least


class Transition(NamedTuple):
    """A transition. first, after: its first mixed frame, and the first one after it; a cut has none. kind: of KINDS."""

    first: int
    after: int
    kind: str


def dissolve(before_FHWC: np.ndarray, after_FHWC: np.ndarray) -> np.ndarray:
    """Returns frames that go over from one shot to the other, both of which go on meanwhile."""
    frames = len(before_FHWC)
    return np.stack(
        [
            cv2.addWeighted(before, 1 - (number + 1) / (frames + 1), after, (number + 1) / (frames + 1), 0)
            for number, (before, after) in enumerate(zip(before_FHWC, after_FHWC, strict=True))
        ]
    )


def fade(frames_FHWC: np.ndarray) -> np.ndarray:
    """Returns frames that go dark, the last of them nearly black; for fading in, turn both input and result around."""
    light = 1 - (np.arange(len(frames_FHWC)) + 1) / (len(frames_FHWC) + 1)
    return (frames_FHWC * light[:, None, None, None]).astype(np.uint8)


def wipe(before_FHWC: np.ndarray, after_FHWC: np.ndarray, direction: int) -> np.ndarray:
    """Returns frames over which an edge moves, behind which is the other shot. direction: 0 … 3, whence it comes."""
    turned_before, turned_after = (np.rot90(frames, direction, (1, 2)) for frames in (before_FHWC, after_FHWC))
    mixed = turned_before.copy()
    for number in range(len(mixed)):
        width = int(mixed.shape[2] * (number + 1) / (len(mixed) + 1))
        mixed[number, :, :width] = turned_after[number, :, :width]
    return np.ascontiguousarray(np.rot90(mixed, -direction, (1, 2)))


def join(shots: Sequence[np.ndarray], seed: int, count: int) -> tuple[list[np.ndarray], list[Transition]]:
    """Joins parts of shots at random; no shot follows itself, and some are mirrored.

    Args:
        shots: uint8 [F, H, W, 3] each, of one size, of at least 75 frames. seed: decides all. count: of parts.

    Returns:
        frames, uint8 [H, W, 3] each, and the count − 1 transitions between them.
    """
    rng = np.random.default_rng(seed)
    frames: list[np.ndarray] = []
    transitions: list[Transition] = []
    last = -1
    for _ in range(count):
        choice = int(rng.integers(0, len(shots) - (last >= 0)))
        last = choice + (0 <= last <= choice)
        part = _part(rng, shots[last])
        if not frames:
            frames = list(part)
            continue
        kind = str(rng.choice(KINDS, p=_SHARES))
        room = min(len(part), len(frames) - (transitions[-1].after if transitions else 0)) - _PURE
        _JOINS[kind](rng, frames, part, transitions, room)
    return frames, transitions


def _part(rng: np.random.Generator, shot: np.ndarray) -> np.ndarray:
    length = int(rng.integers(70, min(len(shot), 150) + 1))
    start = int(rng.integers(0, len(shot) - length + 1))
    part = shot[start : start + length]
    return np.ascontiguousarray(part[:, :, ::-1] if rng.random() < 0.5 else part)


def _length(rng: np.random.Generator, bounds: tuple[int, int], room: int) -> int:
    return min(int(rng.integers(bounds[0], bounds[1] + 1)), room)


def _cut(_rng, frames, part, transitions, _room) -> None:
    transitions.append(Transition(len(frames), len(frames), "cut"))
    frames += list(part)


def _dissolve(rng, frames, part, transitions, room) -> None:
    length = _length(rng, _DISSOLVE, room)
    first = len(frames) - length
    frames[first:] = dissolve(np.stack(frames[first:]), part[:length])
    transitions.append(Transition(first, len(frames), "dissolve"))
    frames += list(part[length:])


def _fade(rng, frames, part, transitions, room) -> None:
    length = _length(rng, _FADE, room)
    first = len(frames) - length
    frames[first:] = fade(np.stack(frames[first:]))
    frames += [np.zeros_like(part[0])] * int(rng.integers(_BLACK[0], _BLACK[1]))
    frames += list(fade(part[:length][::-1])[::-1])
    transitions.append(Transition(first, len(frames), "fade"))
    frames += list(part[length:])


def _wipe(rng, frames, part, transitions, room) -> None:
    length = _length(rng, _WIPE, room)
    first = len(frames) - length
    frames[first:] = wipe(np.stack(frames[first:]), part[:length], int(rng.integers(0, 4)))
    transitions.append(Transition(first, len(frames), "wipe"))
    frames += list(part[length:])


_JOINS = {"cut": _cut, "dissolve": _dissolve, "fade": _fade, "wipe": _wipe}
