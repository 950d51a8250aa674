"""The rounds of learning from a reward: which prompts each plays, which rollouts each step trains on, who reads them.

Rollout `item` is number `item % samples` of round `item // samples`; those of a prompt follow each other. All of a
round have one latent shape. What a round and a step hold is a function of their numbers, so that rollouts that were
made, and paid for, keep their places whenever and wherever the run goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.post_training_schema import RewardSection
from mugv_ds.config.regular_file import open_regular
from mugv_ds.data.buckets import Order
from mugv_ds.data.budget import BatchSize
from mugv_ds.data.manifest import Shape
from mugv_ds.data.noise import gaussian, generator
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.plan import Companion, Plan, PlannedStep, SampleRef, Stream
from mugv_ds.data.readers import Batch, FlowSamples, Key
from mugv_ds.data.sample import Sample, SampleError, read_row
from mugv_ds.files.atomic import write_atomically

LATENT_SUFFIX, VIDEO_SUFFIX = ".safetensors", ".mp4"
STREAM = "rollouts"  # what TensorBoard calls what is trained on
_SOURCE = 1  # of the readers: the real data come first
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Rollout:
    """One rollout. item: see this module. row, visit: of its prompt, as of an `Order`. draw: among the prompt's."""

    item: int
    row: int
    visit: int
    draw: int


@dataclass(frozen=True)
class Round:
    """One round. number: from 0. shape: (T, H, W) of all latents. rollouts: in the order of their items."""

    number: int
    shape: Shape
    rollouts: tuple[Rollout, ...]

    @property
    def items(self) -> list[int]:
        """Returns the items of the rollouts."""
        return [rollout.item for rollout in self.rollouts]


class RoundPlan(Plan):
    """The steps of learning from a reward: every round's rollouts as often as the config says, and real data beside.

    Args:
        section: of the config. steps_per_round: optimizer steps of a round.
        prompts: reads the prompts. sizes: of the steps on their rollouts, by shape. weights: of the prompts.
        companion: the real data.

    Attributes:
        steps_per_round: as given.
        The others are those of `Plan`.

    Raises:
        ConfigError: see `Plan`.
    """

    def __init__(
        self,
        section: RewardSection,
        steps_per_round: int,
        prompts: FlowSamples,
        sizes: Mapping[Shape, BatchSize],
        weights: np.ndarray | None,
        companion: Companion | None,
    ) -> None:
        stream = Stream(STREAM, _SOURCE, prompts.shapes, sizes, weights=weights)
        super().__init__([stream], prompts.seed, companion)
        self.steps_per_round, self._section = steps_per_round, section
        self._prompts = Order(prompts.shapes, dict.fromkeys(sizes, section.prompts), prompts.seed, weights)
        self.round = lru_cache(4)(self._round)
        self._order = lru_cache(4)(self._make_order)

    def identity(self) -> dict[str, str]:
        """See `Plan.identity`."""
        section = self._section
        rounds = f"{section.prompts} × {section.rollouts}, {section.passes} times"
        return super().identity() | {"the rounds": rounds}

    def _round(self, number: int) -> Round:
        step, count = self._prompts.step(number), self._section.rollouts
        first = number * self._section.samples
        rollouts = (
            Rollout(first + at * count + draw, row, visit, draw)
            for at, (row, visit) in enumerate(zip(step.rows, step.visits, strict=True))
            for draw in range(count)
        )
        return Round(number, step.shape, tuple(rollouts))

    def _make_order(self, number: int) -> np.ndarray:
        """The items of a round in the order in which its steps take them: each pass in an order of its own."""
        draw, count = generator("round", self._seed, number), self._section.samples
        passes = [draw.permutation(count) for _ in range(self._section.passes)]
        return number * count + np.concatenate(passes)

    def step(self, position: int) -> PlannedStep:
        """The step at a position; any order of calls gives the same steps. A rollout's visit is the position."""
        number, turn = divmod(position, self.steps_per_round)
        items = np.split(self._order(number), self.steps_per_round)[turn].tolist()
        (stream,), shape = self.streams, self.round(number).shape
        return PlannedStep(
            position=position,
            stream=STREAM,
            source=_SOURCE,
            shape=shape,
            micro=stream.sizes[shape].micro,
            item_size=1,
            refs=tuple(SampleRef(_SOURCE, item, position) for item in items),
            companions=self._draw(position, shape, len(items)),
        )


def round_folder(path: str | Path, number: int) -> Path:
    """Returns the folder of a round in `reward.dir`."""
    return Path(path) / f"round-{number:06d}"


def write_rollout(path: Path, latent: Tensor) -> None:
    """Writes a rollout's latent, fp32 [24, T, H, W]; its file appears when it is whole."""
    with write_atomically(path) as stream:
        stream.write(save({"latent": latent.contiguous()}))


