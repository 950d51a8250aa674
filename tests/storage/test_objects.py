"""Objects in a real S3 server, through a proxy that errs."""

import logging

import pytest

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.files import objects
from mugv_ds.files.objects import DamagedError, ObjectFolder
from tests.helpers.store import Request, cuts, cuts_answer, fails, flips, loses

KIB = 1 << 10


@pytest.fixture
def folder(bucket, proxy) -> ObjectFolder:
    return ObjectFolder(f"{bucket}/run", "checkpoint.dir")


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that goes in three parts."""
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 * KIB * KIB)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (41 * KIB))
    return path


def is_put(request: Request) -> bool:
    return request.method == "PUT"


def is_get(request: Request) -> bool:
    return request.method == "GET"


def test_what_is_written_is_there(folder, tmp_path):
    assert folder.names() == [] and not folder.exists("a/b")
    folder.write("a/b", b"content")
    folder.write("a/c/d", b"")
    assert folder.names() == ["a"] and folder.names("a") == ["b", "c"]
    assert folder.read("a/b", 7) == b"content" and folder.size("a/b") == 7 and folder.exists("a/c/d")
    with pytest.raises(InputError, match=r"run/a/b: larger than 6 bytes"):
        folder.read("a/b", 6)
    first = folder.identity("a/b")
    folder.write("a/b", b"another")
    assert folder.identity("a/b") != first
    with pytest.raises(FileExistsError):
        folder.write("a/b", b"third", new=True)
    folder.remove(["a/b", "a/not there"])
    assert folder.names("a") == ["c"] and not folder.exists("a/b")
    with pytest.raises(FileNotFoundError, match=r"missing: 's3://.*/run/a/b'"):
        folder.download("a/b", tmp_path / "b")


PASSING = {
    "500": fails(500, "InternalError"),
    "503": fails(503, "SlowDown"),
    "cut": cuts,
}


@pytest.mark.parametrize("act", PASSING.values(), ids=PASSING)
def test_failures_that_pass_are_tried_again(folder, proxy, act, tmp_path):
    local = tmp_path / "file"
    local.write_bytes(b"x" * 1000)
    proxy.fault(is_put, act, times=3)
    folder.upload(local, "file")
    proxy.fault(is_get, act, times=2)
    folder.download("file", tmp_path / "back")
    proxy.fault(lambda request: request.is_list, act, times=2)
    assert (tmp_path / "back").read_bytes() == local.read_bytes() and folder.names() == ["file"] and not proxy.left


def test_an_answer_that_is_cut_is_fetched_again(folder, proxy, tmp_path):
    folder.write("file", b"x" * 1000)
    proxy.fault(is_get, cuts_answer, times=2)
    folder.download("file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"x" * 1000 and not proxy.left


def test_tries_are_bounded_and_waits_are_random_and_grow(folder, proxy, monkeypatch):
    waits = []
    monkeypatch.setattr(objects.time, "sleep", waits.append)
    proxy.fault(is_put, PASSING["503"], times=100)
    with pytest.raises(OSError, match=r"SlowDown|no.*run/file") as error:
        folder.write("file", b"x")
    assert str(error.value.filename) == folder.url("file") and 100 - proxy.left == objects.ATTEMPTS
    assert len(waits) == objects.ATTEMPTS - 1
    longest = [min(0.02 * 2**i, 0.1) for i in range(len(waits))]
    assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True)) and waits != longest


def test_denied_and_missing_are_not_tried_again(folder, proxy):
    proxy.fault(is_put, fails(403, "AccessDenied"), times=2)
    with pytest.raises(PermissionError):
        folder.write("file", b"x")
    assert proxy.left == 1


def test_parts_that_fail_or_are_lost_are_uploaded_again(folder, proxy, large, tmp_path):
    for act in (*PASSING.values(), loses):
        proxy.fault(lambda request: request.is_part and "partNumber=2" in request.path, act)
    folder.upload(large, "large")
    assert not proxy.left and sum("partNumber=2" in path for _, path in proxy.seen) == 5
    folder.download("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


def test_an_upload_that_the_store_lost_is_noticed(folder, proxy, tmp_path):
    local = tmp_path / "file"
    local.write_bytes(b"x" * 1000)
    proxy.fault(is_put, loses)
    folder.upload(local, "file")
    assert not proxy.left and folder.size("file") == 1000


def test_a_bit_that_flips_in_an_upload_is_noticed_when_it_is_read(folder, proxy, tmp_path):
    """This server takes it, though the client sends the CRC-32; of what it gives back the client computes it again."""
    local = tmp_path / "file"
    local.write_bytes(b"x" * 1000)
    proxy.fault(is_put, flips)
    folder.upload(local, "file")
    asked = len(proxy.seen)
    with pytest.raises(DamagedError, match=r"checksum.*run/file"):
        folder.download("file", tmp_path / "back")
    assert len(proxy.seen) == asked + 2


def test_nothing_secret_is_said(folder, proxy, caplog):
    """Neither the environment's credentials nor what a URL carries."""
    import os

    from mugv_ds.config.url import hidden

    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    proxy.fault(
        is_put, fails(500, f"Internal{secret} at https://u:{secret}@host/x?X-Amz-Signature=12345678"), times=100
    )
    with caplog.at_level(logging.DEBUG, "mugv_ds"), pytest.raises(OSError) as error:
        folder.write("file", b"x")
    for text in (str(error.value), caplog.text):
        assert "trying again" in caplog.text and secret not in text and "12345678" not in text and "u:" not in text
    assert error.value.__cause__ is None and error.value.__suppress_context__
    shown = hidden(f"s3://me:pass/word@bucket/x and https://h/y?token=abc, {secret}; host:9000/a, s3://b/c:d")
    assert shown == "s3://…@bucket/x and https://h/y?… $AWS_SECRET_ACCESS_KEY; host:9000/a, s3://b/c:d"


def test_an_unknown_protocol_is_an_error_of_the_config():
    with pytest.raises(ConfigError, match=r"checkpoint\.dir = 'nowhere://x': .*nowhere"):
        ObjectFolder("nowhere://x", "checkpoint.dir")
