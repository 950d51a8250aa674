"""What torch.save wrote, read without torch.load: no code runs, nothing is allocated beyond what the file holds.

`torch.load(weights_only=True)` runs no code, but it calls constructors such as `bytearray(n)` with any `n` the file
asks for, unpacks compressed records, and hashes keys that take for ever. And a file that was looked at first may be
another one when it is loaded, or be understood in another way. So here a file is opened once and read once: the
archive's directory, its pickle as plain data, and of that the plain dense tensors, which are mapped into memory, not
read.
"""

import errno
import io
import mmap
import os
import re
import struct
import zipfile
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mugv_ds.config.regular_file import NotRegularError, open_regular
from mugv_ds.files.pickle_stream import MAX_BYTES, Described, Name, Persistent, read_pickle

PARAMETER = "torch._utils._rebuild_parameter"  # of whose arguments the first is the tensor

_MAX_DIRECTORY_BYTES = 1 << 24  # 150,000 records
# data.pkl takes less than 1 KB a tensor; and Megatron's arguments and random state, tens of KB, are in it too.
_MAX_PICKLE_BYTES, _PICKLE_BYTES_A_RECORD = 1 << 20, 1 << 12
_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_ORDERED_DICT, _TENSOR = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"
_PLAIN = {_ORDERED_DICT, _TENSOR, *_DTYPES}
# What torch.save writes for tensors that are not plain: sparse, meta, complex, quantised, float8, parameters.
_NOT_PLAIN = re.compile(
    r"torch\.(\w+Storage|Size|device|[a-z]+\d+\w*)|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.serialization\._get_layout|torch\.nn\.parameter\.Parameter|torch\.storage\.\w+Storage"
)
_LARGEST = 2**63 - 1
_ALIGNMENT = 8  # bytes of the largest element
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field


class ArchiveError(ValueError):
    """Not an archive of plain tensors. The message says why in one line, without the file's name."""


class UnsafeArchiveError(ArchiveError):
    """It asks for more than tensors, as a pickle that runs code does. Nothing of it was executed."""


def read_archive(path: Path, *, start: int = 0, length: int | None = None, beside: tuple[str, ...] = ()) -> Any:
    """What `torch.save` put into a file or a part of it: a tensor, or containers of tensors, mapped, on the CPU.

    Objects of other classes stay as they are described. The strides of a tensor may be 0: it can be larger than what is
    stored, though not allocate anything.

    Args:
        path: the file. start, length: in bytes, of the part; by default the whole file.
        beside: beginnings of the names, as "module.name", that may occur beside those of plain dense tensors.

    Raises:
        UnsafeArchiveError: it names functions or classes that neither belong to a tensor nor are in `beside`.
        ArchiveError: it is no regular file, empty, truncated, compressed, not of `torch.save`, or has other tensors.
        OSError: it is missing, or the file system failed.
    """
    try:
        with open_regular(path) as file:
            return _read(file, start, length, beside)
    except ArchiveError:
        raise
    except NotRegularError as error:
        raise ArchiveError(str(error).removeprefix(f"{path}: ")) from None
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError, EOFError, struct.error) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArchiveError(f"truncated, or not a file of torch.save ({reason})") from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a seek to before the start, where the archive's directory leads
            raise
        raise ArchiveError("truncated, or not a file of torch.save") from None


def _read(file: BinaryIO, start: int, length: int | None, beside: tuple[str, ...]) -> Any:
    size = os.fstat(file.fileno()).st_size
    length = size - start if length is None else length
    file.seek(start)
    head = file.read(min(64, length))
    if not head.startswith(b"PK"):
        _refuse_foreign(head)
    if start + length > size:
        raise ArchiveError(f"truncated: it ends before byte {start + length}")
    part = _Part(file, start, length, _MAX_DIRECTORY_BYTES)
    with zipfile.ZipFile(part) as archive:
        part.allowance = MAX_BYTES + (1 << 20)  # data.pkl, and headers
        records, pickled = _records(archive, length)
    value, names = read_pickle(pickled)
    _refuse_names({name for name in names if name not in _PLAIN and not name.startswith(beside)})
    before = start % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_COPY, offset=start - before)
    return _Builder(mapped, before, length, records).build(value)


def _records(archive: zipfile.ZipFile, length: int) -> tuple[dict[str, zipfile.ZipInfo], bytes]:
    """The storages by their keys, and data.pkl, of an archive of `length` bytes."""
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise ArchiveError("a compressed archive; torch.save writes uncompressed ones")
    if sum(record.file_size for record in records) > length:
        raise ArchiveError("its records claim more bytes than the file has")
    by_name = {record.filename: record for record in records}
    headers = [name for name in by_name if name.rpartition("/")[2] == "data.pkl"]
    limit = min(_MAX_PICKLE_BYTES + _PICKLE_BYTES_A_RECORD * len(records), MAX_BYTES)
    if len(by_name) != len(records) or len(headers) != 1 or by_name[headers[0]].file_size > limit:
        raise ArchiveError("not an archive of torch.save with one small data.pkl")
    folder = headers[0].removesuffix("data.pkl")
    byteorder = by_name.get(f"{folder}byteorder")
    if byteorder and (byteorder.file_size > 64 or archive.read(byteorder) != b"little"):
        raise ArchiveError("written on a big-endian machine; save it again on a little-endian one")
    prefix = f"{folder}data/"
    storages = {name.removeprefix(prefix): by_name[name] for name in by_name if name.startswith(prefix)}
    return storages, archive.read(headers[0])


