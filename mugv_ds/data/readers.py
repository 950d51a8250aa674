"""From manifest rows to samples: read, noised, and marked with what the objective must know of them.

What a sample draws is a function of (seed, key, visit) alone, so every process that reads it gets the same.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.schema import DataSection, FlowSection
from mugv_ds.data import noise
from mugv_ds.data.buckets import Buckets, sort_by_shape
from mugv_ds.data.manifest import Index
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.plan import SampleRef
from mugv_ds.data.sample import SampleError, read_row, stored_text
from mugv_ds.objectives import flow

Key = tuple[int, str, int]  # seed, sample or pair, visit: what randomness is drawn from


class Batch(NamedTuple):
    """A micro-batch as it is read: B samples of one latent shape."""

    x: Tensor  # fp32 [B, 24, T, H, W], noised, but clean where x_mask is False
    target: Tensor  # fp32 [B, 24, T, H, W], the velocity
    timestep: Tensor  # fp32 [B]
    text: Tensor  # fp32 [B, L, C]
    text_mask: Tensor  # bool [B, L]
    x_mask: Tensor  # bool [B, T]
    fps: Tensor  # fp32 [B]
    weight: Tensor  # fp32 [B], of the sample in the loss; 0 for a filler that counts nowhere
    role: Tensor  # int8 [B], 1 better or good, −1 worse or bad, 0 neither
    reference: Tensor  # fp32 [B], flow loss under the frozen reference; 0 where there is none
    optimality: Tensor  # fp32 [B], of a rollout, see `objectives.reward.optimality`; 0 where there is none
    row: Tensor  # int64 [B], of its source's manifest
    visit: Tensor  # int64 [B]
    content: Tensor  # int64 [B], `content_of` what was read; 0 where nobody asks


Sample = TypeVar("Sample", bound=tuple)  # a NamedTuple of tensors, such as `Batch`


def stack(samples: Iterable[Sample]) -> Sample:
    """The batch of samples that were read one by one, without the first dimension."""
    first, *others = samples
    return type(first)(*map(torch.stack, zip(first, *others, strict=True)))


class Reader(Protocol):
    """Reads the items of one source: samples, or pairs of them.

    Attributes:
        shapes: int [n, 3], latent (T, H, W) of every item; (0, 0, 0) for one that is known to be unreadable.
        item_size: samples of an item.
        seed: of the run.
    """

    item_size: int

    @property
    def shapes(self) -> np.ndarray: ...

    @property
    def seed(self) -> int: ...

    def name(self, item: int) -> str: ...

    def fetch(self, items: Sequence[tuple[int, int | None]]) -> None: ...

    def read(self, item: int, visit: int | None) -> list[Batch]: ...

    def time(self, item: int, visit: int) -> float: ...

    def fillers(self, item: int) -> list[Batch]: ...

    def alike(self, item: int) -> np.ndarray: ...


@dataclass(frozen=True)
class FlowSamples:
    """Samples for flow matching; a `Reader` whose items are the rows of a manifest.

    Args:
        index: the manifest. data, flow: sections of the config. channels: width of the text features.
        held_out: for validation: no caption is dropped, no frame given clean, and the timesteps are spread evenly over
            the quarters of [0, 1000], so that what is measured depends on no setting of the training.
    """

    index: Index
    data: DataSection
    flow: FlowSection
    channels: int
    held_out: bool = False
    item_size = 1

    @property
    def shapes(self) -> np.ndarray:
        return self.index.shapes()

    @property
    def seed(self) -> int:
        return self.data.seed

    def name(self, item: int) -> str:
        """Sample id."""
        return self.index.row(item).sample_id

    def time(self, item: int, visit: int) -> float:
        """The timestep in [0, 1000] of a (row, visit), without reading it."""
        return self.draw_time(item, (self.seed, self.name(item), visit), self._quarter(item))

    def fetch(self, items: Sequence[tuple[int, int | None]]) -> None:
        """Gets what `read` is about to be asked for, where that saves time; items: (item, visit)."""
        self.fetch_rows((row, (self.seed, self.name(row), visit or 0)) for row, visit in items)

    def read(self, item: int, visit: int | None) -> list[Batch]:
        """One sample, as a `Batch` without the first dimension; visit None marks a filler.

        Raises:
            SampleError: a file of the sample cannot be used; the message names it.
            ConfigError: nor can `data.null_text_path`. TransientError: the file system failed for minutes.
        """
        return [self.sample(item, visit, (self.seed, self.name(item), visit or 0), self._quarter(item))]

    def fillers(self, item: int) -> list[Batch]:
        """Returns what stands in for an item that cannot be read; see `filler`."""
        return [self.filler(item)]

    def alike(self, item: int) -> np.ndarray:
        """Returns the rows of the latent shape of `item`, itself included, in ascending order."""
        return self.index.buckets().rows_of_shape(tuple(self.shapes[item].tolist()))

    def _quarter(self, item: int) -> int:
        """The quarter of the timesteps that a held-out row is measured in; those of one shape take turns."""
        return turn_of(self.alike(item), item) if self.held_out and self.shapes[item].any() else 0

    def fetch_rows(self, rows: Iterable[tuple[int, Key]]) -> None:
        """Gets what `sample` is about to be asked for, of rows with what is drawn from their keys."""
        self.index.fetch((row, not self._drops_caption(key)) for row, key in rows)

    def _drops_caption(self, key: Key) -> bool:
        return not self.held_out and noise.caption_uniform(*key) < self.flow.caption_drop

    def sample(self, row_number: int, visit: int | None, key: Key, quarter: int, with_content: bool = False) -> Batch:
        """Does as `read`, for a row with what is drawn from `key`.

        Args:
            quarter: of the timesteps, 0 to 3, if the samples are held out.
            with_content: whether to hash what is read, for a comparison with what a reference was measured on.
        """
        tokens = self.data.max_text_tokens
        drop = self._drops_caption(key)
        given = {"channels": self.channels, "max_text_tokens": tokens, "with_text": not drop}
        sample = read_patiently(lambda: read_row(self.index, row_number, **given), self.index.files)
        x0 = sample.latent
        text, text_mask = self.null_text() if drop else (sample.text, sample.text_mask)
        share = 0.0 if self.held_out else self.flow.first_frame_share
        given = noise.first_frame_uniform(*key) < share
        batch = self.noised(
            row_number, visit, key, x0, text, text_mask, t=self.draw_time(row_number, key, quarter), first_frame=given
        )
        return batch._replace(content=torch.tensor(content_of(x0, text))) if with_content else batch

    def noised(
        self,
        row_number: int,
        visit: int | None,
        key: Key,
        x0: Tensor,
        text: Tensor,
        text_mask: Tensor,
        *,
        t: float,
        first_frame: bool,
    ) -> Batch:
        """Noises a latent of a row with what is drawn from `key`, and makes a `Batch` without the first dimension.

        Args:
            x0: fp32 [24, T, H, W], normalised. text, text_mask: [L, C] and [L].
            t: timestep. first_frame: whether the first frame of a clip is given clean; images are not concerned.
        """
        frames = x0.shape[1]
        epsilon = noise.gaussian(*key, tuple(x0.shape))
        x_mask = torch.ones(frames, dtype=torch.bool)
        if frames > 1 and first_frame:
            x_mask[0] = False
        time = torch.tensor(t)
        x_t = flow.interpolate(x0[None], epsilon[None], time[None])[0]
        return Batch(
            x=torch.where(x_mask[None, :, None, None], x_t, x0),
            target=flow.velocity(x0, epsilon),
            timestep=time.float(),
            text=text,
            text_mask=text_mask,
            x_mask=x_mask,
            fps=torch.tensor(self.index.row(row_number).fps or self.data.default_fps, dtype=torch.float32),
            weight=torch.tensor(0.0 if visit is None else 1.0),
            role=torch.tensor(0, dtype=torch.int8),
            reference=torch.tensor(0.0),
            optimality=torch.tensor(0.0),
            row=torch.tensor(row_number),
            visit=torch.tensor(visit or 0),
            content=torch.tensor(0),
        )

    def filler(self, row_number: int) -> Batch:
        """Returns what stands in for a row that cannot be read: of its shape, without content, and of weight 0."""
        frames, height, width = self.index.row(row_number).latent_shape
        x = torch.zeros(LATENT_CHANNELS, frames, height, width)
        text_mask = torch.zeros(self.data.max_text_tokens, dtype=torch.bool)
        text_mask[0] = True
        return Batch(
            x=x,
            target=x.clone(),
            timestep=torch.tensor(flow.MAX_TIME / 2),
            text=torch.zeros(self.data.max_text_tokens, self.channels),
            text_mask=text_mask,
            x_mask=torch.ones(frames, dtype=torch.bool),
            fps=torch.tensor(self.data.default_fps, dtype=torch.float32),
            weight=torch.tensor(0.0),
            role=torch.tensor(0, dtype=torch.int8),
            reference=torch.tensor(0.0),
            optimality=torch.tensor(0.0),
            row=torch.tensor(row_number),
            visit=torch.tensor(0),
            content=torch.tensor(0),
        )

    def draw_time(self, row_number: int, key: Key, quarter: int) -> float:
        """The timestep in [0, 1000] of a row of this item, drawn from `key`."""
        if self.held_out:
            return flow.MAX_TIME * (quarter + noise.quartile_uniform(*key)) / 4
        row = self.index.row(row_number)
        shift = self._shift(row.height, row.width, row.latent_shape[0])
        return float(flow.draw_time(torch.tensor(noise.time_normal(*key)), shift))

    def _shift(self, height: int, width: int, frames: int) -> float:
        if self.flow.shift == "resolution":
            return flow.resolution_shift(height, width, frames)
        return self.flow.shift

    def null_text(self) -> tuple[Tensor, Tensor]:
        """Features and mask of `data.null_text_path`; see `stored_text`.

        Raises:
            ConfigError: they cannot be used. TransientError: the file system failed for minutes.
        """
        files, path = self.index.files, self.data.null_text_path
        try:
            return read_patiently(lambda: stored_text(files, path, self.channels, self.data.max_text_tokens), files)
        except SampleError as error:  # no sample is at fault, so none is to be replaced
            raise ConfigError(f"data.null_text_path: {error}") from error


@dataclass(frozen=True)
class AnnotatedSamples:
    """Samples that are better or worse, good or bad; a `Reader` whose items are pairs, or single samples.

    The two of a pair share timestep, noise, caption drop and first-frame choice.

    Args:
        samples: reads them.
        rows: int [items, 1 or 2], of the manifest. roles: int [items, 1 or 2], 1 better or good, −1 worse or bad.
        reference: see `with_reference`; None while it is being measured.
    """

    samples: FlowSamples
    rows: np.ndarray
    roles: np.ndarray
    reference: np.ndarray | None = None

    @property
    def item_size(self) -> int:
        return self.rows.shape[1]

    @property
    def shapes(self) -> np.ndarray:
        return self.samples.shapes[self.rows[:, 0]]

    @property
    def seed(self) -> int:
        return self.samples.seed

    def name(self, item: int) -> str:
        """Pair id, or sample id."""
        row = self.samples.index.row(int(self.rows[item, 0]))
        return row.pair_id if self.item_size == 2 else row.sample_id

    def time(self, item: int, visit: int) -> float:
        """The timestep in [0, 1000] of an (item, visit), without reading it."""
        return self.samples.draw_time(int(self.rows[item, 0]), self._key(item, visit), self._quarter(item))

    def fetch(self, items: Sequence[tuple[int, int | None]]) -> None:
        """See `FlowSamples.fetch`."""
        self.samples.fetch_rows(
            (row, self._key(item, visit)) for item, visit in items for row in self.rows[item].tolist()
        )

    def read(self, item: int, visit: int | None) -> list[Batch]:
        """The samples of an item; of a pair the better one first.

        Raises:
            SampleError, ConfigError, TransientError: see `FlowSamples.read`.
            InputError: the reference's error is not known.
        """
        return [
            self._sample(row, role, item, visit)
            for row, role in zip(self.rows[item].tolist(), self.roles[item].tolist(), strict=True)
        ]

    def fillers(self, item: int) -> list[Batch]:
        """Returns what stands in for an item that cannot be read, with its roles; see `FlowSamples.filler`."""
        return [
            self.samples.filler(row)._replace(role=torch.tensor(role, dtype=torch.int8))
            for row, role in zip(self.rows[item].tolist(), self.roles[item].tolist(), strict=True)
        ]

    def alike(self, item: int) -> np.ndarray:
        """Returns the items of the latent shape of `item`, itself included, in ascending order."""
        return self._buckets.rows_of_shape(tuple(self.shapes[item].tolist()))

    @cached_property
    def _buckets(self) -> Buckets:
        return Buckets(self.shapes, sort_by_shape(self.shapes))

    def _quarter(self, item: int) -> int:
        """The quarter of the timesteps that a held-out item is measured in; those of one shape and role take turns."""
        if not self.samples.held_out:
            return 0
        alike = self.alike(item)
        return turn_of(alike[self.roles[alike, 0] == self.roles[item, 0]], item)

    def _sample(self, row: int, role: int, item: int, visit: int | None) -> Batch:
        sample = self.samples.sample(row, visit, self._key(item, visit), self._quarter(item), with_content=True)
        sample = sample._replace(role=torch.tensor(role, dtype=torch.int8))
        return sample if self.reference is None else with_reference(sample, self.reference, self.samples)

    def _key(self, item: int, visit: int | None) -> Key:
        name = self.name(item)
        return (self.seed, f"pair {name}" if self.item_size == 2 else name, visit or 0)


def turn_of(items: np.ndarray, item: int) -> int:
    """Returns which of the four quarters it is the turn of, counting through ascending `items` up to `item`."""
    return int(np.searchsorted(items, item)) % 4


def content_of(latent: Tensor, text: Tensor) -> int:
    """CRC-32 of what a sample gives to the model: the normalised latent fp32 and the text features fp32."""
    return zlib.crc32(latent.contiguous().numpy(), zlib.crc32(text.contiguous().numpy()))


def with_reference(sample: Batch, reference: np.ndarray, samples: FlowSamples) -> Batch:
    """Returns the sample with the frozen reference's flow loss of it.

    Args:
        reference: `data.reference.REFERENCE_DTYPE` [rows, visits].

    Raises:
        InputError: the loss is not known, or the reference was measured on other files.
    """
    row, visit = int(sample.row), int(sample.visit)
    name = samples.name(row)
    if visit >= reference.shape[1] or np.isnan(reference["loss"][row, visit]):
        raise InputError(
            f"the reference's error of sample {name} at visit {visit} is not known, only of {reference.shape[1]} "
            "visits; make them with `make reference CONFIG=…` for as many steps as the run has"
        )
    loss, content = reference[row, visit]
    if content != sample.content:
        raise InputError(
            f"sample {name}: its latent or its caption is not what the reference was measured on; write the reference "
            "anew with `make reference CONFIG=…`, or restore the files"
        )
    return sample._replace(reference=torch.tensor(float(loss), dtype=torch.float32))


@dataclass(frozen=True)
class Sources:
    """The readers of a run. A ref names one of them."""

    readers: tuple[Reader, ...]

    def fetch(self, refs: Sequence[SampleRef]) -> None:
        """Gets what the refs of a micro-batch need at once, where reading one after the other would take longer."""
        for source in sorted({ref.source for ref in refs}):
            self.readers[source].fetch([(ref.item, ref.visit) for ref in refs if ref.source == source])

    def __call__(self, refs: Sequence[SampleRef]) -> Batch:
        """The batch of refs, all of one latent shape; see `FlowSamples.read` for the errors."""
        self.fetch(refs)
        return stack(sample for ref in refs for sample in self.readers[ref.source].read(ref.item, ref.visit))
