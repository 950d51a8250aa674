"""The frozen reference's flow losses, which preference objectives compare with: computed ahead, so that no second model
is in memory while the policy trains.

The reference is what the run starts from, `checkpoint.init_from`. Its loss of a sample at a visit depends on nothing
that changes during the run: timestep and noise are functions of (seed, sample or pair, visit).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
from deepspeed.runtime.pipe.engine import PipelineEngine

from mugv_ds.config.errors import InputError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import Index
from mugv_ds.data.plan import Plan
from mugv_ds.data.reference import REFERENCE_SCHEMA, ReferenceKey, read_reference, write_reference
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.evaluate.evaluate import Evaluator, Measured
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.guard.stopping import stop_if_asked
from mugv_ds.engine.process import Process


@dataclass(frozen=True)
class References:
    """Losses of the reference, float64 [rows, visits] for each source; held_out: None without such a manifest."""

    train: tuple[np.ndarray, ...] = ()
    held_out: tuple[np.ndarray | None, ...] = ()


def reference_key(config: TrainConfig, index: Index, weights: str) -> ReferenceKey:
    """What the reference's losses on a manifest depend on. weights: digest of the reference's weights."""
    data = {"seed", "max_text_tokens", "default_fps", "null_text_path"}
    noise = {
        "model": config.model.model_dump(mode="json", exclude={"attention", "compile"}),
        "data": config.data.model_dump(mode="json", include=data),
        "flow": config.flow.model_dump(mode="json"),
        "objective": config.preference.objective,
    }
    return ReferenceKey(weights=weights, data=index.digest, noise=json.dumps(noise, sort_keys=True))


class ReferenceModel:
    """Measures with the weights that the engine holds: to be used before they change. All ranks call it together."""

    def __init__(self, config: TrainConfig, process: Process, engine: PipelineEngine, data: RunData) -> None:
        self._config, self._process, self._data = config, process, data
        self._alive = partial(stop_if_asked, process.host)
        feed = Feed(engine.module, process, config.data, config.model.dit().caption_channels)
        self._evaluator = Evaluator(process, engine, feed, config.data.num_workers)

    def references(self, weights: str) -> References:
        """Of every source: from its file, or measured where it names none. weights: see `reference_key`.

        Raises:
            InputError: a file is not of this reference, these data and this noise.
        """
        train, held_out = [], []
        for number, source in enumerate(self._config.preference.sources):
            index = self._data.sources[number]
            if source.reference is None:
                train.append(self.measure(number).table(len(index), self._visits(number)))
            else:
                key, ids = reference_key(self._config, index, weights), index.column("sample_id").to_pylist()
                train.append(self._process.host.first_then_all(partial(read_reference, source.reference, key, ids)))
            held_out.append(self._measure_held_out(number))
        return References(tuple(train), tuple(held_out))

    def write(self, weights: str) -> Iterator[str]:
        """Writes the file of every source that names one, and says so. weights: see `reference_key`.

        Raises:
            InputError: a file cannot be written; PeerError on the other ranks.
        """
        for number, source in enumerate(self._config.preference.sources):
            if source.reference is None:
                continue
            measured = self.measure(number)
            self._process.host.first(
                partial(self._write, source.reference, weights, self._data.sources[number], measured)
            )
            yield f"{source.reference}: {len(measured.loss)} losses of {self._visits(number)} visits"

    def _write(self, path: str, weights: str, index: Index, measured: Measured) -> None:
        try:
            write_reference(path, reference_key(self._config, index, weights), rows(measured, index))
        except (InputError, OSError) as error:
            raise InputError(f"{path}: {error}") from error

    def measure(self, source: int) -> Measured:
        """A source's training samples at every visit of the run; those that cannot be read are named and left out."""
        reader, sizes = self._data.readers.readers[source + 1], self._data.plan.streams[source].sizes
        parts = []
        for _, measured, quarantined in self._evaluator.measure(
            reader, lambda shape: sizes[shape].micro, visits=self._visits(source), replace=True, alive=self._alive
        ):
            parts.append(measured)
            for bad in quarantined if self._process.rank == 0 else ():
                print(f"reference: {bad.sample_id} is left out: {bad.why}", flush=True)
        return Measured.concatenate(parts).unique()

    def _measure_held_out(self, source: int) -> np.ndarray | None:
        reader = self._data.held_out_annotations(source)
        if reader is None:
            return None
        sizes = self._data.batch_sizes(reader)
        parts = self._evaluator.measure(reader, lambda shape: sizes[shape].micro, alive=self._alive)
        return Measured.concatenate(measured for _, measured, _ in parts).table(len(reader.samples.index), 1)

    def _visits(self, source: int) -> int:
        return visits_of(self._data.plan, source + 1, self._config.schedule.steps)


def visits_of(plan: Plan, source: int, steps: int) -> int:
    """How often a run of so many steps visits the items of a source at most."""
    refs = (ref for step in range(steps) for ref in plan.step(step).refs)
    return max((ref.visit + 1 for ref in refs if ref.source == source), default=1)


def rows(measured: Measured, index: Index) -> pa.Table:
    """The rows of a reference file."""
    names = index.column("sample_id").take(pa.array(measured.row.astype(np.int64)))
    columns = [names, measured.visit.astype(np.int32), measured.timestep.astype(np.float32), measured.loss]
    return pa.table(dict(zip(REFERENCE_SCHEMA.names, columns, strict=True)))
