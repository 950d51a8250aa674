import errno
import logging
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from mugv_ds.config.errors import TrainingError, TransientError
from mugv_ds.config.model import MAX_LATENT_SIDE
from mugv_ds.data import headers
from mugv_ds.data import manifest as manifest_module
from mugv_ds.data.manifest import ManifestError, PathError, build_index, open_index
from mugv_ds.data.paths import resolve
from mugv_ds.files.tensor_file import UnsafeFileError
from mugv_ds.models.rope import patch_grid
from tests.helpers.attack import verdict

HEADER = "sample_id,source,latent_path,text_feat_path"
SIZED = HEADER + ",num_frames,height,width"
ROW = "a,generated,latents/a.pt,text/a.pt,41,360,640"


def manifest(folder, *lines, header=SIZED, end="\n"):
    path = folder / "train.csv"
    path.write_text("".join(line + end for line in (header, *lines)), newline="")
    return path


def save_latent(folder, name, shape=(24, 2, 4, 6), dtype=torch.bfloat16):
    (folder / "latents").mkdir(exist_ok=True)
    torch.save(torch.zeros(shape, dtype=dtype), folder / "latents" / name)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "empty"),
        (b"\n\n", 1, "empty"),
        (SIZED.encode(), 1, "only a header"),
        (b"sample_id,source,latent_path\na,real,x\n", 1, "missing column 'text_feat_path'"),
        (f"{HEADER},fps,fps\n".encode(), 1, "duplicate column 'fps'"),
        (f"{SIZED}\n{ROW}\nb{ROW[1:]}\n{ROW}\n".encode(), 4, "duplicate sample_id, first used in line 2"),
        (f"{SIZED}\n{ROW[1:]}\n".encode(), 2, "blank sample_id"),
        (f"{SIZED}\n  {ROW[1:]}\n".encode(), 2, "blank sample_id"),
        (f"{SIZED}\n{ROW.replace('generated', 'Real')}\n".encode(), 2, "unknown source 'Real'"),
        (f"{SIZED}\n{ROW.replace('generated', '')}\n".encode(), 2, "unknown source ''"),
        (f"{SIZED}\n{ROW}\nb\0{ROW[1:]}\n".encode(), 3, "NUL"),
        (f"{SIZED}\n{ROW}\n".encode() + b"\xff" + ROW.encode(), 3, "not UTF-8"),
        (f"{SIZED}\n{ROW}\n".encode("utf-16"), 1, "NUL|UTF-8"),
        (f"{SIZED}\n{ROW}\nb,real,x\n".encode(), 3, "3 values, the header has 7"),
        (f"{SIZED}\n{ROW},more\n".encode(), 2, "8 values, the header has 7"),
        (f'{SIZED}\n{ROW}\n"b{ROW[1:]}\nc{ROW[1:]}\n'.encode(), 3, "quote"),
        (f'{SIZED}\n"a"b{ROW[1:]}\n'.encode(), 2, "quote"),
        (f"{SIZED}\n{ROW}{'x' * (1 << 20)}\n".encode(), 2, "longer than"),
        (f"{SIZED}\n{ROW.replace('41', '-1')}\n".encode(), 2, "num_frames = '-1'"),
        (f"{SIZED}\n{ROW.replace('41', '0')}\n".encode(), 2, "num_frames = '0'"),
        (f"{SIZED}\n{ROW.replace('640', '640.0')}\n".encode(), 2, "width = '640.0'"),
        (f"{SIZED}\n{ROW.replace('360', '361')}\n".encode(), 2, "height = 361: must be a multiple of 8"),
        (f"{SIZED},fps\n{ROW},nan\n".encode(), 2, "fps = 'nan'"),
        (f"{SIZED},fps\n{ROW},0\n".encode(), 2, "fps = '0'"),
        (f"{SIZED},fps\n{ROW},0.09\n".encode(), 2, "fps = '0.09': must be a number from 0.1 to 1000"),
        (f"{SIZED},fps\n{ROW},1001\n".encode(), 2, "fps = '1001': must be a number from 0.1 to 1000"),
        (f"{SIZED}\n{ROW.replace('640', '6152')}\n".encode(), 2, "width = '6152': .* 1 to 6144, as far as the model"),
        (f"{SIZED}\n{ROW.replace('360', '6152')}\n".encode(), 2, "height = '6152': .* 1 to 6144, as far as the model"),
        (f"{SIZED}\n{ROW.replace('41', '100001')}\n".encode(), 2, "num_frames = '100001': .* from 1 to 100000"),
        (f"{SIZED},label\n{ROW},meh\n".encode(), 2, "unknown label 'meh'"),
        (f"{SIZED},kind\n{ROW},audio\n".encode(), 2, "unknown kind 'audio'"),
        (f"{SIZED},rank\n{ROW},first\n".encode(), 2, "rank = 'first'"),
    ],
)
def test_bad_manifest(tmp_path, content, line, message):
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message) as error:
        open_index(path)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert list(tmp_path.glob(".index/*")) == []


