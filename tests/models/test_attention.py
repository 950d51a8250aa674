"""Attention backends, and the choice among them."""

import logging
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mugv_kernels.flash4
from mugv_ds.models import choose_attention as choose_attention_module
from mugv_ds.models.attention import (
    BACKENDS,
    attend_packed,
    flash4_masked,
    installed_backends,
    installed_masked_backends,
    masked_attention,
    query_parts,
    sdpa,
)
from mugv_ds.models.choose_attention import (
    among_padding,
    attention_errors,
    choose_attention,
    choose_masked_attention,
    exact_attention,
    random_qkv,
)
from mugv_kernels.flash4 import spaced_rows
from mugv_kernels.qk_norm_rope import ROW

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


class Packed:
    """A backend that is right when it is called, and whose packed form, which trains, is `packed`."""

    def __init__(self, packed) -> None:
        self._packed = packed

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)

    def packed(self, qkv: Tensor, tokens: int) -> Tensor:
        return self._packed(qkv, tokens)


@pytest.mark.regression
@pytest.mark.parametrize(
    ("packed", "said"),
    [
        (lambda qkv, tokens: qkv[:, :, 0] * 0, "o off by 1.0e"),
        (lambda qkv, tokens: attend_packed(sdpa, qkv, qkv.shape[1]), "o off by"),
        (lambda qkv, tokens: attend_packed(sdpa, qkv.contiguous().roll(1, 3), tokens), "o off by"),
        (lambda qkv, tokens: attend_packed(planted("dk"), qkv, tokens), "dk off by 5"),
    ],
    ids=["zeros", "padding takes part", "heads mixed up", "one gradient"],
)
def test_what_is_checked_is_the_form_that_trains(packed, said):
    """A backend whose packed path returned zeros was taken for right, because its plain one was called."""
    name, trials = choose({"packed": Packed(packed), "sdpa": sdpa})
    assert name == "sdpa" and said in trials["packed"].failure
    right = Packed(lambda qkv, tokens: attend_packed(sdpa, qkv, tokens))
    assert max(attention_errors(right, 50, torch.float32, CPU).values()) < 1e-5


@pytest.mark.regression
def test_a_run_longer_than_the_split_is_checked_there_too(monkeypatch):
    def wrong_when_long(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return planted("dv" if q.shape[1] > 30 else "none")(q, k, v)

    monkeypatch.setattr(choose_attention_module, "_CHECKED_TOKENS", 20)
    backends = {"long": wrong_when_long, "sdpa": sdpa}
    monkeypatch.setattr(choose_attention_module, "_LONG_TOKENS", 60)
    assert choose(backends)[1]["long"].failure is None, "50 tokens are not longer than the split"
    monkeypatch.setattr(choose_attention_module, "_LONG_TOKENS", 40)
    assert "dv off by" in choose(backends)[1]["long"].failure
    assert choose_attention_module.__dict__["QUERIES"] == mugv_kernels.flash4.QUERIES


def test_sdpa_is_right():
    assert max(attention_errors(sdpa, 100, torch.float32, CPU).values()) < 1e-5


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv"])
def test_a_backend_with_a_wrong_gradient_is_refused_and_named(wrong, caplog):
    """It is the faster one here: `sdpa` is slowed down, so only correctness can decide."""

    def slow(q, k, v):
        time.sleep(0.2)
        return sdpa(q, k, v)

    with caplog.at_level(logging.WARNING):
        name, trials = choose({"planted": planted(wrong), "slow": slow})
    assert name == "slow"
    assert f"{wrong} off by 5.0e-02" in trials["planted"].failure
    assert "planted is wrong on this machine" in caplog.text
    assert choose({"planted": planted("nothing"), "slow": slow})[0] == "planted"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", [masked_attention, flash4_masked])
@pytest.mark.parametrize("tokens", [20, 31, 60])  # in two parts, one, and three
def test_masked_keys_take_no_part(tokens, attention, dtype, formula):
    """Equal to attention over the real keys alone, and no gradient reaches the others, whatever stands in them.

    The first sample has holes, the second is a prefix, the third has every key.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(3, length, 2, 72, generator=generator, dtype=dtype) for length in (tokens, 12, 12, tokens)
    )
    index = torch.arange(12)
    mask = torch.stack([index % 3 != 1, index < 5, index < 12])
    k, v = (x.masked_fill(~mask[..., None, None], 50.0) for x in (k, v))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o = attention(*inputs, mask)
    got = (o, *torch.autograd.grad(o, inputs, gradient))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]  # of sums over the queries, too
    for b in range(3):
        real = mask[b]
        leaves = [x.detach().requires_grad_() for x in (q[b : b + 1], k[b : b + 1, real], v[b : b + 1, real])]
        expected = sdpa(*leaves)
        expected = (expected, *torch.autograd.grad(expected, leaves, gradient[b : b + 1]))
        for one, other, rows in zip(got, expected, (..., ..., real, real), strict=True):
            torch.testing.assert_close(one[b][rows], other[0], rtol=tolerance, atol=tolerance)
        assert not any(x[b, ~real].any() for x in got[2:])


def test_flash4_works_compiled(formula):
    """One graph; the operator in it is the library's call."""
    q, k, v, gradient = random_qkv(20, 2, torch.float32, CPU, keys=12)
    mask = torch.arange(12)[None] % 3 != 1
    expected = torch.autograd.grad(flash4_masked(q, k, v, mask), (q, k, v), gradient)
    compiled = torch.compile(flash4_masked, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v, mask), (q, k, v), gradient), expected)


