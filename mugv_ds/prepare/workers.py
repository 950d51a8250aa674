"""Runs what decodes other people's files in processes of its own, with bounded memory and time.

A file that crashes its decoder, fills the memory or never ends harms nothing but its own result. These are plain child
processes that are handed JSON and hand back Arrow tables or arrays: a decoder that was taken over can send data, but no
pickled code; and they do not import the command's own modules, as those of `multiprocessing` do.
"""

import atexit
import io
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa

_TRIES = 2
_CALLS = 64  # after which a process is replaced, so that what libraries leak does not grow
_TABLE, _ARRAY, _ERROR = b"T", b"A", b"E"
_HEAD = struct.Struct("<cQ")  # which of the three, and its bytes
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # they ask the parent to stop, which decides
# One thread each: there are as many processes as cores, and every thread would take address space.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}


@dataclass(frozen=True)
class Failure:
    """What came of a call in place of a result.

    Attributes:
        kind: crashed (a signal ended the process), timed_out, or raised (an exception that nobody foresaw).
        detail: the signal, or the exception.
    """

    kind: Literal["crashed", "timed_out", "raised"]
    detail: str


def run_isolated(
    function: Callable[..., pa.Table | np.ndarray], arguments: dict[str, Any], *, wall_s: float, memory_gb: float
) -> pa.Table | np.ndarray | Failure:
    """Calls a function in a process of its own, once more if that crashes or takes too long. Threads may share it.

    Args:
        function: of a module, by whose name it is found. arguments: its keyword arguments, of JSON's types.
        wall_s: seconds after which the process is killed, unless the function asks for more with `allow`.
        memory_gb: address space of the process, in GiB.

    Returns:
        what the function returned, or why it did not.
    """
    request = json.dumps(
        {"module": function.__module__, "name": function.__qualname__, "arguments": arguments, "wall_s": wall_s}
    )
    for _ in range(_TRIES):
        worker = _take(memory_gb)
        result = worker.call(request.encode())
        if not isinstance(result, Failure):
            _give_back(worker)
            return result
        worker.end()
        if result.kind == "raised":
            break
    return result


def allow(seconds: float) -> None:
    """Called in such a process: lets its function go on for so many seconds from now. Elsewhere it does nothing."""
    if _is_child:
        signal.setitimer(signal.ITIMER_REAL, seconds)


class _Worker:
    """A child process, from the parent's side."""

    def __init__(self, memory_gb: float) -> None:
        self.memory_gb, self.calls = memory_gb, 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _serve; _serve({memory_gb!r})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # so that what is sent to the command's group reaches the command alone
        )

    def call(self, request: bytes) -> pa.Table | np.ndarray | Failure:
        self.calls += 1
        try:
            self._process.stdin.write(struct.pack("<Q", len(request)) + request)
            self._process.stdin.flush()
            kind, size = _HEAD.unpack(self._read(_HEAD.size))
            if size > self.memory_gb * 2**30:
                raise EOFError
            return _unpack(kind, self._read(size))
        except (EOFError, BrokenPipeError, ValueError, pa.ArrowException):
            self.end()
            return self._death()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:  # what it was sent last is still in the buffer
                continue

    def _read(self, size: int) -> bytes:
        data = self._process.stdout.read(size)
        if len(data) < size:
            self._process.wait()  # it closes its pipe by ending
            raise EOFError
        return data

    def _death(self) -> Failure:
        code = self._process.returncode
        if code == -signal.SIGALRM:
            return Failure("timed_out", "took longer than it may")
        return Failure("crashed", signal.Signals(-code).name if code < 0 else f"exit status {code}")


_idle: list[_Worker] = []
_lock = threading.Lock()
_is_child = False


def _take(memory_gb: float) -> _Worker:
    with _lock:
        for worker in _idle:
            if worker.memory_gb == memory_gb:
                _idle.remove(worker)
                return worker
    return _Worker(memory_gb)


def _give_back(worker: _Worker) -> None:
    if worker.calls >= _CALLS:
        worker.end()
        return
    with _lock:
        _idle.append(worker)


@atexit.register
def end_all() -> None:
    """Ends the processes that wait for more to do."""
    with _lock:
        while _idle:
            _idle.pop().end()


def _serve(memory_gb: float) -> None:
    """What a child process does: it answers requests until its parent closes the pipe, or is gone."""
    global _is_child
    _is_child = True
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    limit = int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open("r+b") as nothing:  # libraries that print do not print into the answers
        os.dup2(nothing.fileno(), 0)
        os.dup2(nothing.fileno(), 1)
    threading.Thread(target=_end_with_parent, args=[requests.fileno()], daemon=True).start()
    while head := requests.read(8):
        request = json.loads(requests.read(*struct.unpack("<Q", head)))
        signal.setitimer(signal.ITIMER_REAL, request["wall_s"])
        kind, data = _answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(_HEAD.pack(kind, len(data)))
        answers.write(data)
        answers.flush()


def _end_with_parent(pipe: int) -> None:
    """Ends this process when nobody can write to the pipe any more."""
    poll = select.poll()
    poll.register(pipe, 0)  # POLLHUP is always told
    poll.poll()
    os._exit(1)


def _answer(request: dict[str, Any]) -> tuple[bytes, bytes | memoryview]:
    try:
        result = getattr(import_module(request["module"]), request["name"])(**request["arguments"])
        return _pack(result)
    except Exception as error:
        return _ERROR, f"{type(error).__name__}: {error}"[:2000].encode()


def _pack(result: pa.Table | np.ndarray) -> tuple[bytes, memoryview]:
    stream = io.BytesIO()
    if isinstance(result, pa.Table):
        with pa.ipc.new_stream(stream, result.schema) as writer:
            writer.write_table(result)
        return _TABLE, stream.getbuffer()
    np.save(stream, result, allow_pickle=False)
    return _ARRAY, stream.getbuffer()


def _unpack(kind: bytes, data: bytes) -> pa.Table | np.ndarray | Failure:
    """Raises ValueError or pa.ArrowException if it is not what a function of ours returns."""
    if kind == _TABLE:
        table = pa.ipc.open_stream(data).read_all()
        table.validate(full=True)
        return table
    if kind == _ARRAY:
        stream: BinaryIO = io.BytesIO(data)
        return np.load(stream, allow_pickle=False)
    if kind == _ERROR:
        return Failure("raised", data.decode(errors="replace"))
    raise ValueError(kind)
