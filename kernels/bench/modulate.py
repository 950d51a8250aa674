"""Times the modulated LayerNorm at the 10B's size: the Triton kernel beside its reference, eager and compiled."""

import torch
from harness import compare

from mugv_kernels.modulate import modulate, modulate_reference

N, D = 54_002, 3456
TENSOR = 2 * N * D  # bytes of [N, D] in bf16


def main() -> None:
    """Measures and reports the operation."""
    torch.manual_seed(0)
    x, shift, scale = (torch.randn(1, rows, D, device="cuda", dtype=torch.bfloat16) for rows in (N, 2, 2))
    clean = torch.arange(N, device="cuda")[None] < N // 15
    compare(
        f"modulate, N {N}, D {D}, bf16",
        modulate,
        modulate_reference,
        [tensor.requires_grad_() for tensor in (x, shift, scale)],
        [clean],
        forward_bytes=2 * TENSOR,  # reads x, writes y
        both_bytes=5 * TENSOR,  # and reads x and dy, writes dx
    )


if __name__ == "__main__":
    main()
