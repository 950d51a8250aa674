"""Finds the fastest attention that is right, by running every installed backend on the run's own shape ("auto").

Speed and correctness are measured, not assumed: kernels for head_dim 72 are rare enough that a library can return a
wrong gradient, and none says so.

Shape suffixes: B batch, N tokens (queries), L keys, H heads, d = 72 head dimension.
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_ds.config.model import HEAD_DIM
from mugv_ds.models.attention import (
    BACKENDS,
    MASKED_BACKENDS,
    Attention,
    MaskedAttention,
    attend_packed,
    installed_backends,
    installed_masked_backends,
)
from mugv_kernels.flash4 import QUERIES
from mugv_kernels.qk_norm_rope import ROW

# bf16 attention of unit-variance inputs is off by about 2.5e-3 (measured on an H200); a wrong gradient by about 1.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-4}
_CHECKED_TOKENS = 16_384  # the exact reference costs N² in fp64
_LONG_TOKENS = QUERIES + 1_000  # where FlashAttention-4's backward pass goes in parts; checked if the run is longer
_PADDING = 3  # tokens behind the sequence, as Ulysses has where its ranks do not divide it
_TIMED_FLOPS = 3e14  # of one forward and backward: heads are left out until it costs no more
_CHUNK = 1024  # queries that the exact reference holds the scores of at once
_GRADIENTS = ("o", "dq", "dk", "dv")

First = Callable[[Callable[[], str]], str]  # calls a function on one process of all, and gives its result to all

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """What came of trying one backend.

    Attributes:
        name: of the backend.
        milliseconds: time of a forward and backward pass; None if it failed.
        errors: relative errors of o, dq, dk and dv by name; None if it cannot run.
        failure: why it is not used; None if it is right.
    """

    name: str
    milliseconds: float | None = None
    errors: dict[str, float] | None = None
    failure: str | None = None

    def __str__(self) -> str:
        if self.failure is not None:
            return f"{self.name:8} {self.failure}"
        errors = "  ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"{self.name:8} {self.milliseconds:9.2f} ms  {errors}"


def choose_attention(
    backends: dict[str, Attention],
    *,
    tokens: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    keys: int | None = None,
) -> tuple[str, list[Trial]]:
    """Tries all backends; returns the name of the fastest whose o, dq, dk and dv are right, and all trials.

    A backend that is wrong is named in a warning; one that cannot run the shape is left out.

    Args:
        backends: by name.
        tokens: N of the run.
        heads: heads that one rank computes.
        dtype, device: of q, k and v.
        keys: L of cross-attention; None for self-attention, which is run and timed in the form in which it trains.
    Raises:
        RuntimeError: no backend is right.
    """
    trials = [_try(name, backend, tokens, keys, heads, dtype, device) for name, backend in backends.items()]
    for trial in trials:
        if trial.errors is not None and trial.failure is not None:
            logger.warning("attention backend %s is wrong on this machine and will not be used: %s", trial.name, trial)
    right = [trial for trial in trials if trial.failure is None]
    if not right:
        raise RuntimeError("no attention backend is right on this machine:\n" + "\n".join(map(str, trials)))
    return min(right, key=lambda trial: trial.milliseconds).name, trials


def choose_masked_attention(
    backends: dict[str, MaskedAttention],
    *,
    tokens: int,
    text_tokens: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, list[Trial]]:
    """Does what `choose_attention` does for cross-attention to `text_tokens` keys, of which every seventh is masked."""
    mask = torch.arange(text_tokens, device=device) % 7 != 6
    functions = {name: among_padding(backend, mask) for name, backend in backends.items()}
    return choose_attention(functions, tokens=tokens, keys=int(mask.sum()), heads=heads, dtype=dtype, device=device)


def _here(function: Callable[[], str]) -> str:
    return function()


def named_attention(
    name: str,
    *,
    tokens: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    first: First = _here,
    backends: dict[str, Attention] | None = None,
) -> Attention:
    """Returns the backend of this name or, for "auto", the fastest right one; see `choose_attention`.

    Args:
        first: lets one process of all choose for them; it prints the trials.
        backends: by name, what there is in place of `BACKENDS`; of them those are tried that are installed.
    """
    backends = BACKENDS if backends is None else backends
    if name != "auto":
        return backends[name]
    shape = {"tokens": tokens, "heads": heads, "dtype": dtype, "device": device}
    tried = {name: backends[name] for name in installed_backends(device) if name in backends}
    return backends[first(lambda: _chosen("self-attention", *choose_attention(tried, **shape)))]


def fastest_masked_attention(
    *, tokens: int, text_tokens: int, heads: int, dtype: torch.dtype, device: torch.device, first: First = _here
) -> MaskedAttention:
    """Returns the fastest right backend for cross-attention; see `choose_masked_attention`, `named_attention`."""
    shape = {"tokens": tokens, "text_tokens": text_tokens, "heads": heads, "dtype": dtype, "device": device}
    backends = installed_masked_backends(device)
    return MASKED_BACKENDS[first(lambda: _chosen("cross-attention", *choose_masked_attention(backends, **shape)))]


def _chosen(title: str, name: str, trials: list[Trial]) -> str:
    print("\n".join([f"{title}, forward and backward:", *map(str, trials), f"taken: {name}"]), flush=True)
    return name


def among_padding(attention: MaskedAttention, key_mask: Tensor) -> Attention:
    """Makes of a masked attention a plain one, so that both are tried alike.

    The function takes only the keys that take part, and hands them to `attention` among masked keys that hold large
    numbers: a backend that lets those in is then visibly wrong.

    Args:
        key_mask: bool [L], True for as many keys as the function will get.
    """
    (where,) = key_mask.nonzero(as_tuple=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (len(q), len(key_mask), *k.shape[2:])
        k, v = (x.new_full(shape, 50.0).index_copy(1, where, x) for x in (k, v))
        return attention(q, k, v, key_mask.expand(len(q), -1))

    return call


def _try(
    name: str,
    backend: Attention,
    tokens: int,
    keys: int | None,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Trial:
    cases = [min(tokens, _CHECKED_TOKENS), *([_LONG_TOKENS] if tokens > _LONG_TOKENS else [])]
    try:
        errors = [attention_errors(backend, case, dtype, device, keys) for case in cases]
    except Exception as error:
        # Libraries refuse a device, dtype or shape with every kind of exception.
        return Trial(name, failure=f"cannot run: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    # A NaN is worse than any number.
    worst = {key: max((case[key] for case in errors), key=lambda e: (e != e, e)) for key in errors[0]}
    wrong = [key for key, value in worst.items() if not value <= TOLERANCE[dtype]]
    if wrong:
        shown = ", ".join(f"{key} off by {worst[key]:.1e}" for key in wrong)
        return Trial(name, errors=worst, failure=f"wrong: {shown} (allowed {TOLERANCE[dtype]:.0e})")
    timed_heads = max(1, min(heads, int(_TIMED_FLOPS / (14.0 * tokens * (keys or tokens) * HEAD_DIM))))
    call = _trained(backend, tokens, timed_heads, dtype, device, keys)
    return Trial(name, _time(call, device) * heads / timed_heads, worst)


def _trained(
    backend: Attention, tokens: int, heads: int, dtype: torch.dtype, device: torch.device, keys: int | None
) -> Callable[[], tuple[Tensor, ...]]:
    """Returns a function that runs a backend forward and backward in the way that training does: o, dq, dk, dv.

    Self-attention gets q, k and v in one tensor whose rows are spaced out and which ends in padding, whose numbers are
    large: a backend that lets them in is visibly wrong. Cross-attention, which has `keys`, gets them apart.
    """
    if keys is not None:
        *inputs, gradient = random_qkv(tokens, heads, dtype, device, keys)

        def call() -> tuple[Tensor, ...]:
            o = backend(*inputs)
            return (o.detach(), *torch.autograd.grad(o, inputs, gradient))

        return call
    q, k, v, gradient = (x.detach() for x in random_qkv(tokens, heads, dtype, device))
    rows = gradient.new_full((1, tokens + _PADDING, 3, heads, ROW), 50.0)
    qkv = rows[..., :HEAD_DIM]
    qkv[:, :tokens] = torch.stack([q, k, v], dim=2)
    qkv = qkv.detach().requires_grad_()  # a view still, with the strides that training has
    padded_gradient = F.pad(gradient, (0, 0, 0, 0, 0, _PADDING), value=1.0)

    def call_packed() -> tuple[Tensor, ...]:
        o = attend_packed(backend, qkv, tokens)
        (dqkv,) = torch.autograd.grad(o, qkv, padded_gradient)
        return (o.detach(), *dqkv.unbind(2))

    return call_packed


def random_qkv(
    tokens: int, heads: int, dtype: torch.dtype, device: torch.device, keys: int | None = None
) -> list[Tensor]:
    """Draws q, k, v and a gradient of o: standard normal [1, N or L, H, 72], of which q, k and v require gradients."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, gradient = (
        torch.randn(1, length, heads, HEAD_DIM, generator=generator, dtype=dtype, device=device)
        for length in (tokens, keys or tokens, keys or tokens, tokens)
    )
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient]


