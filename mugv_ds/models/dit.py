"""The MUG-DiT: embedders, blocks and final layer, with the names and the arithmetic of the published 10B weights.

It knows no parallelism: a caller that holds some of the tokens says which (`Embedders.embed`), and hands the blocks the
attention over all of them.

Shape suffixes: B batch, C latent channels, T latent frames, H and W latent height and width, h and w the same in
patches of 2×2, P = 4 pixels of a patch, N tokens held, L text tokens, D hidden size, F = T + 2 time positions (start
token, frames, end token), K = 2 token classes (0 noised, 1 clean).
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mugv_ds.config.model import DiTConfig
from mugv_ds.models.attention import Attention, sdpa
from mugv_ds.models.layers import Block, CaptionEmbedder, Condition, FinalLayer, ScalarEmbedder
from mugv_ds.models.matrices import initial_multiplier
from mugv_ds.models.reuse import HeldText, RunBlocks, run_blocks
from mugv_ds.models.rope import Grid, Positions, patch_grid, positions, rotary_angles

DEFAULT_FPS = 30.0


def patchify(latent: Tensor) -> Tensor:
    """Cuts a latent into patches: [B, C, T, H, W] → [B, T·h·w, C·2·2], in (t, h, w) order.

    An odd side is padded with zeros on the high end.
    """
    height, width = latent.shape[-2:]
    padded = F.pad(latent, (0, width % 2, 0, height % 2))
    return rearrange(padded, "b c t (h p) (w q) -> b (t h w) (c p q)", p=2, q=2)


def patch_pixels(latent: Tensor) -> Tensor:
    """Cuts a latent into patches in the layout of the final layer's output: [B, C, T, H, W] → [B, T·h·w, 2·2, C].

    Odd sides are padded as in `patchify`.
    """
    return rearrange(patchify(latent), "b n (c pixel) -> b n pixel c", pixel=4)


def unpatchify(patches: Tensor, grid: Grid, height: int, width: int) -> Tensor:
    """Puts patches together: [B, T·h·w, 2·2·C], each in (row, column, channel) order, → [B, C, T, height, width]."""
    t, h, w = grid
    latent = rearrange(patches, "b (t h w) (p q c) -> b c t (h p) (w q)", t=t, h=h, w=w, p=2, q=2)
    return latent[..., :height, :width]


def describe_tokens(position: Positions, x_mask_BT: Tensor, frame_index_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what a block must know of the tokens at these positions beside their values.

    Args:
        position: of the tokens held.
        x_mask_BT: bool, False for frames given clean.
        frame_index_BF: time positions, see `DiT.forward`.
    Returns:
        clean_BN: bool, True for the tokens of frames given clean, and for the start and the end token.
        cos, sin: [B, N, 36] fp32, see `rotary_angles`.
    """
    noised_BF = F.pad(x_mask_BT, (1, 1), value=False)
    cos, sin = rotary_angles(position, frame_index_BF)
    return ~noised_BF[:, position.frame_N], cos, sin


