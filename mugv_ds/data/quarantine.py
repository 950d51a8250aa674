"""Samples that cannot be read are set aside and others take their place."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mugv_ds.data.plan import Pick
from mugv_ds.data.readers import Batch, Sources, stack
from mugv_ds.data.replace import replacement
from mugv_ds.data.sample import SampleError, UnsafeFileError

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
    """`Sources` for training: a unit that cannot be read is replaced by another of its source and latent shape.

    The replacement is drawn by `data.replace.replacement`: whoever reads the same unit takes the same one.
    """

    sources: Sources

    def __call__(self, picks: Sequence[Pick]) -> Reading:
        """The micro-batch of these picks.

        Raises:
            SampleError: no replacement could be read either. UnsafeFileError: a file asks for more than tensors.
        """
        read = [self._read(pick) for pick in picks]
        batch = stack(sample for samples, _ in read for sample in samples)
        return Reading(batch, tuple(bad for _, bad in read if bad is not None))

    def _read(self, pick: Pick) -> tuple[list[Batch], Quarantined | None]:
        reader = self.sources.readers[pick.source]
        taken, name, visit, reasons = pick.unit, reader.name(pick.unit), pick.visit, []
        for attempt in range(MAX_ATTEMPTS):
            try:
                samples = reader.read(taken, visit)
            except UnsafeFileError:
                raise
            except SampleError as error:
                reasons.append(str(error))
                where = {"seed": reader.seed, "name": name, "visit": visit or 0, "attempt": attempt}
                taken = replacement(reader.shapes, pick.unit, **where)
                if taken is None:
                    break
                continue
            if not reasons:
                return samples, None
            return samples, Quarantined(name, visit or 0, "; ".join(reasons), reader.name(taken))
        raise SampleError(f"{reasons[0]}; nor could {len(reasons) - 1} samples of its shape be read in its place")
