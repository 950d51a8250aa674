"""The two branches of guidance on two ranks: one computes with the prompt, the other with the negative prompt.

The two are neighbours on the data axis: the data ranks 2k and 2k + 1 sample the same videos.
"""

from collections.abc import Iterable
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from mugv_ds.config.errors import ConfigError
from mugv_ds.parallel.layout import Layout, RankCoordinates


class GuidancePair:
    """One of two ranks that compute a branch of guidance each.

    Args:
        group: of the two.
        branch: of this rank: 0 with the prompt, 1 with the negative prompt.
    """

    def __init__(self, group: dist.ProcessGroup, branch: int) -> None:
        self._group, self.branch = group, branch

    def exchange(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the rank with the prompt and that with the negative prompt computed, of the shape of `own`."""
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own.contiguous(), group=self._group)
        return both[0], both[1]


def join_pair(layout: Layout, coordinates: RankCoordinates) -> GuidancePair:
    """Joins this rank with that of the other branch. All ranks call it together.

    Raises:
        ConfigError: the number of data ranks is odd.
    """
    if layout.data % 2:
        raise ConfigError(
            f"guidance on two ranks needs an even number of replicas, and there are {layout.data}: start "
            f"{2 * layout.sequence * layout.pipeline} processes, or a multiple of that"
        )
    places = product(range(layout.pipeline), range(0, layout.data, 2), range(layout.sequence))
    pairs = [
        [layout.rank(RankCoordinates(stage, first + branch, part)) for branch in (0, 1)]
        for stage, first, part in places
    ]
    return GuidancePair(_join_one(pairs, layout.rank(coordinates)), coordinates.data % 2)


def replica_group(layout: Layout, coordinates: RankCoordinates, branches: int) -> dist.ProcessGroup:
    """Joins all ranks that sample the same videos. All ranks call it together.

    Args:
        branches: data ranks that do: 2 with guidance on two ranks, else 1.
    """
    replicas = [
        [
            layout.rank(RankCoordinates(stage, data, part))
            for stage, data, part in product(
                range(layout.pipeline), range(first, first + branches), range(layout.sequence)
            )
        ]
        for first in range(0, layout.data, branches)
    ]
    return _join_one(replicas, layout.rank(coordinates))


def _join_one(groups: Iterable[list[int]], rank: int) -> dist.ProcessGroup:
    """Makes groups of ranks, and returns that which this rank is in."""
    return next(group for ranks, group in [(ranks, dist.new_group(ranks)) for ranks in groups] if rank in ranks)
