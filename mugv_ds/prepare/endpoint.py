"""Asks an OpenAI-compatible endpoint about clips; what was answered once is not asked again.

Answers are not reproducible across runs, nor cheap. So each is appended to a file of its video in the working folder as
soon as it is there, where neither a killed process nor a stopped endpoint takes it away.
"""

import base64
import io
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from mugv_ds.config.errors import InputError, Status
from mugv_ds.config.prepare_schema import EndpointSection
from mugv_ds.prepare.packages import missing_extra
from mugv_ds.prepare.units import digest
from mugv_ds.prepare.views import ClipView, Row, why, words

_RETRIES = 2  # by the client: of connections, time-outs, 408, 409, 429 and 5xx
_SEED = 0
_JPEG_QUALITY = 90
_LONGEST_ANSWER = 1 << 20  # characters
# Statuses that a request earns by what it shows, such as too many tokens; all others are the endpoint's.
_OF_THE_CLIP = (400, 413, 422)


class EndpointError(InputError):
    """The endpoint cannot be used. The message gives its address and its words; the answers that it gave are kept."""

    status = Status.FAILED


class _EndpointFailure(Exception):
    """A request failed, for which its clip need not be to blame."""


class _ClipFailure(Exception):
    """A request failed that another clip's may not have."""


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        text: in words. frames, side: how many frames are shown with it, and their longest side in pixels.
        schema: JSON schema of the answer; None for plain text.
    """

    text: str
    frames: int = 0
    side: int = 0
    schema: Mapping[str, Any] | None = None

    @cached_property
    def hash(self) -> str:
        """Returns 12 hex digits of all that is asked."""
        return digest(self.text, self.frames, self.side, self.schema)


@dataclass(frozen=True)
class Question:
    """A prompt about a clip, or about part (k, n): the k-th, from 0 on, of n parts of it."""

    clip: ClipView
    prompt: Prompt
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: its words. finish: why it ended: stop, length, content_filter … refused: whether it declined formally.
    """

    text: str
    finish: str
    refused: bool = False


Parse = Callable[[Answer], Row]  # raises ValueError, if the answer is not what was asked for


def missing_endpoint(section: EndpointSection, name: str) -> str | None:
    """Returns in words why the endpoint of the section `name` cannot be asked; None if it can."""
    if section.url is None:
        return f"{name}.url not given"
    return missing_extra("prepare-vlm", "openai")


