"""The backward pass through GELU (tanh form, Hendrycks & Gimpel 2016, section 2) between two linears of a feed-forward.

    GELU(x) = x · s,  s = sigmoid(2u) = (1 + tanh u) / 2,  u = √(2/π) · (x + 0.044715 x³)
    GELU'(x) = s + x · s · (1 − s) · 2u',  u' = √(2/π) · (1 + 3 · 0.044715 x²)

From x and the gradient of GELU(x) it computes three things in one pass and in place: GELU(x), which the second linear's
weight gradient needs, takes the place of x; the gradient of x takes the place of the gradient; and the sum of the
latter over rows is the gradient of the first linear's bias. That moves four times the bytes of x. GELU (2), its
gradient (3) and the sum (1), one after the other, move six times, and hold x, GELU(x) and a gradient at once where this
holds two of them.

Everything is computed in fp32. The sum goes through one partial sum a program, without atomics, so that it has the same
bits every time.

Shape suffixes: R rows (tokens), F channels (the inner width of the feed-forward layer).
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_kernels.modulate import multiprocessors

_COLUMNS = 512  # channels of a program
_PROGRAMS_PER_MULTIPROCESSOR = 16


def gelu_backward_reference(x: Tensor, gradient: Tensor) -> Tensor:
    """Does what `gelu_backward` does in plain PyTorch, in the tensors' dtype."""
    torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=gradient)
    x.copy_(F.gelu(x, approximate="tanh"))
    return gradient.sum(dim=0)


def gelu_backward(x: Tensor, gradient: Tensor) -> Tensor:
    """Replaces `gradient` by the gradient of x, and x by GELU(x), in place.

    It runs the kernel, so it needs CUDA tensors (or Triton's interpreter, TRITON_INTERPRET=1).

    Args:
        x: [R, F], contiguous; GELU's input.
        gradient: the gradient of GELU(x), of the same shape, dtype and device, contiguous.

    Returns:
        [F], the sum of x's gradient over the rows, in x's dtype.

    Raises:
        ValueError: a tensor is not two-dimensional and contiguous, or they do not go together.
    """
    for name, tensor in (("x", x), ("gradient", gradient)):
        if tensor.ndim != 2 or not tensor.is_contiguous():
            raise ValueError(f"{name} {list(tensor.shape)}: must be [R, F] and contiguous, it is changed in place")
    if (x.shape, x.dtype, x.device) != (gradient.shape, gradient.dtype, gradient.device):
        raise ValueError(
            f"gradient {list(gradient.shape)} {gradient.dtype} on {gradient.device} does not go with "
            f"x {list(x.shape)} {x.dtype} on {x.device}"
        )
    return _gelu_backward(x, gradient)


@torch.library.custom_op("mugv::gelu_backward", mutates_args=("x", "gradient"))
def _gelu_backward(x: Tensor, gradient: Tensor) -> Tensor:
    rows, columns = x.shape
    column_programs = triton.cdiv(columns, _COLUMNS)
    row_programs = min(rows, triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x), column_programs))
    sums = x.new_empty((row_programs, columns), dtype=torch.float32)
    _kernel[(column_programs, row_programs)](x, gradient, sums, rows, F=columns, COLUMNS=_COLUMNS, num_warps=2)
    return sums.sum(0).to(x.dtype)


@_gelu_backward.register_fake
def _(x: Tensor, gradient: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


if find_spec("triton"):  # not built for every platform; the reference needs none
    import triton
    import triton.language as tl

    _CUBIC = tl.constexpr(0.044715)
    _TWICE_ROOT = tl.constexpr(2 * (2 / torch.pi) ** 0.5)

    @triton.jit
    def gelu_and_slope(x):
        """Returns GELU(x) and GELU'(x), by the formulas above."""
        cubic = x * x * _CUBIC
        s = tl.sigmoid(x * _TWICE_ROOT * (1.0 + cubic))
        return x * s, s + x * s * (1.0 - s) * _TWICE_ROOT * (1.0 + 3.0 * cubic)

    @triton.jit
    def _kernel(x_ptr, gradient_ptr, sums_ptr, rows, F: tl.constexpr, COLUMNS: tl.constexpr):
        """Each program takes COLUMNS channels of every `row programs`-th row; partial sums go to [row programs, F]."""
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < F
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        for row in tl.range(tl.program_id(1), rows, tl.num_programs(1), num_stages=3):
            at = tl.cast(row, tl.int64) * F + column
            x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.load(gradient_ptr + at, mask=mask, other=0.0).to(tl.float32)
            y, slope = gelu_and_slope(x)
            gradient *= slope
            total += gradient
            tl.store(x_ptr + at, y.to(x_ptr.dtype.element_ty), mask=mask)
            tl.store(gradient_ptr + at, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
        tl.store(sums_ptr + tl.program_id(1) * F + column, total, mask=mask)
