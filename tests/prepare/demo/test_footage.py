"""The drawn sources have the faults that their table says, as far as probing and splitting tell."""

import csv
import hashlib

import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.demo.footage import SOURCES, draw_sources, expectations
from mugv_ds.prepare.probe import probe
from mugv_ds.prepare.rows import CLIP
from mugv_ds.prepare.scores import score
from mugv_ds.prepare.screen import Screening
from mugv_ds.prepare.split import split

# Reasons that probing and scoring lead to → the value that lies beyond its default bound.
MEASURED = {
    "still": ("motion", "motion"),
    "blurred": ("sharp", "sharp_min"),
    "too_dark": ("luma", "luma"),
    "repeated": ("repeated", "repeated"),
    "shake": ("shake", "shake"),
    "interlaced": ("interlaced", "interlaced"),
}
ELSEWHERE = {"duplicate_picture", "duplicate_mirror", "overlay_text", "no_licence"}
CONFIG = PrepareConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    draw_sources(folder)
    return folder


def outcome(folder, name):
    """The row of a source, and the rows of its clips."""
    row = probe(folder / name, name, "ab" * 32, CONFIG)
    clips = [] if row["error"] else score(row, split(row, CONFIG), CONFIG)
    return row, [clip for clip in clips if clip["reason"] is None]


def test_the_folder_is_what_the_table_says(folder):
    assert {path.name for path in folder.iterdir()} == {*SOURCES, "sources.csv"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10 << 20
    rows = list(csv.DictReader((folder / "sources.csv").open()))
    assert [(row["path"], row["allowed"]) for row in rows] == [("unlicensed.mp4", ""), ("*", "yes")]
    Screening.read(PrepareConfig.model_validate({"screen": {"sources": str(folder / "sources.csv")}}).screen)


@pytest.mark.parametrize("name", SOURCES)
def test_each_source_has_its_fault_and_no_other(folder, name):
    expected = expectations()[name]
    row, clips = outcome(folder, name)
    reason = expected.reason
    for column, (low, high) in expected.values.items():
        of_clips = column in CLIP.names and column != "fps"
        for value in [clip[column] for clip in clips] if of_clips else [row[column]]:
            assert low <= value <= high, (column, value)
    for first, last in expected.mixed:
        for clip in clips:
            assert clip["start"] + clip["duration"] <= first + 1e-6 or clip["start"] >= last - 1e-6
    if row["error"] is not None:
        assert row["error"] == reason
        return
    assert len(clips) == 1 + len(expected.mixed)
    assert row["hdr"] == (reason == "hdr")
    assert (row["duration"] < 0.95 * row["claimed"]) == (reason == "truncated")
    failed = set()
    for known, (bound, column) in MEASURED.items():
        limits = getattr(CONFIG.select, bound)
        for clip in clips:
            value = clip[column] if column in CLIP.names else row[column]
            if (limits.low is not None and value < limits.low) or (limits.high is not None and value > limits.high):
                failed.add(known)
    measured = {reason} & {*MEASURED}
    assert failed >= measured
    if reason is None or reason in ELSEWHERE:
        assert not failed


def test_they_are_the_same_bytes_each_time(folder, tmp_path):
    for name in ("audio.mp4", "interlaced.mp4", "vfr.mkv", "picture.mp4"):
        SOURCES[name][0](tmp_path / name)
        again, before = ((at / name).read_bytes() for at in (tmp_path, folder))
        assert hashlib.sha256(again).digest() == hashlib.sha256(before).digest(), name
