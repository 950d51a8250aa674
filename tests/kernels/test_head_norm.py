import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mugv_kernels.head_norm import head_norm, head_norm_reference


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, away from root mean square 1, and the weight."""
    torch.manual_seed(0)
    return [(3 * torch.randn(shape)).to(device, dtype), (1 + 0.3 * torch.randn(shape[-1])).to(device, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 72), (2, 5, 3, 72), (1, 37, 18, 72), (33, 16), (4, 200)])
def test_matches_the_reference(shape, dtype, device, assert_parity):
    """One row, blocks that are not full, and several programs in the backward pass (666 rows)."""
    assert_parity(head_norm, head_norm_reference, make_inputs(shape, dtype, device))


def test_takes_tensors_that_are_not_contiguous(device, assert_parity):
    x, weight = make_inputs((5, 4, 72), torch.float32, device)
    inputs = [x.mT.contiguous().mT, weight.repeat_interleave(2)[::2]]
    assert not any(tensor.is_contiguous() for tensor in inputs)
    assert_parity(head_norm, head_norm_reference, inputs)


def test_keeps_nothing_but_its_inputs(device):
    inputs, kept = [x.requires_grad_() for x in make_inputs((5, 72), torch.bfloat16, device)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        head_norm(*inputs)
    assert kept == [x.data_ptr() for x in inputs]


@pytest.mark.parametrize(
    "operation",
    [
        lambda *inputs: checkpoint(head_norm, *inputs, use_reentrant=False),
        torch.compile(head_norm, backend="aot_eager", fullgraph=True),
    ],
    ids=["checkpoint", "compile"],
)
def test_runs_inside_training_machinery(operation, device, assert_parity):
    assert_parity(operation, head_norm_reference, make_inputs((5, 3, 72), torch.bfloat16, device))


def test_operator_is_registered_soundly(device):
    inputs = [x.requires_grad_() for x in make_inputs((5, 3, 72), torch.float32, device)]
    torch.library.opcheck(torch.ops.mugv.head_norm.default, inputs)


def test_refuses_a_weight_of_another_width(device):
    with pytest.raises(ValueError, match=r"weight \[36\]: must be \[72\]"):
        head_norm(torch.zeros(5, 72, device=device), torch.ones(36, device=device))
