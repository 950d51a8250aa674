"""Which of the monitors' readings are beyond their bounds; see `engine.monitor`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mugv_ds.config.operation_schema import MonitorSection

# Reading → what a line calls it.
_NAMES = {
    "activation": "largest activation of the residual stream",
    "channel_share": "share of the largest channel in the residual stream's energy",
    "mean_share": "share of the token mean in the residual stream's energy",
    "logit": "largest q·k before the softmax",
}


class Alarm(NamedTuple):
    """A reading that is beyond its bound in some `blocks`. block, value: the worst. key: of the bound in the config."""

    monitor: str
    block: int
    value: float
    blocks: int
    key: str
    bound: float

    def __str__(self) -> str:
        more = f", and so are {self.blocks - 1} more blocks" if self.blocks > 1 else ""
        above = f"above {self.key} = {self.bound:g}{more}"
        return f"{_NAMES[self.monitor]} is {self.value:.4g} in block {self.block}, {above}"


def alarms(readings: Mapping[str, Sequence[float]], section: MonitorSection) -> Iterator[Alarm]:
    """Yields what is beyond its bound. readings: by name, a number a block; what is not a number is beyond."""
    for name, of_blocks in readings.items():
        key = f"max_{name}"
        bound = getattr(section, key)
        beyond = {block: value for block, value in enumerate(of_blocks) if not value <= bound}
        if beyond:
            worst = max(beyond, key=lambda block: (beyond[block] != beyond[block], beyond[block]))
            yield Alarm(name, worst, beyond[worst], len(beyond), f"monitor.{key}", bound)
