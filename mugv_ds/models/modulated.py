"""Linears after a modulated LayerNorm that save the LayerNorm's input and compute its output again in backward.

The input, the residual stream, is saved anyway, so each of them saves one [B, N, D] less for one more pass over x.
Nothing else that is saved is as cheap to compute again, so this is done at every level of activation checkpointing.

They are custom operators for torch.compile, which would otherwise find that the modulation of the forward pass and the
one of the backward pass are equal, and save the result of the first.

Shape suffixes: B batch, N tokens, D hidden size, E output width, K = 2 token classes (0 noised, 1 clean), R = B·N rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_kernels.dispatch import gelu_backward, modulate_backward, modulate_forward


def modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes (LayerNorm(x) · (1 + scale) + shift) · weightᵀ + bias, with shift and scale by each token's class.

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
    """Computes GELU(`modulated_linear`(…, w1, b1)) · w2ᵀ, and saves x and GELU's input only.

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
    """Returns the gradients of x, shift, scale and weight, from the gradient [B·N, E] of the product."""
    y_BND, mean_BN, rstd_BN = modulate_forward(x, shift, scale, clean)
    y_RD = y_BND.flatten(0, 1)
    d_weight_ED = gradient.T @ y_RD
    torch.mm(gradient, weight, out=y_RD)  # the gradient of y takes the place of y, in y_BND too
    return *modulate_backward(y_BND, x, scale, clean, mean_BN, rstd_BN), d_weight_ED


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
    """Returns the gradients of x, shift, scale, weight and bias."""
    gradient_RE = gradient.flatten(0, 1)
    return *_through_modulation(gradient_RE, x, shift, scale, clean, weight), gradient_RE.sum(dim=0)


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
    """Returns the result [B, N, D] and GELU's input [B·N, E]."""
    inner_RE = F.linear(modulate_forward(x, shift, scale, clean)[0].flatten(0, 1), w1, b1)
    return F.linear(F.gelu(inner_RE, approximate="tanh"), w2).view_as(x), inner_RE


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
    """Returns the gradients of x, shift, scale, w1, b1 and w2.

    It overwrites GELU's saved input with GELU's output, so it can run only once for a forward pass.
    """
    gradient_RD = gradient.flatten(0, 1)
    d_inner_RE = gradient_RD @ w2
    d_b1 = gelu_backward(inner, d_inner_RE)  # inner is GELU's output from here on
    d_w2 = gradient_RD.T @ inner
    return *_through_modulation(d_inner_RE, x, shift, scale, clean, w1), d_b1, d_w2


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
    """Returns an uninitialised tensor of the shape of each, for the fake implementations."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)
