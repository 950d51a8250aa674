"""Times head_norm at the 10B's size: the Triton kernel beside its reference, eager and compiled."""

import torch
from harness import compare

from mugv_kernels.head_norm import head_norm, head_norm_reference

N, HEADS, HEAD_DIM = 54_002, 48, 72
TENSOR = 2 * N * HEADS * HEAD_DIM  # bytes of x in bf16


def main() -> None:
    """Measures and reports the operation."""
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, device="cuda").bfloat16() for shape in ((1, N, HEADS, HEAD_DIM), (HEAD_DIM,)))
    compare(
        f"head_norm, N {N}, {HEADS} heads, bf16",
        head_norm,
        head_norm_reference,
        [x.requires_grad_(), weight.requires_grad_()],
        [],
        forward_bytes=2 * TENSOR,  # reads x, writes y
        both_bytes=5 * TENSOR,  # and reads x and dy, writes dx
    )


if __name__ == "__main__":
    main()
