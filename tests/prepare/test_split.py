"""Scenes end before transitions, and are cut into clips of allowed lengths."""

import json

import numpy as np
import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.css_coefficients import COEFFICIENTS
from mugv_ds.prepare.demo.joins import join
from mugv_ds.prepare.probe import SIDE, EveryFrame
from mugv_ds.prepare.split import Window, split, transitions
from tools.fit_css import drawn_shot, evaluate, measure

FPS = 24


def row_of(frames: int, fps: float = FPS, times=None, **changed) -> dict:
    """The row of a video in which nothing happens, but for what is changed."""
    times = np.arange(frames) / fps if times is None else np.asarray(times)
    interval = np.diff(times).mean() if frames > 1 else 0.0
    values = {
        "pts": np.rint(times * 12000).astype(int).tolist(),
        "time_base": 1 / 12000,
        "frames": frames,
        "duration": float(times[-1] - times[0] + interval),
        "content": [1.0] * frames,
        "css": [[-4.0] * 3] * frames,
        "luma_range": [120.0] * frames,
        "transnet": None,
    }
    return values | changed


def config(**sections) -> PrepareConfig:
    return PrepareConfig.model_validate_json(json.dumps(sections))


def with_values(frames: int, other: float, changed: dict[int, float]) -> list[float]:
    return [changed.get(number, other) for number in range(frames)]


@pytest.fixture(scope="module")
def film():
    """Frames and transitions of drawn shots that the coefficients were not fitted on."""
    return join([drawn_shot(6000 + number, 90) for number in range(5)], seed=5, count=12)


def test_windows_are_of_allowed_lengths():
    windows = split(row_of(24 * 13), PrepareConfig())
    assert windows == [Window(0, 119), Window(120, 239), Window(240, 311)]
    assert split(row_of(24 * 11), PrepareConfig())[-1] == Window(240, 263, "too_short_scene")
    assert split(row_of(24 * 4), config(split={"max_seconds": 2.0, "min_seconds": 1.0})) == [
        Window(0, 47),
        Window(48, 95),
    ]


def test_lengths_are_times_not_numbers_of_frames():
    """23.976 frames a second, and frames that come slower in the second half."""
    film = split(row_of(240, 24000 / 1001), PrepareConfig())
    assert film == [Window(0, 119), Window(120, 239)]
    slower = split(row_of(180, times=[*np.arange(120) / 24, *(5 + np.arange(60) / 12)]), PrepareConfig())
    assert slower == [Window(0, 119), Window(120, 179)]


def test_one_frame_is_no_clip():
    assert split(row_of(1, times=[0.0]), PrepareConfig()) == [Window(0, 0, "too_short_scene")]


def test_frames_that_lie_far_apart_are_windows_of_one():
    """Half of the mean interval is longer than the longest clip: so of a time lapse, and after a gap of years."""
    for times in (np.arange(6) * 60.0, [0.0, 0.5, 1.0, 1e6]):
        windows = split(row_of(len(times), times=times), config())
        assert [(window.first, window.last) for window in windows] == [(i, i) for i in range(len(times))]


def test_a_margin_is_left_on_both_sides_of_a_cut():
    row = row_of(200, content=with_values(200, 1.0, {100: 40.0}))
    assert np.flatnonzero(transitions(row, PrepareConfig())).tolist() == list(range(96, 104))
    least = config(split={"margin": 1})
    assert split(row, least) == [Window(0, 98), Window(101, 199)]


def test_flat_frames_are_fades():
    row = row_of(100, luma_range=with_values(100, 90.0, dict.fromkeys(range(40, 50), 3.0)))
    assert np.flatnonzero(transitions(row, PrepareConfig())).tolist() == list(range(36, 54))


def test_transnet_counts_where_it_has_a_threshold():
    row = row_of(100, transnet=with_values(100, 0.01, {50: 0.6, 51: 0.7}))
    assert not transitions(row, PrepareConfig()).any()
    used = transitions(row, config(split={"transnet": 0.5}))
    assert np.flatnonzero(used).tolist() == list(range(46, 56))


@pytest.mark.parametrize("length", [0, 12, 24, 36])
def test_a_lagged_score_leads_to_the_transition(length):
    """A score that rises while the later frame enters a dissolve, and falls when the earlier one has left it."""
    lag, first = 24, 60
    mix = np.clip((np.arange(160) - first + 1) / (length + 1), 0, 1)
    earlier = np.concatenate([np.zeros(lag), mix[:-lag]])
    score = 8 * (mix - earlier) - 4
    row = row_of(160, css=[[-9.0, -9.0, value] for value in score])
    masked = np.flatnonzero(transitions(row, PrepareConfig()))
    assert masked.tolist() == list(range(masked[0], masked[-1] + 1))
    assert first - 6 <= masked[0] <= first - 3 and first + length + 2 <= masked[-1] <= first + length + 5


@pytest.mark.long
def test_cuts_are_those_of_pyscenedetect(film):
    scenedetect = pytest.importorskip("scenedetect")
    frames, _ = film
    every = EveryFrame(SIDE, SIDE, ())
    content, adaptive = (
        scenedetect.ContentDetector(min_scene_len=0),
        scenedetect.AdaptiveDetector(min_scene_len=0),
    )
    content.stats_manager = scenedetect.StatsManager()
    found = {"content": [], "adaptive": []}
    values = []
    for number, frame in enumerate(frames):
        every.add(number / FPS, frame)
        time = scenedetect.FrameTimecode(number, float(FPS))
        found["content"] += [cut.frame_num for cut in content.process_frame(time, frame)]
        found["adaptive"] += [cut.frame_num for cut in adaptive.process_frame(time, frame)]
        values.append((content.stats_manager.get_metrics(time, ["content_val"]) or [0])[0] or 0.0)
    row = row_of(len(frames), content=every.columns()["content"])
    assert np.allclose(row["content"], values, atol=1e-4)
    for name, cuts in found.items():
        options = {"content": None, "adaptive": None, "css": False, "margin": 1}
        only = config(split=options | {name: {"content": 27.0, "adaptive": 3.0}[name]})
        expected = sorted({number + side for number in cuts for side in (-1, 0)})
        assert cuts and np.flatnonzero(transitions(row, only)).tolist() == expected, name


def test_transitions_of_unseen_shots_are_found(film):
    """Few clips are contaminated, and no wipe or dissolve is missed."""
    result = evaluate([measure(*film)], COEFFICIENTS)
    assert result.clips >= 4 and result.contaminated <= 0.25 * result.clips
    assert result.kept > 0.3
    assert [one for one in result.missed if one.kind in ("dissolve", "wipe")] == []
