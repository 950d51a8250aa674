"""The gated residual of a DiT block (Peebles & Xie 2023): adds a branch's output, times a gate, to the branch's input.

Each token takes the gate of its class:

    y = residual + gate_k · (x + bias),  k = 1 for clean tokens, else 0

    dresidual = dy,  dx = gate_k · dy,  dgate_k = Σ dy · (x + bias),  dbias = Σ_k gate_k · Σ dy
    with the inner sums over the tokens of class k

x is a linear's output without its bias, which costs nothing here: as part of the linear, its gradient would take one
more pass over dx. Everything is computed in fp32, whatever the dtype of the tensors. Only the inputs are saved for the
backward pass. Its sums over tokens go through one partial sum a program, without atomics, so that they have the same
bits every time.

Shape suffixes: B batch, N tokens, D hidden size, K = 2 token classes (0 noised, 1 clean).
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from mugv_kernels.modulate import by_class, check_tensor, multiprocessors, row_launch

# Channels of a program of the backward pass. The compiler reports 54 registers a thread for it on Hopper, so that nine
# programs fit a multiprocessor; a program for a whole row, with its two gates and four sums, would take 118 registers a
# thread and 512 threads, and one would fit.
_COLUMNS = 512
_PROGRAMS_PER_MULTIPROCESSOR = 8


def gated_residual_reference(
    residual_BND: Tensor, x_BND: Tensor, bias_D: Tensor, gate_BKD: Tensor, clean_BN: Tensor
) -> Tensor:
    """Does what `gated_residual` does in plain PyTorch, in fp32, or in fp64 where the tensors are fp64."""
    wide = torch.promote_types(x_BND.dtype, torch.float32)
    y_BND = residual_BND.to(wide) + by_class(gate_BKD.to(wide), clean_BN) * (x_BND.to(wide) + bias_D.to(wide))
    return y_BND.to(x_BND.dtype)


if find_spec("triton"):  # not built for every platform; the reference needs none
    import triton
    import triton.language as tl

    @triton.jit
    def _forward_kernel(
        residual_ptr, x_ptr, bias_ptr, gate_ptr, clean_ptr, y_ptr, N, D: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        """Each program computes one token; the grid is (N, B)."""
        batch = tl.program_id(1).to(tl.int64)
        token = batch * N + tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        mask = d < D

        residual = tl.load(residual_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
        row = (2 * batch + (tl.load(clean_ptr + token) != 0).to(tl.int64)) * D + d
        gate = tl.load(gate_ptr + row, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
        y = residual + gate * (x + bias)
        tl.store(y_ptr + token * D + d, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _backward_kernel(
        dy_ptr,
        x_ptr,
        bias_ptr,
        gate_ptr,
        clean_ptr,
        dx_ptr,
        sums_ptr,
        N,
        NEEDS_DX: tl.constexpr,
        NEEDS_SUMS: tl.constexpr,
        D: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        """Each program takes COLUMNS channels of every `programs`-th token of one sample.

        The grid is (programs, B, blocks of D). The partial sums of dgate, then of dy, go to sums [programs, 2, B, K, D]
        fp32.
        """
        batch = tl.program_id(1).to(tl.int64)
        d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        mask = d < D

        # The rows of both classes stay in registers, so that no load in the loop waits for a token's class.
        rows = 2 * batch * D + d
        gate_noised = tl.load(gate_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        gate_clean = tl.load(gate_ptr + rows + D, mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
        dgate_noised = tl.zeros([COLUMNS], dtype=tl.float32)
        dgate_clean = tl.zeros([COLUMNS], dtype=tl.float32)
        dy_noised = tl.zeros([COLUMNS], dtype=tl.float32)
        dy_clean = tl.zeros([COLUMNS], dtype=tl.float32)

        for n in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=4):
            token = batch * N + n
            dy = tl.load(dy_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
            is_clean = tl.load(clean_ptr + token) != 0
            if NEEDS_DX:
                dx = tl.where(is_clean, gate_clean, gate_noised) * dy
                tl.store(dx_ptr + token * D + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if NEEDS_SUMS:
                x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
                dgate = dy * (x + bias)
                dgate_noised += tl.where(is_clean, 0.0, dgate)
                dgate_clean += tl.where(is_clean, dgate, 0.0)
                dy_noised += tl.where(is_clean, 0.0, dy)
                dy_clean += tl.where(is_clean, dy, 0.0)

        if NEEDS_SUMS:
            B = tl.num_programs(1)
            dgate_ptr = sums_ptr + (tl.program_id(0) * 2 * B + batch) * 2 * D + d
            dy_sum_ptr = dgate_ptr + B * 2 * D
            tl.store(dgate_ptr, dgate_noised, mask=mask)
            tl.store(dgate_ptr + D, dgate_clean, mask=mask)
            tl.store(dy_sum_ptr, dy_noised, mask=mask)
            tl.store(dy_sum_ptr + D, dy_clean, mask=mask)


# Custom operators rather than an autograd.Function: torch.compile takes them as they are, without a graph break.
@torch.library.custom_op("mugv::gated_residual", mutates_args=())
def _forward(residual: Tensor, x: Tensor, bias: Tensor, gate: Tensor, clean: Tensor) -> Tensor:
    residual, x, bias, gate, clean = (tensor.contiguous() for tensor in (residual, x, bias, gate, clean))
    B, N, D = x.shape
    y = torch.empty_like(x)
    _forward_kernel[(N, B)](residual, x, bias, gate, clean, y, N, **row_launch(D))
    return y


@_forward.register_fake
def _(residual: Tensor, x: Tensor, bias: Tensor, gate: Tensor, clean: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("mugv::gated_residual_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, bias: Tensor, gate: Tensor, clean: Tensor, needs_dx: bool, needs_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx [B, N, D], dbias [D] and dgate [B, K, D]; what is not needed comes back empty."""
    dy, x, bias, gate, clean = (tensor.contiguous() for tensor in (dy, x, bias, gate, clean))
    B, N, D = x.shape
    dx, dbias, dgate = _backward_outputs(dy, x, bias, gate, clean, needs_dx, needs_sums)
    blocks = triton.cdiv(D, _COLUMNS)
    programs = min(N, triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x), B * blocks))
    sums = x.new_empty((programs, 2, *dgate.shape), dtype=torch.float32)
    _backward_kernel[(programs, B, blocks)](
        *(dy, x, bias, gate, clean, dx, sums, N),
        NEEDS_DX=needs_dx,
        NEEDS_SUMS=needs_sums,
        D=D,
        COLUMNS=_COLUMNS,
        num_warps=4,
    )
    if needs_sums:
        dgate, dy_sum = sums.sum(0)
        dbias = (gate * dy_sum).sum((0, 1))
    return dx, dbias.to(bias.dtype), dgate.to(gate.dtype, copy=True)


