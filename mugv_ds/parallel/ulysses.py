"""Ulysses sequence parallelism (Jacobs et al. 2023): tokens are sharded everywhere but in self-attention, heads there.

Before attention one all-to-all turns q, k and v together from (some tokens, all heads) into (all tokens, some heads);
after it one more turns o back.
"""

import torch
import torch.distributed
from deepspeed import comm
from einops import rearrange
from torch import Tensor

from mugv_ds.models.attention import Attention, attend_packed


class _AllToAll(torch.autograd.Function):
    """Sends row r of x [ranks, …] to rank r; row r of the result came from rank r. It is its own inverse.

    Where the last side is spaced out, the result's is too, and what lies between travels along: no copy is made.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        width = x.shape[-1]
        x = _with_spaces(x)
        received = torch.empty_like(x)
        comm.all_to_all_single(received, x, group=group)
        return received[..., :width]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None


def _with_spaces(x: Tensor) -> Tensor:
    """The contiguous tensor of which x is the beginning of every row; x itself, or a contiguous copy, if it is not."""
    row = x.stride(-2)
    whole = torch.Size((*x.shape[:-1], row))
    if x.stride(-1) == 1 and row > x.shape[-1] and x.stride() == torch.empty(whole, device="meta").stride():
        return x.as_strided(whole, x.stride())
    return x.contiguous()


class Ulysses:
    """Self-attention over a sequence whose tokens are spread over a group of ranks; a `GroupedAttention`.

    Args:
        group: the ranks that share the sequence; None if `size` is 1.
        size, rank: of this process in the group.
        attention: computes attention of the heads that this rank gets, over all tokens.

    Attributes:
        tokens: length of the sequence, set before use.
    """

    def __init__(
        self, group: torch.distributed.ProcessGroup | None, size: int, rank: int, attention: Attention
    ) -> None:
        self.group, self.size, self.rank, self.attention = group, size, rank, attention
        self.tokens = 0

    @property
    def head_groups(self) -> int:
        """Groups of heads, one for each rank."""
        return self.size

    def local_tokens(self, device: torch.device | str = "cpu") -> Tensor:
        """Indices [n] of the tokens this rank holds.

        Every rank holds n = ceil(tokens / size); indices from `tokens` on are padding.
        """
        n = -(-self.tokens // self.size)
        return torch.arange(self.rank * n, (self.rank + 1) * n, device=device)

    def grouped(self, qkv: Tensor) -> Tensor:
        """Local q, k, v [ranks, B, n, 3, heads/ranks, 72] → local o [B, n, heads, 72] of attention over all tokens.

        Padding takes no part; its o is zero.
        """
        if self.size == 1:
            return attend_packed(self.attention, qkv.squeeze(0), self.tokens)
        qkv = rearrange(_AllToAll.apply(qkv, self.group), "rank b n qkv head d -> b (rank n) qkv head d")
        o = attend_packed(self.attention, qkv, self.tokens)
        send = rearrange(o, "b (rank n) head d -> rank b n head d", rank=self.size)
        return rearrange(_AllToAll.apply(send, self.group), "rank b n head d -> b n (rank head) d")
