"""The VideoVAE's weights: `vae.pt` as it is published, or the same tensors as safetensors."""

import json
from pathlib import Path

import torch

from mugv_ds.config.errors import CheckpointError, ConfigError, InputError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.weights.base import check_state
from mugv_ds.weights.published import PublishedWeights
from mugv_ds.weights.save import CONFIG_NAME

_BUFFERS = ("shift", "scale")
_MAX_CONFIG_BYTES = 1 << 20


def load_video_vae(
    path: str | Path,
    config: VideoVAEConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VideoVAE:
    """Returns the VideoVAE of a file, in eval mode and frozen.

    `shift` and `scale` are those of the file, and stay in fp32 whatever the dtype.

    Args:
        path: see `PublishedWeights`.
        config: its sizes, by default those of `read_sizes`.
        dtype: of the parameters, float32 or bfloat16, whatever they have in the file.
        device: where to.

    Raises:
        CheckpointError: the file is missing, cannot be read, or does not hold exactly the tensors of a VideoVAE of
            these sizes. InputError: the dtype is another.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"the VideoVAE in {dtype}: must be float32 or bfloat16, others overflow")
    with torch.device("meta"):
        vae = VideoVAE(config or read_sizes(path))
    weights = PublishedWeights(path)
    buffers = _checked_buffers(weights, vae)
    state = {name: value.to(device, dtype) for name, value in weights.items()}
    state |= {name: value.to(device) for name, value in buffers.items()}
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.eval().requires_grad_(False)


def check_video_vae(path: str | Path) -> VideoVAEConfig:
    """Returns the sizes of the VideoVAE at `path`, once its tensors are found to be those; only two are read.

    Raises:
        CheckpointError: see `load_video_vae`.
    """
    with torch.device("meta"):
        vae = VideoVAE(read_sizes(path))
    _checked_buffers(PublishedWeights(path), vae)
    return vae.config


def _checked_buffers(weights: PublishedWeights, vae: VideoVAE) -> dict[str, torch.Tensor]:
    """Returns shift and scale in fp32, of weights that are found to be those of a VideoVAE of these sizes."""
    path = weights.path
    if missing := [name for name in _BUFFERS if name not in weights]:
        raise CheckpointError(
            f"{path}: has no {', '.join(missing)}, without which latents cannot be normalised; take the published "
            f"vae.pt as it is"
        )
    check_state(weights, vae.state_dict(), "VideoVAE of these sizes")
    buffers = {name: weights[name].float() for name in _BUFFERS}
    if not all(value.isfinite().all() for value in buffers.values()) or not (buffers["scale"] > 0).all():
        raise CheckpointError(f"{path}: shift and scale must be finite and scale positive; the file is damaged")
    return buffers


def read_sizes(path: str | Path) -> VideoVAEConfig:
    """Returns the sizes of the VideoVAE in a file `NAME.pt` from `NAME.json` beside it, or from a folder's config.json.

    Without that file, as vae.pt is published, they are the published ones.

    Raises:
        CheckpointError: the file cannot be read, or does not hold a `VideoVAEConfig`.
    """
    path = Path(path)
    file = path / CONFIG_NAME if path.is_dir() else path.with_suffix(".json")
    if not file.exists():
        return VideoVAEConfig()
    try:
        sizes = json.loads(read_text_file(file, _MAX_CONFIG_BYTES))
        if not sizes:
            raise ConfigError("there are none")
        return VideoVAEConfig(**sizes)
    except (ConfigError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: must hold the VideoVAE's sizes: {' '.join(str(error).split())[:300]}") from None
