"""The diffusion transformer, its text encoders and its video codecs. Nothing here knows of ranks or processes."""

from mugv_ds.config.model import PRESETS, DiTConfig
from mugv_ds.models.dit import DiT

mugdit_debug = PRESETS["mugdit_debug"]
mugdit_2b = PRESETS["mugdit_2b"]
mugdit_10b = PRESETS["mugdit_10b"]

__all__ = ["PRESETS", "DiT", "DiTConfig", "mugdit_2b", "mugdit_10b", "mugdit_debug"]