@pytest.mark.regression
@pytest.mark.parametrize("batch", [3, 16, 40, 300])
def test_many_samples_are_cut_into_parts_that_the_library_takes(formula, batch):
    """Beyond 256 of them its backward pass, given a prefix of the keys alone, fails an assertion of its own."""
    q, gradient = torch.randn(2, batch, 32, 1, 72).unbind()
    k, v = torch.randn(2, batch, 4, 1, 72).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = torch.ones(batch, 4, dtype=torch.bool)
    got, expected = (
        torch.autograd.grad(attention(*inputs), inputs, gradient)
        for attention in (lambda q, k, v: flash4_masked(q, k, v, mask), sdpa)
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_flash4_operator_is_registered_soundly(formula):
    q, k, v, _ = random_qkv(5, 2, torch.float32, CPU, keys=4)
    torch.library.opcheck(torch.ops.mugv.flash4_prefix.default, (q, k, v, torch.tensor([4], dtype=torch.int32)))


def test_the_trial_of_masked_attention_hides_the_keys_among_others():
    """And finds out who looks at them."""

    def blind_to_the_mask(q, k, v, key_mask):
        return sdpa(q, k, v)

    mask = torch.arange(30) % 7 != 6
    errors = {
        function: max(attention_errors(among_padding(function, mask), 40, torch.float32, CPU, 26).values())
        for function in (masked_attention, blind_to_the_mask)
    }
    assert errors[masked_attention] < 1e-5 and errors[blind_to_the_mask] > 0.1
    name, trials = choose_masked_attention(
        {"blind": blind_to_the_mask, "sdpa": masked_attention},
        tokens=40, text_tokens=30, heads=2, dtype=torch.float32, device=CPU,
    )  # fmt: skip
    assert name == "sdpa" and "wrong" in trials[0].failure


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
    assert installed_masked_backends(CPU) == {"sdpa": masked_attention}


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [13_501, 4099, 960])
@pytest.mark.parametrize("masked", ["none", "holes", "all but a few", "all but one"])
@pytest.mark.parametrize("name", ["flash4", "sdpa"])
def test_masked_backends_are_right_on_this_gpu(name, masked, tokens):
    """With masks that are no prefix, blocks of keys that take no part at all, and queries in parts and whole."""
    device = torch.device("cuda")
    backends = installed_masked_backends(device)
    if name not in backends:
        pytest.skip(f"{name} is not installed")
    index = torch.arange(300, device=device)
    mask = {"none": index >= 0, "holes": index % 3 != 1, "all but a few": index % 60 == 59, "all but one": index == 150}
    attention = among_padding(backends[name], mask[masked])
    errors = attention_errors(attention, tokens, torch.bfloat16, device, int(mask[masked].sum()))
    if masked == "all but one":  # softmax over one key: o is v, and no gradient reaches q and k
        errors = {key: errors[key] for key in ("o", "dv")}
    assert max(errors.values()) < 5e-3, errors


@pytest.mark.parametrize("queries", [6, 7, 100])
def test_flash4_sums_the_parts_of_its_backward_pass(queries, formula, monkeypatch):
    monkeypatch.setattr(mugv_kernels.flash4, "QUERIES", queries)
    assert max(attention_errors(BACKENDS["flash4"], 20, torch.float32, CPU).values()) < 1e-5


@pytest.mark.parametrize("queries", [6, 100])
@pytest.mark.parametrize("name", ["flash4", "sdpa"])
def test_padding_takes_no_part_in_packed_attention(name, queries, formula, monkeypatch):
    """Its o and its gradients are zero, whatever its q, k and v are."""
    monkeypatch.setattr(mugv_kernels.flash4, "QUERIES", queries)
    qkv, gradient = torch.randn(2, 20, 3, 2, 72), torch.randn(2, 20, 2, 72)
    qkv[:, 17:] = 1e4
    qkv.requires_grad_()
    o = attend_packed(BACKENDS[name], qkv, 17)
    (result,) = torch.autograd.grad(o, qkv, gradient)
    plain = sdpa(*qkv[:, :17].unbind(2))
    (expected,) = torch.autograd.grad(plain, qkv, gradient[:, :17])
    torch.testing.assert_close(o, F.pad(plain, (0, 0, 0, 0, 0, 3)))
    torch.testing.assert_close(result, expected)
    assert not result[:, 17:].any()


def test_rows_are_spaced_out_only_where_they_are_not():
    x = torch.randn(1, 5, 3, 2, 72, dtype=torch.bfloat16)
    spaced = spaced_rows(x)
    assert torch.equal(spaced, x)
    assert spaced.stride(-2) == ROW
    assert spaced_rows(spaced) is spaced


def test_queries_are_cut_where_multiprocessors_would_idle_and_copies_are_cheap():
    """The 10B's cross-attention, 48 heads and 300 text tokens: 144 pieces a sample and part, for 132 at once."""
    assert query_parts(17, 922, 300, 48) == 1  # 2,448 pieces fill them
    assert query_parts(3, 5522, 300, 48) == 2  # 7 rounds for 6.5 rounds of work; 22 parts would copy for longer
    assert query_parts(1, 54002, 300, 48) == 31
    assert query_parts(1, 13807, 300, 48) == 1  # a prime
    assert query_parts(256, 5522, 300, 48) == 1  # as many samples as the kernel takes
