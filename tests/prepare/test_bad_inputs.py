"""What users, disks and strangers hand in that cannot be used: each is named, and nothing else is lost.

All bad videos lie in one folder beside good ones, and go through the command itself; so do the other bad inputs.
"""

import contextlib
import csv
import io
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mugv_ds.prepare.units import read_table
from tests.helpers.bad_videos import (
    BAD_CAPTIONS,
    BROKEN,
    FPS,
    GOOD,
    REJECTED,
    SIZE,
    UNREADABLE,
    good,
    good_film,
    looping,
)
from tests.helpers.prepared import fit_codec
from tools import prepare

CONFIG = {
    "decode": {"memory_gb": 1.0, "max_frames": 200},
    "select": {
        "fps": {"low": 4.0},
        "sharp": {"low": None, "high": None},
        "motion": {"low": None, "high": None},
    },
    "encode": {"buckets": [{"height": SIZE[0], "width": SIZE[1], "frames": 16, "fps": FPS}], "device": "cpu"},
    "embed": {"text_encoder": "hash", "channels": 16, "max_tokens": 40, "device": "cpu"},
    "validation": {"share": 0.0},
}


class Watched(io.StringIO):
    """What a command prints, in which some lines start something: word at the line's beginning → what."""

    def __init__(self, reactions: dict[str, Callable[[], object]]) -> None:
        super().__init__()
        self.reactions = dict(reactions)

    def write(self, text: str) -> int:
        word = text.strip().partition(":")[0]
        if word in self.reactions:
            self.reactions.pop(word)()
        return super().write(text)


class Folder:
    """A folder of videos and what the command makes of it.

    Args:
        root: where. films: that the codec is fitted to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.videos, self.work, self.out = root / "videos", root / "work", root / "out"
        self.videos.mkdir()
        save_file(fit_codec([good_film(key) for key in "abcdefg"]).state_dict(), root / "codec.safetensors")
        (root / "config.json").write_text(json.dumps(CONFIG | {"encode": CONFIG["encode"] | {"vae": self.codec}}))

    @property
    def codec(self) -> str:
        return str(self.root / "codec.safetensors")

    def put(self, name: str, write: Callable[[Path], object], caption: str | None = "clouds drift") -> Path:
        """Writes a file, and a caption beside it."""
        path = self.videos / name
        path.parent.mkdir(exist_ok=True)
        write(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption)
        return path

    def run(self, do: str, *options: object, reactions: dict | None = None) -> tuple[int, str, str]:
        """Runs the command in this process; returns its status, and what it printed to both streams."""
        given = ["--videos", self.videos, "--work", self.work, "--out", self.out, "--config", self.root / "config.json"]
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = [signal.getsignal(number) for number in numbers]
        out, err = Watched(reactions or {}), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = prepare.main([str(part) for part in (do, *given, "--workers", 1, *options)])
        except SystemExit as end:
            status = end.code
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
        return int(status), out.getvalue(), err.getvalue()


class Meanwhile:
    """Does something again and again in a thread, from `start` to `stop`."""

    def __init__(self, do: Callable[[], object], every_s: float) -> None:
        self._do, self._every, self._ended = do, every_s, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            self._do()


def kill_whoever_decodes(path: Path) -> None:
    """Has a decoder that has the file open die of a segmentation fault."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"prepare.workers" in (process / "cmdline").read_bytes() and any(
                link.readlink() == path for link in (process / "fd").iterdir()
            ):
                os.kill(int(process.name), signal.SIGSEGV)


