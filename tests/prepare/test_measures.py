"""What is measured of frames is what it is called, in the units that it is said to have."""

import cv2
import numpy as np
import pytest

from mugv_ds.data.pictures import dis_flow, sharpness
from mugv_ds.prepare.demo.drawn import DrawnScene
from mugv_ds.prepare.measures import Shift, borders, fitted, hashes, light, small

HEIGHT, WIDTH = 360, 640


@pytest.fixture(scope="module")
def wall():
    """A large texture, grey [600, 900]."""
    return cv2.cvtColor(DrawnScene(1, 600, 900).frame(0), cv2.COLOR_RGB2GRAY)


def distance(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def test_sizes_are_never_enlarged():
    assert fitted(1080, 1920, 720) == (720, 1280)
    assert fitted(1920, 1080, 720) == (1280, 720)
    assert fitted(144, 176, 720) == (144, 176)


def test_sharpness_is_the_variance_of_the_laplacian_and_falls_with_blur(wall):
    assert sharpness(wall) == pytest.approx(cv2.Laplacian(wall, cv2.CV_64F).var())
    assert sharpness(cv2.GaussianBlur(wall, None, 2)) < sharpness(wall) / 5


def test_light_counts_pixels():
    grey = np.repeat(np.uint8([0, 15, 16, 128, 239, 240, 255, 255]), 100).reshape(20, 40)
    seen = light(grey)
    assert seen.mean == pytest.approx(grey.mean() / 255)
    assert (seen.dark, seen.bright) == (pytest.approx(2 / 8), pytest.approx(3 / 8))
    assert seen.range == 255
    assert light(np.full((9, 9), 20, np.uint8)).range == 0


@pytest.mark.parametrize("shift", [1, 4, 12, 20])
def test_flow_is_in_pixels(wall, shift):
    before, after = (
        cv2.cvtColor(wall[100 : 100 + HEIGHT, start : start + WIDTH], cv2.COLOR_GRAY2RGB)
        for start in (100, 100 + shift)
    )
    assert dis_flow()(before, after) == pytest.approx(shift, rel=0.1)
    assert np.isnan(dis_flow()(before[:8, :8], after[:8, :8]))


@pytest.mark.parametrize(("right", "down"), [(16, 0), (0, 12), (-24, 8)])
def test_shift_is_a_share_of_the_short_side(wall, right, down):
    """Frames of different shape in both directions."""
    before = small(wall[100 : 100 + HEIGHT, 100 : 100 + WIDTH])
    after = small(wall[100 - down : 100 - down + HEIGHT, 100 - right : 100 - right + WIDTH])
    found = Shift(HEIGHT, WIDTH).between(before, after)
    assert found == pytest.approx((right / HEIGHT, down / HEIGHT), abs=0.002)


def test_borders_are_found_to_the_line(wall):
    framed = wall[:HEIGHT, :WIDTH].copy()
    framed[:40] = framed[-30:] = 16
    framed[:, -50:] = 16
    noisy = np.clip(framed + np.random.default_rng(0).normal(0, 1, framed.shape), 0, 255).astype(np.uint8)
    found = borders(noisy)
    assert found.share == pytest.approx((40 / HEIGHT, 30 / HEIGHT, 0, 50 / WIDTH), abs=0.002)
    assert min(found.edge[side] for side in (0, 1, 3)) > 0.9
    assert found.level[0] == pytest.approx(16, abs=1)


def test_a_dark_margin_has_no_edge(wall):
    """A picture that grows out of the dark seems to have borders, whose edge is not one."""
    glow = (wall[:HEIGHT, :WIDTH] * np.linspace(0, 1, HEIGHT)[:, None] ** 3).astype(np.uint8)
    found = borders(glow)
    assert found.share[0] > 0.05 and found.edge[0] < 0.3


def test_in_a_flat_frame_all_is_border():
    assert borders(np.full((90, 160), 30, np.uint8)).share == (0.5,) * 4


def test_hashes_know_a_picture_again(wall):
    picture = wall[:HEIGHT, :WIDTH]
    phash, mirrored = hashes(picture)
    half = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    brighter = cv2.add(picture // 2, 60)
    assert distance(phash, hashes(half)[0]) <= 4 and distance(phash, hashes(brighter)[0]) <= 4
    assert hashes(np.ascontiguousarray(picture[:, ::-1])) == (mirrored, phash)
    assert distance(phash, mirrored) > 20
    others = [cv2.cvtColor(DrawnScene(seed, 90, 160).frame(0), cv2.COLOR_RGB2GRAY) for seed in range(2, 8)]
    assert min(distance(phash, hashes(other)[0]) for other in others) > 16
    assert hashes(np.full((90, 160), 90, np.uint8)) == (0, 0)
