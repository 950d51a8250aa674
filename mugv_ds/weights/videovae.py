"""The VideoVAE's weights: `vae.pt` as it is published, or the same tensors as safetensors."""

from pathlib import Path

import torch

from mugv_ds.config.errors import CheckpointError, InputError
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.weights.base import check_state
from mugv_ds.weights.published import PublishedWeights

_BUFFERS = ("shift", "scale")


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
        config: its sizes, by default the published ones.
        dtype: of the parameters, float32 or bfloat16, whatever they have in the file.
        device: where to.

    Raises:
        CheckpointError: the file is missing, cannot be read, or does not hold exactly the tensors of a VideoVAE of
            these sizes. InputError: the dtype is another.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"the VideoVAE in {dtype}: must be float32 or bfloat16, others overflow")
    with torch.device("meta"):
        vae = VideoVAE(config)
    weights = PublishedWeights(path)
    if missing := [name for name in _BUFFERS if name not in weights]:
        raise CheckpointError(
            f"{path}: has no {', '.join(missing)}, without which latents cannot be normalised; take the published "
            f"vae.pt as it is"
        )
    check_state(weights, vae.state_dict(), "VideoVAE of these sizes")
    buffers = {name: weights[name].float() for name in _BUFFERS}
    if not all(value.isfinite().all() for value in buffers.values()) or not (buffers["scale"] > 0).all():
        raise CheckpointError(f"{path}: shift and scale must be finite and scale positive; the file is damaged")
    state = {name: value.to(device, dtype) for name, value in weights.items()}
    state |= {name: value.to(device) for name, value in buffers.items()}
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.eval().requires_grad_(False)
