"""A run's folder without ranks: the files, what a manifest may say, which checkpoint is taken, what is removed."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import BrokenCheckpointError, Parameter, Piece, digest
from mugv_ds.checkpoint.reader import CheckpointReader, open_checkpoint
from mugv_ds.config import CheckpointError
from mugv_ds.files import retry
from tests.helpers.attack import verdict
from tests.helpers.saved import write_checkpoint

TENSORS = {"a.weight": torch.arange(35.0).view(5, 7), "b": torch.tensor([1.5])}


def edit(folder: Path, change, sign: bool = True) -> None:
    """Changes a manifest; signed, as its hash says that it was written so."""
    body = json.loads((folder / files.MANIFEST_NAME).read_text())
    change(body)
    if sign:
        body.pop("sha256")
        body["sha256"] = digest(body)
    (folder / files.MANIFEST_NAME).write_text(json.dumps(body))


def test_files_are_safetensors(tmp_path):
    tensors = {"x": torch.randn(11), "y": torch.randn(3).bfloat16(), "empty": torch.empty(0)}
    entry = files.write_tensors(tmp_path / "file", tensors)
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in tensors.items())
    files.verify(tmp_path / "file", entry)
    (header,) = struct.unpack("<Q", (tmp_path / "file").read_bytes()[:8])
    assert header % 8 == 0


@pytest.mark.parametrize(("failures", "code", "ends"), [(3, errno.EIO, True), (4, errno.EROFS, False), (1, 28, False)])
def test_a_file_system_that_comes_back_is_waited_for(tmp_path, monkeypatch, failures, code, ends):
    """Not one that is full."""
    waits, left = [], [failures]
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    original = files.os.fsync

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, "away")
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    if ends:
        files.verify(tmp_path / "file", files.write_tensors(tmp_path / "file", TENSORS))
    else:
        with pytest.raises(OSError, match=rf"\[Errno {code}\] away: '.*file'"):
            files.write_tensors(tmp_path / "file", TENSORS)
    assert waits == [1.0, 5.0, 20.0][: 3 if code != 28 else 0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_pieces_make_the_whole_and_any_part(tmp_path, ranks):
    with open_checkpoint(write_checkpoint(tmp_path, 3, TENSORS.items(), ranks=ranks)) as saved:
        for name, value in TENSORS.items():
            assert torch.equal(saved.read(name), value)
        for start in range(35):
            part = torch.empty((35 - start + 1) // 2)
            saved.read_into(part, "a.weight", "weight", start)
            assert torch.equal(part, TENSORS["a.weight"].view(-1)[start : start + len(part)])
        with pytest.raises(CheckpointError, match=r"holds no ema_0\.1; it has weight"):
            saved.read("b", "ema_0.1")


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([(0, 3), (4, 2)], "element 3 is saved nowhere"),
        ([(0, 3), (2, 4)], "element 2 is saved twice"),
        ([(0, 5)], "5 elements are saved of 6"),
        ([(0, 7)], "7 elements are saved of 6"),
        ([], "0 elements are saved of 6"),
    ],
)
def test_every_element_is_saved_once(pieces, complaint):
    with pytest.raises(ValueError, match=complaint):
        Parameter(shape=(2, 3), pieces=tuple(Piece(rank=0, start=s, numel=n) for s, n in pieces))


def rename(name: str):
    def change(body) -> None:
        body["files"][name] = body["files"].pop("rank-1.weight.safetensors")

    return change


@pytest.mark.parametrize(
    ("change", "sign", "complaint"),
    [
        (lambda body: body.update(step=7), False, "its own hash differs"),
        (lambda body: body.update(step=7), True, "is of step 7"),
        (rename("../secret.safetensors"), True, "String should match pattern"),
        (rename("rank-1.weight.safetensors\n"), True, "String should match pattern"),
        (rename("/etc/passwd"), True, "String should match pattern"),
        (
            lambda body: body["files"].pop("rank-1.weight.safetensors"),
            True,
            "is in rank-1.weight.safetensors, which is",
        ),
        (lambda body: body["parameters"]["a.weight"]["pieces"].pop(), True, "elements are saved of 35"),
        (lambda body: body.update(extra=1), True, "extra"),
        (lambda body: body.pop("counters"), True, "counters"),
    ],
    ids=["changed", "other step", "leads out", "newline", "absolute", "file", "piece", "extra", "missing"],
)
def test_a_manifest_that_is_wrong_is_broken(tmp_path, change, sign, complaint):
    folder = write_checkpoint(tmp_path, 3, TENSORS.items())
    edit(folder, change, sign)
    with pytest.raises(BrokenCheckpointError, match=complaint) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"sha256": 1}', b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_is_broken(tmp_path, text):
    folder = write_checkpoint(tmp_path, 3, TENSORS.items())
    (folder / files.MANIFEST_NAME).write_bytes(text)
    with pytest.raises(BrokenCheckpointError, match="not a whole manifest"):
        open_checkpoint(tmp_path / "step-00000003")


def test_a_newer_format_is_refused_not_passed_over(tmp_path):
    write_checkpoint(tmp_path, 2, TENSORS.items())
    edit(write_checkpoint(tmp_path, 3, TENSORS.items()), lambda body: body.update(format=3, unknown=[1]))
    with pytest.raises(CheckpointError, match="format 3, this version of mugv_ds reads 2") as error:
        open_checkpoint(tmp_path)
    assert not isinstance(error.value, BrokenCheckpointError)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [(truncate, "bytes, the manifest says"), (flip, "SHA-256 differs"), (Path.unlink, "missing"), (link, "missing")],
)
def test_a_damaged_file_is_named(tmp_path, damage, complaint):
    folder = write_checkpoint(tmp_path, 3, TENSORS.items())
    damage(folder / "rank-1.weight.safetensors")
    with pytest.raises(BrokenCheckpointError, match=rf"rank-1\.weight\.safetensors: .*{complaint}"):
        open_checkpoint(folder)


def test_a_file_without_its_tensor_is_broken(tmp_path):
    """The hash is right: it was written so."""
    folder = write_checkpoint(tmp_path, 3, TENSORS.items())
    path = folder / "rank-0.weight.safetensors"
    path.unlink()
    entry = files.write_tensors(path, {"other/weight": torch.zeros(1)})
    edit(folder, lambda body: body["files"].update({path.name: entry.model_dump()}))
    with open_checkpoint(folder) as saved, pytest.raises(BrokenCheckpointError, match=r"rank-0\.weight\.safetensors"):
        saved.read("a.weight")


@pytest.mark.parametrize(
    ("latest", "note"),
    [
        ("step-00000003\n", None),
        ("step-00000002", None),  # killed before it could be replaced
        ("step-00000009", "names step-00000009, which is not there"),
        ("", "empty"),
        (None, "missing"),
    ],
)
def test_the_checkpoints_decide_which_is_newest(tmp_path, latest, note):
    for step in (2, 3):
        write_checkpoint(tmp_path, step, TENSORS.items())
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-6").mkdir()
    (tmp_path / "step-00000007").symlink_to("step-00000002")
    (tmp_path / "latest").unlink()
    if latest is not None:
        (tmp_path / "latest").write_text(latest)
    steps, said = files.candidates(tmp_path)
    assert steps == [3, 2] and (said or "").endswith("" if note is None else "the folder is scanned")
    assert note is None or note in said
    assert open_checkpoint(tmp_path).manifest.step == 3


def test_latest_without_checkpoints_is_no_fresh_start(tmp_path):
    assert files.candidates(tmp_path) == ([], None)
    (tmp_path / "latest").write_text("step-00000004")
    with pytest.raises(CheckpointError, match=r"names step-00000004, but .* holds no checkpoint"):
        files.candidates(tmp_path)


def test_only_what_a_run_left_over_is_swept(tmp_path):
    kept = ["step-00000004", "step-x.tmp", "notes.tmp", "elsewhere"]
    for name in [*kept, "step-00000005.tmp", "step-00000003.removed.tmp"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / "step-00000008.tmp").symlink_to("elsewhere")
    (tmp_path / "latest.tmp").touch()
    files.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "step-00000008.tmp"}
    assert (tmp_path / "elsewhere/file").exists()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "newest", "gone"),
    [
        (3, 0, 7, [4, 3, 2, 1]),
        (1, 0, 7, [6, 5, 4, 3, 2, 1]),
        (2, 4, 7, [5, 3, 2, 1]),
        (2, 0, 5, [3, 2, 1]),  # 6 and 7 were passed over, they must not push out what is sound
        (9, 0, 7, []),
    ],
)
def test_which_checkpoints_go(keep_last, keep_every, newest, gone):
    assert files.expired([3, 1, 2, 7, 6, 5, 4], newest, keep_last, keep_every) == gone


def test_removal_leaves_nothing_half_valid(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 3, TENSORS.items())

    def die(path) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(files.shutil, "rmtree", die)
    with pytest.raises(OSError, match="killed here"):
        files.remove(tmp_path, 3)
    monkeypatch.undo()
    assert files.saved_steps(tmp_path) == []
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.glob("step-*")] == []


def test_one_run_at_a_time(tmp_path):
    lock = files.Lock(tmp_path)
    with pytest.raises(CheckpointError, match=r"lock: another run uses this folder \(process \d+ on "):
        files.Lock(tmp_path)
    lock.release()
    files.Lock(tmp_path).release()


def test_a_config_of_another_version_is_named(tmp_path):
    folder = write_checkpoint(tmp_path, 3, TENSORS.items())
    manifest = files.read_manifest(folder)
    manifest.config["model"]["presets"] = 1
    with pytest.raises(CheckpointError, match=r"its config: model\.presets: .*must be read with mugv_ds 0\.1\.0"):
        CheckpointReader(folder, manifest).run_config()


@pytest.mark.parametrize("kind", [os.mkfifo, Path.mkdir], ids=["FIFO", "directory"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("latest", files.candidates),
        ("step-00000004/MANIFEST.json", lambda run: files.read_manifest(run / "step-00000004")),
    ],
    ids=["latest", "manifest"],
)
def test_what_is_no_file_is_not_waited_for(tmp_path, name, read, kind):
    write_checkpoint(tmp_path, 4, TENSORS.items())
    (tmp_path / name).unlink()
    kind(tmp_path / name)
    assert verdict(read, tmp_path).startswith(f"{tmp_path / name}: a ")