@pytest.mark.parametrize("block", [1, 40, 64])
def test_a_csv_is_read_by_blocks(tmp_path, monkeypatch, block):
    """Whatever the bytes that are read at once, the rows are the same, and so are the lines of what is wrong."""
    path, rows = tmp_path / "train.csv", ["", ROW, f'"b\nü"{ROW[1:]}', "", "", f"c{ROW[1:]}"]
    text = "\n".join([f"\ufeff{SIZED}", *rows]).encode()
    monkeypatch.setattr(manifest_module, "_BLOCK_BYTES", block)
    path.write_bytes(text)
    assert open_index(path).column("sample_id").to_pylist() == ["a", "b\nü", "c"]
    for more, line, message in [
        (b"\n\nd,real", 10, "2 values"),
        (b"\nd\0", 9, "NUL"),
        (b"\n\n\xff,", 10, "not UTF-8"),
        (b"\n\n\n" + b"x" * (1 << 20), 11, "longer than"),
        (b"\n\xef\xbb\xbfd,", 9, "2 values"),
    ]:
        path.write_bytes(text + more)
        with pytest.raises(ManifestError, match=message) as error:
            open_index(path)
        assert str(error.value).startswith(f"{path}:{line}: ")


def test_ids_of_the_same_hash_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "hash", lambda sample_id: -1, raising=False)
    rows = [f"{name}{ROW[1:]}" for name in "abcdbc"]
    assert len(open_index(manifest(tmp_path, *rows[:4]))) == 4
    with pytest.raises(ManifestError, match=r"train\.csv:6: duplicate sample_id, first used in line 3$"):
        open_index(manifest(tmp_path, *rows))


def test_no_manifest(tmp_path):
    with pytest.raises(ManifestError, match=r"none\.csv: no such file"):
        open_index(tmp_path / "none.csv")


@pytest.mark.parametrize("column", ["latent_path", "text_feat_path"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../../etc/passwd", "leads out"),
        ("latents/../../x.pt", "leads out"),
        ("..", "leads out"),
        ("/etc/passwd", "absolute"),
        ("pipe:cat x", "URL or pipe"),
        ("https://host/x.pt", "URL or pipe"),
        ("file:///etc/passwd", "URL or pipe"),
        ("", "must name a file"),
    ],
)
def test_bad_path_when_indexed(tmp_path, column, path, message):
    values = {"latent_path": "a.pt", "text_feat_path": "b.pt"} | {column: path}
    csv = manifest(tmp_path, ROW, f"b,real,{values['latent_path']},{values['text_feat_path']},41,360,640")
    with pytest.raises(PathError, match=message) as error:
        open_index(csv)
    assert str(error.value).startswith(f"{csv}:3: {column} ")


