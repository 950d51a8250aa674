"""The attention backends: self-attention as a function of q, k, v, and cross-attention with a mask of keys.

The model takes any function of these two forms. The heads are 72 wide, which no library is built for: they pad, and
differ in speed by more than a factor of two. See `choose_attention` for how a run finds the fastest one that is right
on its machine.

Shape suffixes: B batch, N tokens, L keys (text tokens), H heads, d = 72 head dimension.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# (q, k, v), each [B, N, H, 72] → o of the same shape; bidirectional, with the softmax scale 72^-0.5.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# (q [B, N, H, 72], k and v [B, L, H, 72], key_mask bool [B, L]) → o [B, N, H, 72]. Keys with False take no part,
# whatever finite numbers they hold; every sample has at least one with True.
MaskedAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_MASKED = -30_000.0  # added to q·k before the scale; −3,500 after it
_MAX_PARTS = 32  # most parts that `flash4_masked` cuts the queries into
_MULTIPROCESSORS, _KEY_BLOCK = 132, 128  # of an H100 or H200; keys that one of them takes in the backward pass
# Queries whose attention takes as long as a part's copies of keys and values, and summing their gradients: on an H200
# 66 copies took 0.6 ms, and the attention of 16,566 queries 1.4 (`kernels/bench/block.py --profile --cases 360p-2s`).
_COPY = 110
_MAX_SAMPLES = 256  # most samples, or parts, that FlashAttention-4's backward pass takes with a prefix of the keys


@runtime_checkable
class GroupedAttention(Protocol):
    """Self-attention that takes its heads in `head_groups` groups, laid out one after the other.

    Ulysses is one: each group is what it sends to one rank.
    """

    head_groups: int

    def grouped(self, qkv: Tensor) -> Tensor:
        """Attends: q, k and v as [groups, B, N, 3, H/groups, 72] → o [B, N, H, 72]."""


@runtime_checkable
class PackedAttention(Protocol):
    """Self-attention that takes q, k and v in one tensor and returns their gradients in one, which saves a copy."""

    def packed(self, qkv: Tensor, tokens: int) -> Tensor:
        """Attends among the first `tokens` tokens: [B, N, 3, H, 72] → o [B, N, H, 72], zero for the other tokens."""


def attend_packed(attention: Attention, qkv: Tensor, tokens: int) -> Tensor:
    """Runs any `attention` on q, k and v in one tensor, with the arguments and result of `PackedAttention.packed`."""
    if isinstance(attention, PackedAttention):
        return attention.packed(qkv, tokens)
    o = attention(*qkv[:, :tokens].unbind(2))
    padding = qkv.shape[1] - tokens
    return F.pad(o, (0, 0, 0, 0, 0, padding)) if padding else o  # padding by nothing would copy


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Runs PyTorch's scaled dot-product attention, with the kernel that PyTorch picks."""
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """Runs a `MaskedAttention` through PyTorch's kernels, of which the fast ones take no mask.

    The mask becomes one more channel, which is 1 in q and very negative in masked keys: it takes their score to where
    its exponential is exactly 0. The heads become 80 wide, to which kernels for 72 round up anyway.
    """
    head_dim, spare = q.shape[-1], -q.shape[-1] % 8 or 8
    bias = torch.where(key_mask, 0.0, _MASKED).to(k.dtype)[:, :, None, None].expand(*k.shape[:-1], 1)
    q = F.pad(F.pad(q, (0, 1), value=1.0), (0, spare - 1))
    k = F.pad(torch.cat([k, bias], dim=-1), (0, spare - 1))
    v = F.pad(v, (0, spare))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5).transpose(1, 2)[..., :head_dim]


