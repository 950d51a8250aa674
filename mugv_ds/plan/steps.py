"""The kinds of steps that a run has: one for each latent shape of each stream."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mugv_ds.config.schema import DataSection, TrainConfig
from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.budget import Workload, batch_sizes
from mugv_ds.data.manifest import Shape
from mugv_ds.data.plan import Plan, Stream
from mugv_ds.data.run_data import Cost
from mugv_ds.models.rope import patch_grid

PUBLISHED = (15, 90, 160)  # latent of 720p for 5 s: taken where neither a manifest nor a budget names a shape
_INSTANTS = 1000  # of the run at which the streams' shares are looked at


class Bucket(NamedTuple):
    """The steps of one latent shape of a stream.

    Attributes:
        items: in the stream. tokens: of a sample. samples: of a step, without companions. micro: of a micro-batch.
        accumulation: micro-batches of a data rank, those of companions included.
        preferred: of them those that are for a preference. share: of the run's steps.
    """

    stream: str
    shape: Shape
    items: int
    tokens: int
    samples: int
    micro: int
    accumulation: int
    companions: int = 0
    preferred: int = 0
    share: float = 1.0


class Kind(NamedTuple):
    """A kind of steps before the ranks are known.

    Attributes:
        items: in the stream. item_size: samples of an item. ratio: companions for each of the stream's samples.
        share: of the run's steps.
    """

    stream: str
    shape: Shape
    items: int
    item_size: int
    ratio: float
    share: float

    def companions(self, samples: int) -> int:
        """Companions of a step with so many samples."""
        return max(round(self.ratio * samples), 1) if self.ratio else 0

    def bucket(self, config: TrainConfig, data: DataSection, cost: Cost, data_ranks: int) -> Bucket:
        """Returns the steps of this kind on so many data ranks.

        Args:
            data: the config's section, or another one in its place.

        Raises:
            ConfigError: they cannot be split.
        """
        load = Workload(cost.tokens, cost.cost, data_ranks)
        companions = self.companions if self.ratio else lambda samples: 0
        size = batch_sizes([self.shape], data, load, item_size=self.item_size, companions=companions)[self.shape]
        samples, micro = self.item_size * size.step, self.item_size * size.micro
        more = companions(samples)
        streamed, beside = (count // micro // data_ranks for count in (samples, more))
        return Bucket(
            self.stream,
            self.shape,
            self.items,
            patch_grid(*self.shape).tokens,
            samples,
            micro,
            streamed + beside,
            more,
            streamed if config.preference is not None else 0,
            self.share,
        )


def kinds_of(plan: Plan, steps: int) -> list[Kind]:
    """Returns the kinds of a plan's steps, by stream and shape, with their shares of the first so many steps."""
    instants = np.linspace(0, max(steps - 1, 0), min(steps, _INSTANTS))
    shares = np.stack([np.interp(instants, *zip(*stream.share, strict=True)) for stream in plan.streams])
    shares /= np.array(plan.mean_samples)[:, None]
    of_streams = (shares / shares.sum(axis=0)).mean(axis=1)
    ratio = plan.companion.ratio if plan.companion is not None else 0.0
    return [
        Kind(stream.name, shape, items, stream.item_size, ratio, float(of_stream * part))
        for stream, of_stream in zip(plan.streams, of_streams, strict=True)
        for shape, items, part in _parts(stream)
    ]


def _parts(stream: Stream) -> list[tuple[Shape, int, float]]:
    """(shape, items, share of the stream's steps)."""
    shapes, groups = group_by_shape(stream.shapes)
    steps = [len(group) / stream.sizes[shape].step for shape, group in zip(shapes, groups, strict=True)]
    return [(shape, len(group), n / sum(steps)) for shape, group, n in zip(shapes, groups, steps, strict=True)]


def given_kinds(config: TrainConfig, shapes: Sequence[Shape]) -> list[Kind]:
    """Returns the kinds of a run whose data are not there: of each stream all shapes, each as often."""
    preference, reward = config.preference, config.reward
    streams, item_size, ratio = ["train"], 1, 0.0
    if preference is not None:
        streams = [source.name for source in preference.sources]
        item_size = 2 if preference.objective == "dpo" else 1
        ratio = preference.sft_ratio if preference.sft_weight > 0 else 0.0
    elif reward is not None:
        streams, ratio = ["rollouts"], reward.data_ratio if reward.data_weight > 0 else 0.0
    share = 1 / len(streams) / len(shapes)
    return [Kind(stream, tuple(shape), 0, item_size, ratio, share) for stream in streams for shape in shapes]


def expected_shapes(config: TrainConfig) -> list[Shape]:
    """Returns the shapes to plan with where the data are not there: that of data.budget, or the published model's."""
    return [config.data.budget.shape if config.data.budget is not None else PUBLISHED]


def missing_manifests(config: TrainConfig) -> list[str]:
    """Returns the manifests that steps are made of and that are not there."""
    sources = () if config.preference is None else config.preference.sources
    paths = [config.data.manifest, *(source.manifest for source in sources)]
    paths += [] if config.reward is None else [config.reward.manifest]
    return [path for path in paths if not Path(path).exists()]