def _refuse_names(unexpected: set[Name]) -> None:
    shown = ", ".join(name[:100] for name in sorted(unexpected)[:5])
    if not all(_NOT_PLAIN.fullmatch(name) for name in unexpected):
        raise UnsafeArchiveError(
            f"asks for {shown}, which no tensor needs; nothing was executed, find out who wrote this file"
        )
    if unexpected:
        raise ArchiveError(f"not a plain dense tensor (it needs {shown})")


def _refuse_foreign(head: bytes) -> None:
    """Says what a file that is no archive looks like instead."""
    if not head:
        raise ArchiveError("0 bytes")
    if head.startswith(b"version https://git-lfs"):
        raise ArchiveError("a Git LFS pointer, not the data; run `git lfs pull`")
    if head.startswith(b"\x80"):
        raise UnsafeArchiveError("a bare pickle (as torch.save wrote before 1.6), which can run code; save it again")
    if head.lstrip().startswith(b"<"):
        raise ArchiveError("an HTML or XML page, not the data; download it again")
    raise ArchiveError("not a file of torch.save")


class _Builder:
    """Tensors and containers of what a pickle describes; one that is referred to several times is made once.

    Args:
        mapped: the bytes of the file. start, length: of the archive in them.
        records: the storages by their keys.
    """

    def __init__(self, mapped: mmap.mmap, start: int, length: int, records: dict[str, zipfile.ZipInfo]) -> None:
        self._mapped, self._start, self._length, self._records = mapped, start, length, records
        self._built: dict[int, Any] = {}  # by id; what they were built of is alive as long as this is used
        self._storages: dict[str, Tensor] = {}

    def build(self, value: Any) -> Any:
        """`value` with tensors in the place of their descriptions; it is not nested too deep to recurse."""
        if type(value) not in (list, tuple, dict, Described):
            return value
        if id(value) not in self._built:
            self._built[id(value)] = self._made(value)
        return self._built[id(value)]

    def _made(self, value: Any) -> Any:
        if type(value) is dict:
            return {key: self.build(item) for key, item in value.items()}
        if type(value) is not Described:
            return type(value)(map(self.build, value))
        callee, arguments = value.callee, value.arguments
        if type(callee) is not Name or type(arguments) is not tuple:
            return value
        if callee == _ORDERED_DICT and not arguments:
            return self.build(value.items or {})
        if callee == PARAMETER and arguments:
            return self.build(arguments[0])
        if callee == _TENSOR and len(arguments) == 6:
            return self._tensor(*arguments[:4])
        return value

    def _tensor(self, stored: Any, offset: Any, size: Any, stride: Any) -> Tensor | Any:
        """A tensor from the arguments of `_rebuild_tensor_v2`, or the description of a storage that is not plain."""
        key = stored.key if type(stored) is Persistent else None
        if not (type(key) is tuple and len(key) == 5 and type(key[1]) is Name and key[1] in _DTYPES):
            return stored
        _, kind, name, _, count = key
        numbers_are_sound = all(
            type(numbers) is tuple and all(type(n) is int and 0 <= n <= _LARGEST for n in numbers)
            for numbers in (size, stride, (offset, count))
        )
        if not (numbers_are_sound and type(name) is str and len(size) == len(stride) <= 64 and prod(size) <= _LARGEST):
            raise ArchiveError("describes a tensor as torch.save does not")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= count:
            raise ArchiveError(f"describes a tensor of shape {list(size)} that ends outside of its storage")
        return self._storage(name, _DTYPES[kind], count).as_strided(size, stride, min(offset, count))

    def _storage(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        """The `count` elements of a storage, mapped; copied where they are not aligned, as in a part of a file."""
        record = self._records.get(name)
        if record is None or record.file_size != count * dtype.itemsize:
            raise ArchiveError(f"truncated: storage {name[:20]!r} has not the {count} elements of {dtype} announced")
        if name not in self._storages:
            begin = self._data_offset(record)
            if count == 0:
                found = torch.empty(0, dtype=torch.uint8)
            else:
                found = torch.frombuffer(self._mapped, dtype=torch.uint8, count=record.file_size, offset=begin)
            self._storages[name] = found.clone() if begin % _ALIGNMENT else found
        return self._storages[name].view(dtype)

    def _data_offset(self, record: zipfile.ZipInfo) -> int:
        """Where a record's bytes begin in the mapped ones: after a header of its own."""
        header = self._start + record.header_offset
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(self._mapped[header : header + _LOCAL_HEADER.size])
        begin = header + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if signature != b"PK\x03\x04" or begin + record.file_size > self._start + self._length:
            raise ArchiveError("truncated: a record is not where the archive's directory says")
        return begin


class _Part(io.RawIOBase):
    """Some bytes of an open file as a file of their own, of which no more than `allowance` bytes can be read.

    zipfile reads an archive's directory whole, whatever its size.
    """

    def __init__(self, file: BinaryIO, start: int, length: int, allowance: int) -> None:
        self._file, self._start, self._length, self.allowance = file, start, length, allowance
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, "before the start of the file")  # which zipfile expects of short files
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if size > self.allowance:
            raise ArchiveError("an archive with too many records")
        if size == 0:  # perhaps far beyond what a file can be
            return b""
        self.allowance -= size
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data
