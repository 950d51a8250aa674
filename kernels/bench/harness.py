"""Timing, memory and records for the bench scripts, which run from the repository root, on a CUDA device:

python kernels/bench/attention.py
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

RECORDS = Path("runs/bench.jsonl")  # one JSON line a report


def median_ms(function: Callable[[], object], *, seconds: float = 1.0, warmup: int = 3) -> float:
    """Returns the median time of a call in milliseconds, by CUDA events, over 5 to 200 calls in about `seconds`."""
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


@contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Has nvidia-smi read the card ten times a second; what it gives is there once the block has ended.

    Yields:
        The median of the later half of the readings: "MHz" of the multiprocessors, "W". Without nvidia-smi, nothing.
    """
    found: dict[str, float] = {}
    command = [
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties('cuda').uuid}",
        "--query-gpu=clocks.sm,power.draw",
        "--format=csv,noheader,nounits",
        "--loop-ms=100",
    ]
    try:
        reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        reader.terminate()
        lines = reader.communicate()[0].splitlines()
    late = [line.split(",") for line in lines[len(lines) // 2 :] if line.count(",") == 1]
    for name, readings in zip(("MHz", "W"), zip(*late, strict=True), strict=False):
        found[name] = statistics.median(map(float, readings))


def forward_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> Callable[[], None]:
    """Makes a function that runs forward and backward once; the outputs get random gradients, which are drawn once."""
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
    """Returns the MiB that a forward pass leaves allocated: its outputs, and what it saves for the backward pass."""
    function(*inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = function(*inputs)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del outputs
    return kept / 2**20


def peak_gib(function: Callable[[], object]) -> float:
    """Returns the peak memory while a call runs in GiB, including everything that was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Returns ‖value − reference‖ / ‖reference‖, computed in fp64."""
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
    """Reports a fused kernel beside its reference, eager and compiled: time, traffic, saved memory and errors.

    Args:
        title: of the report.
        kernel, reference: the operation and its plain-PyTorch reference.
        inputs: leading arguments, of which the first is [B, tokens, …]; those that require gradients get them.
        fixed: the arguments that follow, which get no gradient.
        forward_bytes, both_bytes: the fewest bytes that forward, and forward with backward, can move.
        checked_tokens: how many tokens, the first ones, are compared with the reference in fp32.
    """
    # Shapes are static: the shorter check would else make torch.compile generate a dynamic kernel, to be measured.
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
    """Returns the largest relative error of output and gradients against the reference in fp32."""
    tokens = inputs[0].shape[1]

    def head(value: object) -> object:
        """Returns the part of an argument that belongs to the checked tokens."""
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
    """Returns what a record must name to be compared with another: device, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "count": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or None,
    }
