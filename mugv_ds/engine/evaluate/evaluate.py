"""Flow losses of given samples under the present weights, without gradients, on any layout."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.loader import loader
from mugv_ds.data.manifest import Shape
from mugv_ds.data.plan import SampleRef
from mugv_ds.data.quarantine import Quarantined, Replacing
from mugv_ds.data.readers import Batch, Reader, Sources
from mugv_ds.data.reference import REFERENCE_DTYPE, unknown
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.process import Process
from mugv_ds.models.fp8 import fp8_off

_AT_ONCE = 4  # micro-batches of a call, times the pipeline's stages


@dataclass(frozen=True)
class Measured:
    """Samples and their losses: float64 arrays of one length.

    Attributes:
        row, visit: which samples; whole numbers. timestep: in [0, 1000]. elements: over which the loss is a mean.
        content: see `data.readers.content_of`.
        loss: flow loss. reference: that of the frozen reference, 0 where it is not known.
    """

    row: np.ndarray
    visit: np.ndarray
    timestep: np.ndarray
    elements: np.ndarray
    content: np.ndarray
    loss: np.ndarray
    reference: np.ndarray

    @classmethod
    def concatenate(cls, parts: Iterable["Measured"]) -> "Measured":
        """All parts in one, of which there is at least one."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))

    def unique(self) -> "Measured":
        """Each (row, visit) once: one that took another's place is there twice."""
        _, first = np.unique(np.stack([self.row, self.visit]), axis=1, return_index=True)
        return Measured(*(column[first] for column in vars(self).values()))

    def cells(self, rows: int, visits: int) -> np.ndarray:
        """Returns the losses as `data.reference.REFERENCE_DTYPE` [rows, visits], NaN where there is none."""
        cells = unknown(rows, visits)
        for name in REFERENCE_DTYPE.names:
            cells[name][self.row.astype(np.int64), self.visit.astype(np.int64)] = getattr(self, name)
        return cells


class Evaluator:
    """Runs samples through the engine. All ranks call each method together.

    Args:
        process: this process. engine: see `build_engine`. feed: that of the engine.
        num_workers: loader processes.
    """

    def __init__(self, process: Process, engine: PipelineEngine, feed: Feed, num_workers: int) -> None:
        self._process, self._engine, self._feed, self._num_workers = process, engine, feed, num_workers

    @property
    def reads(self) -> bool:
        """Whether this rank reads samples."""
        return self._feed.reads

    def in_bf16(self) -> AbstractContextManager[None]:
        """Inside, a model that trains in fp8 is measured in bf16, as its published weights are used."""
        return fp8_off(self._engine.module)

    def losses(self, batches: list[Batch] | None, shape: Shape, size: int, count: int) -> Measured:
        """The losses of all data ranks' samples, on every rank; fillers are left out.

        Args:
            batches: of this rank where it reads, `count` micro-batches of `size` samples; None elsewhere.
        """
        module, layout = self._engine.module, self._process.layout
        self.set_shape(shape, size)
        module.loss.recorded.clear()
        self._engine.eval_batch(self._feed.stage(batches, shape, size, count), num_micro_batches=count)
        own = torch.zeros(8, count * size, dtype=torch.float64)
        if batches is not None and module.is_last:
            for i, columns in enumerate(zip(*(_about(batch) for batch in batches), strict=True)):
                own[i] = torch.cat(columns)
            own[7] = torch.cat(module.loss.recorded).cpu()
        rows = self._process.host.rows(own.flatten())
        last = [rank for rank in range(layout.world_size) if self._reads_last(rank)]
        columns = rows[last].unflatten(1, own.shape).transpose(0, 1).flatten(1).numpy()
        _, row, visit, timestep, elements, content, reference, loss = columns[:, columns[0] > 0]
        return Measured(row, visit, timestep, elements, content, loss, reference)

    def _reads_last(self, rank: int) -> bool:
        place = self._process.layout.coordinates(rank)
        return place.sequence == 0 and place.stage == self._process.layout.pipeline - 1

    def set_shape(self, shape: Shape, size: int) -> None:
        """Tells the engine the latent shape and the samples of the coming micro-batches."""
        if self._engine.module.set_shape(shape, size, self._process.device):
            self._engine.reset_activation_shape()

    def measure(
        self,
        reader: Reader,
        micro: Callable[[Shape], int],
        *,
        visits: Sequence[int] = (0,),
        replace: bool = False,
        alive: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[Shape, Measured, list[Quarantined]]]:
        """Measures every item of a reader at some visits, by latent shape.

        Args:
            micro: items of a micro-batch of a shape.
            replace: whether what cannot be read is replaced, as in training, and returned; else it is an error.
            alive: called between the parts of the work.

        Raises:
            SampleError: a sample cannot be used. PeerError: another rank met an error.
        """
        layout, place, calls, own = self._process.layout, self._process.coordinates, [], []
        most = _AT_ONCE * layout.pipeline
        for shape, items in zip(*group_by_shape(reader.shapes), strict=True):
            refs = [SampleRef(0, int(item), visit) for visit in visits for item in items]
            size = micro(shape)
            at_once = size * layout.data
            refs += [refs[-1]._replace(visit=None)] * (-len(refs) % at_once)
            begin = place.data * size
            shares = [refs[start + begin : start + begin + size] for start in range(0, len(refs), at_once)]
            calls += [(shape, len(shares[start : start + most])) for start in range(0, len(shares), most)]
            own += shares
        with closing(self._readings(reader, own, replace)) as readings:
            for shape, count in calls:
                batches, quarantined = self._next(readings, count)
                alive()
                yield shape, self.losses(batches, shape, micro(shape) * reader.item_size, count), quarantined

    def _readings(self, reader: Reader, chunks: list[list[SampleRef]], replace: bool) -> Iterator:
        if not self._feed.reads:
            return
        sources = Sources((reader,))
        steps = loader(
            lambda step: [chunks[step]],
            start_step=0,
            stop_step=len(chunks),
            make=Replacing(sources) if replace else sources,
            name=lambda ref: reader.name(ref.item),
            num_workers=min(self._num_workers, len(chunks)),
        )
        with closing(steps):
            for (reading,) in steps:
                steps.begin()
                yield reading if replace else (reading, ())

    def _next(self, readings: Iterator, count: int) -> tuple[list[Batch] | None, list[Quarantined]]:
        """The next micro-batches where this rank reads, and what was set aside on all ranks. All succeed or none."""
        read = self._process.host.attempt(lambda: list(islice(readings, count)) if self._feed.reads else [])
        reports = self._feed.module.is_first  # the last stage reads the same
        own = [bad for _, found in read if reports for bad in found]
        quarantined = [Quarantined(*fields) for found in self._process.host.gather(own) for fields in found]
        return [batch for batch, _ in read] if self._feed.reads else None, quarantined


def _about(batch: Batch) -> tuple[torch.Tensor, ...]:
    """weight, row, visit, timestep, elements of noised frames, content, reference: [B] each."""
    channels, _, height, width = batch.target.shape[1:]
    elements = batch.x_mask.sum(dim=1) * (channels * height * width)
    return batch.weight, batch.row, batch.visit, batch.timestep, elements, batch.content, batch.reference
