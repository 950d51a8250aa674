"""From manifest rows to what DeepSpeed's schedule asks each rank for.

Of the ranks that share a sequence one reads; the others receive what it read. The ranks of the first and of the last
pipeline stage read the same sample with the same randomness, which is a function of (seed, sample id, visit) alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mugv_ds.config.errors import ConfigError, PeerError
from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.schema import DataSection, FlowSection
from mugv_ds.data import noise
from mugv_ds.data.manifest import Index, Row
from mugv_ds.data.retry import retried
from mugv_ds.data.sample import SampleError, read_row, read_text
from mugv_ds.engine.build import Process
from mugv_ds.objectives import flow
from mugv_ds.parallel.pipeline import DiTPipeline, Inputs, labels


class Batch(NamedTuple):
    """A micro-batch as it is read: B samples of one latent shape."""

    x: Tensor  # fp32 [B, 24, T, H, W], noised, but clean where x_mask is False
    target: Tensor  # fp32 [B, 24, T, H, W], the velocity
    timestep: Tensor  # fp32 [B]
    text: Tensor  # fp32 [B, L, C]
    text_mask: Tensor  # bool [B, L]
    x_mask: Tensor  # bool [B, T]
    fps: Tensor  # fp32 [B]
    weight: Tensor  # fp32 [B], 0 for a filler that counts nowhere


def stack(samples: Iterable[Batch]) -> Batch:
    """The batch of samples that were read one by one, without the first dimension."""
    return Batch(*map(torch.stack, zip(*samples, strict=True)))


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
    )


@dataclass(frozen=True)
class FlowSamples:
    """Reads samples and makes flow-matching batches of them; the same call gives the same batch in any process.

    Args:
        index: the manifest. data, flow: sections of the config. channels: width of the text features.
    """

    index: Index
    data: DataSection
    flow: FlowSection
    channels: int

    def __call__(self, picks: Sequence[tuple[int, int | None]]) -> Batch:
        """The batch of these (row, visit) pairs, all of one latent shape; visit None marks a filler.

        Raises:
            SampleError: a file that cannot be used; the message names it.
        """
        return stack(self.read(row, visit) for row, visit in picks)

    def time(self, row_number: int, visit: int) -> float:
        """The timestep in [0, 1000] of a (row, visit), without reading it."""
        row = self.index.row(row_number)
        return float(self._time(row, (self.data.seed, row.sample_id, visit)))

    def read(self, row_number: int, visit: int | None) -> Batch:
        """One sample, as a `Batch` without the first dimension; see `__call__`.

        Raises:
            SampleError: a file of the sample cannot be used.
            ConfigError: nor can `data.null_text_path`. TrainingError: the file system failed time and again.
        """
        tokens = self.data.max_text_tokens
        row = self.index.row(row_number)
        key = (self.data.seed, row.sample_id, visit or 0)
        drop = noise.caption_uniform(*key) < self.flow.caption_drop
        sample = retried(
            lambda: read_row(self.index, row_number, channels=self.channels, max_text_tokens=tokens, with_text=not drop)
        )
        x0, frames = sample.latent, sample.latent.shape[1]
        text, text_mask = retried(self.null_text) if drop else (sample.text, sample.text_mask)

        t = self._time(row, key)
        epsilon = noise.gaussian(*key, tuple(x0.shape))
        x_mask = torch.ones(frames, dtype=torch.bool)
        if frames > 1 and noise.first_frame_uniform(*key) < self.flow.first_frame_share:
            x_mask[0] = False
        x_t = flow.interpolate(x0[None], epsilon[None], t[None])[0]

        return Batch(
            x=torch.where(x_mask[None, :, None, None], x_t, x0),
            target=flow.velocity(x0, epsilon),
            timestep=t.float(),
            text=text,
            text_mask=text_mask,
            x_mask=x_mask,
            fps=torch.tensor(row.fps or self.data.default_fps, dtype=torch.float32),
            weight=torch.tensor(0.0 if visit is None else 1.0),
        )

    def _time(self, row: Row, key: tuple[int, str, int]) -> Tensor:
        shift = self._shift(row.height, row.width, row.latent_shape[0])
        return flow.draw_time(torch.tensor(noise.time_normal(*key)), shift)

    def _shift(self, height: int, width: int, frames: int) -> float:
        if self.flow.shift == "resolution":
            return flow.resolution_shift(height, width, frames)
        return self.flow.shift

    def null_text(self) -> tuple[Tensor, Tensor]:
        """Features and mask of `data.null_text_path`; see `read_text`.

        Raises:
            ConfigError: they cannot be used. OSError: the file system failed.
        """
        path = self.index.resolve(self.data.null_text_path)
        try:
            return read_text(path, self.channels, self.data.max_text_tokens)
        except SampleError as error:  # no sample is at fault, so none is to be replaced
            raise ConfigError(f"data.null_text_path: {error}") from error


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
        return self.process.place.sequence == 0 and (self.module.is_first or self.module.is_last)

    def stage(self, batches: Iterable[Batch] | None, shape: tuple[int, int, int], count: int) -> Iterator[tuple]:
        """Yields (`Inputs`, `Labels`) of `count` micro-batches with this latent shape.

        Args:
            batches: where this rank reads, the micro-batches; elsewhere None.
        Raises:
            SampleError: a sample cannot be used. PeerError: the rank that reads for this one met an error.
        """
        batches = iter(batches) if self.reads else None
        for _ in range(count):
            batch = self._share(batches, shape)
            weight = flow.loss_weight(batch.x_mask, batch.target.shape[1], *shape[1:])
            weight = weight * batch.weight[:, None, None, None, None]
            yield (
                tuple(Inputs(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)),
                tuple(labels(batch.target, weight, batch.timestep, self.module.token_n)),
            )

    def _share(self, batches: Iterator[Batch] | None, shape: tuple[int, int, int]) -> Batch:
        """The next micro-batch on this device: read here, or received from the rank that reads."""
        device, group, source = self.process.device, self.process.group, self.process.sequence_source
        failure = None
        if batches is not None:
            try:
                batch = next(batches)
            except Exception as error:
                failure = error
            else:
                batch = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
        else:
            batch = empty_batch(self.data.micro_batch_size, shape, self.data.max_text_tokens, self.channels, device)
        if group is not None:
            self._agree(failure)
        if failure is not None:
            raise failure
        if group is not None:
            for tensor in batch:
                dist.broadcast(tensor, source, group=group)
        return batch

    def _agree(self, failure: Exception | None) -> None:
        """The ranks that would wait for a sample that cannot be read stop instead."""
        failed = torch.tensor([failure is not None], dtype=torch.int32, device=self.process.device)
        dist.broadcast(failed, self.process.sequence_source, group=self.process.group)
        if failed.item() and failure is None:
            raise PeerError(f"rank {self.process.sequence_source} could not read a sample, and says why")
