"""FlashAttention-4 (flash_attn.cute) at head_dim 72, with its gradient of q corrected and a backward loop of our own.

On Hopper the library's backward kernel accumulates dq in tiles whose head dimension is rounded up to a multiple of 16
(80 for 72), while its postprocessing kernel, which converts them, assumes a multiple of 32 (96). dq is then wrong, and
nothing says so; o, dk and dv are right. The postprocessing kernel takes the multiple as a keyword, so it is given 16.
(The preprocessing kernel takes it too, to clear the accumulator. It clears enough as it is, and with 16 it corrupts dk
and dv at some lengths.)

For head dimensions up to 80 the backward loop is that of `flash4_backward`, where it fits the installed release.

A row of 72 channels is 144 bytes, and memory moves 32 bytes at once, so every second row would start in the middle of
such a sector. Rows are therefore kept 160 bytes apart (`ROW`).

Shape suffixes: B batch, N tokens (queries), L keys, H heads, d = 72 head dimension.
"""

import dataclasses
import functools
import importlib
import inspect
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_kernels.qk_norm_rope import ROW

_LIBRARY = "flash_attn.cute.interface"
_PADDED = 96  # head dimension of `flash4_padded`
QUERIES = 65_536  # most queries that go through the backward pass together; see `_backward`
_HOOK, _KEYWORD = "_bwd_postprocess_convert", "hdim_multiple_of"


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes bidirectional attention with the softmax scale 72^-½, on Hopper or Blackwell.

    Args:
        q, k, v: [B, N, H, 72] in bf16 or fp16.
    Returns:
        [B, N, H, 72].
    Raises:
        ImportError: flash-attn-4 is not installed.
        NotImplementedError: it is a release whose dq cannot be corrected; `flash4_padded` is right there too.
    """
    return _Separate.apply(q, k, v)


def flash4_packed(qkv: Tensor, tokens: int) -> Tensor:
    """Computes the attention of `flash4` on q, k and v in one tensor, which saves copying them and their gradients.

    Args:
        qkv: [B, N, 3, H, 72], of which `qk_norm_rope` returns one for each rank. Its gradient is one tensor too.
        tokens: how many tokens take part, the first ones; the others are padding.
    Returns:
        o [B, N, H, 72], zero for padding.
    Raises:
        As `flash4`.
    """
    return _Packed.apply(qkv, tokens)


def spaced_rows(x: Tensor) -> Tensor:
    """Returns x [..., d] if its rows start at multiples of 32 bytes, else a copy with rows `ROW` elements apart."""
    if x.stride(-1) == 1 and all(stride * x.element_size() % 32 == 0 for stride in x.stride()[:-1]):
        return x
    return x.new_empty(*x.shape[:-1], ROW)[..., : x.shape[-1]].copy_(x)


class _Separate(torch.autograd.Function):
    """`flash4` for q, k and v in three tensors."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = map(spaced_rows, (q, k, v))
        o, log_sum, *_ = _interface()._flash_attn_fwd(q, k, v, return_lse=True)
        ctx.save_for_backward(q, k, v, o, log_sum)
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, log_sum = ctx.saved_tensors
        gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        return _backward(q, k, v, o, log_sum, do, *gradients)


class _Packed(torch.autograd.Function):
    """`flash4_packed`, for q, k and v in one tensor."""

    @staticmethod
    def forward(ctx, qkv: Tensor, tokens: int) -> Tensor:
        o, log_sum = packed_forward(qkv, tokens)
        ctx.save_for_backward(qkv, o, log_sum)
        ctx.tokens = tokens
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, None]:
        return packed_backward(do, *ctx.saved_tensors, ctx.tokens), None


