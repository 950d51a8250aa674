"""MUG-DiT: embedders, blocks, final layer; names and arithmetic of the published 10B weights.

Shape suffixes: B batch, T latent frames, N tokens held, L text tokens, C text width, D hidden size, F = T + 2.
"""

import hashlib

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mugv_ds.config.model import DiTConfig
from mugv_ds.models.attention import Attention, sdpa
from mugv_ds.models.layers import Block, CaptionEmbedder, Condition, FinalLayer, ScalarEmbedder
from mugv_ds.models.rope import Grid, Positions, patch_grid, positions, rotary_angles

DEFAULT_FPS = 30.0


def patchify(latent: Tensor) -> Tensor:
    """[B, C, T, H, W] → [B, T·h·w, C·2·2] in (t, h, w) order, an odd side padded with zeros on the high end."""
    height, width = latent.shape[-2:]
    padded = F.pad(latent, (0, width % 2, 0, height % 2))
    return rearrange(padded, "b c t (h p) (w q) -> b (t h w) (c p q)", p=2, q=2)


def patch_pixels(latent: Tensor) -> Tensor:
    """[B, C, T, H, W] → [B, T·h·w, 2·2, C]: the layout of the final layer's output; odd sides as in `patchify`."""
    return rearrange(patchify(latent), "b n (c pixel) -> b n pixel c", pixel=4)


def unpatchify(patches: Tensor, grid: Grid, height: int, width: int) -> Tensor:
    """[B, T·h·w, 2·2·C], each patch laid out (row, column, channel) → [B, C, T, height, width]."""
    t, h, w = grid
    latent = rearrange(patches, "b (t h w) (p q c) -> b c t (h p) (w q)", t=t, h=h, w=w, p=2, q=2)
    return latent[..., :height, :width]


def describe_tokens(position: Positions, x_mask_BT: Tensor, frame_index_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(clean_BN, cos, sin) of the tokens at these positions: everything a block must know of them but their values.

    Clean are the tokens of frames with `x_mask_BT` False, and the start and the end token.
    """
    noised_BF = F.pad(x_mask_BT, (1, 1), value=False)
    cos, sin = rotary_angles(position, frame_index_BF)
    return ~noised_BF[:, position.frame_N], cos, sin


class Embedders(nn.Module):
    """What comes before the blocks. It is its own module so that it can be a pipeline's first layer."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.start_token = nn.Parameter(torch.zeros(width))
        self.end_token = nn.Parameter(torch.zeros(width))
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(config.in_channels, width, (1, 2, 2), (1, 2, 2))})
        self.t_embedder = ScalarEmbedder(width)
        self.fps_embedder = ScalarEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config.caption_channels, width)

    def embed(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        x_mask: Tensor,
        fps: Tensor,
        frame_index: Tensor,
        token_N: Tensor,
    ) -> tuple[Tensor, Condition]:
        """The tokens `token_N` of the sequence, [B, N, D], and the condition of the blocks; arguments as `DiT.forward`.

        Every parameter takes part whatever tokens are asked for, so that all holders of a sequence have all gradients.
        """
        grid = patch_grid(*x.shape[2:])
        position = positions(token_N, grid)
        tokens = self._embed_tokens(patchify(x)[:, position.patch_N], token_N[:, None], grid)
        fps_BD = self.fps_embedder(fps)
        time_BKD = torch.stack([self.t_embedder(t) + fps_BD for t in (timestep, torch.zeros_like(timestep))], dim=1)
        clean_BN, cos, sin = describe_tokens(position, x_mask, frame_index)
        return tokens, Condition(self.t_block(time_BKD), time_BKD, self.y_embedder(text), text_mask, clean_BN, cos, sin)

    def _embed_tokens(self, patch_BNC: Tensor, token_N1: Tensor, grid: Grid) -> Tensor:
        """Patches through the convolution (a linear map of each: kernel = stride), then the learned tokens put in."""
        proj = self.x_embedder["proj"]
        tokens = F.linear(patch_BNC.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        tokens = torch.where(token_N1 == 0, self.start_token, tokens)
        tokens = torch.where(token_N1 == grid.tokens - 1, self.end_token, tokens)
        return tokens.masked_fill(token_N1 >= grid.tokens, 0)


class DiT(Embedders):
    """The diffusion transformer. `load_state_dict(strict=True)` takes the published weights."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Tensor | None = None,
        frame_index: Tensor | None = None,
        *,
        attention: Attention = sdpa,
        recompute: str = "off",
    ) -> Tensor:
        """Predicts the velocity of every latent frame.

        Args:
            x: [B, 24, T, H, W] latent.
            timestep: [B] in [0, 1000], 1000 is pure noise.
            text: [B, L, C] caption features.
            text_mask: [B, L], 0 or False for padding. None: no padding.
            x_mask: bool [B, T], False for frames given clean. None: all noised.
            fps: [B] frames a second of the video. None: 30.
            frame_index: int [B, T+2] time positions of start token, frames and end token. None: 0…T+1.
            attention: self-attention over (q, k, v), each [B, N, heads, 72].
            recompute: see `Block.forward`.
        Returns:
            [B, 48, T, H, W] fp32; channels 0–23 are the velocity x0 − ε, the rest is unused.
        Raises:
            ValueError: H or W beyond the reach of the position tables.
        """
        (batch, _, frames, height, width), device = x.shape, x.device
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
        if x_mask is None:
            x_mask = torch.ones(batch, frames, dtype=torch.bool, device=device)
        if fps is None:
            fps = torch.full((batch,), DEFAULT_FPS, device=device)
        if frame_index is None:
            frame_index = torch.arange(frames + 2, device=device).expand(batch, -1)
        grid = patch_grid(frames, height, width)
        token_N = torch.arange(grid.tokens, device=device)
        tokens, condition = self.embed(x, timestep, text, text_mask.bool(), x_mask, fps, frame_index, token_N)
        for block in self.blocks:
            tokens = block(tokens, condition, attention, recompute)
        patches = self.final_layer(tokens, condition)[:, 1:-1]
        return unpatchify(patches, grid, height, width)


def keyed_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator keyed by (seed, name): what it gives does not depend on what was drawn before, or where."""
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key) >> 1)


@torch.no_grad()
def init_weights(module: nn.Module, prefix: str, seed: int) -> None:
    """Initial weights, each drawn from a generator keyed by (seed, full name): equal however the model is split up.

    Linears are Xavier-uniform, embedders N(0, 0.02²), tables N(0, 1/D), and the last projection of cross-attention and
    of the model zero, as in PixArt-α (Chen et al. 2023, released code). The published source does not give its own.

    Args:
        module: a DiT or a part of one, on the device where it will live.
        prefix: what precedes the module's parameter names in a DiT, such as "blocks.3.".
    """
    for local, parameter in module.named_parameters():
        name = prefix + local
        generator = keyed_generator(seed, name, parameter.device)
        if name.endswith("scale_shift_table"):
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        elif "norm" in name:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif name.endswith(("bias", "cross_attn.proj.weight")) or name == "final_layer.linear.weight":
            parameter.zero_()
        elif name.startswith("blocks.") or name == "x_embedder.proj.weight":
            nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
        else:
            parameter.normal_(std=0.02, generator=generator)
