"""Measures of clips that are made by hand, so that what they must give is known."""

import numpy as np
import pytest

from mugv_ds.data.video import read_mp4, write_mp4
from mugv_ds.evaluation.measures import (
    MEASURES,
    brightness_drift,
    exact_repeats,
    fidelity,
    mean_sharpness,
    measure,
    motion,
    saturation_drift,
    temporal_flickering,
)
from mugv_ds.prepare.demo.judge import demo_measures, judge
from mugv_ds.prepare.demo.scenes import LARGE, SHORT, STILLS, SUBJECTS, draw_clips, render, twins


def texture(height: int = 64, width: int = 80, seed: int = 0) -> np.ndarray:
    """Smooth noise that wraps around, uint8 RGB."""
    spectrum = np.fft.fft2(np.random.default_rng(seed).normal(size=(height, width, 3)), axes=(0, 1))
    y, x = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    smooth = np.fft.ifft2(spectrum * np.exp(-((np.hypot(x, y) / 0.06) ** 2))[..., None], axes=(0, 1)).real
    return (128 + 50 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


def grey(*levels: int) -> np.ndarray:
    """A flat frame for each level, [F, 16, 16, 3]."""
    return np.array(levels, np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)


def test_a_still_clip_repeats_and_neither_flickers_nor_moves_nor_drifts():
    found = measure(texture()[None].repeat(9, axis=0), texture())
    assert found["temporal_flickering"] == 1 and found["exact_repeats"] == 1
    assert found["motion"] == pytest.approx(0, abs=1e-3)
    assert found["brightness_drift"] == pytest.approx(0, abs=1e-12)
    assert found["saturation_drift"] == pytest.approx(0, abs=1e-12)
    assert found["first_frame_psnr"] == 100 and found["first_frame_ssim"] == pytest.approx(1)
    assert list(found) == list(MEASURES)


@pytest.mark.parametrize("amplitude", [2, 51])
def test_flicker_is_its_amplitude_and_no_drift(amplitude):
    frames = grey(*[100, 100 + amplitude] * 3, 100)
    assert temporal_flickering(frames) == pytest.approx(1 - amplitude / 255)
    assert brightness_drift(frames) == pytest.approx(0, abs=1e-12)
    assert exact_repeats(frames) == 0


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 2), (3, 4)])
def test_motion_is_the_known_shift(right, down):
    frames = np.stack([np.roll(texture(96, 96), (down * f, right * f), axis=(0, 1)) for f in range(4)])
    assert motion(frames) == pytest.approx(np.hypot(right, down), rel=0.1)


def test_the_share_of_repeats():
    first, second, third = texture(seed=1), texture(seed=2), texture(seed=3)
    assert exact_repeats(np.stack([first, first, second, second, third])) == 0.5
    almost = first.copy()
    almost[0, 0, 0] ^= 1
    assert exact_repeats(np.stack([first, almost])) == 0


def test_drift_is_the_rise_of_a_ramp():
    assert brightness_drift(grey(50, 60, 70, 80, 90)) == pytest.approx(40 / 255)
    assert brightness_drift(grey(90, 80, 70)) == pytest.approx(-20 / 255)
    saturated = np.zeros((3, 16, 16, 3), np.uint8)
    saturated[..., 0] = 200
    saturated[..., 1:] = np.array([200, 150, 100], np.uint8)[:, None, None, None]  # saturation 0, 1/4, 1/2
    assert saturation_drift(saturated) == pytest.approx(0.5, abs=0.01)


def test_sharpness_is_the_variance_of_the_laplacian():
    assert mean_sharpness(grey(7, 7)) == 0
    board = (np.indices((16, 16)).sum(axis=0) % 2 * 100).astype(np.uint8)
    frames = board[None, ..., None].repeat(3, axis=-1)
    assert mean_sharpness(frames) == pytest.approx(400**2)  # every pixel is ±4 · 100 from its neighbours


def test_fidelity_of_a_known_error_and_of_the_first_frame_that_was_made():
    image = texture()
    off = image.astype(np.int16) + np.where(np.indices(image.shape).sum(axis=0) % 2, 10, -10)
    off = off.clip(0, 255).astype(np.uint8)
    psnr, ssim = fidelity(off, image)
    assert psnr == pytest.approx(10 * np.log10(255**2 / 100), abs=0.05) and ssim < 0.999
    with_own = np.stack([image, off, *[image] * 7])  # 8n + 1 frames, of which one is the image itself
    assert measure(with_own, image)["first_frame_psnr"] == psnr
    without = np.stack([*[image] * 8, off, *[image] * 7])  # 8n frames, of which eight show it
    assert measure(without, image)["first_frame_psnr"] == psnr
    assert "first_frame_psnr" not in measure(with_own) | measure(without[:8], image)
    with pytest.raises(ValueError, match="the image is"):
        measure(with_own, image[:8])


def test_what_cannot_be_measured_is_left_out():
    assert set(measure(grey(1))) == {"sharpness"}
    assert "motion" not in measure(grey(1, 2)[:, :8, :8])  # too small for optical flow
    with pytest.raises(ValueError, match="frames must be uint8"):
        measure(np.zeros((2, 8, 8, 3)))


def test_the_demos_videos_are_judged_right(tmp_path):
    """As the sampler writes them; a clip's twin that moves the other way shows that the direction is looked at."""
    clips = draw_clips("judged", 12, 5, formats=SHORT + LARGE, subjects=SUBJECTS[::3])
    clips += draw_clips("judged stills", 3, 5, subjects=STILLS, formats=SHORT)
    clips += [twin for clip in clips[:2] for twin in twins(clip)]
    for clip in clips:
        write_mp4(tmp_path / "clip.mp4", render(clip), clip.format.fps)
        frames, _ = read_mp4(tmp_path / "clip.mp4")
        seen, subject = judge(frames), clip.subject
        assert (seen.shape, seen.colour, seen.direction) == (subject.shape, subject.colour, subject.direction)


def test_answers_to_the_demos_prompts():
    clip = draw_clips("answered", 1, 0, subjects=[s for s in SUBJECTS if s.caption == "a red circle moving left"])[0]
    right, left = (render(twin) for twin in twins(clip))
    assert demo_measures(left, "a red circle moving left") == {"shape": 1, "colour": 1, "direction": 1, "right": 0}
    assert demo_measures(right, "a red circle moving left")["direction"] == 0
    assert demo_measures(right, "a red circle moving sideways") == {"shape": 1, "colour": 1, "direction": 1, "right": 1}
    assert demo_measures(left, "a blue square moving up") == {"shape": 0, "colour": 0, "direction": 0}
    assert demo_measures(left, "a red circle") == {"shape": 1, "colour": 1}
    assert demo_measures(left, "A penguin walks on a beach.") == {}
    assert demo_measures(np.zeros_like(left), "a red circle moving left") == {
        "shape": 0, "colour": 0, "direction": 0, "right": 0
    }  # fmt: skip