def make_entry(root, kind):
    entry = root / "entry"
    targets = {"link out": root.parent, "link to a file out": root.parent / "secret.pt", "device": "/dev/zero"}
    if kind in targets:
        entry.symlink_to(targets[kind])
        return "entry/secret.pt" if kind == "link out" else "entry"
    if kind == "loop":
        entry.symlink_to(entry)
    elif kind == "fifo":
        os.mkfifo(entry)
    elif kind == "directory":
        entry.mkdir()
    return "x" * 300 if kind == "too long" else "entry"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("link out", "leads out"),
        ("link to a file out", "leads out"),
        ("device", "leads out"),
        ("fifo", "not a regular file"),
        ("directory", "not a regular file"),
        ("loop", "loop"),
        ("too long", "too long"),
    ],
)
def test_bad_path_when_read(tmp_path, kind, message):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.pt").write_bytes(b"x")
    relative = make_entry(root, kind)
    with pytest.raises(PathError, match=f"(?i){message}") as error:
        resolve(root, relative)
    assert repr(relative) in str(error.value)
    with pytest.raises(PathError, match=f"(?i){message}") as error:
        open_index(manifest(root, f"a,real,{relative},t.pt", header=HEADER))
    assert "train.csv:2: latent_path: " in str(error.value)


def test_good_paths(tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "a.pt").write_bytes(b"x")
    (root / "link").symlink_to(root / "real")
    (tmp_path / "alias").symlink_to(root)
    expected = (root / "real" / "a.pt").resolve()
    for base, relative in [
        (root, "real/a.pt"),
        (root, "link/a.pt"),
        (root, "x/../real/a.pt"),
        (tmp_path / "alias", "link/a.pt"),
    ]:
        assert resolve(base, relative) == expected
    assert resolve(root, "real/none.pt") == root.resolve() / "real" / "none.pt"


def test_vanished_root_is_not_a_missing_sample(tmp_path):
    with pytest.raises(FileNotFoundError):
        resolve(tmp_path / "gone", "a.pt")


def test_columns(tmp_path):
    csv = manifest(
        tmp_path,
        'a,real,l/a.pt,t/a.pt,24,120,720,1280,"two, words\nand a line",video,good,p1,0,kept out',
        "ü,generated,l/b.pt,t/b.pt,,1,360,640,,,,,,",
        "",
        "c,real,l/c.pt,t/c.pt,29.97,9,8,8,,image,,,,",
        header=f"{HEADER},fps,num_frames,height,width,caption,kind,label,pair_id,rank,other",
    )
    index = open_index(csv)
    assert (len(index), index.root) == (3, tmp_path)
    a, b, c = (index.row(i) for i in range(3))
    assert (a.sample_id, a.source, a.latent_path, a.text_feat_path) == ("a", "real", "l/a.pt", "t/a.pt")
    assert (a.fps, a.latent_shape, a.height, a.width) == (24.0, (15, 90, 160), 720, 1280)
    assert (a.caption, a.kind, a.label, a.pair_id, a.rank) == ("two, words\nand a line", "video", "good", "p1", 0)
    assert (b.sample_id, b.fps, b.latent_shape) == ("ü", None, (1, 45, 80))
    assert (b.caption, b.kind, b.label, b.pair_id, b.rank) == (None,) * 5
    assert (c.fps, c.latent_shape) == (29.97, (2, 1, 1))
    assert index.shapes().tolist() == [[15, 90, 160], [1, 45, 80], [2, 1, 1]]
    assert len(pickle.dumps(index)) < 10_000
    assert pickle.loads(pickle.dumps(index)).row(1) == b


@pytest.mark.parametrize("row", [1, -2])
def test_there_is_no_such_row(tmp_path, row):
    with pytest.raises(IndexError):
        open_index(manifest(tmp_path, ROW)).row(row)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_byte_order_mark_and_line_ends(tmp_path, mark, end):
    csv = manifest(tmp_path, ROW, end=end)
    csv.write_bytes(mark + csv.read_bytes())
    assert open_index(csv).row(0).width == 640


def test_shape_from_the_latent(tmp_path):
    save_latent(tmp_path, "a.pt", (24, 3, 5, 7))
    save_latent(tmp_path, "b.pt", (24, 1, 2, 2), torch.float32)
    csv = manifest(tmp_path, "a,real,latents/a.pt,t,,40,", "b,real,latents/b.pt,t,,,", ROW.replace("a", "c", 1))
    index = open_index(csv)
    assert index.shapes().tolist() == [[3, 5, 7], [1, 2, 2], [6, 45, 80]]
    assert (index.row(0).height, index.row(0).width) == (40, 56)


