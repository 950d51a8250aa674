"""The layers of the diffusion transformer. Parameter names are those of the published weights.

Shape suffixes: B batch, N tokens held, L text tokens, C text width, D hidden size, H heads, d = 72 head dimension,
K = 2 token classes (0 noised, 1 clean), G groups of heads that the attention asks for (sequence ranks).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mugv_ds.config.model import HEAD_DIM, DiTConfig
from mugv_ds.models.attention import Attention, GroupedAttention, MaskedAttention, attend_packed, masked_attention
from mugv_ds.models.fp8_products import fp8_linear, fp8_modulated_linear, fp8_modulated_mlp
from mugv_ds.models.kept_attention import Keep, Kept, KeptAttention, on_device
from mugv_ds.models.lora import adapter_of, plus_adapter
from mugv_ds.models.modulated import modulated_linear, modulated_mlp
from mugv_kernels.dispatch import gated_residual, head_norm, modulate, qk_norm_rope

EPS = 1e-6


class Modulation(NamedTuple):
    """What a modulated LayerNorm (adaLN, Peebles & Xie 2023) takes beside x: a shift and a scale for each class."""

    shift_BKD: Tensor
    scale_BKD: Tensor
    clean_BN: Tensor  # bool, each token's class


class Condition(NamedTuple):
    """What every block takes beside its tokens. The first three carry gradients."""

    modulation_BKD: Tensor  # [B, 2, 6·D]: shift, scale, gate of attention, then of the feed-forward layer
    time_BKD: Tensor  # [B, 2, D]: the timestep and fps embedding, for the final layer
    text_BLD: Tensor
    text_mask_BL: Tensor  # bool, False for padding
    clean_BN: Tensor  # bool, True for tokens modulated with timestep 0
    cos: Tensor  # fp32 [B, N, 36], see `models.rope`
    sin: Tensor  # as cos


def sinusoid(value_B: Tensor, width: int = 256) -> Tensor:
    """Returns the sinusoidal features [B, width] of a number: cos, then sin, of value · 10000^(−k/(width/2)).

    They are fp32 whatever the dtype of the model, because bf16 cannot tell neighbouring timesteps apart.
    """
    k = torch.arange(width // 2, device=value_B.device, dtype=torch.float64)
    frequency = (10000.0 ** (-k / (width // 2))).float()
    angle = value_B.float()[:, None] * frequency  # [B, width/2]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class ScalarEmbedder(nn.Module):
    """Embeds one number of each sample, its timestep or fps: sinusoid, Linear, SiLU, Linear; [B] → [B, D]."""

    def __init__(self, hidden_size: int, width: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, value_B: Tensor) -> Tensor:
        return self.mlp(sinusoid(value_B).to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    """Applies fc1, GELU (tanh form) and fc2: […, width_in] → […, width_out]."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FeedForward(Mlp):
    """The feed-forward layer of a block: an `Mlp` after a modulated LayerNorm."""

    def forward(self, x_BND: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """Returns the output without the last bias [B, N, D], and that bias [D], which the gated residual adds."""
        fc1, fc2 = self.fc1, self.fc2
        if _is_plain(fc1):
            adapters = adapter_of(fc1), adapter_of(fc2)
            return modulated_mlp(x_BND, *modulation, fc1.weight, fc1.bias, fc2.weight, *adapters), fc2.bias
        if _is_fused_fp8(fc1) and _is_fused_fp8(fc2):
            return fp8_modulated_mlp(x_BND, *modulation, fc1.rounded, fc1.bias, fc2.rounded), fc2.bias
        return _unbiased(fc2, F.gelu(_modulated(fc1, x_BND, modulation), approximate="tanh"))


def _is_plain(linear: nn.Module) -> bool:
    """Tells whether a linear computes in the dtype of its weight: PyTorch's, or an fp8 one that is switched off."""
    return isinstance(linear, nn.Linear) or getattr(linear, "fp8_on", None) is False


def _is_fused_fp8(linear: nn.Module) -> bool:
    """Tells whether a linear is an fp8 one of ours that rounds what is computed on the way: one without an adapter,
    which has to see its input in bf16."""
    return hasattr(linear, "rounded") and adapter_of(linear) is None


def _modulated(linear: nn.Module, x_BND: Tensor, modulation: Modulation) -> Tensor:
    """Returns `linear` of the modulated LayerNorm of x.

    The LayerNorm's output is saved for the backward pass only by fp8 linears that are not fused with it.
    """
    if _is_plain(linear):
        return modulated_linear(x_BND, *modulation, linear.weight, linear.bias, adapter_of(linear))
    if _is_fused_fp8(linear):
        return fp8_modulated_linear(x_BND, *modulation, linear.rounded, linear.bias)
    return _adapted(linear, modulate(x_BND, *modulation))


def _unbiased(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x·Wᵀ and the bias for the caller to add, which is zero where the linear adds its own."""
    if _is_plain(linear):
        return plus_adapter(F.linear(x, linear.weight), linear, x), linear.bias
    if hasattr(linear, "rounded"):
        return plus_adapter(fp8_linear(x, linear.rounded, None), linear, x), linear.bias
    return _adapted(linear, x), torch.zeros_like(linear.bias)


def _adapted(linear: nn.Module, x: Tensor) -> Tensor:
    """Returns `linear` of x, and what its adapter adds to it."""
    return plus_adapter(linear(x), linear, x)


class CaptionEmbedder(nn.Module):
    """Embeds text features, [B, L, C] → [B, L, D]: LayerNorm, Mlp, LayerNorm, both norms without affine.

    Some training checkpoints carry a null caption `y_embedding`, which the published weights do not have: loading drops
    it.
    """

    def __init__(self, caption_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)

    def forward(self, text_BLC: Tensor) -> Tensor:
        text_BLC = text_BLC.to(self.y_proj.fc1.weight.dtype)
        text_BLD = self.y_proj(F.layer_norm(text_BLC, text_BLC.shape[-1:], eps=EPS))
        return F.layer_norm(text_BLD, text_BLD.shape[-1:], eps=EPS)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        state_dict.pop(prefix + "y_embedding", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class HeadNorm(nn.Module):
    """RMSNorm over a head's 72 channels, […, 72] → […, 72], computed in fp32.

    Self-attention only uses its weight: there the norm is fused with the rotary embedding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        return head_norm(x, self.weight)


class SelfAttention(nn.Module):
    """The projections of self-attention; the attention itself is a function that is handed to the block."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = HeadNorm()
        self.k_norm = HeadNorm()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, x_BND: Tensor, modulation: Modulation, cos: Tensor, sin: Tensor, groups: int) -> Tensor:
        """Projects the modulated LayerNorm of x to q, k and v, and normalises and rotates q and k.

        [B, N, D] → [G, B, N, 3, H/G, 72], by `groups` groups of heads.
        """
        qkv = _modulated(self.qkv, x_BND, modulation)  # [B, N, 3·D]
        return qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, cos, sin, groups)


class CrossAttention(nn.Module):
    """Lets every token attend to the caption; padding text takes no part.

    Attributes:
        attend: computes the attention itself; a run sets the backend that it has chosen.
        held: keys and values that are taken in place of the text's, see `models.reuse.hold_text`.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attend: MaskedAttention = masked_attention
        self.held: tuple[Tensor, Tensor] | None = None
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = HeadNorm()
        self.k_norm = HeadNorm()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor, norm: nn.LayerNorm, text_BLD: Tensor, text_mask_BL: Tensor) -> Tensor:
        """Attends from `norm` of x to the text: [B, N, D] → [B, N, D]."""
        # The norm's weight and bias are a modulation that is the same for both classes, so that its output need not be
        # kept either. They are in fp32, in which 1 + (weight − 1) is the weight again.
        shift, scale = (row.float().expand(len(x_BND), 2, -1) for row in (norm.bias, norm.weight.float() - 1))
        no_class = text_mask_BL.new_zeros(x_BND.shape[:2])
        q_BND = _modulated(self.q_linear, x_BND, Modulation(shift, scale, no_class))
        q_BNHd = rearrange(q_BND, "b n (head d) -> b n head d", d=HEAD_DIM)
        k_BLHd, v_BLHd = self.held or self.keys_values(text_BLD)
        o_BNHd = self.attend(self.q_norm(q_BNHd), k_BLHd, v_BLHd, text_mask_BL)
        return _adapted(self.proj, rearrange(o_BNHd, "b n head d -> b n (head d)"))

    def keys_values(self, text_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns k, normalised, and v of the text, each [B, L, H, 72]."""
        k_BLHd, v_BLHd = rearrange(
            _adapted(self.kv_linear, text_BLD), "b l (two head d) -> two b l head d", two=2, d=HEAD_DIM
        )
        return self.k_norm(k_BLHd), v_BLHd


class Block(nn.Module):
    """One transformer block: self-attention, cross-attention to the caption, feed-forward.

    x += gate_a · attn(LN(x)·(1+scale_a) + shift_a)
    x += cross_attn(LN(x))
    x += gate_m · mlp(LN(x)·(1+scale_m) + shift_m)

    The modulation is adaLN-single (Chen et al. 2023, PixArt-α, section 2.3): one for the whole model, to which each
    block adds its `scale_shift_table`.

    Attributes:
        keep: where the recompute level "attention" keeps what it does; `parallel.offload` has another place.
        keep_input: whether the block's input is kept there too.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.keep: Keep = on_device
        self.keep_input = False
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn = SelfAttention(width)
        self.cross_attn_norm = nn.LayerNorm(width, eps=EPS)
        self.cross_attn = CrossAttention(width)
        self.mlp = FeedForward(width, config.mlp_ratio * width, width)

    def forward(self, x_BND: Tensor, condition: Condition, attention: Attention, recompute: str = "off") -> Tensor:
        """Runs the block: [B, N, D] → [B, N, D].

        Args:
            attention: takes q, k, v [B, N, H, 72] of the tokens held and returns o of the same shape; or has
                `head_groups` and `grouped`, see `models.attention.GroupedAttention`.
            recompute: level of `parallel.activation_checkpointing`: which activations are saved for the backward pass,
                which computes the others again. Every level saves what the levels before it save (in units of
                [B, N, D]; `plan.memory.KEPT` has the sums):
                "full": the block's input (1).
                "attention": also o of self-attention and the log-sum-exp of its softmax (1), see `keep`; the attention
                    has to be a `KeptAttention`.
                "selective": also what self-attention needs, that is q, k, v and o (4, and 1/3 for the space between the
                    rows of q, k and v), o as its projection takes it (1; a tensor of its own only where the sequence is
                    sharded), and the feed-forward layer's input (1).
                "light": also the outputs of the large linears: qkv before its norm (3), GELU's input (4) and the
                    feed-forward layer's output (1).
                "off": also what lies between self-attention and the feed-forward layer: the projection of o, the
                    residual after it, cross-attention's q before and after its norm, and its o (5).
                No level saves the outputs of the modulated LayerNorms or of GELU (see `models.modulated`), except that
                Transformer Engine's fp8 linears, and those of ours with an adapter, save their input.
        """
        if recompute == "full":
            return _checkpoint(self.forward, x_BND, condition, attention)
        if recompute == "attention":
            return self._keep_attention(x_BND, condition, attention)
        around = _checkpoint if recompute == "selective" else _call
        between = _call if recompute == "off" else _checkpoint
        grouped = isinstance(attention, GroupedAttention)
        qkv_GBN3Hd = around(self._before_attention, x_BND, condition, attention.head_groups if grouped else 1)
        if grouped:
            o_BNHd = attention.grouped(qkv_GBN3Hd)
        else:
            o_BNHd = attend_packed(attention, qkv_GBN3Hd.squeeze(0), x_BND.shape[1])
        x_BND = between(self._after_attention, x_BND, o_BNHd, condition)
        return around(self._feed_forward, x_BND, condition)

    def _keep_attention(self, x_BND: Tensor, condition: Condition, attention: KeptAttention) -> Tensor:
        """Runs the block, of which the backward pass runs all but the attention again."""
        if not torch.is_grad_enabled():
            return self(x_BND, condition, attention)
        kept = Kept(x_BND, self.keep, self.keep_input)
        del x_BND  # `kept` may have it elsewhere until it is needed again
        keeping = attention.keeping(kept)
        return _checkpoint(lambda condition: self.forward(kept.input(), condition, keeping), condition)

    def compile_segments(self) -> None:
        """Compiles the part around cross-attention with torch.compile; the rest is fused by hand.

        Blocks of one size share the compiled code. Each shape is compiled once, for itself: a bucket's shapes are
        static, and there are few buckets.
        """
        self._after_attention = torch.compile(self._after_attention, dynamic=False)

    def _before_attention(self, x_BND: Tensor, condition: Condition, groups: int) -> Tensor:
        """Returns q, k and v, [G, B, N, 3, H/G, 72]."""
        shift, scale, *_ = self._rows(condition)
        modulation = Modulation(shift, scale, condition.clean_BN)
        return self.attn.project(x_BND, modulation, condition.cos, condition.sin, groups)

    def queries_keys(self, x_BND: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Returns q and k of self-attention, normalised and rotated, [B, N, H, 72] each, of what the block is given.

        Each token's depend on that token alone, so that x and condition may be those of some tokens.
        """
        q_BNHd, k_BNHd, _ = self._before_attention(x_BND, condition, 1).squeeze(0).unbind(2)
        return q_BNHd, k_BNHd

    def _after_attention(self, x_BND: Tensor, o: Tensor, condition: Condition) -> Tensor:
        """Adds self-attention's projected o [B, N, H, 72], then cross-attention, to x."""
        _, _, gate, *_ = self._rows(condition)
        attended_BND, bias_D = _unbiased(self.attn.proj, rearrange(o, "b n head d -> b n (head d)"))
        x_BND = gated_residual(x_BND, attended_BND, bias_D, gate, condition.clean_BN)
        return x_BND + self.cross_attn(x_BND, self.cross_attn_norm, condition.text_BLD, condition.text_mask_BL)

    def _feed_forward(self, x_BND: Tensor, condition: Condition) -> Tensor:
        """Adds the feed-forward layer's output to x."""
        _, _, _, shift, scale, gate = self._rows(condition)
        fed_BND, bias_D = self.mlp(x_BND, Modulation(shift, scale, condition.clean_BN))
        return gated_residual(x_BND, fed_BND, bias_D, gate, condition.clean_BN)

    def _rows(self, condition: Condition) -> tuple[Tensor, ...]:
        """Returns shift, scale, gate of attention, then of the feed-forward layer, each [B, 2, D], a row a class."""
        rows = condition.modulation_BKD + self.scale_shift_table.flatten()
        return rows.chunk(6, dim=-1)


class FinalLayer(nn.Module):
    """Maps tokens back to patches by a modulated LayerNorm and a linear: [B, N, D] → [B, N, 2·2·48] fp32.

    The values of a patch are in (row, column, channel) order.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, 4 * 2 * config.in_channels)

    def forward(self, x_BND: Tensor, condition: Condition) -> Tensor:
        shift_BKD, scale_BKD = (row + condition.time_BKD for row in self.scale_shift_table)
        return self.linear(modulate(x_BND, shift_BKD, scale_BKD, condition.clean_BN)).float()


def _call(function, *args):
    return function(*args)


def _checkpoint(function, *args):
    # Nothing in a block draws random numbers, so there is no generator state to keep.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