class Endpoint:
    """A client of one endpoint.

    Args:
        section: where it is and how it is asked. work: the working folder, of which `answers/` is used. Only one
            process at a time may ask about a video.
    """

    def __init__(self, section: EndpointSection, work: Path) -> None:
        import openai  # takes seconds

        self._section = section
        self._answers = _Answers(work / "answers")
        self._client = openai.OpenAI(
            base_url=section.url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # local servers want no key, the client wants one
            timeout=section.timeout,
            max_retries=_RETRIES,
        )
        self._errors = openai.OpenAIError
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._stopped: EndpointError | None = None

    def ask(self, questions: Sequence[Question], parse: Parse) -> list[Row]:
        """Asks questions, some at a time, except those that were answered before.

        A request that fails although the client tried it three times is asked once more after all others. If it fails
        again while others were answered, that is put down to its clip.

        Returns:
            for each question what `parse` makes of its answer, or {"error": why there is none}.

        Raises:
            EndpointError: requests failed as often in a row as the config says, or none was answered.
        """
        results: list[Row | _EndpointFailure | None] = [self._known(question, parse) for question in questions]
        for again in (False, True):
            numbers = [number for number, result in enumerate(results) if not isinstance(result, dict)]
            if not numbers:
                break
            with ThreadPoolExecutor(min(self._section.concurrency, len(numbers))) as pool:
                found = list(pool.map(lambda number: self._ask(questions[number], parse), numbers))
            if not again and all(isinstance(result, _EndpointFailure) for result in found):
                raise self._error(found[-1])
            for number, result in zip(numbers, found, strict=True):
                results[number] = result
        return [result if isinstance(result, dict) else {"error": words(result)} for result in results]

    def _known(self, question: Question, parse: Parse) -> Row | None:
        """Returns what an earlier answer says, if there is one."""
        answer = self._answers.find(question.clip.video, self._key(question))
        try:
            return None if answer is None else parse(answer)
        except ValueError:  # an older version of the tool took it
            return None

    def _ask(self, question: Question, parse: Parse) -> Row | _EndpointFailure:
        """Asks one question; keeps the answer and counts failures in a row.

        Raises:
            EndpointError: there were too many.
        """
        if self._stopped is not None:
            raise self._stopped
        try:
            content = _content(question)
        except (OSError, ValueError, av.error.FFmpegError) as error:  # of the video
            return {"error": why(question.clip, error)}
        try:
            answer = self._request(question, content)
            try:
                row = parse(answer)
            except ValueError as error:
                raise _ClipFailure(f"{words(error)}; it answered {answer.text[:100]!r} ({answer.finish})") from None
        except (_EndpointFailure, _ClipFailure) as failure:
            with self._lock:
                self._in_a_row += 1
                if self._in_a_row >= self._section.failures:
                    self._stopped = self._stopped or self._error(failure)
                    raise self._stopped from None
            return failure if isinstance(failure, _EndpointFailure) else {"error": words(failure)}
        with self._lock:
            self._in_a_row = 0
        self._answers.add(question.clip.video, self._key(question), answer)
        return row

    def _request(self, question: Question, content: list[dict]) -> Answer:
        """Sends one request.

        Raises:
            _EndpointFailure, _ClipFailure: it was not answered.
        """
        schema = question.prompt.schema
        shape = {"name": "answer", "schema": schema, "strict": True}
        extra = {"response_format": {"type": "json_schema", "json_schema": shape}} if schema else {}
        try:
            completion = self._client.chat.completions.create(
                model=self._section.model,
                messages=[{"role": "user", "content": content}],
                temperature=0,
                seed=_SEED,
                max_tokens=self._section.max_tokens,
                **extra,
            )
        except self._errors as error:
            of_the_clip = getattr(error, "status_code", None) in _OF_THE_CLIP
            cause = f" ({words(error.__cause__)})" if error.__cause__ is not None else ""
            raise (_ClipFailure if of_the_clip else _EndpointFailure)(words(error) + cause) from None
        except (ValueError, TypeError) as error:  # a body that is no JSON
            raise _EndpointFailure(f"no answer of a chat: {words(error)}") from None
        try:
            choice = completion.choices[0]
            text, refusal = choice.message.content or "", choice.message.refusal
            answer = Answer(refusal or text, str(choice.finish_reason), bool(refusal))
        except (AttributeError, IndexError, TypeError):
            raise _EndpointFailure(f"no answer of a chat: {str(completion)[:200]}") from None
        if len(answer.text) > _LONGEST_ANSWER:
            raise _ClipFailure(f"an answer of {len(answer.text):,} characters")
        return answer

    def _key(self, question: Question) -> str:
        asked = (question.clip.clip, question.part, question.prompt.hash, self._section.model)
        return digest(*asked, self._section.max_tokens)

    def _error(self, failure: Exception) -> EndpointError:
        """Returns the error that stops the step."""
        count = f"{self._in_a_row} failures in a row, the last" if self._in_a_row > 1 else "it failed"
        return EndpointError(
            f"{self._section.url}: {count}: {words(failure)}; the answers so far are kept, the same command goes on"
        )


class _Answers:
    """The answers about each video: lines of JSON, of which a torn last one counts as not written.

    Written without fsync: a killed process loses none, only a crash of the machine may.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._video, self._known = "", {}  # the one read last: clips of a video follow each other

    def find(self, video: str, key: str) -> Answer | None:
        if video != self._video:
            self._video, self._known = video, self._read(video)
        return self._known.get(key)

    def add(self, video: str, key: str, answer: Answer) -> None:
        path = self._path(video)
        line = json.dumps({"key": key, **asdict(answer)}).encode() + b"\n"
        with self._lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                torn = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write(b"\n" + line if torn else line)
            self._video = ""  # what was read of it is no longer all

    def _read(self, video: str) -> dict[str, Answer]:
        known = {}
        try:
            lines = self._path(video).read_bytes().splitlines()
        except FileNotFoundError:
            return known
        for line in lines:
            try:
                found = json.loads(line)
                key = found.pop("key")
                known[key] = Answer(**found)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # torn
        return known

    def _path(self, video: str) -> Path:
        return self._folder / video[:2] / f"{video}.jsonl"


def read_json(answer: Answer) -> dict[str, Any]:
    """Returns the JSON object of an answer, which may stand in a fence of Markdown.

    Raises:
        ValueError: there is none.
    """
    text = answer.text.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].rpartition("```")[0]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _content(question: Question) -> list[dict]:
    """Returns the content of a message: frames in their order, then the text."""
    prompt = question.prompt
    shown = []
    if prompt.frames:
        frames = question.clip.frames(prompt.frames, longest=prompt.side, part=question.part)
        shown = [{"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in frames]
    return [*shown, {"type": "text", "text": prompt.text}]


def _data_url(frame: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
