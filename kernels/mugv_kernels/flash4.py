"""FlashAttention-4 (flash_attn.cute) at head_dim 72.

On Hopper its backward accumulates dq in tiles whose head dimension is rounded up to a multiple of 16 (80 for 72), while
the kernel that converts them assumes a multiple of 32 (96): dq is wrong, silently, and nothing else is. It takes
the multiple as a keyword, so it is given 16. (The kernel before the backward takes it too, to clear the accumulator; it
clears enough as it is, and at 16 it corrupts dk and dv at some lengths.)
"""

import functools
import importlib
import inspect
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = "flash_attn.cute.interface"
_PADDED = 96
_HOOK, _KEYWORD = "_bwd_postprocess_convert", "hdim_multiple_of"


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bidirectional attention of q, k, v [B, N, heads, 72] in bf16 or fp16 on Hopper or Blackwell; o of that shape.

    Raises:
        ImportError: flash-attn-4 is not installed.
        NotImplementedError: it is a release whose dq cannot be mended; `flash4_padded` is right there too.
    """
    return _interface().flash_attn_func(q, k, v)[0]


def flash4_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with q, k and v padded to a head dimension of 96, for which the library is right as it comes."""
    head_dim = q.shape[-1]
    q, k, v = (F.pad(x, (0, _PADDED - head_dim)) for x in (q, k, v))
    return importlib.import_module(_LIBRARY).flash_attn_func(q, k, v, softmax_scale=head_dim**-0.5)[0][..., :head_dim]


def flash4_prefix(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Attention over the first keys of each sample. torch.compile takes it as it is, without a graph break.

    Args:
        q: [B, N, heads, 72]. k, v: [B, L, heads, 72]; finite beyond the keys that take part.
        lengths: int32 [B], keys that take part, at least 1.

    Returns:
        [B, N, heads, 72]. The gradients of keys that take no part are undefined, and may be NaN.

    Raises:
        As `flash4`.
    """
    o, _ = _prefix_forward(q, k, v, lengths)
    return o


@torch.library.custom_op("mugv::flash4_prefix", mutates_args=())
def _prefix_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """o, and the logarithm of the softmax's denominator [B, heads, N] fp32."""
    o, log_sum, *_ = _interface()._flash_attn_fwd(q, k, v, seqused_k=lengths, return_lse=True)
    return o, log_sum


@_prefix_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    B, N, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, heads, N), dtype=torch.float32)


@torch.library.custom_op("mugv::flash4_prefix_backward", mutates_args=())
def _prefix_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # the library gives the gradients their strides
    return _interface()._flash_attn_bwd(q, k, v, o, do, log_sum, seqused_k=lengths)


@_prefix_backward.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _prefix_save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths = inputs
    o, log_sum = output
    ctx.save_for_backward(q, k, v, o, log_sum, lengths)
    ctx.mark_non_differentiable(log_sum)


def _prefix_differentiate(ctx, do: Tensor, _) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_prefix_backward(do, *ctx.saved_tensors), None


_prefix_forward.register_autograd(_prefix_differentiate, setup_context=_prefix_save)


@functools.cache
def _interface() -> ModuleType:
    """The library's module, mended."""
    interface = importlib.import_module(_LIBRARY)
    hook = getattr(interface, _HOOK, None)
    if hook is None or _KEYWORD not in inspect.signature(hook).parameters:
        raise NotImplementedError(f"{_LIBRARY}.{_HOOK} takes no {_KEYWORD}")
    setattr(interface, _HOOK, _mended(hook))
    return interface


def _mended(hook):
    """`hook` with the accumulator's own multiple for head dimensions that 16 and 32 round up differently on Hopper."""
    signature = inspect.signature(hook)

    @functools.wraps(hook)  # keeps the attribute in which the library caches compiled kernels
    def call(*args, **kwargs):
        head_dim = signature.bind(*args, **kwargs).arguments["hdim"]
        if -(-head_dim // 16) % 2 == 1 and torch.cuda.get_device_capability()[0] == 9:
            kwargs[_KEYWORD] = 16
        return hook(*args, **kwargs)

    return call
