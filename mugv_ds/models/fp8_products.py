"""Linears whose three products run in fp8, alone, after a modulated LayerNorm, and as a feed-forward layer.

    y = x·Wᵀ from E4M3 factors,  dx = dy·W and dW = dyᵀ·x from an E5M2 and an E4M3 factor

each factor scaled by its own largest value, or a bound of it (`mugv_kernels.fp8`). The product of the forward pass
keeps its partial sums in the tensor cores; those of the backward pass, one of which sums over all tokens, in fp32:
Transformer Engine and torchao do the same.

What is saved for the backward pass is what the same linears save in bf16 (`models.modulated`), and the largest values:
the rounded factors are made again, in the form that the product then needs, by one pass each. Nothing in fp8 is kept,
save, where a step has several micro-batches, the weights (`models.fp8.Fp8Linear`).

They are custom operators, which torch.compile takes as they are.

Shape suffixes: B batch, N tokens, D input width, E output width, R = B·N rows, P = R rounded up to a multiple of 16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mugv_ds.models.modulated import empty, given
from mugv_kernels.dispatch import fp8_operations, modulate_backward
from mugv_kernels.fp8 import E4M3, E5M2, Modulated, Rounded, product


class Weight(NamedTuple):
    """A linear's weight [E, D], and where they are kept, its fp8 forms.

    Attributes:
        values, transposed: fp8 [E, D] and [D, E]. scale: [] fp32. See `mugv_kernels.fp8.Rounded`.
    """

    weight: Tensor
    values: Tensor | None = None
    transposed: Tensor | None = None
    scale: Tensor | None = None


def round_weight(weight: Tensor) -> Rounded:
    """Returns both fp8 forms of a weight whose sides are multiples of 16."""
    with torch.no_grad():
        operations = fp8_operations(weight)
        return operations.round_to(weight, operations.largest(weight), E4M3, values=True, transposed=True)


def fp8_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Computes x·Wᵀ + bias: […, D] → […, E]."""
    y, *_ = _linear(x.reshape(1, -1, x.shape[-1]), None, None, None, *weight, bias)
    return y.view(*x.shape[:-1], -1)


def fp8_modulated_linear(
    x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight: Weight, bias: Tensor
) -> Tensor:
    """Does what `models.modulated.modulated_linear` does: [B, N, D] → [B, N, E]."""
    y, *_ = _linear(x, shift, scale, clean, *weight, bias)
    return y


def fp8_modulated_mlp(
    x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight1: Weight, bias1: Tensor, weight2: Weight
) -> Tensor:
    """Does what `models.modulated.modulated_mlp` does: [B, N, D] → [B, N, D]."""
    y, *_ = _mlp(x, shift, scale, clean, *weight1, bias1, *weight2)
    return y


def _largest(weight: Tensor, kept: Tensor | None) -> Tensor:
    """Returns the largest magnitude of a weight, [] fp32, or nothing, [0], where its fp8 forms are kept."""
    return fp8_operations(weight).largest(weight) if kept is None else weight.new_empty(0, dtype=torch.float32)


def _fake_largest(weight: Tensor, kept: Tensor | None) -> Tensor:
    return weight.new_empty(() if kept is None else 0, dtype=torch.float32)


