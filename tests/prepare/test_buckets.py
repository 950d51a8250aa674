"""A clip goes to the bucket of its size, length and shape, with the frames nearest in time, and nothing is made up."""

from fractions import Fraction

import numpy as np
import pytest

from mugv_ds.config.prepare_schema import BucketSection, EncodeSection
from mugv_ds.prepare.buckets import Misfit, fit, pick_times

PUBLISHED = EncodeSection()
TWO_SECONDS = BucketSection(height=352, width=640, frames=48)
STILL = BucketSection(height=352, width=640, frames=1)


def at(fps: float | Fraction, seconds: float) -> list[float]:
    return [float(i / fps) for i in range(int(seconds * fps))]


def names(outcome) -> list[str] | str:
    return outcome.name if isinstance(outcome, Misfit) else [one.bucket.name for one in outcome]


@pytest.mark.parametrize(
    ("fps", "repeated"),
    [(24, 0.0), (Fraction(24000, 1001), 0.0), (25, 0.0), (30, 0.0), (60, 0.0), (23, 1 / 24), (20, 1 / 6), (12, 0.5)],
)
def test_frames_are_the_nearest_in_time_and_repeats_are_counted(fps, repeated):
    seconds = at(fps, 5)
    times = pick_times(seconds, TWO_SECONDS)
    wanted = [j / 24 for j in range(48)]
    nearest = [min(range(len(seconds)), key=lambda i: (round(abs(seconds[i] - time), 6), i)) for time in wanted]
    assert list(times.picked) == nearest
    assert times.repeated == pytest.approx(repeated)
    assert times.error == pytest.approx(max(abs(seconds[i] - t) for i, t in zip(nearest, wanted, strict=True)))
    assert times.error <= 0.5 / float(fps) + 1e-6


def test_times_count_and_not_numbers_of_frames():
    """A film of 12 frames in its first second and 60 in its second, seen at 24 a second."""
    seconds = [i / 12 for i in range(12)] + [1 + i / 60 for i in range(60)]
    picked = np.array(pick_times(seconds, TWO_SECONDS).picked)
    assert (np.diff(picked)[:22] <= 1).all() and set(np.diff(picked)[25:]) == {2, 3}
    assert abs(np.array(seconds)[picked] - np.arange(48) / 24).max() <= 1 / 24 + 1e-6


@pytest.mark.parametrize(("frames", "fits"), [(49, True), (48, True), (47, False)])
def test_a_clip_must_last_as_long_as_the_sample(frames, fits):
    assert (pick_times([i / 24 for i in range(frames)], TWO_SECONDS) is not None) == fits


@pytest.mark.parametrize(
    ("size", "seconds", "expected"),
    [
        ((1080, 1920), at(24, 5), ["720x1280x120f24"]),
        ((1080, 1920), at(24, 3), ["720x1280x48f24"]),
        ((719, 1280), at(24, 5), ["352x640x120f24"]),
        ((480, 640), at(24, 5), ["416x544x120f24"]),
        ((1920, 1080), at(24, 5), ["1280x720x120f24"]),
        ((800, 1310), at(24, 5), ["720x1280x120f24"]),
        ((1000, 1000), at(30, 5), ["960x960x120f24"]),
        ((1000, 1000), at(20, 5), "fps_too_low"),
        ((1000, 3000), at(24, 5), "crops_too_much"),
        ((1000, 1000), at(24, 1.5), "too_short"),
        ((240, 320), at(24, 5), "too_small"),
    ],
)
def test_the_largest_bucket_of_the_nearest_shape(size, seconds, expected):
    assert names(fit(size, seconds, PUBLISHED)) == expected


def test_every_size_and_length_where_it_is_asked_for():
    section = EncodeSection(largest_only=False, buckets=(*PUBLISHED.buckets, STILL))
    assert names(fit((1080, 1920), at(24, 5), section)) == [
        "720x1280x120f24",
        "720x1280x48f24",
        "352x640x120f24",
        "352x640x48f24",
        "352x640x1f24",
    ]
    assert names(fit((1080, 1920), at(12, 5), section)) == ["352x640x1f24"]  # a still repeats nothing


@pytest.mark.parametrize(("width", "share"), [(1706, 0.75), (1710, None)])
def test_three_quarters_of_the_picture_must_stay(width, share):
    section = EncodeSection(buckets=(BucketSection(height=720, width=1280, frames=8),))
    found = fit((720, width), at(24, 1), section)
    if share is None:
        assert found == Misfit("crops_too_much", pytest.approx(1280 / 1710), low=0.75)
    else:
        assert found[0].area == pytest.approx(share, abs=1e-3)
