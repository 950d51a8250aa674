"""How ranks are arranged into data replicas, sequence groups and pipeline stages.

Sequence ranks live inside DeepSpeed's data axis: its topology is (pipe, data·sequence), so it averages gradients and
shards ZeRO-1 over data·sequence, and every `sequence` consecutive entries of a data group share one sample.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import ParallelSection


class Place(NamedTuple):
    """Where a rank is: its pipeline stage, the data replica it feeds, its part of the sequence."""

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

    def place(self, rank: int) -> Place:
        """The place of a global rank."""
        stage, replica = divmod(rank, self.replicas)
        return Place(stage, *divmod(replica, self.sequence))

    def sequence_ranks(self) -> list[list[int]]:
        """The global ranks of each sequence group."""
        return [list(range(start, start + self.sequence)) for start in range(0, self.world_size, self.sequence)]


def sequence_group(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    """This rank's sequence group; None where a sequence is not shared. All ranks call it, in the same order."""
    if layout.sequence == 1:
        return None
    groups = [dist.new_group(ranks) for ranks in layout.sequence_ranks()]
    return groups[rank // layout.sequence]
