"""Times qk_norm_rope at the 10B's size: the Triton kernel beside its reference, eager and compiled."""

import torch
from harness import compare

from mugv_kernels.qk_norm_rope import HEAD_DIM, ROW, qk_norm_rope, qk_norm_rope_reference

N, HEADS = 54_002, 48


def main() -> None:
    """Measures and reports the operation for one rank and for four."""
    torch.manual_seed(0)
    shapes = (1, N, 3 * HEADS * HEAD_DIM), (HEAD_DIM,), (HEAD_DIM,)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    angle = 100 * torch.rand(1, N, HEAD_DIM // 2, device="cuda")
    qkv, angles = inputs[0].nbytes, 2 * angle.nbytes
    for ranks in (1, 4):
        compare(
            f"qk_norm_rope, N {N}, {HEADS} heads, {ranks} ranks, bf16",
            qk_norm_rope,
            qk_norm_rope_reference,
            inputs,
            [angle.cos(), angle.sin(), ranks],
            forward_bytes=qkv + qkv * ROW // HEAD_DIM + angles,  # reads qkv, cos and sin, writes q, k, v spaced out
            both_bytes=14 * qkv // 3
            + 2 * angles,  # and reads the gradient, q and k, cos and sin, writes dqkv; no spaces
        )


if __name__ == "__main__":
    main()
