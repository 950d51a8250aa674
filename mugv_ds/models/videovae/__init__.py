"""The VideoVAE, and a check of the device that it is to run on."""

from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.models.videovae.device import check_conv3d
from mugv_ds.models.videovae.vae import UNUSED_PARAMETERS, VideoVAE, chunk_units, window_units

__all__ = [
    "UNUSED_PARAMETERS",
    "VideoVAE",
    "VideoVAEConfig",
    "check_conv3d",
    "chunk_units",
    "window_units",
]
