"""Asks commands, endpoints and functions what rollouts are worth. Nothing of them runs in this process unless told so.

A request is one JSON object, {"reward": name, "videos": [{"id", "video", "prompt", "sample_id", "fps"}, …]}, with the
absolute path of an mp4 file under "video". The answer is {"rewards": {id: {name of a number: number, …}, …}}, with all
ids that were asked for and the names that the config gives weights to.
"""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from mugv_ds.config.errors import InputError
from mugv_ds.config.post_training_schema import RewardFunctionSection

Numbers = dict[str, dict[str, float]]  # id of a video → name → number
Videos = Sequence[Mapping[str, Any]]

_LONGEST_ANSWER = 1 << 24  # bytes
_POLL_SECONDS = 0.2
_SHOWN = 300  # characters of what a judge said
# What tells a process that it is a rank: a reward model must not take itself for one.
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RewardError(InputError):
    """A reward function cannot be used. The message names it and what it said; what it answered before is kept."""


class Failure(Exception):
    """A request was not answered as it must be; it may be made again."""


class Cancelled(Exception):
    """The run stops, so nobody waits for the answer."""


class Judge(Protocol):
    """Sends a request and returns the answer as it came; raises Failure or Cancelled."""

    def __call__(self, request: dict[str, Any], cancelled: threading.Event) -> Any: ...


def make_judge(section: RewardFunctionSection, log: Path) -> Judge:
    """Makes what asks a reward function.

    Args:
        log: file that the standard error of processes is appended to.

    Raises:
        RewardError: an entry point that is to be called in this process cannot be imported.
    """
    if section.url is not None:
        return _Endpoint(section)
    if section.in_process:
        return _Function(section)
    program, *arguments = section.command or ("python", "-m", "mugv_ds.engine.reward.entry_point", section.entry_point)
    return _Command([sys.executable if program == "python" else program, *arguments], section.timeout_s, log)


def ask(
    section: RewardFunctionSection,
    judge: Judge,
    videos: Videos,
    cancelled: threading.Event,
    say: Callable[[str], None],
) -> Numbers:
    """Asks a reward function about some videos, and again where it fails; returns its checked numbers.

    Raises:
        RewardError: it failed as often as the config allows. Cancelled: the run stops.
    """
    request = {"reward": section.name, "videos": list(videos)}
    ids = [video["id"] for video in videos]
    for attempt in range(section.retries + 1):
        try:
            return check_answer(judge(request, cancelled), ids, list(section.weights))
        except Failure as failure:
            what = f"reward.functions.{section.name}: {failure}"
            if attempt < section.retries:
                say(f"{what}; asked again ({attempt + 1} of {section.retries})")
    raise RewardError(
        f"{what}; asked {section.retries + 1} times. The rollouts and the rewards so far are kept: repair it, and the "
        "same command goes on"
    )


def check_answer(answer: Any, ids: Sequence[str], names: Sequence[str]) -> Numbers:
    """Returns the numbers of an answer, by id and name.

    Args:
        ids: of the videos that were asked about. names: of the numbers that the config gives weights to.

    Raises:
        Failure: it is something else; the message says where.
    """
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, dict):
        raise Failure(f"must answer a JSON object with the key rewards, not {_short(answer)}")
    if rewards.keys() != set(ids):
        odd = sorted(map(str, rewards.keys() ^ set(ids)))
        raise Failure(f"must give rewards for the {len(ids)} ids that were asked for; {odd[0][:80]} is only in one")
    found: Numbers = {}
    for name_of_video in ids:
        given = rewards[name_of_video]
        if not isinstance(given, dict) or given.keys() != set(names):
            raise Failure(f"{name_of_video}: must have the numbers {', '.join(names)}, not {_short(given)}")
        for name, value in given.items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise Failure(f"{name_of_video}: {name} must be a finite number, not {_short(value)}")
        found[name_of_video] = {name: float(given[name]) for name in names}
    return found


