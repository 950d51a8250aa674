"""Rounding to fp8 by the largest value of a tensor, and products of what was rounded.

    y = round(x · MAX / max|x|) in E4M3 or E5M2,  x ≈ y · scale,  scale = max|x| / MAX

(Micikevicius et al. 2022, arXiv:2209.05433, sections 3 and 4). The scale is found anew each time, so that there is no
state. A tensor with a value that is not finite gets an infinite scale, which makes all that is computed of it infinite
or NaN, so that it cannot go unseen.

A modulated LayerNorm is scaled by a bound of its largest value in place of it, which its shift and scale give:

    |x̂ · (1 + scale) + shift| ≤ √C · |1 + scale| + |shift|,  as ‖x̂‖ ≤ √C

so that it is normalised, modulated and rounded in one pass over x. At C = 3456 the bound is about ten times what
normal values reach, of the 28,672 times between the largest number of E4M3 and its smallest normal one.

A product on Hopper takes both factors with the summed dimension last. The three products of a linear sum over three
different dimensions, so a factor is written as it is, transposed, or both. What is rounded need not be there: the
kernels compute LayerNorm with a modulation, or GELU, on the way, and do not write its values themselves.

Rows are padded with zeros to a multiple of 16, which the products ask for.

Shape suffixes: B batch, N tokens, C channels, K = 2 token classes, R = B·N rows, P = R rounded up to a multiple of 16.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_kernels.modulate import EPS, modulate_forward_reference, multiprocessors, row_launch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ROWS = 16
_PROGRAMS_PER_MULTIPROCESSOR = 8
_ELEMENTS = 4096  # of a turn of a program that looks for the largest value
_TILE = 64
_COLUMNS = 512  # channels of a program that sums


class Modulated(NamedTuple):
    """The modulated LayerNorm of a tensor, see `mugv_kernels.modulate`, without its values.

    Attributes:
        shift, scale: [B, 2, C]. clean: [B, N] bool. mean, rstd: [B, N] fp32, of the rows.
    """

    shift: Tensor
    scale: Tensor
    clean: Tensor
    mean: Tensor
    rstd: Tensor


class Rounded(NamedTuple):
    """A matrix in fp8. Of the two forms the one that was not asked for is None.

    Attributes:
        values: [P, C]. transposed: [C, P]. scale: [] fp32, by which its values are to be multiplied.
    """

    values: Tensor | None
    transposed: Tensor | None
    scale: Tensor


def padded(rows: int) -> int:
    """Returns the number of rows with padding."""
    return -(-rows // ROWS) * ROWS


def largest_reference(x: Tensor) -> Tensor:
    """Does what `largest` does in plain PyTorch."""
    value = x.detach().abs().amax().float()
    return torch.where(value.isfinite(), value, torch.inf)


def round_reference(x_RC: Tensor, largest: Tensor, dtype: torch.dtype, *, values: bool, transposed: bool) -> Rounded:
    """Does what `round_to` does in plain PyTorch."""
    limit = torch.finfo(dtype).max
    factor = torch.where(largest > 0, limit / largest, 1.0)
    rounded = torch.zeros(padded(len(x_RC)), x_RC.shape[1], dtype=dtype, device=x_RC.device)
    rounded[: len(x_RC)] = (x_RC.float() * factor).clamp(-limit, limit).to(dtype)
    return Rounded(rounded if values else None, rounded.T.contiguous() if transposed else None, 1 / factor)


def modulated_bound_reference(shift: Tensor, scale: Tensor) -> Tensor:
    """Does what `modulated_bound` does in plain PyTorch."""
    return largest_reference(shift.shape[-1] ** 0.5 * (1 + scale.float()).abs() + shift.float().abs())


def modulate_to_reference(
    x_BNC: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, bound: Tensor, dtype: torch.dtype
) -> tuple[Rounded, Tensor, Tensor]:
    """Does what `modulate_to` does in plain PyTorch."""
    y, mean, rstd = modulate_forward_reference(x_BNC.float(), shift, scale, clean)
    return round_reference(y.flatten(0, 1), bound, dtype, values=True, transposed=False), mean, rstd


def transpose_modulated_reference(x_BNC: Tensor, of: Modulated, bound: Tensor, dtype: torch.dtype) -> Rounded:
    """Does what `transpose_modulated` does in plain PyTorch."""
    y, *_ = modulate_forward_reference(x_BNC.float(), of.shift, of.scale, of.clean)
    return round_reference(y.flatten(0, 1), bound, dtype, values=False, transposed=True)


def gelu_largest_reference(x_RC: Tensor) -> Tensor:
    """Does what `gelu_largest` does in plain PyTorch."""
    return largest_reference(F.gelu(x_RC.float(), approximate="tanh"))


def round_gelu_reference(
    x_RC: Tensor, largest: Tensor, dtype: torch.dtype, *, values: bool, transposed: bool
) -> Rounded:
    """Does what `round_gelu` does in plain PyTorch."""
    y = F.gelu(x_RC.float(), approximate="tanh")
    return round_reference(y, largest, dtype, values=values, transposed=transposed)


def sum_and_largest_reference(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Does what `sum_and_largest` does in plain PyTorch."""
    return x_RC.float().sum(0).to(x_RC.dtype), largest_reference(x_RC)


