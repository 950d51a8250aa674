"""Attention backends, and the choice among them."""

import logging

import pytest
import torch
from torch import Tensor

from mugv_ds.models.attention import BACKENDS, installed_backends, masked_attention, sdpa
from mugv_ds.models.choose_attention import attention_errors, choose_attention, exact_attention, random_qkv

CPU = torch.device("cpu")


class Planted(torch.autograd.Function):
    """Attention whose forward is right, and one of whose gradients is scaled."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, wrong: str) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.wrong = wrong
        return sdpa(q, k, v)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            gradients = torch.autograd.grad(sdpa(*inputs), inputs, gradient)
        scales = [1.05 if name == ctx.wrong else 1.0 for name in ("dq", "dk", "dv")]
        return *(g * scale for g, scale in zip(gradients, scales, strict=True)), None


def planted(wrong: str):
    return lambda q, k, v: Planted.apply(q, k, v, wrong)


def choose(backends: dict) -> tuple[str, dict]:
    name, trials = choose_attention(backends, tokens=50, heads=2, dtype=torch.float32, device=CPU)
    return name, {trial.name: trial for trial in trials}


def test_the_reference_is_attention_and_its_gradients():
    """Against autograd through the formula, over a length that no chunk divides."""
    q, k, v, gradient = (x.detach()[0, :, 0].double() for x in random_qkv(1500, 1, torch.float32, CPU))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o = torch.softmax(q @ k.T * 72**-0.5, dim=-1) @ v
    expected = (o, *torch.autograd.grad(o, inputs, gradient))
    with torch.no_grad():
        for one, other in zip(exact_attention(q, k, v, gradient), expected, strict=True):
            torch.testing.assert_close(one, other)


def test_sdpa_is_right():
    assert max(attention_errors(sdpa, 100, torch.float32, CPU).values()) < 1e-5


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv"])
def test_a_backend_with_a_wrong_gradient_is_refused_and_named(wrong, caplog):
    """It is the faster one here: `sdpa` is slowed down, so only correctness can decide."""

    def slow(q, k, v):
        for _ in range(20):
            sdpa(q, k, v)
        return sdpa(q, k, v)

    with caplog.at_level(logging.WARNING):
        name, trials = choose({"planted": planted(wrong), "slow": slow})
    assert name == "slow"
    assert f"{wrong} off by 5.0e-02" in trials["planted"].failure
    assert "planted is wrong on this machine" in caplog.text
    assert choose({"planted": planted("nothing"), "slow": slow})[0] == "planted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_keys_take_no_part(dtype):
    """Equal to attention over the real keys alone, and no gradient reaches the others, whatever stands in them."""
    q, k, v, gradient = (x.detach() for x in random_qkv(20, 2, dtype, CPU))
    mask = torch.arange(20)[None] % 3 != 1
    k, v = (x.masked_fill(~mask[..., None, None], 50.0) for x in (k, v))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    got = masked_attention(*inputs, mask)
    dq, dk, dv = torch.autograd.grad(got, inputs, gradient)
    expected = sdpa(q, k[:, mask[0]], v[:, mask[0]])
    expected_dq, expected_dk, expected_dv = torch.autograd.grad(expected, inputs, gradient)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in ((got, expected), (dq, expected_dq), (dk, expected_dk), (dv, expected_dv)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert not dk[:, ~mask[0]].any() and not dv[:, ~mask[0]].any()


def test_nan_is_wrong():
    def nan(q, k, v):
        return sdpa(q, k, v) * torch.nan

    assert choose({"nan": nan, "sdpa": sdpa})[0] == "sdpa"
    with pytest.raises(RuntimeError, match="no attention backend is right"):
        choose({"nan": nan})


def test_a_backend_that_cannot_run_is_left_out():
    def broken(q, k, v):
        raise RuntimeError("not on this device")

    name, trials = choose({"broken": broken, "sdpa": sdpa})
    assert name == "sdpa" and "not on this device" in trials["broken"].failure


def test_a_cpu_has_sdpa():
    assert list(installed_backends(CPU)) == ["sdpa"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1000, 4099])
@pytest.mark.parametrize("name", list(BACKENDS))
def test_backends_are_right_on_this_gpu(name, tokens):
    device = torch.device("cuda")
    if name not in installed_backends(device):
        pytest.skip(f"{name} is not installed")
    errors = attention_errors(BACKENDS[name], tokens, torch.bfloat16, device)
    assert max(errors.values()) < 5e-3, errors
