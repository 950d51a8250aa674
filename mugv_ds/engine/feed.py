"""From batches that are read to what DeepSpeed's schedule asks each rank for.

Of the ranks that share a sequence one reads; the others receive what it read. The ranks of the first and of the last
pipeline stage read the same sample with the same randomness, which is a function of (seed, sample id, visit) alone.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.schema import DataSection
from mugv_ds.data.readers import Batch
from mugv_ds.engine.process import Process
from mugv_ds.objectives import flow
from mugv_ds.parallel.pipeline import DiTPipeline, Inputs, labels


def empty_batch(size: int, shape: tuple[int, int, int], text_tokens: int, channels: int, device) -> Batch:
    """Where a `Batch` of this size and latent shape can be received."""
    latent, frames = (size, LATENT_CHANNELS, *shape), shape[0]

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    return Batch(
        x=empty(*latent),
        target=empty(*latent),
        timestep=empty(size),
        text=empty(size, text_tokens, channels),
        text_mask=empty(size, text_tokens, dtype=torch.bool),
        x_mask=empty(size, frames, dtype=torch.bool),
        fps=empty(size),
        weight=empty(size),
        role=empty(size, dtype=torch.int8),
        reference=empty(size),
        optimality=empty(size),
        row=empty(size, dtype=torch.int64),
        visit=empty(size, dtype=torch.int64),
        content=empty(size, dtype=torch.int64),
    )


class Feed:
    """Turns the batches that this rank reads, or receives, into what its pipeline stage takes.

    Args:
        module: the stage.
        process: this process; the first rank of each sequence group reads.
        data: section of the config. channels: width of the text features.
    """

    def __init__(self, module: DiTPipeline, process: Process, data: DataSection, channels: int) -> None:
        self.module, self.process, self.data, self.channels = module, process, data, channels

    @property
    def reads(self) -> bool:
        """Whether this rank reads samples."""
        return self.process.coordinates.sequence == 0 and (self.module.is_first or self.module.is_last)

    def stage(
        self, batches: Sequence[Batch] | None, shape: tuple[int, int, int], size: int, count: int, preferred: int = 0
    ) -> Iterator[tuple]:
        """Yields (`Inputs`, `Labels`) of `count` micro-batches with this latent shape.

        Args:
            batches: where this rank reads, the micro-batches; elsewhere None.
            size: samples of each.
            preferred: how many of the first ones are for a preference or a reward; the others are for the flow loss.
        Raises:
            StopIteration: there are fewer batches. All were read before, so that nothing can fail here that would have
                the other ranks of the sequence wait, and no device has to be waited for to find out.
        """
        batches = iter(batches) if self.reads else None
        for number in range(count):
            batch = self._share(batches, shape, size)
            weight = flow.loss_weight(batch.x_mask, batch.target.shape[1], *shape[1:])
            yield (
                tuple(Inputs(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)),
                tuple(
                    labels(
                        batch.target,
                        weight,
                        timestep=batch.timestep,
                        scale=batch.weight,
                        role=batch.role if number < preferred else batch.role[:0],
                        reference=batch.reference,
                        optimality=batch.optimality,
                        token_n=self.module.token_n,
                    )
                ),
            )

    def _share(self, batches: Iterator[Batch] | None, shape: tuple[int, int, int], size: int) -> Batch:
        """The next micro-batch on this device: read here, or received from the rank that reads."""
        device, group = self.process.device, self.process.group
        if batches is not None:
            batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in next(batches)))
        else:
            batch = empty_batch(size, shape, self.data.max_text_tokens, self.channels, device)
        if group is not None:
            for tensor in batch:
                dist.broadcast(tensor, self.process.sequence_source, group=group)
        return batch
