"""Shards: safetensors files of many samples' tensors, each found by its key and checked by a CRC-32 of its own.

A latent is stored as [24, T, H, W], as in a file of its own; a caption's features as [L, C], the L tokens of the
caption alone, so that no mask is needed. The key is the sample's id as a rule. A shard is what safetensors writes. Its
`__metadata__` have one entry beside others' own, `mugv_ds.shard.1`: a JSON object, key → CRC-32 of the tensor's bytes,
eight hexadecimal digits. (One entry, because safetensors writes several in an order that changes from call to call.)

The header is read once: offset, bytes, dtype, shape and CRC-32 of a tensor are an `Entry`, which an index keeps.
Headers are not believed: their size is bounded, and what they say must fit the file exactly.
"""

import json
import re
import zlib
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from mugv_ds.data.paths import PathError, check_key, check_keys
from mugv_ds.data.storage import Blob
from mugv_ds.files.atomic import write_atomically
from mugv_ds.files.tensor_file import SampleError

MAX_SHARD_BYTES = 1 << 32  # an index keeps offsets in four bytes
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_CHECKSUMS = "mugv_ds.shard.1"  # the number is the format's version
_MAX_HEADER_BYTES = 1 << 22  # some 20,000 tensors; JSON of this size takes seconds at most
_FIRST_READ = 1 << 16  # holds the headers of most shards
_MAX_DIMENSIONS = 8
_CRC = re.compile("[0-9a-f]{8}")
_HEXADECIMAL = re.compile("[0-9a-f]+")
_PLAIN_BEGIN = f'{{"__metadata__":{{"{_CHECKSUMS}":"'
_PLAIN_TYPE = re.compile(r'"dtype":"(BF16|F16|F32)","shape":\[([1-9][0-9]{0,15}(?:,[1-9][0-9]{0,15}){0,7})\]')
_FIELDS = {"dtype", "shape", "data_offsets"}


class Entry(NamedTuple):
    """Where a tensor lies in a shard. offset: of its first byte in the file. size: bytes. crc: CRC-32 of these."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    crc: int


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a shard; the same tensors give the same bytes. It is there as a whole, on the disk, or not at all.

    Args:
        path: in a folder that exists; it must end in `.safetensors`.
        tensors: by key, at least one; dense, on the CPU, of bf16, fp16 or fp32.

    Raises:
        ValueError: a key or tensor cannot be in a shard, or all are too large for one.
        OSError: the file system failed.
    """
    if not tensors:
        raise ValueError(f"{path}: a shard has at least one tensor")
    kept = {key: _storable(tensors[key], key, path) for key in sorted(tensors)}
    checksums = {key: f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()):08x}" for key, tensor in kept.items()}
    content = save(kept, {_CHECKSUMS: json.dumps(checksums, separators=(",", ":"))})
    header = int.from_bytes(content[:8], "little")
    if header > _MAX_HEADER_BYTES or len(content) > MAX_SHARD_BYTES:
        raise ValueError(f"{path}: {len(content)} bytes, a header of {header}: too many for a shard, write several")
    with write_atomically(path) as stream:
        stream.write(content)


