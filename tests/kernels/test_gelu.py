import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_kernels import gelu
from mugv_kernels.gelu import gelu_backward, gelu_backward_reference


def make_inputs(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, into both tails of GELU, and a gradient."""
    torch.manual_seed(0)
    return [(4 * torch.randn(shape)).to(device, dtype), torch.randn(shape).to(device, dtype)]


def by_autograd(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(x), the gradient of x and its sum over rows, in fp64."""
    x = x.double().requires_grad_()
    y = F.gelu(x, approximate="tanh")
    (dx,) = torch.autograd.grad(y, x, gradient.double())
    return y.detach(), dx, dx.sum(0)


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("operation", [gelu_backward, gelu_backward_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 8), (5, 512), (37, 1200)])  # part of a block of columns, one, some
def test_is_gelu_and_its_gradient_in_place(shape, dtype, operation, device):
    x, gradient = make_inputs(shape, dtype, device)
    exact = by_autograd(x, gradient)
    bias_gradient = operation(x, gradient)
    assert bias_gradient.dtype == dtype
    # Triton's interpreter truncates where hardware rounds to nearest: 2^-8 · 1/√3 a cast.
    limit = {torch.float32: 2e-6, torch.bfloat16: 4e-3}[dtype]
    assert max(map(error, (x, gradient, bias_gradient), exact)) < limit


def test_far_tails_are_finite(device):
    x = torch.tensor([[-1e4, -30.0, 0.0, 30.0, 1e4]], device=device)
    gradient = torch.ones_like(x)
    gelu_backward(x, gradient)
    torch.testing.assert_close(x, torch.tensor([[0.0, 0.0, 0.0, 30.0, 1e4]], device=device))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device))


@pytest.mark.long
def test_programs_share_the_rows(device, monkeypatch):
    """However many the device has; and the sum is the same bits every time."""
    monkeypatch.setattr(gelu, "_PROGRAMS_PER_MULTIPROCESSOR", 3)
    inputs = make_inputs((1000, 40), torch.float32, device)
    first, second = (gelu_backward(*(tensor.clone() for tensor in inputs)) for _ in range(2))
    assert torch.equal(first, second)
    assert error(first, by_autograd(*inputs)[2]) < 2e-6


def test_operator_is_registered_soundly(device):
    """It has no autograd of its own: it is part of a backward pass."""
    torch.library.opcheck(torch.ops.mugv.gelu_backward.default, make_inputs((5, 40), torch.float32, device))


@pytest.mark.parametrize(
    ("x", "gradient", "message"),
    [
        (torch.zeros(4, 5).T, torch.zeros(5, 4), r"x \[5, 4\]: must be \[R, F\] and contiguous"),
        (torch.zeros(2, 5, 4), torch.zeros(2, 5, 4), r"x \[2, 5, 4\]: must be \[R, F\]"),
        (torch.zeros(5, 4), torch.zeros(5, 4).bfloat16(), r"gradient \[5, 4\] torch.bfloat16 .* does not go with x"),
    ],
)
def test_refuses_what_it_cannot_change_in_place(x, gradient, message):
    with pytest.raises(ValueError, match=message):
        gelu_backward(x, gradient)