def query_parts(batch: int, tokens: int, keys: int, heads: int) -> int:
    """Returns into how many equal parts `flash4_masked` cuts the queries.

    With n parts there are n·w pieces of work a multiprocessor, w = batch · heads · blocks of keys / multiprocessors. Of
    the divisors of `tokens` it takes the one with the least

        ⌈n·w⌉ / (n·w) + n · COPY / tokens

    The first summand counts those that idle in the last round, the second what a part copies.

    Args:
        batch, tokens, keys, heads: of the queries and keys that attend.
    """
    pieces = batch * heads * -(-keys // _KEY_BLOCK)
    best, least = 1, float("inf")
    for parts in range(1, min(_MAX_PARTS, max(_MAX_SAMPLES // batch, 1)) + 1):
        rounds = -(-parts * pieces // _MULTIPROCESSORS)
        cost = rounds * _MULTIPROCESSORS / (parts * pieces) + parts * _COPY / tokens
        if tokens % parts == 0 and cost < least:
            best, least = parts, cost
    return best


def flash4_masked(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor) -> Tensor:
    """Runs a `MaskedAttention` through FlashAttention-4, which takes a prefix of a sample's keys in place of a mask.

    The keys that take part are moved to the front, which copies L keys and leaves the many queries as they are. On
    Hopper the library's backward pass gives each block of 128 keys of a head to one multiprocessor, for all queries:
    300 keys and 48 heads are 144 such pieces of work on 132 multiprocessors, so that most idle in the second round. The
    queries are therefore handed over in equal parts, as if they were samples, and autograd sums the gradients of the
    repeated k and v; see `query_parts`.
    """
    from mugv_kernels.flash4 import flash4_prefix

    batch, tokens = q.shape[:2]
    if batch > _MAX_SAMPLES:
        parts = zip(*(x.split(_MAX_SAMPLES) for x in (q, k, v, key_mask)), strict=True)
        return torch.cat([flash4_masked(*part) for part in parts])
    lengths = key_mask.sum(dim=1, dtype=torch.int32)
    order = key_mask.int().argsort(dim=1, descending=True, stable=True)[:, :, None, None]
    spare = (torch.arange(k.shape[1], device=k.device) >= lengths[:, None])[:, :, None, None]
    # Filling what takes no part also clears its gradient, which the kernel leaves undefined.
    k, v = (x.take_along_dim(order, dim=1).masked_fill(spare, 0) for x in (k, v))
    parts = query_parts(batch, tokens, k.shape[1], q.shape[2])
    k, v, lengths = (x.repeat_interleave(parts, dim=0) for x in (k, v, lengths))
    o = flash4_prefix(q.reshape(batch * parts, tokens // parts, *q.shape[2:]), k, v, lengths)
    return o.reshape(q.shape)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Runs cuDNN's fused attention through PyTorch."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Runs FlashAttention-2: the flash-attn package where it is installed, else PyTorch's copy of it."""
    if importlib.util.find_spec("flash_attn_2_cuda") is not None:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v)


class Flash4:
    """FlashAttention-4 with its dq corrected for head_dim 72 and our backward loop; see `mugv_kernels.flash4`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from mugv_kernels.flash4 import flash4

        return flash4(q, k, v)

    def packed(self, qkv: Tensor, tokens: int) -> Tensor:
        from mugv_kernels.flash4 import flash4_packed

        return flash4_packed(qkv, tokens)


def flash4_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Runs FlashAttention-4 over heads padded to 96; see `mugv_kernels.flash4`."""
    from mugv_kernels.flash4 import flash4_padded as padded

    return padded(q, k, v)


def te(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Runs Transformer Engine's attention."""
    return _te_module(q.shape[2], q.shape[3])(q, k, v).view(q.shape)


@functools.cache
def _te_module(heads: int, head_dim: int) -> torch.nn.Module:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(heads, head_dim, qkv_format="bshd", attn_mask_type="no_mask")


BACKENDS: dict[str, Attention] = {
    "flash4": Flash4(),
    "flash4_padded": flash4_padded,
    "flash2": flash2,
    "cudnn": cudnn,
    "sdpa": sdpa,
    "te": te,
}


MASKED_BACKENDS: dict[str, MaskedAttention] = {"flash4": flash4_masked, "sdpa": masked_attention}


def installed_backends(device: torch.device) -> dict[str, Attention]:
    """Returns the self-attention backends that can be tried on this device, by name; on a CPU that is `sdpa` alone."""
    if device.type != "cuda":
        return {"sdpa": sdpa}
    needs = {"flash4": "flash_attn.cute", "flash4_padded": "flash_attn.cute", "te": "transformer_engine.pytorch"}
    return {name: backend for name, backend in BACKENDS.items() if name not in needs or _installed(needs[name])}


def installed_masked_backends(device: torch.device) -> dict[str, MaskedAttention]:
    """Returns the backends for attention with a mask of keys that can be tried on this device, by name."""
    return {name: MASKED_BACKENDS[name] for name in installed_backends(device) if name in MASKED_BACKENDS}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
