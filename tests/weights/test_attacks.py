"""Files that are made to hang, exhaust or kill whoever reads them: each is refused with one line."""

import io
import json
import os
import random
import re
import socket
import struct
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mugv_ds.data.sample import read_latent
from mugv_ds.files.tensor_archive import ArchiveError, read_archive
from mugv_ds.models import DiTConfig
from mugv_ds.models.codec import LinearCodec
from mugv_ds.weights.convert import open_weights
from mugv_ds.weights.megatron import MegatronLegacy, MegatronStacked, find_megatron
from mugv_ds.weights.published import PublishedWeights, load_dit
from mugv_ds.weights.torch_dist import Chunk, load_chunk
from tests.helpers.attack import verdict
from tests.helpers.limits import GIB

CONFIG = DiTConfig(144, 2, 2, caption_channels=16)

# Opcodes: } ) N are an empty dict, (), None; \x85 \x86 tuples of one and two; q and h put into and get from the memo.
SELF_SIMILAR = b")q\0" + b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(60))
DEEP = b")" + b"\x85" * 1_000_000


def write_archive(file: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """An archive of torch.save with this data.pkl and a storage of 4 KiB."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("x/version", "3\n")
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", bytes(4096))


def key_of(key: bytes) -> bytes:
    return b"\x80\x02}" + key + b"Ns."


def zeros_compressed(file: Path) -> None:
    """A small archive that unpacks to 2 GiB."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("x/version", "3\n")
        with archive.open("x/data.pkl", "w", force_zip64=True) as record:
            record.write(b"\x80\x02")
            for _ in range(128):
                record.write(bytes(1 << 24))
        archive.writestr("x/data/0", bytes(4096))


def many_records(file: Path) -> None:
    """A sound archive of torch.save, but that its directory names 3 million more records."""
    torch.save(torch.zeros(24, 1, 1, 1), file)
    with zipfile.ZipFile(file) as archive:
        start, folder = archive.start_dir, archive.namelist()[0].partition("/")[0].encode()
        known = len(archive.namelist())
    whole = file.read_bytes()
    directory = whole[start : whole.rindex(b"PK\x06\x06") if b"PK\x06\x06" in whole else whole.rindex(b"PK\x05\x06")]
    count, entry = 3_000_000, struct.Struct("<4sHHHHHHIIIHHHHHII")
    with file.open("wb") as out:
        out.write(whole[:start] + directory)
        for n in range(count):
            name = b"%s/%07d" % (folder, n)
            out.write(entry.pack(b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0) + name)
        end, total = out.tell(), known + count
        out.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, total, total, end - start, start))
        out.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        out.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def bind(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(file))


def sparse(file: Path) -> None:
    """64 GiB of zeros that take no disk."""
    file.touch()
    os.truncate(file, 64 * GIB)


FILES = {
    "self-similar key": (lambda file: write_archive(file, key_of(SELF_SIMILAR)), "a key that is neither"),
    "deep key": (lambda file: write_archive(file, key_of(DEEP)), "a key that is neither"),
    "deep value": (lambda file: write_archive(file, b"\x80\x02" + DEEP + b"."), "nested more than 100 deep"),
    "self-similar value": (lambda file: write_archive(file, b"\x80\x02" + SELF_SIMILAR + b"."), "objects, with those"),
    "holds itself": (lambda file: write_archive(file, b"\x80\x02]q\0h\0a."), "nested more than 100 deep"),
    "compressed": (zeros_compressed, "a compressed archive"),
    "large pickle": (lambda file: write_archive(file, b"\x80\x02" + b"]" * 60_000_000 + b"."), "small data.pkl"),
    "many records": (many_records, "too many records"),
    "legacy": (
        lambda file: torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False),
        "bare pickle",
    ),
    "sparse": (sparse, "not a file of torch.save"),
    "FIFO": (os.mkfifo, "a FIFO, not a regular file|holds no weights"),
    "directory": (lambda file: file.mkdir(), "a directory, not a regular file|holds no weights"),
    "socket": (bind, "a socket, not a regular file|holds no weights"),
    "device": (lambda file: file.symlink_to("/dev/zero"), "a device, not a regular file|holds no weights"),
}


def read_chunk(file: Path) -> None:
    load_chunk(Chunk((0,), (2,), file, 0, file.stat().st_size), torch.float32)


def read_rank(file: Path) -> None:
    (file.parent / "mp_rank_00").mkdir()
    (file.parent / "mp_rank_00/model_optim_rng.pt").symlink_to(file)
    MegatronLegacy(file.parent)


