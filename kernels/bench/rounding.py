"""The linears of a block in bf16 and in fp8, and the kernels that round, at the rows of stage 1: times and errors.

kernels/bench/rounding.py --rows 16566
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import forward_backward, median_ms, relative_error, report
from torch import Tensor

from mugv_ds.models.fp8_products import Weight, fp8_linear, round_weight
from mugv_kernels import fp8
from mugv_kernels.fp8 import E4M3, E5M2

# Of the block's linears over the tokens: input and output width in units of D, and how many there are.
LINEARS = {"qkv": (1, 3, 1), "proj, q_linear": (1, 1, 3), "fc1": (1, 4, 1), "fc2": (4, 1, 1)}
D = 3456


def linears(rows: int) -> None:
    """Reports each kind of linear, forward and backward."""
    table = []
    for name, (given, made, count) in LINEARS.items():
        x = torch.randn(rows, given * D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = (0.02 * torch.randn(made * D, given * D, device="cuda")).bfloat16().requires_grad_()
        kept = Weight(weight, *round_weight(weight))
        calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "bf16": lambda x, weight: F.linear(x, weight),
            "fp8": lambda x, weight: fp8_linear(x, Weight(weight), None),
            "fp8, weight kept": lambda x, _, kept=kept: fp8_linear(x, kept, None),
        }
        gradient = torch.randn(rows, made * D, device="cuda", dtype=torch.bfloat16)
        exact = _results(calls["bf16"], x, weight, gradient)
        for kind, call in calls.items():
            errors = [relative_error(*pair) for pair in zip(_results(call, x, weight, gradient), exact, strict=True)]
            milliseconds = median_ms(forward_backward(call, [x, weight]))
            table.append({"linear": name, "of a block": count, "in": kind, "ms": milliseconds})
            table[-1] |= dict(zip(("y", "dx", "dW"), errors, strict=True))
    report(f"linears, forward and backward, {rows} rows; errors against bf16", table)
    total = {kind: sum(row["ms"] * row["of a block"] for row in table if row["in"] == kind) for kind in calls}
    report("those of a block", [{"in": kind, "ms": ms, "× bf16": total["bf16"] / ms} for kind, ms in total.items()])


def _results(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
    y = call(x, weight)
    return [y.detach(), *torch.autograd.grad(y, [x, weight], gradient)]


def rounding(rows: int) -> None:
    """Reports the kernels that round, with the bytes that they move in a second."""
    x = torch.randn(1, rows, D, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(rows, 4 * D, device="cuda", dtype=torch.bfloat16)
    shift, scale = (torch.randn(1, 2, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    clean = torch.zeros(1, rows, dtype=torch.bool, device="cuda")
    largest, bound = fp8.largest(x), fp8.modulated_bound(shift, scale)
    _, mean, rstd = fp8.modulate_to(x, shift, scale, clean, bound, E4M3)
    of, gradient = fp8.Modulated(shift, scale, clean, mean, rstd), torch.randn_like(wide)
    both, values, transposed = ({"values": a, "transposed": b} for a, b in ((True, True), (True, False), (False, True)))
    element = rows * D
    kernels = {
        "largest of x": (lambda: fp8.largest(x), 2 * element),
        "x to E5M2, both forms": (lambda: fp8.round_to(x[0], largest, E5M2, **both), 4 * element),
        "x to E4M3, as it is": (lambda: fp8.round_to(x[0], largest, E4M3, **values), 3 * element),
        "x to E4M3, transposed": (lambda: fp8.round_to(x[0], largest, E4M3, **transposed), 3 * element),
        "LayerNorm's bound": (lambda: fp8.modulated_bound(shift, scale), 8 * D),
        "LayerNorm, as it is": (lambda: fp8.modulate_to(x, shift, scale, clean, bound, E4M3), 3 * element),
        "LayerNorm, transposed": (lambda: fp8.transpose_modulated(x, of, bound, E4M3), 3 * element),
        "largest of GELU": (lambda: fp8.gelu_largest(wide), 8 * element),
        "GELU, as it is": (lambda: fp8.round_gelu(wide, largest, E4M3, **values), 12 * element),
        "GELU, transposed": (lambda: fp8.round_gelu(wide, largest, E4M3, **transposed), 12 * element),
        "back through GELU": (lambda: fp8.gelu_backward(wide, gradient), 24 * element),
    }
    table = []
    for name, (call, count) in kernels.items():
        milliseconds = median_ms(call)
        table.append({"kernel": name, "ms": milliseconds, "TB/s": count / milliseconds / 1e9})
    report(f"rounding, {rows} rows", table)


def main() -> None:
    """Reports the linears and the kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16566)
    args = parser.parse_args()
    linears(args.rows)
    rounding(args.rows)


if __name__ == "__main__":
    main()
