"""adaLN (Peebles & Xie 2023): LayerNorm without affine, then a scale and a shift for each token's class.

    x̂ = (x − mean_D(x)) · rstd,  rstd = 1 / √(var_D(x) + 1e-6)
    y = x̂ · (1 + scale_k) + shift_k,  k = 1 for clean tokens, else 0

    dx = rstd · (g − mean_D(g) − x̂ · mean_D(g · x̂)),  g = dy · (1 + scale_k)
    dshift_k = Σ dy,  dscale_k = Σ dy · x̂,  over the tokens of class k

Everything is computed in fp32, whatever the dtype of the tensors. The inputs, mean and rstd are saved for the backward
pass, which computes x̂ again. Its sums over tokens go through one partial sum a program, without atomics, so that they
have the same bits every time.

Shape suffixes: B batch, N tokens, D hidden size, K = 2 token classes (0 noised, 1 clean).
"""

from importlib.util import find_spec

import torch
from torch import Tensor

EPS = 1e-6
PROGRAMS_PER_MULTIPROCESSOR = 4


def by_class(rows_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """Returns each token's row [B, N, D]: that of class 1 where the token is clean, else that of class 0."""
    noised_B1D, clean_B1D = rows_BKD[:, :, None].unbind(1)
    return torch.where(clean_BN[..., None], clean_B1D, noised_B1D)


def modulate_reference(x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """Does what `modulate` does in plain PyTorch, in fp32, or in fp64 where the tensors are fp64."""
    return modulate_forward_reference(x_BND, shift_BKD, scale_BKD, clean_BN)[0]


def modulate_forward_reference(
    x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `modulate_forward` does in plain PyTorch."""
    wide = torch.promote_types(x_BND.dtype, torch.float32)
    normed_BND, mean_BN1, rstd_BN1 = torch.native_layer_norm(x_BND.to(wide), x_BND.shape[-1:], None, None, EPS)
    y_BND = normed_BND * (1 + by_class(scale_BKD.to(wide), clean_BN)) + by_class(shift_BKD.to(wide), clean_BN)
    return y_BND.to(x_BND.dtype), mean_BN1.squeeze(-1), rstd_BN1.squeeze(-1)


def modulate_backward_reference(
    dy_BND: Tensor,
    x_BND: Tensor,
    scale_BKD: Tensor,
    clean_BN: Tensor,
    mean_BN: Tensor,
    rstd_BN: Tensor,
    needs_rows: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `modulate_backward` does in plain PyTorch."""
    dy_BND, rstd_BN1 = dy_BND.to(mean_BN.dtype), rstd_BN[..., None]
    normed_BND = (x_BND.to(mean_BN.dtype) - mean_BN[..., None]) * rstd_BN1
    g_BND = dy_BND * (1 + by_class(scale_BKD.to(mean_BN.dtype), clean_BN))
    mean_g_BN1, mean_g_normed_BN1 = g_BND.mean(-1, keepdim=True), (g_BND * normed_BND).mean(-1, keepdim=True)
    dx_BND = rstd_BN1 * (g_BND - mean_g_BN1 - normed_BND * mean_g_normed_BN1)
    if not needs_rows:
        return dx_BND.to(x_BND.dtype), scale_BKD.new_empty(0), scale_BKD.new_empty(0)
    classes_BKN = torch.stack([~clean_BN, clean_BN], dim=1).to(dy_BND.dtype)
    dshift_BKD, dscale_BKD = classes_BKN @ dy_BND, classes_BKN @ (dy_BND * normed_BND)
    return dx_BND.to(x_BND.dtype), dshift_BKD.to(scale_BKD.dtype), dscale_BKD.to(scale_BKD.dtype)


if find_spec("triton"):  # not built for every platform; the reference needs none
    import triton
    import triton.language as tl

    @triton.jit
    def modulated_row(
        x_ptr, shift_ptr, scale_ptr, clean_ptr, batch, token, d, mask, EPS: tl.constexpr, D: tl.constexpr
    ):  # fmt: skip
        """Returns y of a token of a sample, and its mean and rstd, all fp32."""
        x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
        row = (2 * batch + (tl.load(clean_ptr + token) != 0).to(tl.int64)) * D + d
        shift = tl.load(shift_ptr + row, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=mask, other=0.0).to(tl.float32)

        mean = tl.sum(x, axis=0) / D
        centred = tl.where(mask, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + EPS)
        return centred * rstd * (1.0 + scale) + shift, mean, rstd

    @triton.jit
    def _forward_kernel(
        x_ptr,
        shift_ptr,
        scale_ptr,
        clean_ptr,
        y_ptr,
        mean_ptr,
        rstd_ptr,
        N,
        EPS: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Each program computes one token; the grid is (N, B)."""
        batch = tl.program_id(1).to(tl.int64)
        token = batch * N + tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        mask = d < D
        y, mean, rstd = modulated_row(x_ptr, shift_ptr, scale_ptr, clean_ptr, batch, token, d, mask, EPS, D)
        tl.store(y_ptr + token * D + d, y.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + token, mean)
        tl.store(rstd_ptr + token, rstd)

    @triton.jit
    def _backward_kernel(
        dy_ptr,
        x_ptr,
        scale_ptr,
        clean_ptr,
        mean_ptr,
        rstd_ptr,
        dx_ptr,
        sums_ptr,
        N,
        NEEDS_DX: tl.constexpr,
        NEEDS_ROWS: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        """Each program takes every `programs`-th token of one sample; the grid is (programs, B).

        The partial sums of dshift, then of dscale, go to sums [programs, 2, B, K, D] fp32.
        """
        batch = tl.program_id(1).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        mask = d < D

        # The rows of both classes stay in registers, so that no load in the loop waits for a token's class.
        rows = 2 * batch * D + d
        scale_noised = tl.load(scale_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        scale_clean = tl.load(scale_ptr + rows + D, mask=mask, other=0.0).to(tl.float32)
        dshift_noised = tl.zeros([BLOCK_D], dtype=tl.float32)
        dshift_clean = tl.zeros([BLOCK_D], dtype=tl.float32)
        dscale_noised = tl.zeros([BLOCK_D], dtype=tl.float32)
        dscale_clean = tl.zeros([BLOCK_D], dtype=tl.float32)

        for n in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=3):
            token = batch * N + n
            dy = tl.load(dy_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
            is_clean = tl.load(clean_ptr + token) != 0
            rstd = tl.load(rstd_ptr + token)
            normed = (x - tl.load(mean_ptr + token)) * rstd  # not 0 beyond D, where dy is
            dy_normed = dy * normed
            if NEEDS_DX:
                scale = 1.0 + tl.where(is_clean, scale_clean, scale_noised)
                mean_g = tl.sum(dy * scale, axis=0) / D
                mean_g_normed = tl.sum(dy_normed * scale, axis=0) / D
                dx = rstd * (dy * scale - mean_g - normed * mean_g_normed)
                tl.store(dx_ptr + token * D + d, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if NEEDS_ROWS:
                dshift_noised += tl.where(is_clean, 0.0, dy)
                dshift_clean += tl.where(is_clean, dy, 0.0)
                dscale_noised += tl.where(is_clean, 0.0, dy_normed)
                dscale_clean += tl.where(is_clean, dy_normed, 0.0)

        if NEEDS_ROWS:
            B = tl.num_programs(1)
            dshift_ptr = sums_ptr + (tl.program_id(0) * 2 * B + batch) * 2 * D + d
            dscale_ptr = dshift_ptr + B * 2 * D
            tl.store(dshift_ptr, dshift_noised, mask=mask)
            tl.store(dshift_ptr + D, dshift_clean, mask=mask)
            tl.store(dscale_ptr, dscale_noised, mask=mask)
            tl.store(dscale_ptr + D, dscale_clean, mask=mask)


def row_launch(D: int) -> dict[str, int]:
    """Returns the launch arguments of a kernel that holds a whole row of D channels in registers.

    At D = 3456 a thread holds 8 elements.
    """
    block = triton.next_power_of_2(D)
    return {"D": D, "BLOCK_D": block, "num_warps": max(1, min(16, block // 256))}


def reduction_programs(x_BND: Tensor) -> int:
    """Returns the number of programs among which a reduction shares the tokens of one sample."""
    B, N, _ = x_BND.shape
    return min(N, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x_BND), B))


def multiprocessors(x: Tensor) -> int:
    """Returns the number of multiprocessors of the device that holds x; one for the CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    """Checks that a tensor goes with x, because a kernel, which gets bare pointers, would read past one that does not.

    Raises:
        ValueError: the tensor has another shape or dtype than these, or lies on another device than x.
    """
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {list(shape)} {dtype} on {x.device} to go with x {list(x.shape)} {x.dtype}, "
            f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


# Custom operators rather than an autograd.Function: torch.compile takes them as they are, without a graph break.
@torch.library.custom_op("mugv::modulate", mutates_args=())
def _forward(x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y [B, N, D] in x's dtype, and mean and rstd [B, N] fp32."""
    x, shift, scale, clean = (tensor.contiguous() for tensor in (x, shift, scale, clean))
    B, N, D = x.shape
    y, mean, rstd = _forward_outputs(x, shift, scale, clean)
    _forward_kernel[(N, B)](x, shift, scale, clean, y, mean, rstd, N, EPS=EPS, **row_launch(D))
    return y, mean, rstd


@_forward.register_fake
def _forward_outputs(x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@torch.library.custom_op("mugv::modulate_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, scale: Tensor, clean: Tensor, mean: Tensor, rstd: Tensor, needs_dx: bool, needs_rows: bool
) -> tuple[Tensor, Tensor]:
    """Returns dx [B, N, D], and dshift and dscale stacked [2, B, K, D]; what is not needed comes back empty."""
    dy, x, scale, clean = (tensor.contiguous() for tensor in (dy, x, scale, clean))
    B, N, D = x.shape
    dx, rows = _backward_outputs(dy, x, scale, clean, mean, rstd, needs_dx, needs_rows)
    programs = reduction_programs(x)
    sums = x.new_empty((programs, *rows.shape), dtype=torch.float32)
    _backward_kernel[(programs, B)](
        dy, x, scale, clean, mean, rstd, dx, sums, N, NEEDS_DX=needs_dx, NEEDS_ROWS=needs_rows, **row_launch(D)
    )
    return dx, sums.sum(0).to(rows.dtype)


@_backward.register_fake
def _backward_outputs(
    dy: Tensor, x: Tensor, scale: Tensor, clean: Tensor, mean: Tensor, rstd: Tensor, needs_dx: bool, needs_rows: bool
) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape if needs_dx else 0)
    return dx, scale.new_empty((2, *scale.shape) if needs_rows else 0)


def _setup_context(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale, clean = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, clean, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx, dy: Tensor, *_) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    needs_dx, needs_dshift, needs_dscale, _ = ctx.needs_input_grad
    needs_rows = needs_dshift or needs_dscale
    dx, rows = _backward(dy, *ctx.saved_tensors, needs_dx, needs_rows)
    return (
        dx if needs_dx else None,
        rows[0] if needs_dshift else None,
        rows[1] if needs_dscale else None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def modulate(x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """Computes LayerNorm(x) · (1 + scale) + shift, with the rows of class 1 for clean tokens, else those of class 0.

    It runs the kernel, so it needs CUDA tensors (or Triton's interpreter, TRITON_INTERPRET=1). It computes in fp32, and
    is differentiable. Tensors that are not contiguous are copied.

    Args:
        x_BND: [B, N, D].
        shift_BKD, scale_BKD: [B, 2, D], in x's dtype or in fp32.
        clean_BN: [B, N] bool.

    Returns:
        [B, N, D] in x's dtype.

    Raises:
        ValueError: a tensor does not have the shape, dtype or device that goes with x.
    """
    return modulate_forward(x_BND, shift_BKD, scale_BKD, clean_BN)[0]


def modulate_forward(
    x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `modulate` does, and returns mean and rstd [B, N] fp32 of x too, which `modulate_backward` takes.

    Raises:
        ValueError: as `modulate`.
    """
    B, N, D = x_BND.shape
    for name, rows in (("shift", shift_BKD), ("scale", scale_BKD)):
        dtype = torch.float32 if rows.dtype == torch.float32 else x_BND.dtype
        check_tensor(name, rows, (B, 2, D), dtype, x_BND)
    check_tensor("clean", clean_BN, (B, N), torch.bool, x_BND)
    return _forward(x_BND, shift_BKD, scale_BKD, clean_BN)


def modulate_backward(
    dy_BND: Tensor,
    x_BND: Tensor,
    scale_BKD: Tensor,
    clean_BN: Tensor,
    mean_BN: Tensor,
    rstd_BN: Tensor,
    needs_rows: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, shift and scale from that of `modulate_forward`'s first output.

    It is for a backward pass that calls `modulate_forward` again; `modulate` itself is differentiable.

    Args:
        needs_rows: whether the gradients of shift and scale are needed; else they come back empty.
    Returns:
        dx [B, N, D] in x's dtype; dshift and dscale [B, 2, D] in scale's.
    """
    dx_BND, rows = _backward(dy_BND, x_BND, scale_BKD, clean_BN, mean_BN, rstd_BN, True, needs_rows)
    if not needs_rows:
        return dx_BND, rows, rows.clone()
    dshift_BKD, dscale_BKD = rows.unbind()
    return dx_BND, dshift_BKD.clone(), dscale_BKD  # an operator that returns both may not return views of one tensor
