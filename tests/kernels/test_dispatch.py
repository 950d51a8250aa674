import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mugv_kernels import dispatch


class _Operators(TorchDispatchMode):
    """Collects the names of our Triton operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "mugv":
            self.names.append(operator._schema.name)
        return operator(*args, **(kwargs or {}))


def triton_operators(call: Callable[[], object]) -> list[str]:
    with _Operators() as operators:
        call()
    return operators.names


def gelu_backward(x: Tensor, gradient: Tensor) -> Tensor:
    """What it returns and what it makes of its arguments, in one tensor."""
    x, gradient = x.clone(), gradient.clone()
    return torch.cat([dispatch.gelu_backward(x, gradient)[None], x, gradient])


def make_call(name: str, device: torch.device | str) -> Callable[[], Tensor]:
    """A call of the operation, small."""
    torch.manual_seed(0)
    x, rows = torch.randn(1, 3, 72, device=device), torch.randn(2, 1, 2, 72, device=device)
    clean = torch.ones(1, 3, dtype=torch.bool, device=device)
    angle, qkv = torch.randn(1, 3, 36, device=device), torch.randn(1, 3, 3 * 2 * 72, device=device)
    weight = torch.ones(72, device=device)
    return {
        "modulate": lambda: dispatch.modulate(x, rows[0], rows[1], clean),
        "gated_residual": lambda: dispatch.gated_residual(x, x + 1, weight, rows[0], clean),
        "gelu_backward": lambda: gelu_backward(x[0], 1 - x[0]),
        "head_norm": lambda: dispatch.head_norm(x, weight),
        "qk_norm_rope": lambda: dispatch.qk_norm_rope(qkv, weight, weight, angle.cos(), angle.sin(), 2),
    }[name]


NAMES = ("modulate", "gated_residual", "gelu_backward", "head_norm", "qk_norm_rope")


@pytest.mark.parametrize(
    ("kind", "installed", "expected"), [("cpu", True, False), ("cuda", True, True), ("cuda", False, False)]
)
def test_takes_triton_for_cuda_tensors_where_it_is_installed(kind, installed, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "_TRITON", installed)
    with FakeTensorMode():  # has CUDA tensors on every machine
        assert dispatch._uses_triton(torch.empty(1, device=kind)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_both_implementations_agree(name, device):
    call = make_call(name, device)
    with dispatch.use("triton"):
        assert triton_operators(call) == [f"mugv::{name}"]
        result = call()
    with dispatch.use("reference"):
        assert triton_operators(call) == []
        torch.testing.assert_close(result, call())


def test_the_innermost_override_counts_and_ends_with_its_block(device):
    call = make_call("qk_norm_rope", device)
    default = triton_operators(call)
    with dispatch.use("triton"):
        with pytest.raises(RuntimeError, match="inside"), dispatch.use("reference"):
            assert not triton_operators(call)
            raise RuntimeError("inside")
        assert triton_operators(call)
    assert triton_operators(call) == default


def test_an_override_reaches_other_threads(device):
    """The backward pass of CUDA tensors, which recomputes checkpointed layers, runs in one of its own."""
    call, seen = make_call("qk_norm_rope", device), []
    with dispatch.use("triton"):
        thread = threading.Thread(target=lambda: seen.extend(triton_operators(call)))
        thread.start()
        thread.join()
    assert seen == ["mugv::qk_norm_rope"]


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_and_again_when_the_override_changes(name, device):
    call = make_call(name, device)
    expected = call()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        graphs.append(str(graph.graph))
        return aot_eager(graph, example_inputs)

    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for implementation in ("reference", "triton", "reference"):
        with dispatch.use(implementation):
            torch.testing.assert_close(compiled(), expected)
    assert [f"torch.ops.mugv.{name}" in graph for graph in graphs] == [False, True]


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'cuda': must be"), dispatch.use("cuda"):
        pass
