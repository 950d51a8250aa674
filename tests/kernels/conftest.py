"""The kernels run on the GPU where there is one, else on the CPU in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# Largest relative error of a computation in fp32, sums over a few thousand tokens included.
FP32_ERROR = 2e-6
# Error in bf16 over that of the reference in bf16. The interpreter truncates where hardware rounds to nearest, which
# doubles the error of a cast.
BF16_ERROR_RATIO = 1.1 if torch.cuda.is_available() else 2.5

Operation = Callable[..., Tensor]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def make_clean(device: torch.device) -> Callable[..., Tensor]:
    """Makes token classes: B, N, "none", "all" or "some" → [B, N] bool; "some" differs from sample to sample."""

    def make(B: int, N: int, which: str = "some") -> Tensor:
        if which == "some":
            return (torch.arange(B, device=device)[:, None] + torch.arange(N, device=device)) % 3 == 1
        return torch.full((B, N), which == "all", device=device)

    return make


@pytest.fixture
def assert_parity() -> Callable[..., None]:
    """Output and every gradient of an operation against its reference.

    Both are held against the reference in fp64 on the same inputs: fp32 must come within rounding of it, bf16 about as
    close as the reference does in bf16.
    """

    def compare(operation: Operation, reference: Operation, inputs: list[Tensor], *others: Tensor) -> None:
        dy = torch.randn(reference(*inputs, *others).shape, device=inputs[0].device).to(inputs[0].dtype)
        exact = _run(reference, [tensor.double() for tensor in inputs], others, dy.double())
        rounded = _run(reference, inputs, others, dy)
        results = _run(operation, inputs, others, dy)
        for i, (result, expected, plain) in enumerate(zip(results, exact, rounded, strict=True)):
            name = f"gradient of input {i - 1}" if i else "output"
            assert (result.shape, result.dtype) == (plain.shape, plain.dtype), name
            is_fp32 = result.dtype == torch.float32
            limit = FP32_ERROR if is_fp32 else BF16_ERROR_RATIO * _relative_error(plain, expected) + 1e-5
            assert _relative_error(result, expected) <= limit, name

    return compare


def _run(operation: Operation, inputs: list[Tensor], others: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """The output, then the gradient of each input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = operation(*leaves, *others)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _relative_error(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖; 0 where both are 0."""
    difference = (value.double() - reference).norm()
    return float(difference / reference.norm()) if difference else 0.0
