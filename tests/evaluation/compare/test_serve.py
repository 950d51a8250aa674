"""What the server answers, to browsers and to those who should not ask."""

import http.client
import json
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mugv_ds.config import InputError
from mugv_ds.evaluation.compare.page import media_names
from mugv_ds.evaluation.compare.serve import start_server
from mugv_ds.evaluation.compare.votes import MAX_BYTES, Box
from tests.helpers.browser import served
from tests.helpers.voting import ballot, prefer


class Asking:
    """A client of the server. root: the path with the token. stored: what is on the disk."""

    def __init__(self, address, folder, comparison):
        self.address, self.folder, self.comparison = urlsplit(address), folder, comparison
        self.root = self.address.path

    def ask(self, method, path, body=None, **headers):
        """(status, headers, content) of an answer; the path is sent as it stands."""
        connection = http.client.HTTPConnection(self.address.netloc, timeout=20)
        kept = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host="Host" in kept)
        if body is not None and not {"Content-Length", "Transfer-Encoding"} & kept.keys():
            kept["Content-Length"] = str(len(body))
        for name, value in kept.items():
            connection.putheader(name, value)
        connection.endheaders()
        with suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it is told all
            connection.send(body or b"")
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def post(self, content, path=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.ask("POST", path or f"{self.root}votes", body, **{"Content_Type": "application/json"} | headers)

    @property
    def stored(self):
        return Box(self.folder / "votes", self.comparison).read()


@pytest.fixture
def asking(compared):
    folder, comparison = compared
    with served(folder) as address:
        yield Asking(address, folder, comparison)


def test_the_page_and_what_it_shows_are_given_whole_and_in_parts(asking):
    status, headers, content = asking.ask("GET", asking.root)
    assert status == 200 and content == (asking.folder / "page/index.html").read_bytes()
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    for name in media_names(asking.comparison)[:3]:
        whole = (asking.folder / "page/media" / name).read_bytes()
        assert asking.ask("GET", f"{asking.root}media/{name}")[2] == whole
        status, headers, content = asking.ask("GET", f"{asking.root}media/{name}", Range="bytes=10-29")
        assert status == 206 and content == whole[10:30]
        assert headers["Content-Range"] == f"bytes 10-29/{len(whole)}"
        assert asking.ask("GET", f"{asking.root}media/{name}", Range="bytes=99999999-")[0] == 416


@pytest.mark.parametrize("token", ["", "wrong/", "é/"])
def test_without_the_token_nothing_is_given_or_taken(asking, token):
    paths = [f"/{token}".encode().decode("latin-1"), f"/{token}votes".encode().decode("latin-1")]
    if not token.isascii():
        paths = ["/%C3%A9/", "/%C3%A9/votes"]
    assert asking.ask("GET", paths[0])[0] == 403
    status, _, content = asking.post(ballot(asking.comparison, "Eve", prefer("sft")), paths[1])
    assert status == 403 and not asking.stored and asking.root.strip("/").encode() not in content


@pytest.mark.parametrize("host", ["evil.com", "evil.com:80", "127.0.0.1.evil.com", "localhost.evil.com", "", "a b"])
def test_another_host_is_refused_even_with_the_token(asking, host):
    assert asking.ask("GET", asking.root, Host=host)[0] == 400
    assert asking.post(ballot(asking.comparison, "Eve", prefer("sft")), Host=host)[0] == 400
    assert not asking.stored
    assert asking.ask("GET", asking.root, Host="localhost:1234")[0] == 200  # a forwarded port


@pytest.mark.parametrize(
    "path",
    [
        *(
            "comparison.json",
            "../comparison.json",
            "media/../../comparison.json",
            "media/%2e%2e/%2e%2e/comparison.json",
        ),
        *("media/..%2f..%2fcomparison.json", "%2fetc%2fpasswd", "media//etc/passwd", "media/", "media", "index.html/"),
        *("votes", "media/0000000000000000.mp4", "index.html%00", "report/report.json"),
    ],
)
def test_no_other_file_is_given(asking, path):
    (asking.folder / "votes").mkdir(exist_ok=True)
    assert asking.ask("GET", asking.root + path)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods_do_nothing(asking, method):
    assert asking.ask(method, f"{asking.root}votes", b"{}", Content_Type="application/json")[0] == 404
    assert asking.ask("POST", asking.root, b"{}", Content_Type="application/json")[0] == 404


def test_votes_are_on_the_disk_when_it_answers_and_conflicts_tell_what_is_there(asking):
    content = ballot(asking.comparison, "Ana", prefer("dpo"))
    assert asking.post(content)[0] == 200
    assert [vote.model_dump() for vote in asking.stored[0].votes] == content["votes"]
    status, _, answer = asking.post(content | {"voter": "f" * 32, "votes": []})
    found = json.loads(answer)
    assert status == 409 and found["reason"] == "name" and found["stored"]["votes"] == content["votes"]
    status, _, answer = asking.post(content | {"revision": 0, "votes": []})
    assert status == 409 and json.loads(answer)["reason"] == "stale"
    assert len(asking.stored) == 1 and len(asking.stored[0].votes) == len(asking.comparison.items)


def test_what_is_no_vote_is_refused_and_the_server_goes_on(asking):
    good = json.dumps(ballot(asking.comparison, "Ana", prefer("dpo"))).encode()
    for wrong in (b"", good[:-5], b"[" * 1_000_000, b"\xff" * 100, good.replace(b'"left"', b'"up"'), b"null"):
        assert asking.post(wrong)[0] == 400
    assert asking.post(good, Content_Type="text/plain")[0] == 415
    assert asking.post(good, Content_Length="12x")[0] in (400, 413)
    assert not asking.stored and asking.post(good)[0] == 200


def test_ten_megabytes_are_refused_before_they_are_sent(asking):
    assert asking.post(b"", Content_Length=str(10 << 20))[0] == 413
    assert not asking.stored and asking.ask("GET", asking.root)[0] == 200


def test_of_ten_megabytes_in_chunks_no_more_than_the_bound_is_read(asking):
    body = b"".join(b"100000\r\n" + b" " * (1 << 20) + b"\r\n" for _ in range(10)) + b"0\r\n\r\n"
    with suppress(ConnectionResetError, BrokenPipeError):  # it closes the connection on who goes on sending
        status, _, content = asking.post(body, Transfer_Encoding="chunked")
        assert status == 400 and f"column {MAX_BYTES}".encode() in content
    assert not asking.stored and asking.ask("GET", asking.root)[0] == 200


def test_a_port_that_is_taken_is_one_error_and_only_this_machine_is_listened_to(compared):
    folder, comparison = compared
    box = Box(folder / "votes", comparison)
    server, address = start_server(folder / "page", comparison, box, 0)
    try:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        assert len(urlsplit(address).path.strip("/")) >= 32
        with pytest.raises(InputError, match="--port"):
            start_server(folder / "page", comparison, box, urlsplit(address).port)
    finally:
        server.server_close()


def test_the_command_serves_until_ctrl_c_and_then_reports(compared):
    """As `make compare` runs it, in a process of its own."""
    folder, comparison = compared
    tool = Path(__file__).parents[3] / "tools/compare.py"
    command = [sys.executable, str(tool), "serve", str(folder), "--port", "0"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell has what it starts with & ignore it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        try:
            address = process.stdout.readline().split()[-1]
            asking = Asking(address, folder, comparison)
            assert asking.post(ballot(comparison, "Ana", prefer("dpo")))[0] == 200
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and not err, err
    assert "dpo better 8" in out and "pairs.csv: 16 rows" in out and (folder / "report/index.html").is_file()
    assert urlsplit(address).path not in out  # requests are not logged: the token is in them
