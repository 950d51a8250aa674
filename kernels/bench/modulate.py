"""Modulated LayerNorm at one layer's size: the Triton kernel beside its reference, eager and compiled.

python kernels/bench/modulate.py
"""

import harness
import torch
from torch import Tensor

from mugv_kernels.modulate import modulate, modulate_reference

N, D = 54_002, 3456
SLICE = 8192  # tokens, of both classes, on which errors are measured
# Least traffic in bytes: forward reads x and writes y; backward reads x and dy and writes dx. All else is small beside.
FORWARD_BYTES = 2 * N * D * 2
BACKWARD_BYTES = 3 * N * D * 2


def make_inputs() -> tuple[list[Tensor], Tensor]:
    """x, shift and scale in bf16, with gradients; clean, whose first fifteenth is True."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, rows, D, device="cuda", dtype=torch.bfloat16) for rows in (N, 2, 2)]
    clean = torch.arange(N, device="cuda")[None] < N // 15
    return [tensor.requires_grad_() for tensor in inputs], clean


def largest_error(function, inputs: list[Tensor], clean: Tensor) -> float:
    """Largest relative error of output and gradients on the first tokens, against the reference in fp32."""
    x, *rows = (tensor.detach() for tensor in inputs)
    narrow = [tensor.requires_grad_() for tensor in (x[:, :SLICE].clone(), *(tensor.clone() for tensor in rows))]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    dy = torch.randn_like(narrow[0])
    y, exact = function(*narrow, clean[:, :SLICE]), modulate_reference(*wide, clean[:, :SLICE])
    results = [y.detach(), *torch.autograd.grad(y, narrow, dy)]
    references = [exact.detach(), *torch.autograd.grad(exact, wide, dy.float())]
    return max(map(harness.relative_error, results, references))


def measure(name: str, function, inputs: list[Tensor], clean: Tensor) -> dict[str, object]:
    def run(*tensors: Tensor) -> Tensor:
        return function(*tensors, clean)

    forward = harness.median_ms(lambda: run(*inputs))
    both = harness.median_ms(harness.forward_backward(run, inputs))
    return {
        "implementation": name,
        "forward ms": forward,
        "forward GB/s": FORWARD_BYTES / forward / 1e6,
        "fwd+bwd ms": both,
        "fwd+bwd GB/s": (FORWARD_BYTES + BACKWARD_BYTES) / both / 1e6,
        "output and kept MiB": harness.kept_mib(run, inputs),
        "largest error": largest_error(function, inputs, clean),
    }


def main() -> None:
    inputs, clean = make_inputs()
    # Static shapes: the slice for the errors must not make it compile, and measure, a dynamic kernel.
    compiled = torch.compile(modulate_reference, dynamic=False)
    functions = {"kernel": modulate, "eager": modulate_reference, "compiled": compiled}
    rows = [measure(name, function, inputs, clean) for name, function in functions.items()]
    harness.report(f"modulate, N {N}, D {D}, bf16", rows)


if __name__ == "__main__":
    main()