def _factor(
    weight: Tensor, kept: Tensor | None, scale: Tensor | None, largest: Tensor, *, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Returns a form of the weight in fp8, and its scale: what is kept, or else made now; see `_largest`."""
    if kept is not None:
        return kept, scale
    rounded = fp8_operations(weight).round_to(weight, largest, E4M3, values=not transposed, transposed=transposed)
    return rounded.transposed if transposed else rounded.values, rounded.scale


def _gradient(dy_RE: Tensor, largest: Tensor, needs_input: bool, needs_weight: bool) -> Rounded:
    """Rounds the gradient of a linear's output in the forms that the gradients of its input and its weight need."""
    return fp8_operations(dy_RE).round_to(dy_RE, largest, E5M2, values=needs_input, transposed=needs_weight)


def _input_gradient(dy8: Rounded, weight8: tuple[Tensor, Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    """Returns dy·W, [R, D]."""
    transposed_DE, scale = weight8
    return product(dy8.values, transposed_DE, dy8.scale, scale, dtype, is_fast=False)[:rows]


def _weight_gradient(dy8: Rounded, x8: Rounded, dtype: torch.dtype) -> Tensor:
    """Returns dyᵀ·x, [E, D]."""
    return product(dy8.transposed, x8.transposed, dy8.scale, x8.scale, dtype, is_fast=False)


@torch.library.custom_op("mugv::fp8_linear", mutates_args=())
def _linear(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    clean: Tensor | None,
    weight: Tensor,
    values: Tensor | None,
    transposed: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y [B, N, E], and what the backward pass makes the fp8 forms from: of the input mean, rstd and the largest
    value, or its bound, and the largest value of the weight.

    Without shift, scale and clean the linear is that of x itself, and mean and rstd are empty.
    """
    x = x.contiguous()
    (B, N, _), operations = x.shape, fp8_operations(x)
    if shift is None:
        mean, rstd = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
        largest = operations.largest(x)
        x8 = operations.round_to(x.flatten(0, 1), largest, E4M3, values=True, transposed=False)
    else:
        rows = shift.contiguous(), scale.contiguous(), clean.contiguous()
        largest = operations.modulated_bound(*rows[:2])
        x8, mean, rstd = operations.modulate_to(x, *rows, largest, E4M3)
    w_largest = _largest(weight, values)
    w8, w_scale = _factor(weight, values, weight_scale, w_largest, transposed=False)
    y = product(x8.values, w8, x8.scale, w_scale, x.dtype, is_fast=True, bias=bias)[: B * N]
    return y.view(B, N, -1), mean, rstd, largest, w_largest


@_linear.register_fake
def _(x, shift, scale, clean, weight, values, transposed, weight_scale, bias):
    rows = (0,) if shift is None else x.shape[:2]
    mean, rstd, largest = (x.new_empty(size, dtype=torch.float32) for size in (rows, rows, ()))
    return x.new_empty(*x.shape[:2], len(weight)), mean, rstd, largest, _fake_largest(weight, values)


@torch.library.custom_op("mugv::fp8_linear_backward", mutates_args=())
def _linear_backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    clean: Tensor | None,
    weight: Tensor,
    transposed: Tensor | None,
    weight_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    largest: Tensor,
    w_largest: Tensor,
    needs_x: bool,
    needs_rows: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, shift, scale, weight and bias; what is not needed comes back empty."""
    x, dy_RE = x.contiguous(), dy.flatten(0, 1).contiguous()
    operations = fp8_operations(x)
    through = needs_x or needs_rows
    if needs_bias:
        d_bias, dy_largest = operations.sum_and_largest(dy_RE)
    else:
        d_bias, dy_largest = x.new_empty(0), operations.largest(dy_RE)
    dy8 = _gradient(dy_RE, dy_largest, through, needs_weight)
    of = None if shift is None else Modulated(shift.contiguous(), scale.contiguous(), clean.contiguous(), mean, rstd)
    d_weight = x.new_empty(0)
    if needs_weight:
        if of is None:
            x8 = operations.round_to(x.flatten(0, 1), largest, E4M3, values=False, transposed=True)
        else:
            x8 = operations.transpose_modulated(x, of, largest, E4M3)
        d_weight = _weight_gradient(dy8, x8, weight.dtype)
        del x8
    if not through:
        return *(x.new_empty(0) for _ in range(3)), d_weight, d_bias
    w8 = _factor(weight, transposed, weight_scale, w_largest, transposed=True)
    dx = _input_gradient(dy8, w8, len(dy_RE), x.dtype).view_as(x)
    if of is None:
        return dx, *(x.new_empty(0) for _ in range(2)), d_weight, d_bias
    return *modulate_backward(dx, x, of.scale, of.clean, mean, rstd, needs_rows), d_weight, d_bias


@_linear_backward.register_fake
def _(
    dy, x, shift, scale, clean, weight, transposed, weight_scale, mean, rstd, largest, w_largest,
    needs_x, needs_rows, needs_weight, needs_bias,
) -> tuple:  # fmt: skip
    rows = x if scale is None else scale
    return (
        empty(x, needs_x or needs_rows),
        *(empty(rows, needs_rows and scale is not None) for _ in range(2)),
        empty(weight, needs_weight),
        weight.new_empty(len(weight) if needs_bias else 0),
    )


def _linear_save(ctx, inputs: tuple, output: tuple) -> None:
    x, shift, scale, clean, weight, _, transposed, weight_scale, _ = inputs
    _, *of_input = output
    ctx.mark_non_differentiable(*of_input)
    ctx.save_for_backward(x, shift, scale, clean, weight, transposed, weight_scale, *of_input)


def _linear_differentiate(ctx, dy: Tensor, *_) -> tuple[Tensor | None, ...]:
    x, shift, scale, _, weight, *_, bias = ctx.needs_input_grad
    found = _linear_backward(dy, *ctx.saved_tensors, x, shift or scale, weight, bias)
    dx, dshift, dscale, dweight, dbias = given(found, (x, shift, scale, weight, bias))
    return dx, dshift, dscale, None, dweight, None, None, None, dbias


_linear.register_autograd(_linear_differentiate, setup_context=_linear_save)


@torch.library.custom_op("mugv::fp8_mlp", mutates_args=())
def _mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    w1: Tensor,
    values1: Tensor | None,
    transposed1: Tensor | None,
    scale1: Tensor | None,
    b1: Tensor,
    w2: Tensor,
    values2: Tensor | None,
    transposed2: Tensor | None,
    scale2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the result [B, N, D], GELU's input [R, E], mean and rstd, and the largest values: of the first linear's
    input and weight, then of the second's."""
    inner, mean, rstd, *largest1 = _linear(x, shift, scale, clean, w1, values1, transposed1, scale1, b1)
    inner_RE, operations = inner.flatten(0, 1), fp8_operations(x)
    largest2 = operations.gelu_largest(inner_RE)
    g8 = operations.round_gelu(inner_RE, largest2, E4M3, values=True, transposed=False)
    w_largest2 = _largest(w2, values2)
    w8, w_scale = _factor(w2, values2, scale2, w_largest2, transposed=False)
    y = product(g8.values, w8, g8.scale, w_scale, x.dtype, is_fast=True)[: len(inner_RE)]
    return y.view_as(x), inner_RE, mean, rstd, *largest1, largest2, w_largest2


@_mlp.register_fake
def _(x, shift, scale, clean, w1, values1, transposed1, scale1, b1, w2, values2, transposed2, scale2):
    mean, rstd, largest1, largest2 = (
        x.new_empty(size, dtype=torch.float32) for size in (x.shape[:2], x.shape[:2], (), ())
    )
    inner = x.new_empty(x.shape[0] * x.shape[1], len(w1))
    w_largest1, w_largest2 = _fake_largest(w1, values1), _fake_largest(w2, values2)
    return x.new_empty(x.shape), inner, mean, rstd, largest1, w_largest1, largest2, w_largest2


@torch.library.custom_op("mugv::fp8_mlp_backward", mutates_args=())
def _mlp_backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    w1: Tensor,
    transposed1: Tensor | None,
    scale1: Tensor | None,
    w2: Tensor,
    transposed2: Tensor | None,
    scale2: Tensor | None,
    inner: Tensor,
    mean: Tensor,
    rstd: Tensor,
    largest1: Tensor,
    w_largest1: Tensor,
    largest2: Tensor,
    w_largest2: Tensor,
    needs_x: bool,
    needs_rows: bool,
    needs_w1: bool,
    needs_w2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, shift, scale, w1, b1 and w2; what is not needed, but b1's, comes back empty."""
    x, dy_RD, operations = x.contiguous(), dy.flatten(0, 1).contiguous(), fp8_operations(x)
    through = needs_x or needs_rows
    dy8 = _gradient(dy_RD, operations.largest(dy_RD), True, needs_w2)
    d_w2 = x.new_empty(0)
    if needs_w2:
        g8 = operations.round_gelu(inner, largest2, E4M3, values=False, transposed=True)
        d_w2 = _weight_gradient(dy8, g8, w2.dtype)
        del g8
    d_inner_RE = _input_gradient(
        dy8, _factor(w2, transposed2, scale2, w_largest2, transposed=True), len(dy_RD), x.dtype
    )
    del dy8
    d_b1, largest = operations.gelu_backward(inner, d_inner_RE)
    d_inner8 = _gradient(d_inner_RE, largest, through, needs_w1)
    rows = d_inner_RE.shape[0]
    del d_inner_RE
    of, d_w1 = Modulated(shift.contiguous(), scale.contiguous(), clean.contiguous(), mean, rstd), x.new_empty(0)
    if needs_w1:
        x8 = operations.transpose_modulated(x, of, largest1, E4M3)
        d_w1 = _weight_gradient(d_inner8, x8, w1.dtype)
        del x8
    if not through:
        return *(x.new_empty(0) for _ in range(3)), d_w1, d_b1, d_w2
    dx = _input_gradient(
        d_inner8, _factor(w1, transposed1, scale1, w_largest1, transposed=True), rows, x.dtype
    ).view_as(x)
    return *modulate_backward(dx, x, of.scale, of.clean, mean, rstd, needs_rows), d_w1, d_b1, d_w2


@_mlp_backward.register_fake
def _(
    dy, x, shift, scale, clean, w1, transposed1, scale1, w2, transposed2, scale2, inner, mean, rstd,
    largest1, w_largest1, largest2, w_largest2,
    needs_x, needs_rows, needs_w1, needs_w2,
) -> tuple:  # fmt: skip
    return (
        empty(x, needs_x or needs_rows),
        empty(scale, needs_rows),
        empty(scale, needs_rows),
        empty(w1, needs_w1),
        w1.new_empty(len(w1)),
        empty(w2, needs_w2),
    )


def _mlp_save(ctx, inputs: tuple, output: tuple) -> None:
    x, shift, scale, clean, w1, _, transposed1, scale1, _, w2, _, transposed2, scale2 = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else zeros would be written in the place of those of what is kept
    ctx.save_for_backward(x, shift, scale, clean, w1, transposed1, scale1, w2, transposed2, scale2, *kept)


def _mlp_differentiate(ctx, dy: Tensor, *_) -> tuple[Tensor | None, ...]:
    x, shift, scale, _, w1, _, _, _, b1, w2, *_ = ctx.needs_input_grad
    found = _mlp_backward(dy, *ctx.saved_tensors, x, shift or scale, w1, w2)
    dx, dshift, dscale, dw1, db1, dw2 = given(found, (x, shift, scale, w1, b1, w2))
    return dx, dshift, dscale, None, dw1, None, None, None, db1, dw2, None, None, None


_mlp.register_autograd(_mlp_differentiate, setup_context=_mlp_save)
