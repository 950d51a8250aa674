"""Ulysses sequence parallelism (Jacobs et al. 2023, DeepSpeed-Ulysses).

Ranks share a sequence: everywhere but in self-attention each holds some of the tokens, and there some of the heads.
Before attention one all-to-all turns q, k and v together from (some tokens, all heads) into (all tokens, some heads);
after it one more turns o back.

Shape suffixes: R ranks of the group, B batch, n tokens held by this rank, N = R·n tokens with padding, H heads,
h = H/R heads of a rank, d = 72 head dimension.
"""

import copy

import torch
import torch.distributed
from deepspeed import comm
from einops import rearrange
from torch import Tensor

from mugv_ds.models.attention import Attention, attend_packed
from mugv_ds.models.kept_attention import Kept


class _AllToAll(torch.autograd.Function):
    """Sends row r of x [ranks, …] to rank r, and puts what came from rank r into row r of the result.

    It is its own inverse, and so its own backward pass. Where the rows of the last dimension have space between them,
    the result's have too, and the space travels along, which saves a copy.
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
    """Returns the contiguous tensor whose rows begin with those of x; where there is none, x made contiguous."""
    row = x.stride(-2)
    whole = torch.Size((*x.shape[:-1], row))
    if x.stride(-1) == 1 and row > x.shape[-1] and x.stride() == torch.empty(whole, device="meta").stride():
        return x.as_strided(whole, x.stride())
    return x.contiguous()


class Ulysses:
    """Computes self-attention over a sequence whose tokens are spread over a group of ranks; a `GroupedAttention`.

    Args:
        group: the ranks that share the sequence; None if `size` is 1.
        size: number of ranks in the group. rank: of this process in the group.
        attention: computes the attention of the heads that this rank gets, over all tokens.

    Attributes:
        tokens: length of the sequence without padding, set before use.
    """

    def __init__(
        self, group: torch.distributed.ProcessGroup | None, size: int, rank: int, attention: Attention
    ) -> None:
        self.group, self.size, self.rank, self.attention = group, size, rank, attention
        self.tokens = 0

    @property
    def head_groups(self) -> int:
        """Returns the number of groups of heads, one for each rank."""
        return self.size

    def keeping(self, kept: Kept) -> "Ulysses":
        """Returns the same with an attention that keeps what it computes, see `KeptAttention.keeping`."""
        keeping = copy.copy(self)
        keeping.attention = self.attention.keeping(kept)
        return keeping

    def total(self, x: Tensor) -> Tensor:
        """Returns the sum of a tensor over the ranks that share the sequence."""
        if self.size == 1:
            return x
        x = x.clone()
        torch.distributed.all_reduce(x, group=self.group)
        return x

    def local_tokens(self, device: torch.device | str = "cpu") -> Tensor:
        """Returns the indices [n] into the sequence of the tokens that this rank holds.

        Every rank holds n = ceil(tokens / size) of them; indices from `tokens` on are padding.
        """
        n = -(-self.tokens // self.size)
        return torch.arange(self.rank * n, (self.rank + 1) * n, device=device)

    def grouped(self, qkv: Tensor) -> Tensor:
        """Attends over all tokens: local q, k, v [R, B, n, 3, H/R, 72] → local o [B, n, H, 72].

        Padding takes no part, and its o is zero.
        """
        if self.size == 1:
            return attend_packed(self.attention, qkv.squeeze(0), self.tokens)
        qkv_BN3hd = rearrange(_AllToAll.apply(qkv, self.group), "rank b n qkv head d -> b (rank n) qkv head d")
        o_BNhd = attend_packed(self.attention, qkv_BN3hd, self.tokens)
        send_RBnhd = rearrange(o_BNhd, "b (rank n) head d -> rank b n head d", rank=self.size)
        return rearrange(_AllToAll.apply(send_RBnhd, self.group), "rank b n head d -> b n (rank head) d")
