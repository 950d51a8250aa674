"""Scanning: contents have units that never change, and what cannot be read is told."""

import os

import pytest

from mugv_ds.config.errors import InputError
from mugv_ds.data.paths import PathError
from mugv_ds.prepare.scan import read_scan, scan

SUFFIXES = (".mp4", ".mov")


@pytest.fixture
def folder(tmp_path):
    videos = tmp_path / "videos"
    (videos / "sub").mkdir(parents=True)
    for name, content in {"b.mp4": b"1", "a.mp4": b"1", "c.MP4": b"2", "sub/d.mov": b"3", "note.txt": b"4"}.items():
        (videos / name).write_bytes(content)
    return videos


def run(folder, **options):
    return scan(folder, folder.parent / "plan", suffixes=SUFFIXES, unit=2, **options)


def flat(units):
    return [path for unit in units for path in unit]


def paths(found):
    return [[source.path for source in found.sources(unit)] for unit in found.units]


def test_equal_contents_are_one_video_known_by_its_first_path(folder):
    found = run(folder)
    assert sorted(flat(paths(found))) == ["a.mp4", "b.mp4", "c.MP4", "sub/d.mov"]
    assert sum(len(found.videos(unit)) for unit in found.units) == 3
    (copies,) = ([s.path for s in found.sources(unit)] for unit in found.units if "b.mp4" in str(found.sources(unit)))
    assert copies.index("a.mp4") < copies.index("b.mp4")


def test_new_videos_make_new_units_and_old_ones_keep_theirs(folder):
    before = [run(folder).videos(unit) for unit in (0, 1)]
    (folder / "0.mp4").write_bytes(b"5")
    (folder / "a.mp4").rename(folder / "renamed.mp4")
    found = run(folder)
    assert [found.videos(unit) for unit in (0, 1)] == before
    assert len(found.units) == 3
    assert paths(found)[-1] == ["0.mp4"]
    assert "b.mp4" in str(paths(found)[:2])  # the content of a.mp4 is where it was


def test_a_content_that_is_gone_keeps_its_place(folder):
    before = [list(run(folder).videos(unit)) for unit in run(folder).units]
    (folder / "c.MP4").unlink()
    found = run(folder)
    assert [found.videos(unit) for unit in found.units] == before
    assert "c.MP4" not in str(paths(found))


def test_only_what_changed_is_read_again(folder, monkeypatch):
    run(folder)
    (folder / "c.MP4").write_bytes(b"other")
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    run(folder)
    assert [path for path in opened if path.startswith(str(folder))] == [str(folder / "c.MP4")]


@pytest.mark.parametrize("kind", ["fifo", "link out", "loop", "not UTF-8", "folder"])
def test_what_is_no_video_file_is_told_and_harms_nothing(folder, kind):
    odd = folder / "odd.mp4"
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "link out":
        odd.symlink_to("/etc/passwd")
    elif kind == "loop":
        odd.symlink_to(odd)
    elif kind == "not UTF-8":
        (folder / os.fsdecode(b"\xff.mp4")).touch()
    else:
        odd.mkdir()
    found = run(folder)
    assert len(flat(paths(found))) == 4
    told = {source.path: source.error for source in found.unreadable()}
    assert len(told) == (0 if kind == "folder" else 1)
    assert str(folder) not in str(told)  # what is written does not depend on where the folder lies


def test_a_list_names_the_files(folder, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("c.MP4\n\nsub/../a.mp4\n")
    assert sorted(flat(paths(run(folder, listed=listed)))) == ["a.mp4", "c.MP4"]


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [("gone.mp4", InputError, "there is no"), ("../x.mp4", PathError, "leads out"), ("/a.mp4", PathError, "absolute")],
)
def test_a_wrong_line_of_the_list_is_named(folder, tmp_path, line, error, words):
    listed = tmp_path / "list.txt"
    listed.write_text(f"a.mp4\n{line}\n")
    with pytest.raises(error, match=rf"list.txt:2: .*{words}"):
        run(folder, listed=listed)


def test_folders_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        scan(tmp_path / "none", tmp_path / "plan", suffixes=SUFFIXES, unit=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"ends in \.mp4, \.mov"):
        scan(tmp_path / "empty", tmp_path / "plan", suffixes=SUFFIXES, unit=2)
    with pytest.raises(InputError, match="nothing was scanned"):
        read_scan(tmp_path / "plan")
