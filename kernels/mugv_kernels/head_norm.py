"""RMSNorm of every head (Zhang & Sennrich 2019, eq. 4), which cross-attention applies to q and k.

    n = x / sqrt(mean(x²) + 1e-6),  y = n · w
    dw = Σ over rows of dy · n,  dx = (dy · w − n · mean(dy · w · n)) / sqrt(mean(x²) + 1e-6)

Everything is computed in fp32, whatever the dtype of the tensors. The forward pass reads x once and writes y once; the
backward pass reads x and dy once and writes dx once. It computes the norm again, so only the inputs are saved. The sum
over rows goes through one partial sum a program, without atomics, so that it has the same bits every time.

Shapes: x and y are [..., d] and taken as rows of d = 72 channels; w is [d].
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
_ROWS = 32  # rows, of 72 channels, that a program holds at once
_BLOCKS = 16  # blocks of rows of a backward program: its partial sum of dw is 288 bytes beside 221 KB of traffic


def head_norm_reference(x: Tensor, weight: Tensor) -> Tensor:
    """Does what `head_norm` does in plain PyTorch, in fp32, or in fp64 where x is fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), EPS).to(x.dtype)


def head_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Computes RMSNorm over the last dimension of x.

    It runs the kernel, so it needs CUDA tensors (or Triton's interpreter, TRITON_INTERPRET=1). It is differentiable. A
    tensor that is not contiguous is copied.

    Args:
        x: [..., d].
        weight: [d].

    Returns:
        A tensor of x's shape and dtype, contiguous.

    Raises:
        ValueError: the weight is not as long as the last dimension of x.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {list(weight.shape)}: must be {list(x.shape[-1:])} to go with x {list(x.shape)}")
    return _forward(x, weight)


@torch.library.custom_op("mugv::head_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    _forward_kernel[(triton.cdiv(rows, _ROWS),)](x, weight, y, rows, **_launch(x))
    return y


@_forward.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mugv::head_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dx and dw."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    rows = x.numel() // x.shape[-1]
    programs = triton.cdiv(rows, _ROWS * _BLOCKS)
    sums = x.new_empty((programs, *weight.shape), dtype=torch.float32)
    _backward_kernel[(programs,)](dy, x, weight, dx, sums, rows, BLOCKS=_BLOCKS, **_launch(x))
    return dx, sums.sum(0).to(weight.dtype)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def _launch(x: Tensor) -> dict[str, int | float]:
    return {"EPS": EPS, "D": x.shape[-1], "ROWS": _ROWS, "LANES": triton.next_power_of_2(x.shape[-1])}


if find_spec("triton"):  # not built for every platform; the reference needs none
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        x_ptr, weight_ptr, y_ptr, rows, EPS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
    ):
        """Each program computes ROWS rows."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        lane = tl.arange(0, LANES)[None, :]
        at, mask = row * D + lane, (row < rows) & (lane < D)
        weight = tl.load(weight_ptr + lane, mask=lane < D, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None] * weight
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        dy_ptr,
        x_ptr,
        weight_ptr,
        dx_ptr,
        sums_ptr,
        rows,
        BLOCKS: tl.constexpr,
        EPS: tl.constexpr,
        D: tl.constexpr,
        ROWS: tl.constexpr,
        LANES: tl.constexpr,
    ):
        """Each program computes BLOCKS · ROWS rows; its partial sum of dw goes to sums [programs, D] fp32."""
        program = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, LANES)[None, :]
        weight = tl.load(weight_ptr + lane, mask=lane < D, other=0.0).to(tl.float32)
        dweight = tl.zeros((ROWS, LANES), tl.float32)
        for i in range(BLOCKS):
            row = (program * BLOCKS + i) * ROWS + tl.arange(0, ROWS)[:, None]
            at, mask = row * D + lane, (row < rows) & (lane < D)
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
            inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]
            n = x * inverse_rms
            dweight += dy * n
            dn = dy * weight
            dx = inverse_rms * (dn - n * (tl.sum(dn * n, axis=1) / D)[:, None])
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        lane = tl.arange(0, LANES)
        tl.store(sums_ptr + program * D + lane, tl.sum(dweight, axis=0), mask=lane < D)
