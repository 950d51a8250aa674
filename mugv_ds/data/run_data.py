"""What a run reads: its manifests, the plan of its steps, and the readers that the plan's picks name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.budget import BatchSize, Workload, batch_sizes
from mugv_ds.data.manifest import Index, Shape, open_index
from mugv_ds.data.mixture import group_shapes
from mugv_ds.data.pairs import labels, pairs
from mugv_ds.data.plan import Companion, Plan, Stream
from mugv_ds.data.readers import AnnotatedSamples, FlowSamples, Reader, Sources
from mugv_ds.models.flops import train_flops
from mugv_ds.models.rope import patch_grid

Opener = Callable[[Callable[[], Index]], Index]

_ALONE = "train"  # name of the stream where there is only one


@dataclass(frozen=True)
class Manifests:
    """The indexes of a run. sources, held_out: of the preference sources, in their order; None where not given."""

    train: Index
    validation: Index | None
    sources: tuple[Index, ...] = ()
    held_out: tuple[Index | None, ...] = ()

    def digest(self, config: TrainConfig) -> str:
        """SHA-256 of what decides the order of samples beside seed and global batch size."""
        data, preference = config.data, config.preference
        if data.budget is None and not data.mixture and preference is None:
            return self.train.digest
        parts = [index.digest for index in (self.train, *self.sources)]
        parts += [section.model_dump_json() for section in (data.budget, *data.mixture) if section is not None]
        if preference is not None:
            keys = {"objective", "sft_weight", "sft_ratio"}
            parts += [preference.model_dump_json(include=keys), *(str(source.weight) for source in preference.sources)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def typical_shape(self) -> Shape:
        """The largest latent side by side; by its cost pipeline stages are balanced and attention is chosen."""
        indexes = self.sources or (self.train,)
        return tuple(int(side) for side in np.concatenate([index.shapes() for index in indexes]).max(axis=0))


def open_manifests(config: TrainConfig, opener: Opener = lambda call: call()) -> Manifests:
    """Opens all manifests of a run.

    Args:
        opener: calls what it is given; on several ranks one has to build the index before the others open it.

    Raises:
        ManifestError, PathError: see `data.manifest.open_index`.
    """

    def open_(path: str | None) -> Index | None:
        return None if path is None else opener(partial(open_index, path, config.data.index_dir))

    sources = config.preference.sources if config.preference else ()
    return Manifests(
        train=open_(config.data.manifest),
        validation=open_(config.data.val_manifest),
        sources=tuple(open_(source.manifest) for source in sources),
        held_out=tuple(open_(source.val_manifest) for source in sources),
    )


def workload(config: TrainConfig, data_ranks: int) -> Workload:
    """What the config's model asks of a device for a latent shape."""
    dit, sequence, text_tokens = config.model.dit(), config.parallel.sequence, config.data.max_text_tokens
    return Workload(
        tokens=lambda shape: -(-patch_grid(*shape).tokens // sequence),
        flops=lambda shape: train_flops(dit, patch_grid(*shape).tokens, text_tokens),
        data_ranks=data_ranks,
    )


def preference_reader(
    config: TrainConfig, index: Index, reference: np.ndarray | None = None, held_out: bool = False
) -> AnnotatedSamples:
    """The reader of an annotation source.

    Raises:
        ManifestError: see `data.pairs`.
    """
    samples = FlowSamples(index, config.data, config.flow, config.model.dit().caption_channels, held_out)
    if config.preference.objective == "dpo":
        rows = pairs(index)
        return AnnotatedSamples(samples, rows, np.broadcast_to([1, -1], rows.shape), reference)
    roles = np.where(labels(index), 1, -1)
    return AnnotatedSamples(samples, np.arange(len(index))[:, None], roles[:, None], reference)


def flow_reader(config: TrainConfig, index: Index, held_out: bool = False) -> FlowSamples:
    """The reader of a manifest for the flow loss."""
    return FlowSamples(index, config.data, config.flow, config.model.dit().caption_channels, held_out)


def sizes_of(
    config: TrainConfig, reader: Reader, load: Workload, companion: Companion | None = None
) -> dict[Shape, BatchSize]:
    """Batch sizes of a reader's shapes; see `data.budget.batch_sizes`."""
    shapes, _ = group_by_shape(reader.shapes)
    companions = companion.count if companion else lambda samples: 0
    return batch_sizes(shapes, config.data, load, unit=reader.unit, companions=companions)


def make_plan(config: TrainConfig, manifests: Manifests, readers: Sources, data_ranks: int) -> Plan:
    """The steps of a run.

    Args:
        readers: of the flow set first, then of the preference sources.

    Raises:
        ConfigError: the sets, the batch sizes and the layout do not fit together.
    """
    load, data, preference = workload(config, data_ranks), config.data, config.preference
    flows, *annotated = readers.readers
    if preference is None:
        groups = group_shapes(manifests.train, data.mixture) if data.mixture else [flows.shapes]
        named = [(group.name, group.share) for group in data.mixture] or [(_ALONE, ((0, 1.0),))]
        streams = [
            Stream(name, 0, shapes, batch_sizes(group_by_shape(shapes)[0], data, load), share=share)
            for (name, share), shapes in zip(named, groups, strict=True)
        ]
        return Plan(streams, data.seed)
    companion = Companion(0, flows.shapes, preference.sft_ratio) if preference.sft_weight > 0 else None
    streams = [
        Stream(
            source.name,
            number,
            reader.shapes,
            sizes_of(config, reader, load, companion),
            unit=reader.unit,
            share=((0, source.weight),),
        )
        for number, (source, reader) in enumerate(zip(preference.sources, annotated, strict=True), 1)
    ]
    return Plan(streams, data.seed, companion)
