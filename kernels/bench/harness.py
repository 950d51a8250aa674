"""Timing, memory and records of the bench scripts. They run from the repository root, on a CUDA device:

python kernels/bench/attention.py
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

RECORDS = Path("runs/bench.jsonl")


def median_ms(function: Callable[[], object], *, seconds: float = 1.0, warmup: int = 3) -> float:
    """Median time of a call in milliseconds, by CUDA events, over at least 5 calls and about `seconds`."""
    for _ in range(warmup):
        function()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def forward_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> Callable[[], None]:
    """A call of forward and backward; outputs get random gradients, drawn once."""
    gradients: list[Tensor] = []

    def call() -> None:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not gradients:
            gradients.extend(torch.randn_like(output) for output in outputs)
        for tensor in inputs:
            tensor.grad = None
        torch.autograd.backward(outputs, gradients)

    return call


def kept_mib(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> float:
    """Memory that a forward leaves allocated in MiB: its outputs and what it keeps for the backward pass."""
    function(*inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = function(*inputs)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del outputs
    return kept / 2**20


def peak_gib(function: Callable[[], object]) -> float:
    """Peak memory while a call runs in GiB, everything allocated before it included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖, in fp64."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def compare(
    title: str,
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    fixed: Sequence[object],
    *,
    forward_bytes: float,
    both_bytes: float,
    checked_tokens: int = 4096,
) -> None:
    """Reports a fused kernel beside its reference, eager and compiled: time, traffic, memory kept, errors.

    Args:
        inputs: leading arguments, of which the first is [B, tokens, …]; gradients are taken of those that want them.
        fixed: the arguments that follow, which get no gradient.
        forward_bytes, both_bytes: the fewest bytes that forward, and forward with backward, can move.
        checked_tokens: the first tokens, on which output and gradients are held against the reference in fp32.
    """
    # Static shapes: the shorter check must not make it compile, and measure, a dynamic kernel.
    functions = {"kernel": kernel, "eager": reference, "compiled": torch.compile(reference, dynamic=False)}
    rows = []
    for name, function in functions.items():

        def call(*leaves: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(*leaves, *fixed)

        forward = median_ms(lambda call=call: call(*inputs))
        both = median_ms(forward_backward(call, inputs))
        rows.append(
            {
                "implementation": name,
                "forward ms": forward,
                "forward GB/s": forward_bytes / forward / 1e6,
                "both ms": both,
                "both GB/s": both_bytes / both / 1e6,
                "kept MiB": kept_mib(call, inputs),
                "largest error": _largest_error(function, reference, inputs, fixed, checked_tokens),
            }
        )
    report(title, rows)


def _largest_error(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    fixed: Sequence[object],
    checked_tokens: int,
) -> float:
    """Of output and gradients, relative, against the reference in fp32."""
    tokens = inputs[0].shape[1]

    def head(value: object) -> object:
        is_by_token = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens
        return value[:, :checked_tokens] if is_by_token else value

    narrow = [head(tensor.detach()).clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in narrow]
    others = [head(value) for value in fixed]
    out, exact = function(*narrow, *others), reference(*wide, *others)
    gradient = torch.randn_like(out)
    got, expected = (
        torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], d_y)
        for y, leaves, d_y in ((out, narrow, gradient), (exact, wide, gradient.float()))
    )
    return max(map(relative_error, [out.detach(), *got], [exact.detach(), *expected]))


def report(title: str, rows: list[dict[str, object]]) -> None:
    """Prints the rows as a table and appends them, with machine, versions and commit, as a JSON line to RECORDS."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *[[_show(row.get(name)) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    with RECORDS.open("a") as file:
        file.write(json.dumps({"title": title, "machine": _machine(), "rows": rows}) + "\n")


def _show(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.2f}"
    return "" if value is None else str(value)


def _machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "count": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or None,
    }
