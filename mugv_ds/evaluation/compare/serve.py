"""A small server of the page, for this machine alone, that writes the votes to the disk.

It listens on 127.0.0.1. The address that it prints has a token in it, without which nothing is given and nothing taken,
and it answers under no other host's name, so that other pages in the browser cannot reach it (DNS rebinding).
Werkzeug, which TensorBoard is served with too, answers requests for parts of videos and bounds what is sent.
"""

import hmac
import json
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from werkzeug.exceptions import BadRequest, Forbidden, HTTPException, NotFound, UnsupportedMediaType
from werkzeug.exceptions import Conflict as HttpConflict
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

from mugv_ds.config.errors import InputError
from mugv_ds.evaluation.compare.draw import Comparison
from mugv_ds.evaluation.compare.page import MEDIA, PAGE, media_names
from mugv_ds.evaluation.compare.votes import MAX_BYTES, Box, Conflict, parse_votes

HOST = "127.0.0.1"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _Request(Request):
    trusted_hosts = (HOST, "localhost")  # at any port: it may be forwarded
    max_content_length = MAX_BYTES


class _Handler(WSGIRequestHandler):
    timeout = 60  # seconds that a connection may say nothing

    def log_request(self, *args: object) -> None:
        """Logs nothing: the token is in every address."""


def make_app(page: Path, comparison: Comparison, box: Box, token: str) -> Callable:
    """Makes the WSGI application.

    GET /TOKEN/ is the page, GET /TOKEN/media/… a file that it shows, and POST /TOKEN/votes stores a voter's votes.

    Args:
        page: folder of the page. box: where votes go. token: that the address must have.
    """
    files = {"": page / PAGE} | {f"{MEDIA}/{name}": page / MEDIA / name for name in media_names(comparison)}

    def answer(request: _Request) -> Response:
        request.host  # noqa: B018 – raises unless it is trusted
        given, _, name = request.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise Forbidden("open the address that the command printed: it has a token in it")
        if request.method == "POST" and name == "votes":
            return _store(request, comparison, box)
        if request.method not in ("GET", "HEAD") or name not in files:
            raise NotFound()
        return send_file(files[name], request.environ, conditional=True, etag=False)

    @_Request.application
    def app(request: _Request) -> Response:
        try:
            response = answer(request)
        except HTTPException as error:
            response = error.get_response(request.environ)
        response.headers.extend(_HEADERS)
        return response

    return app


def _store(request: _Request, comparison: Comparison, box: Box) -> Response:
    """Stores the votes that a browser sends."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("votes are application/json")
    try:
        votes = parse_votes(request.get_data(), comparison, "votes")
        box.store(votes)
    except Conflict as error:
        found = {"reason": error.reason, "stored": error.stored.model_dump(mode="json")}
        raise HttpConflict(response=Response(json.dumps(found), 409, mimetype="application/json")) from None
    except InputError as error:
        raise BadRequest(str(error)) from None
    return Response(json.dumps({"revision": votes.revision}), mimetype="application/json")


def start_server(page: Path, comparison: Comparison, box: Box, port: int) -> tuple[BaseWSGIServer, str]:
    """Starts to listen; `serve_forever` of what is returned answers.

    Args:
        port: 0 for a free one.

    Returns:
        The server, and the address of the page with its token.

    Raises:
        InputError: the port is taken.
    """
    token = secrets.token_urlsafe(24)
    app = make_app(page, comparison, box, token)
    with socket.socket() as listening:  # Werkzeug would bind it too, but end the process where it cannot
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((HOST, port))
        except OSError as error:
            raise InputError(f"port {port}: {error.strerror}; name another with --port, or 0 for any") from None
        listening.listen()
        port = listening.getsockname()[1]
        server = make_server(
            HOST, port, app, threaded=True, request_handler=_Handler, fd=listening.fileno()
        )  # has a copy of the descriptor
    return server, f"http://{HOST}:{port}/{token}/"
