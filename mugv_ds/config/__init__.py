"""Configuration: the schema, its loading, and what is checked before anything is allocated."""

from mugv_ds.config.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    PeerError,
    Status,
    Stopped,
    TrainingError,
    exit_status,
)
from mugv_ds.config.load import load_config
from mugv_ds.config.model import PRESETS, DiTConfig
from mugv_ds.config.schema import TrainConfig

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConfigError",
    "DiTConfig",
    "InputError",
    "PeerError",
    "Status",
    "Stopped",
    "TrainConfig",
    "TrainingError",
    "exit_status",
    "load_config",
]