def gelu_backward_reference(x_RC: Tensor, gradient_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Does what `gelu_backward` does in plain PyTorch."""
    exact = torch.ops.aten.gelu_backward(gradient_RC.float(), x_RC.float(), approximate="tanh")
    gradient_RC.copy_(exact)
    return exact.sum(0).to(x_RC.dtype), largest_reference(gradient_RC)


def product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    *,
    is_fast: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """Returns (a · scale_a) · (b · scale_b)ᵀ + bias.

    Args:
        a, b: fp8, [M, S] and [L, S], of which not both are E5M2; S and L are multiples of 16.
        dtype: of the result.
        is_fast: whether partial sums are kept in the tensor cores, which hold about 14 bits of them; else they are
            added up in fp32 after each 128 terms. On a CPU both are computed in fp32.
        bias: [L], of the result's dtype.
    Returns:
        [M, L].
    """
    if not a.is_cuda:
        y = (a.float() @ b.float().T) * (scale_a * scale_b)
        return (y if bias is None else y + bias.float()).to(dtype)
    return torch._scaled_mm(a, b.T, scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=is_fast)


def largest(x: Tensor) -> Tensor:
    """Returns the largest magnitude of a contiguous tensor, [] fp32; infinity where a value is not finite."""
    out = torch.zeros((), dtype=torch.float32, device=x.device)
    _largest_kernel[_turns(x)](x, out, x.numel(), GELU=False, ELEMENTS=_ELEMENTS)
    return out


def gelu_largest(x: Tensor) -> Tensor:
    """Returns the largest magnitude of GELU(x), as `largest` does."""
    out = torch.zeros((), dtype=torch.float32, device=x.device)
    _largest_kernel[_turns(x)](x, out, x.numel(), GELU=True, ELEMENTS=_ELEMENTS)
    return out


def round_to(x_RC: Tensor, largest: Tensor, dtype: torch.dtype, *, values: bool, transposed: bool) -> Rounded:
    """Rounds a contiguous matrix to fp8.

    Args:
        x_RC: bf16 or fp32. largest: its largest magnitude, [] fp32.
        dtype: E4M3 or E5M2. values, transposed: which forms are wanted.
    """
    return _round(x_RC[None], None, largest, dtype, _PLAIN, values, transposed)


def round_gelu(x_RC: Tensor, largest: Tensor, dtype: torch.dtype, *, values: bool, transposed: bool) -> Rounded:
    """Rounds GELU(x), tanh form, of a contiguous matrix x; `largest` is GELU(x)'s, see `round_to`."""
    return _round(x_RC[None], None, largest, dtype, _GELU, values, transposed)


def modulated_bound(shift: Tensor, scale: Tensor) -> Tensor:
    """Returns what no magnitude of a LayerNorm with this modulation exceeds, [] fp32; infinity where it is not finite.

    Args:
        shift, scale: [B, 2, C], contiguous.
    """
    out = torch.zeros((), dtype=torch.float32, device=shift.device)
    _bound_kernel[_turns(shift)](shift, scale, out, shift.numel(), WIDEST=shift.shape[-1] ** 0.5, ELEMENTS=_ELEMENTS)
    return out


def modulate_to(
    x_BNC: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, bound: Tensor, dtype: torch.dtype
) -> tuple[Rounded, Tensor, Tensor]:
    """Rounds the modulated LayerNorm of x to fp8, as it is.

    Args:
        x_BNC, shift, scale, clean: see `mugv_kernels.modulate`; contiguous. bound: see `modulated_bound`.
    Returns:
        The values, of which those of a row with one that is not finite are NaN, and mean and rstd [B, N] fp32.
    """
    B, N, C = x_BNC.shape
    mean, rstd = (torch.empty(B, N, dtype=torch.float32, device=x_BNC.device) for _ in range(2))
    values, scale8 = torch.empty(padded(B * N), C, dtype=dtype, device=x_BNC.device), torch.empty_like(bound)
    values[B * N :].zero_()
    _modulate_kernel[(N, B)](
        x_BNC, shift, scale, clean, bound, values, scale8, mean, rstd, N,
        EPS=EPS, MAX=torch.finfo(dtype).max, **row_launch(C),
    )  # fmt: skip
    return Rounded(values, None, scale8), mean, rstd


def transpose_modulated(x_BNC: Tensor, of: Modulated, bound: Tensor, dtype: torch.dtype) -> Rounded:
    """Rounds the modulated LayerNorm of x, of which `modulate_to` gave mean and rstd, transposed."""
    return _round(x_BNC, of, bound, dtype, _MODULATED, False, True)


def gelu_backward(x_RC: Tensor, gradient_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces the gradient of GELU(x) by the gradient of x, in place.

    Args:
        x_RC, gradient_RC: contiguous, of one shape and dtype.
    Returns:
        The sum [C] of the result over the rows, in x's dtype, and its largest magnitude, [] fp32.
    """
    return _by_columns(x_RC, gradient_RC, is_gelu=True)


def sum_and_largest(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum [C] of a contiguous matrix over the rows, in its dtype, and its largest magnitude, [] fp32."""
    return _by_columns(x_RC, x_RC, is_gelu=False)


def _by_columns(x_RC: Tensor, gradient_RC: Tensor, *, is_gelu: bool) -> tuple[Tensor, Tensor]:
    rows, columns = x_RC.shape
    column_programs = triton.cdiv(columns, _COLUMNS)
    row_programs = min(rows, triton.cdiv(2 * _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x_RC), column_programs))
    sums = x_RC.new_empty((row_programs, columns), dtype=torch.float32)
    out = torch.zeros((), dtype=torch.float32, device=x_RC.device)
    grid = (column_programs, row_programs)
    _columns_kernel[grid](x_RC, gradient_RC, sums, out, rows, C=columns, GELU=is_gelu, COLUMNS=_COLUMNS, num_warps=2)
    return sums.sum(0).to(x_RC.dtype), out


_PLAIN, _MODULATED, _GELU = range(3)


def _turns(x: Tensor) -> tuple[int]:
    """Returns the grid of `_largest_kernel`."""
    return (min(triton.cdiv(x.numel(), _ELEMENTS), _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x)),)