def test_row_that_contradicts_its_latent(tmp_path):
    save_latent(tmp_path, "a.pt", (24, 3, 5, 7))
    with pytest.raises(ManifestError, match=r"train\.csv:2: height = 48 means 6 in the latent, but .*a\.pt has 5"):
        open_index(manifest(tmp_path, "a,real,latents/a.pt,t,,48,"))


def test_unreadable_latents_are_left_out_and_told(tmp_path, caplog):
    save_latent(tmp_path, "a.pt")
    save_latent(tmp_path, "five.pt", (1, 24, 2, 4, 6))
    rows = [f"{name},real,latents/{name}.pt,t" for name in ("none", "a", "five")]
    csv = manifest(tmp_path, *rows, header=HEADER)
    with caplog.at_level(logging.WARNING):
        index = open_index(csv)
    assert index.shapes().tolist() == [[0, 0, 0], [2, 4, 6], [0, 0, 0]]
    for message in [
        "train.csv:2: ",
        "none.pt: missing",
        "train.csv:4: ",
        "five.pt: shape [1, 24, 2, 4, 6]",
        "2 of 3 rows",
    ]:
        assert message in caplog.text
    caplog.clear()
    open_index(csv)
    assert "2 of 3 rows are left out" in caplog.text


def test_no_readable_latent(tmp_path):
    with pytest.raises(
        ManifestError, match=r"no row has a readable latent; the first: .*train\.csv:2: .*a\.pt: missing"
    ):
        open_index(manifest(tmp_path, "a,real,latents/a.pt,t", header=HEADER))
    assert list((tmp_path / ".index").iterdir()) == []


def test_code_in_a_latent_stops_the_index(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/sentinel",)

    save_latent(tmp_path, "a.pt")
    torch.save(Payload(), tmp_path / "latents" / "b.pt")
    with pytest.raises(UnsafeFileError, match=r"b\.pt"):
        open_index(manifest(tmp_path, *(f"{n},real,latents/{n}.pt,t" for n in "ab"), header=HEADER))
    assert not (tmp_path / "sentinel").exists()


def test_index_is_kept_until_the_csv_changes(tmp_path):
    csv = manifest(tmp_path, ROW)
    first = build_index(csv)
    written = first.stat().st_mtime_ns
    assert build_index(csv) == first
    assert first.stat().st_mtime_ns == written
    assert first.parent == tmp_path / ".index"
    manifest(tmp_path, ROW, "b" + ROW[1:])
    assert len(open_index(csv)) == 2
    assert open_index(csv, tmp_path / "elsewhere").digest == open_index(csv).digest == build_index(csv).name[:64]
    names = {build_index(csv).with_suffix(end).name for end in (".arrow", ".shapes.npy", ".buckets.npy", ".json")}
    assert {p.name for p in (tmp_path / "elsewhere").iterdir()} == names


def test_two_builders_at_once_and_one_killed(tmp_path):
    csv = manifest(tmp_path, *(f"{i}{ROW[1:]}" for i in range(20_000)))
    build = [sys.executable, "-c", f"from mugv_ds.data.manifest import build_index; build_index({str(csv)!r})"]
    builders = [subprocess.Popen(build) for _ in range(3)]
    while not list(tmp_path.glob(".index/*.tmp")):
        assert any(builder.poll() is None for builder in builders)
        time.sleep(0.01)
    builders[0].kill()
    assert [builder.wait() for builder in builders[1:]] == [0, 0]
    builders[0].wait()
    assert len(list(tmp_path.glob(".index/*.arrow"))) == 1
    assert open_index(csv).row(19_999).sample_id == "19999"


def test_many_rows(tmp_path):
    csv = manifest(tmp_path, *(f"clip-{i}{ROW[1:]}" for i in range(100_000)))
    begin = time.monotonic()
    index = open_index(csv)
    assert time.monotonic() - begin < 10
    assert (len(index), index.row(99_999).sample_id, index.shapes().shape) == (100_000, "clip-99999", (100_000, 3))


def test_random_manifest(tmp_path):
    """What the tool draws to measure with is a manifest, with the shares that it states."""
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools/make_random_data.py"))
    tool["main"](["--out", str(tmp_path), "--manifest-only", "--samples", "20000"])
    index = open_index(tmp_path / "train.csv")
    shapes, counts = np.unique(index.shapes(), axis=0, return_counts=True)
    assert (len(index), len(shapes)) == (20_000, 35)
    assert len(pickle.dumps(index)) < 1000, "by its path: each loader worker opens it"
    shares = {tuple(shape): count / len(index) for shape, count in zip(shapes.tolist(), counts.tolist(), strict=True)}
    assert shares[1, 45, 80] == pytest.approx(0.3 * 0.4, rel=0.1)
    assert shares[15, 160, 90] == pytest.approx(0.175 * 0.03, rel=0.4)
    assert {index.row(i).kind for i in np.flatnonzero(index.shapes()[:, 0] == 1)[:50].tolist()} == {"image"}


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (",".join(map(str, range(140_000))), "140000 columns, at most 1000 are allowed"),
        (",".join([*map(str, range(900)), "0"]), "duplicate column '0'"),
        ("x" * 5000 + ",b", "missing column 'sample_id'"),
    ],
    ids=["wide", "twice", "long"],
)
def test_a_header_that_is_none_is_refused_with_one_short_line(tmp_path, header, complaint):
    csv = tmp_path / "wide.csv"
    csv.write_text(f"{header}\n")
    line = verdict(open_index, csv)
    assert line.startswith(f"{csv}:1: ") and complaint in line


