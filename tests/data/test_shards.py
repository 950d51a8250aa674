"""Shards: what is written is read, bit by bit, and nothing that a header claims is believed."""

import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mugv_ds.data import shards
from mugv_ds.data.paths import PathError
from mugv_ds.data.shards import Entry, find, read_header, read_tensor, write_shard
from mugv_ds.data.storage import open_file
from mugv_ds.files.tensor_file import SampleError
from tests.helpers.attack import verdict

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def drawn(shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def entries_of(path: Path) -> dict[str, Entry]:
    with open_file(path) as blob:
        return read_header(blob)


def read(path: Path, key: str) -> torch.Tensor:
    with open_file(path) as blob:
        return read_tensor(blob, key, find(read_header(blob), key, blob.name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(tmp_path, dtype):
    """NaN, Inf, −0 and subnormal numbers too, of any memory order; and safetensors reads the same."""
    bits = torch.randint(-(2**15), 2**15, (24, 3, 4, 5), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    first = bits.view(dtype) if dtype.itemsize == 2 else torch.stack([bits, bits.flip(0)], dim=-1).view(dtype)[..., 0]
    second = drawn((5, 7, 6), dtype).permute(2, 0, 1)
    write_shard(tmp_path / "a.safetensors", {"one": first, "two": second, "three": drawn((2, 9), torch.float32)})
    for key, expected in (("one", first), ("two", second.contiguous())):
        got = read(tmp_path / "a.safetensors", key)
        assert (got.dtype, got.shape) == (dtype, expected.shape)
        assert torch.equal(got.view(torch.uint8), expected.contiguous().view(torch.uint8))
        same = load_file(tmp_path / "a.safetensors")[key]
        assert torch.equal(same.view(torch.uint8), got.view(torch.uint8))


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    """In any order; safetensors itself would write several metadata in another one each time."""
    tensors = {f"{i:032x}": drawn((24, 1 + i % 3, 2, 2), DTYPES[i % 3], i) for i in range(40)}
    write_shard(tmp_path / "a.safetensors", tensors)
    write_shard(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_an_entry_says_all_that_a_reader_needs(tmp_path):
    path = tmp_path / "a.safetensors"
    write_shard(path, {"b": drawn((24, 2, 3, 4)), "a": drawn((5, 8), torch.float32)})
    entries, content = entries_of(path), path.read_bytes()
    assert list(entries) == sorted(entries, key=lambda key: entries[key].offset)
    assert entries["b"].shape == (24, 2, 3, 4) and entries["b"].dtype == "BF16" and entries["b"].size == 24 * 24 * 2
    assert entries["a"].shape == (5, 8) and entries["a"].dtype == "F32" and entries["a"].size == 160
    for entry in entries.values():
        assert zlib.crc32(content[entry.offset : entry.offset + entry.size]) == entry.crc
    assert max(entry.offset + entry.size for entry in entries.values()) == len(content)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "at least one tensor"),
        ({"a": torch.zeros(3, dtype=torch.int64)}, "#a: torch.int64 on cpu; must be bf16, fp16 or fp32"),
        ({"a": torch.zeros(3, dtype=torch.float64)}, "#a: torch.float64"),
        ({"a": torch.zeros(3, device="meta")}, "#a: torch.float32 on meta"),
        ({"a": torch.zeros(0, 3)}, "#a: .* not empty"),
        ({"a": torch.tensor(1.0)}, "#a: .* 1 to 8 dimensions"),
        ({"a": [1.0]}, "#a: .* tensors"),
        ({"": torch.zeros(3)}, "'' cannot be the key"),
        ({"a#b": torch.zeros(3)}, "'a#b' cannot be the key"),
        ({"__metadata__": torch.zeros(3)}, "'__metadata__' cannot be the key"),
        ({"a\nb": torch.zeros(3)}, r"'a\\nb' cannot be the key"),
        ({"a" * 201: torch.zeros(3)}, "cannot be the key"),
    ],
)
def test_what_cannot_be_in_a_shard_is_not_written(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.safetensors", tensors)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_shard_that_was(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_shard(path, {"a": drawn((3, 3))})
    before = path.read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_shard(path, {"a": drawn((3, 3), seed=1)})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("at", [0, 100, -1], ids=["first byte", "inside", "last byte"])
def test_a_flipped_bit_is_named(tmp_path, at, bit):
    path = tmp_path / "a.safetensors"
    write_shard(path, {"bad": drawn((24, 2, 3, 4)), "good": drawn((24, 2, 3, 4), seed=1)})
    entry, content = entries_of(path)["bad"], bytearray(path.read_bytes())
    content[entry.offset + at % entry.size] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(
        SampleError, match=rf"{path}#bad: damaged, .* CRC-32 of its 1152 bytes is .*, not {entry.crc:08x}"
    ):
        read(path, "bad")
    assert torch.equal(read(path, "good"), drawn((24, 2, 3, 4), seed=1))


def test_an_entry_of_another_shard_or_beyond_the_file_is_refused(tmp_path):
    """As when a shard was written anew after the index was built; nothing is allocated that the file does not have."""
    path = tmp_path / "a.safetensors"
    write_shard(path, {"a": drawn((24, 2, 3, 4))})
    entry = entries_of(path)["a"]
    write_shard(path, {"a": drawn((24, 2, 3, 4), seed=1)})
    with open_file(path) as blob:
        with pytest.raises(SampleError, match=rf"{path}#a: damaged, or written anew"):
            read_tensor(blob, "a", entry)
        with pytest.raises(SampleError, match=rf"{path}: truncated: \d+ bytes, and those up to \d+ are wanted"):
            read_tensor(blob, "a", entry._replace(shape=(1 << 31,), size=1 << 32))
    path.write_bytes(path.read_bytes()[:-1])
    with open_file(path) as blob, pytest.raises(SampleError, match="truncated"):
        read_tensor(blob, "a", entry)


def test_a_key_that_is_not_there(tmp_path):
    write_shard(tmp_path / "a.safetensors", {"one": drawn((3,)), "two": drawn((3,))})
    with pytest.raises(SampleError, match=r"a\.safetensors#three: no such tensor in this shard, which has 2, as 'one'"):
        read(tmp_path / "a.safetensors", "three")


GOOD = {
    "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
}
DATA = bytes(range(16))
CRCS = {"a": f"{zlib.crc32(DATA[:12]):08x}", "b": f"{zlib.crc32(DATA[12:]):08x}"}
METADATA = {"mugv_ds.shard.1": json.dumps(CRCS)}


def framed(header: str | bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def shard(tensors=GOOD, metadata=METADATA, data=DATA) -> bytes:
    return framed(json.dumps({"__metadata__": metadata, **tensors}), data)


def with_a(**fields) -> bytes:
    return shard(GOOD | {"a": GOOD["a"] | fields})


def with_crcs(crcs, **others) -> bytes:
    return shard(metadata={"mugv_ds.shard.1": crcs if isinstance(crcs, str) else json.dumps(crcs)} | others)


def renamed(key: str) -> bytes:
    return shard({key: GOOD["a"], "b": GOOD["b"]}, {"mugv_ds.shard.1": json.dumps({key: CRCS["a"], "b": CRCS["b"]})})


def twice(text: str, again: str) -> bytes:
    """The header with a piece of text repeated."""
    header = json.dumps({"__metadata__": METADATA, **GOOD})
    assert header.count(text) == 1
    return framed(header.replace(text, text + again))


def torch_saved() -> bytes:
    path = Path("/dev/shm") / f"shard-{os.getpid()}.pt"
    torch.save(torch.zeros(24, 1, 2, 2), path)
    content = path.read_bytes()
    path.unlink()
    return content


HOSTILE = {
    "empty": (b"", "not a shard, or truncated: 0 bytes"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "not a shard, or truncated: 7 bytes"),
    "a header of no bytes": (framed("", b""), "not a shard, or truncated: 8 bytes"),
    "a header of 2⁶³ bytes": (framed("{}", b"", 1 << 63), "not a shard, or truncated"),
    "a header of one byte more than the file": (framed("{}", b"", 3), "not a shard, or truncated: 10 bytes"),
    "a header without tensors": (framed('{"__metadata__": {"mugv_ds.shard.1": "{}"}}', b""), "0 tensors"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "HTML": (b"<!DOCTYPE html><html>404</html>", "HTML"),
    "torch.save": (torch_saved(), "not a shard"),
    "no JSON": (framed("{'a': 1}"), "header is damaged"),
    "JSON that ends early": (framed('{"a": {'), "header is damaged"),
    "a list": (framed("[1, 2]"), "a list, not a JSON object"),
    "not UTF-8": (framed(b'{"\xff\xfe": {}}'), "not UTF-8 at byte 2"),
    "UTF-16": (framed(json.dumps(GOOD).encode("utf-16")), "not UTF-8"),
    "a million brackets": (framed('{"a":' + "[" * 10**6), "its header is damaged"),
    "many objects": (framed('{"a":' * 10**5), "its header is damaged"),
    "a number of 5000 digits": (framed('{"a": ' + "9" * 5000 + "}"), "its header is damaged"),
    "a tensor twice": (twice('"data_offsets": [12, 16]}', ', "b": {}'), "a key of it occurs twice"),
    "a field twice": (twice('"dtype": "BF16"', ', "dtype": "BF16"'), "a key of it occurs twice"),
    "a CRC twice": (with_crcs(json.dumps(CRCS)[:-1] + ', "a": "00000000"}'), "a key of it occurs twice"),
    "integers": (with_a(dtype="I64", shape=[2], data_offsets=[0, 16]), "'a' has dtype 'I64', and BF16, F16, F32 may"),
    "fp64": (with_a(dtype="F64"), "'a' has dtype 'F64'"),
    "fp8": (with_a(dtype="F8_E4M3"), "'a' has dtype 'F8_E4M3'"),
    "a dtype that is no text": (with_a(dtype=["BF16"]), "'a' has dtype"),
    "no dtype": (shard(GOOD | {"a": {"shape": [2, 3], "data_offsets": [0, 12]}}), "'a' is not described by"),
    "a field more": (with_a(strides=[0, 0]), "'a' is not described by dtype, shape and data_offsets"),
    "a tensor that is a number": (shard(GOOD | {"a": 1}), "'a' is not described by"),
    "NaN as a size": (with_a(shape=[2, float("nan")]), "NaN is no number"),
    "Infinity as a size": (with_a(shape=[2, float("inf")]), "Infinity is no number"),
    "a size of 3.0": (with_a(shape=[2, 3.0]), r"'a' has shape \[2, 3\.0\]"),
    "a size of true": (with_a(shape=[True, 6]), r"'a' has shape \[True, 6\]"),
    "sizes below zero": (with_a(shape=[-2, -3]), r"'a' has shape \[-2, -3\]"),
    "a size of zero": (with_a(shape=[0, 3], data_offsets=[0, 0]), r"'a' has shape \[0, 3\]"),
    "no sizes": (with_a(shape=[]), r"'a' has shape \[\]"),
    "nine sizes": (with_a(shape=[2, 3, *[1] * 7]), r"'a' has shape \[2, 3, 1"),
    "sizes in an object": (with_a(shape={"0": 2}), "'a' has shape"),
    "another product": (with_a(shape=[2, 4]), r"'a' has 12 bytes, and its shape \[2, 4\] of BF16 takes 16"),
    "a product of 2¹²⁴": (with_a(shape=[1 << 62, 1 << 62]), "'a' has 12 bytes, and its shape"),
    "overlapping": (shard(GOOD | {"b": GOOD["b"] | {"data_offsets": [8, 12]}}), "'b' begins at byte"),
    "the same bytes twice": (
        shard({"a": GOOD["a"], "b": GOOD["a"]}, METADATA, DATA[:12]), "'b' begins at byte"
    ),
    "a hole": (with_a(shape=[2, 2], data_offsets=[0, 8]), "'b' begins at byte .*, and what lies before it ends"),
    "beyond the file": (shard(data=DATA[:-1]), "its tensors end at byte .*, and the file has"),
    "bytes behind": (shard(data=DATA + b"x"), "its tensors end at byte .*, and the file has"),
    "offsets of 2⁶³": (with_a(data_offsets=[1 << 63, (1 << 63) + 12]), "begins at byte"),
    "an offset below zero": (with_a(data_offsets=[-12, 0]), "'a' begins at byte"),
    "offsets backwards": (with_a(data_offsets=[12, 0]), "'a' has -12 bytes"),
    "three offsets": (with_a(data_offsets=[0, 6, 12]), r"'a' has data_offsets \[0, 6, 12\]"),
    "offsets as text": (with_a(data_offsets=["0", "12"]), "'a' has data_offsets"),
    "no metadata": (framed(json.dumps(GOOD)), "no 'mugv_ds.shard.1'"),
    "another version": (shard(metadata={"mugv_ds.shard.2": json.dumps(CRCS)}), "no 'mugv_ds.shard.1'"),
    "metadata that are a list": (shard(metadata=[]), "__metadata__ are not texts"),
    "metadata of numbers": (with_crcs(CRCS, other=1), "__metadata__ are not texts"),
    "CRCs that are no JSON": (with_crcs("crc"), "header is damaged"),
    "CRCs that are deep": (with_crcs("[" * 10**5), "header is damaged"),
    "a CRC too few": (with_crcs({"a": CRCS["a"]}), "2 tensors, and CRC-32s of 1"),
    "a CRC too many": (with_crcs(CRCS | {"c": CRCS["a"]}), "2 tensors, and CRC-32s of 3"),
    "a CRC of another": (with_crcs({"a": CRCS["a"], "c": CRCS["b"]}), "2 tensors, and CRC-32s of 2"),
    "a CRC that is a number": (with_crcs(CRCS | {"a": 7}), "'a' has a CRC-32 of 7"),
    "a CRC of seven digits": (with_crcs(CRCS | {"a": CRCS["a"][1:]}), "'a' has a CRC-32 of"),
    "a CRC in capitals": (with_crcs(CRCS | {"a": "ABCDEF01"}), "'a' has a CRC-32 of 'ABCDEF01'"),
    "an empty key": (renamed(""), "'' cannot be the key"),
    "a key with a line end": (renamed("a\nb"), "cannot be the key"),
    "a key with a mark": (renamed("a#b"), "cannot be the key"),
    "a key that is no character": (framed(json.dumps({"__metadata__": {}, "\ud800": 1})), "header is damaged"),
}  # fmt: skip


def test_what_the_hostile_ones_are_made_of_is_a_shard(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(shard(metadata=METADATA | {"other": "text"}))
    assert read(path, "a").view(torch.uint8).flatten().tolist() == list(DATA[:12])
    assert read(path, "b").view(torch.uint8).tolist() == list(DATA[12:])


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_header_is_not_believed(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SampleError) as error:
        entries_of(path)
    file, _, reason = str(error.value).partition(": ")
    assert file == str(path)
    assert re.search(message, reason)
    assert "\n" not in reason and len(reason) < 600


def sparse(path: Path, header: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)


BOMBS = {
    "a header of 4 GB": lambda path: sparse(path, (1 << 32).to_bytes(8, "little"), (1 << 32) + 100),
    "a file of a terabyte": lambda path: sparse(path, framed("{}", b""), 1 << 40),
    "4 MB of brackets": lambda path: path.write_bytes(framed('{"a":' + "[],[" * ((1 << 20) - 20))),
    "4 MB of empty lists": lambda path: path.write_bytes(framed('{"a":[' + "[]," * ((1 << 22) // 3 - 10) + "[]]}")),
    "4 MB of numbers": lambda path: path.write_bytes(framed('{"a":[' + "1," * ((1 << 21) - 10) + "1]}")),
    "4 MB of tensors": lambda path: path.write_bytes(
        framed("{" + ",".join(f'"{i:06}":{{}}' for i in range((1 << 22) // 12)) + "}")
    ),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_costs_neither_time_nor_memory(tmp_path, bomb):
    path = tmp_path / "x.safetensors"
    bomb(path)
    assert verdict(entries_of, path).startswith(f"{path}: ")


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_to_a_header_is_named_or_harmless(tmp_path, seed):
    """A changed byte may be within a name; then the tensor of the old name is missing. Nothing else happens."""
    path, random = tmp_path / "x.safetensors", np.random.default_rng(seed)
    write_shard(path, {f"clip-{i}": drawn((24, 1, 2, 2), seed=i) for i in range(5)})
    whole = path.read_bytes()
    start = min(entry.offset for entry in entries_of(path).values())
    named = 0
    for _ in range(150):
        content = bytearray(whole)
        content[int(random.integers(start))] = int(random.integers(256))
        path.write_bytes(content)
        try:
            assert torch.equal(read(path, "clip-3"), drawn((24, 1, 2, 2), seed=3))
        except SampleError as error:
            assert str(error).startswith(str(path))
            named += 1
    assert named > 100


def parsed(parse, header: bytes, start: int, size: int) -> list | None:
    """The entries in their order, None for a header that is refused."""
    try:
        return list(parse(header, start, size).items())
    except (ValueError, PathError, RecursionError):
        return None


def test_a_header_as_it_is_written_is_read_the_short_way(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_shard(path, {f"clip {i}}},": drawn((24, 1 + i % 2, 2, 2), DTYPES[i % 3], i) for i in range(7)})
    long = entries_of(path)
    write_shard(path, {f"clip {i}": drawn((24, 1 + i % 2, 2, 2), DTYPES[i % 3], i) for i in range(7)})
    whole = entries_of(path)
    monkeypatch.setattr(shards, "_parse", None)
    assert entries_of(path) == whole and {key.removesuffix("},") for key in long} == whole.keys()


def test_the_short_way_never_says_anything_else(tmp_path):
    """Whatever is changed in a header: it is read as the whole parser of JSON reads it, or left to that."""
    path, random = tmp_path / "x.safetensors", np.random.default_rng(0)
    write_shard(path, {f"clip-{i}": drawn((24, 1, 2, 2), seed=i) for i in range(3)})
    content = path.read_bytes()
    start = min(entry.offset for entry in entries_of(path).values())
    signs = [b"", *(bytes([sign]) for sign in b'"\\{}[]:, \n\t0127aAtu\xc3')]

    def changed(header: bytes, at: int) -> Iterator[bytes]:
        for sign in random.choice(signs, 6, replace=False):
            yield from (header[:at] + sign + header[at + more :] for more in (0, 1))

    once = [other for at in range(8, start) for other in changed(content[8:start], at - 8)]
    twice = [next(changed(once[i], random.integers(start - 8))) for i in random.choice(len(once), 2000)]
    whole = content[8:start]
    wrong = [whole[whole.index(b"{", 30) :], whole.strip()[:-2], whole.replace(b"clip-1", b"clip-\xff")]
    cases, taken = [(header, start, len(content)) for header in (whole, *wrong, *once, *twice)], 0
    for text, _ in HOSTILE.values():
        end = 8 + int.from_bytes(text[:8], "little")
        header = text[8:end].replace(b": ", b":").replace(b", ", b",")
        cases.append((header, 8 + len(header), 8 + len(header) + len(text[end:])))
    for header, end, size in cases:
        short = shards._parse_plain(header, end, size)
        if short is not None:
            assert list(short.items()) == parsed(shards._parse, header, end, size), header
            taken += 1
    assert taken > 100, "as where a CRC-32 is another"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "missing"),
        (os.mkfifo, "a FIFO, not a regular file"),
        (Path.mkdir, "a directory, not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "a device, not a regular file"),
    ],
    ids=["missing", "FIFO", "directory", "device"],
)
def test_only_regular_files_are_opened(tmp_path, make, message):
    make(tmp_path / "x.safetensors")
    with pytest.raises(SampleError, match=rf"x\.safetensors: {message}"):
        entries_of(tmp_path / "x.safetensors")
