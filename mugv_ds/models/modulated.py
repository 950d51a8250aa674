"""Linears after a modulated LayerNorm, which keep its input for the backward pass and compute its output again there.

What follows an input that is kept anyway, as the residual stream is, then costs no memory: [B, N, D] less for each, for
one more pass over x. Nothing else of what is kept is as cheap to make again, so this is done in every mode of
recomputation.

They are operators of their own for torch.compile, which would otherwise find both modulations equal and keep one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_kernels.dispatch import gelu_backward, modulate_backward, modulate_forward


def modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(LayerNorm(x) · (1 + scale) + shift) · weightᵀ + bias, shift and scale by each token's class.

    Args:
        x: [B, N, D].
        shift, scale: [B, 2, D], of class 0 (noised) and 1 (clean), in x's dtype or fp32.
        clean: [B, N] bool, each token's class.
        weight, bias: [E, D] and [E].
    Returns:
        [B, N, E].
    """
    return _linear(x, shift, scale, clean, weight, bias)


def modulated_mlp(x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """GELU(`modulated_linear`(…, w1, b1)) · w2ᵀ, which keeps x and GELU's input.

    The backward pass holds one more tensor of the inner width; autograd's would hold three.

    Args:
        x, shift, scale, clean: as in `modulated_linear`.
        w1, b1, w2: [E, D], [E] and [D, E].
    Returns:
        [B, N, D].
    """
    y, _ = _mlp(x, shift, scale, clean, w1, b1, w2)
    return y


def _through_modulation(
    gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, shift, scale and weight from that [B·N, E] of the product."""
    y, mean, rstd = modulate_forward(x, shift, scale, clean)
    rows = y.flatten(0, 1)
    d_weight = gradient.T @ rows
    torch.mm(gradient, weight, out=rows)  # the gradient of y takes the place of y
    return *modulate_backward(y, x, scale, clean, mean, rstd), d_weight


@torch.library.custom_op("mugv::modulated_linear", mutates_args=())
def _linear(x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(modulate_forward(x, shift, scale, clean)[0], weight, bias)


@_linear.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@torch.library.custom_op("mugv::modulated_linear_backward", mutates_args=())
def _linear_backward(
    gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, shift, scale, weight and bias."""
    gradient = gradient.flatten(0, 1)
    return *_through_modulation(gradient, x, shift, scale, clean, weight), gradient.sum(dim=0)


@_linear_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_empty(x, scale, scale, weight), weight.new_empty(len(weight))


def _linear_save(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _linear_differentiate(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    dx, dshift, dscale, dweight, dbias = _linear_backward(gradient, *ctx.saved_tensors)
    return dx, dshift, dscale, None, dweight, dbias


_linear.register_autograd(_linear_differentiate, setup_context=_linear_save)


@torch.library.custom_op("mugv::modulated_mlp", mutates_args=())
def _mlp(
    x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, w1: Tensor, b1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor]:
    """The result [B, N, D] and GELU's input [B·N, E]."""
    inner = F.linear(modulate_forward(x, shift, scale, clean)[0].flatten(0, 1), w1, b1)
    return F.linear(F.gelu(inner, approximate="tanh"), w2).view_as(x), inner


@_mlp.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, w1: Tensor, b1: Tensor, w2: Tensor
) -> tuple[Tensor, Tensor]:
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
    inner: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, shift, scale, w1, b1 and w2. GELU's input is its output then, so that this can be done once."""
    gradient = gradient.flatten(0, 1)
    d_inner = gradient @ w2
    d_b1 = gelu_backward(inner, d_inner)
    d_w2 = gradient.T @ inner
    return *_through_modulation(d_inner, x, shift, scale, clean, w1), d_b1, d_w2


@_mlp_backward.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    clean: Tensor,
    w1: Tensor,
    w2: Tensor,
    inner: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_empty(x, scale, scale, w1), w1.new_empty(len(w1)), w2.new_empty(w2.shape)


def _mlp_save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shift, scale, clean, w1, _, w2 = inputs
    _, inner = output
    ctx.mark_non_differentiable(inner)
    ctx.save_for_backward(x, shift, scale, clean, w1, w2, inner)


def _mlp_differentiate(ctx, gradient: Tensor, _) -> tuple[Tensor | None, ...]:
    dx, dshift, dscale, dw1, db1, dw2 = _mlp_backward(gradient, *ctx.saved_tensors)
    return dx, dshift, dscale, None, dw1, db1, dw2


_mlp.register_autograd(_mlp_differentiate, setup_context=_mlp_save)


def _empty(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)
