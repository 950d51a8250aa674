"""Self-attention as a function of q, k, v; the model takes any function of this form."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# (q, k, v), each [B, N, heads, 72] → o of the same shape; bidirectional, softmax scale 72^-0.5.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled dot-product attention.

    Args:
        q: [B, N, heads, 72]. k, v: [B, M, heads, 72].
        key_mask: bool [B, M], False for keys that take no part.
    Returns:
        [B, N, heads, 72].
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return o.transpose(1, 2)
