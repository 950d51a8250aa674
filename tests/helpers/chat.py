"""A server on this machine that speaks the API of chat completions, with answers that a test gives."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, Any]  # the words of a model; or a status with a body


class Chat:
    """What a server was asked.

    Attributes:
        url: its base address. asked: the bodies of the requests. most: of them at a time. replies: gives the answers.
    """

    def __init__(self, url: str, reply: Callable[[dict], Reply]) -> None:
        self.url, self.reply = url, reply
        self.asked: list[dict] = []
        self.most = self._now = 0
        self._lock = threading.Lock()

    def answer(self, body: dict) -> tuple[int, Any]:
        with self._lock:
            self.asked.append(body)
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            reply = self.reply(body)
        finally:
            with self._lock:
                self._now -= 1
        return (200, completion(reply)) if isinstance(reply, str) else reply


def completion(content: str | None, finish: str = "stop", refusal: str | None = None) -> dict:
    """Returns the body of an answer."""
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@contextmanager
def chat_server(reply: Callable[[dict], Reply]) -> Iterator[Chat]:
    """Runs a server; `reply` is given a request's body, in a thread of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.path == "/v1/chat/completions"
            status, found = chat.answer(body) if known else (404, {"error": {"message": self.path}})
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            with suppress(ConnectionError):  # of a client that gave up
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    chat = Chat(f"http://127.0.0.1:{server.server_port}/v1", reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield chat
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def text_of(body: dict) -> str:
    """Returns the words of a request."""
    return body["messages"][0]["content"][-1]["text"]