def read_rollout(path: Path, shape: Shape) -> Tensor:
    """Reads what `write_rollout` wrote. shape: (T, H, W).

    Raises:
        InputError: the file is missing, or is not that.
    """
    wanted = (LATENT_CHANNELS, *shape)
    try:
        with open_regular(path) as file:
            if file.seek(0, 2) > 4 * prod(wanted) + _HEADER_BYTES:
                raise InputError(f"{path}: larger than a latent of {list(wanted)}")
            file.seek(0)
            latent = load(file.read())["latent"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; all hosts must share reward.dir") from error
    except (SafetensorError, KeyError) as error:
        raise InputError(f"{path}: not a rollout ({error}); delete it, and it is made again") from None
    if latent.shape != wanted or latent.dtype != torch.float32 or not latent.isfinite().all():
        raise InputError(f"{path}: must be a finite fp32 latent of {list(wanted)}; delete it, and it is made again")
    return latent


@dataclass(frozen=True)
class RolloutSamples:
    """The rollouts of one round, for training; a `Reader` of items as this module numbers them.

    Args:
        prompts: reads the rows that they are of. section: of the config.
        round: which they are; None before the first. optimality: r of each, in the order of their items.
    """

    prompts: FlowSamples
    section: RewardSection
    round: Round | None = None
    optimality: tuple[float, ...] = ()
    item_size = 1

    @property
    def shapes(self) -> np.ndarray:
        """Those of the prompts, which rollouts have too."""
        return self.prompts.shapes

    @property
    def seed(self) -> int:
        return self.prompts.seed

    def name(self, item: int) -> str:
        """Sample id of the prompt, the time that it is played, and which of its rollouts then this is."""
        rollout = self.rollout(item)
        return f"{self.prompts.name(rollout.row)} visit {rollout.visit} rollout {rollout.draw}"

    def path(self, item: int, suffix: str) -> Path:
        """Returns the path of one of a rollout's files, which need not be there."""
        place = item - self.round.rollouts[0].item
        return round_folder(self.section.dir, self.round.number) / f"rollout-{place:05d}{suffix}"

    def first_noise(self, item: int) -> Tensor:
        """The noise that a rollout starts from, fp32 [24, T, H, W]: a function of the seed and the rollout's name."""
        return gaussian(self.seed, f"start of {self.name(item)}", 0, (LATENT_CHANNELS, *self.round.shape))

    def time(self, item: int, visit: int) -> float:
        """The timestep in [0, 1000] of an (item, visit), without reading it."""
        return self.prompts.draw_time(self.rollout(item).row, self._key(item, visit), 0)

    def fetch(self, items: Sequence[tuple[int, int | None]]) -> None:
        """See `FlowSamples.fetch`; rollouts lie on the disk."""

    def prompt(self, item: int) -> Sample:
        """Reads the row that a rollout is of.

        Raises:
            InputError: it cannot be used. TransientError: the file system failed for minutes.
        """
        samples, row = self.prompts, self.rollout(item).row
        given = {"channels": samples.channels, "max_text_tokens": samples.data.max_text_tokens}
        try:
            return read_patiently(lambda: read_row(samples.index, row, **given), samples.index.files)
        except SampleError as error:  # nothing can take the place of what is rolled out
            raise InputError(f"reward.manifest: {error}; repair the file, or leave the row out") from error

    def read(self, item: int, visit: int | None) -> list[Batch]:
        """The rollout, noised, with its optimality and the role 1.

        Raises:
            InputError, TransientError: see `prompt` and `read_rollout`.
        """
        row, key, prompt = self.rollout(item).row, self._key(item, visit), self.prompt(item)
        batch = self.prompts.noised(
            row,
            visit,
            key,
            read_rollout(self.path(item, LATENT_SUFFIX), self.round.shape),
            prompt.text,
            prompt.text_mask,
            t=self.prompts.draw_time(row, key, 0),
            first_frame=self.section.first_frame,
        )
        optimality = self.optimality[item - self.round.rollouts[0].item]
        return [batch._replace(role=torch.tensor(1, dtype=torch.int8), optimality=torch.tensor(optimality))]

    def fillers(self, item: int) -> list[Batch]:
        """What stands in for a rollout that is set aside; see `FlowSamples.filler`."""
        return [self.prompts.filler(self.rollout(item).row)]

    def alike(self, item: int) -> np.ndarray:
        """The item alone: no other takes its place."""
        return np.array([item])

    def rollout(self, item: int) -> Rollout:
        """What an item of the round is."""
        return self.round.rollouts[item - self.round.rollouts[0].item]

    def _key(self, item: int, visit: int | None) -> Key:
        return (self.seed, self.name(item), visit or 0)