def packed_forward(qkv: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns o of `flash4_packed`, and the logarithm of the softmax's denominator [B, H, tokens] fp32."""
    B, N, _, heads, head_dim = qkv.shape
    o = qkv.new_empty(B, N, heads, head_dim)
    o[:, tokens:].zero_()
    _, log_sum, *_ = _interface()._flash_attn_fwd(*qkv[:, :tokens].unbind(2), return_lse=True, out=o[:, :tokens])
    return o, log_sum


def packed_backward(do: Tensor, qkv: Tensor, o: Tensor, log_sum: Tensor, tokens: int) -> Tensor:
    """Returns the gradient of qkv from that of o, and from what `packed_forward` returned."""
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    gradient[:, tokens:].zero_()
    tensors, gradients = (x[:, :tokens].unbind(2) for x in (qkv, gradient))
    _backward(*tensors, o[:, :tokens], log_sum, do[:, :tokens], *gradients)
    return gradient


def _backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dq, dk and dv, and returns them.

    It takes at most `QUERIES` queries of a head at once. The multiprocessors, each with its block of keys, go through
    the queries out of step, so that all of q, do and dq are wanted at once; they should fit the L2 cache at 0.6 KB a
    query. dk and dv of the parts are summed in fp32.
    """
    parts = -(-q.shape[1] // QUERIES)
    k_sum, v_sum = (x.new_zeros(x.shape, dtype=torch.float32) if parts > 1 else x for x in (dk, dv))
    pieces = (x.tensor_split(parts, dim=1) for x in (q, o, do, dq))
    for q, o, do, d_part, part in zip(*pieces, log_sum.tensor_split(parts, dim=2), strict=True):
        _interface()._flash_attn_bwd(q, k, v, o, spaced_rows(do), part.contiguous(), dq=d_part, dk=dk, dv=dv)
        if parts > 1:
            k_sum += dk
            v_sum += dv
    if parts > 1:
        dk.copy_(k_sum)
        dv.copy_(v_sum)
    return dq, dk, dv


def flash4_padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes the attention of `flash4` with heads padded to 96, for which the library is right as it comes.

    Raises:
        ImportError: flash-attn-4 is not installed.
    """
    head_dim = q.shape[-1]
    q, k, v = (F.pad(x, (0, _PADDED - head_dim)) for x in (q, k, v))
    return importlib.import_module(_LIBRARY).flash_attn_func(q, k, v, softmax_scale=head_dim**-0.5)[0][..., :head_dim]


def flash4_prefix(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Computes attention over the first keys of each sample; torch.compile takes it without a graph break.

    Args:
        q: [B, N, H, 72].
        k, v: [B, L, H, 72]; finite beyond the keys that take part.
        lengths: int32 [B], how many keys take part, at least 1.

    Returns:
        [B, N, H, 72]. The gradients of keys that take no part are undefined, and may be NaN.

    Raises:
        As `flash4`.
    """
    o, _ = _prefix_forward(q, k, v, lengths)
    return o


@torch.library.custom_op("mugv::flash4_prefix", mutates_args=())
def _prefix_forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Returns o, and the logarithm of the softmax's denominator [B, H, N] fp32."""
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
    """Returns dq, dk and dv."""
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
    """Returns the library's module, with its postprocessing corrected and our loop; it is imported when first used."""
    interface = importlib.import_module(_LIBRARY)
    hook = getattr(interface, _HOOK, None)
    if hook is None or _KEYWORD not in inspect.signature(hook).parameters:
        raise NotImplementedError(f"{_LIBRARY}.{_HOOK} takes no {_KEYWORD}")
    setattr(interface, _HOOK, _mended(hook))
    _pipeline(interface)
    return interface


def _pipeline(interface: ModuleType) -> None:
    """Gives the library our backward loop for plain attention with heads of 65 to 80 channels.

    For wider heads the library's own loop is faster.
    """
    try:
        from mugv_kernels.flash4_backward import STAGES, PipelinedBackward
    except ImportError:  # a release with other parts: its own loop serves
        return
    tile, kernel = interface._tile_size_bwd_sm90, interface.FlashAttentionBackwardSm90

    def pipelined_tile(head_dim: int, *args, **kwargs):
        config = tile(head_dim, *args, **kwargs)
        if not 64 < head_dim <= 80:
            return config
        return dataclasses.replace(config, num_stages_Q=STAGES, num_stages_dO=STAGES, num_stages_PdS=STAGES)

    def pipelined_kernel(dtype, head_dim: int, *args, **kwargs):
        if 64 < head_dim <= 80:
            try:
                return PipelinedBackward(dtype, head_dim, *args, **kwargs)
            except NotImplementedError:
                pass
        return kernel(dtype, head_dim, *args, **kwargs)

    interface._tile_size_bwd_sm90, interface.FlashAttentionBackwardSm90 = pipelined_tile, pipelined_kernel


def _mended(hook):
    """Wraps the postprocessing `hook` so that it assumes the accumulator's multiple of 16 on Hopper.

    It does so for head dimensions that multiples of 16 and 32 round up differently; the others are right as they are.
    """
    signature = inspect.signature(hook)

    @functools.wraps(hook)  # keeps the attribute in which the library caches compiled kernels
    def call(*args, **kwargs):
        head_dim = signature.bind(*args, **kwargs).arguments["hdim"]
        if -(-head_dim // 16) % 2 == 1 and torch.cuda.get_device_capability()[0] == 9:
            kwargs[_KEYWORD] = 16
        return hook(*args, **kwargs)

    return call
