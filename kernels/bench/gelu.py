"""Times the backward pass through GELU at the 10B's size: the kernel beside PyTorch, step by step and compiled."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import median_ms, relative_error, report
from torch import Tensor

from mugv_kernels.gelu import gelu_backward, gelu_backward_reference

N, WIDTH = 54_002, 4 * 3456
CHECKED_TOKENS = 4096


def separately(x: Tensor, gradient: Tensor) -> Tensor:
    """Computes what autograd would: GELU again, its gradient, and the sum over rows; not in place."""
    F.gelu(x, approximate="tanh")
    return torch.ops.aten.gelu_backward(gradient, x, approximate="tanh").sum(dim=0)


def error(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, gradient: Tensor) -> float:
    """Returns the largest relative error of GELU(x), the gradient and its sum, against PyTorch in fp32."""
    x, gradient = x[:CHECKED_TOKENS].clone(), gradient[:CHECKED_TOKENS].clone()
    exact = [x.float(), gradient.float()]
    got, expected = [x, gradient, function(x, gradient)], [*exact, gelu_backward_reference(*exact)]
    return max(map(relative_error, got, expected))


def main() -> None:
    """Measures and reports the operation."""
    torch.manual_seed(0)
    x, gradient = (torch.randn(N, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    traffic = 4 * x.nbytes  # reads x and its gradient, writes both
    functions = {
        "kernel": (gelu_backward, True),
        "in place": (gelu_backward_reference, True),
        "compiled": (torch.compile(gelu_backward_reference, dynamic=False), True),
        "separately": (separately, False),
    }
    rows = []
    for name, (function, in_place) in functions.items():
        largest_error = error(function, x, gradient) if in_place else None
        milliseconds = median_ms(lambda function=function: function(x, gradient))
        rows.append(
            {
                "implementation": name,
                "ms": milliseconds,
                "GB/s": traffic / milliseconds / 1e6,
                "largest error": largest_error,
            }
        )
    report(f"backward pass through GELU, {N} × {WIDTH}, bf16", rows)


if __name__ == "__main__":
    main()
