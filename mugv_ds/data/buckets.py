"""The order of a stream: what each of its global steps holds, from the latents' shapes, the batch sizes and the seed.

It is a pure function of these. All samples of a step have one latent shape; the rows of one shape are a bucket. The
stream of a bucket with n rows is the concatenation over visits v = 0, 1, 2, … of permutations of its rows, and its k-th
step holds the stream positions [kG, (k+1)G), G being the bucket's global batch size. Epoch e of the whole set consists,
for every bucket, of the steps

    floor(e·n/G) ≤ k < floor((e+1)·n/G)

and plays them, those of all buckets together, in an order drawn for the epoch.

Each row is visited exactly once for every visit number: the intervals of k above partition 0, 1, 2, … over the epochs;
each k is played once in its epoch; the intervals [kG, (k+1)G) partition the stream positions; and the positions
[vn, (v+1)n) of the stream are a permutation of the rows. Nothing is dropped by rounding: what does not fill a step at
the end of one epoch opens the bucket's first step of the next. A bucket with fewer than G rows has several visits in a
step, and epochs without one.

With weights, n is what the rows of the bucket are due of as many samples as the set has rows, Σw of the bucket over Σw
of the set, rounded; and a visit is a systematic sample of n rows: those that lie at the points (u + k)·Σw/n, 0 ≤ k < n,
of the rows' weights laid end to end, in an order drawn for the visit. A row is in it ⌊x⌋ or ⌈x⌉ times, x = n·w/Σw. The
offset u moves on by the golden ratio from visit to visit, so that of V visits it is in V·x up to a few.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np

from mugv_ds.data.noise import generator

Shape = tuple[int, int, int]  # (T, H, W) of a latent

_GOLDEN = (5**0.5 - 1) / 2  # of all rotations of the circle, that whose points are spread most evenly
_RECENT = 8  # steps: a loader reads ahead, for a while in another epoch than its caller


class Buckets:
    """The rows of each latent shape.

    Args:
        shapes: int [n, 3], (T, H, W) of every row.
        rows: as `sort_by_shape` gives them; they may be memory-mapped, so that the processes of a host share them.

    Attributes:
        by_shape: rows of each shape, ascending (int32); the shapes are in ascending order too.
    """

    def __init__(self, shapes: np.ndarray, rows: np.ndarray) -> None:
        self.by_shape: dict[Shape, np.ndarray] = {}
        start = 0
        while start < len(rows):
            shape = _shape(shapes, rows[start])
            stop = bisect_right(range(len(rows)), shape, lo=start, key=lambda i: _shape(shapes, rows[i]))
            self.by_shape[shape] = rows[start:stop]
            start = stop

    def rows_of_shape(self, shape: Shape) -> np.ndarray:
        """Returns the rows of a shape, ascending (int32); none where no row has it. Nothing is copied or searched."""
        return self.by_shape.get(shape, np.empty(0, np.int32))


def sort_by_shape(shapes: np.ndarray) -> np.ndarray:
    """Returns the rows sorted by (T, H, W), those of one shape ascending (int32); rows of (0, 0, 0) are left out."""
    rows = np.flatnonzero(shapes.any(axis=1)).astype(np.int32)
    return rows[np.lexsort(shapes[rows].T[::-1])]  # stable


def group_by_shape(shapes: np.ndarray) -> tuple[list[Shape], list[np.ndarray]]:
    """Groups rows by shape.

    Args:
        shapes: int [n, 3], (T, H, W) of every row; rows of (0, 0, 0) are left out.
    Returns:
        The distinct shapes in ascending order, and for each its rows in ascending order (int32).
    """
    by_shape = Buckets(shapes, sort_by_shape(shapes)).by_shape
    return list(by_shape), list(by_shape.values())


def _shape(shapes: np.ndarray, row: int) -> Shape:
    return tuple(shapes[row].tolist())


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        index: number of the step, counted from 0 over all epochs.
        epoch: epoch of the whole set, counted from 0.
        shape: (T, H, W) of all its latents.
        rows: rows of the manifest, as many as the shape's global batch size.
        visits: how many times each of `rows` was visited before; with weights, a number that none of its other playings
            has.
    """

    index: int
    epoch: int
    shape: Shape
    rows: tuple[int, ...]
    visits: tuple[int, ...]