READERS = {
    "published": PublishedWeights,
    "Megatron": read_rank,
    "chunk": read_chunk,
    "sample": lambda file: read_latent(file, (1, 1, 1)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("attack", FILES)
def test_a_hostile_tensor_file_is_refused(tmp_path, monkeypatch, attack, reader):
    monkeypatch.chdir(tmp_path)  # the paths of sockets are short
    make, complaint = FILES[attack]
    make(tmp_path / "x.pt")
    line = verdict(READERS[reader], tmp_path / "x.pt")
    assert re.search(complaint, line) and str(tmp_path) in line, line


def metadata_of(key: bytes) -> bytes:
    return b"\x80\x04" + key_of(key)[2:]


METADATA = {
    "self-similar key": (lambda file: file.write_bytes(metadata_of(SELF_SIMILAR)), "a key that is neither"),
    "deep key": (lambda file: file.write_bytes(metadata_of(DEEP)), "a key that is neither"),
    "equal hashes": (
        lambda file: file.write_bytes(
            b"\x80\x04}("
            + b"".join(b"\x8a\x0c" + (n * (2**61 - 1)).to_bytes(12, "little") + b"N" for n in range(1, 100_000))
            + b"u."
        ),
        "keys that are numbers",
    ),
    "many opcodes": (lambda file: file.write_bytes(b"\x80\x04](" + b"]" * 60_000_000 + b"e."), "opcodes"),
    "sparse": (sparse, "larger than"),
}


@pytest.mark.parametrize("attack", METADATA)
def test_a_hostile_description_is_refused(tmp_path, attack):
    make, complaint = METADATA[attack]
    make(tmp_path / ".metadata")
    line = verdict(MegatronStacked, tmp_path)
    assert complaint in line and str(tmp_path / ".metadata") in line


@pytest.mark.parametrize("kind", [os.mkfifo, Path.mkdir], ids=["FIFO", "directory"])
def test_a_description_that_is_no_file_is_refused(tmp_path, kind):
    kind(tmp_path / ".metadata")
    assert ".metadata" in verdict(MegatronStacked, tmp_path)
    assert str(tmp_path) in verdict(open_weights, tmp_path)


@pytest.mark.parametrize("kind", [sparse, os.mkfifo], ids=["sparse", "FIFO"])
def test_a_hostile_config_is_refused(tmp_path, kind):
    torch.save({}, tmp_path / "dit.pt")
    kind(tmp_path / "config.json")
    assert "config.json: " in verdict(load_dit, tmp_path)


@pytest.mark.parametrize("kind", [sparse, lambda file: file.write_text("[" * 10**7)], ids=["sparse", "brackets"])
def test_a_hostile_index_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(asdict(CONFIG)))
    kind(tmp_path / "model.safetensors.index.json")
    assert "index.json: must hold a weight_map" in verdict(PublishedWeights, tmp_path)


def test_a_hostile_latest_iteration_is_refused(tmp_path):
    sparse(tmp_path / "latest_checkpointed_iteration.txt")
    assert "larger than 1,024 bytes" in verdict(find_megatron, tmp_path)


@pytest.mark.parametrize("kind", [sparse, os.mkfifo], ids=["sparse", "FIFO"])
def test_a_hostile_codec_is_refused(tmp_path, kind):
    kind(tmp_path / "codec.safetensors")
    assert "codec.safetensors: " in verdict(LinearCodec.load, tmp_path / "codec.safetensors")


def test_the_tensors_of_an_archive_in_the_middle_of_a_file_are_those_that_were_saved(tmp_path):
    """Chunks follow one another without regard to alignment."""
    values = [torch.randn(3, 5), torch.arange(7.0).to(torch.bfloat16), torch.zeros(0), torch.tensor(2.5)]
    places, file = [], tmp_path / "x.distcp"
    with file.open("wb") as out:
        out.write(b"x")
        for value in values:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            places.append((out.tell(), len(buffer.getvalue())))
            out.write(buffer.getvalue())
    for value, (start, length) in zip(values, places, strict=True):
        read = load_chunk(Chunk((0,) * value.dim(), tuple(value.shape), file, start, length), value.dtype)
        assert torch.equal(read, value)


def test_a_damaged_archive_is_read_or_refused_and_nothing_else(tmp_path):
    file, draw, refused = tmp_path / "x.pt", random.Random(0), 0
    torch.save({"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.ones(2).bool()}, file)
    sound = file.read_bytes()
    for _ in range(3000):
        damaged = bytearray(sound)
        for _ in range(draw.randint(1, 3)):
            at = draw.choice([draw.randrange(len(sound)), len(sound) - draw.randint(1, 700), draw.randrange(400)])
            damaged[at] = draw.choice([0, 255, draw.randrange(256)])
        file.write_bytes(damaged[: draw.choice([len(sound), draw.randint(1, len(sound))])])
        try:
            read_archive(file)
        except ArchiveError:
            refused += 1
    assert 1000 < refused < 3000
