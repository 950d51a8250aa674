"""Reading the VideoVAE's weights: one file of the published format, `vae.pt`, or the same as safetensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mugv_ds.config.errors import CheckpointError, InputError
from mugv_ds.config.regular_file import open_regular
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.files.tensor_archive import PARAMETER, ArchiveError, read_archive
from mugv_ds.files.tensor_file import FLOAT_DTYPES, check_dense
from mugv_ds.models.videovae.vae import VideoVAE

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
        path: a regular `.safetensors` file, or one that `torch.save` wrote.
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
    state = _checked(Path(path), _read(Path(path)), vae.state_dict())
    buffers = {name: state[name].float() for name in _BUFFERS}
    if not all(value.isfinite().all() for value in buffers.values()) or not (buffers["scale"] > 0).all():
        raise CheckpointError(f"{path}: shift and scale must be finite and scale positive; the file is damaged")
    state = {name: value.to(device, dtype) for name, value in state.items()}
    state |= {name: value.to(device) for name, value in buffers.items()}
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.eval().requires_grad_(False)


def _checked(path: Path, state: Mapping[str, object], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state if its names, shapes and dtypes are those wanted."""
    if missing := [name for name in wanted if name not in state]:
        hint = "; without them latents cannot be normalised: take the published vae.pt as it is"
        raise CheckpointError(
            f"{path}: has no {', '.join(missing[:3])} ({len(missing)} of {len(wanted)} missing); it is not a whole "
            f"VideoVAE of these sizes{hint if set(missing) <= set(_BUFFERS) else ''}"
        )
    if unexpected := sorted(map(str, state.keys() - wanted.keys())):
        raise CheckpointError(f"{path}: has {unexpected[0][:100]}, which a VideoVAE of these sizes has not")
    for name, like in wanted.items():
        try:
            found = check_dense(state[name], f"{path}: {name}", dtypes=FLOAT_DTYPES)
        except InputError as error:
            raise CheckpointError(str(error)) from None
        if found.shape != like.shape:
            raise CheckpointError(f"{path}: {name} is {list(found.shape)}, the model wants {list(like.shape)}")
    return dict(state)


def _read(path: Path) -> Mapping[str, object]:
    """Returns the dict in a file, its tensors mapped."""
    try:
        if path.suffix != ".safetensors":
            state = read_archive(path, beside=(PARAMETER,))
        else:
            open_regular(path).close()
            state = load_file(path)
    except (ArchiveError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as plain tensors: {' '.join(str(error).split())[:300]}"
        ) from None
    except InputError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a flat dict of tensors")
    return state
