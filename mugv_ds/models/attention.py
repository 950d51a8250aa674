"""Self-attention as a function of q, k, v; the model takes any function of this form.

The heads are 72 wide, which no library is built for: they pad, and differ in speed by more than a factor of two. See
`choose_attention` for how a run finds the fastest one that is right on its machine.
"""

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# (q, k, v), each [B, N, heads, 72] → o of the same shape; bidirectional, softmax scale 72^-0.5.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """PyTorch's scaled dot-product attention, with the kernel that PyTorch picks.

    Args:
        q: [B, N, heads, 72]. k, v: [B, M, heads, 72].
        key_mask: bool [B, M], False for keys that take no part.
    Returns:
        [B, N, heads, 72].
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return o.transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's fused attention through PyTorch."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2: the flash-attn package where it is installed, else PyTorch's copy of it."""
    if importlib.util.find_spec("flash_attn_2_cuda") is not None:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v)


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-4, with its dq mended for head_dim 72; see `mugv_kernels.flash4`."""
    from mugv_kernels.flash4 import flash4 as mended

    return mended(q, k, v)


def te(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Transformer Engine's attention."""
    return _te_module(q.shape[2], q.shape[3])(q, k, v).view(q.shape)


@functools.cache
def _te_module(heads: int, head_dim: int) -> torch.nn.Module:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(heads, head_dim, qkv_format="bshd", attn_mask_type="no_mask")


BACKENDS: dict[str, Attention] = {"flash4": flash4, "flash2": flash2, "cudnn": cudnn, "sdpa": sdpa, "te": te}


def installed_backends(device: torch.device) -> dict[str, Attention]:
    """The backends that can be tried on this device; on a CPU that is `sdpa`."""
    if device.type != "cuda":
        return {"sdpa": sdpa}
    needs = {"flash4": "flash_attn.cute", "te": "transformer_engine.pytorch"}
    return {name: backend for name, backend in BACKENDS.items() if name not in needs or _installed(needs[name])}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
