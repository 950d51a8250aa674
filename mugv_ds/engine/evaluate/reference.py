"""The frozen reference's flow losses, which preference objectives compare with: measured ahead of the steps that need
them, so that no second model is in memory while the policy trains. (That of a run with adapters is its base, which is
there at every step: see `engine.loop`.)

The reference is what the run starts from, `checkpoint.init_from`. Its loss of a sample at a visit depends on nothing
that changes during the run: timestep and noise are functions of (seed, sample or pair, visit).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from mugv_ds.config.console import say
from mugv_ds.config.errors import InputError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import Index
from mugv_ds.data.plan import Plan
from mugv_ds.data.reference import (
    REFERENCE_DTYPE,
    REFERENCE_SCHEMA,
    ReferenceKey,
    read_reference,
    unknown,
    write_reference,
)
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.evaluate.evaluate import Evaluator, Measured
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.guard.stopping import stop_if_asked
from mugv_ds.engine.process import Process

_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp8": 2e-2}  # of a loss measured anew, over one attention kernel or another


class Weights(Protocol):
    """The reference's weights; see `weights.start.FrozenWeights`."""

    @property
    def digest(self) -> str: ...

    def check(self) -> None: ...

    def put_in(self, layers: list[tuple[str, torch.nn.Module]]) -> None: ...


def reference_key(config: TrainConfig, index: Index, weights: str) -> ReferenceKey:
    """Returns what the reference's losses on a manifest depend on. weights: digest of the reference's weights."""
    data = {"seed", "max_text_tokens", "default_fps", "null_text_path"}
    noise = {
        "model": config.model.model_dump(mode="json", exclude={"attention", "compile"}),
        "data": config.data.model_dump(mode="json", include=data),
        "flow": config.flow.model_dump(mode="json"),
        "objective": config.preference.objective,
    }
    return ReferenceKey(weights=weights, data=index.digest, noise=json.dumps(noise, sort_keys=True))


