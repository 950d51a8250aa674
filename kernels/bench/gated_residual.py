"""Times the gated residual at the 10B's size: the Triton kernel beside its reference, eager and compiled."""

import torch
from harness import compare

from mugv_kernels.gated_residual import gated_residual, gated_residual_reference

N, D = 54_002, 3456
TENSOR = 2 * N * D  # bytes of [N, D] in bf16


def main() -> None:
    """Measures and reports the operation."""
    torch.manual_seed(0)
    residual, x, gate = (torch.randn(1, rows, D, device="cuda", dtype=torch.bfloat16) for rows in (N, N, 2))
    bias = torch.randn(D, device="cuda", dtype=torch.bfloat16)
    clean = torch.arange(N, device="cuda")[None] < N // 15
    compare(
        f"gated_residual, N {N}, D {D}, bf16",
        gated_residual,
        gated_residual_reference,
        # The residual's gradient is dy itself; the copy that a leaf's .grad takes of it would be timed.
        [residual, *(tensor.requires_grad_() for tensor in (x, bias, gate))],
        [clean],
        forward_bytes=3 * TENSOR,  # reads residual and x, writes y
        both_bytes=6 * TENSOR,  # and reads dy and x, writes dx
    )


if __name__ == "__main__":
    main()
