"""Linears after a modulated LayerNorm that save the LayerNorm's input and compute its output again in backward.

The input, the residual stream, is saved anyway, so each of them saves one [B, N, D] less for one more pass over x.
Nothing else that is saved is as cheap to compute again, so this is done at every level of activation checkpointing.

A linear may have an adapter (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3), which adds x·Aᵀ·Bᵀ to its output. Its
products are in here too, so that it saves nothing of its own. Of a frozen weight or bias the gradient is not computed.

They are custom operators for torch.compile, which would otherwise find that the modulation of the forward pass and the
one of the backward pass are equal, and save the result of the first.

Shape suffixes: B batch, N tokens, D hidden size, E output width, r width of the adapters, K = 2 token classes (0
noised, 1 clean), R = B·N rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_kernels.dispatch import gelu_backward, modulate_backward, modulate_forward


class Adapter(NamedTuple):
    """The factors of what is added to a weight [E, D]: B·A."""

    a: Tensor  # [r, D]
    b: Tensor  # [E, r]


def modulated_linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    weight: Tensor,
    bias: Tensor,
    adapter: Adapter | None = None,
) -> Tensor:
    """Computes (LayerNorm(x) · (1 + scale) + shift) · (weight + B·A)ᵀ + bias, with shift and scale by token class.

    Args:
        x: [B, N, D].
        shift, scale: [B, 2, D], of class 0 (noised) and 1 (clean), in x's dtype or fp32.
        clean: [B, N] bool, each token's class.
        weight, bias: [E, D] and [E].
        adapter: of the weight, or None.
    Returns:
        [B, N, E].
    """
    return _linear(x, shift, scale, clean, weight, bias, *(adapter or (None, None)))


def modulated_mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    adapter1: Adapter | None = None,
    adapter2: Adapter | None = None,
) -> Tensor:
    """Computes GELU(`modulated_linear`(…, w1, b1, adapter1)) · (w2 + B·A)ᵀ, and saves x and GELU's input only.

    The backward pass holds one more tensor of the inner width; autograd's would hold three.

    Args:
        x, shift, scale, clean: as in `modulated_linear`.
        w1, b1, w2: [E, D], [E] and [D, E].
        adapter1, adapter2: of w1 and w2, or None.
    Returns:
        [B, N, D].
    """
    y, _ = _mlp(x, shift, scale, clean, w1, b1, w2, *(adapter1 or (None, None)), *(adapter2 or (None, None)))
    return y


def _product(x_RD: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    """Returns x·(weight + B·A)ᵀ + bias, [R, E]."""
    y_RE = F.linear(x_RD, weight, bias)
    return y_RE if a is None else y_RE.addmm_(x_RD @ a.T, b.T)


def _input_gradient(
    gradient_RE: Tensor, weight: Tensor, a: Tensor | None, low_Rr: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """Returns the gradient [R, D] of `_product`'s x. low_Rr: gradient·B, that of x·Aᵀ. out: where it is written."""
    dx_RD = torch.mm(gradient_RE, weight, out=out)
    return dx_RD if a is None else dx_RD.addmm_(low_Rr, a)


