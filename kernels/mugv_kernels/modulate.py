"""adaLN: LayerNorm without affine, then scale and shift, each token by the row of its class (Peebles & Xie 2023).

    x̂ = (x − mean_D(x)) · rstd,  rstd = 1 / √(var_D(x) + 1e-6)
    y = x̂ · (1 + scale_k) + shift_k,  k = 1 for clean tokens, else 0

    dx = rstd · (g − mean_D(g) − x̂ · mean_D(g · x̂)),  g = dy · (1 + scale_k)
    dshift_k = Σ dy,  dscale_k = Σ dy · x̂,  over the tokens of class k

Everything is computed in fp32, whatever the dtype of the tensors. The backward pass keeps the inputs, mean and rstd,
and recomputes x̂. Its sums over tokens go through one partial sum a program, without atomics: the same bits every time.

Shape suffixes: B batch, N tokens, D hidden size, K = 2 token classes (0 noised, 1 clean).
"""

from importlib.util import find_spec

import torch
from torch import Tensor

EPS = 1e-6
PROGRAMS_PER_MULTIPROCESSOR = 4


def by_class(rows_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """Each token's row [B, N, D]: of class 1 where the token is clean, else of class 0."""
    noised, clean = rows_BKD[:, :, None].unbind(1)
    return torch.where(clean_BN[..., None], clean, noised)


def modulate_reference(x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """`modulate` in plain PyTorch: computed in fp32, or in fp64 where the tensors are fp64."""
    return modulate_forward_reference(x_BND, shift_BKD, scale_BKD, clean_BN)[0]


def modulate_forward_reference(
    x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`modulate_forward` in plain PyTorch."""
    wide = torch.promote_types(x_BND.dtype, torch.float32)
    normed, mean, rstd = torch.native_layer_norm(x_BND.to(wide), x_BND.shape[-1:], None, None, EPS)
    y = normed * (1 + by_class(scale_BKD.to(wide), clean_BN)) + by_class(shift_BKD.to(wide), clean_BN)
    return y.to(x_BND.dtype), mean.squeeze(-1), rstd.squeeze(-1)


def modulate_backward_reference(
    dy_BND: Tensor, x_BND: Tensor, scale_BKD: Tensor, clean_BN: Tensor, mean_BN: Tensor, rstd_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`modulate_backward` in plain PyTorch."""
    dy, rstd = dy_BND.to(mean_BN.dtype), rstd_BN[..., None]
    normed = (x_BND.to(mean_BN.dtype) - mean_BN[..., None]) * rstd
    g = dy * (1 + by_class(scale_BKD.to(mean_BN.dtype), clean_BN))
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    classes_BKN = torch.stack([~clean_BN, clean_BN], dim=1).to(dy.dtype)
    dshift, dscale = classes_BKN @ dy, classes_BKN @ (dy * normed)
    return dx.to(x_BND.dtype), dshift.to(scale_BKD.dtype), dscale.to(scale_BKD.dtype)


if find_spec("triton"):  # not built for every platform; the reference needs none
    import triton
    import triton.language as tl

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
        """One token a program; grid (N, B)."""
        batch = tl.program_id(1).to(tl.int64)
        token = batch * N + tl.program_id(0)
        d = tl.arange(0, BLOCK_D)
        mask = d < D

        x = tl.load(x_ptr + token * D + d, mask=mask, other=0.0).to(tl.float32)
        row = (2 * batch + (tl.load(clean_ptr + token) != 0).to(tl.int64)) * D + d
        shift = tl.load(shift_ptr + row, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row, mask=mask, other=0.0).to(tl.float32)

        mean = tl.sum(x, axis=0) / D
        centred = tl.where(mask, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / D + EPS)
        y = centred * rstd * (1.0 + scale) + shift

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
        """Every `programs`-th token of one batch element a program; grid (programs, B).

        Partial sums go to sums [programs, 2, B, K, D] fp32: of dshift, then of dscale.
        """
        batch = tl.program_id(1).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        mask = d < D

        # Both rows stay in registers: no load in the loop waits for a token's class.
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
    """Launch arguments of a kernel that holds a whole row of D in registers: 8 elements a thread at D = 3456."""
    block = triton.next_power_of_2(D)
    return {"D": D, "BLOCK_D": block, "num_warps": max(1, min(16, block // 256))}


def reduction_programs(x_BND: Tensor) -> int:
    """Programs among which a reduction shares the tokens of one batch element."""
    B, N, _ = x_BND.shape
    return min(N, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x_BND), B))


def multiprocessors(x: Tensor) -> int:
    """Of the device that holds x; one for the CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    """Raises ValueError where a tensor does not go with x: a kernel, handed bare pointers, would read astray."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must be {list(shape)} {dtype} on {x.device} to go with x {list(x.shape)} {x.dtype}, "
            f"got {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )


# Custom operators rather than an autograd.Function: torch.compile takes them as they are, without a graph break.
@torch.library.custom_op("mugv::modulate", mutates_args=())
def _forward(x: Tensor, shift: Tensor, scale: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, N, D] in x's dtype; mean and rstd [B, N] fp32."""
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
    """dx [B, N, D]; dshift and dscale stacked [2, B, K, D]. One that is not needed comes back empty."""
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
    """LayerNorm(x) · (1 + scale) + shift, with the rows of class 1 for clean tokens and of class 0 for the others.

    Runs the kernel, so it needs CUDA tensors (or Triton's interpreter, TRITON_INTERPRET=1). Computes in fp32. Tensors
    that are not contiguous are copied.

    Args:
        x_BND: [B, N, D].
        shift_BKD, scale_BKD: [B, 2, D], in x's dtype or in fp32.
        clean_BN: [B, N] bool.

    Returns:
        [B, N, D] in x's dtype.

    Raises:
        ValueError: A tensor has not the shape, dtype or device that goes with x.
    """
    return modulate_forward(x_BND, shift_BKD, scale_BKD, clean_BN)[0]


def modulate_forward(
    x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`modulate`, and mean and rstd [B, N] fp32 of x, which `modulate_backward` takes."""
    B, N, D = x_BND.shape
    for name, rows in (("shift", shift_BKD), ("scale", scale_BKD)):
        dtype = torch.float32 if rows.dtype == torch.float32 else x_BND.dtype
        check_tensor(name, rows, (B, 2, D), dtype, x_BND)
    check_tensor("clean", clean_BN, (B, N), torch.bool, x_BND)
    return _forward(x_BND, shift_BKD, scale_BKD, clean_BN)


def modulate_backward(
    dy_BND: Tensor, x_BND: Tensor, scale_BKD: Tensor, clean_BN: Tensor, mean_BN: Tensor, rstd_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in x's dtype, dshift and dscale [B, 2, D] in scale's, from the gradient of `modulate_forward`'s first output.

    For a backward pass that calls `modulate_forward` again; `modulate` itself is differentiable.
    """
    dx, rows = _backward(dy_BND, x_BND, scale_BKD, clean_BN, mean_BN, rstd_BN, True, True)
    dshift, dscale = rows.unbind()
    return dx, dshift.clone(), dscale  # an operator that returns both may not return views of one tensor
