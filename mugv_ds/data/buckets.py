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
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mugv_ds.data.manifest import Shape
from mugv_ds.data.noise import generator


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        index: number of the step, counted from 0 over all epochs.
        epoch: epoch of the whole set, counted from 0.
        shape: (T, H, W) of all its latents.
        rows: rows of the manifest, as many as the shape's global batch size.
        visits: how many times each of `rows` was visited before.
    """

    index: int
    epoch: int
    shape: Shape
    rows: tuple[int, ...]
    visits: tuple[int, ...]


class Order:
    """The sequence of steps of one stream; it does not depend on which ranks or workers read them.

    Args:
        shapes: int [n, 3], (T, H, W) of every row; rows of (0, 0, 0) cannot be read and are left out.
        batch: G, the samples of a step, by latent shape.
        seed: seed of the permutations.

    Raises:
        ValueError: no row can be read.
    """

    def __init__(self, shapes: np.ndarray, batch: Mapping[Shape, int], seed: int) -> None:
        self.seed = seed
        self._shapes, self._buckets = group_by_shape(shapes)
        if not self._buckets:
            raise ValueError("no row of the manifest has a readable latent")
        self._batches = np.array([batch[shape] for shape in self._shapes])
        self._sizes = np.array([len(bucket) for bucket in self._buckets])
        # The caches hold two epochs, because a loader reads ahead, at times in another epoch than its caller.
        self._playlist = lru_cache(2)(self._make_playlist)
        self._permuted = lru_cache(2 * len(self._buckets))(self._permute)

    @property
    def samples_per_step(self) -> float:
        """Returns the mean number of samples of a step, over the steps of an epoch."""
        return float(self._sizes.sum() / (self._sizes / self._batches).sum())

    def step(self, index: int) -> Step:
        """Returns the step `index`, counted from 0 over all epochs; any order of calls gives the same steps."""
        most_epochs = int((index + 1 + len(self._buckets)) / (self._sizes / self._batches).sum()) + 2
        epoch = bisect_right(range(most_epochs + 1), index, key=self._steps_before) - 1
        bucket, k = (int(value) for value in self._playlist(epoch)[index - self._steps_before(epoch)])
        batch = int(self._batches[bucket])
        rows, visits = self._stream(bucket, k * batch, (k + 1) * batch)
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

    def _stream(self, bucket: int, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns (rows, visits) at the positions [start, stop) of a bucket's stream."""
        size = len(self._buckets[bucket])
        rows: list[int] = []
        visits: list[int] = []
        for visit in range(start // size, (stop - 1) // size + 1):
            offset = visit * size
            part = self._permuted(bucket, visit)[max(start - offset, 0) : stop - offset]
            rows += part.tolist()
            visits += [visit] * len(part)
        return tuple(rows), tuple(visits)

    def _permute(self, bucket: int, visit: int) -> np.ndarray:
        """Returns a bucket's rows in the order of a visit."""
        return generator("visit", self.seed, *self._shapes[bucket], visit).permutation(self._buckets[bucket])


def group_by_shape(shapes: np.ndarray) -> tuple[list[Shape], list[np.ndarray]]:
    """Groups rows by shape.

    Args:
        shapes: int [n, 3], (T, H, W) of every row; rows of (0, 0, 0) are left out.
    Returns:
        The distinct shapes in ascending order, and for each its rows in ascending order (int32).
    """
    order = np.lexsort(shapes.T[::-1])  # stable
    starts = np.flatnonzero((np.diff(shapes[order], axis=0) != 0).any(axis=1)) + 1
    buckets = [bucket for bucket in np.split(order.astype(np.int32), starts) if shapes[bucket].any()]
    return [tuple(shapes[bucket[0]].tolist()) for bucket in buckets], buckets