def _factor_gradients(
    gradient_RE: Tensor, x_RD: Tensor, a: Tensor | None, low_Rr: Tensor | None, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `_product`'s weight, A and B; what is not needed, or not there, comes back empty."""
    d_weight = gradient_RE.T @ x_RD if needs_weight else x_RD.new_empty(0)
    if a is None:
        return d_weight, x_RD.new_empty(0), x_RD.new_empty(0)
    return d_weight, low_Rr.T @ x_RD, gradient_RE.T @ (x_RD @ a.T)


def _through_modulation(
    gradient: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    needs_x: bool,
    needs_rows: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, shift, scale, weight, A and B, from the gradient [B·N, E] of the product.

    What is not needed comes back empty. needs_rows: of shift and scale.
    """
    y_BND, mean_BN, rstd_BN = modulate_forward(x, shift, scale, clean)
    y_RD = y_BND.flatten(0, 1)
    low_Rr = None if b is None else gradient @ b
    factors = _factor_gradients(gradient, y_RD, a, low_Rr, needs_weight)
    if not (needs_x or needs_rows):
        return *(x.new_empty(0) for _ in range(3)), *factors
    _input_gradient(gradient, weight, a, low_Rr, out=y_RD)  # the gradient of y takes the place of y, in y_BND too
    return *modulate_backward(y_BND, x, scale, clean, mean_BN, rstd_BN, needs_rows), *factors


def _fake_gradients(
    x: Tensor, scale: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Returns what `_through_modulation` does, uninitialised; needs: of x, shift and scale, weight."""
    needs_x, needs_rows, needs_weight = needs
    return (
        empty(x, needs_x or needs_rows),
        empty(scale, needs_rows),
        empty(scale, needs_rows),
        empty(weight, needs_weight),
        *(x.new_empty(0) if factor is None else empty(factor, True) for factor in (a, b)),
    )


def empty(like: Tensor, needed: bool) -> Tensor:
    """Returns an uninitialised tensor of the shape of `like`, or without elements; for the fake implementations."""
    return like.new_empty(like.shape if needed else 0)


def given(gradients: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Returns the gradients that autograd wants, and None for the others."""
    return [gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True)]


@torch.library.custom_op("mugv::modulated_linear", mutates_args=())
def _linear(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    weight: Tensor,
    bias: Tensor,
    a: Tensor | None,
    b: Tensor | None,
) -> Tensor:
    y_RD = modulate_forward(x, shift, scale, clean)[0].flatten(0, 1)
    return _product(y_RD, weight, bias, a, b).view(*x.shape[:-1], -1)


@_linear.register_fake
def _(x, shift, scale, clean, weight, bias, a, b) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("mugv::modulated_linear_backward", mutates_args=())
def _linear_backward(
    gradient: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    needs_x: bool,
    needs_rows: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, shift, scale, weight, A, B and bias; what is not needed comes back empty."""
    gradient_RE = gradient.flatten(0, 1)
    needs = needs_x, needs_rows, needs_weight
    d_bias = gradient_RE.sum(dim=0) if needs_bias else x.new_empty(0)
    return *_through_modulation(gradient_RE, x, shift, scale, clean, weight, a, b, *needs), d_bias


@_linear_backward.register_fake
def _(gradient, x, shift, scale, clean, weight, a, b, needs_x, needs_rows, needs_weight, needs_bias) -> tuple:
    needs = [needs_x, needs_rows, needs_weight]
    return *_fake_gradients(x, scale, weight, a, b, needs), weight.new_empty(len(weight) if needs_bias else 0)


def _linear_save(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    x, shift, scale, clean, weight, _, a, b = inputs
    ctx.save_for_backward(x, shift, scale, clean, weight, a, b)


def _linear_differentiate(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, shift, scale, _, weight, bias, a, b = ctx.needs_input_grad
    found = _linear_backward(gradient, *ctx.saved_tensors, x, shift or scale, weight, bias)
    dx, dshift, dscale, dweight, da, db, dbias = given(found, (x, shift, scale, weight, a, b, bias))
    return dx, dshift, dscale, None, dweight, dbias, da, db


_linear.register_autograd(_linear_differentiate, setup_context=_linear_save)


@torch.library.custom_op("mugv::modulated_mlp", mutates_args=())
def _mlp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    lora_a1: Tensor | None,
    lora_b1: Tensor | None,
    lora_a2: Tensor | None,
    lora_b2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns the result [B, N, D] and GELU's input [B·N, E]."""
    y_RD = modulate_forward(x, shift, scale, clean)[0].flatten(0, 1)
    inner_RE = _product(y_RD, w1, b1, lora_a1, lora_b1)
    outer_RD = _product(F.gelu(inner_RE, approximate="tanh"), w2, None, lora_a2, lora_b2)
    return outer_RD.view_as(x), inner_RE


@_mlp.register_fake
def _(x, shift, scale, clean, w1, b1, w2, lora_a1, lora_b1, lora_a2, lora_b2) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0] * x.shape[1], len(w1))


@torch.library.custom_op("mugv::modulated_mlp_backward", mutates_args=("inner",))
def _mlp_backward(
    gradient: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    w1: Tensor,
    w2: Tensor,
    lora_a1: Tensor | None,
    lora_b1: Tensor | None,
    lora_a2: Tensor | None,
    lora_b2: Tensor | None,
    inner: Tensor,
    needs_x: bool,
    needs_rows: bool,
    needs_w1: bool,
    needs_w2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, shift, scale, w1, its A and B, b1, w2, its A and B.

    What is not needed comes back empty, but b1's, which costs nothing. It overwrites GELU's saved input with GELU's
    output, so it can run only once for a forward pass.
    """
    gradient_RD = gradient.flatten(0, 1)
    low_Rr = None if lora_b2 is None else gradient_RD @ lora_b2
    d_inner_RE = _input_gradient(gradient_RD, w2, lora_a2, low_Rr)
    d_b1 = gelu_backward(inner, d_inner_RE)  # inner is GELU's output from here on
    outer = _factor_gradients(gradient_RD, inner, lora_a2, low_Rr, needs_w2)
    needs = needs_x, needs_rows, needs_w1
    return *_through_modulation(d_inner_RE, x, shift, scale, clean, w1, lora_a1, lora_b1, *needs), d_b1, *outer


@_mlp_backward.register_fake
def _(
    gradient, x, shift, scale, clean, w1, w2, lora_a1, lora_b1, lora_a2, lora_b2, inner,
    needs_x, needs_rows, needs_w1, needs_w2,
) -> tuple:  # fmt: skip
    return (
        *_fake_gradients(x, scale, w1, lora_a1, lora_b1, [needs_x, needs_rows, needs_w1]),
        w1.new_empty(len(w1)),
        empty(w2, needs_w2),
        *(x.new_empty(0) if factor is None else empty(factor, True) for factor in (lora_a2, lora_b2)),
    )


def _mlp_save(ctx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, clean, w1, _, w2, *factors = inputs
    _, inner = output
    ctx.mark_non_differentiable(inner)
    ctx.set_materialize_grads(False)  # else zeros would be written in the place of inner's
    ctx.save_for_backward(x, shift, scale, clean, w1, w2, *factors, inner)


def _mlp_differentiate(ctx, gradient: Tensor, _) -> tuple[Tensor | None, ...]:
    x, shift, scale, _, w1, b1, w2, a1, lora_b1, a2, lora_b2 = ctx.needs_input_grad
    found = _mlp_backward(gradient, *ctx.saved_tensors, x, shift or scale, w1, w2)
    wanted = x, shift, scale, w1, a1, lora_b1, b1, w2, a2, lora_b2
    dx, dshift, dscale, dw1, da1, d_lora_b1, db1, dw2, da2, d_lora_b2 = given(found, wanted)
    return dx, dshift, dscale, None, dw1, db1, dw2, da1, d_lora_b1, da2, d_lora_b2


_mlp.register_autograd(_mlp_differentiate, setup_context=_mlp_save)
