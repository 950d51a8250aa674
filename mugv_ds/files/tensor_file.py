"""Opening the `.pt` files of samples: a latent, or a caption's features. `tensor_archive` says how they are read."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.files.tensor_archive import ArchiveError, UnsafeArchiveError, read_archive

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SampleError(InputError):
    """A sample's file cannot be used. The message names the file and what is wrong with it."""


class UnsafeFileError(SampleError):
    """A file asks for more than tensors, as a pickle that runs code does. Nothing of it was executed."""


def load_tensors(path: Path) -> Any:
    """What `torch.save` put into `path`: a tensor, or containers of tensors, memory-mapped, on the CPU.

    Raises:
        UnsafeFileError: the file names functions or classes that do not belong to a tensor.
        SampleError: the file is missing, empty, truncated, not of `torch.save`, or holds tensors that are not plain.
        OSError: the file system failed; this says nothing about the sample.
    """
    try:
        return read_archive(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError(f"{path}: missing") from error
    except UnsafeArchiveError as error:
        raise UnsafeFileError(f"{path}: {error}") from error
    except ArchiveError as error:
        raise SampleError(f"{path}: {error}") from error


def check_dense(
    value: Any, name: str, *, dtypes: tuple[torch.dtype, ...], max_storage_bytes: int | None = None
) -> Tensor:
    """`value` if it is a dense tensor whose storage holds it and little else; costs no memory.

    Args:
        value: what a file held.
        name: file, and key in it, for the message.
        dtypes: those allowed.
        max_storage_bytes: largest storage behind the tensor; by default the tensor's own size.

    Raises:
        SampleError: `value` is something else.
    """
    if not isinstance(value, Tensor):
        raise SampleError(f"{name}: a {type(value).__name__}, expected a tensor")
    if value.layout is not torch.strided or value.device.type != "cpu":
        raise SampleError(f"{name}: a {value.layout} tensor on {value.device}, expected a dense one on the CPU")
    if value.dtype not in dtypes:
        raise SampleError(f"{name}: dtype {value.dtype}, expected one of {', '.join(map(str, dtypes))}")
    size, stored = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if size > stored:
        raise SampleError(f"{name}: shape {list(value.shape)} claims {size} bytes but the file stores {stored}")
    if stored > max(size, max_storage_bytes or 0):
        raise SampleError(
            f"{name}: a view of {size} bytes into a stored tensor of {stored} bytes; save it again with .clone()"
        )
    return value.detach()


def check_latent(value: Any, name: str | Path) -> Tensor:
    """`value` if it is a dense floating tensor [24, T, H, W] with T, H, W ≥ 1; costs no memory. `name` is the file's.

    Raises:
        SampleError: it is something else.
    """
    latent = check_dense(value, str(name), dtypes=FLOAT_DTYPES)
    if latent.dim() != 4 or latent.shape[0] != LATENT_CHANNELS or 0 in latent.shape:
        raise SampleError(f"{name}: shape {list(latent.shape)}, expected [{LATENT_CHANNELS}, T, H, W] with T, H, W ≥ 1")
    return latent
