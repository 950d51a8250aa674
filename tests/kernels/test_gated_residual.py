import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mugv_kernels import gated_residual as gated_residual_module
from mugv_kernels.gated_residual import gated_residual, gated_residual_reference
from mugv_kernels.modulate import multiprocessors


def make_inputs(B: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """residual, x, bias and gate."""
    torch.manual_seed(0)
    return [torch.randn(shape).to(device, dtype) for shape in ((B, N, D), (B, N, D), (D,), (B, 2, D))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which_clean", ["none", "all", "some"])
@pytest.mark.parametrize(
    ("B", "N", "D"), [(1, 1, 72), (2, 1, 200), (1, 5, 200), (2, 5, 144), (1, 37, 144), (2, 37, 72)]
)
def test_matches_the_reference(B, N, D, which_clean, dtype, device, make_clean, assert_parity):
    inputs = make_inputs(B, N, D, dtype, device)
    assert_parity(gated_residual, gated_residual_reference, inputs, make_clean(B, N, which_clean))


def test_a_program_sums_over_several_tokens(device, make_clean, assert_parity):
    """However many programs the device gives a reduction; and its channels are shared by several."""
    N = 2 * gated_residual_module._PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(torch.empty(0, device=device)) + 1
    inputs = make_inputs(2, N, 1200, torch.float32, device)
    assert_parity(gated_residual, gated_residual_reference, inputs, make_clean(2, N))


def test_takes_tensors_that_are_not_contiguous(device, make_clean, assert_parity):
    inputs = [
        x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(2)[::2]
        for x in make_inputs(2, 5, 72, torch.float32, device)
    ]
    clean = make_clean(5, 2).T
    assert not any(tensor.is_contiguous() for tensor in (*inputs, clean))
    assert_parity(gated_residual, gated_residual_reference, inputs, clean)


@pytest.mark.parametrize("needed", [tuple(i == j for j in range(4)) for i in range(4)])
def test_gives_a_gradient_only_to_what_needs_one(needed, device, make_clean):
    inputs, clean = make_inputs(2, 5, 72, torch.float32, device), make_clean(2, 5)
    gradients = []
    for operation in (gated_residual, gated_residual_reference):
        leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
        operation(*leaves, clean).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert tuple(gradient is not None for gradient in gradients[0]) == needed
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_residual_is_no_copy(device, make_clean):
    residual, *others = (tensor.requires_grad_() for tensor in make_inputs(1, 5, 72, torch.float32, device))
    dy = torch.randn_like(residual)
    (gradient,) = torch.autograd.grad(gated_residual(residual, *others, make_clean(1, 5)), residual, dy)
    assert gradient.data_ptr() == dy.data_ptr()


def test_keeps_inputs_alone_and_not_the_residual(device, make_clean):
    inputs, clean = make_inputs(2, 5, 72, torch.bfloat16, device), make_clean(2, 5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated_residual(*[tensor.requires_grad_() for tensor in inputs], clean)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in (*inputs[1:], clean)]


def run_checkpointed(*arguments: Tensor) -> Tensor:
    return checkpoint(gated_residual, *arguments, use_reentrant=False)


@pytest.mark.parametrize(
    "operation",
    [run_checkpointed, torch.compile(gated_residual, backend="aot_eager", fullgraph=True)],
    ids=["checkpoint", "compile"],
)
def test_runs_inside_training_machinery(operation, device, make_clean, assert_parity):
    inputs = make_inputs(2, 5, 72, torch.bfloat16, device)
    assert_parity(operation, gated_residual_reference, inputs, make_clean(2, 5))


def test_operator_is_registered_soundly(device, make_clean):
    inputs = [tensor.requires_grad_() for tensor in make_inputs(2, 5, 72, torch.float32, device)]
    torch.library.opcheck(torch.ops.mugv.gated_residual.default, (*inputs, make_clean(2, 5)))


@pytest.mark.parametrize(
    ("changed", "value", "message"),
    [
        ("residual", torch.zeros(2, 4, 72), r"residual must be \[2, 5, 72\]"),
        ("bias", torch.zeros(2, 72), r"bias must be \[72\]"),
        ("gate", torch.zeros(2, 2, 72, dtype=torch.float16), r"gate must be .* torch.float32"),
        ("clean", torch.zeros(2, 5), r"clean must be \[2, 5\] torch.bool"),
    ],
)
def test_rejects_tensors_that_do_not_go_with_x(changed, value, message, device, make_clean):
    residual, x, bias, gate = make_inputs(2, 5, 72, torch.float32, device)
    arguments = {"residual": residual, "bias": bias, "gate": gate, "clean": make_clean(2, 5), changed: value.to(device)}
    with pytest.raises(ValueError, match=message):
        gated_residual(arguments["residual"], x, arguments["bias"], arguments["gate"], arguments["clean"])
