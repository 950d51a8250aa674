"""What users, disks and strangers hand in that cannot be used: each is named, and nothing else is lost.

All bad videos lie in one folder beside good ones, and go through the command itself; so do the other bad inputs.
"""

import contextlib
import copy
import csv
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from mugv_ds.cli import prepare, verify_dataset
from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.data.manifest import open_index
from mugv_ds.data.sample import read_row
from mugv_ds.data.shards import read_header
from mugv_ds.data.storage import open_file
from mugv_ds.prepare.probe import probe_isolated
from mugv_ds.prepare.scan import Source
from mugv_ds.prepare.units import read_table
from mugv_ds.prepare.workers import end_all
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

CONFIG = {
    "scan": {"unit": 100},
    "decode": {"memory_gb": 1.0, "max_frames": 100},
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
    killed = folder.put("killed.mp4", lambda path: looping(path, 99))
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


# Commands on the folder that was prepared: name → step, options, status, and what the line names. Most say it before
# anything is read.
SETTINGS = {
    "a misspelt key": ("select.sharpp.low=1", "select.sharpp", "select.sharp"),
    "a misspelt section": ("selct.hdr=true", "selct", "select"),
    "text for a count": ("scan.unit=many", "scan.unit", "integer"),
    "units of nothing": ("scan.unit=0", "scan.unit", "1"),
    "no memory": ("decode.memory_gb=0.1", "decode.memory_gb"),
    "memory without end": ("decode.memory_gb=1e999", "decode.memory_gb", "finite"),
    "a bound that holds nothing": ('select.motion={"low": 5, "high": 1}', "from 5 to 1", "swap"),
    "a bucket of an odd size": ('encode.buckets=[{"height": 50, "width": 64, "frames": 16}]', "height = 50", "16"),
    "a bucket of 15 frames": ('encode.buckets=[{"height": 48, "width": 64, "frames": 15}]', "frames = 15", "8"),
    "a bucket beyond all positions": ('encode.buckets=[{"height": 8192, "width": 64, "frames": 8}]', "height = 8192"),
    "no buckets": ("encode.buckets=[]", "encode.buckets"),
    "a bound on aesthetics that nobody scores": ('select.aesthetic={"low": 4}', "select.aesthetic", "aesthetic.clip"),
    "a bound on text that nobody reads": ('select.overlay={"high": 0.1}', "select.overlay", "text.enabled"),
    "questions that nobody asks": ('select.vlm=["shake"]', "select.vlm", "vlm.url"),
    "pairs of embeddings that are not there": ("dedup.embeddings=true", "dedup.embeddings", "aesthetic.clip"),
    "an endpoint without a model": ('vlm.url="http://localhost:1/v1"', "vlm", "model"),
    "an endpoint that is a file": ('vlm.url="file:///etc/passwd"', "vlm.url"),
    "RAFT without weights": ('probe.motion_method="raft"', "probe.motion_weights"),
    "weights of TransNet that are not there": ('probe.transnet="/nowhere.pth"', "/nowhere.pth", "probe.transnet"),
    "a table of sources that is not there": ('screen.sources="/nowhere.csv"', "/nowhere.csv"),
    "captions that are not there": ('caption.file="/nowhere.csv"', "/nowhere.csv"),
    "words that are not there": ('tags.words="/nowhere.txt"', "/nowhere.txt"),
}


def refused(answer: tuple[int, str, str], status: int, *named: str) -> None:
    """One line of error that names what is wrong."""
    found, said, errors = answer
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith("usage:")]
    assert found == status, (found, said, errors[-2000:])
    assert len(lines) == 1 and len(lines[0]) < 1000, errors[-2000:]
    for part in named:
        assert part in lines[0], (part, lines[0])


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(made, case):
    override, *named = SETTINGS[case]
    status = 1 if "/nowhere" in override and "csv" not in override and "txt" not in override else 2
    refused(made.run("caption", "--set", override), status, *named)


