"""Video codecs from a file: the VideoVAE, or the demo's linear one."""

from pathlib import Path

import torch

from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.files.fingerprint import fingerprint
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.weights.published import PublishedWeights
from mugv_ds.weights.videovae import check_video_vae, load_video_vae


def load_codec(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LinearCodec | VideoVAE:
    """Returns the codec that a file holds, whichever it is, frozen.

    Args:
        path: `vae.pt` or another file or folder that `load_video_vae` reads, or what `LinearCodec.save` wrote.
        dtype: of a VideoVAE's parameters, float32 or bfloat16. A linear codec is always in fp32.
        device: where to.

    Raises:
        CheckpointError: there is no file, or it holds neither. InputError: the dtype is another.
    """
    weights = PublishedWeights(path)
    if not _is_linear(weights):
        return load_video_vae(path, dtype=dtype, device=device)
    try:
        return LinearCodec.load(weights.files[0]).to(device)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a whole codec: {str(error).splitlines()[0]}") from None


def read_codec_sizes(path: str | Path) -> VideoVAEConfig | None:
    """Returns the sizes of the VideoVAE at `path`, once its tensors are found to be those; None for a linear codec.

    Raises:
        CheckpointError: there is no file, or `load_codec` would refuse it.
    """
    return None if _is_linear(PublishedWeights(path)) else check_video_vae(path)


def codec_fingerprint(path: str | Path) -> str:
    """Returns what tells the codec in a file apart, hex SHA-256, though little of it is read.

    Raises:
        CheckpointError: there is no file.
    """
    return fingerprint(PublishedWeights(path).files)


def _is_linear(weights: PublishedWeights) -> bool:
    return set(weights) == set(LinearCodec().state_dict())
