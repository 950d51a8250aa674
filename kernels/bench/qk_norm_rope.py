"""qk_norm_rope at the 10B's sizes: the Triton kernel against its reference, eager and compiled."""

import argparse
import functools
from collections.abc import Callable

import torch
from harness import forward_backward, kept_mib, median_ms, relative_error, report
from torch import Tensor

from mugv_kernels.qk_norm_rope import HEAD_DIM, qk_norm_rope, qk_norm_rope_reference

CHECKED_TOKENS = 1024


def make_inputs(tokens: int, heads: int, device: torch.device) -> list[Tensor]:
    """qkv and the two weights in bf16, all wanting gradients, then cos and sin."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (1, tokens, 3 * heads * HEAD_DIM), (HEAD_DIM,), (HEAD_DIM,)
    trained = [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes]
    angle = 100 * torch.rand(1, tokens, HEAD_DIM // 2, generator=generator, device=device)
    return [*(x.requires_grad_() for x in trained), angle.cos(), angle.sin()]


def fewest_bytes(qkv: Tensor, cos: Tensor) -> tuple[int, int]:
    """Of forward, and of forward and backward: what must be read and written, each once.

    Forward reads qkv, cos and sin and writes as much as qkv. Backward reads as much of the gradient, the q and k of
    qkv, cos and sin, and writes the gradient of qkv. The weights are nothing beside them.
    """
    qkv_bytes, angle_bytes = qkv.nbytes, 2 * cos.nbytes
    return 2 * qkv_bytes + angle_bytes, 14 * qkv_bytes // 3 + 2 * angle_bytes


def errors(function: Callable[..., Tensor], inputs: list[Tensor], ranks: int) -> dict[str, float]:
    """Relative errors of output and gradients on the first tokens, against the reference in fp32."""
    qkv, *weights = (x.detach() for x in inputs[:3])
    angles = [x[:, :CHECKED_TOKENS] for x in inputs[3:]]
    leaves = [x.clone().requires_grad_() for x in (qkv[:, :CHECKED_TOKENS], *weights)]
    exact_leaves = [x.detach().float().requires_grad_() for x in leaves]
    out = function(*leaves, *angles, ranks)
    exact = qk_norm_rope_reference(*exact_leaves, *angles, ranks)
    d_out = torch.randn_like(out)
    results = [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
    expected = [exact.detach(), *torch.autograd.grad(exact, exact_leaves, d_out.float())]
    names = ("error", "error dqkv", "error dq_weight", "error dk_weight")
    return {name: relative_error(*pair) for name, *pair in zip(names, results, expected, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=54_002)
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    inputs = make_inputs(args.tokens, args.heads, torch.device("cuda"))
    trained, angles = inputs[:3], inputs[3:]
    forward_bytes, both_bytes = fewest_bytes(trained[0], angles[0])
    variants = {
        "Triton": qk_norm_rope,
        "reference, eager": qk_norm_rope_reference,
        "reference, torch.compile": torch.compile(qk_norm_rope_reference, dynamic=False),
    }
    for ranks in args.ranks:
        rows = []
        for name, function in variants.items():

            def call(*leaves: Tensor, function: Callable[..., Tensor] = function, ranks: int = ranks) -> Tensor:
                return function(*leaves, *angles, ranks)

            with torch.no_grad():
                forward = median_ms(functools.partial(call, *trained))
            both = median_ms(forward_backward(call, trained))
            rows.append(
                {
                    "qk_norm_rope": name,
                    "forward ms": forward,
                    "GB/s": forward_bytes / forward / 1e6,
                    "forward+backward ms": both,
                    "both GB/s": both_bytes / both / 1e6,
                    "kept MiB": kept_mib(call, trained),
                    **errors(function, inputs, ranks),
                }
            )
        report(f"qk_norm_rope, {args.tokens} tokens, {args.heads} heads, {ranks} ranks, bf16", rows)


if __name__ == "__main__":
    main()
