"""The residual of a DiT block: a branch's output times a gate, each token by the row of its class, added to its input.

    y = residual + gate_k · x,  k = 1 for clean tokens, else 0

    dresidual = dy,  dx = gate_k · dy,  dgate_k = Σ dy · x over the tokens of class k

Everything is computed in fp32, whatever the dtype of the tensors. The backward pass keeps the inputs alone. Its sum
over tokens goes through one partial sum a program, without atomics: the same bits every time.

Shape suffixes: B batch, N tokens, D hidden size, K = 2 token classes (0 noised, 1 clean).
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from mugv_kernels.modulate import by_class, check_tensor, reduction_programs, row_launch


def gated_residual_reference(residual_BND: Tensor, x_BND: Tensor, gate_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """`gated_residual` in plain PyTorch: computed in fp32, or in fp64 where the tensors are fp64."""
    wide = torch.promote_types(x_BND.dtype, torch.float32)
    y = residual_BND.to(wide) + by_class(gate_BKD.to(wide), clean_BN) * x_BND.to(wide)
    return y.to(x_BND.dtype)


if find_spec("triton"):  # not built for every platform; the reference needs none
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(residual_ptr, x_ptr, gate_ptr, clean_ptr, y_ptr, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
        """One token a program; grid (N, B)."""
        batch = tl.program_id(1).to(tl.int64)
        token = batch * N + tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        mask = d < D

        residual = tl.load(residual_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
        row = (2 * batch + (tl.load(clean_ptr + token) != 0).to(tl.int64)) * D + d
        gate = tl.load(gate_ptr + row, mask=mask, other=0.0).to(tl.float32)
        y = residual + gate * x
        tl.store(y_ptr + token * D + d, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        dy_ptr,
        x_ptr,
        gate_ptr,
        clean_ptr,
        dx_ptr,
        sums_ptr,
        N,
        NEEDS_DX: tl.constexpr,
        NEEDS_DGATE: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Every `programs`-th token of one batch element a program; grid (programs, B).

        Partial sums of dgate go to sums [programs, B, K, D] fp32.
        """
        batch = tl.program_id(1).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        mask = d < D

        # Both rows stay in registers: no load in the loop waits for a token's class.
        rows = 2 * batch * D + d
        gate_noised = tl.load(gate_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        gate_clean = tl.load(gate_ptr + rows + D, mask=mask, other=0.0).to(tl.float32)
        dgate_noised = tl.zeros([BLOCK_D], dtype=tl.float32)
        dgate_clean = tl.zeros([BLOCK_D], dtype=tl.float32)

        for n in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=3):
            token = batch * N + n
            dy = tl.load(dy_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
            is_clean = tl.load(clean_ptr + token) != 0
            if NEEDS_DX:
                dx = tl.where(is_clean, gate_clean, gate_noised) * dy
                tl.store(dx_ptr + token * D + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if NEEDS_DGATE:
                x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
                dgate_noised += tl.where(is_clean, 0.0, dy * x)
                dgate_clean += tl.where(is_clean, dy * x, 0.0)

        if NEEDS_DGATE:
            dgate_ptr = sums_ptr + (tl.program_id(0) * tl.num_programs(1) + batch) * 2 * D + d
            tl.store(dgate_ptr, dgate_noised, mask=mask)
            tl.store(dgate_ptr + D, dgate_clean, mask=mask)


# Custom operators rather than an autograd.Function: torch.compile takes them as they are, without a graph break.
@torch.library.custom_op("mugv::gated_residual", mutates_args=())
def _forward(residual: Tensor, x: Tensor, gate: Tensor, clean: Tensor) -> Tensor:
    residual, x, gate, clean = (tensor.contiguous() for tensor in (residual, x, gate, clean))
    B, N, D = x.shape
    y = _forward_output(residual, x, gate, clean)
    _forward_kernel[(N, B)](residual, x, gate, clean, y, N, **row_launch(D))
    return y


@_forward.register_fake
def _forward_output(residual: Tensor, x: Tensor, gate: Tensor, clean: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mugv::gated_residual_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gate: Tensor, clean: Tensor, needs_dx: bool, needs_dgate: bool
) -> tuple[Tensor, Tensor]:
    """dx [B, N, D] and dgate [B, K, D]. One that is not needed comes back empty."""
    dy, x, gate, clean = (tensor.contiguous() for tensor in (dy, x, gate, clean))
    B, N, D = x.shape
    dx, dgate = _backward_outputs(dy, x, gate, clean, needs_dx, needs_dgate)
    programs = reduction_programs(x)
    sums = x.new_empty((programs, *dgate.shape), dtype=torch.float32)
    _backward_kernel[(programs, B)](
        dy, x, gate, clean, dx, sums, N, NEEDS_DX=needs_dx, NEEDS_DGATE=needs_dgate, **row_launch(D)
    )
    return dx, sums.sum(0).to(dgate.dtype)


@_backward.register_fake
def _backward_outputs(
    dy: Tensor, x: Tensor, gate: Tensor, clean: Tensor, needs_dx: bool, needs_dgate: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_dx else 0), gate.new_empty(gate.shape if needs_dgate else 0)


def _setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, x, gate, clean = inputs
    ctx.save_for_backward(x, gate, clean)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    needs_dresidual, needs_dx, needs_dgate, _ = ctx.needs_input_grad
    dx = dgate = None
    if needs_dx or needs_dgate:
        dx, dgate = _backward(dy, *ctx.saved_tensors, needs_dx, needs_dgate)
    return dy if needs_dresidual else None, dx if needs_dx else None, dgate if needs_dgate else None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def gated_residual(residual_BND: Tensor, x_BND: Tensor, gate_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """residual + gate · x, with the gate of class 1 for clean tokens and of class 0 for the others.

    Runs the kernel, so it needs CUDA tensors (or Triton's interpreter, TRITON_INTERPRET=1). Computes in fp32. Tensors
    that are not contiguous are copied.

    Args:
        residual_BND, x_BND: [B, N, D], of one dtype.
        gate_BKD: [B, 2, D], in x's dtype.
        clean_BN: [B, N] bool.

    Returns:
        [B, N, D] in x's dtype.

    Raises:
        ValueError: A tensor has not the shape, dtype or device that goes with x.
    """
    B, N, D = x_BND.shape
    check_tensor("residual", residual_BND, (B, N, D), x_BND.dtype, x_BND)
    check_tensor("gate", gate_BKD, (B, 2, D), x_BND.dtype, x_BND)
    check_tensor("clean", clean_BN, (B, N), torch.bool, x_BND)
    return _forward(residual_BND, x_BND, gate_BKD, clean_BN)