@_backward.register_fake
def _backward_outputs(
    dy: Tensor, x: Tensor, bias: Tensor, gate: Tensor, clean: Tensor, needs_dx: bool, needs_sums: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_dx else 0)
    return dx, *(row.new_empty(row.shape if needs_sums else 0) for row in (bias, gate))


def _setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, x, bias, gate, clean = inputs
    ctx.save_for_backward(x, bias, gate, clean)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs_dresidual, needs_dx, needs_dbias, needs_dgate, _ = ctx.needs_input_grad
    dx = dbias = dgate = None
    if needs_dx or needs_dbias or needs_dgate:
        dx, dbias, dgate = _backward(dy, *ctx.saved_tensors, needs_dx, needs_dbias or needs_dgate)
    return (
        dy if needs_dresidual else None,
        dx if needs_dx else None,
        dbias if needs_dbias else None,
        dgate if needs_dgate else None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def gated_residual(residual_BND: Tensor, x_BND: Tensor, bias_D: Tensor, gate_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """Computes residual + gate · (x + bias), with the gate of class 1 for clean tokens and of class 0 for the others.

    It runs the kernel, so it needs CUDA tensors (or Triton's interpreter, TRITON_INTERPRET=1). It computes in fp32, and
    is differentiable. Tensors that are not contiguous are copied.

    Args:
        residual_BND, x_BND: [B, N, D], of one dtype.
        bias_D: [D], in x's dtype.
        gate_BKD: [B, 2, D], in x's dtype.
        clean_BN: [B, N] bool.

    Returns:
        [B, N, D] in x's dtype.

    Raises:
        ValueError: a tensor does not have the shape, dtype or device that goes with x.
    """
    B, N, D = x_BND.shape
    check_tensor("residual", residual_BND, (B, N, D), x_BND.dtype, x_BND)
    check_tensor("bias", bias_D, (D,), x_BND.dtype, x_BND)
    check_tensor("gate", gate_BKD, (B, 2, D), x_BND.dtype, x_BND)
    check_tensor("clean", clean_BN, (B, N), torch.bool, x_BND)
    return _forward(residual_BND, x_BND, bias_D, gate_BKD, clean_BN)
