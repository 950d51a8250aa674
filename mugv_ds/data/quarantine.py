"""Samples that cannot be read are set aside and others take their place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mugv_ds.data.noise import generator
from mugv_ds.data.plan import SampleRef
from mugv_ds.data.readers import Batch, Sources, stack
from mugv_ds.data.sample import SampleError, UnsafeFileError

MAX_ATTEMPTS = 10  # replacements tried for one sample
FILLER = "a filler of weight 0"  # what takes the place where no sample does


class Quarantined(NamedTuple):
    """A sample that was not used, and the one that was."""

    sample_id: str
    visit: int
    why: str  # names the file
    replaced_by: str


class Reading(NamedTuple):
    """A micro-batch, and what was set aside for it."""

    batch: Batch
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True)
class Replacing:
    """`Sources` for training: an item that cannot be read is replaced by another of its source and latent shape.

    The replacement is drawn by `replacement`: whoever reads the same item takes the same one. Where none can be read
    either, a filler of weight 0 keeps the step whole.

    Args:
        sources: reads the items.
        aside: (source, item) of those that are not to be read any more, because they spoilt steps.
    """

    sources: Sources
    aside: frozenset[tuple[int, int]] = frozenset()

    def __call__(self, refs: Sequence[SampleRef]) -> Reading:
        """The micro-batch of these refs.

        Raises:
            UnsafeFileError: a file asks for more than tensors.
            ConfigError, InputError, TransientError: see `data.readers`.
        """
        self.sources.fetch(refs)
        read = [self._read(ref) for ref in refs]
        batch = stack(sample for samples, _ in read for sample in samples)
        return Reading(batch, tuple(bad for _, bad in read if bad is not None))

    def _read(self, ref: SampleRef) -> tuple[list[Batch], Quarantined | None]:
        reader = self.sources.readers[ref.source]
        taken, name, visit, reasons = ref.item, reader.name(ref.item), ref.visit, []
        for attempt in range(MAX_ATTEMPTS):
            try:
                if (ref.source, taken) in self.aside:
                    raise SampleError(f"{reader.name(taken)}: the steps that held it had no finite loss and gradient")
                samples = reader.read(taken, visit)
            except UnsafeFileError:
                raise
            except SampleError as error:
                reasons.append(str(error))
                where = {"seed": reader.seed, "name": name, "visit": visit or 0, "attempt": attempt}
                taken = replacement(reader.alike(ref.item), ref.item, **where)
                if taken is None:
                    break
                continue
            if not reasons:
                return samples, None
            return samples, Quarantined(name, visit or 0, "; ".join(reasons), reader.name(taken))
        why = f"{reasons[0]}; nor could {len(reasons) - 1} samples of its shape be read in its place"
        return reader.fillers(ref.item), Quarantined(name, visit or 0, why, FILLER)


def replacement(alike: np.ndarray, item: int, *, seed: int, name: str, visit: int, attempt: int) -> int | None:
    """Returns another item with the latent shape of `item`; None if there is none.

    It follows from (seed, name, visit, attempt) alone, so every process that reads the item takes the same one, and a
    resumed run takes it again.

    Args:
        alike: int [n], ascending, the items of its shape and itself. item: the one that cannot be read, called `name`.
        visit: how many times it was visited before.
        attempt: from 0, raised when the replacement cannot be read either.
    """
    if len(alike) < 2:
        return None
    drawn = int(generator("replacement", seed, name, visit, attempt).integers(len(alike) - 1))
    return int(alike[drawn + (drawn >= np.searchsorted(alike, item))])  # of the others, the one at this place
