"""Sizes of the VideoVAE: `VideoVAEConfig`, whose defaults are the published ones."""

from dataclasses import asdict, dataclass

from mugv_ds.config.errors import ConfigError

_MAX_BLOCKS, _MAX_WIDTH = 64, 1 << 16


@dataclass(frozen=True)
class VideoVAEConfig:
    """The sizes of one VideoVAE. The first three have the names and meanings of diffusers' `AutoencoderKL`.

    Args:
        block_out_channels: widths of the spatial half's four levels; there are three halvings of height and width.
        layers_per_block: residual blocks of a level of the spatial encoder; those of the decoder have one more.
        norm_num_groups: groups of the spatial half's norms.
        temporal_filters: width of the temporal half's first level; the others have two, two and four times as much.
        temporal_res_blocks: residual blocks of a level of the temporal half.
        temporal_norm_groups: groups of the temporal half's norms.

    Raises:
        ConfigError: a size is not positive or beyond any use, there are not four levels, or a width is no multiple of
            its groups.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    temporal_filters: int = 128
    temporal_res_blocks: int = 4
    temporal_norm_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))  # which JSON has as a list
        if len(self.block_out_channels) != 4:
            raise ConfigError(f"block_out_channels = {self.block_out_channels}: must be four widths")
        for name, value in asdict(self).items():
            most = _MAX_BLOCKS if name in ("layers_per_block", "temporal_res_blocks") else _MAX_WIDTH
            sizes = value if name == "block_out_channels" else (value,)
            if not all(type(size) is int and 1 <= size <= most for size in sizes):
                raise ConfigError(f"{name} = {value}: must be at least 1, whole, and at most {most:,}")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise ConfigError(
                f"block_out_channels = {self.block_out_channels}: must be multiples of norm_num_groups = "
                f"{self.norm_num_groups}"
            )
        if self.temporal_filters % self.temporal_norm_groups:
            raise ConfigError(
                f"temporal_filters = {self.temporal_filters}: must be a multiple of temporal_norm_groups = "
                f"{self.temporal_norm_groups}"
            )
