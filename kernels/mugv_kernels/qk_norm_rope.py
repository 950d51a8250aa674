"""RMSNorm of q and k, rotary embedding, and the layout that the all-to-all of Ulysses sends, in one pass over qkv.

For a row x of q or k (72 channels of one token and head), its norm's weight w and the token's angles it computes

    n = x / sqrt(mean(x²) + 1e-6)            RMSNorm (Zhang & Sennrich 2019, eq. 4)
    y = n · w
    z[2i]   = y[2i] · cos[i] − y[2i+1] · sin[i]      RoPE over neighbouring pairs (Su et al. 2021), i = 0…35
    z[2i+1] = y[2i] · sin[i] + y[2i+1] · cos[i]

in fp32, and then casts; v is copied. The result is [ranks, B, N, 3, H/ranks, 72]: what the all-to-all sends to each
rank is one piece, and what comes back is, for one sample, q, k and v of all tokens without another copy. Its rows are
`ROW` elements apart, 160 bytes in bf16, so that each starts where a 32-byte sector of memory does. With dy the gradient
dz turned back by the same angles, the backward pass computes

    dw = Σ over tokens and heads of dy · n
    dx = (dy · w − n · mean(dy · w · n)) / sqrt(mean(x²) + 1e-6)

It computes the norm again, so only the inputs are saved.

Shape suffixes: B batch, N tokens, H heads, d = 72 head dimension, P = 36 pairs of channels, R ranks, h = H/R heads of a
rank.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

HEAD_DIM = 72
ROW = 80  # elements from one row of the result to the next
EPS = 1e-6
_TOKENS = 8  # tokens of a backward program: its row of weight gradients is 576 bytes beside 8 × 55 KB of traffic


def qk_norm_rope_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, ranks: int
) -> Tensor:
    """Does what `qk_norm_rope` does in plain PyTorch, in fp32, or in fp64 where qkv is fp64."""
    _check(qkv, q_weight, k_weight, cos, sin, ranks)
    q_BNHd, k_BNHd, v_BNHd = rearrange(qkv, "b n (three head d) -> three b n head d", three=3, d=HEAD_DIM)
    q_BNHd = _norm_rotate(q_BNHd, q_weight, cos, sin)
    k_BNHd = _norm_rotate(k_BNHd, k_weight, cos, sin)
    return rearrange([q_BNHd, k_BNHd, v_BNHd], "qkv b n (rank head) d -> rank b n qkv head d", rank=ranks).contiguous()


def _norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalises and rotates q or k, [B, N, H, 72] → the same."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y_BNHd = F.rms_norm(x.to(wide), (HEAD_DIM,), weight.to(wide), EPS)
    even, odd = y_BNHd.unflatten(-1, (-1, 2)).unbind(-1)  # [B, N, H, 36] each
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, N, 1, 36]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def qk_norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, ranks: int) -> Tensor:
    """Normalises and rotates q and k and lays q, k and v out by the rank that their heads go to.

    Args:
        qkv: [B, N, 3·H·72], the output of the projection: channels are (q, k, v) × head × 72.
        q_weight, k_weight: [72], of the two RMSNorms.
        cos, sin: [B, N, 36] fp32, of each token's angles. They get no gradient.
        ranks: number of ranks of the sequence-parallel group; divides H. Head i goes to rank i // (H/ranks).
    Returns:
        [ranks, B, N, 3, H/ranks, 72] in qkv's dtype, a view of a contiguous tensor whose rows are `ROW` long.

    Raises:
        ValueError: the shapes do not fit together.
    """
    _check(qkv, q_weight, k_weight, cos, sin, ranks)
    return _forward(qkv, q_weight, k_weight, cos, sin, ranks)


def _check(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, ranks: int) -> None:
    batch, tokens, width = qkv.shape
    if width % (3 * ranks * HEAD_DIM):
        raise ValueError(f"qkv {tuple(qkv.shape)}: its last side must be 3·H·72, with H a multiple of ranks = {ranks}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.shape != (HEAD_DIM,):
            raise ValueError(f"{name} {tuple(weight.shape)}: must be [{HEAD_DIM}]")
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.shape != (batch, tokens, HEAD_DIM // 2):
            raise ValueError(f"{name} {tuple(angle.shape)}: must be {[batch, tokens, HEAD_DIM // 2]} as qkv has it")


@torch.library.custom_op("mugv::qk_norm_rope", mutates_args=())
def _forward(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, ranks: int) -> Tensor:
    batch, tokens, width = qkv.shape
    heads = width // (3 * HEAD_DIM)
    out = _new_result(qkv, ranks)
    inputs = (x.contiguous() for x in (qkv, q_weight, k_weight, cos, sin))
    _forward_kernel[(batch * tokens,)](*inputs, out, batch * tokens, heads, heads // ranks)
    return out


def _new_result(qkv: Tensor, ranks: int) -> Tensor:
    batch, tokens, width = qkv.shape
    return qkv.new_empty(ranks, batch, tokens, 3, width // (3 * HEAD_DIM * ranks), ROW)[..., :HEAD_DIM]


@_forward.register_fake
def _(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, ranks: int) -> Tensor:
    return _new_result(qkv, ranks)


@torch.library.custom_op("mugv::qk_norm_rope_backward", mutates_args=())
def _backward(
    gradient: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of qkv, q_weight and k_weight from that of the result."""
    ranks, batch, tokens, _, local_heads, _ = gradient.shape
    programs = -(-batch * tokens // _TOKENS)
    inputs = (x.contiguous() for x in (gradient, qkv, q_weight, k_weight, cos, sin))
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    d_weights = qkv.new_empty(programs, 2, HEAD_DIM, dtype=torch.float32)
    _backward_kernel[(programs,)](
        *inputs, d_qkv, d_weights, batch * tokens, ranks * local_heads, local_heads, TOKENS=_TOKENS
    )
    # Each program wrote a row. They are summed here and not with atomics, so that they have the same bits every time.
    dq_weight, dk_weight = d_weights.sum(0)
    return d_qkv, dq_weight.to(q_weight.dtype, copy=True), dk_weight.to(k_weight.dtype, copy=True)


@_backward.register_fake
def _(
    gradient: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return d_qkv, torch.empty_like(q_weight), torch.empty_like(k_weight)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])


