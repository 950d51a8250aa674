"""Cuts a video into clips, by the numbers that `probe` measured of its frames."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.css import partner

_WINDOW = 2  # frames on either side, whose mean content PySceneDetect's adaptive detector compares with
_LEAST_CONTENT = 15.0  # of a cut that the adaptive detector finds; its default
_FALL = 1.2  # a second: where a colour–structure score falls more slowly, its transition has ended


class Window(NamedTuple):
    """A part of a video within one scene.

    Attributes:
        first, last: numbers of its frames. reason: too_short_scene for a rest that is no clip, else None.
    """

    first: int
    last: int
    reason: str | None = None


def split(row: Mapping[str, Any], config: PrepareConfig) -> list[Window]:
    """Returns the clips of a video, in order, and the rests of scenes that are too short to be clips.

    A scene is what lies between transitions, less `split.margin` frames. It is cut from its start into the longest
    clips that there may be.

    Args:
        row: of `rows.VIDEO`, without an error. config: its sections probe, split and encode.buckets count.
    """
    times = np.asarray(row["pts"], np.float64) * row["time_base"]
    inside = ~transitions(row, config)
    windows = []
    for first, last in _runs(inside):
        windows += _windows(times, first, last, row["duration"] / row["frames"], config)
    return windows


def transitions(row: Mapping[str, Any], config: PrepareConfig) -> np.ndarray:
    """Returns which frames belong to a transition or to its margin, bool [frames].

    Args:
        row, config: see `split`.
    """
    options, content = config.split, np.asarray(row["content"], np.float64)
    masked = np.zeros(len(content), bool)

    def mask(first: int, last: int) -> None:
        """Masks frames; a cut has last = first − 1."""
        masked[max(first - options.margin, 0) : max(last + options.margin + 1, 0)] = True

    cuts = [content >= options.content] if options.content is not None else []
    cuts += [_adaptive(content) >= options.adaptive] if options.adaptive is not None else []
    for number in np.flatnonzero(np.logical_or.reduce(cuts)) if cuts else ():
        mask(number, number - 1)
    if options.css:
        for first, last in _gradual(row, config):
            mask(first, last)
    if options.transnet is not None and row["transnet"] is not None:
        for first, last in _runs(np.asarray(row["transnet"]) > options.transnet):
            mask(first, last)
    for first, last in _runs(np.asarray(row["luma_range"]) <= options.flat):
        mask(first, last)
    return masked


def _adaptive(content: np.ndarray) -> np.ndarray:
    """Returns PySceneDetect's adaptive ratio [frames]: of the content value to the mean of its neighbours'.

    0 where it finds no cut: at the ends, and below its least content value.
    """
    ratio = np.zeros(len(content))
    if len(content) <= 2 * _WINDOW:
        return ratio
    around = np.lib.stride_tricks.sliding_window_view(content, 2 * _WINDOW + 1)
    middle = around[:, _WINDOW]
    mean = (around.sum(axis=1) - middle) / (2 * _WINDOW)
    # Where nothing moves, any change is infinitely larger; PySceneDetect says 255.
    ratio[_WINDOW:-_WINDOW] = np.where(mean < 1e-5, 255.0, np.minimum(middle / np.maximum(mean, 1e-5), 255.0))
    return np.where(content >= _LEAST_CONTENT, ratio, 0.0)


def _gradual(row: Mapping[str, Any], config: PrepareConfig) -> Iterator[tuple[int, int]]:
    """Yields the first and last frame of each transition that the colour–structure scores find.

    While a frame of the new scene is compared with one of the old, the score is positive: from when the earlier of the
    two lies before a transition and the later one in it, until both lie behind it. So a score that rises at frame a and
    has fallen after frame b means a transition between a and the frame that b is compared with. It rises and falls
    slowly where the transition is slow, so its beginning and end are where it stops falling, on both sides.
    """
    times = np.asarray(row["pts"], np.float64) * row["time_base"]
    scores = np.nan_to_num(np.asarray(row["css"], np.float64), nan=-np.inf)
    fall = _FALL * row["duration"] / row["frames"]
    for lag, score in zip((None, *config.probe.css_lags), scores.T, strict=True):
        for first, last in _runs(score > 0):
            while first > 0 and score[first - 1] < score[first] - fall:
                first -= 1
            while last + 1 < len(score) and score[last + 1] < score[last] - fall:
                last += 1
            other = partner(times, last, lag)
            other = 0 if other is None else other
            yield min(first, other + 1), max(first - 1, other)


def _windows(times: np.ndarray, first: int, last: int, interval: float, config: PrepareConfig) -> Iterator[Window]:
    """Yields the clips of a scene, and its rest. interval: that the last frame is shown for, in seconds."""
    shortest, longest = config.split.min_seconds, config.max_seconds
    end = times[last] + interval
    tolerance = interval / 2
    while first <= last:
        left = end - times[first]
        if left < shortest - tolerance:
            yield Window(first, last, "too_short_scene")
            return
        if left <= longest + tolerance:
            yield Window(first, last)
            return
        # At least one frame: where they lie minutes apart, half an interval is longer than the longest clip.
        after = max(int(np.searchsorted(times, times[first] + longest - tolerance)), first + 1)
        yield Window(first, after - 1)
        first = after


def _runs(inside: np.ndarray) -> list[tuple[int, int]]:
    """Returns first and last of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    return [(int(first), int(after) - 1) for first, after in edges.reshape(-1, 2)]