# Files that the config names: what they hold, the key, the step, and what the line names.
SOURCES = "path,licence,allowed"
CAPTIONS = "id,path,caption"
LABELS = "id,label,pair_id,rank,axis,annotator"
FILES = {
    "sources: empty": ("screen.sources", "", ":1: empty"),
    "sources: only a header": ("screen.sources", f"{SOURCES}\n", ":1: only a header"),
    "sources: no path": ("screen.sources", "licence,allowed\nCC0,yes\n", ":1: missing column 'path'"),
    "sources: perhaps": ("screen.sources", f"{SOURCES}\n*,CC0,perhaps\n", ":2:", "perhaps", "yes or no"),
    "sources: a row twice": ("screen.sources", f"{SOURCES}\n*,CC0,yes\n*,CC0,no\n", ":3:", "line 2"),
    "sources: a path that leads out": ("screen.sources", f"{SOURCES}\n../*,CC0,yes\n", ":2:", "leads out"),
    "sources: a NUL": ("screen.sources", f"{SOURCES}\na\0,CC0,yes\n", ":2: contains a NUL"),
    "sources: a line of 2 MiB": ("screen.sources", f"{SOURCES}\n{'x' * (1 << 21)},CC0,yes\n", ":2: longer"),
    "blocklist: no hash": ("screen.blocklist", "# hashes\nabc\n", ":2:", "64 hex digits"),
    "blocklist: hash 0": ("screen.blocklist", f"{'0' * 16}\n", ":1:", "hash 0"),
    "captions: no such video": ("caption.file", f"{CAPTIONS}\n,nothing.mp4,clouds\n", ":2:", "nothing.mp4"),
    "captions: no such clip": ("caption.file", f"{CAPTIONS}\n{'0' * 32},,clouds\n", ":2:", "no clip has this id"),
    "captions: id and path": ("caption.file", f"{CAPTIONS}\n{'0' * 32},a.mp4,clouds\n", ":2:", "not both"),
    "captions: blank": ("caption.file", f"{CAPTIONS}\n,good_1.mp4, \n", ":2: blank caption"),
    "captions: twice": ("caption.file", f"{CAPTIONS}\n,a.mp4,x\n,a.mp4,y\n", ":3: duplicate path", "line 2"),
    "captions: a path that leads out": ("caption.file", f"{CAPTIONS}\n,/etc/passwd,x\n", ":2:", "absolute"),
    "labels: no such clip": ("labels.file", f"{LABELS}\n{'0' * 32},good,,,,\n", ":2:", "0" * 32),
    "labels: neither good nor bad": ("labels.file", f"{LABELS}\n{{clip}},fine,,,,\n", ":2: unknown label 'fine'"),
    "labels: a pair of one": ("labels.file", f"{LABELS}\n{{clip}},,p,1,,\n", ":2: pair 'p' has 1 clip"),
    "labels: a rank that is none": ("labels.file", f"{LABELS}\n{{clip}},,p,first,,\n", ":2:", "rank"),
    "tags: a line without a class": ("tags.words", "person = person\ncat\n", ":1"),
}
STEPS = {"screen": "gate", "caption": "caption", "labels": "manifest", "tags": "tags"}


@pytest.mark.parametrize("case", FILES)
def test_files_that_the_config_names(made, tmp_path, case):
    key, text, *named = FILES[case]
    path = tmp_path / "file.csv"
    path.write_text(text.replace("{clip}", made.rows[0]["sample_id"]))
    step = STEPS[key.partition(".")[0]]
    refused(made.run(step, "--set", f"{key}={path}"), 2, "file.csv", *named)


