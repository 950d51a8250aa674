import os

import numpy as np
import pytest

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import ScreenSection
from mugv_ds.data.paths import ManifestError
from mugv_ds.prepare.screen import Blocklist, Screening, Sources

SHA = "a" * 64


def test_sources_and_blocklist_are_read(tmp_path):
    sources, blocklist = tmp_path / "sources.csv", tmp_path / "blocklist.txt"
    sources.write_text("path,licence,allowed,consent,origin,note\nfilms/*,CC-BY,yes,,archive,\n[!a]*.mp4,?,no,,,no\n")
    blocklist.write_text(f"# stolen\n{SHA.upper()}  # at first\n\n00000000000000ff\nFFFFFFFFFFFFFFFF\n")
    screening = Screening.read(ScreenSection(sources=str(sources), blocklist=str(blocklist)))
    found = screening.sources.of("films/a/b.mp4")
    assert (found.licence, found.allowed, found.origin, found.consent) == ("CC-BY", True, "archive", None)
    assert screening.sources.of("b.mp4").allowed is False
    assert screening.sources.of("a.mp4") is None
    assert screening.blocklist.files == {SHA}
    assert screening.blocklist.hashes.tolist() == [0xFF, 0xFFFFFFFFFFFFFFFF]
    assert screening.blocklist.hashes.dtype == np.uint64
    nothing = Screening.read(ScreenSection())
    assert nothing.sources.of("a.mp4") is None and not nothing.blocklist.files


BAD_SOURCES = {
    "no path column": ("licence\nCC-BY\n", "1: missing column 'path'"),
    "no rows": ("path,licence\n", "1: only a header"),
    "blank path": ("path,licence\n,CC-BY\n", "2: path '': must name a file"),
    "absolute": ("path,licence\n/srv/*,CC-BY\n", "2: path '/srv/\\*': absolute"),
    "climbs out": ("path,licence\n../*,CC-BY\n", "2: path"),
    "not yes or no": ("path,allowed\n*,maybe\n", "2: allowed = 'maybe': must be yes or no"),
    "again": ("path,allowed\n*,yes\n\n*,no\n", "4: '\\*' again, as in line 2"),
    "NUL": ("path,allowed\na\0,yes\n", "2: contains a NUL byte"),
    "not UTF-8": (b"path\n\xff\n", "2: not UTF-8"),
    "a long line": ("path\n" + "a" * (1 << 20) + "\n", "2: longer than"),
}


@pytest.mark.parametrize(("text", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_bad_sources_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "sources.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=f"sources.csv:{message}"):
        Sources.read(path)


BAD_BLOCKLISTS = {
    "a path": ("a.mp4\n", "1: 'a.mp4': must be the SHA-256"),
    "a digit too many": (f"{SHA}\n{SHA}0\n", "2: .*must be"),
    "a short hash": ("ff\n", "1: 'ff': must be"),
    "hash of flat frames": (f"{'0' * 16}\n", "1: hash 0"),
    "not UTF-8": (b"\xff\n", " not UTF-8"),
}


@pytest.mark.parametrize(("text", "message"), BAD_BLOCKLISTS.values(), ids=BAD_BLOCKLISTS)
def test_bad_blocklists_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "blocklist.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ManifestError, match=f"blocklist.txt:{message}"):
        Blocklist.read(path)


@pytest.mark.parametrize("read", [Sources.read, Blocklist.read])
def test_what_is_no_regular_file_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match=path.name):
            read(path)


def test_a_glob_that_invites_backtracking_takes_no_time(tmp_path):
    path = tmp_path / "sources.csv"
    path.write_text("path\n" + "*a" * 60 + "b\n")
    assert Sources.read(path).of("a" * 4000) is None
