import logging
import os
import pickle
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mugv_ds.data.manifest import ManifestError, PathError, build_index, open_index, resolve
from mugv_ds.files.tensor_file import UnsafeFileError
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
    assert not (tmp_path / ".index").exists()


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
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == [build_index(csv).name]


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
