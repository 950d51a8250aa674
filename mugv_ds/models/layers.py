"""The parts of the diffusion transformer. Parameter names are those of the published weights.

Shape suffixes: B batch, N tokens held, L text tokens, D hidden size, K token classes (0 noised, 1 clean).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mugv_ds.config.model import HEAD_DIM, DiTConfig
from mugv_ds.models.attention import Attention, GroupedAttention, MaskedAttention, attend_packed, masked_attention
from mugv_ds.models.modulated import modulated_linear, modulated_mlp
from mugv_kernels.dispatch import gated_residual, head_norm, modulate, qk_norm_rope

EPS = 1e-6


class Modulation(NamedTuple):
    """What a modulated LayerNorm takes beside x: shift and scale [B, 2, D] by class, the class of each token."""

    shift_BKD: Tensor
    scale_BKD: Tensor
    clean_BN: Tensor


class Condition(NamedTuple):
    """What every block is told beside its tokens. The first three carry gradients."""

    modulation_BKD: Tensor  # [B, 2, 6·D]: shift, scale, gate of attention, then of the feed-forward layer
    time_BKD: Tensor  # [B, 2, D]: the timestep and fps embedding, for the final layer
    text_BLD: Tensor
    text_mask_BL: Tensor  # bool, False for padding
    clean_BN: Tensor  # bool, True for tokens modulated with timestep 0
    cos: Tensor  # fp32 [B, N, 36], see `models.rope`
    sin: Tensor


def sinusoid(value_B: Tensor, width: int = 256) -> Tensor:
    """[B, width] fp32: cos then sin of value · 10000^(−k/(width/2)), whatever the dtype of the model."""
    k = torch.arange(width // 2, device=value_B.device, dtype=torch.float64)
    frequency = (10000.0 ** (-k / (width // 2))).float()
    angle = value_B.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class ScalarEmbedder(nn.Module):
    """Embeds one number a sample (timestep or fps): sinusoid, Linear, SiLU, Linear. [B] → [B, D]."""

    def __init__(self, hidden_size: int, width: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, value_B: Tensor) -> Tensor:
        return self.mlp(sinusoid(value_B).to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    """fc1, GELU (tanh form), fc2."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FeedForward(Mlp):
    """An Mlp after a modulated LayerNorm."""

    def forward(self, x_BND: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """All but the last bias, and that, for a caller that adds it elsewhere."""
        if _in_fp8(self.fc1):
            return _unbiased(self.fc2, F.gelu(_modulated(self.fc1, x_BND, modulation), approximate="tanh"))
        return modulated_mlp(x_BND, *modulation, self.fc1.weight, self.fc1.bias, self.fc2.weight), self.fc2.bias


def _in_fp8(linear: nn.Module) -> bool:
    """Whether `models.fp8` has replaced it: then it adds its bias itself, and keeps its own input."""
    return not isinstance(linear, nn.Linear)


def _modulated(linear: nn.Module, x_BND: Tensor, modulation: Modulation) -> Tensor:
    """`linear` of x modulated."""
    if _in_fp8(linear):
        return linear(modulate(x_BND, *modulation))
    return modulated_linear(x_BND, *modulation, linear.weight, linear.bias)


def _unbiased(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """x·Wᵀ, and the bias for the caller to add: zero where it is in already."""
    if _in_fp8(linear):
        return linear(x), torch.zeros_like(linear.bias)
    return F.linear(x, linear.weight), linear.bias


class CaptionEmbedder(nn.Module):
    """Text features [B, L, C] → [B, L, D]: LayerNorm, Mlp, LayerNorm, both norms without affine.

    Some training checkpoints carry a null caption `y_embedding` that the published weights have not: loading drops it.
    """

    def __init__(self, caption_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)

    def forward(self, text_BLC: Tensor) -> Tensor:
        text = text_BLC.to(self.y_proj.fc1.weight.dtype)
        text = self.y_proj(F.layer_norm(text, text.shape[-1:], eps=EPS))
        return F.layer_norm(text, text.shape[-1:], eps=EPS)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        state_dict.pop(prefix + "y_embedding", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class HeadNorm(nn.Module):
    """RMSNorm over a head's 72 channels, computed in fp32. Self-attention takes its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight)


class SelfAttention(nn.Module):
    """The projections of self-attention; the attention itself is a function handed to the block."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = HeadNorm()
        self.k_norm = HeadNorm()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, x_BND: Tensor, modulation: Modulation, cos: Tensor, sin: Tensor, groups: int) -> Tensor:
        """q, k (normalised and rotated) and v of x modulated, by groups of heads.

        [B, N, D] → [groups, B, N, 3, heads/groups, 72].
        """
        qkv = _modulated(self.qkv, x_BND, modulation)
        return qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, cos, sin, groups)


class CrossAttention(nn.Module):
    """Every token looks at the caption; padding text takes no part.

    Attributes:
        attend: computes the attention itself.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attend: MaskedAttention = masked_attention
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = HeadNorm()
        self.k_norm = HeadNorm()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor, norm: nn.LayerNorm, text_BLD: Tensor, text_mask_BL: Tensor) -> Tensor:
        """What `norm` of x sees in the text, [B, N, D]."""
        # Its weight and bias are a modulation that is the same for both classes; in fp32, as 1 + (weight − 1) must be.
        shift, scale = (row.float().expand(len(x_BND), 2, -1) for row in (norm.bias, norm.weight.float() - 1))
        no_class = text_mask_BL.new_zeros(x_BND.shape[:2])
        q = _modulated(self.q_linear, x_BND, Modulation(shift, scale, no_class))
        q = rearrange(q, "b n (head d) -> b n head d", d=HEAD_DIM)
        k, v = rearrange(self.kv_linear(text_BLD), "b l (two head d) -> two b l head d", two=2, d=HEAD_DIM)
        o = self.attend(self.q_norm(q), self.k_norm(k), v, text_mask_BL)
        return self.proj(rearrange(o, "b n head d -> b n (head d)"))


class Block(nn.Module):
    """Self-attention, cross-attention to the caption, feed-forward.

    x += gate_a · attn(LN(x)·(1+scale_a) + shift_a)
    x += cross_attn(LN(x))
    x += gate_m · mlp(LN(x)·(1+scale_m) + shift_m)
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn = SelfAttention(width)
        self.cross_attn_norm = nn.LayerNorm(width, eps=EPS)
        self.cross_attn = CrossAttention(width)
        self.mlp = FeedForward(width, config.mlp_ratio * width, width)

    def forward(self, x_BND: Tensor, condition: Condition, attention: Attention, recompute: str = "off") -> Tensor:
        """[B, N, D] → [B, N, D].

        Args:
            attention: takes q, k, v [B, N, heads, 72] of the tokens held, returns o of the same shape; or has
                `head_groups` and `grouped`, see `models.attention.GroupedAttention`.
            recompute: what the backward pass computes again instead of keeping, beside the modulated LayerNorms: "off"
                nothing, "light" what lies between self-attention and the feed-forward layer, "selective" all but
                self-attention (whose q, k, v and o are kept), "full" everything.
        """
        if recompute == "full":
            return _checkpoint(self.forward, x_BND, condition, attention)
        around = _checkpoint if recompute == "selective" else _call
        between = _call if recompute == "off" else _checkpoint
        grouped = isinstance(attention, GroupedAttention)
        qkv = around(self._before_attention, x_BND, condition, attention.head_groups if grouped else 1)
        o = attention.grouped(qkv) if grouped else attend_packed(attention, qkv.squeeze(0), x_BND.shape[1])
        x = between(self._after_attention, x_BND, o, condition)
        return around(self._feed_forward, x, condition)

    def compile_segments(self) -> None:
        """Compiles the part around cross-attention; the rest is fused by hand. Blocks of one size share the code.

        Each shape is compiled once, for itself: a bucket's shapes are static, and there are few buckets.
        """
        self._after_attention = torch.compile(self._after_attention, dynamic=False)

    def _before_attention(self, x_BND: Tensor, condition: Condition, groups: int) -> Tensor:
        shift, scale, *_ = self._rows(condition)
        modulation = Modulation(shift, scale, condition.clean_BN)
        return self.attn.project(x_BND, modulation, condition.cos, condition.sin, groups)

    def _after_attention(self, x_BND: Tensor, o: Tensor, condition: Condition) -> Tensor:
        _, _, gate, *_ = self._rows(condition)
        attended, bias = _unbiased(self.attn.proj, rearrange(o, "b n head d -> b n (head d)"))
        x = gated_residual(x_BND, attended, bias, gate, condition.clean_BN)
        return x + self.cross_attn(x, self.cross_attn_norm, condition.text_BLD, condition.text_mask_BL)

    def _feed_forward(self, x_BND: Tensor, condition: Condition) -> Tensor:
        _, _, _, shift, scale, gate = self._rows(condition)
        fed, bias = self.mlp(x_BND, Modulation(shift, scale, condition.clean_BN))
        return gated_residual(x_BND, fed, bias, gate, condition.clean_BN)

    def _rows(self, condition: Condition) -> tuple[Tensor, ...]:
        """shift, scale, gate of attention, then of the feed-forward layer: each a row for each class, [B, 2, D]."""
        rows = condition.modulation_BKD + self.scale_shift_table.flatten()
        return rows.chunk(6, dim=-1)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear back to patches: [B, N, D] → [B, N, 2·2·48] fp32, (row, column, channel)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, 4 * 2 * config.in_channels)

    def forward(self, x_BND: Tensor, condition: Condition) -> Tensor:
        shift, scale = (row + condition.time_BKD for row in self.scale_shift_table)
        return self.linear(modulate(x_BND, shift, scale, condition.clean_BN)).float()


def _call(function, *args):
    return function(*args)


def _checkpoint(function, *args):
    # Nothing in a block draws random numbers, so there is no generator state to keep.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
