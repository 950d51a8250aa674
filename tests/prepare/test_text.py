"""Text that stays in its place is an overlay; text that moves, and none, are not."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare import text
from mugv_ds.prepare.text import overlay
from tests.helpers.clip_views import broken_clip, clip_view

CONFIG = PrepareConfig(text={"enabled": True, "side": 320})


def titled(places):
    """Frames of noise with a title at each place; None is a frame without."""
    frames = []
    for seed, place in enumerate(places):
        noise = np.random.default_rng(seed).integers(60, 90, (180, 320, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        if place is not None:
            ImageDraw.Draw(image).text(place, "BREAKING NEWS", font=ImageFont.load_default(28), fill="white")
        frames.append(np.asarray(image))
    return np.stack(frames)


def test_titles_are_found_and_read():
    if (why := text.why_skipped(CONFIG)) is not None:
        pytest.skip(why)
    score = text.load(CONFIG)
    fixed, subtitle, moving, none, broken = score(
        [
            clip_view(0, titled([(60, 40)] * 3)),
            clip_view(1, titled([(60, 140)] * 3)),
            clip_view(2, titled([(10, 10), (60, 70), (100, 130)])),
            clip_view(3, titled([None] * 3)),
            broken_clip(4),
        ]
    )
    assert fixed["overlay"] > 0.05 and fixed["overlay_bottom"] is None
    assert "BREAKING NEWS" in fixed["texts"]
    assert subtitle["overlay"] > 0.05 and 0.1 < subtitle["overlay_bottom"] <= 0.25
    assert moving["overlay"] == 0 and "BREAKING NEWS" in moving["texts"]
    assert none == {"clip": none["clip"], "error": None, "overlay": 0, "overlay_bottom": 0, "texts": []}
    assert broken["error"] and "overlay" not in broken
    assert score([clip_view(0, titled([(60, 40)] * 3))]) == [fixed]


def boxes(*rows):
    return np.array(rows, float).reshape(-1, 4)


def test_an_overlay_is_what_two_frames_share():
    title, moved = (0.1, 0.1, 0.5, 0.2), (0.1, 0.14, 0.5, 0.24)  # intersection 0.6, union 1.4 of its height
    assert overlay([boxes(title), boxes(title), boxes()], 0.5)["overlay"] == pytest.approx(0.04)
    assert overlay([boxes(title), boxes(moved), boxes()], 0.5)["overlay"] == 0
    assert overlay([boxes(title), boxes(moved), boxes()], 0.42)["overlay"] == pytest.approx(0.04)
    assert overlay([boxes(title)], 0.5)["overlay"] == pytest.approx(0.04)  # of one frame alone


def test_only_text_at_the_lower_edge_can_be_cropped():
    low, high = (0.2, 0.9, 0.8, 0.95), (0.2, 0.1, 0.8, 0.15)
    assert overlay([boxes(low)] * 2, 0.5)["overlay_bottom"] == pytest.approx(0.1)
    assert overlay([boxes(low, high)] * 2, 0.5)["overlay_bottom"] is None


def test_the_step_says_why_it_is_skipped(monkeypatch):
    assert text.why_skipped(PrepareConfig()) == "text.enabled is false"
    monkeypatch.setattr("mugv_ds.prepare.packages.importlib.util.find_spec", lambda name: None)
    assert text.why_skipped(CONFIG) == "rapidocr, onnxruntime not installed; the extra prepare-text has it"