def _differentiate(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(gradient, *ctx.saved_tensors), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


if find_spec("triton"):  # not built for every platform; the reference needs none
    import triton
    import triton.language as tl

    # A program takes blocks of heads of a token, [16, 128], of which 72 lanes are used: 2.3 KB of bf16 of each of q, k
    # and v. Lanes are loaded in order, 16 bytes a thread, and split into pairs in registers.
    _BLOCK = tl.constexpr(16)
    _LANES = tl.constexpr(128)
    _DIM = tl.constexpr(HEAD_DIM)
    _ROW = tl.constexpr(ROW)
    _NORM_EPS = tl.constexpr(EPS)

    @triton.jit
    def _pairs(x):
        """Splits rows [BLOCK, LANES] into their even and odd lanes, [BLOCK, LANES / 2] fp32 each."""
        return tl.split(tl.reshape(x.to(tl.float32), (_BLOCK, _LANES // 2, 2)))

    @triton.jit
    def _lanes(even, odd):
        """Joins even and odd lanes into rows; the inverse of `_pairs`."""
        return tl.reshape(tl.join(even, odd), (_BLOCK, _LANES))

    @triton.jit
    def _pair_weights(weight, pair):
        """Loads the weights of even and odd channels, each [1, LANES / 2] fp32, zero past the head."""
        even = tl.load(weight + 2 * pair, mask=2 * pair < _DIM, other=0.0).to(tl.float32)
        odd = tl.load(weight + 2 * pair + 1, mask=2 * pair < _DIM, other=0.0).to(tl.float32)
        return even[None, :], odd[None, :]

    @triton.jit
    def _inverse_rms(even, odd):
        """Returns 1 / sqrt(mean(x²) + eps) of each row, [BLOCK, 1]."""
        return tl.rsqrt(tl.sum(even * even + odd * odd, axis=1) / _DIM + _NORM_EPS)[:, None]

    @triton.jit
    def _projected(token, head, part, HEADS: tl.constexpr):
        """Returns the offsets [BLOCK, 1] of rows in qkv [tokens, 3, HEADS, DIM], int64 as the token is."""
        return (((token * 3 + part) * HEADS + head) * _DIM)[:, None]

    @triton.jit
    def _sent(token, head, part, tokens, LOCAL_HEADS: tl.constexpr, ROW: tl.constexpr):
        """Returns the offsets [BLOCK, 1] of rows in the result [ranks, tokens, 3, LOCAL_HEADS, ROW], int64."""
        rank, local_head = head // LOCAL_HEADS, head % LOCAL_HEADS
        return ((((rank * tokens + token) * 3 + part) * LOCAL_HEADS + local_head) * ROW)[:, None]

    @triton.jit
    def _forward_rows(x, even_weight, odd_weight, cos, sin):
        """Returns z of the rows x, [BLOCK, LANES]."""
        even, odd = _pairs(x)
        inverse_rms = _inverse_rms(even, odd)
        even, odd = even * inverse_rms * even_weight, odd * inverse_rms * odd_weight
        return _lanes(even * cos - odd * sin, even * sin + odd * cos)

    @triton.jit
    def _backward_rows(x, dz, even_weight, odd_weight, cos, sin):
        """Returns dx of the rows x from dz, [BLOCK, LANES], and each row's share of dw, as even and odd lanes."""
        even, odd = _pairs(x)
        inverse_rms = _inverse_rms(even, odd)
        even, odd = even * inverse_rms, odd * inverse_rms
        dz_even, dz_odd = _pairs(dz)
        dy_even, dy_odd = dz_even * cos + dz_odd * sin, dz_odd * cos - dz_even * sin
        dn_even, dn_odd = dy_even * even_weight, dy_odd * odd_weight
        mean = tl.sum(dn_even * even + dn_odd * odd, axis=1)[:, None] / _DIM
        dx = _lanes(inverse_rms * (dn_even - even * mean), inverse_rms * (dn_odd - odd * mean))
        return dx, dy_even * even, dy_odd * odd

    @triton.jit
    def _forward_kernel(
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        out,
        tokens,
        HEADS: tl.constexpr,
        LOCAL_HEADS: tl.constexpr,
    ):
        """Each program computes all heads of one token."""
        token = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, _LANES)[None, :]
        pair = tl.arange(0, _LANES // 2)
        q_even, q_odd = _pair_weights(q_weight, pair)
        k_even, k_odd = _pair_weights(k_weight, pair)
        angle = token * (_DIM // 2) + pair
        cosine = tl.load(cos + angle, mask=2 * pair < _DIM, other=0.0)[None, :]
        sine = tl.load(sin + angle, mask=2 * pair < _DIM, other=0.0)[None, :]

        for first in range(0, HEADS, _BLOCK):
            head = first + tl.arange(0, _BLOCK)
            mask = (head < HEADS)[:, None] & (lane < _DIM)
            q = tl.load(qkv + _projected(token, head, 0, HEADS) + lane, mask=mask, other=0.0)
            k = tl.load(qkv + _projected(token, head, 1, HEADS) + lane, mask=mask, other=0.0)
            v = tl.load(qkv + _projected(token, head, 2, HEADS) + lane, mask=mask, other=0.0)
            q = _forward_rows(q, q_even, q_odd, cosine, sine).to(v.dtype)
            k = _forward_rows(k, k_even, k_odd, cosine, sine).to(v.dtype)
            tl.store(out + _sent(token, head, 0, tokens, LOCAL_HEADS, _ROW) + lane, q, mask=mask)
            tl.store(out + _sent(token, head, 1, tokens, LOCAL_HEADS, _ROW) + lane, k, mask=mask)
            tl.store(out + _sent(token, head, 2, tokens, LOCAL_HEADS, _ROW) + lane, v, mask=mask)

    @triton.jit
    def _backward_kernel(
        gradient,
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        d_qkv,
        d_weights,
        tokens,
        HEADS: tl.constexpr,
        LOCAL_HEADS: tl.constexpr,
        TOKENS: tl.constexpr,
    ):
        """Each program computes all heads of TOKENS tokens, and their share [2, DIM] of the weights' gradients."""
        program = tl.program_id(0)
        lane = tl.arange(0, _LANES)[None, :]
        pair = tl.arange(0, _LANES // 2)
        q_even, q_odd = _pair_weights(q_weight, pair)
        k_even, k_odd = _pair_weights(k_weight, pair)
        dq_even = tl.zeros((_BLOCK, _LANES // 2), tl.float32)
        dq_odd = tl.zeros((_BLOCK, _LANES // 2), tl.float32)
        dk_even = tl.zeros((_BLOCK, _LANES // 2), tl.float32)
        dk_odd = tl.zeros((_BLOCK, _LANES // 2), tl.float32)

        for i in range(TOKENS):
            token = program.to(tl.int64) * TOKENS + i
            angle = token * (_DIM // 2) + pair
            pairs, heads = tl.where(token < tokens, _DIM // 2, 0), tl.where(token < tokens, HEADS, 0)
            cosine = tl.load(cos + angle, mask=pair < pairs, other=0.0)[None, :]
            sine = tl.load(sin + angle, mask=pair < pairs, other=0.0)[None, :]
            for first in range(0, HEADS, _BLOCK):
                head = first + tl.arange(0, _BLOCK)
                mask = (head < heads)[:, None] & (lane < _DIM)
                q_at = _projected(token, head, 0, HEADS) + lane
                k_at = _projected(token, head, 1, HEADS) + lane
                v_at = _projected(token, head, 2, HEADS) + lane
                q = tl.load(qkv + q_at, mask=mask, other=0.0)
                k = tl.load(qkv + k_at, mask=mask, other=0.0)
                dq = tl.load(gradient + _sent(token, head, 0, tokens, LOCAL_HEADS, _DIM) + lane, mask=mask, other=0.0)
                dk = tl.load(gradient + _sent(token, head, 1, tokens, LOCAL_HEADS, _DIM) + lane, mask=mask, other=0.0)
                dv = tl.load(gradient + _sent(token, head, 2, tokens, LOCAL_HEADS, _DIM) + lane, mask=mask, other=0.0)
                dq, even, odd = _backward_rows(q, dq, q_even, q_odd, cosine, sine)
                dq_even += even
                dq_odd += odd
                dk, even, odd = _backward_rows(k, dk, k_even, k_odd, cosine, sine)
                dk_even += even
                dk_odd += odd
                tl.store(d_qkv + q_at, dq.to(dv.dtype), mask=mask)
                tl.store(d_qkv + k_at, dk.to(dv.dtype), mask=mask)
                tl.store(d_qkv + v_at, dv, mask=mask)

        at = d_weights + program * 2 * _DIM + 2 * pair
        tl.store(at, tl.sum(dq_even, axis=0), mask=2 * pair < _DIM)
        tl.store(at + 1, tl.sum(dq_odd, axis=0), mask=2 * pair < _DIM)
        tl.store(at + _DIM, tl.sum(dk_even, axis=0), mask=2 * pair < _DIM)
        tl.store(at + _DIM + 1, tl.sum(dk_odd, axis=0), mask=2 * pair < _DIM)
