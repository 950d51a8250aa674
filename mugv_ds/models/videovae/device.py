"""A check that the device computes the VideoVAE's bf16 convolutions right, for before a long job.

cuDNN 9.8 to 9.10 gives wrong results for some large ones (pytorch#163539).

Shape suffixes: D channels, F frames, h and w latent height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_STRIDE
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.models.videovae.vae import WINDOW

_TOLERANCE = 0.01  # of the norm; rounding the result to bf16 costs 0.0017


def check_conv3d(
    device: torch.device | str, *, height: int = 720, width: int = 1280, config: VideoVAEConfig | None = None
) -> float:
    """Compares the bf16 convolutions with the largest inputs with fp32 on this device, and returns the larger error.

    They are the first of encoding a chunk, one with stride 2, and the last of decoding a window. It takes about a
    second and 3 GiB on a GPU at 720p, and minutes on a CPU.

    Args:
        device: where the VideoVAE is to run in bf16.
        height, width: of the video, in pixels: the fault depends on the size.
        config: the VideoVAE's sizes.

    Raises:
        InputError: they differ by more than rounding. The message says what to do.
    """
    config = config or VideoVAEConfig()
    features, filters = config.block_out_channels[-1], config.temporal_filters
    h, w = height // LATENT_STRIDE, width // LATENT_STRIDE
    generator = torch.Generator(device).manual_seed(0)
    errors = []
    for channels, frames, width_out, stride in (
        (features, LATENT_STRIDE, filters, 1),
        (filters, LATENT_STRIDE, filters, 2),
        (filters, WINDOW * LATENT_STRIDE, features, 1),
    ):
        x_1DFhw = torch.randn(1, channels, frames, h, w, generator=generator, device=device).bfloat16()
        weight = torch.randn(width_out, channels, 3, 3, 3, generator=generator, device=device).bfloat16()
        errors.append(_error(x_1DFhw, weight / (27 * channels) ** 0.5, stride))
    if not all(error <= _TOLERANCE for error in errors):
        shown = ", ".join(f"{error:.2g}" for error in errors)
        raise InputError(
            f"conv3d in bf16 is wrong on {device}: {shown} off, rounding is {_TOLERANCE:g} at most (torch "
            f"{torch.__version__}, cuDNN {torch.backends.cudnn.version()}). cuDNN 9.8 to 9.10 has this fault: install "
            "9.15 or later (pip install 'nvidia-cudnn-cu12>=9.15'), or run the VideoVAE in float32"
        )
    return max(errors)


def _error(x_1DFhw: Tensor, weight: Tensor, stride: int) -> float:
    """Returns ‖bf16 − fp32‖ / ‖fp32‖ of a convolution of the same numbers."""
    strides = (stride, 1, 1)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        rounded = F.conv3d(x_1DFhw, weight, stride=strides, padding=1).float()
        exact = F.conv3d(x_1DFhw.float(), weight.float(), stride=strides, padding=1)
        return float((rounded - exact).norm() / exact.norm())
