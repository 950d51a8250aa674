"""Small files from outside."""

import os
import socket
import threading
from pathlib import Path

import pytest

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.regular_file import NotRegularError, open_regular, read_bytes_file, read_text_file


def bind(path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a FIFO"),
        (lambda path: path.mkdir(), "a directory"),
        (bind, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch, make, kind):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x")
    for read in (open_regular, lambda path: read_bytes_file(path, 10), lambda path: read_text_file(path, 10)):
        with pytest.raises(InputError, match=rf"{tmp_path}/x: {kind}, not a regular file"):
            read(tmp_path / "x")


def test_a_fifo_that_takes_the_file_s_place_is_not_waited_for(tmp_path, monkeypatch):
    path, original = tmp_path / "x", os.open
    path.touch()

    def swap(*arguments):
        path.unlink()
        os.mkfifo(path)
        return original(*arguments)

    monkeypatch.setattr(os, "open", swap)
    waking = threading.Timer(20, lambda: original(path, os.O_RDWR))  # so that a failing test ends
    waking.start()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(NotRegularError, match="a FIFO"):
        open_regular(path)
    assert waking.is_alive() and len(list(Path("/proc/self/fd").iterdir())) == before
    waking.cancel()


def test_the_size_is_what_may_be_read(tmp_path):
    (tmp_path / "x").write_text("ä" * 5)
    assert read_text_file(tmp_path / "x", 10) == "ä" * 5
    with pytest.raises(ConfigError, match="x: larger than 9 bytes"):
        read_text_file(tmp_path / "x", 9, ConfigError)
    with pytest.raises(InputError, match="larger than 10 bytes"):
        read_bytes_file("/proc/self/status", 10)  # whose size is 0


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="x: not UTF-8 text: invalid start byte at byte 2"):
        read_text_file(tmp_path / "x", 10, ConfigError)
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        read_text_file(tmp_path / "nowhere", 10, ConfigError)
