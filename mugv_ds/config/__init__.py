"""Configuration: the schema, its loading, and what is checked before anything is allocated."""

from mugv_ds.config.load import load_config
from mugv_ds.config.model import PRESETS, ConfigError, DiTConfig
from mugv_ds.config.schema import TrainConfig

__all__ = ["PRESETS", "ConfigError", "DiTConfig", "TrainConfig", "load_config"]
