"""What the ranks tell one another about a checkpoint.

Over gloo groups of their own, so that a background thread never touches the groups that training uses; as JSON, so
that no rank runs what another sent.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from mugv_ds.config.errors import CheckpointError, PeerError


class Ranks:
    """All ranks of the run. They make it together, and call each method together and in the same order."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        self._poll_group = dist.new_group(backend="gloo")  # used while a thread uses the other

    def gather(self, message: Any) -> list[Any]:
        """The messages of all ranks, in their order; a message is what JSON can hold."""
        mine = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - mine.numel())), group=self._group)
        return [json.loads(bytes(text[: int(size)].numpy())) for text, size in zip(texts, sizes, strict=True)]

    def agree(self, function: Callable[[], Any]) -> list[Any]:
        """Calls `function` on every rank; the results of all, or an error on all if it failed on any.

        Raises:
            CheckpointError: on rank 0, naming the ranks on which it failed and why. PeerError: on the others.
        """
        failure = None
        try:
            message = {"result": function()}
        except Exception as error:
            failure, message = error, {"error": str(error) or repr(error)}
        messages = self.gather(message)
        failures = {}  # error → ranks that met it
        for rank, message in enumerate(messages):
            if "error" in message:
                failures.setdefault(message["error"], []).append(str(rank))
        if failures:
            text = "; ".join(
                error if len(ranks) == self.size else f"rank {', '.join(ranks)}: {error}"
                for error, ranks in failures.items()
            )
            raise (CheckpointError if self.rank == 0 else PeerError)(text) from failure
        return [message["result"] for message in messages]

    def first(self, function: Callable[[], Any]) -> Any:
        """Calls `function` on rank 0; its result on all ranks.

        Raises:
            CheckpointError: on rank 0, if it failed. PeerError: on the others.
        """
        return self.agree(function if self.rank == 0 else lambda: None)[0]

    def all_true(self, value: bool) -> bool:
        """Whether a value is true on all ranks; a thread may use the other methods meanwhile."""
        flag = torch.tensor([value], dtype=torch.uint8)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._poll_group)
        return bool(flag)
