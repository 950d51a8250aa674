"""Everything that a run reads: its manifests, the readers of their samples, and the plan of its steps."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Protocol

import numpy as np

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.text_encoder import TEXT_ENCODER_NAME, TextEncoderInfo, agree, read_text_encoder
from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.budget import BatchSize, Workload, batch_sizes
from mugv_ds.data.cache import Cache
from mugv_ds.data.manifest import Index, Shape, open_index
from mugv_ds.data.mixture import group_shapes, row_weights
from mugv_ds.data.pairs import labels, pairs
from mugv_ds.data.plan import Companion, Plan, Stream
from mugv_ds.data.readers import AnnotatedSamples, FlowSamples, Reader, Sources
from mugv_ds.data.rounds import RolloutSamples, Round, RoundPlan

Opener = Callable[[Callable[[], Index]], Index]

logger = logging.getLogger(__name__)

_ALONE = "train"  # name of the stream where there is only one


class Cost(Protocol):
    """What a sample of a latent shape asks of a device; see `models.flops.SampleCost` and `plan.cost.sample_cost`."""

    def tokens(self, shape: Shape) -> int: ...

    def cost(self, shape: Shape) -> float: ...


def call(function: Callable[[], Index]) -> Index:
    """Calls a function; what opens an index in a process that is alone."""
    return function()


class RunData:
    """The data of one run, the same for training, for measuring its reference and for planning it.

    Args:
        config: the run. cost: of its samples. data_ranks: replicas that share a step.
        opener: calls what it is given; on several ranks one has to build an index before the others open it.

    Attributes:
        train, validation: indexes of data.manifest and data.val_manifest; None: not given.
        previewed, evaluated: indexes of preview.manifest and evaluation.manifest; None: nothing is sampled of them.
        sources, held_out: indexes of the preference sources and of their held-out annotations, in the config's order.
        prompts: index of reward.manifest; None: nothing is rolled out.
        readers: of the training set first, then of the preference sources or of rollouts.
        plan: the steps of the run.
        text_encoder: what made the text features of all sets and of the null text beside them; None: none says.

    Raises:
        ManifestError, PathError: a manifest cannot be used, see `data.manifest.open_index` and `data.pairs`.
        ConfigError: the sets, the batch sizes and the layout do not fit together, the sets' text features are of
            different encoders, or KTO has a source of good or of bad samples alone.
    """

    def __init__(self, config: TrainConfig, cost: Cost, data_ranks: int, opener: Opener = call) -> None:
        self._config = config
        self._load = Workload(cost.tokens, cost.cost, data_ranks)
        sources = config.preference.sources if config.preference else ()
        section, cache = config.data, None
        if section.cache_dir is not None:
            cache = Cache(Path(section.cache_dir), int(section.cache_gib * 2**30))

        def open_(path: str | None) -> Index | None:
            if path is None:
                return None
            return opener(partial(open_index, path, section.index_dir, section.root, cache))

        self.train: Index = open_(config.data.manifest)
        self.validation = open_(config.data.val_manifest)
        self.previewed = open_(config.preview.manifest if config.preview.every else None)
        self.evaluated = open_(config.evaluation.manifest if config.evaluation.every else None)
        self.sources: tuple[Index, ...] = tuple(open_(source.manifest) for source in sources)
        self.held_out = tuple(open_(source.val_manifest) for source in sources)
        self.prompts = open_(config.reward and config.reward.manifest)
        self.text_encoder = self._text_encoder()
        rollouts = () if self.prompts is None else (RolloutSamples(self._flows(self.prompts), config.reward),)
        self.readers = Sources((self._flows(self.train), *map(self._annotated, self.sources), *rollouts))
        if sources and config.preference.objective == "kto":
            self._refuse_one_class()
        self.plan = self._plan()

    def order(self) -> dict[str, str]:
        """Names what the run's samples and their noise are a function of beside the position: part → value or SHA-256.

        A run may go on from a checkpoint of another one with the same parts without repeating or leaving out samples.
        """
        ids, annotations = hashlib.sha256(), hashlib.sha256()
        for index in filter(None, (self.train, *self.sources, self.prompts)):
            ids.update(index.ids_digest().encode())
        for reader in self.readers.readers[1:] if self.sources else ():
            for array in (reader.rows, reader.roles):
                annotations.update(np.ascontiguousarray(array, np.int32).data)
        parts = {"the sample ids": ids.hexdigest(), **self.plan.identity()}
        return parts | ({"the pairs or labels": annotations.hexdigest()} if self.sources else {})

    def content(self) -> dict[str, str]:
        """Names what this process sees: config key of a manifest → SHA-256 of CSV and index; the text encoder."""
        said = {} if self.text_encoder is None else {TEXT_ENCODER_NAME: str(self.text_encoder)}
        return {key: index.content for key, index in self._indexes().items()} | said

    def _text_encoder(self) -> TextEncoderInfo | None:
        said = {key: read_text_encoder(index.root) for key, index in self._indexes().items()}
        return agree(said, "make the text features of all sets with one encoder", ConfigError)

    def _indexes(self) -> dict[str, Index]:
        """Every index by its config key."""
        sources = self._config.preference.sources if self._config.preference else ()
        indexes = {
            "data.manifest": self.train,
            "data.val_manifest": self.validation,
            "preview.manifest": self.previewed,
            "evaluation.manifest": self.evaluated,
            "reward.manifest": self.prompts,
        }
        for source, index, held_out in zip(sources, self.sources, self.held_out, strict=True):
            indexes |= {f"preference.{source.name}.manifest": index, f"preference.{source.name}.val_manifest": held_out}
        return {key: index for key, index in indexes.items() if index is not None}

    @property
    def typical_shape(self) -> Shape:
        """The latent shape whose sample costs the most; for it pipeline stages are balanced and attention is chosen."""
        shapes = {shape for index in self._played for shape in index.buckets().by_shape}
        return max(sorted(shapes), key=self._load.cost)

    @property
    def _played(self) -> tuple[Index, ...]:
        """The indexes whose shapes the steps have."""
        return self.sources or (self.train if self.prompts is None else self.prompts,)

    @property
    def shapes(self) -> set[Shape]:
        """The latent shapes that the run's model may meet: in training, held out and sampled."""
        others = (self.validation, self.previewed, self.evaluated, self.prompts)
        indexes = (self.train, *others, *self.sources, *self.held_out)
        return {shape for index in indexes if index is not None for shape in index.buckets().by_shape}

    def readers_with(self, references: Sequence[np.ndarray]) -> Sources:
        """Returns the readers, those of the preference sources with the reference's losses, one table for each."""
        flows, *annotated = self.readers.readers
        given = zip(annotated, references, strict=True)
        return Sources((flows, *(replace(reader, reference=table) for reader, table in given)))

    def readers_of(self, played: Round, optimality: Sequence[float]) -> Sources:
        """Returns the readers for a round of learning from a reward. optimality: r of its rollouts."""
        flows, rollouts = self.readers.readers
        return Sources((flows, replace(rollouts, round=played, optimality=tuple(optimality))))

    def held_out_flows(self) -> FlowSamples | None:
        """Returns the reader of data.val_manifest; None where there is none."""
        return None if self.validation is None else self._flows(self.validation, held_out=True)

    def held_out_annotations(self, source: int, reference: np.ndarray | None = None) -> AnnotatedSamples | None:
        """Returns the reader of a source's held-out annotations, with the reference's losses; None: there are none.

        Raises:
            ManifestError: see `data.pairs`.
        """
        index = self.held_out[source]
        return None if index is None else replace(self._annotated(index, held_out=True), reference=reference)

    def batch_sizes(self, reader: Reader, companion: Companion | None = None) -> dict[Shape, BatchSize]:
        """Returns the batch sizes of a reader's latent shapes; see `data.budget.batch_sizes`."""
        return self._batch_sizes(reader.shapes, reader.item_size, companion)

    def _batch_sizes(self, shapes: np.ndarray, item_size: int = 1, companion: Companion | None = None):
        companions = companion.count if companion else lambda samples: 0
        return batch_sizes(
            group_by_shape(shapes)[0], self._config.data, self._load, item_size=item_size, companions=companions
        )

    def _flows(self, index: Index, held_out: bool = False) -> FlowSamples:
        config = self._config
        return FlowSamples(index, config.data, config.flow, config.model.dit().caption_channels, held_out)

    def _annotated(self, index: Index, held_out: bool = False) -> AnnotatedSamples:
        samples = self._flows(index, held_out)
        if self._config.preference.objective == "dpo":
            rows = pairs(index)
            return AnnotatedSamples(samples, rows, np.broadcast_to([1, -1], rows.shape))
        roles = np.where(labels(index), 1, -1)
        return AnnotatedSamples(samples, np.arange(len(index))[:, None], roles[:, None])

    def _refuse_one_class(self) -> None:
        """Refuses KTO on a source all of whose readable samples are good, or all bad.

        The reference point then follows the side that is there: with good samples alone it takes the place of any
        bound on their gain, with bad ones alone it stays 0 while their error rises.

        Raises:
            ConfigError: a source is so.
        """
        for source, reader in zip(self._config.preference.sources, self.readers.readers[1:], strict=True):
            roles = reader.roles[reader.shapes.any(axis=1)]
            if (roles == roles[0]).all():
                raise ConfigError(
                    f"preference.sources: {source.manifest}: all {len(roles)} samples are labelled "
                    f"{'good' if roles[0] > 0 else 'bad'}, and with one class alone nothing bounds KTO; add samples of "
                    "the other, in the same CSV, or use the good ones for SFT"
                )

    def _plan(self) -> Plan:
        seed, preference = self._config.data.seed, self._config.preference
        if self.prompts is not None:
            return self._round_plan()
        if preference is None:
            return Plan(self._flow_streams(), seed)
        flows, *annotated = self.readers.readers
        weights = row_weights(self.train)
        companion = Companion(0, flows.shapes, preference.sft_ratio, weights) if preference.sft_weight > 0 else None
        streams = [
            self._stream(
                Stream(
                    source.name,
                    number,
                    reader.shapes,
                    self.batch_sizes(reader, companion),
                    item_size=reader.item_size,
                    share=((0, source.weight),),
                )
            )
            for number, (source, reader) in enumerate(zip(preference.sources, annotated, strict=True), 1)
        ]
        return Plan(streams, seed, companion)

    def _round_plan(self) -> RoundPlan:
        section, (flows, rollouts) = self._config.reward, self.readers.readers
        companion = None
        if section.data_weight > 0:
            companion = Companion(0, flows.shapes, section.data_ratio, row_weights(self.train))
        sizes = self._batch_sizes(rollouts.shapes, companion=companion)
        weights = row_weights(self.prompts)
        return RoundPlan(section, self._config.steps_per_round, rollouts.prompts, sizes, weights, companion)

    def _stream(self, stream: Stream) -> Stream:
        """Leaves out the latent shapes whose steps would be filled with copies of few rows, and says so.

        Raises:
            ConfigError: that is every shape.
        """
        groups = (
            dict(zip(*group_by_shape(stream.shapes), strict=True))
            if stream.buckets is None
            else stream.buckets.by_shape
        )
        limit = self._config.data.max_row_share
        few = {
            shape: rows
            for shape, rows in groups.items()
            if (step := stream.sizes[shape].step) > 1 and _most_of_a_row(step, rows, stream.weights) > limit * step
        }
        if not few:
            return stream
        rows = np.concatenate(list(few.values()))
        what = (
            f"{stream.name}: {len(rows)} rows or pairs of {len(few)} shapes, {', '.join(map(str, list(few)[:4]))}"
            f"{', …' * (len(few) > 4)}, are so few of their shape, or so unlike in weight, that one would fill more "
            f"than data.max_row_share = {limit:g} of a step"
        )
        if len(few) == len(groups):
            raise ConfigError(f"{what}, and there are no others; add rows, or lower data.global_batch_size")
        logger.warning("%s; they are left out", what)
        shapes = stream.shapes.copy()
        shapes[rows] = 0
        return replace(stream, shapes=shapes, buckets=None)

    def _flow_streams(self) -> list[Stream]:
        """The groups of data.mixture or, without one, all of the training set."""
        mixture, weights = self._config.data.mixture, row_weights(self.train)
        if not mixture:
            shapes, buckets = self.train.shapes(), self.train.buckets()
            alone = Stream(_ALONE, 0, shapes, self._batch_sizes(shapes), buckets=buckets, weights=weights)
            return [self._stream(alone)]
        return [
            self._stream(Stream(group.name, 0, shapes, self._batch_sizes(shapes), share=group.share, weights=weights))
            for group, shapes in zip(mixture, group_shapes(self.train, mixture), strict=True)
        ]


def _most_of_a_row(step: int, rows: np.ndarray, weights: np.ndarray | None) -> int:
    """Times that a row is in a step of so many samples of its shape, whose rows are given."""
    if weights is None:
        return -(-step // len(rows))
    return ceil(step * float(weights[rows].max() / weights[rows].sum()))