class ReferenceModel:
    """Knows the reference's losses, and measures those that are missing. All ranks call each method together.

    Args:
        config: the run. process: this process. engine: see `build_engine`. data: of the run.
        weights: of the reference.
        held: whether the engine holds them already, as at a fresh start until the first step.

    Raises:
        InputError: the file of a source is not of this reference, these data and this noise.
    """

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        engine: PipelineEngine,
        data: RunData,
        weights: Weights,
        held: bool,
    ) -> None:
        self._config, self._process, self._engine, self._data = config, process, engine, data
        self._weights, self._held = weights, held
        self._alive = partial(stop_if_asked, process.host)
        feed = Feed(engine.module, process, config.data, config.model.dit().caption_channels)
        self._evaluator = Evaluator(process, engine, feed, config.data.num_workers)
        self._sources = config.preference.sources
        self._cells = [unknown(len(index), 0) for index in data.sources]
        self._unchecked: set[int] = set()  # sources whose file was not yet compared with the weights

    def open_files(self) -> None:
        """Reads the losses of every source that names a file; see the class for the errors."""
        for number, source in enumerate(self._sources):
            if source.reference is not None:
                index = self._data.sources[number]
                key = reference_key(self._config, index, self._weights.digest)
                read = partial(read_reference, source.reference, key, index.column("sample_id").to_pylist())
                self._cells[number] = self._process.host.first_then_all(read)
                self._unchecked.add(number)

    def complete(self, first: int, stop: int, alive: Callable[[], None] | None = None) -> list[np.ndarray]:
        """Returns the losses of every source, `REFERENCE_DTYPE` [rows, visits], for the data steps [first, stop).

        Those that are missing, as after a rollback, are measured now. While the engine holds the reference, one
        micro-batch of each file is measured too and compared with the file.

        Raises:
            InputError: a file says something else than the reference's weights do. PeerError: on other ranks.
        """
        missing = {number: self._missing(number, first, stop) for number in range(len(self._sources))}
        missing = {number: visits for number, visits in missing.items() if visits}
        if missing or (self._held and self._unchecked):
            with self._reference():
                for number in sorted(self._unchecked):
                    self._compare(number, first)
                self._unchecked.clear()
                for number, visits in missing.items():
                    self._add(number, self.measure(number, visits, alive), visits)
        self._held = False  # a step follows
        return self._cells

    def held_out(self) -> list[np.ndarray | None]:
        """Measures the held-out annotations of every source; None where a source has none."""
        if not any(source.val_manifest for source in self._sources):
            return [None] * len(self._sources)
        with self._reference():
            return measure_held_out(self._data, len(self._sources), self._evaluator, self._alive)

    def write(self) -> Iterator[str]:
        """Writes the file of every source that names one, for the whole run, and says so.

        Raises:
            InputError: a file cannot be written; PeerError on the other ranks.
        """
        for number, source in enumerate(self._sources):
            if source.reference is None:
                continue
            visits = self._missing(number, 0, self._config.schedule.steps)
            measured = self.measure(number, visits)
            self._process.host.first(partial(self._write, source.reference, self._data.sources[number], measured))
            yield f"{source.reference}: {len(measured.loss)} losses of {len(visits)} visits"

    def measure(self, source: int, visits: Sequence[int], alive: Callable[[], None] | None = None) -> Measured:
        """Measures a source's training samples at some visits; those that cannot be read are named and left out."""
        reader, sizes = self._data.readers.readers[source + 1], self._data.plan.streams[source].sizes
        parts = []
        for _, measured, quarantined in self._evaluator.measure(
            reader, lambda shape: sizes[shape].micro, visits=visits, replace=True, alive=alive or self._alive
        ):
            parts.append(measured)
            for bad in quarantined if self._process.rank == 0 else ():
                say(f"reference: {bad.sample_id} is left out: {bad.why}")
        return Measured.concatenate(parts).unique()

    @contextmanager
    def _reference(self) -> Iterator[None]:
        """Inside, the engine computes with the reference's weights; afterwards with those of the policy again."""
        if self._held:
            yield
            return
        self._process.host.first(self._weights.check)
        self._process.host.attempt(lambda: self._weights.put_in(self._engine.module.named_layers()))
        yield
        self._engine.optimizer.update_lp_params()  # rounds the masters, which nothing has touched

    def _missing(self, source: int, first: int, stop: int) -> list[int]:
        """The visits that the data steps [first, stop) make to a source and of which no loss is known."""
        visited = visits_of(self._data.plan, source + 1, first, stop)
        known = ~np.isnan(self._cells[source]["loss"]).all(axis=0)
        return [visit for visit in visited if visit >= len(known) or not known[visit]]

    def _add(self, source: int, measured: Measured, visits: Sequence[int]) -> None:
        """Takes up losses that were measured; rank 0 says so where a file should have had them."""
        cells = self._cells[source]
        wider = unknown(len(cells), max(cells.shape[1], max(visits) + 1))
        wider[:, : cells.shape[1]] = cells
        new = measured.cells(*wider.shape)
        self._cells[source] = np.where(np.isnan(new["loss"]), wider, new)
        if self._sources[source].reference is not None and self._process.rank == 0:
            say(
                f"reference: {self._sources[source].reference} does not hold visits {visits[0]} to {visits[-1]}, which "
                "were measured now"
            )

    def _compare(self, source: int, first: int) -> None:
        """Measures the first micro-batch that a source's file is needed for, and compares.

        Raises:
            InputError: the file says something else. PeerError: on other ranks.
        """
        data, layout = self._data, self._process.layout
        steps = map(data.plan.step, range(first, first + self._config.schedule.steps))
        step = next((step for step in steps if step.source == source + 1), None)
        if step is None:
            return
        refs = step.micro_batches(self._process.coordinates.data, layout.data)[0]
        reads = self._evaluator.reads
        batches = self._process.host.attempt(lambda: [data.readers(refs)] if reads else None)
        measured = self._evaluator.losses(batches, step.shape, step.micro, 1)
        cells = self._cells[source][measured.row.astype(np.int64), measured.visit.astype(np.int64)]
        off = np.abs(cells["loss"] / measured.loss - 1)
        changed = cells["content"] != measured.content.astype(REFERENCE_DTYPE["content"])
        wrong = changed | (off > _TOLERANCE[self._config.model.precision])
        if wrong.any():
            at = int(wrong.argmax())
            name = data.sources[source].row(int(measured.row[at])).sample_id
            why = (
                "its files are not what the reference was measured on"
                if changed[at]
                else f"the reference's loss is {measured.loss[at]:.6g} now and {cells['loss'][at]:.6g} in the file"
            )
            path, rank = self._sources[source].reference, self._process.rank
            failure = InputError(f"{path}: sample {name}: {why}; write it anew with `make reference CONFIG=…`")
            self._process.host.raise_together(failure if rank == 0 else None)

    def _write(self, path: str, index: Index, measured: Measured) -> None:
        try:
            write_reference(path, reference_key(self._config, index, self._weights.digest), rows(measured, index))
        except (InputError, OSError) as error:
            raise InputError(f"{path}: {error}") from error


def measure_held_out(
    data: RunData, sources: int, evaluator: Evaluator, alive: Callable[[], None]
) -> list[np.ndarray | None]:
    """Measures the held-out annotations of every source with the present weights; None where a source has none.

    A model that trains in fp8 is measured in bf16, as `Validation` measures the policy.

    Args:
        alive: called between the parts of the work.
    """
    measured: list[np.ndarray | None] = []
    for reader in map(data.held_out_annotations, range(sources)):
        if reader is None:
            measured.append(None)
            continue
        sizes = data.batch_sizes(reader)
        with evaluator.in_bf16():
            parts = evaluator.measure(reader, lambda shape, sizes=sizes: sizes[shape].micro, alive=alive)
            losses = Measured.concatenate(part for _, part, _ in parts)
        measured.append(losses.cells(len(reader.samples.index), 1))
    return measured


def visits_of(plan: Plan, source: int, first: int, stop: int) -> range:
    """Returns the visits that the data steps [first, stop) make to a source's items, from the least to the most."""
    visits = {ref.visit for position in range(first, stop) for ref in plan.step(position).refs if ref.source == source}
    return range(min(visits), max(visits) + 1) if visits else range(0)


def rows(measured: Measured, index: Index) -> pa.Table:
    """Returns the rows of a reference file."""
    names = index.column("sample_id").take(pa.array(measured.row.astype(np.int64)))
    columns = [
        names,
        measured.visit.astype(np.int32),
        measured.timestep.astype(np.float32),
        measured.loss,
        measured.content.astype(np.uint32),
    ]
    return pa.table(dict(zip(REFERENCE_SCHEMA.names, columns, strict=True)))
