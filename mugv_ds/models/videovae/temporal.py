"""The temporal half of the VideoVAE: eight frames' features to one latent frame, and some latents to their frames.

Source: [C] of the specification, §1.2–1.4. Nothing is causal, and norms take their statistics over time and space of
all that they are given: one chunk of eight frames, or one window of latents.

Shape suffixes: B chunks or windows, D feature channels, C = 24 latent channels, F frames, T latent frames, c any
channels, t any frames, h and w latent height and width.
"""

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.videovae import VideoVAEConfig

_EPS = 1e-5
_UPSAMPLED = 2  # frames that one frame becomes in each of the decoder's three steps


class Conv3d(nn.Module):
    """A 3D convolution that keeps height and width.

    In time a kernel of 3 pads a zero on both sides; with a stride of 2 it pads one behind and none in front.
    """

    def __init__(self, width_in: int, width_out: int, kernel: int, *, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        side = kernel // 2
        self._pad_behind = time_stride > 1
        padding = (0 if self._pad_behind else side, side, side)
        self.conv = nn.Conv3d(width_in, width_out, kernel, (time_stride, 1, 1), padding, bias=bias)

    def forward(self, x_Bcthw: Tensor) -> Tensor:
        return self.conv(F.pad(x_Bcthw, (0, 0, 0, 0, 0, 1)) if self._pad_behind else x_Bcthw)


class ResBlock(nn.Module):
    """Adds to x: norm, SiLU, convolution, twice. `conv3` maps x where the width changes."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, _EPS)
        self.conv1 = Conv3d(width_in, width_out, 3, bias=False)
        self.norm2 = nn.GroupNorm(groups, width_out, _EPS)
        self.conv2 = Conv3d(width_out, width_out, 3, bias=False)
        self.conv3 = Conv3d(width_in, width_out, 1, bias=False) if width_in != width_out else nn.Identity()

    def forward(self, x_Bcthw: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x_Bcthw)))
        return self.conv2(F.silu(self.norm2(hidden))) + self.conv3(x_Bcthw)


def _res_blocks(width_in: int, width_out: int, config: VideoVAEConfig) -> nn.Sequential:
    """The residual blocks of a level, of which the first changes the width."""
    widths = [width_in, *[width_out] * config.temporal_res_blocks]
    return nn.Sequential(*(ResBlock(*pair, config.temporal_norm_groups) for pair in pairwise(widths)))


def _widths(config: VideoVAEConfig) -> tuple[int, ...]:
    """Widths of the four levels, the one next to the features first."""
    return tuple(config.temporal_filters * factor for factor in (1, 2, 2, 4))


class TemporalEncoder(nn.Module):
    """Encodes the features of eight frames as one frame of 48 channels."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        widths = _widths(config)
        self.conv_in = Conv3d(config.block_out_channels[-1], widths[0], 3, bias=False)
        self.block_res_blocks = nn.ModuleList(_res_blocks(*pair, config) for pair in pairwise((widths[0], *widths)))
        self.conv_blocks = nn.ModuleList(Conv3d(width, width, 3, time_stride=2) for width in widths[:-1])
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config)
        self.norm1 = nn.GroupNorm(config.temporal_norm_groups, widths[-1], _EPS)
        self.conv2 = Conv3d(widths[-1], 2 * LATENT_CHANNELS, 1)

    def forward(self, feature_BDFhw: Tensor) -> Tensor:
        """Returns [B, 2·C, F/8, h, w]."""
        x = self.conv_in(feature_BDFhw)
        for blocks, halve in zip(self.block_res_blocks, [*self.conv_blocks, nn.Identity()], strict=True):
            x = halve(blocks(x))
        return self.conv2(F.silu(self.norm1(self.res_blocks(x))))


class TemporalDecoder(nn.Module):
    """Decodes a window of latent frames to the features of eight times as many frames.

    Levels are run from the last to the first. After the last two the width doubles, and channels become frames.
    """

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        widths, groups = _widths(config), config.temporal_norm_groups
        self.conv1 = Conv3d(LATENT_CHANNELS, widths[-1], 3)
        self.res_blocks = _res_blocks(widths[-1], widths[-1], config)
        self.upsample_block = ResBlock(widths[-1], widths[-1], groups)
        # Level i goes from the width of level i + 1, to which the step before it has come, to its own.
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(*pair, config) for pair in zip((*widths[1:], widths[-1]), widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            [nn.Identity(), *(Conv3d(width, _UPSAMPLED * width, 3) for width in (widths[1], widths[3]))]
        )
        self.norm1 = nn.GroupNorm(groups, widths[0], _EPS)
        self.conv_out = Conv3d(widths[0], config.block_out_channels[-1], 3)

    def forward(self, latent_BCThw: Tensor) -> Tensor:
        """Returns [B, D, 8T, h, w]."""
        x = self.res_blocks(self.conv1(latent_BCThw))
        x = self.block_res_blocks[3](self.upsample_block(x.repeat_interleave(_UPSAMPLED, dim=2)))
        x = self.block_res_blocks[2](_channels_to_frames(self.conv_blocks[2](x)))
        x = self.block_res_blocks[1](_channels_to_frames(self.conv_blocks[1](x)))
        x = self.block_res_blocks[0](self.conv_blocks[0](x))
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """The temporal encoder and decoder, each with a 1×1×1 convolution at the latent's side."""

    def __init__(self, config: VideoVAEConfig) -> None:
        super().__init__()
        self.encoder = TemporalEncoder(config)
        self.quant_conv = Conv3d(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.post_quant_conv = Conv3d(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self.decoder = TemporalDecoder(config)

    def encode(self, feature_BDFhw: Tensor) -> Tensor:
        """Returns mean and log-variance [B, 2·C, F/8, h, w] of features, the mean first."""
        return self.quant_conv(self.encoder(feature_BDFhw))

    def decode(self, latent_BCThw: Tensor) -> Tensor:
        """Returns features [B, D, 8T, h, w] of latents that are not normalised."""
        return self.decoder(self.post_quant_conv(latent_BCThw))


def _channels_to_frames(x_Bcthw: Tensor) -> Tensor:
    """Cuts each frame's channels into two frames: channel 2·i + s of frame t is channel i of frame 2·t + s."""
    return rearrange(x_Bcthw, "b (c s) t h w -> b c (t s) h w", s=_UPSAMPLED)