def _short(value: Any) -> str:
    return " ".join(repr(value).split())[:_SHOWN]


def _parse(text: bytes) -> Any:
    if len(text) > _LONGEST_ANSWER:
        raise Failure(f"answered more than {_LONGEST_ANSWER:,} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Failure(f"answered no JSON: {_short(text[:_SHOWN])}") from None


class _Command:
    """A program that is started for every request, in a session of its own that ends with the time-out."""

    def __init__(self, command: Sequence[str], timeout_s: float, log: Path) -> None:
        self._command, self._timeout, self._log = list(command), timeout_s, log

    def __call__(self, request: dict[str, Any], cancelled: threading.Event) -> Any:
        environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answer, self._log.open("ab") as log:
            asked.write(json.dumps(request).encode())
            asked.seek(0)
            try:
                process = subprocess.Popen(
                    self._command, stdin=asked, stdout=answer, stderr=log, env=environment, start_new_session=True
                )
            except OSError as error:
                raise Failure(f"{self._command[0]} cannot be started: {error.strerror or error}") from None
            self._wait(process, answer, cancelled)
            answer.seek(0)
            text = answer.read(_LONGEST_ANSWER + 1)
        if process.returncode:
            by = (
                f"was killed by signal {-process.returncode}"
                if process.returncode < 0
                else (f"ended with status {process.returncode}")
            )
            raise Failure(f"{by}; its last words: {_last_words(self._log)}")
        return _parse(text)

    def _wait(self, process: subprocess.Popen, answer: IO[bytes], cancelled: threading.Event) -> None:
        """Waits for the end of the program; ends it, with all that it has started, where it takes or says too much."""
        waited = 0.0
        try:
            while True:
                try:
                    process.wait(min(_POLL_SECONDS, self._timeout))
                    return
                except subprocess.TimeoutExpired:
                    waited += _POLL_SECONDS
                if cancelled.is_set():
                    raise Cancelled
                if os.fstat(answer.fileno()).st_size > _LONGEST_ANSWER:
                    raise Failure(f"answered more than {_LONGEST_ANSWER:,} bytes")
                if waited >= self._timeout:
                    raise Failure(f"no answer within {self._timeout:g} s")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has left running too
            process.wait()


def _last_words(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(file.seek(0, 2) - 2000, 0))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:_SHOWN] if lines else "none"


class _Endpoint:
    """An HTTP endpoint that requests are posted to."""

    def __init__(self, section: RewardFunctionSection) -> None:
        self._url, self._timeout = section.url, section.timeout_s

    def __call__(self, request: dict[str, Any], cancelled: threading.Event) -> Any:
        if cancelled.is_set():
            raise Cancelled
        posted = urllib.request.Request(
            self._url, json.dumps(request).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(posted, timeout=self._timeout) as answer:
                text = answer.read(_LONGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            said = error.read(_SHOWN)
            raise Failure(f"{self._url}: status {error.code}: {_short(said)}") from None
        except OSError as error:  # URLError and time-outs are
            raise Failure(f"{self._url}: {getattr(error, 'reason', error)}") from None
        return _parse(text)


class _Function:
    """A Python function in this process."""

    def __init__(self, section: RewardFunctionSection) -> None:
        try:
            self._function = load_entry_point(section.entry_point)
        except (ImportError, AttributeError) as error:
            raise RewardError(f"reward.functions.{section.name}.entry_point: {error}") from None

    def __call__(self, request: dict[str, Any], cancelled: threading.Event) -> Any:
        try:
            return {"rewards": self._function(request["videos"])}
        except Exception as error:
            raise Failure(f"raised {type(error).__name__}: {_short(str(error))}") from error


def load_entry_point(name: str) -> Callable[[Videos], Numbers]:
    """Imports what `package.module:function` names.

    Raises:
        ImportError, AttributeError: there is no such module or function.
    """
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