def test_the_largest_sides_have_positions(tmp_path, caplog):
    """The CSV's limit is the model's, and a latent beyond it is left out like a bad file."""
    most = f"{MAX_LATENT_SIDE * 8}"
    assert open_index(manifest(tmp_path, ROW.replace("640", most))).shapes()[0, 2] == MAX_LATENT_SIDE
    assert patch_grid(1, 1, MAX_LATENT_SIDE).width == MAX_LATENT_SIDE // 2
    with pytest.raises(ValueError, match="at most"):
        patch_grid(1, 1, MAX_LATENT_SIDE + 1)
    save_latent(tmp_path, "wide.pt", (24, 1, 1, MAX_LATENT_SIDE + 1))
    index = open_index(manifest(tmp_path, ROW, "b,real,latents/wide.pt,t,,,"))
    assert index.shapes().tolist() == [[6, 45, 80], [0, 0, 0]]
    assert "train.csv:3: " in caplog.text
    assert f"sides of at most {MAX_LATENT_SIDE}" in caplog.text


def cut_at_a_record(path):
    with path.open("rb") as file:
        table = pa.ipc.open_stream(file).read_all()
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(0, len(table) // 2))


def flip_a_byte(path, at=-3):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flip_an_id(path):
    flip_a_byte(path, path.read_bytes().index(b"clip-1clip-2"))


DAMAGES = {
    "cut at a record": (".arrow", cut_at_a_record),
    "cut anywhere": (".arrow", lambda path: path.write_bytes(path.read_bytes()[:-100])),
    "emptied": (".arrow", lambda path: path.write_bytes(b"")),
    "gone": (".arrow", Path.unlink),
    "other ids": (".arrow", flip_an_id),
    "other shapes": (".shapes.npy", flip_a_byte),
    "shapes cut": (".shapes.npy", lambda path: path.write_bytes(path.read_bytes()[:-12])),
    "other buckets": (".buckets.npy", flip_a_byte),
    "no facts": (".json", lambda path: path.write_text("{}")),
    "no JSON": (".json", lambda path: path.write_bytes(b"\xff")),
    "other number of rows": (".json", lambda path: path.write_text(path.read_text().replace('"rows": 8', '"rows": 7'))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_built_anew(tmp_path, caplog, damage, monkeypatch):
    monkeypatch.setattr(manifest_module, "_CHUNK_ROWS", 4)
    csv = manifest(tmp_path, *(f"clip-{i}{ROW[1:]}" for i in range(8)))
    path, content = build_index(csv), open_index(csv).content
    suffix, harm = DAMAGES[damage]
    harm(path.with_suffix(suffix))
    index = open_index(csv)
    assert [index.row(i).sample_id for i in range(len(index))] == [f"clip-{i}" for i in range(8)]
    assert (index.shapes() == (6, 45, 80)).all()
    assert index.buckets().rows_of_shape((6, 45, 80)).tolist() == list(range(8))
    assert index.content == content
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(str(path))
    assert told.endswith("; the index is built anew")
    assert "\n" not in told


def test_csv_that_grows_while_it_is_read(tmp_path, monkeypatch):
    csv = manifest(tmp_path, ROW)

    def read_while_it_grows(*args):
        with csv.open("a") as file:
            file.write(f"b{ROW[1:]}\n")
        return headers.read_shapes(*args)

    monkeypatch.setattr(manifest_module, "read_shapes", read_while_it_grows)
    with pytest.raises(ManifestError, match=r"train\.csv: changed while it was being read; start again"):
        open_index(csv)
    assert list(tmp_path.glob(".index/*")) == []
    monkeypatch.undo()
    assert len(open_index(csv)) == 2


def test_digests(tmp_path, monkeypatch):
    """Of the ids: whatever Arrow's chunks. Of the content: other where a latent cannot be read."""
    lines = [f"{name},real,latents/a.pt,t" for name in ("a", "bc", "ü", "d", "ef")]
    save_latent(tmp_path, "a.pt")
    csv = manifest(tmp_path, *lines, header=HEADER)
    one = open_index(csv, tmp_path / "one")
    monkeypatch.setattr(manifest_module, "_CHUNK_ROWS", 2)
    many = open_index(csv, tmp_path / "many")
    assert many.column("sample_id").num_chunks > one.column("sample_id").num_chunks
    assert many.ids_digest() == one.ids_digest()
    assert (many.content, len(many.content)) == (one.content, 64)

    other = manifest(tmp_path, *(line.replace("bc", "b").replace("ü", "cü") for line in lines), header=HEADER)
    assert open_index(other).ids_digest() != one.ids_digest(), "the same letters, cut in another way"

    manifest(tmp_path, *lines[:-1], "ef,real,latents/b.pt,t", header=HEADER)
    without = open_index(csv, tmp_path / "without")
    save_latent(tmp_path, "b.pt")
    with_ = open_index(csv, tmp_path / "with")
    assert without.digest == with_.digest
    assert without.ids_digest() == with_.ids_digest()
    assert without.content != with_.content


def test_shapes_are_one_read_only_array(tmp_path):
    index = open_index(manifest(tmp_path, ROW))
    assert index.shapes() is index.shapes()
    assert index.shapes().dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        index.shapes()[0] = 0
    assert pickle.loads(pickle.dumps(index)).content == index.content


@pytest.fixture
def small_parts(monkeypatch):
    """A process for any number of headers, and parts of ten rows."""
    monkeypatch.setattr(headers, "_FEW", 0)
    monkeypatch.setattr(headers.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(headers, "_PART_ROWS", 10)
    monkeypatch.setattr(headers, "_TASK_ROWS", 3)


def headers_only(folder, rows, name="a"):
    """A manifest without sizes, of rows that alternate between two latents."""
    save_latent(folder, f"{name}0.pt", (24, 2, 4, 6))
    save_latent(folder, f"{name}1.pt", (24, 3, 4, 6))
    return manifest(folder, *(f"{i},real,latents/{name}{i % 2}.pt,t" for i in range(rows)), header=HEADER)


ALTERNATING = [[2, 4, 6], [3, 4, 6]]


@pytest.mark.parametrize(("waited", "threads"), [(0.9, 1), (1.1, 4)])
def test_headers_are_read_in_threads_where_that_is_waiting(monkeypatch, waited, threads):
    clock, together = iter([0.0, 1.0 + waited]), threading.Barrier(threads)
    monkeypatch.setattr(headers.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(headers.time, "thread_time", iter([0.0, 1.0]).__next__)

    def read(i):
        if i:
            together.wait(timeout=60)
        return i * i

    assert headers.read_all(read, range(9), 4) == [i * i for i in range(9)]


def test_headers_read_in_processes(tmp_path, small_parts, caplog):
    csv = headers_only(tmp_path, 31)
    csv.write_text(csv.read_text() + "bad,real,latents/none.pt,t\n")
    index = open_index(csv)
    assert index.shapes().tolist() == [*(ALTERNATING * 16)[:31], [0, 0, 0]]
    assert re.search(r"train\.csv:33: .*none\.pt: missing", caplog.text)
    assert not list(tmp_path.glob(".index/*.parts"))


def test_errors_come_from_processes(tmp_path, small_parts):
    csv = headers_only(tmp_path, 25)
    (tmp_path / "latents/fifo").mkdir()
    csv.write_text(csv.read_text() + "bad,real,latents/fifo,t\n")
    with pytest.raises(PathError, match=r"train\.csv:27: latent_path: .* not a regular file"):
        open_index(csv)


def test_a_process_that_is_killed_ends_the_build_and_the_next_goes_on(tmp_path, small_parts, monkeypatch):
    csv = headers_only(tmp_path, 45)
    keep = headers._keep_part

    def keep_and_kill(parts, start, shapes):
        keep(parts, start, shapes)
        if start == 20:
            for child in multiprocessing.active_children():
                child.kill()

    monkeypatch.setattr(headers, "_keep_part", keep_and_kill)
    with pytest.raises(TrainingError, match=r"killed, .* after 30 of 45; start again"):
        open_index(csv)
    monkeypatch.setattr(headers, "_keep_part", keep)
    assert len(list(tmp_path.glob(".index/*.parts/*.npy"))) == 3

    asked = []
    monkeypatch.setattr(headers.Latents, "take", spy(headers.Latents.take, asked))
    assert open_index(csv).shapes().tolist() == (ALTERNATING * 23)[:45]
    assert np.concatenate(asked).tolist() == list(range(30, 45))
    assert not list(tmp_path.glob(".index/*.parts"))


def spy(function, asked):
    def take(self, rows):
        asked.append(rows)
        return function(self, rows)

    return take


def test_a_damaged_part_is_told_and_read_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(headers, "_PART_ROWS", 10)
    csv = headers_only(tmp_path, 20)
    parts = build_index(csv).with_suffix(".parts")
    build_index(csv).with_suffix(".json").unlink()
    parts.mkdir()
    (parts / f"{0:012}.npy").write_bytes(b"\x93NUMPY")
    np.save(parts / f"{10:012}.npy", np.ones((3, 3), np.int32))
    assert open_index(csv).shapes().tolist() == ALTERNATING * 10
    assert "damaged" in caplog.text
    assert "not a part of this manifest" in caplog.text


def descendants(pid):
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(pid for child in children for pid in descendants(child))]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_end_with_a_builder_that_is_killed(tmp_path):
    csv = headers_only(tmp_path, 60_000)
    code = f"from mugv_ds.data import headers, manifest\nheaders._PART_ROWS = 200\nmanifest.build_index({str(csv)!r})"
    builder = subprocess.Popen([sys.executable, "-c", code])
    while not list(tmp_path.glob(".index/*.parts/*.npy")):
        assert builder.poll() is None
        time.sleep(0.01)
    workers = descendants(builder.pid)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    assert workers
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in workers):
        assert time.monotonic() < deadline, "processes outlive the builder"
        time.sleep(0.05)
    assert not list(tmp_path.glob(".index/*.json"))


def test_only_the_headers_of_new_rows_are_read(tmp_path, monkeypatch):
    csv = headers_only(tmp_path, 12)
    csv.write_text(csv.read_text() + "late,real,latents/late.pt,t\n")
    old = open_index(csv)
    assert old.shapes()[12].tolist() == [0, 0, 0]
    asked = []
    monkeypatch.setattr(headers.Latents, "take", spy(headers.Latents.take, asked))
    save_latent(tmp_path, "late.pt", (24, 5, 4, 6))
    csv.write_text(csv.read_text() + "new,real,latents/a1.pt,t\n")
    new = open_index(csv)
    assert new.shapes().tolist() == [*ALTERNATING * 6, [5, 4, 6], [3, 4, 6]]
    assert np.concatenate(asked).tolist() == [12, 13], "the new row, and the one that could not be read before"


def test_a_last_line_that_went_on_is_read_again(tmp_path):
    csv = headers_only(tmp_path, 3)
    save_latent(tmp_path, "a0.pt0.pt", (24, 7, 4, 6))
    rows = "\n".join(f"{i},real,t,latents/a{i % 2}.pt" for i in range(3))
    csv.write_text(f"sample_id,source,text_feat_path,latent_path\n{rows}")
    assert open_index(csv).shapes().tolist() == [[2, 4, 6], [3, 4, 6], [2, 4, 6]]
    csv.write_text(csv.read_text() + "0.pt\n")
    assert open_index(csv).shapes().tolist() == [[2, 4, 6], [3, 4, 6], [7, 4, 6]]


def test_an_older_csv_of_another_folder_is_not_taken(tmp_path):
    shapes = []
    for name, shape in (("one", (24, 2, 4, 6)), ("two", (24, 9, 4, 6))):
        folder = tmp_path / name
        folder.mkdir()
        save_latent(folder, "a.pt", shape)
        rows = [f"{row},real,latents/a.pt,t" for row in ("a", "b")[: len(shapes) + 1]]
        shapes.append(open_index(manifest(folder, *rows, header=HEADER), tmp_path / "indexes").shapes()[0].tolist())
    assert shapes == [[2, 4, 6], [9, 4, 6]]


@pytest.mark.parametrize(("make", "message"), [(Path.mkdir, "a folder, FIFO or device"), (os.mkfifo, "a folder, FIFO")])
def test_csv_that_is_no_file(tmp_path, make, message):
    make(tmp_path / "train.csv")
    with pytest.raises(ManifestError, match=rf"train\.csv: {message}"):
        open_index(tmp_path / "train.csv")


def failing(code, only=""):
    def fail(path, *args, **kwargs):
        if str(path).endswith(only):
            raise OSError(code, os.strerror(code), str(path))

    return fail


def test_csv_that_may_not_be_read(tmp_path, monkeypatch):
    csv, opened = manifest(tmp_path, ROW), Path.open
    forbid = failing(errno.EACCES, ".csv")
    monkeypatch.setattr(Path, "open", lambda path, *args: forbid(path) or opened(path, *args))
    with pytest.raises(ManifestError, match=r"train\.csv: cannot be read \(Permission denied\)"):
        open_index(csv)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_index_that_cannot_be_written(tmp_path, monkeypatch, code):
    csv = manifest(tmp_path, ROW)
    monkeypatch.setattr(manifest_module, "write_atomically", failing(code))
    with pytest.raises(
        ManifestError, match=r"\.index: the index cannot be written here .* set data\.index_dir"
    ) as error:
        open_index(csv)
    assert os.strerror(code) in str(error.value)


def test_index_folder_that_is_a_file(tmp_path):
    csv = manifest(tmp_path, ROW)
    with pytest.raises(ManifestError, match=r"train\.csv: the index cannot be written here .* set data\.index_dir"):
        open_index(csv, csv)


def test_a_file_system_that_fails_under_a_latent(tmp_path, monkeypatch):
    """Where the folder can be read it is the file's fault, and its row is left out; else the file system's."""
    save_latent(tmp_path, "a.pt")
    rows = manifest(tmp_path, "a,real,latents/a.pt,t", "b,real,latents/b.pt,t,,,".rstrip(","), header=HEADER)
    save_latent(tmp_path, "b.pt")
    load = headers.load_tensors
    one = {"a.pt": failing(errno.EIO), "b.pt": load}
    monkeypatch.setattr(headers, "load_tensors", lambda path: one[path.name](path))
    monkeypatch.setattr("mugv_ds.data.patience.time.sleep", lambda seconds: None)
    assert open_index(rows).shapes().any(axis=1).tolist() == [False, True]
    monkeypatch.setattr("mugv_ds.data.storage.Folder.is_readable", lambda folder: False)
    with pytest.raises(TransientError, match=r"train\.csv:2: .*Input/output error.*away for minutes"):
        open_index(rows, tmp_path / "other")
