import numpy as np
import pytest
import torch
from torch import Tensor

from mugv_kernels import fp8
from mugv_kernels.fp8 import E4M3, E5M2, KERNELS, REFERENCES, Modulated, Operations, Rounded

IMPLEMENTATIONS = [pytest.param(KERNELS, id="kernels"), pytest.param(REFERENCES, id="references")]


@pytest.fixture(autouse=True)
def exact_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has Triton's interpreter round to fp8 as hardware does: its own rounding drops what carries into the exponent."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    own = interpreter._convert_float

    def convert(data, given, wanted, rounding):
        dtype = {"fp8e4nv": E4M3, "fp8e5": E5M2}.get(str(wanted))
        if dtype is None:
            return own(data, given, wanted, rounding)
        exact = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
        return exact.to(dtype).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def normal(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(device, dtype)


def value(rounded: Rounded, rows: int) -> Tensor:
    """What was rounded, from whichever form there is, in fp64. Padding is zero, and both forms are the same."""
    forms = [form for form in (rounded.values, rounded.transposed) if form is not None]
    first = forms[0] if rounded.values is not None else forms[0].T
    if len(forms) == 2:
        assert torch.equal(forms[0].view(torch.uint8), forms[1].view(torch.uint8).T)
    assert first.shape[0] == fp8.padded(rows) and first.shape[0] % 16 == 0
    assert not first[rows:].float().any()
    return first[:rows].double() * rounded.scale.double()


def assert_rounded(rounded: Rounded, exact: Tensor, dtype: torch.dtype) -> None:
    """Every value is within half a step of fp8 of the exact one [R, C], fp64, and the largest is met."""
    got = value(rounded, len(exact))
    limit, step = torch.finfo(dtype).max, torch.finfo(dtype).eps
    top = exact.abs().max()
    smallest = torch.finfo(dtype).smallest_normal * top / limit
    # Half a step, and what fp32 rounds on the way, which can tip a value to the other neighbour.
    bound = exact.abs().clamp(min=smallest) * step * 0.5001 + 1e-6 * exact.abs()
    assert ((got - exact).abs() <= bound).all()
    torch.testing.assert_close(got.abs().max(), top, rtol=1e-5, atol=0)


FORMS = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize("operations", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("shape", "forms"), zip([(1, 16), (37, 144), (64, 80)], FORMS, strict=True))
def test_rounds_by_the_largest_value(shape, forms, to, dtype, operations: Operations, device):
    torch.manual_seed(0)
    x = normal(*shape, dtype=dtype, device=device, scale=7e-4)
    largest = operations.largest(x)
    assert largest.item() == x.abs().max().item() and largest.dtype == torch.float32
    rounded = operations.round_to(x, largest, to, values=forms[0], transposed=forms[1])
    assert (rounded.values is not None, rounded.transposed is not None) == forms
    assert_rounded(rounded, x.double(), to)


@pytest.mark.parametrize("operations", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", ["none", "all", "some"])
def test_rounds_a_modulated_layer_norm(which, operations: Operations, device, make_clean):
    torch.manual_seed(0)
    B, N, C = 2, 37, 144
    x = normal(B, N, C, dtype=torch.float32, device=device, scale=3.0)
    shift, scale = (normal(B, 2, C, dtype=torch.float32, device=device) for _ in range(2))
    clean = make_clean(B, N, which)
    bound = operations.modulated_bound(shift, scale)
    exact_bound = (C**0.5 * (1 + scale.double()).abs() + shift.double().abs()).max()
    torch.testing.assert_close(bound.double(), exact_bound, rtol=1e-6, atol=0)
    wide = x.double()
    rows = [row.double()[torch.arange(B, device=device)[:, None], clean.long()] for row in (shift, scale)]
    normed = torch.nn.functional.layer_norm(wide, (C,), eps=1e-6)
    exact = (normed * (1 + rows[1]) + rows[0]).flatten(0, 1)
    assert exact.abs().max() <= bound
    for to in (E4M3, E5M2):
        rounded, mean, rstd = operations.modulate_to(x, shift, scale, clean, bound, to)
        torch.testing.assert_close(mean.double(), wide.mean(-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rstd.double(), (wide.var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)
        turned = operations.transpose_modulated(x, Modulated(shift, scale, clean, mean, rstd), bound, to)
        smallest = torch.finfo(to).smallest_normal * bound.double() / torch.finfo(to).max
        for form in (rounded, turned):
            error = (value(form, B * N) - exact).abs()
            # Half a step, and what fp32 rounds on the way: of the terms, which may cancel.
            assert (error <= exact.abs().clamp(min=smallest) * torch.finfo(to).eps * 0.5001 + 1e-5).all()


@pytest.mark.parametrize("operations", IMPLEMENTATIONS)
def test_a_bound_takes_nothing_from_a_layer_norm_of_the_10b(operations: Operations, device):
    """Of normal values it is ten times the largest: they are rounded as well as by that."""
    torch.manual_seed(0)
    x, rows = normal(1, 40, 3456, dtype=torch.bfloat16, device=device), torch.zeros(1, 2, 3456, device=device)
    clean = torch.zeros(1, 40, dtype=torch.bool, device=device)
    bound = operations.modulated_bound(rows, rows)
    exact = torch.nn.functional.layer_norm(x.double(), (3456,), eps=1e-6)[0]
    assert bound > 10 * exact.abs().max()
    errors = []
    for largest in (bound, exact.abs().max().float()):
        rounded, *_ = operations.modulate_to(x, rows, rows, clean, largest, E4M3)
        errors.append(float((value(rounded, 40) - exact).norm() / exact.norm()))
    assert errors[0] == pytest.approx(errors[1], rel=0.02) and errors[0] < 0.028


@pytest.mark.parametrize("operations", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_modulated_layer_norm_that_is_not_finite_cannot_go_unseen(bad, operations: Operations, device):
    """A token's is in all of its values; a shift's or scale's in all there are."""
    torch.manual_seed(0)
    x, clean = torch.randn(2, 9, 32, device=device), torch.zeros(2, 9, dtype=torch.bool, device=device)
    shift, scale = (torch.randn(2, 2, 32, device=device) for _ in range(2))
    x[1, 3, 5] = bad
    bound = operations.modulated_bound(shift, scale)
    rounded, mean, rstd = operations.modulate_to(x, shift, scale, clean, bound, E4M3)
    turned = operations.transpose_modulated(x, Modulated(shift, scale, clean, mean, rstd), bound, E4M3)
    for values in (rounded.values[:18].float(), turned.transposed.T[:18].float()):
        assert values[12].isnan().all() and values[:12].isfinite().all() and values[13:].isfinite().all()
    for rows in (shift, scale):
        kept, rows[0, 0, 3] = rows[0, 0, 3].item(), bad
        bound = operations.modulated_bound(shift, scale)
        assert bound.isinf()
        rounded, *_ = operations.modulate_to(x, shift, scale, clean, bound, E4M3)
        assert not (rounded.values.float() * rounded.scale)[:18].isfinite().any()
        rows[0, 0, 3] = kept


@pytest.mark.parametrize("operations", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 16), (37, 1040)])
def test_rounds_gelu_and_goes_back_through_it(shape, operations: Operations, device):
    torch.manual_seed(0)
    x, gradient = normal(*shape, dtype=torch.float32, device=device, scale=4.0), torch.randn(shape, device=device)
    wide = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(wide, approximate="tanh")
    (d_exact,) = torch.autograd.grad(exact, wide, gradient.double())
    largest = operations.gelu_largest(x)
    torch.testing.assert_close(largest.double(), exact.detach().abs().max(), rtol=1e-5, atol=0)
    rounded = operations.round_gelu(x, largest, E4M3, values=True, transposed=True)
    assert (value(rounded, len(x)) - exact.detach()).norm() / exact.norm() < 0.04
    sums, largest = operations.gelu_backward(x, gradient)
    assert (gradient.double() - d_exact).norm() / d_exact.norm() < 2e-6
    assert (sums.double() - d_exact.sum(0)).norm() / d_exact.sum(0).norm() < 2e-6
    assert largest.item() == gradient.abs().max().item()


@pytest.mark.parametrize("operations", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 16), (37, 1040)])
def test_sums_and_finds_the_largest_value_at_once(shape, operations: Operations, device):
    torch.manual_seed(0)
    x = normal(*shape, dtype=torch.float32, device=device)
    sums, largest = operations.sum_and_largest(x)
    assert (sums.double() - x.double().sum(0)).norm() / x.double().sum(0).norm() < 2e-6
    assert largest.item() == x.abs().max().item()
    x[-1, -1] = float("nan")
    assert operations.sum_and_largest(x)[1].isinf()


@pytest.mark.parametrize("operations", IMPLEMENTATIONS)
def test_zeros_stay_zeros(operations: Operations, device):
    x = torch.zeros(20, 32, device=device)
    rounded = operations.round_to(x, operations.largest(x), E4M3, values=True, transposed=True)
    assert not value(rounded, 20).any() and rounded.scale.isfinite()


@pytest.mark.parametrize("operations", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_a_product_that_is_not_finite(bad, operations: Operations, device):
    """Whichever value it is: the guard has to see it."""
    x, other = torch.ones(16, 32, device=device), torch.ones(16, 32, device=device)
    x[3, 5] = bad
    largest = operations.largest(x)
    assert largest.isinf()
    a = operations.round_to(x, largest, E4M3, values=True, transposed=False)
    b = operations.round_to(other, operations.largest(other), E4M3, values=True, transposed=False)
    y = fp8.product(a.values, b.values, a.scale, b.scale, torch.bfloat16, is_fast=True)
    assert not y.isfinite().any()


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("rows", [16, 48])
def test_a_product_is_that_of_what_was_rounded(rows, is_fast, device):
    torch.manual_seed(0)
    x, weight = (normal(n, 144, dtype=torch.bfloat16, device=device) for n in (rows, 80))
    bias = normal(80, dtype=torch.bfloat16, device=device)
    a, b = (
        REFERENCES.round_to(of, REFERENCES.largest(of), to, values=True, transposed=False)
        for of, to in ((x, E5M2), (weight, E4M3))
    )
    exact = value(a, rows) @ value(b, 80).T + bias.double()
    y = fp8.product(a.values, b.values, a.scale, b.scale, torch.bfloat16, is_fast=is_fast, bias=bias)
    assert (y.double() - exact).norm() / exact.norm() < 4e-3
