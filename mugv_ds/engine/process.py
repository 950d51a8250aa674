"""What ranks tell one another on the host, over gloo: no device waits for it, and it works where a device is stuck."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mugv_ds.config.errors import ConfigError, PeerError
from mugv_ds.config.schema import TrainConfig


class Agreement:
    """The collectives of the host. All ranks call each, in the same order.

    Args:
        group: of all ranks, on gloo.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.world_size = group, dist.get_rank(group), dist.get_world_size(group)

    def rows(self, row: Tensor) -> Tensor:
        """[world, n]: the row [n] of every rank, of one length and dtype everywhere."""
        rows = torch.empty(self.world_size, len(row), dtype=row.dtype)
        dist.all_gather(list(rows), row, group=self._group)
        return rows

    def values(self, value: Any) -> list[Any]:
        """A value of every rank that JSON can carry."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self.rows(torch.tensor([len(text)])).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        texts = self.rows(padded).numpy()
        return [json.loads(texts[rank, :length].tobytes()) for rank, length in enumerate(lengths)]

    def fail_together(self, failure: Exception | None) -> None:
        """Raises `failure` where there is one and, if any rank has one, PeerError elsewhere."""
        self.raise_if(self.rows(torch.tensor([failure is not None], dtype=torch.uint8)).flatten().tolist(), failure)

    def raise_if(self, failed: Sequence[float], failure: Exception | None) -> None:
        """`fail_together`, when every rank knows already which ones failed."""
        if failure is not None:
            raise failure
        if any(failed):
            first = next(rank for rank, value in enumerate(failed) if value)
            raise PeerError(f"rank {first} failed, and says why")


def check_same_config(config: TrainConfig, agreement: Agreement) -> None:
    """Compares every rank's config with rank 0's.

    Raises:
        ConfigError: on a rank whose config differs; names the keys. PeerError: on the others.
    """
    own = _leaves(config.model_dump(mode="json"))
    first = agreement.values(own if agreement.rank == 0 else None)[0]
    different = [
        f"{key} = {own.get(key)!r} on rank {agreement.rank}, {first.get(key)!r} on rank 0"
        for key in sorted(own.keys() | first.keys())
        if own.get(key) != first.get(key)
    ]
    agreement.fail_together(
        ConfigError(f"{'; '.join(different)}: all ranks must be started with one config") if different else None
    )


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key → value of what is no object."""
    if not isinstance(value, dict):
        return {key: value}
    found = {}
    for name, child in value.items():
        found |= _leaves(child, f"{key}.{name}" if key else name)
    return found
