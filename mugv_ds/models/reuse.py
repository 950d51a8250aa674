"""What a sampler may reuse from one call of a DiT to the next: the text's keys and values, and slow blocks.

Shape suffixes: B batch, N tokens held, L text tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mugv_ds.models.attention import Attention
    from mugv_ds.models.layers import Block, Condition


class RunBlocks(Protocol):
    """Runs a model's blocks one after the other: tokens [B, N, D] → [B, N, D].

    recompute: level of all blocks, or of each, see `Block.forward`.
    """

    def __call__(
        self,
        blocks: Sequence["Block"],
        x_BND: Tensor,
        condition: "Condition",
        attention: "Attention",
        recompute: str | Sequence[str],
    ) -> Tensor: ...


class Model(Protocol):
    """What holds blocks: a DiT, or a stage of one."""

    blocks: Sequence["Block"]
    run_blocks: RunBlocks
    held_text: "HeldText | None"


def run_blocks(
    blocks: Sequence["Block"],
    x_BND: Tensor,
    condition: "Condition",
    attention: "Attention",
    recompute: str | Sequence[str],
) -> Tensor:
    """Runs all blocks, see `RunBlocks`."""
    levels = [recompute] * len(blocks) if isinstance(recompute, str) else recompute
    for block, level in zip(blocks, levels, strict=True):
        x_BND = block(x_BND, condition, attention, level)
    return x_BND


class HeldText:
    """The keys and values of a sampler's texts in every block, which do not change from step to step.

    Args:
        blocks: that they are held for.
    """

    def __init__(self, blocks: Sequence["Block"]) -> None:
        self._blocks = blocks
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def use(self, text_BLD: Tensor) -> None:
        """Hands the blocks the keys and values of the text, which are computed for the first batch of each size."""
        size = len(text_BLD)
        if size not in self._held:
            self._held[size] = [block.cross_attn.keys_values(text_BLD) for block in self._blocks]
        for block, held in zip(self._blocks, self._held[size], strict=True):
            block.cross_attn.held = held

    def release(self) -> None:
        """Lets the blocks compute them again."""
        for block in self._blocks:
            block.cross_attn.held = None


@contextmanager
def hold_text(model: Model) -> Iterator[None]:
    """Computes the text's keys and values once, while batches of one size have the same texts at every call.

    This is exact. It takes 2·B·L·D elements a block.
    """
    model.held_text = HeldText(model.blocks)
    try:
        yield
    finally:
        model.held_text.release()
        model.held_text = None


class FirstBlockCache:
    """Leaves out all blocks but the first where that changes its tokens as it did when all were last run.

    What the others added then is added again. The measure is mean |r − r'| / mean |r'|, where r is what the first block
    adds and r' what it added when all were last run: the "first block cache" of ParaAttention and diffusers. It is an
    approximation, with an error that grows with the threshold.

    Args:
        threshold: largest measure at which blocks are left out.
        total: sums a tensor over the ranks that share the tokens, so that all of them decide alike.

    Attributes:
        calls, skipped: of the model so far, and those of them at which blocks were left out.
    """

    def __init__(self, threshold: float, total: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self._threshold, self._total = threshold, total
        self._first: Tensor | None = None  # [B, N, D], what the first block added when all were last run
        self._others: Tensor | None = None  # [B, N, D], what the others added then
        self.calls = self.skipped = 0

    def __call__(
        self, blocks: Sequence["Block"], x_BND: Tensor, condition: "Condition", attention: "Attention", recompute: str
    ) -> Tensor:
        """Runs the blocks, or the first alone; see `run_blocks`."""
        self.calls += 1
        after_BND = blocks[0](x_BND, condition, attention, recompute)
        added_BND = after_BND - x_BND
        if self._changed_little(added_BND):
            self.skipped += 1
            return after_BND + self._others
        x_BND = run_blocks(blocks[1:], after_BND, condition, attention, recompute)
        self._first, self._others = added_BND, x_BND - after_BND
        return x_BND

    def _changed_little(self, added_BND: Tensor) -> bool:
        if self._first is None or self._first.shape != added_BND.shape:
            return False
        difference, size = (x.abs().sum(dtype=torch.float32) for x in (added_BND - self._first, self._first))
        difference, size = self._total(torch.stack([difference, size])).tolist()
        return difference <= self._threshold * size


@contextmanager
def reuse_blocks(model: Model, cache: FirstBlockCache) -> Iterator[None]:
    """Has the model's blocks run by the cache."""
    model.run_blocks = cache
    try:
        yield
    finally:
        model.run_blocks = run_blocks
