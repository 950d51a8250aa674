"""An S3 server on this machine, moto's, and a proxy before it that does what stores do wrong."""

import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.helpers.distributed import free_port

SECRET = "a-secret/that+nobody=may-see"
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def environment(endpoint: str) -> dict[str, str]:
    """What leads a process to the store, and keeps its client's own patience short."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }


@dataclass(frozen=True)
class Request:
    """What a client asked for. path: with its query."""

    method: str
    path: str
    body: bytes

    @property
    def is_list(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.path

    @property
    def is_part(self) -> bool:
        return self.method == "PUT" and "partNumber=" in self.path


@dataclass(frozen=True)
class Answer:
    """What the client gets. cut: only half of the body comes before the connection ends."""

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    cut: bool = False


Forward = Callable[[Request], Answer]
Act = Callable[[Request, Forward], Answer | None]  # None: the connection is closed without an answer


def fails(status: int, code: str) -> Act:
    """The store's own error, without the request having had any effect."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return lambda request, forward: Answer(status, [("Content-Type", "application/xml")], body)


def cuts(request: Request, forward: Forward) -> None:
    """The connection ends before the request has come as a whole."""


def cuts_answer(request: Request, forward: Forward) -> Answer:
    answer = forward(request)
    return Answer(answer.status, answer.headers, answer.body, cut=True)


def flips(request: Request, forward: Forward) -> Answer:
    """One bit of what is uploaded is another one in the store, which does not notice."""
    body = bytearray(request.body)
    body[len(body) // 2] ^= 1
    return forward(Request(request.method, request.path, bytes(body)))


def loses(request: Request, forward: Forward) -> Answer:
    """The store says that it has it, and has not."""
    return Answer(200, [("ETag", '"0123456789abcdef0123456789abcdef"')])


class Proxy:
    """The store with faults.

    Attributes:
        url: its address. seen: all requests, as (method, path). stale: lists are as they were when this was set.
    """

    def __init__(self, url: str, server: str) -> None:
        self.url = url
        self._server = server.removeprefix("http://")
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forgets all requests and faults."""
        self.stale = False
        self.seen: list[tuple[str, str]] = []
        self._faults: list[list] = []
        self._lists: dict[str, Answer] = {}

    def fault(self, wanted: Callable[[Request], bool], act: Act, times: int = 1) -> None:
        """Has `act` done to the next requests that are wanted, `times` of them."""
        self._faults.append([wanted, act, times])

    @property
    def left(self) -> int:
        """Faults that have not happened yet."""
        return sum(times for _, _, times in self._faults)

    def answer(self, request: Request, headers: list[tuple[str, str]]) -> Answer | None:
        def forward(request: Request) -> Answer:
            return self._forward(request, headers)

        with self._lock:
            self.seen.append((request.method, request.path))
            due = next((fault for fault in self._faults if fault[2] and fault[0](request)), None)
            if due is not None:
                due[2] -= 1
        if due is not None:
            return due[1](request, forward)
        if request.is_list and self.stale and request.path in self._lists:
            return self._lists[request.path]
        answer = forward(request)
        if request.is_list and not self.stale:
            self._lists[request.path] = answer
        return answer

    def _forward(self, request: Request, headers: list[tuple[str, str]]) -> Answer:
        connection = http.client.HTTPConnection(self._server, timeout=60)
        try:
            connection.request(request.method, request.path, request.body, dict(headers))
            response = connection.getresponse()
            kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP]
            body = response.read()
            if request.method == "HEAD":
                kept.append(("Content-Length", response.headers.get("Content-Length", "0")))
            return Answer(response.status, kept, body)
        finally:
            connection.close()


@contextmanager
def proxy(server: str) -> Iterator[Proxy]:
    """A proxy before the server at a URL."""
    listening = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    listening.daemon_threads = True
    made = listening.proxy = Proxy(f"http://127.0.0.1:{listening.server_address[1]}", server)
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        listening.shutdown()
        listening.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = [(name, value) for name, value in self.headers.items() if name.lower() not in _HOP | {"expect"}]
        answer = self.server.proxy.answer(Request(self.command, self.path, body), headers)
        if answer is None:
            self.close_connection = True
            return
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if self.command != "HEAD" or not any(name == "Content-Length" for name, _ in answer.headers):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if answer.cut else answer.body)
        self.close_connection = self.close_connection or answer.cut

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def log_message(self, *_) -> None:
        pass


@contextmanager
def s3_server() -> Iterator[str]:
    """Starts the server; its URL."""
    port = free_port()
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/moto-api/data.json")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def put(server: str, path: str, content: bytes = b"") -> None:
    """Puts an object, or a bucket, into the store without a client, which is quicker."""
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=30)
    headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=x/us-east-1/s3"}
    connection.request("PUT", f"/{path.removeprefix('s3://')}", content, headers)
    assert connection.getresponse().status == 200
    connection.close()


def enter(endpoint: str) -> None:
    """Leads this process to the store, with little patience."""
    from mugv_ds.files import objects

    os.environ.update(environment(endpoint))
    objects.FIRST_WAIT, objects.LONGEST_WAIT = 0.02, 0.1
