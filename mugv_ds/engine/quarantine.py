"""Samples that cannot be read are set aside and others take their place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mugv_ds.data.replace import replacement
from mugv_ds.data.sample import SampleError, UnsafeFileError
from mugv_ds.engine.feed import Batch, FlowSamples, stack

MAX_ATTEMPTS = 10  # replacements tried for one sample


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
    """`FlowSamples` for training: a sample that cannot be read is replaced by another of the same latent shape.

    The replacement is drawn by `data.replace.replacement`: whoever reads the same sample takes the same one.
    """

    samples: FlowSamples

    def __call__(self, picks: Sequence[tuple[int, int]]) -> Reading:
        """The micro-batch of these (row, visit) pairs.

        Raises:
            SampleError: no replacement could be read either. UnsafeFileError: a file asks for more than tensors.
        """
        read = [self._read(row, visit) for row, visit in picks]
        return Reading(stack([batch for batch, _ in read]), tuple(bad for _, bad in read if bad is not None))

    def _read(self, row: int, visit: int) -> tuple[Batch, Quarantined | None]:
        index, seed = self.samples.index, self.samples.data.seed
        taken, reasons = row, []
        for attempt in range(MAX_ATTEMPTS):
            try:
                batch = self.samples.read(taken, visit)
            except UnsafeFileError:
                raise
            except SampleError as error:
                reasons.append(str(error))
                taken = replacement(index, row, seed, visit, attempt)
                if taken is None:
                    break
                continue
            if not reasons:
                return batch, None
            sample_id, replaced_by = (index.row(i).sample_id for i in (row, taken))
            return batch, Quarantined(sample_id, visit, "; ".join(reasons), replaced_by)
        raise SampleError(f"{reasons[0]}; nor could {len(reasons) - 1} samples of its shape be read in its place")