# What becomes of files that are whole at first: name → the error of the video, and what its detail says.
DISTURBED = {
    "killed.mp4": ("crashed", "SIGSEGV"),
    "removed_before_probe.mp4": ("changed_while_reading", "not the file that was scanned"),
    "replaced_before_probe.mp4": ("changed_while_reading", "not the file that was scanned"),
    "touched_before_probe.mp4": ("changed_while_reading", "not the file that was scanned"),
}
LATE = ("removed_before_encode.mp4", "replaced_before_encode.mp4")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All of it in one folder, prepared by one run, during which some files change."""
    folder = Folder(tmp_path_factory.mktemp("bad"))
    for name, write in GOOD.items():
        folder.put(name, write)
    for name, (write, *_) in {**UNREADABLE, **BROKEN, **REJECTED}.items():
        folder.put(name, write, caption=None)
    for number, (name, write) in enumerate(BAD_CAPTIONS.items()):
        write(folder.put(name, lambda path, number=number: good(path, f"h{number}"), caption=None))
    (folder.videos / "second_good_1.mp4").write_bytes((folder.videos / "good_1.mp4").read_bytes())
    (folder.videos / "note.txt").write_text("is no video")
    killed = folder.put("killed.mp4", lambda path: looping(path, 199))
    early = [folder.put(name, good) for name in [*DISTURBED][1:]]
    late = [folder.put(name, lambda path, key=key: good(path, key)) for name, key in zip(LATE, "ij", strict=True)]
    growing = folder.videos / "growing.mp4"
    with growing.open("wb") as file:
        file.truncate(1 << 26)

    def grow() -> None:
        with growing.open("r+b") as file:
            file.truncate(growing.stat().st_size + 1)

    grows, kills = Meanwhile(grow, 0.002), Meanwhile(lambda: kill_whoever_decodes(killed), 0.03)

    def after_scan() -> None:
        grows.stop()
        early[0].unlink()
        good(early[1], "another")
        os.utime(early[2], ns=(0, 0))
        kills.start()

    def after_select() -> None:
        late[0].unlink()
        good(late[1], "k")

    grows.start()
    reactions = {"scan": after_scan, "probe": kills.stop, "select": after_select}
    folder.status, folder.said, folder.errors = folder.run("run", reactions=reactions)
    plan = read_table(folder.work / "plan" / "paths.parquet").to_pylist()
    folder.files = {row["path"]: row for row in plan}
    folder.probed = {
        row["path"]: row
        for path in (folder.work / "videos").glob("*.parquet")
        for row in read_table(path, ["path", "error", "detail"]).to_pylist()
    }
    folder.selected = {}
    for path in (folder.work / "select").glob("*.parquet"):
        for row in read_table(path).to_pylist():
            folder.selected.setdefault(row["path"], []).append(row)
    with (folder.out / "train.csv").open(newline="") as file:
        folder.rows = list(csv.DictReader(file))
    return folder


def reasons(made, name: str) -> set[str]:
    return {reason["name"] for row in made.selected[name] for reason in row["reasons"]}


def test_the_run_ends_well(made):
    assert made.status == 0, made.errors
    assert "Traceback" not in made.said + made.errors
    assert "none failed" in made.said


@pytest.mark.parametrize("name", GOOD)
def test_good_videos_are_accepted(made, name):
    accepted = [row["clip"] for row in made.selected[name] if row["accepted"]]
    assert len(accepted) == 1, reasons(made, name)
    assert [row["sample_id"] for row in made.rows].count(accepted[0]) == 1


def test_nothing_is_lost(made):
    """Every file that has a video's name is among those of the scan, and has a verdict there or in select."""
    names = {
        str(path.relative_to(made.videos))
        for path in made.videos.rglob("*.mp4")
        if path.is_symlink() or not path.is_dir()
    }
    assert {name for name in names if name.isprintable() and name.isascii()} <= made.files.keys()
    assert len(made.files) == len(
        {**GOOD, **UNREADABLE, **BROKEN, **REJECTED, **BAD_CAPTIONS, **DISTURBED, **dict.fromkeys(LATE)}
    ) + len(("growing", "copy"))
    assert {name for name, row in made.files.items() if row["video"] is not None} == made.selected.keys()
    assert len(made.rows) == len(GOOD)


@pytest.mark.parametrize("name", [*UNREADABLE, "growing.mp4"])
def test_what_cannot_be_read_is_told_by_the_scan(made, name):
    _, words = UNREADABLE.get(name, (None, "changed while it was read"))
    shown = name.encode(errors="backslashreplace").decode()
    assert made.files[shown]["video"] is None and words in made.files[shown]["error"]
    status, said, _ = made.run("explain", shown)
    assert status == 0 and "REASON unreadable" in said and words in said


@pytest.mark.parametrize("name", [*BROKEN, *DISTURBED])
def test_what_cannot_be_decoded_is_told_by_the_probe(made, name):
    error, words = BROKEN[name][1:] if name in BROKEN else DISTURBED[name]
    row = made.probed[name]
    assert row["error"] == error and words in row["detail"], row
    assert str(made.root) not in row["detail"]
    assert error in reasons(made, name)


@pytest.mark.parametrize("name", [*REJECTED, *BAD_CAPTIONS, "second_good_1.mp4"])
def test_what_is_decoded_and_not_wanted_has_its_reason(made, name):
    expected = "caption_error" if name in BAD_CAPTIONS else "duplicate_file"
    assert (REJECTED[name][1] if name in REJECTED else expected) in reasons(made, name)
    assert not any(row["accepted"] for row in made.selected[name])


@pytest.mark.parametrize("name", LATE)
def test_a_file_that_is_another_one_when_it_is_encoded_is_left_out(made, name):
    (clip,) = [row["clip"] for row in made.selected[name] if row["accepted"]]
    (fragment,) = (made.work / "encode").glob("*.parquet")
    errors = {row["clip"]: row["error"] for row in read_table(fragment).to_pylist()}
    assert errors[clip] == f"{name}: is not the file that was scanned any more"
    assert json.loads((made.out / "MANIFEST.json").read_text())["counts"]["left_out"] == {"no latent": 2}


def test_names_and_words_of_strangers_do_no_harm_in_the_report(made):
    page = (made.work / "report" / "index.html").read_text()
    assert "<script>alert" not in page and "\x1b" not in page
    status, said, _ = made.run("explain", "\x1b[31mred\x07\r.mp4")
    assert status == 0 and "\x1b" not in said and "\\x1b[31mred" in said