class Embedders(nn.Module):
    """Everything before the blocks, as a module of its own so that it can be the first layer of a pipeline."""

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
        """Embeds the tokens `token_N` of the sequence, and the condition of the blocks.

        Every parameter takes part whatever tokens are asked for, so that all ranks that share a sequence have all
        gradients.

        Args:
            token_N: indices into the sequence, see `models.rope`. The other arguments are those of `DiT.forward`.
        Returns:
            The tokens [B, N, D], and the `Condition`.
        """
        grid = patch_grid(*x.shape[2:])
        position = positions(token_N, grid)
        tokens_BND = self._embed_tokens(patchify(x)[:, position.patch_N], token_N[:, None], grid)
        fps_BD = self.fps_embedder(fps)
        time_BKD = torch.stack([self.t_embedder(t) + fps_BD for t in (timestep, torch.zeros_like(timestep))], dim=1)
        clean_BN, cos, sin = describe_tokens(position, x_mask, frame_index)
        text_BLD = self.y_embedder(text)
        return tokens_BND, Condition(self.t_block(time_BKD), time_BKD, text_BLD, text_mask, clean_BN, cos, sin)

    def _embed_tokens(self, patch_BNC: Tensor, token_N1: Tensor, grid: Grid) -> Tensor:
        """Embeds patches [B, N, C·2·2], then puts in the learned start and end token, and zeros for padding.

        The convolution is a linear map of each patch, as its kernel is its stride.
        """
        proj = self.x_embedder["proj"]
        tokens_BND = F.linear(patch_BNC.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        tokens_BND = torch.where(token_N1 == 0, self.start_token, tokens_BND)
        tokens_BND = torch.where(token_N1 == grid.tokens - 1, self.end_token, tokens_BND)
        return tokens_BND.masked_fill(token_N1 >= grid.tokens, 0)


class DiT(Embedders):
    """The diffusion transformer as one module; `load_state_dict(strict=True)` takes the published weights.

    Attributes:
        run_blocks, held_text: what a sampler may reuse from call to call, see `models.reuse`; by default nothing.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.run_blocks: RunBlocks = run_blocks
        self.held_text: HeldText | None = None

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
            timestep: [B] in [0, 1000], where 1000 is pure noise.
            text: [B, L, caption channels], the caption's features.
            text_mask: [B, L], 0 or False for padding; None where there is none.
            x_mask: bool [B, T], False for frames given clean; None where all are noised.
            fps: [B], frames a second of the video; None for 30.
            frame_index: int [B, T+2], time positions of start token, frames and end token; None for 0 … T+1.
            attention: self-attention over (q, k, v), each [B, N, H, 72].
            recompute: see `Block.forward`.
        Returns:
            [B, 48, T, H, W] fp32; channels 0–23 are the velocity x0 − ε, the rest is unused.
        Raises:
            ValueError: H or W is beyond the reach of the position tables.
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
        tokens_BND, condition = self.embed(x, timestep, text, text_mask.bool(), x_mask, fps, frame_index, token_N)
        if self.held_text is not None:
            self.held_text.use(condition.text_BLD)
        tokens_BND = self.run_blocks(self.blocks, tokens_BND, condition, attention, recompute)
        patches = self.final_layer(tokens_BND, condition)[:, 1:-1]  # [B, T·h·w, 2·2·48], without start and end token
        return unpatchify(patches, grid, height, width)


def keyed_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator keyed by (seed, name): what it draws depends neither on earlier draws nor on the rank."""
    key = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key) >> 1)


@torch.no_grad()
def init_weights(module: nn.Module, prefix: str, seed: int, widths: tuple[int, int] | None = None) -> None:
    """Draws the initial weights in place, each from a generator keyed by (seed, full name).

    They are therefore equal however the model is split up. They are drawn in fp32 and rounded to the parameter's dtype,
    since generators draw other numbers, of another spread, in bf16. The blocks' linears are Xavier-uniform, embedders
    N(0, 0.02²), tables N(0, 1/D), and the last projection of cross-attention and of the model zero, as in PixArt-α
    (Chen et al. 2023, released code). The published source does not give its own. Of an adapter A is Kaiming-uniform
    and B zero, as in the released code of Hu et al. 2021 and in peft.

    Args:
        module: a DiT or a part of one, on the device where it will live.
        prefix: what precedes the module's parameter names in a DiT, such as "blocks.3.".
        widths: D, and the width R that the rate was tuned at: the spread follows the rule of `models.matrices`. None:
            it is as above.
    """
    for local, parameter in module.named_parameters():
        name = prefix + local
        drawn = _initial(name, torch.empty_like(parameter, dtype=torch.float32), seed)
        if widths is not None:
            drawn *= initial_multiplier(name, *widths, columns=math.prod(parameter.shape[1:]))
        parameter.copy_(drawn)


def _initial(name: str, weight: Tensor, seed: int) -> Tensor:
    """Fills `weight`, fp32, with the initial values of the parameter of this full name, and returns it."""
    generator = keyed_generator(seed, name, weight.device)
    if name.endswith("scale_shift_table"):
        return weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    if name.endswith("lora_A.weight"):
        return nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if name.endswith("lora_B.weight"):
        return weight.zero_()
    if "norm" in name:
        return weight.fill_(0.0 if name.endswith("bias") else 1.0)
    if name.endswith(("bias", "cross_attn.proj.weight")) or name == "final_layer.linear.weight":
        return weight.zero_()
    if name.startswith("blocks.") or name == "x_embedder.proj.weight":
        nn.init.xavier_uniform_(weight.flatten(1), generator=generator)
        return weight
    return weight.normal_(std=0.02, generator=generator)
