"""Opening `.pt` files that somebody else wrote: no code runs, nothing is allocated beyond what the file holds.

`torch.load(weights_only=True)` runs no code, but it does call constructors such as `bytearray(n)` or
`torch.FloatTensor(n)` with any `n` the file asks for, and unpacks compressed records. So a file is looked at before it
is loaded: a plain, uncompressed archive whose pickle names nothing but dense tensors and their storages. The tensors
are mapped into memory, not read.
"""

import errno
import pickletools  # disassembles, never executes
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_MAX_HEADER_BYTES = 1 << 20  # data.pkl of one latent or caption is under 1 KB
_PLAIN_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {name}Storage"
    for name in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
# What torch.save writes for tensors that are not plain: sparse, meta, complex, quantised, float8, parameters.
_OTHER_TENSOR_GLOBALS = re.compile(
    r"torch (\w+Storage|Size|device|[a-z]+\d+\w*)|torch\._utils _rebuild_\w+|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.serialization _get_layout|torch\.nn\.parameter Parameter|torch\.storage \w+Storage"
)
_GLOBAL_OPCODES = {"GLOBAL", "INST"}
_HIDDEN_GLOBAL_OPCODES = {"STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}  # torch.save writes none of these


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
        _refuse_unless_plain(path)
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except SampleError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError(f"{path}: missing") from error
    except Exception as error:  # parsers of broken files raise nearly every class there is
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a seek to a broken offset
            raise
        reason = str(error).partition("\n")[0]
        raise SampleError(f"{path}: truncated, or not a file of torch.save ({reason})") from error


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


def check_latent(value: Any, path: Path) -> Tensor:
    """`value` if it is a dense floating tensor [24, T, H, W] with T, H, W ≥ 1; costs no memory.

    Raises:
        SampleError: it is something else.
    """
    latent = check_dense(value, str(path), dtypes=FLOAT_DTYPES)
    if latent.dim() != 4 or latent.shape[0] != LATENT_CHANNELS or 0 in latent.shape:
        raise SampleError(f"{path}: shape {list(latent.shape)}, expected [{LATENT_CHANNELS}, T, H, W] with T, H, W ≥ 1")
    return latent


def _refuse_unless_plain(path: Path) -> None:
    """Checks the archive `path` before torch sees it; the reasons are in the head of this file."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head.startswith(b"PK"):
        _refuse_foreign(path, head)
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise SampleError(f"{path}: a compressed archive; torch.save writes uncompressed ones")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise SampleError(f"{path}: its records claim more bytes than the file has")
        headers = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
        if len(headers) != 1 or headers[0].file_size > _MAX_HEADER_BYTES:
            raise SampleError(f"{path}: not an archive of torch.save with one small data.pkl")
        unexpected = _globals(archive.read(headers[0])) - _PLAIN_GLOBALS
    if not all(_OTHER_TENSOR_GLOBALS.fullmatch(name) for name in unexpected):
        raise UnsafeFileError(
            f"{path}: asks for {', '.join(sorted(unexpected))}, which no tensor needs; "
            "nothing was executed, find out who wrote this file"
        )
    if unexpected:
        raise SampleError(f"{path}: not a plain dense tensor (it needs {', '.join(sorted(unexpected))})")


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Says what a file that is no archive looks like instead."""
    if not head:
        raise SampleError(f"{path}: 0 bytes")
    if head.startswith(b"version https://git-lfs"):
        raise SampleError(f"{path}: a Git LFS pointer, not the data; run `git lfs pull`")
    if head.startswith(b"\x80"):
        raise UnsafeFileError(
            f"{path}: a bare pickle (as torch.save wrote before 1.6), which can run code; save it again"
        )
    if head.lstrip().startswith(b"<"):
        raise SampleError(f"{path}: an HTML or XML page, not the data; download it again")
    raise SampleError(f"{path}: not a file of torch.save")


def _globals(pickled: bytes) -> set[str]:
    """Every "module name" that a pickle would import, or the opcode where the name is not written out."""
    names = set()
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in _GLOBAL_OPCODES:
            names.add(argument)
        elif opcode.name in _HIDDEN_GLOBAL_OPCODES:
            names.add(opcode.name)
    return names
