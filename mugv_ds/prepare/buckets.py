"""Which buckets a clip is encoded for, at which size, and which of its frames: pure functions of numbers.

A clip is shrunk to cover its bucket, never enlarged, and cropped around its centre. Frame j of a sample is the one
whose presentation time is nearest to t₀ + j/fps: frames are dropped or, seldom, repeated, and never made up.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mugv_ds.config.prepare_schema import BucketSection, EncodeSection

_TIER = 1.25  # areas of the shapes of one size differ by less, those of different sizes by more
_TIE = 1e-6  # seconds; of two frames equally near the earlier is taken, whatever the last bit of their times


@dataclass(frozen=True)
class Times:
    """The frames of a clip that a sample has.

    Attributes:
        picked: of each frame of the sample, its number in the clip, ascending.
        error: largest distance of a frame from the time that it stands for, in seconds.
        repeated: share of the sample's frames that are the frame before once more.
    """

    picked: tuple[int, ...]
    error: float
    repeated: float


@dataclass(frozen=True)
class Fit:
    """A clip in a bucket.

    Attributes:
        area: share of the picture that is left when it is shrunk to cover the bucket and cropped around its centre.
    """

    bucket: BucketSection
    area: float
    times: Times


@dataclass(frozen=True)
class Misfit:
    """Why a clip is in no bucket: the bound that it came closest to keeping.

    Attributes:
        name: too_small, too_short, crops_too_much or fps_too_low. value: that was found. low, high: its bounds.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def pick_times(seconds: Sequence[float], bucket: BucketSection) -> Times | None:
    """Picks the frames of a sample; None where the clip ends more than half a frame before the sample would.

    Args:
        seconds: presentation times of the clip's frames, ascending.
    """
    times = np.asarray(seconds, np.float64)
    wanted = times[0] + np.arange(bucket.frames) / bucket.fps
    if wanted[-1] - times[-1] > 0.5 / bucket.fps + _TIE:
        return None
    after = np.searchsorted(times, wanted).clip(max=len(times) - 1)
    before = (after - 1).clip(min=0)
    picked = np.where(np.abs(times[before] - wanted) <= np.abs(times[after] - wanted) + _TIE, before, after)
    return Times(
        picked=tuple(picked.tolist()),
        error=float(np.abs(times[picked] - wanted).max()),
        repeated=float((picked[1:] == picked[:-1]).sum() / bucket.frames),
    )


def fit(size: tuple[int, int], seconds: Sequence[float], section: EncodeSection) -> list[Fit] | Misfit:
    """Returns the buckets of a clip: the largest and then longest that it fits, or one of every size and length.

    Of the shapes of one size and length the one with the nearest aspect counts.

    Args:
        size: height and width as shown, cropped and with square pixels. seconds: see `pick_times`.
    """
    found: list[Fit] = []
    misfits: list[Misfit] = []
    for shapes in _alternatives(section.buckets):
        outcome = _fit_one(size, seconds, shapes, section)
        if isinstance(outcome, Misfit):
            misfits.append(outcome)
        elif section.largest_only:
            return [outcome]
        else:
            found.append(outcome)
    return found or max(reversed(misfits), key=lambda misfit: _ORDER.index(misfit.name))


_ORDER = ("too_small", "too_short", "crops_too_much", "fps_too_low")  # in which the bounds are looked at


def _fit_one(
    size: tuple[int, int], seconds: Sequence[float], shapes: Sequence[BucketSection], section: EncodeSection
) -> Fit | Misfit:
    """Returns the clip in the nearest of some shapes of one size and length."""
    covered = [bucket for bucket in shapes if bucket.height <= size[0] and bucket.width <= size[1]]
    if not covered:
        return Misfit("too_small", min(size), low=min(min(bucket.height, bucket.width) for bucket in shapes))
    aspect = math.log(size[1] / size[0])
    bucket = min(covered, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - aspect))
    times = pick_times(seconds, bucket)
    if times is None:
        return Misfit("too_short", seconds[-1] - seconds[0], low=(bucket.frames - 1) / bucket.fps)
    area = math.exp(-abs(math.log(bucket.width / bucket.height) - aspect))
    if area < section.least_area:
        return Misfit("crops_too_much", area, low=section.least_area)
    if times.repeated > section.most_repeated:
        return Misfit("fps_too_low", times.repeated, high=section.most_repeated)
    return Fit(bucket, area, times)


def _alternatives(buckets: Iterable[BucketSection]) -> list[list[BucketSection]]:
    """Returns the buckets by size and length, the largest size first, and of a size the longest."""
    ordered = sorted(buckets, key=lambda bucket: (-bucket.height * bucket.width, bucket.name))
    tiers: list[list[BucketSection]] = []
    for bucket in ordered:
        if tiers and _area(tiers[-1][-1]) <= _TIER * _area(bucket):
            tiers[-1].append(bucket)
        else:
            tiers.append([bucket])
    groups = []
    for tier in tiers:
        lengths = sorted({(bucket.frames, bucket.fps) for bucket in tier}, key=lambda pair: (-pair[0], -pair[1]))
        groups += [[bucket for bucket in tier if (bucket.frames, bucket.fps) == length] for length in lengths]
    return groups


def _area(bucket: BucketSection) -> int:
    return bucket.height * bucket.width
