"""What every step of a run holds, from all its streams: known to all ranks before anything is sent."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mugv_ds.config.errors import ConfigError
from mugv_ds.data.buckets import Buckets, Order, group_by_shape
from mugv_ds.data.budget import BatchSize
from mugv_ds.data.manifest import Shape
from mugv_ds.data.mixture import Mixture, Points
from mugv_ds.data.noise import generator


class SampleRef(NamedTuple):
    """One item (a sample, or a pair) to read. source: which of the run's readers. visit: None for a filler."""

    source: int
    item: int
    visit: int | None


@dataclass(frozen=True)
class Stream:
    """Items that are played in their own order.

    Attributes:
        name: what a run reports it as. source: the reader of its items.
        shapes: int [n, 3], latent (T, H, W) of every item; (0, 0, 0) for items that are not of this stream.
        sizes: batch sizes by shape.
        item_size: samples of an item.
        share: of the samples of the run, see `Mixture`.
        buckets: made of `shapes`, where they are mapped from a file; None has the plan make them.
        weights: float [n], how often an item is played in proportion to the others; None: all as often.
    """

    name: str
    source: int
    shapes: np.ndarray
    sizes: Mapping[Shape, BatchSize]
    item_size: int = 1
    share: Points = ((0, 1.0),)
    buckets: Buckets | None = None
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Companion:
    """Samples of a second source that every step takes along, in micro-batches of their own: drawn at random.

    Attributes:
        source: the reader. shapes: int [n, 3]. ratio: samples for each one of the stream's.
        weights: float [n], how likely a sample is drawn in proportion to the others; None: all alike.
    """

    source: int
    shapes: np.ndarray
    ratio: float
    weights: np.ndarray | None = None

    def count(self, samples: int) -> int:
        """Companions of a step with so many samples."""
        return max(round(self.ratio * samples), 1)


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step.

    Attributes:
        position: of the step in the run's data, from 0.
        stream: name of the stream that plays. source: the reader of its items.
        shape: (T, H, W) of all its latents.
        micro: samples of every micro-batch on a data rank.
        item_size: samples of an item of `refs`.
        refs: items of the stream. companions: samples that come along.
    """

    position: int
    stream: str
    source: int
    shape: Shape
    micro: int
    item_size: int
    refs: tuple[SampleRef, ...]
    companions: tuple[SampleRef, ...] = ()

    @property
    def samples(self) -> int:
        return self.item_size * len(self.refs) + len(self.companions)

    def micro_batches(self, data_rank: int, data_ranks: int) -> list[list[SampleRef]]:
        """What one data rank takes, by micro-batch; those of companions come last.

        Shares are contiguous, so that the step is the same set of samples for any number of ranks.
        """
        batches = []
        for refs, items in ((self.refs, self.micro // self.item_size), (self.companions, self.micro)):
            share = len(refs) // data_ranks
            own = refs[data_rank * share : (data_rank + 1) * share]
            batches += [list(own[start : start + items]) for start in range(0, share, items)]
        return batches

    def counts(self, data_ranks: int) -> tuple[int, int]:
        """Micro-batches of a data rank: those of the stream, those of companions."""
        at_once = self.micro * data_ranks
        return self.item_size * len(self.refs) // at_once, len(self.companions) // at_once


class Plan:
    """The steps of a run: a pure function of the position.

    Args:
        streams: what is played. seed: of every order.
        companion: what comes along with each step.

    Attributes:
        streams, companion: as given. mean_samples: of the steps of each stream, without companions.
        per_epoch: items of each shape in an epoch of each stream.

    Raises:
        ConfigError: a stream has no readable item, or no companion has the shape of some item.
    """

    def __init__(self, streams: Sequence[Stream], seed: int, companion: Companion | None = None) -> None:
        self.streams, self.companion, self._seed = streams, companion, seed
        for stream in streams:
            if not stream.shapes.any():
                raise ConfigError(f"{stream.name}: nothing of it can be read")
        self._orders = [
            Order(
                stream.shapes if stream.buckets is None else stream.buckets,
                {shape: size.step for shape, size in stream.sizes.items()},
                seed,
                stream.weights,
            )
            for stream in streams
        ]
        self.mean_samples = [
            stream.item_size * order.samples_per_step for stream, order in zip(streams, self._orders, strict=True)
        ]
        self.per_epoch = [order.per_epoch for order in self._orders]
        self._mixture = Mixture([stream.share for stream in streams], self.mean_samples)
        self.step = lru_cache(4)(self.step)  # asked for by the loop and, ahead of it, by the loader
        if companion is not None:
            self._companions = dict(zip(*group_by_shape(companion.shapes), strict=True))
            for shape in sorted({shape for stream in streams for shape in stream.sizes}):
                if shape not in self._companions:
                    names = " and ".join(stream.name for stream in streams if shape in stream.sizes)
                    raise ConfigError(
                        f"data.manifest: no SFT sample has latents of {'×'.join(map(str, shape))}, as there are in "
                        f"{names}; add some, or set preference.sft_weight or reward.data_weight to 0"
                    )

    def identity(self) -> dict[str, str]:
        """Names what the order of the steps is a function of, each part as a short text or as a SHA-256.

        Plans that agree in all parts play the same items at the same positions, on any layout.
        """
        shapes, weights = hashlib.sha256(), hashlib.sha256()
        weighted = False
        for stream in (*self.streams, *filter(None, [self.companion])):
            shapes.update(f"{stream.source} {stream.shapes.shape}".encode())
            shapes.update(np.ascontiguousarray(stream.shapes, np.int32).data)
            if stream.weights is not None:
                weighted = True
                weights.update(np.ascontiguousarray(stream.weights, np.float64).data)
        sizes = [
            f"{'×'.join(map(str, shape))}: {size.step * stream.item_size}"
            for stream in self.streams
            for shape, size in sorted(stream.sizes.items())
        ]
        return {
            "data.seed": str(self._seed),
            "the latents' shapes": shapes.hexdigest(),
            "the batch sizes": ", ".join(sizes),
            "the streams' shares": json.dumps([stream.share for stream in self.streams]),
            "the SFT samples of a step": str(self.companion and self.companion.ratio),
        } | ({"the rows' weights": weights.hexdigest()} if weighted else {})

    def turn(self, position: int) -> int:
        """Number of the stream that plays at a position."""
        return self._mixture.turn(position)[0]

    def step(self, position: int) -> PlannedStep:
        """The step at a position; any order of calls gives the same steps."""
        number, turn = self._mixture.turn(position)
        stream = self.streams[number]
        step = self._orders[number].step(turn)
        refs = tuple(SampleRef(stream.source, *ref) for ref in zip(step.rows, step.visits, strict=True))
        return PlannedStep(
            position=position,
            stream=stream.name,
            source=stream.source,
            shape=step.shape,
            micro=stream.item_size * stream.sizes[step.shape].micro,
            item_size=stream.item_size,
            refs=refs,
            companions=self._draw(position, step.shape, stream.item_size * len(refs)),
        )

    def _draw(self, position: int, shape: Shape, samples: int) -> tuple[SampleRef, ...]:
        """Companions by chance; the position takes the place of the visit, so none meets the same noise again."""
        if self.companion is None:
            return ()
        rows, weights = self._companions[shape], self.companion.weights
        draw, count = generator("companion", self._seed, position), self.companion.count(samples)
        if weights is None:
            drawn = draw.integers(len(rows), size=count)
        else:
            share = weights[rows].astype(np.float64)
            drawn = draw.choice(len(rows), size=count, p=share / share.sum())
        return tuple(SampleRef(self.companion.source, int(rows[i]), position) for i in drawn)
