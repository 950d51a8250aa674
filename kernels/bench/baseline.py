"""The DiT block as the published code computes it, written plainly, for `block.py` to measure ours against.

The rotary embedding is complex, both modulations of every token are computed in full and then selected, and attention
is FlashAttention-2 or cuDNN through PyTorch's SDPA. The parameters are those of `mugv_ds.models.layers.Block`.

Shape suffixes: B batch, N tokens, L text tokens, D hidden size, H heads, d = 72 head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mugv_ds.models.layers import Block, Condition, Mlp

HEAD_DIM = 72


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Computes RMSNorm over the last dimension in fp32."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-6)
    return weight * y.to(x.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Multiplies x [B, H, N, 72], as complex pairs, by the rotation [B, 1, N, 36]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scales and shifts x [B, N, D] by rows that broadcast to it."""
    return x * (1 + scale) + shift


class PublishedBlock(nn.Module):
    """Computes the published block with the parameters of ours; `backend` computes self-attention."""

    def __init__(self, block: Block, backend: SDPBackend) -> None:
        super().__init__()
        self.block, self.backend = block, backend

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """Runs the block: [B, N, D] → [B, N, D]."""
        block, batch = self.block, x.shape[0]
        noised, clean = (
            (block.scale_shift_table[None] + condition.modulation_BKD[:, k].reshape(batch, 6, -1)).chunk(6, dim=1)
            for k in range(2)
        )
        mask = condition.clean_BN[..., None]

        def select(half: int, function) -> Tensor:
            """Applies `function` to shift, scale and gate of both classes, and takes each token's class of the two."""
            return torch.where(mask, function(*clean[half : half + 3]), function(*noised[half : half + 3]))

        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        attended = self.attend(select(0, lambda shift, scale, _: modulated(normed, shift, scale)), condition)
        x = x + select(0, lambda _shift, _scale, gate: gate * attended)
        x = x + self.cross(block.cross_attn_norm(x), condition)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        fed = Mlp.forward(block.mlp, select(3, lambda shift, scale, _: modulated(normed, shift, scale)))
        return x + select(3, lambda _shift, _scale, gate: gate * fed)

    def attend(self, x: Tensor, condition: Condition) -> Tensor:
        """Computes self-attention with its projections, [B, N, D] → [B, N, D]."""
        attention, (batch, tokens, width) = self.block.attn, x.shape
        qkv = attention.qkv(x).view(batch, tokens, 3, -1, HEAD_DIM).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        rotation = torch.complex(condition.cos, condition.sin)[:, None]
        q = rotate(rms_norm(q, attention.q_norm.weight), rotation)
        k = rotate(rms_norm(k, attention.k_norm.weight), rotation)
        with sdpa_kernel(self.backend):
            o = F.scaled_dot_product_attention(q, k, v)
        return attention.proj(o.transpose(1, 2).reshape(batch, tokens, width))

    def cross(self, x: Tensor, condition: Condition) -> Tensor:
        """Computes cross-attention with its projections, [B, N, D] → [B, N, D]."""
        cross, (batch, tokens, width) = self.block.cross_attn, x.shape
        q = cross.q_linear(x).view(batch, tokens, -1, HEAD_DIM).transpose(1, 2)
        k, v = (
            cross.kv_linear(condition.text_BLD).view(batch, -1, 2, width // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)
        )
        q, k = rms_norm(q, cross.q_norm.weight), rms_norm(k, cross.k_norm.weight)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=condition.text_mask_BL[:, None, None, :])
        return cross.proj(o.transpose(1, 2).reshape(batch, tokens, width))
