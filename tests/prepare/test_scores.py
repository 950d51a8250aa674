"""A clip's scores are those of the frames in it, and of no others."""

import math

import numpy as np
import pyarrow as pa
import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.rows import CLIP
from mugv_ds.prepare.scores import clip_id, score
from mugv_ds.prepare.split import Window

FRAMES, EVERY = 96, 6
SAMPLES = FRAMES // EVERY


def row_of(**changed) -> dict:
    """The row of a video of 4 s whose sample i has sharpness 100 + i and flow i."""
    draw = np.random.default_rng(0)
    return {
        "video": "ab" * 32,
        "height": 180,
        "width": 320,
        "sample_aspect": 1.0,
        "rotation": 0,
        "time_base": 1 / 24,
        "duration": 4.0,
        "frames": FRAMES,
        "pts": list(range(1000, 1000 + FRAMES)),
        "luma": np.linspace(0, 1, FRAMES).tolist(),
        "dark": [0.1] * FRAMES,
        "bright": [0.2] * FRAMES,
        "difference": [math.nan, *draw.uniform(0.1, 5, FRAMES - 1)],
        "shift_x": [0.0] * FRAMES,
        "shift_y": [0.0] * FRAMES,
        "sample": list(range(0, FRAMES, EVERY)),
        "sharp": [100.0 + number for number in range(SAMPLES)],
        "flow": [*map(float, range(SAMPLES - 1)), math.nan],
        "border": [[0.0] * 4] * SAMPLES,
        "border_level": [[16.0] * 4] * SAMPLES,
        "border_edge": [[0.0] * 4] * SAMPLES,
        "phash": list(range(1, SAMPLES + 1)),
        "phash_mirror": list(range(101, SAMPLES + 101)),
    } | changed


def scored(row=None, first=0, last=FRAMES - 1, **borders) -> dict:
    config = PrepareConfig.model_validate({"borders": borders})
    (clip,) = score(row or row_of(), [Window(first, last)], config)
    pa.Table.from_pylist([clip], schema=CLIP)
    return clip


def test_times_are_those_of_the_frames():
    clip = scored(first=12, last=83)
    assert (clip["first_pts"], clip["last_pts"], clip["frames"]) == (1012, 1083, 72)
    assert (clip["start"], clip["duration"], clip["fps"]) == pytest.approx((0.5, 3.0, 24.0))
    assert (clip["height"], clip["width"], clip["area"]) == (180, 320, 1.0)


def test_samples_are_those_within():
    clip = scored(first=13, last=71)  # samples 3 (frame 18) to 11 (frame 66)
    assert (clip["sharp_min"], clip["sharp_max"]) == (103.0, 111.0)
    assert clip["sharp_med"] == pytest.approx(107, abs=0.6)
    assert clip["phash"][0] == 4 and clip["phash"][-1] == 12 and len(clip["phash"]) == 8
    assert clip["phash_mirror"] == [value + 100 for value in clip["phash"]]
    # The flow of sample 11 leads out of the clip.
    assert (clip["motion_min"], clip["motion_max"]) == (3.0, 10.0)
    assert clip["motion"] == pytest.approx((3 + 6 + 10) / 3, abs=0.4)
    assert clip["luma"] == pytest.approx(42 / 95, abs=1e-6)


def test_the_first_frame_is_no_repetition_of_the_shot_before():
    changes = [math.nan] + [1.0] * (FRAMES - 1)
    changes[24] = 0.0  # the clip's first frame
    changes[30:36] = [0.01] * 6
    assert scored(row_of(difference=changes), first=24, last=53)["repeated"] == pytest.approx(6 / 29)


def test_jitter_is_what_a_steady_pan_is_not():
    steps = np.random.default_rng(1).normal(0, 0.01, (2, FRAMES))
    assert scored(row_of(shift_x=[0.02] * FRAMES, shift_y=[-0.01] * FRAMES))["shake"] == pytest.approx(0, abs=1e-9)
    shaken = scored(row_of(shift_x=(0.02 + steps[0]).tolist(), shift_y=steps[1].tolist()))["shake"]
    assert shaken == pytest.approx(0.01 * math.sqrt(2 * 8 / 9), rel=0.15)


def test_borders_with_an_edge_are_cropped():
    """Ten lines at the top and 41 columns at the left; at the bottom there is no edge."""
    border = [[10 / 180, 0.2, 41 / 320, 0.0]] * SAMPLES
    border[3] = [0.5, 0.5, 0.5, 0.5]  # a dark frame
    edge = [[0.95, 0.2, 0.9, 0.0]] * SAMPLES
    edge[3] = [0.0] * 4
    clip = scored(row_of(border=border, border_edge=edge))
    assert [clip[f"crop_{side}"] for side in ("top", "bottom", "left", "right")] == [10, 0, 42, 0]
    assert (clip["height"], clip["width"]) == (170, 278)
    assert clip["area"] == pytest.approx(170 * 278 / (180 * 320))
    assert clip["border_edge_top"] == pytest.approx(0.95)
    assert scored(row_of(border=border, border_edge=edge), least=0.1)["crop_top"] == 0
    assert scored(row_of(border=border, border_edge=edge), edge=0.92)["crop_left"] == 0


def test_shown_sizes_are_turned_and_of_square_pixels():
    clip = scored(row_of(sample_aspect=4 / 3, rotation=90))
    assert (clip["height"], clip["width"]) == (320, 135)


def test_rests_have_no_scores():
    (rest,) = score(row_of(), [Window(90, 95, "too_short_scene")], PrepareConfig())
    assert rest["reason"] == "too_short_scene" and rest["sharp_min"] is None and rest["frames"] == 6


def test_an_id_stands_for_video_times_and_crop():
    ids = {
        clip_id(*parts)
        for parts in [
            ("ab" * 32, 0, 100, (0, 0, 0, 0)),
            ("cd" * 32, 0, 100, (0, 0, 0, 0)),
            ("ab" * 32, 1, 100, (0, 0, 0, 0)),
            ("ab" * 32, 0, 10, (0, 0, 0, 0)),
            ("ab" * 32, 0, 100, (2, 0, 0, 0)),
            ("ab" * 32, 0, 100, (0, 0, 2, 0)),
        ]
    }
    assert len(ids) == 6 and all(len(one) == 32 and int(one, 16) >= 0 for one in ids)
    assert clip_id("ab" * 32, 0, 100, [0, 0, 0, 0]) in ids
