"""Linears after a modulation, against the same written plainly, and what they keep."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_ds.models.modulated import Adapter, modulated_linear, modulated_mlp
from mugv_kernels.dispatch import use
from mugv_kernels.modulate import modulate_reference
from tests.helpers.records import relative

B, N, D, E = 2, 5, 16, 24
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plain_linear(x, shift, scale, clean, weight, bias):
    return F.linear(modulate_reference(x, shift, scale, clean), weight, bias)


def plain_mlp(x, shift, scale, clean, w1, b1, w2):
    return F.linear(F.gelu(plain_linear(x, shift, scale, clean, w1, b1), approximate="tanh"), w2)


OPERATIONS = {"linear": (modulated_linear, plain_linear, 6), "mlp": (modulated_mlp, plain_mlp, 7)}  # and arguments


def make_inputs(dtype: torch.dtype) -> list[Tensor]:
    """Arguments of both; all but `clean` want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, D), (B, 2, D), (B, 2, D), (E, D), (E,), (D, E)
    x, shift, scale, *weights = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    clean = torch.arange(B * N, device=DEVICE).view(B, N) % 3 == 1
    return [
        tensor.requires_grad_(tensor.is_floating_point()) for tensor in (2 * x + 0.5, shift, scale, clean, *weights)
    ]


def run(operation, inputs: list[Tensor]) -> list[Tensor]:
    """The output, then every gradient."""
    y = operation(*inputs)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_output_and_gradients_are_those_of_the_plain_form(name, compiled, implementation):
    operation, plain, arguments = OPERATIONS[name]
    expected = run(plain, make_inputs(torch.float64)[:arguments])
    if compiled:
        torch.compiler.reset()
        operation = torch.compile(operation, backend="aot_eager", fullgraph=True)
    with use(implementation):
        got = run(operation, make_inputs(torch.float32)[:arguments])
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_rows_in_fp32_beside_bf16(implementation):
    """As cross-attention hands its norm's weights over: their gradients come back in fp32."""
    x, shift, scale, clean, weight, bias, _ = make_inputs(torch.bfloat16)
    rows = [row.detach().float().requires_grad_() for row in (shift, scale)]
    inputs = [x, *rows, clean, weight, bias]
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    with use(implementation):
        got = run(modulated_linear, inputs)
    assert [tensor.dtype for tensor in got] == [torch.bfloat16] * 2 + [torch.float32] * 2 + [torch.bfloat16] * 2
    assert max(map(relative, got, run(plain_linear, wide))) < 1e-2


@pytest.mark.parametrize("name", OPERATIONS)
def test_keeps_no_modulated_tensor(name):
    """Of the size of x, x alone; the mlp also GELU's input."""
    operation, _, arguments = OPERATIONS[name]
    inputs = make_inputs(torch.float32)[:arguments]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        operation(*inputs)
    pointers = {tensor.data_ptr() for tensor in inputs}
    made = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in pointers]
    assert made == ([] if name == "linear" else [(B * N, E)])


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_second_backward_pass_through_the_mlp_is_an_error(implementation):
    """The first one overwrites what was kept, which autograd must notice."""
    with use(implementation):
        y = modulated_mlp(*make_inputs(torch.float32)).sum()
        y.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


WIDTH = 3  # of adapters


def adapted_linear(x, shift, scale, clean, weight, bias, w2, a, b, *_):
    return modulated_linear(x, shift, scale, clean, weight, bias, Adapter(a, b))


def adapted_mlp(x, shift, scale, clean, w1, bias, w2, a1, b1, a2, b2):
    return modulated_mlp(x, shift, scale, clean, w1, bias, w2, Adapter(a1, b1), Adapter(a2, b2))


def summed_linear(x, shift, scale, clean, weight, bias, w2, a1, b1, *_):
    return plain_linear(x, shift, scale, clean, weight + b1 @ a1, bias)


def summed_mlp(x, shift, scale, clean, w1, bias, w2, a1, b1, a2, b2):
    return plain_mlp(x, shift, scale, clean, w1 + b1 @ a1, bias, w2 + b2 @ a2)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", [(), (1, 2, 4, 5, 6), (0, 1, 2, 4, 5, 6)], ids=["none", "weights", "x too"])
@pytest.mark.parametrize(("adapted", "summed"), [(adapted_linear, summed_linear), (adapted_mlp, summed_mlp)])
def test_adapters_are_part_of_the_weights_whatever_is_frozen(adapted, summed, frozen, compiled, implementation):
    is_mlp = adapted is adapted_mlp

    def given(dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        shapes = (WIDTH, D), (E, WIDTH), (WIDTH, E), (D, WIDTH)
        factors = [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]
        inputs = [*make_inputs(dtype), *(factors if is_mlp else factors[:2])]
        for place in frozen if is_mlp else (*frozen, 6):  # w2 is the mlp's alone
            inputs[place].requires_grad_(False)
        return inputs

    expected = run(summed, given(torch.float64))
    if compiled:
        torch.compiler.reset()
        adapted = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    with use(implementation):
        got = run(adapted, given(torch.float32))
    assert len(got) == len(expected)
    for value, reference in zip(got, expected, strict=True):
        assert value.dtype == torch.float32 and relative(value, reference) < 1e-5


@pytest.mark.parametrize("adapted", [adapted_linear, adapted_mlp])
def test_adapters_keep_nothing_of_their_own(adapted):
    inputs = [*make_inputs(torch.float32), *(torch.randn(s) for s in ((WIDTH, D), (E, WIDTH), (WIDTH, E), (D, WIDTH)))]
    inputs = [tensor.to(DEVICE) for tensor in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        adapted(*inputs)
    pointers = {tensor.data_ptr() for tensor in inputs}
    made = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in pointers]
    assert made == ([] if adapted is adapted_linear else [(B * N, E)])