def read_header(blob: Blob) -> dict[str, Entry]:
    """The tensors of a shard by key, in the order of their bytes.

    Raises:
        SampleError: the file is no shard, or not all of one; the message names it. OSError: the file system failed.
    """
    size = blob.size()
    head = blob.read(0, min(size, _FIRST_READ))
    length = int.from_bytes(head[:8], "little")
    if size < 8 or not 2 <= length <= size - 8:
        raise SampleError(f"{blob.name}: not a shard, or truncated: {size} bytes{_looks_like(head[:64].tobytes())}")
    if length > _MAX_HEADER_BYTES or size > MAX_SHARD_BYTES:
        raise SampleError(
            f"{blob.name}: {size} bytes with a header of {length}; a shard has at most {MAX_SHARD_BYTES} and "
            f"{_MAX_HEADER_BYTES}"
        )
    if len(head) < 8 + length:
        head = np.concatenate([head, blob.read(len(head), 8 + length - len(head))])
    header = head[8 : 8 + length].tobytes()
    try:
        return _parse_plain(header, 8 + length, size) or _parse(header, 8 + length, size)
    except (ValueError, PathError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SampleError(f"{blob.name}: its header is damaged, or not of a shard: {reason}") from error


def find(entries: Mapping[str, Entry], key: str, name: str) -> Entry:
    """The entry of a tensor; `name` is the shard's.

    Raises:
        SampleError: there is none.
    """
    if key not in entries:
        raise SampleError(f"{name}#{key}: no such tensor in this shard, which has {len(entries)}, as {min(entries)!r}")
    return entries[key]


def read_tensor(blob: Blob, key: str, entry: Entry) -> Tensor:
    """A tensor of a shard as it is stored, read at once and of no more bytes than the entry says.

    Raises:
        SampleError: its bytes are not those that were written; the message names file and key.
        OSError: the file system failed.
    """
    content = blob.read(entry.offset, entry.size, entry.crc)
    if (found := zlib.crc32(content)) != entry.crc:
        raise SampleError(
            f"{blob.name}#{key}: damaged, or written anew since the index was built: the CRC-32 of its {entry.size} "
            f"bytes is {found:08x}, not {entry.crc:08x}"
        )
    return torch.from_numpy(content).view(DTYPES[entry.dtype]).view(entry.shape)


def _storable(tensor: Tensor, key: str, path: Path) -> Tensor:
    """The tensor in a memory order that can be written."""
    try:
        check_key(key)
    except PathError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(tensor, Tensor) or not tensor.numel() or not 0 < tensor.dim() <= _MAX_DIMENSIONS:
        raise ValueError(f"{path}#{key}: a shard has tensors of 1 to {_MAX_DIMENSIONS} dimensions that are not empty")
    if tensor.dtype not in DTYPES.values() or tensor.device.type != "cpu":
        raise ValueError(f"{path}#{key}: {tensor.dtype} on {tensor.device}; must be bf16, fp16 or fp32 on the CPU")
    return tensor.detach().contiguous()


def _parse_plain(header: bytes, start: int, file_bytes: int) -> dict[str, Entry] | None:
    """As `_parse`, in half the time, of a header as `write_shard` writes it; None for any other, wrong ones too.

    In such a header every tensor follows the one before it, so that its text is known but for key, dtype and shape; and
    nothing is escaped but the quotes of the CRC-32s.
    """
    entries, end = {}, start
    try:
        text = header.decode().rstrip(" ")
        crcs, _, rest = text.removeprefix(_PLAIN_BEGIN).partition('}"},"')
        tensors = rest.removesuffix("}}").split('},"')
        checksums = _json_object(crcs.replace('\\"', '"') + "}")
        for tensor in tensors:
            key, _, value = tensor.partition('":{')
            type_, _, offsets = value.partition(',"data_offsets":')
            dtype, shape, size = _plain_type(type_)
            if offsets != f"[{end - start},{end - start + size}]":
                return None
            entries[key] = Entry(dtype, shape, end, size, int(checksums[key], 16))
            end += size
        check_keys(entries)
        digits = "".join(checksums.values())
    except (ValueError, KeyError, TypeError, PathError, RecursionError):
        return None
    plain = (
        text.startswith(_PLAIN_BEGIN)
        and text.endswith("}}")
        and crcs.isprintable()
        and crcs.count("\\") == crcs.count('"') == crcs.count('\\"')
        and {*map(len, checksums.values())} == {8}
        and _HEXADECIMAL.fullmatch(digits)
    )
    return entries if plain and len(tensors) == len(entries) == len(checksums) and end == file_bytes else None


@lru_cache
def _plain_type(text: str) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and bytes of a tensor whose header is plain.

    Raises:
        ValueError: it is not.
    """
    match = _PLAIN_TYPE.fullmatch(text)
    if not match:
        raise ValueError("not as it is written")
    shape = tuple(map(int, match[2].split(",")))
    return match[1], shape, prod(shape) * _ITEM_BYTES[match[1]]


def _parse(header: bytes, start: int, file_bytes: int) -> dict[str, Entry]:
    """The entries of a header, whose data begin at byte `start` of the file.

    Raises:
        ValueError, PathError, RecursionError: it is wrong.
    """
    try:
        described = _json_object(header.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    metadata = described.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its __metadata__ are not texts")
    if _CHECKSUMS not in metadata:
        raise ValueError(f"its __metadata__ have no {_CHECKSUMS!r}, the CRC-32s of the tensors")
    checksums = _json_object(metadata[_CHECKSUMS])
    if checksums.keys() != described.keys() or not described:
        raise ValueError(f"it has {len(described)} tensors, and CRC-32s of {len(checksums)}")
    check_keys(described)
    entries = []
    for key, value in described.items():
        if type(value) is not dict or value.keys() != _FIELDS:
            raise ValueError(f"{key!r} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets, crc = value["dtype"], value["shape"], value["data_offsets"], checksums[key]
        if type(dtype) is not str or dtype not in _ITEM_BYTES:
            raise ValueError(f"{key!r} has dtype {dtype!r:.50}, and {', '.join(DTYPES)} may be in a shard")
        if type(shape) is not list or {*map(type, shape)} != {int} or len(shape) > _MAX_DIMENSIONS or min(shape) < 1:
            raise ValueError(f"{key!r} has shape {shape!r:.100}")
        if type(offsets) is not list or [*map(type, offsets)] != [int, int]:
            raise ValueError(f"{key!r} has data_offsets {offsets!r:.100}")
        if type(crc) is not str or not _CRC.fullmatch(crc):
            raise ValueError(f"{key!r} has a CRC-32 of {crc!r:.50}")
        first, last = offsets
        size = prod(shape) * _ITEM_BYTES[dtype]
        if last - first != size:
            raise ValueError(f"{key!r} has {last - first} bytes, and its shape {shape} of {dtype} takes {size}")
        entries.append((start + first, key, Entry(dtype, tuple(shape), start + first, size, int(crc, 16))))
    entries.sort(key=itemgetter(0))
    end = start  # from here to the end of the file the tensors follow each other: none is outside it, or overlaps
    for offset, key, entry in entries:
        if offset != end:
            raise ValueError(f"{key!r} begins at byte {offset}, and what lies before it ends at {end}")
        end += entry.size
    if end != file_bytes:
        raise ValueError(f"its tensors end at byte {end}, and the file has {file_bytes}")
    return {key: entry for _, key, entry in entries}


def _json_object(text: str) -> dict[str, Any]:
    """What a JSON object says; a key that occurs twice, a number that is none or another value raise ValueError."""
    found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    if type(found) is not dict:
        raise ValueError(f"a {type(found).__name__}, not a JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key of it occurs twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _looks_like(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return " of a Git LFS pointer; run `git lfs pull`"
    if head.lstrip().startswith(b"<"):
        return " of an HTML or XML page; download the file again"
    return ""
