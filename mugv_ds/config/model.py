"""Sizes of the diffusion transformer: `DiTConfig`, the published presets, and the latent's constants."""

from dataclasses import dataclass, fields

from mugv_ds.config.errors import ConfigError

HEAD_DIM = 72
LATENT_CHANNELS = 24
LATENT_STRIDE = 8  # pixels along height and width, and frames along time, that one latent element covers
MAX_LATENT_SIDE = 768  # latent elements along height or width that the published position tables reach to

_MAX_DEPTH, _MAX_WIDTH = 1 << 10, 1 << 20


@dataclass(frozen=True)
class DiTConfig:
    """The sizes of one MUG-DiT. `hidden_size` is always `num_heads` × 72.

    Args:
        hidden_size: D, the width of a token.
        num_heads: attention heads, each 72 wide.
        depth: number of blocks.
        caption_channels: width of the text features (4096 for T5-XXL).
        in_channels: latent channels; the output has twice as many, of which the first half is the velocity.
        mlp_ratio: inner width of the feed-forward layer over `hidden_size`.

    Raises:
        ConfigError: a size is not positive or beyond any use, or `hidden_size` is not `num_heads` × 72.
    """

    hidden_size: int
    num_heads: int
    depth: int
    caption_channels: int = 4096
    in_channels: int = LATENT_CHANNELS
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            size, most = getattr(self, field.name), _MAX_DEPTH if field.name == "depth" else _MAX_WIDTH
            if type(size) is not int or size < 1:
                raise ConfigError(f"model.{field.name} = {size!r}: must be at least 1, and whole")
            if size > most:
                raise ConfigError(f"model.{field.name} = {size}: must be at most {most:,}")
        if self.hidden_size != self.num_heads * HEAD_DIM:
            raise ConfigError(
                f"model.hidden_size = {self.hidden_size}: must be num_heads × {HEAD_DIM} = {self.num_heads * HEAD_DIM}"
            )


# The widths are those of the published checkpoints and their converter; mugdit_debug is ours.
PRESETS = {
    "mugdit_debug": DiTConfig(288, 4, 2),
    "mugdit_1b": DiTConfig(1152, 16, 56),
    "mugdit_2b": DiTConfig(1728, 24, 56),
    "mugdit_4b": DiTConfig(2304, 32, 56),
    "mugdit_10b": DiTConfig(3456, 48, 56),
    "mugdit_18b": DiTConfig(4608, 64, 56),
}
