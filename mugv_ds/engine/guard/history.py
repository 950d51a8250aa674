"""What a run has been through, as far as it decides what comes next; part of every checkpoint."""

import math
import statistics
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from mugv_ds.config.schema import GuardSection

_Count = Annotated[int, Field(ge=0)]
_ASIDE_AT = 2  # steps without an update that held an item
_MAX_SUSPECTS = 10_000


class History(BaseModel):
    """The state of the guard. The data position follows from it: order and randomness are functions of the position.

    Attributes:
        jumped: [first, stop) data steps that are not played, in ascending order.
        rollbacks: how often the run went back.
        skips: steps without an update. skips_in_a_row: those since the last update.
        losses: the last finite ones, at most `guard.spike_window`.
        seen: samples of the steps taken. bad: how many of them were replaced.
        suspects: "source:item" → how many steps without an update held it; of the last ones, at most 10,000.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    jumped: list[tuple[_Count, _Count]] = []
    rollbacks: _Count = 0
    skips: _Count = 0
    skips_in_a_row: _Count = 0
    losses: list[float] = []
    seen: _Count = 0
    bad: _Count = 0
    suspects: dict[str, _Count] = {}

    def position(self, step: int) -> int:
        """The data step played after `step` optimizer steps, of those since the run last went back."""
        return step + sum(stop - first for first, stop in self.jumped)

    def suspect(self, items: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Takes up the (source, item)s of a step without an update; returns those that are set aside from now on.

        An item that was in two such steps is: by chance two steps hardly share one.
        """
        counts = dict(self.suspects)
        for source, item in items:
            key = f"{source}:{item}"
            counts[key] = counts.pop(key, 0) + 1  # at the end, as the newest
        new = [item for item in self.aside_of(counts) if item not in self.aside()]
        self.suspects = dict(list(counts.items())[-_MAX_SUSPECTS:])
        return sorted(new)

    def aside(self) -> frozenset[tuple[int, int]]:
        """Returns the (source, item)s that are not read any more."""
        return self.aside_of(self.suspects)

    @staticmethod
    def aside_of(counts: dict[str, int]) -> frozenset[tuple[int, int]]:
        """Returns the (source, item)s that were counted twice."""
        return frozenset(tuple(map(int, key.split(":"))) for key, count in counts.items() if count >= _ASIDE_AT)

    def note(self, loss: float, applied: bool, section: GuardSection) -> str | None:
        """Takes up a step; returns why the run must go back, or None.

        Args:
            loss: of the step, a mean over all ranks. applied: whether the weights were updated.
        """
        if not applied:
            self.skips += 1
            self.skips_in_a_row += 1
            if self.skips_in_a_row >= section.max_skips:
                return f"{self.skips_in_a_row} steps in a row without a finite loss and gradient"
            return None
        self.skips_in_a_row = 0
        if section.spike_factor and len(self.losses) == section.spike_window:
            usual = statistics.median(self.losses)
            if loss > section.spike_factor * usual:
                return f"loss {loss:.4g}, more than {section.spike_factor:g} × the median {usual:.4g}"
        if math.isfinite(loss):
            self.losses = [*self.losses, loss][-section.spike_window :]
        return None

    def rolled_back(self, to: int, from_: int, before: "History") -> None:
        """This, which a checkpoint of step `to` held, goes on in place of `before`, which step `from_` made bad.

        The data steps in between are jumped over; what is counted over the whole run is kept.
        """
        self.jumped = [*self.jumped, (self.position(to), before.position(from_))]
        self.rollbacks, self.skips, self.seen, self.bad, self.suspects = (
            before.rollbacks + 1, before.skips, before.seen, before.bad, before.suspects,
        )  # fmt: skip
        self.skips_in_a_row = 0
