"""What each global step holds: a pure function of the latents' shapes, the global batch size and the seed.

All samples of a step have one latent shape; the rows of one shape are a bucket. The stream of a bucket with n rows is
the concatenation over visits v = 0, 1, 2, … of permutations of its rows, and its k-th step holds the stream positions
[kG, (k+1)G), G being the global batch size. Epoch e of the whole set consists, for every bucket, of the steps

    floor(e·n/G) ≤ k < floor((e+1)·n/G)

and plays them, those of all buckets together, in an order drawn for the epoch.

Each row is visited exactly once for every visit number: the intervals of k above partition 0, 1, 2, … over the epochs;
each k is played once in its epoch; the intervals [kG, (k+1)G) partition the stream positions; and the positions
[vn, (v+1)n) of the stream are a permutation of the rows. Nothing is dropped by rounding: what does not fill a step at
the end of one epoch opens the bucket's first step of the next. A bucket with fewer than G rows has several visits in a
step, and epochs without one.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from mugv_ds.data.manifest import Shape
from mugv_ds.data.noise import generator

Visit = tuple[int, int]  # (row, how many times it was visited before)


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        index: counted from 0 over all epochs.
        epoch: of the whole set, counted from 0.
        shape: (T, H, W) of all its latents.
        rows: of the manifest, as many as the global batch size.
        visits: how many times each of `rows` was visited before.
    """

    index: int
    epoch: int
    shape: Shape
    rows: tuple[int, ...]
    visits: tuple[int, ...]


class Order:
    """The sequence of steps. Which ranks or workers read them does not enter.

    Args:
        shapes: int [n, 3], (T, H, W) of every row; rows of (0, 0, 0) cannot be read and are left out.
        global_batch_size: G, samples a step.
        seed: of the permutations.

    Raises:
        ValueError: there is no row to play.
    """

    def __init__(self, shapes: np.ndarray, global_batch_size: int, seed: int) -> None:
        self.global_batch_size = global_batch_size
        self.seed = seed
        self._shapes, self._buckets = _group(shapes)
        if not self._buckets:
            raise ValueError("no row of the manifest has a readable latent")
        self._sizes = np.array([len(bucket) for bucket in self._buckets])
        self._epoch = -1  # of the two caches below
        self._playlist = np.empty((0, 2), np.int64)  # (bucket, its step k) in the order of the epoch
        self._permuted: dict[int, np.ndarray] = {}  # bucket → its rows, in the order of visit number `_epoch`

    def step(self, index: int) -> Step:
        """The step `index`, counted from 0 over all epochs; any order of calls gives the same steps."""
        most_epochs = (index + 1 + len(self._buckets)) * self.global_batch_size // int(self._sizes.sum()) + 1
        epoch = bisect_right(range(most_epochs + 1), index, key=self._steps_before) - 1
        if epoch != self._epoch:
            self._enter(epoch)
        bucket, k = (int(value) for value in self._playlist[index - self._steps_before(epoch)])
        rows, visits = self._stream(bucket, k * self.global_batch_size, (k + 1) * self.global_batch_size)
        return Step(index, epoch, self._shapes[bucket], rows, visits)

    def _steps_before(self, epoch: int) -> int:
        """Number of steps of all epochs before `epoch`."""
        return int((epoch * self._sizes // self.global_batch_size).sum())

    def _enter(self, epoch: int) -> None:
        first = epoch * self._sizes // self.global_batch_size
        last = (epoch + 1) * self._sizes // self.global_batch_size
        steps = [
            np.stack([np.full(stop - start, bucket), np.arange(start, stop)], axis=1)
            for bucket, (start, stop) in enumerate(zip(first, last, strict=True))
        ]
        self._playlist = generator("epoch", self.seed, epoch).permutation(np.concatenate(steps), axis=0)
        self._permuted = {}
        self._epoch = epoch

    def _stream(self, bucket: int, start: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(rows, visits) at the positions [start, stop) of a bucket's stream."""
        size = len(self._buckets[bucket])
        rows: list[int] = []
        visits: list[int] = []
        for visit in range(start // size, (stop - 1) // size + 1):
            offset = visit * size
            part = self._permutation(bucket, visit)[max(start - offset, 0) : stop - offset]
            rows += part.tolist()
            visits += [visit] * len(part)
        return tuple(rows), tuple(visits)

    def _permutation(self, bucket: int, visit: int) -> np.ndarray:
        """A bucket's rows in the order of a visit.

        Kept for the visit that most steps of the epoch are in; the rest of an earlier visit opens one step only.
        """
        if visit == self._epoch and bucket in self._permuted:
            return self._permuted[bucket]
        permuted = generator("visit", self.seed, *self._shapes[bucket], visit).permutation(self._buckets[bucket])
        if visit == self._epoch:
            self._permuted[bucket] = permuted
        return permuted


def micro_batches(step: Step, data_rank: int, data_ranks: int, micro: int) -> list[list[Visit]]:
    """The samples that one data rank takes of a step, for each micro-batch of its gradient accumulation.

    The step is split into contiguous shares, so that it is the same set of samples for any number of ranks.

    Args:
        step: the step.
        data_rank, data_ranks: which of how many replicas.
        micro: samples in a micro-batch.

    Raises:
        ValueError: the step cannot be split evenly.
    """
    share, rest = divmod(len(step.rows), data_ranks)
    if rest or share % micro:
        raise ValueError(
            f"data.global_batch_size = {len(step.rows)}: must be a multiple of {data_ranks} data ranks × "
            f"data.micro_batch_size {micro}"
        )
    visits = list(zip(step.rows, step.visits, strict=True))[data_rank * share : (data_rank + 1) * share]
    return [visits[start : start + micro] for start in range(0, share, micro)]


def _group(shapes: np.ndarray) -> tuple[list[Shape], list[np.ndarray]]:
    """The distinct shapes in ascending order, and for each its rows in ascending order (int32)."""
    order = np.lexsort(shapes.T[::-1])  # stable
    starts = np.flatnonzero((np.diff(shapes[order], axis=0) != 0).any(axis=1)) + 1
    buckets = [bucket for bucket in np.split(order.astype(np.int32), starts) if shapes[bucket].any()]
    return [tuple(shapes[bucket[0]].tolist()) for bucket in buckets], buckets
