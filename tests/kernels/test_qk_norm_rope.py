import os
import subprocess
import sys

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mugv_kernels.qk_norm_rope import ROW, qk_norm_rope, qk_norm_rope_reference


def make_inputs(B: int, N: int, H: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """qkv and the two weights, then cos and sin of angles that go round many times."""
    torch.manual_seed(0)
    qkv = 2 * torch.randn(B, N, 3 * H * 72)
    weights = [1 + 0.3 * torch.randn(72) for _ in range(2)]
    angle = 100 * torch.rand(B, N, 36, device=device)
    return [x.to(device, dtype) for x in (qkv, *weights)], [angle.cos(), angle.sin()]


def gradients(operation, inputs: list[Tensor], angles: list[Tensor], ranks: int, d_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(operation(*leaves, *angles, ranks), leaves, d_out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "N", "H", "ranks"),
    [
        (1, 1, 2, 1),
        (2, 1, 4, 4),
        (1, 5, 2, 2),
        (2, 5, 6, 3),
        (1, 13, 4, 2),
        (2, 13, 6, 2),
        (1, 13, 6, 6),
        (1, 3, 18, 3),  # more heads than a block, and a rank on both sides of its edge
    ],
)
def test_matches_the_reference(B, N, H, ranks, dtype, device, assert_parity):
    inputs, angles = make_inputs(B, N, H, dtype, device)
    assert_parity(qk_norm_rope, qk_norm_rope_reference, inputs, *angles, ranks)


@pytest.mark.parametrize("operation", [qk_norm_rope, qk_norm_rope_reference])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_is_the_published_formula_laid_out_as_the_all_to_all_sends_it(ranks, operation, device):
    """Written as the published code does it: RMSNorm by hand, the rotation a complex product."""
    inputs, angles = make_inputs(2, 5, 4, torch.float32, device)
    q, k, v = inputs[0].view(2, 5, 3, 4, 72).unbind(2)

    def norm_rotate(x: Tensor, weight: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * weight
        pairs = torch.view_as_complex(y.unflatten(-1, (36, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(*angles)[:, :, None]).flatten(-2)

    q, k = norm_rotate(q, inputs[1]), norm_rotate(k, inputs[2])
    expected = rearrange(torch.stack([q, k, v]), "qkv b n (rank head) d -> rank b n qkv head d", rank=ranks)

    out = operation(*inputs, *angles, ranks)

    assert out.stride(-1) == 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, :, :, 2], expected[:, :, :, 2])


def test_its_rows_start_where_pieces_of_memory_do(device):
    """Every head of every token at a multiple of 32 bytes in bf16, in one piece for each rank."""
    inputs, angles = make_inputs(2, 5, 4, torch.bfloat16, device)
    out = qk_norm_rope(*inputs, *angles, 2)
    assert out.stride() == (2 * 5 * 3 * 2 * ROW, 5 * 3 * 2 * ROW, 3 * 2 * ROW, 2 * ROW, ROW, 1)
    assert ROW * out.element_size() % 32 == 0


def test_takes_tensors_that_are_not_contiguous(device):
    inputs, angles = make_inputs(2, 5, 4, torch.float32, device)
    d_out = torch.randn(2, 2, 5, 3, 2, 72, device=device)
    expected = gradients(qk_norm_rope, inputs, angles, 2, d_out)
    strided = [x.mT.contiguous().mT if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in (*inputs, *angles)]
    d_strided = d_out.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    assert not any(x.is_contiguous() for x in (*strided, d_strided))

    torch.testing.assert_close(gradients(qk_norm_rope, strided[:3], strided[3:], 2, d_strided), expected)


def test_gradients_are_the_same_bits_every_time(device):
    inputs, angles = make_inputs(1, 37, 4, torch.float32, device)
    d_out = torch.randn(1, 1, 37, 3, 4, 72, device=device)
    first, second = (gradients(qk_norm_rope, inputs, angles, 1, d_out) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keeps_nothing_but_its_inputs(device):
    inputs, angles = make_inputs(1, 5, 2, torch.bfloat16, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda x: x):
        qk_norm_rope(*(x.requires_grad_() for x in inputs), *angles, 1)
    assert sorted(kept) == sorted(x.data_ptr() for x in (*inputs, *angles))


def _checkpointed(*inputs):
    return checkpoint(qk_norm_rope, *inputs, use_reentrant=False)


def _compiled(*inputs):
    return torch.compile(qk_norm_rope, backend="aot_eager", fullgraph=True)(*inputs)


@pytest.mark.parametrize("wrapped", [_checkpointed, _compiled])
def test_works_under(wrapped, device):
    inputs, angles = make_inputs(2, 5, 4, torch.bfloat16, device)
    d_out = torch.randn(2, 2, 5, 3, 2, 72, device=device).bfloat16()
    assert torch.equal(wrapped(*inputs, *angles, 2), qk_norm_rope(*inputs, *angles, 2))
    result = gradients(wrapped, inputs, angles, 2, d_out)
    expected = gradients(qk_norm_rope, inputs, angles, 2, d_out)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_the_operators_are_registered_right(device):
    """Schemas, shapes without data, autograd: PyTorch's own checks of a custom operator."""
    inputs, angles = make_inputs(1, 5, 4, torch.float32, device)
    arguments = (*(x.requires_grad_() for x in inputs), *angles, 2)
    torch.library.opcheck(torch.ops.mugv.qk_norm_rope.default, arguments)
    d_out = torch.randn(2, 1, 5, 3, 2, 72, device=device)
    # It has no second derivative, so no autograd of its own to check.
    arguments = (d_out, *(x.detach() for x in inputs), *angles)
    torch.library.opcheck(torch.ops.mugv.qk_norm_rope_backward.default, arguments)


@pytest.mark.parametrize("operation", [qk_norm_rope, qk_norm_rope_reference])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 3}, r"qkv \(1, 5, 864\): .* H a multiple of ranks = 3"),
        ({"qkv": torch.zeros(1, 5, 800)}, r"qkv \(1, 5, 800\): .* must be 3·H·72"),
        ({"k_weight": torch.ones(36)}, r"k_weight \(36,\): must be \[72\]"),
        ({"sin": torch.zeros(1, 4, 36)}, r"sin \(1, 4, 36\): must be \[1, 5, 36\]"),
        ({"cos": torch.zeros(1, 5, 1, 36)}, r"cos \(1, 5, 1, 36\): must be \[1, 5, 36\]"),
    ],
)
def test_refuses_shapes_that_do_not_fit(change, message, operation):
    inputs, angles = make_inputs(1, 5, 4, torch.float32, torch.device("cpu"))
    names = ("qkv", "q_weight", "k_weight", "cos", "sin")
    with pytest.raises(ValueError, match=message):
        operation(**(dict(zip(names, [*inputs, *angles], strict=True)) | {"ranks": 2} | change))


def test_the_reference_needs_no_triton():
    """Where Triton is not built, the module still imports and the reference still runs."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from mugv_kernels.qk_norm_rope import qk_norm_rope_reference
angle = torch.zeros(1, 2, 36)
print(qk_norm_rope_reference(torch.ones(1, 2, 3 * 72), torch.ones(72), torch.ones(72), angle, angle, 1).shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "torch.Size([1, 1, 2, 3, 1, 72])"