def _round(
    x_BNC: Tensor,
    modulated: Modulated | None,
    largest: Tensor,
    dtype: torch.dtype,
    of: int,
    wants_values: bool,
    wants_transposed: bool,
) -> Rounded:
    if x_BNC.dtype == torch.float32 and wants_values and wants_transposed:
        # Of fp32 the compiler writes one of two forms wrongly on a GPU (Triton 3.6). The model's tensors are bf16.
        first, second = (
            _round(x_BNC, modulated, largest, dtype, of, wants_values, not wants_values)
            for wants_values in (True, False)
        )
        return first._replace(transposed=second.transposed)
    B, N, C = x_BNC.shape
    R, P = B * N, padded(B * N)
    scale = torch.empty_like(largest)
    values = torch.empty(P, C, dtype=dtype, device=x_BNC.device) if wants_values else None
    transposed = torch.empty(C, P, dtype=dtype, device=x_BNC.device) if wants_transposed else None
    shift, row_scale, clean, mean, rstd = modulated or [largest] * 5  # not read unless modulated
    _round_kernel[(triton.cdiv(P, _TILE), triton.cdiv(C, _TILE))](
        x_BNC, shift, row_scale, clean, mean, rstd, largest, scale,
        scale if values is None else values, scale if transposed is None else transposed,
        N, R, P,
        C=C, MAX=torch.finfo(dtype).max, OF=of, VALUES=wants_values, TRANSPOSED=wants_transposed, TILE=_TILE,
    )  # fmt: skip
    return Rounded(values, transposed, scale)


