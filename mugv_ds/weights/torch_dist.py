"""Tensors of a torch.distributed.checkpoint folder, read without a process group, a piece at a time.

`.metadata` says of each tensor its shape, its dtype, and of each chunk where in the whole it belongs and which bytes of
which `.distcp` file hold it, as a tensor of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.regular_file import read_bytes_file
from mugv_ds.files.pickle_stream import MAX_BYTES, Described, Name, read_pickle
from mugv_ds.files.tensor_archive import PARAMETER, ArchiveError, read_archive
from mugv_ds.weights.base import is_stored

METADATA_NAME = ".metadata"
_MAX_DIMENSIONS = 8
_MAX_CHUNKS = 1024  # of one layer: each is compared with each
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it starts, how large it is, and the bytes that hold it."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the folder: its shape and dtype, and the chunks that make it up."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def stacked(self) -> "StoredTensor":
        """The same as a stack of one."""
        chunks = (replace(chunk, offset=(0, *chunk.offset), size=(1, *chunk.size)) for chunk in self.chunks)
        return replace(self, shape=(1, *self.shape), chunks=tuple(chunks))


def read_metadata(folder: Path, wanted: Callable[[str], bool]) -> dict[str, StoredTensor]:
    """The folder's tensors whose names are wanted; what is no tensor is left out.

    Raises:
        CheckpointError: `.metadata` cannot be read, or does not fit the files beside it.
    """
    file = folder / METADATA_NAME
    try:
        state = read_pickle(read_bytes_file(file, MAX_BYTES)).value.state
        tensors = {
            name: described.state
            for name, described in state["state_dict_metadata"].items()
            if described.callee.endswith(".TensorStorageMetadata") and wanted(name)
        }
        places = {
            _place(index.state["fqn"], _size(index.state["offset"])): info.state
            for index, info in state["storage_data"].items()
            if type(index.state["fqn"]) is str and index.state["fqn"] in tensors
        }
        return {name: _stored_tensor(folder, name, tensor, places) for name, tensor in tensors.items()}
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file}: does not describe a torch.distributed.checkpoint folder: {' '.join(str(error).split())[:200]}"
        ) from None


def _stored_tensor(folder: Path, name: str, state: dict, places: Mapping[str, dict]) -> StoredTensor:
    dtype_name = state["properties"].state[0]
    if type(dtype_name) is not Name or dtype_name not in _DTYPES:
        shown = dtype_name[:100] if type(dtype_name) is Name else "of no known dtype"
        raise CheckpointError(f"{folder / METADATA_NAME}: {name} is {shown}, and must be floating-point")
    dtype, shape, chunks = _DTYPES[dtype_name], _size(state["size"]), []
    for described in state["chunks"]:
        offset, size = _size(described.state["offsets"]), _size(described.state["sizes"])
        if not len(offset) == len(size) == len(shape):
            raise ValueError(f"a chunk of {name} has another rank than {name}")
        place = places.get(_place(name, offset))
        if place is None:
            raise ValueError(f"says nowhere which file holds a chunk of {name!r}")
        relative, start, length = place["relative_path"], place["offset"], place["length"]
        file = folder / relative
        if Path(relative).name != relative or not file.is_file():
            raise CheckpointError(f"{folder / METADATA_NAME}: names {relative!r}, which is not a file in this folder")
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{file}: {name} was transformed (compressed) when it was saved; save it plainly")
        is_inside = type(start) is type(length) is int and 0 <= start <= start + length <= file.stat().st_size
        if not is_inside or prod(size) * dtype.itemsize > length:
            raise CheckpointError(f"{file}: has not the bytes that {METADATA_NAME} gives {name}")
        chunks.append(Chunk(offset, size, file, start, length))
    if not sum(prod(chunk.size) for chunk in chunks) == prod(shape) > 0:
        raise ValueError(f"the chunks of {name} do not make it up")
    return StoredTensor(name, shape, dtype, tuple(chunks))


def _place(name: str, offset: tuple[int, ...]) -> str:
    """Key of a chunk. A string, because the hashes of tuples of numbers can be chosen to be equal."""
    return f"{name} {offset}"


def _size(described: Described) -> tuple[int, ...]:
    """A torch.Size as it is described."""
    (size,) = described.arguments
    is_short = isinstance(size, tuple) and len(size) <= _MAX_DIMENSIONS
    if not (is_short and all(type(length) is int and 0 <= length < 2**63 for length in size)):
        raise ValueError(f"an object of class {type(size).__name__} where a size should be")
    return size


class StackReader:
    """Reads layers of tensors that are stacked along their first dimension.

    A chunk that spans several layers is kept until another tensor is read, so memory holds at most one stacked tensor.
    """

    def __init__(self) -> None:
        self._kept: tuple[StoredTensor | None, dict[Chunk, Tensor]] = (None, {})

    def read(self, stored: StoredTensor, layer: int) -> Tensor:
        """Layer `layer` of a tensor, without the stacked dimension.

        Raises:
            CheckpointError: a chunk is not what `.metadata` says, or the chunks do not make up the layer.
        """
        chunks = [chunk for chunk in stored.chunks if chunk.offset[0] <= layer < chunk.offset[0] + chunk.size[0]]
        if len(chunks) > _MAX_CHUNKS or not _make_up(chunks, stored.shape[1:]):
            raise CheckpointError(f"{stored.chunks[0].file.parent}: the chunks of {stored.name} do not make it up")
        if self._kept[0] is not stored:
            self._kept = (stored, {})
        whole = torch.empty(stored.shape[1:], dtype=stored.dtype)
        for chunk in chunks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offset[1:], chunk.size[1:], strict=True))
            whole[box] = self._load(chunk, stored.dtype)[layer - chunk.offset[0]]
        return whole

    def _load(self, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        kept = self._kept[1]
        if chunk in kept:
            return kept[chunk]
        value = load_chunk(chunk, dtype)
        if chunk.size[0] > 1:
            kept[chunk] = value
        return value


def load_chunk(chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """The tensor of a chunk.

    Raises:
        CheckpointError: it is not the plain tensor that `.metadata` says.
    """
    try:
        value = read_archive(chunk.file, start=chunk.start, length=chunk.length, beside=(PARAMETER,))
    except (ArchiveError, OSError) as error:
        raise CheckpointError(
            f"{chunk.file}: the bytes from {chunk.start} on cannot be read as a tensor: {error}"
        ) from None
    if not (isinstance(value, Tensor) and value.dtype == dtype and value.numel() == prod(chunk.size)):
        raise CheckpointError(f"{chunk.file}: the bytes from {chunk.start} on are not the tensor that is announced")
    if not is_stored(value):
        raise CheckpointError(f"{chunk.file}: the tensor from {chunk.start} on claims elements that are not stored")
    return value.detach().reshape(chunk.size)


def _make_up(chunks: list[Chunk], shape: tuple[int, ...]) -> bool:
    """Whether the chunks' boxes, without the stacked dimension, fill a tensor of this shape exactly."""
    boxes = [list(zip(chunk.offset[1:], chunk.size[1:], strict=True)) for chunk in chunks]
    inside = all(o + n <= length for box in boxes for (o, n), length in zip(box, shape, strict=True))
    apart = all(
        any(o + n <= p or p + m <= o for (o, n), (p, m) in zip(one, other, strict=True))
        for one, other in combinations(boxes, 2)
    )
    return inside and apart and sum(prod(n for _, n in box) for box in boxes) == prod(shape)
