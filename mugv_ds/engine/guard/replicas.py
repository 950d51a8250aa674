"""Whether ranks that must hold the same weights do."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

_CHUNK = 1 << 24  # elements worked on at once, which bounds the temporaries
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Iterable[Tensor]) -> int:
    """64 bits that change whenever a single element of one of the tensors does.

    Σ bits(xᵢ) · (2i + 1) mod 2⁶⁴, i counting all elements: an odd factor is invertible, so no change of one term
    vanishes. Computed where the tensors are.
    """
    total, counted = None, 0
    for tensor in tensors:
        bits = tensor.detach().flatten().view(_INTEGERS[tensor.element_size()])
        for chunk in bits.split(_CHUNK):
            factors = torch.arange(counted, counted + len(chunk), device=chunk.device).mul_(2).add_(1)
            part = factors.mul_(chunk).sum()
            total = part if total is None else total + part
            counted += len(chunk)
    return 0 if total is None else int(total)


def odd_ones(prints: list[int], stages: list[int]) -> list[int]:
    """The ranks that differ from most of their stage; all of a stage that has no majority.

    Args:
        prints: fingerprint of every rank. stages: pipeline stage of every rank; those of one must agree.
    """
    odd = []
    for stage in sorted(set(stages)):
        ranks = [rank for rank, of in enumerate(stages) if of == stage]
        (common, votes), *others = Counter(prints[rank] for rank in ranks).most_common()
        if others:
            majority = common if 2 * votes > len(ranks) else None
            odd += [rank for rank in ranks if prints[rank] != majority]
    return odd
