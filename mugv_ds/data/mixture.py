"""Mixes streams: which of them each step is taken from, so that their samples come in given shares."""

import logging
from collections.abc import Sequence
from threading import Lock

import numpy as np
import pyarrow.compute as pc

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import GroupSection
from mugv_ds.data.manifest import Index

logger = logging.getLogger(__name__)

Points = Sequence[tuple[int, float]]  # (step, share), of ascending steps


class Mixture:
    """Takes each step from the stream that is furthest behind its share of the samples.

    The choice is a pure function of the position, so a resumed run makes the same. What was computed is kept, which
    takes six bytes a step.

    Args:
        shares: of the samples, for each stream; linear between the points and constant outside.
        samples: mean number of samples of each stream's steps.

    Raises:
        ConfigError: every share is zero at some point.
    """

    def __init__(self, shares: Sequence[Points], samples: Sequence[float]) -> None:
        self._shares, self._samples = shares, np.array(samples)
        for step in {step for points in shares for step, _ in points}:
            if not any(_share(points, step) for points in shares):
                raise ConfigError(f"data.mixture: every group's share is 0 at step {step}")
        self._behind = np.zeros(len(shares))
        self._played = np.zeros(len(shares), np.int64)
        self._streams, self._turns = np.empty(0, np.int16), np.empty(0, np.int32)
        self._one_at_a_time = Lock()

    def turn(self, position: int) -> tuple[int, int]:
        """Returns the stream of the step at this position, and how many of its steps come before.

        Any thread may call it.
        """
        with self._one_at_a_time:
            if position >= len(self._streams):
                self._extend(max(position + 1, 2 * len(self._streams), 1024))
            return int(self._streams[position]), int(self._turns[position])

    def _extend(self, stop: int) -> None:
        """Computes the turns up to position `stop`.

        Each step credits every stream with its share of steps, and charges the one chosen with one step.
        """
        start = len(self._streams)
        share = np.stack([_share(points, np.arange(start, stop)) for points in self._shares], axis=1) / self._samples
        share /= share.sum(axis=1, keepdims=True)
        streams, turns = np.empty(stop - start, np.int16), np.empty(stop - start, np.int32)
        for k, due in enumerate(share):
            self._behind += due
            # A stream whose share is zero now keeps the credit that it has, and waits.
            chosen = int(np.argmax(np.where(due > 0, self._behind, -np.inf)))
            self._behind[chosen] -= 1
            streams[k], turns[k] = chosen, self._played[chosen]
            self._played[chosen] += 1
        self._streams, self._turns = np.append(self._streams, streams), np.append(self._turns, turns)


def group_shapes(index: Index, groups: Sequence[GroupSection]) -> list[np.ndarray]:
    """Returns for each group the latent shapes of all rows, int [n, 3], with (0, 0, 0) for rows of other groups.

    A row belongs to the first group that it fits. Readable rows that fit none are counted in one warning.

    Raises:
        ConfigError: no readable row belongs to a group.
    """
    shapes = index.shapes()
    kind = index.column("kind")
    image = pc.equal(kind, "image").fill_null(False).to_numpy() | (kind.is_null().to_numpy() & (shapes[:, 0] == 1))
    free = shapes.any(axis=1)
    masked = []
    for group in groups:
        member = free.copy()
        if group.kind is not None:
            member &= image if group.kind == "image" else ~image
        if group.frames is not None:
            member &= (shapes[:, 0] >= group.frames[0]) & (shapes[:, 0] <= group.frames[1])
        if not member.any():
            raise ConfigError(f"data.mixture.{group.name}: no readable row of the manifest belongs to it")
        free &= ~member
        masked.append(np.where(member[:, None], shapes, 0))
    if free.any():
        first = index.row(int(free.argmax())).sample_id
        logger.warning(
            "%s: %d of %d rows belong to no group of data.mixture and are left out, the first is %s",
            index.root,
            free.sum(),
            len(index),
            first,
        )
    return masked


def row_weights(index: Index) -> np.ndarray | None:
    """How often rows are played in proportion to others, from the column `weight`, 1 where it does not say.

    Returns:
        float64 [rows]; None if all are alike.
    """
    column = index.column("weight")
    if column.null_count == len(column):
        return None
    weights = column.fill_null(1.0).to_numpy()
    return None if (weights == weights[0]).all() else weights


def _share(points: Points, step: np.ndarray | int) -> np.ndarray:
    """Returns the share at these steps."""
    return np.interp(step, *zip(*points, strict=True))
