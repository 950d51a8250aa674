"""How ranks are arranged into data replicas, sequence groups and pipeline stages, and which layers a stage holds.

Sequence ranks live inside DeepSpeed's data axis: its topology is (pipe, data·sequence), so it averages gradients and
shards ZeRO-1 over data·sequence, and every `sequence` consecutive entries of a data group share one sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch.distributed as dist

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import ParallelSection
from mugv_ds.models.flops import layer_flops


class RankCoordinates(NamedTuple):
    """Locates a rank: its pipeline stage, the data replica it feeds, its part of the sequence."""

    stage: int
    data: int
    sequence: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the three axes. rank = (stage · data + replica) · sequence + part."""

    data: int = 1
    sequence: int = 1
    pipeline: int = 1

    @classmethod
    def fit(cls, parallel: ParallelSection, world_size: int) -> "Layout":
        """The layout that the config asks for on this many processes.

        Raises:
            ConfigError: data · sequence · pipeline is not the number of processes.
        """
        model_ranks = parallel.sequence * parallel.pipeline
        data = parallel.data or max(world_size // model_ranks, 1)
        layout = cls(data, parallel.sequence, parallel.pipeline)
        if layout.world_size != world_size:
            raise ConfigError(
                f"parallel: data {data} × sequence {parallel.sequence} × pipeline {parallel.pipeline} is "
                f"{layout.world_size} processes, but {world_size} were started; start {layout.world_size} (check the "
                f"hostfile's slots) or set parallel.data so that the product is {world_size}"
            )
        return layout

    @property
    def world_size(self) -> int:
        return self.data * self.sequence * self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks over which DeepSpeed averages gradients and shards the optimizer."""
        return self.data * self.sequence

    def coordinates(self, rank: int) -> RankCoordinates:
        """Returns where a global rank is."""
        stage, replica = divmod(rank, self.replicas)
        return RankCoordinates(stage, *divmod(replica, self.sequence))

    def rank(self, coordinates: RankCoordinates) -> int:
        """Returns the global rank at these coordinates."""
        return (coordinates.stage * self.data + coordinates.data) * self.sequence + coordinates.sequence

    def sequence_ranks(self) -> list[list[int]]:
        """The global ranks of each sequence group."""
        return [list(range(start, start + self.sequence)) for start in range(0, self.world_size, self.sequence)]


def sequence_group(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    """This rank's sequence group; None where a sequence is not shared. All ranks call it, in the same order."""
    if layout.sequence == 1:
        return None
    groups = [dist.new_group(ranks) for ranks in layout.sequence_ranks()]
    return groups[rank // layout.sequence]


def stage_boundaries(config: DiTConfig, stages: int, tokens: int, text_tokens: int) -> list[int]:
    """Returns the first layer of each stage, and then the number of layers.

    Stages cost about the same, by the FLOPs of a sample with so many tokens, and each of them has a block.

    Raises:
        ConfigError: there are more stages than blocks.
    """
    if stages > config.depth:
        raise ConfigError(f"parallel.pipeline = {stages}: more than the {config.depth} blocks of the model; use fewer")
    flops = layer_flops(config, tokens, text_tokens)
    # The ends go with their neighbouring blocks, so that no stage is without a block.
    costs = [flops[0] + flops[1], *flops[2:-2], flops[-2] + flops[-1]] if config.depth > 1 else [sum(flops)]
    first, *rest = balanced_partition(costs, stages)
    return [first, *[boundary + 1 for boundary in rest[:-1]], config.depth + 2]


def balanced_partition(costs: Sequence[float], parts: int) -> list[int]:
    """Cuts a row of costs into contiguous parts, none of them empty, so that the costliest costs as little as possible.

    Of such cuts it takes one whose cheapest part costs the most, so that the parts are even. This is the linear
    partition problem, solved by dynamic programming over (costs used, parts made).

    Returns:
        The first index of each part, and then the number of costs.
    """
    sums = [0.0, *accumulate(costs)]
    # best[n]: (largest part, −smallest part, boundaries) of the first n costs in as many parts as were made so far
    best = {0: (0.0, -float("inf"), [0])}
    for part in range(1, parts + 1):
        best = {
            stop: min(
                (max(most, sums[stop] - sums[start]), max(least, sums[start] - sums[stop]), [*boundaries, stop])
                for start, (most, least, boundaries) in best.items()
                if start < stop
            )
            for stop in range(part, len(costs) - (parts - part) + 1)
        }
    return best[len(costs)][2]
