"""The fused operations as the model calls them: the Triton kernel on CUDA, plain PyTorch elsewhere.

Shape suffixes: B batch, N tokens, D hidden size, K = 2 token classes (0 noised, 1 clean), H heads of 72 channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

from torch import Tensor

from mugv_kernels import fp8 as _fp8
from mugv_kernels import gated_residual as _gated_residual
from mugv_kernels import gelu as _gelu
from mugv_kernels import head_norm as _head_norm
from mugv_kernels import modulate as _modulate
from mugv_kernels import qk_norm_rope as _qk_norm_rope

_TRITON = find_spec("triton") is not None

# A global and not a contextvar: the backward pass recomputes checkpointed layers in threads of its own, which see no
# contextvar of the caller, and torch.compile can guard on a global but not trace a contextvar.
_forced: Literal["reference", "triton"] | None = None


@contextmanager
def use(implementation: Literal["reference", "triton"]) -> Iterator[None]:
    """Makes every operation run as told inside the context, in all threads, for tests and benches.

    Triton kernels take tensors of the CPU only with TRITON_INTERPRET=1 set before triton is imported.

    Raises:
        ValueError: there is no such implementation.
    """
    global _forced
    if implementation not in ("reference", "triton"):
        raise ValueError(f'implementation {implementation!r}: must be "reference" or "triton"')
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def modulate(x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """Computes LayerNorm without affine, then scales and shifts by each token's class; see `mugv_kernels.modulate`.

    Args:
        x_BND: [B, N, D].
        shift_BKD, scale_BKD: [B, 2, D], of class 0 (noised) and 1 (clean).
        clean_BN: [B, N] bool, each token's class.
    Returns:
        [B, N, D].
    """
    run = _modulate.modulate if _uses_triton(x_BND) else _modulate.modulate_reference
    return run(x_BND, shift_BKD, scale_BKD, clean_BN)


def modulate_forward(
    x_BND: Tensor, shift_BKD: Tensor, scale_BKD: Tensor, clean_BN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `modulate` does, and returns mean and rstd [B, N] of x too, which `modulate_backward` takes."""
    run = _modulate.modulate_forward if _uses_triton(x_BND) else _modulate.modulate_forward_reference
    return run(x_BND, shift_BKD, scale_BKD, clean_BN)


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

    It is for a backward pass that is written by hand, as in `mugv_ds.models.modulated`.

    Args:
        needs_rows: whether those of shift and scale are needed; else they come back empty.
    """
    run = _modulate.modulate_backward if _uses_triton(x_BND) else _modulate.modulate_backward_reference
    return run(dy_BND, x_BND, scale_BKD, clean_BN, mean_BN, rstd_BN, needs_rows)


def gated_residual(residual_BND: Tensor, x_BND: Tensor, bias_D: Tensor, gate_BKD: Tensor, clean_BN: Tensor) -> Tensor:
    """Computes residual + gate · (x + bias), the gate by each token's class; see `mugv_kernels.gated_residual`.

    Args:
        residual_BND, x_BND: [B, N, D].
        bias_D: [D], the bias of the linear that made x.
        gate_BKD: [B, 2, D], of class 0 (noised) and 1 (clean).
        clean_BN: [B, N] bool, each token's class.
    Returns:
        [B, N, D].
    """
    run = _gated_residual.gated_residual if _uses_triton(x_BND) else _gated_residual.gated_residual_reference
    return run(residual_BND, x_BND, bias_D, gate_BKD, clean_BN)


def gelu_backward(x: Tensor, gradient: Tensor) -> Tensor:
    """Replaces x by GELU(x) and the gradient of GELU(x) by that of x, in place; see `mugv_kernels.gelu`.

    Args:
        x, gradient: [R, F], R rows of F channels, contiguous.
    Returns:
        [F], the sum of x's gradient over the rows.
    """
    run = _gelu.gelu_backward if _uses_triton(x) else _gelu.gelu_backward_reference
    return run(x, gradient)


def head_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Computes RMSNorm over the last dimension of x; see `mugv_kernels.head_norm`.

    Args:
        x: [..., d].
        weight: [d].
    Returns:
        A tensor of x's shape and dtype.
    """
    run = _head_norm.head_norm if _uses_triton(x) else _head_norm.head_norm_reference
    return run(x, weight)


def qk_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, ranks: int) -> Tensor:
    """Normalises and rotates q and k, and lays q, k and v out as the all-to-all of Ulysses sends them.

    See `mugv_kernels.qk_norm_rope`.

    Args:
        qkv: [B, N, 3·H·72].
        q_weight, k_weight: [72].
        cos, sin: [B, N, 36] fp32.
        ranks: ranks of the sequence-parallel group; divides H.
    Returns:
        [ranks, B, N, 3, H/ranks, 72].

    Raises:
        ValueError: the shapes do not fit together.
    """
    run = _qk_norm_rope.qk_norm_rope if _uses_triton(qkv) else _qk_norm_rope.qk_norm_rope_reference
    return run(qkv, q_weight, k_weight, cos, sin, ranks)


def fp8_operations(x: Tensor) -> _fp8.Operations:
    """Returns the operations that round x, or what is computed of it, to fp8; see `mugv_kernels.fp8`."""
    return _fp8.KERNELS if _uses_triton(x) else _fp8.REFERENCES


def _uses_triton(x: Tensor) -> bool:
    """Tells whether an operation on x runs its Triton kernel."""
    if _forced is not None:
        return _forced == "triton"
    return x.is_cuda and _TRITON