def attention_errors(
    backend: Attention, tokens: int, dtype: torch.dtype, device: torch.device, keys: int | None = None
) -> dict[str, float]:
    """Returns the relative errors ‖x − exact‖ / ‖exact‖ of o, dq, dk and dv by name; see `_trained` for what is run.

    The inputs are random, of two heads, so that strides between heads matter; the first head is compared in fp64. What
    padding gets has to be exactly 0.

    Args:
        keys: L of cross-attention; None for self-attention, in the form in which training runs it.
    """
    got = _trained(backend, tokens, 2, dtype, device, keys)()
    q, k, v, gradient = (x.detach()[0, :, 0].double() for x in random_qkv(tokens, 2, dtype, device, keys))
    exact = exact_attention(q, k, v, gradient)
    return {
        name: float(
            torch.hypot((value[0, : len(reference), 0].double() - reference).norm(), value[0, len(reference) :].norm())
            / reference.norm()
        )
        for name, value, reference in zip(_GRADIENTS, got, exact, strict=True)
    }


def exact_attention(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes o, dq, dk and dv of one head by the formula, a chunk of queries at a time.

    With P = softmax(q·kᵀ·d^-½): o = P·v, dv = Pᵀ·do, dS = P ∘ (do·vᵀ − rowsum(do ∘ o)), dq = dS·k·d^-½ and
    dk = dSᵀ·q·d^-½ (Dao et al. 2022, FlashAttention, appendix B).

    Args:
        q, gradient (of o): [N, d], in the precision to compute in. k, v: [L, d].
    Returns:
        o and dq [N, d]; dk and dv [L, d].
    """
    scale = q.shape[1] ** -0.5
    o, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    for i in range(0, len(q), _CHUNK):
        rows = slice(i, i + _CHUNK)
        p = torch.softmax(q[rows] @ k.T * scale, dim=-1)
        o[rows] = p @ v
        dv += p.T @ gradient[rows]
        dp = gradient[rows] @ v.T
        ds = p * (dp - (gradient[rows] * o[rows]).sum(dim=-1, keepdim=True)) * scale
        dq[rows] = ds @ k
        dk += ds.T @ q[rows]
    return o, dq, dk, dv


def _time(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Returns the milliseconds of a call: the median of `repeats`, after one to warm up."""
    return statistics.median([_milliseconds(call, device) for _ in range(repeats + 1)][1:])


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - begin)