class Order:
    """The sequence of steps of one stream; it does not depend on which ranks or workers read them.

    It holds the permutation of every row for the epoch that is played, 4 bytes a row, and of the epoch before only the
    rows that open a bucket's first step: fewer than a step of each bucket.

    Args:
        shapes: int [n, 3], (T, H, W) of every row; rows of (0, 0, 0) cannot be read and are left out. Or the buckets
            made of them, which are not copied.
        batch: G, the samples of a step, by latent shape.
        seed: seed of the permutations.
        weights: float [n], how often a row is played in proportion to others; None: all as often.

    Attributes:
        per_epoch: samples of each shape in an epoch, which its steps hold within rounding: as many as it has rows, or
            as its rows' weights make due.

    Raises:
        ValueError: no row can be read.
    """

    def __init__(
        self,
        shapes: np.ndarray | Buckets,
        batch: Mapping[Shape, int],
        seed: int,
        weights: np.ndarray | None = None,
    ) -> None:
        self.seed, self._weights = seed, weights
        buckets = shapes if isinstance(shapes, Buckets) else Buckets(shapes, sort_by_shape(shapes))
        self._shapes, self._buckets = list(buckets.by_shape), list(buckets.by_shape.values())
        if not self._buckets:
            raise ValueError("no row of the manifest has a readable latent")
        self._batches = np.array([batch[shape] for shape in self._shapes])
        self._sizes, self._repeats = np.array([len(bucket) for bucket in self._buckets]), 1
        if weights is not None:
            self._sizes, self._repeats = self._weigh(weights)
        self.per_epoch = dict(zip(self._shapes, self._sizes.tolist(), strict=True))
        self._playlist = lru_cache(2)(self._make_playlist)
        self._recent_epochs: deque[int] = deque(maxlen=_RECENT)
        self._permuted: dict[int, dict[int, np.ndarray]] = {}  # by visit and bucket, of the epochs played recently
        self._tail = lru_cache(4 * len(self._buckets))(self._make_tail)
        self._one_at_a_time = Lock()

    def _weigh(self, weights: np.ndarray) -> tuple[np.ndarray, int]:
        """Returns n of every bucket, and a number that no row is played so often as in a visit."""
        total = np.array([weights[bucket].sum(dtype=np.float64) for bucket in self._buckets])
        most = np.array([weights[bucket].max() for bucket in self._buckets])
        sizes = np.maximum(np.rint(total / total.sum() * self._sizes.sum()).astype(np.int64), 1)
        return sizes, int((most * sizes / total).max()) + 2

    @property
    def samples_per_step(self) -> float:
        """Returns the mean number of samples of a step, over the steps of an epoch."""
        return float(self._sizes.sum() / (self._sizes / self._batches).sum())

    def step(self, index: int) -> Step:
        """Returns the step `index`, counted from 0 over all epochs; any order of calls gives the same steps.

        Any thread may call it.
        """
        most_epochs = int((index + 1 + len(self._buckets)) / (self._sizes / self._batches).sum()) + 2
        epoch = bisect_right(range(most_epochs + 1), index, key=self._steps_before) - 1
        with self._one_at_a_time:
            bucket, k = (int(value) for value in self._playlist(epoch)[index - self._steps_before(epoch)])
            batch = int(self._batches[bucket])
            self._recent_epochs.append(epoch)
            rows, visits = self._stream(bucket, k * batch, (k + 1) * batch, epoch)
            for visit in self._permuted.keys() - set(self._recent_epochs):
                self._permuted.pop(visit, None)
        return Step(index, epoch, self._shapes[bucket], rows, visits)

    def _steps_before(self, epoch: int) -> int:
        """Returns the number of steps of all epochs before `epoch`."""
        return int((epoch * self._sizes // self._batches).sum())

    def _make_playlist(self, epoch: int) -> np.ndarray:
        """Returns (bucket, its step k) in the order in which an epoch plays them, int [steps, 2]."""
        first = epoch * self._sizes // self._batches
        last = (epoch + 1) * self._sizes // self._batches
        steps = [
            np.stack([np.full(stop - start, bucket), np.arange(start, stop)], axis=1)
            for bucket, (start, stop) in enumerate(zip(first, last, strict=True))
        ]
        return generator("epoch", self.seed, epoch).permutation(np.concatenate(steps), axis=0)

    def _stream(self, bucket: int, start: int, stop: int, epoch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns (rows, visits) at the positions [start, stop) of a bucket's stream, which are of a step of the epoch.

        No visit is later than the epoch, as the positions are below (epoch + 1)·n; and of earlier visits there are
        fewer rows than a step, as the positions are above epoch·n − G.
        """
        size = int(self._sizes[bucket])
        rows: list[int] = []
        visits: list[int] = []
        for visit in range(start // size, (stop - 1) // size + 1):
            first, last = max(start - visit * size, 0), min(stop - visit * size, size)
            if visit == epoch:
                part = self._whole(bucket, visit)[first:last]
            else:
                tail = self._tail(bucket, visit)
                part = tail[len(tail) - size + first : len(tail) - size + last]
            rows += (part // self._repeats).tolist()
            visits += (visit * self._repeats + part % self._repeats).tolist()
        return tuple(rows), tuple(visits)

    def _whole(self, bucket: int, visit: int) -> np.ndarray:
        """Returns the permutation of a visit, which is kept while steps of the epoch of this number are asked for."""
        permuted = self._permuted.setdefault(visit, {})
        if bucket not in permuted:
            permuted[bucket] = self._permute(bucket, visit)
            self._tail(bucket, visit)  # made of what is at hand, for the next epoch
        return permuted[bucket]

    def _make_tail(self, bucket: int, visit: int) -> np.ndarray:
        """Returns the last rows of a visit, as many as a step that begins in it may take at most."""
        permuted = self._permuted.get(visit, {}).get(bucket)
        rows = self._permute(bucket, visit) if permuted is None else permuted
        return rows[-int(self._batches[bucket]) :].copy()

    def _permute(self, bucket: int, visit: int) -> np.ndarray:
        """Returns a bucket's rows in the order of a visit, each as row · repeats + how many times it came before."""
        rows, shape = self._buckets[bucket], self._shapes[bucket]
        draw = generator("visit", self.seed, *shape, visit)
        if self._weights is None:
            return draw.permutation(rows)
        size, ends = int(self._sizes[bucket]), np.cumsum(self._weights[rows], dtype=np.float64)
        offset = (generator("weights", self.seed, *shape).random() + visit * _GOLDEN) % 1
        points = (offset + np.arange(size)) * (ends[-1] / size)
        picked = np.minimum(np.searchsorted(ends, points, "right"), len(rows) - 1)
        before = np.arange(size) - np.searchsorted(picked, picked)
        return draw.permutation(rows[picked] * np.int64(self._repeats) + before)