if find_spec("triton"):  # not built for every platform; the references need none
    import triton
    import triton.language as tl

    from mugv_kernels.gelu import gelu_and_slope
    from mugv_kernels.modulate import modulated_row

    _IS_MODULATED, _IS_GELU = tl.constexpr(_MODULATED), tl.constexpr(_GELU)

    @triton.jit
    def _magnitude(y):
        """Returns |y|, and infinity for NaN, which a comparison would pass over."""
        return tl.where(y == y, tl.abs(y), float("inf"))

    @triton.jit
    def _factor(largest_ptr, MAX: tl.constexpr):
        """Returns what takes a tensor's largest value to MAX."""
        largest = tl.load(largest_ptr)
        return tl.where(largest > 0, MAX / largest, 1.0)

    @triton.jit
    def _clamped(y, MAX: tl.constexpr):
        """Returns y between −MAX and MAX; NaN stays."""
        return tl.clamp(y, -MAX, MAX, propagate_nan=tl.PropagateNan.ALL)

    @triton.jit
    def _gelu(x):
        y, _ = gelu_and_slope(x)
        return y

    @triton.jit
    def _largest_kernel(x_ptr, out_ptr, numel, GELU: tl.constexpr, ELEMENTS: tl.constexpr):
        """Each program takes ELEMENTS elements in turns. The largest of non-negative numbers depends on no order."""
        found = tl.zeros([ELEMENTS], dtype=tl.float32)
        for turn in tl.range(tl.program_id(0), tl.cdiv(numel, ELEMENTS), tl.num_programs(0), num_stages=3):
            at = tl.cast(turn, tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
            x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
            found = tl.maximum(found, _magnitude(_gelu(x) if GELU else x))
        tl.atomic_max(out_ptr, tl.max(found, axis=0))

    @triton.jit
    def _bound_kernel(shift_ptr, scale_ptr, out_ptr, numel, WIDEST: tl.constexpr, ELEMENTS: tl.constexpr):
        """Each program takes ELEMENTS elements in turns. WIDEST: √C."""
        found = tl.zeros([ELEMENTS], dtype=tl.float32)
        for turn in tl.range(tl.program_id(0), tl.cdiv(numel, ELEMENTS), tl.num_programs(0), num_stages=3):
            at = turn * ELEMENTS + tl.arange(0, ELEMENTS)
            shift = tl.load(shift_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + at, mask=at < numel, other=-1.0).to(tl.float32)
            found = tl.maximum(found, _magnitude(WIDEST * tl.abs(1.0 + scale) + tl.abs(shift)))
        tl.atomic_max(out_ptr, tl.max(found, axis=0))

    @triton.jit
    def _modulate_kernel(
        x_ptr, shift_ptr, scale_ptr, clean_ptr, bound_ptr, values_ptr, out_scale_ptr, mean_ptr, rstd_ptr, N,
        EPS: tl.constexpr, MAX: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Each program computes one token; the grid is (N, B)."""
        batch = tl.program_id(1).to(tl.int64)
        token = batch * N + tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        mask = d < D
        y, mean, rstd = modulated_row(x_ptr, shift_ptr, scale_ptr, clean_ptr, batch, token, d, mask, EPS, D)
        factor = _factor(bound_ptr, MAX)
        rounded = _clamped(y * factor, MAX).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + token * D + d, rounded, mask=mask)
        tl.store(mean_ptr + token, mean)
        tl.store(rstd_ptr + token, rstd)
        if token == 0:
            tl.store(out_scale_ptr, 1.0 / factor)

    @triton.jit
    def _round_kernel(
        x_ptr, shift_ptr, scale_ptr, clean_ptr, mean_ptr, rstd_ptr, largest_ptr, out_scale_ptr,
        values_ptr, transposed_ptr, N, R, P,
        C: tl.constexpr, MAX: tl.constexpr, OF: tl.constexpr, VALUES: tl.constexpr, TRANSPOSED: tl.constexpr,
        TILE: tl.constexpr,
    ):  # fmt: skip
        """Each program rounds a tile of the rows of all samples; the grid is (tiles of P, tiles of C).

        P is a multiple of 16, and a tile begins at one, so that several rows of a channel are stored at once.
        """
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        c = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = (row < R)[:, None] & (c < C)[None, :]
        y = tl.load(x_ptr + row.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if OF == _IS_MODULATED:
            is_clean = (tl.load(clean_ptr + row, mask=row < R, other=0) != 0)[:, None]
            mean = tl.load(mean_ptr + row, mask=row < R, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=row < R, other=0.0)[:, None]
            normed, y = (y - mean) * rstd, tl.zeros([TILE, TILE], dtype=tl.float32)
            first = tl.program_id(0) * TILE
            for batch in range(first // N, tl.cdiv(tl.minimum(first + TILE, R), N)):  # the samples of the tile's rows
                rows = tl.cast(batch, tl.int64) * 2 * C + c
                shift_noised = tl.load(shift_ptr + rows, mask=c < C, other=0.0).to(tl.float32)[None, :]
                shift_clean = tl.load(shift_ptr + rows + C, mask=c < C, other=0.0).to(tl.float32)[None, :]
                scale_noised = tl.load(scale_ptr + rows, mask=c < C, other=0.0).to(tl.float32)[None, :]
                scale_clean = tl.load(scale_ptr + rows + C, mask=c < C, other=0.0).to(tl.float32)[None, :]
                modulated = normed * (1.0 + tl.where(is_clean, scale_clean, scale_noised))
                modulated += tl.where(is_clean, shift_clean, shift_noised)
                y = tl.where((row // N == batch)[:, None] & inside, modulated, y)
        if OF == _IS_GELU:
            y = _gelu(y)
        factor = _factor(largest_ptr, MAX)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(out_scale_ptr, 1.0 / factor)
        y = _clamped(y * factor, MAX)  # zero in the rows of the padding
        if VALUES:
            rounded = y.to(values_ptr.dtype.element_ty)
            at = row.to(tl.int64)[:, None] * C + c[None, :]
            tl.store(values_ptr + at, rounded, mask=(row < P)[:, None] & (c < C)[None, :])
        if TRANSPOSED:
            turned = tl.trans(y.to(transposed_ptr.dtype.element_ty))
            at = c.to(tl.int64)[:, None] * P + row[None, :]
            tl.store(transposed_ptr + at, turned, mask=(c < C)[:, None] & (row < P)[None, :])

    @triton.jit
    def _columns_kernel(
        x_ptr, gradient_ptr, sums_ptr, out_ptr, rows, C: tl.constexpr, GELU: tl.constexpr, COLUMNS: tl.constexpr
    ):  # fmt: skip
        """Each program takes COLUMNS channels of every `row programs`-th row; partial sums go to [row programs, C].

        With GELU the gradient is first that of GELU(x), and is replaced by that of x.
        """
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        mask = column < C
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        found = tl.zeros([COLUMNS], dtype=tl.float32)
        for row in tl.range(tl.program_id(1), rows, tl.num_programs(1), num_stages=3):
            at = tl.cast(row, tl.int64) * C + column
            gradient = tl.load(gradient_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if GELU:
                x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
                _, slope = gelu_and_slope(x)
                gradient *= slope
                rounded = gradient.to(gradient_ptr.dtype.element_ty)
                tl.store(gradient_ptr + at, rounded, mask=mask)
                found = tl.maximum(found, _magnitude(rounded.to(tl.float32)))
            else:
                found = tl.maximum(found, _magnitude(gradient))
            total += gradient
        tl.store(sums_ptr + tl.program_id(1) * C + column, total, mask=mask)
        tl.atomic_max(out_ptr, tl.max(found, axis=0))


class Operations(NamedTuple):
    """What has a kernel and a reference, by name."""

    largest: Callable[..., Tensor]
    round_to: Callable[..., Rounded]
    modulated_bound: Callable[..., Tensor]
    modulate_to: Callable[..., tuple[Rounded, Tensor, Tensor]]
    transpose_modulated: Callable[..., Rounded]
    gelu_largest: Callable[..., Tensor]
    round_gelu: Callable[..., Rounded]
    gelu_backward: Callable[..., tuple[Tensor, Tensor]]
    sum_and_largest: Callable[..., tuple[Tensor, Tensor]]


KERNELS = Operations(
    largest,
    round_to,
    modulated_bound,
    modulate_to,
    transpose_modulated,
    gelu_largest,
    round_gelu,
    gelu_backward,
    sum_and_largest,
)
REFERENCES = Operations(
    largest_reference,
    round_reference,
    modulated_bound_reference,
    modulate_to_reference,
    transpose_modulated_reference,
    gelu_largest_reference,
    round_gelu_reference,
    gelu_backward_reference,
    sum_and_largest_reference,
)
