"""FlashAttention-4 (flash_attn.cute) at head_dim 72.

On Hopper its backward accumulates dq in tiles whose head dimension is rounded up to a multiple of 16 (80 for 72), while
the kernels before and after it assume a multiple of 32 (96): dq is wrong, silently, and nothing else is. Both take the
multiple as a keyword, so they are given 16. Where a release has not these functions, q, k and v are padded to 96, for
which the library is right.
"""

import functools
import importlib
import inspect
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

_PADDED = 96
_HOOKS = ("_bwd_preprocess", "_bwd_postprocess_convert")
_KEYWORD = "hdim_multiple_of"


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bidirectional attention of q, k, v [B, N, heads, 72] in bf16 or fp16 on Hopper or Blackwell; o of that shape.

    Raises:
        ImportError: flash-attn-4 is not installed.
    """
    interface, exact = _interface()
    head_dim = q.shape[-1]
    scale = head_dim**-0.5
    if exact or not _needs_mending(head_dim):
        return interface.flash_attn_func(q, k, v, softmax_scale=scale)[0]
    q, k, v = (F.pad(x, (0, _PADDED - head_dim)) for x in (q, k, v))
    return interface.flash_attn_func(q, k, v, softmax_scale=scale)[0][..., :head_dim]


def _needs_mending(head_dim: int) -> bool:
    """Whether multiples of 16 and of 32 round this head dimension differently, on the chip where that matters."""
    return -(-head_dim // 16) * 16 != -(-head_dim // 32) * 32 and torch.cuda.get_device_capability()[0] == 9


@functools.cache
def _interface() -> tuple[ModuleType, bool]:
    """The library's module, and whether its dq could be mended."""
    interface = importlib.import_module("flash_attn.cute.interface")
    found = [getattr(interface, name, None) for name in _HOOKS]
    if not all(hook is not None and _KEYWORD in inspect.signature(hook).parameters for hook in found):
        return interface, False
    for name, hook in zip(_HOOKS, found, strict=True):
        setattr(interface, name, _mended(hook))
    return interface, True


def _mended(hook):
    """`hook` with the accumulator's own multiple for head dimensions that need it."""
    parameters = inspect.signature(hook)

    @functools.wraps(hook)  # keeps the attribute in which the library caches compiled kernels
    def call(*args, **kwargs):
        given = parameters.bind(*args, **kwargs).arguments
        if _needs_mending(given.get("head_dim", given.get("hdim"))):
            kwargs[_KEYWORD] = 16
        return hook(*args, **kwargs)

    return call