NO_TEXT = {
    "a FIFO": (os.mkfifo, "FIFO"),
    "a folder": (Path.mkdir, ""),
    "not UTF-8": (lambda path: path.write_bytes(b"path,id,caption,label\n\xff,,,\n"), "not UTF-8"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("key", ["screen.sources", "screen.blocklist", "caption.file", "labels.file", "tags.words"])
def test_what_is_no_text_file(made, tmp_path, key, kind):
    make, words = NO_TEXT[kind]
    make(tmp_path / "file.csv")
    refused(made.run(STEPS[key.partition(".")[0]], "--set", f"{key}={tmp_path / 'file.csv'}"), 2, "file.csv", words)


def pickled(path: Path) -> Path:
    torch.save({"basis": Fraction(1, 2)}, path)
    return path


def of_tensors(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def as_file(path: Path, text: str = "") -> Path:
    path.write_text(text)
    return path


def as_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


# Weights: the key, what makes them in an empty folder, and what the line names. The step verify loads both.
WEIGHTS = {
    "no codec": ("encode.vae", lambda tmp: tmp / "none.pt", 2, "none.pt"),
    "a codec that is a FIFO": ("encode.vae", lambda tmp: as_fifo(tmp / "vae.pt"), 2, "vae.pt"),
    "an empty codec": ("encode.vae", lambda tmp: as_file(tmp / "vae.pt"), 2, "vae.pt"),
    "a codec of text": ("encode.vae", lambda tmp: as_file(tmp / "vae.safetensors", "<html>"), 2, "vae.safetensors"),
    "a codec that is a pickle of functions": ("encode.vae", lambda tmp: pickled(tmp / "vae.pt"), 2, "vae.pt"),
    "a codec of other shapes": (
        "encode.vae",
        lambda tmp: of_tensors(tmp / "vae.safetensors", mean=torch.ones(2), basis=torch.ones(2), scale=torch.ones(2)),
        2,
        "vae.safetensors",
    ),
    "no text encoder": ("embed.text_encoder", lambda tmp: tmp / "t5", 2, "t5"),
    "a text encoder of nothing": ("embed.text_encoder", lambda tmp: tmp, 2, ""),
    "a text encoder that is a file": ("embed.text_encoder", lambda tmp: as_file(tmp / "t5", "{}"), 2, "t5"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(made, tmp_path, case):
    key, make, status, *named = WEIGHTS[case]
    refused(made.run("verify", "--set", f"{key}={make(tmp_path)}"), status, *named)


def test_weights_that_the_workers_meet(made, tmp_path):
    refused(made.run("encode", "--set", f"encode.vae={pickled(tmp_path / 'vae.pt')}"), 2, "vae.pt")


def list_of(tmp: Path, text: str) -> list:
    return ["--list", as_file(tmp / "list.txt", text)]


def holding(path: Path) -> Path:
    """A folder that holds somebody's file."""
    path.mkdir()
    as_file(path / "thesis.doc")
    return path


# Command lines: what is done, options that come last and so replace others, and what the line names.
COMMANDS = {
    "no folder of videos": ("scan", lambda f, tmp: ["--videos", tmp / "none"], "none", "--videos"),
    "videos are a file": ("scan", lambda f, tmp: ["--videos", as_file(tmp / "x.mp4")], "x.mp4", "--videos"),
    "no videos": ("run", lambda f, tmp: ["--videos", tmp, "--work", tmp.parent / f"{tmp.name}.w"], "scan.suffixes"),
    "a set among the videos": ("run", lambda f, tmp: ["--out", f.videos / "set"], "--out", "folder of videos"),
    "work among the videos": ("run", lambda f, tmp: ["--work", f.videos], "--work", "folder of videos"),
    "work is a file": ("run", lambda f, tmp: ["--work", as_file(tmp / "w")], "--work", "an empty folder"),
    "work holds something else": ("run", lambda f, tmp: ["--work", holding(tmp / "w")], "holds something else"),
    "the set is a file": ("encode", lambda f, tmp: ["--out", as_file(tmp / "o")], "--out", "folder"),
    "no workers": ("run", lambda f, tmp: ["--workers", 0], "--workers 0"),
    "fewer than no workers": ("run", lambda f, tmp: ["--workers", -2], "--workers -2"),
    "a limit of nothing": ("run", lambda f, tmp: ["--limit", 0], "--limit 0"),
    "a limit below nothing": ("run", lambda f, tmp: ["--limit", -1], "--limit -1"),
    "no config": ("run", lambda f, tmp: ["--config", tmp / "none.json"], "none.json"),
    "a config that is a FIFO": ("run", lambda f, tmp: ["--config", as_fifo(tmp / "c.json")], "c.json"),
    "a config cut off": ("run", lambda f, tmp: ["--config", as_file(tmp / "c.json", '{"scan": {')], "c.json:1:"),
    "no codec named": ("encode", lambda f, tmp: ["--set", "encode.vae=null"], "encode.vae"),
    "no text encoder named": ("embed", lambda f, tmp: ["--set", "embed.text_encoder=null"], "embed.text_encoder"),
    "a text encoder of odd width": ("embed", lambda f, tmp: ["--set", "embed.channels=15"], "channels", "even"),
    "no list": ("scan", lambda f, tmp: ["--list", tmp / "none.txt"], "none.txt"),
    "a list that is a FIFO": ("scan", lambda f, tmp: ["--list", as_fifo(tmp / "list.txt")], "list.txt"),
    "a list of what is gone": ("scan", lambda f, tmp: list_of(tmp, "good_1.mp4\nx.mp4\n"), "list.txt:2:", "x.mp4"),
    "a list that leads out": (
        "scan",
        lambda f, tmp: list_of(tmp, "../codec.safetensors\n"),
        "list.txt:1:",
        "leads out",
    ),
    "a list with a NUL": ("scan", lambda f, tmp: list_of(tmp, "a\0.mp4\n"), "list.txt:1:"),
    "an empty list": ("scan", lambda f, tmp: list_of(tmp, "\n"), "list.txt"),
    "nothing to explain": ("explain", lambda f, tmp: [], "explain", "path"),
    "an unknown clip to explain": ("explain", lambda f, tmp: ["0" * 32], "0" * 32),
    "no bounds to try": ("what-if", lambda f, tmp: [], "--set"),
    "what would need measuring": ("what-if", lambda f, tmp: ["--set", "split.margin=9"], "split.margin", "use run"),
    "an unknown video to withdraw": ("withdraw", lambda f, tmp: ["--video", "none.mp4"], "none.mp4"),
    "nothing to withdraw": ("withdraw", lambda f, tmp: [], "--video", "--licence"),
    "no set to withdraw from": (
        "withdraw",
        lambda f, tmp: ["--out", tmp, "--video", "good_1.mp4"],
        "MANIFEST.json",
    ),
    "status of nothing": ("status", lambda f, tmp: ["--work", tmp / "w"], "nothing was scanned yet"),
    "a step before its time": ("split", lambda f, tmp: ["--work", tmp / "w"], "nothing was scanned yet"),
    "a report of nothing": ("report", lambda f, tmp: ["--out", tmp], "MANIFEST.json"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(made, tmp_path, case):
    do, options, *named = COMMANDS[case]
    before = {path: path.stat().st_mtime_ns for path in made.out.rglob("*")}
    refused(made.run(do, *options(made, tmp_path)), 2, *named)
    assert {path: path.stat().st_mtime_ns for path in made.out.rglob("*")} == before


def test_an_unknown_step(made):
    status, _, errors = made.run("prepare")
    assert status == 2 and "argument DO: invalid choice: 'prepare'" in errors


def test_a_cluster_without_its_package(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(made.run("run", "--ray", "auto"), 2, "--ray needs the package ray", "prepare-cluster")


def test_a_folder_in_which_another_run_is_at_work(made):
    with (made.work / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(made.run("run"), 2, "another run is at work here", "wait")


@pytest.fixture
def copied(made, tmp_path):
    """The folder, whose working folder and set may be changed: they are copies."""
    folder = copy.copy(made)
    folder.work, folder.out = tmp_path / "work", tmp_path / "out"
    shutil.copytree(made.work, folder.work)
    shutil.copytree(made.out, folder.out)
    return folder


def damage(path: Path, what: str, clip: str) -> None:
    """Damages a shard; flipped is a bit of the tensor of a clip."""
    with open_file(path) as blob:
        offset = read_header(blob)[clip].offset
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little")
    if what == "truncated":
        del content[-100:]
    elif what == "flipped":
        content[offset] ^= 4
    elif what == "header bomb":
        content[:8] = (1 << 62).to_bytes(8, "little")
    elif what == "brackets":
        content[8 : 8 + header] = b"[" * header
    elif what == "other keys":
        content[8 : 8 + header] = content[8 : 8 + header].translate(bytes.maketrans(b"012345", b"543210"))
    path.unlink()
    if what == "FIFO":
        os.mkfifo(path)
    elif what == "link out":
        path.symlink_to("/etc/passwd")
    elif what != "missing":
        path.write_bytes(content)


SHARDS = {
    "truncated": "its tensors end at byte",
    "flipped": "CRC-32",
    "header bomb": "not a shard, or truncated",
    "brackets": "header is damaged",
    "other keys": "header is damaged",
    "missing": "missing",
    "FIFO": "not a regular file",
    "link out": "leads out of",
}


@pytest.mark.parametrize("kind", ["latents", "text_features"])
@pytest.mark.parametrize("what", SHARDS)
def test_a_damaged_shard_is_named_by_verify_and_the_reader(copied, tmp_path, kind, what):
    (shard,) = (copied.out / kind).rglob("u*.safetensors")
    damage(shard, what, copied.rows[0]["sample_id"])
    outcome = tmp_path / "outcome.json"
    arguments = [copied.out / "train.csv", "--text-channels", 16, "--decode", 0, "--json", outcome]
    with contextlib.redirect_stdout(io.StringIO()):
        assert verify_dataset.main([str(part) for part in arguments]) == 1
    failed = {
        check["name"]: check["message"]
        for check in json.loads(outcome.read_text())["checks"]
        if check["status"] == "fail"
    }
    assert "files" in failed and shard.name in failed["files"]
    errors = []
    try:
        index = open_index(copied.out / "train.csv", tmp_path / "index")
    except InputError as error:  # no row is left
        errors = [str(error)] * len(copied.rows)
    else:
        for row in range(len(index)):
            try:
                read_row(index, row, channels=16, max_text_tokens=40)
            except InputError as error:
                errors.append(str(error))
    assert len(errors) == (1 if what == "flipped" else len(copied.rows))
    assert all(shard.name in error and SHARDS[what] in error for error in errors)


def test_what_is_damaged_is_made_anew_after_repair_and_what_came_back_is_found(copied):
    """Also where videos are gone of which there are clips, as of those that were removed and replaced."""
    for shard in copied.out.rglob("u*.safetensors"):
        damage(shard, "flipped", copied.rows[0]["sample_id"])
    missing = copied.put("removed_before_probe.mp4", good)
    status, said, errors = copied.run("repair")
    assert status == 0 and "fragments removed" in said, errors
    status, said, errors = copied.run("run")
    missing.unlink()
    assert status == 0 and "none failed" in said, (said, errors)
    # One came back, one was only touched, and two are other videos now.
    assert len((copied.out / "train.csv").read_text().splitlines()) == 1 + len(GOOD) + 4
    # Captions are asked for anew, of the clips that can still be looked at.
    given = as_file(copied.out.parent / "given.csv", f"{CAPTIONS}\n,good_1.mp4,clouds\n")
    status, said, errors = copied.run("caption", "--set", f"caption.file={given}")
    assert status == 0 and f"{len(GOOD) + 4 + len(BAD_CAPTIONS)} rows" in said, (said, errors)


def test_what_others_left_half_written_stays(made, tmp_path):
    """Folders for the set may hold what is not of it; what a killed run of ours left there is removed."""
    theirs = as_file(tmp_path / "thesis.tmp")
    ours = as_file(tmp_path / f"train.csv.{'0' * 32}.tmp")
    assert made.run("gate", "--out", tmp_path)[0] == 0
    assert theirs.exists() and not ours.exists()


DAMAGES = {
    "the plan of videos": ("work/plan/videos.parquet", "status", "delete it"),
    "the files of the scan": ("work/plan/paths.parquet", "scan", "delete it"),
    "the plan of latents": ("work/plan/encode.parquet", "encode", "delete it"),
    "what was decided": ("work/select/*.parquet", "manifest", "prepare.py repair"),
    "clips": ("work/clips/*.parquet", "status", "prepare.py repair"),
    "what was encoded": ("work/encode/*.parquet", "manifest", "prepare.py repair"),
    "the set's list of files": ("out/MANIFEST.json", "verify", "run the step manifest again"),
    "what was withdrawn": ("out/withdrawn.json", "encode", "restore it"),
    "the provenance": ("out/provenance.parquet", "withdraw", "run the step manifest again"),
    "the provenance, half": ("out/provenance.parquet", "withdraw", "run the step manifest again"),
    "what says which encoder it was": ("out/text_encoder.json", "embed", "text_encoder.json"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_of_a_preparation(copied, case):
    pattern, do, *named = DAMAGES[case]
    paths = sorted(copied.out.parent.glob(pattern)) or [copied.out / "withdrawn.json"]
    for path in paths:
        content = path.read_bytes() if path.exists() else b""
        half = content[: len(content) // 3] + bytes(100) + content[len(content) // 3 + 100 :]
        path.write_bytes(half if case.endswith("half") else b"\x80 damaged")
    options = ["--video", "good_1.mp4"] if do == "withdraw" else []
    refused(copied.run(do, *options), 2, paths[0].name[:7], *named)


@pytest.mark.parametrize("whole", [True, False])
def test_verify_names_a_damaged_provenance(copied, whole):
    path = copied.out / "provenance.parquet"
    content = path.read_bytes()
    path.write_bytes(b"" if whole else content[:200] + bytes(3000) + content[3200:])
    status, said, errors = copied.run("verify")
    assert status == 1 and "provenance.parquet: damaged" in said and not errors


def test_a_disk_that_is_too_small(copied, monkeypatch):
    shutil.rmtree(copied.work / "encode")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(copied.run("encode"), 2, str(copied.out), "GiB are free", "encode.buckets")


@pytest.mark.long
def test_an_endless_video_ends(tmp_path):
    """What a decoder was given before was decoded in time, so that it is not for its start that it takes too long."""
    looping(tmp_path / "endless.mp4", 100_000)
    good(tmp_path / "good.mp4")

    def probed(name: str, **decode: float) -> str | None:
        facts = (tmp_path / name).stat()
        source = Source(name, "ab" * 32, None, facts.st_size, facts.st_mtime_ns)
        return probe_isolated(tmp_path, source, PrepareConfig.model_validate({"decode": decode}))["error"]

    try:
        assert probed("good.mp4") is None
        assert probed("endless.mp4", wall_extra=0.5, wall_factor=1e-6) == "timed_out"
        assert probed("good.mp4") is None
    finally:
        end_all()
