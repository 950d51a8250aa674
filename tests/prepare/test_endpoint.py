"""The client of an endpoint, against a real server on this machine: what it asks, retries, keeps and gives up."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from mugv_ds.config.prepare_schema import EndpointSection
from mugv_ds.prepare.endpoint import Answer, Endpoint, EndpointError, Prompt, Question, read_json
from tests.helpers.chat import chat_server, completion, text_of
from tests.helpers.clip_views import broken_clip, clip_view

PROMPT = Prompt("What is it?", frames=3, side=32)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def endpoint(chat, work, **more):
    return Endpoint(EndpointSection(url=chat.url, model="m", **more), work)


def questions(count, prompt=PROMPT):
    return [Question(clip_view(number), prompt) for number in range(count)]


def by_text(count):
    """Questions of which each asks for its number in words."""
    return [Question(clip_view(number), Prompt(f"number {number}")) for number in range(count)]


def parse(answer):
    if answer.text == "garbage":
        raise ValueError("no JSON")
    return {"said": answer.text, "finish": answer.finish, "refused": answer.refused}


def test_a_request_shows_frames_and_asks_for_the_likeliest_answer(tmp_path):
    with chat_server(lambda body: "a dog") as chat:
        schema = {"type": "object"}
        question = Question(clip_view(4), Prompt("What?", 3, 32, schema), part=(1, 2))
        rows = endpoint(chat, tmp_path, max_tokens=99).ask([question], parse)
    assert rows == [{"said": "a dog", "finish": "stop", "refused": False}]
    (body,) = chat.asked
    assert (body["temperature"], body["seed"], body["max_tokens"], body["model"]) == (0, 0, 99, "m")
    assert body["response_format"]["json_schema"]["schema"] == schema
    *shown, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What?"} and len(shown) == 3
    head, _, data = shown[0]["image_url"]["url"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64" and image.size == (32, 18) and image.getpixel((9, 9)) == (40, 40, 40)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_endpoint_is_asked_again(tmp_path, status):
    replies = iter([(status, {"error": {"message": "later"}})] * 2)
    with chat_server(lambda body: next(replies, "a dog")) as chat:
        assert endpoint(chat, tmp_path).ask(questions(1), parse)[0]["said"] == "a dog"
    assert len(chat.asked) == 3


def test_garbage_costs_only_its_clip_and_is_asked_anew_by_the_next_run(tmp_path):
    with chat_server(lambda body: "garbage" if text_of(body) == "number 1" else "fine") as chat:
        rows = endpoint(chat, tmp_path).ask(by_text(3), parse)
        assert [row.get("said") for row in rows] == ["fine", None, "fine"]
        assert rows[1]["error"] == "no JSON; it answered 'garbage' (stop)"
        chat.reply, chat.asked = lambda body: "better", []
        rows = endpoint(chat, tmp_path).ask(by_text(3), parse)
        assert [row["said"] for row in rows] == ["fine", "better", "fine"] and len(chat.asked) == 1


def test_what_one_clip_earns_is_told_from_what_the_endpoint_does(tmp_path):
    """A request that is refused is its clip's; one that fails five times over is too, if others are answered."""

    def reply(body):
        text = text_of(body)
        if text == "number 1":
            return 400, {"error": {"message": "too many tokens"}}
        return (500, {"error": {"message": "crash"}}) if text == "number 2" else "fine"

    with chat_server(reply) as chat:
        rows = endpoint(chat, tmp_path, concurrency=1).ask(by_text(5), parse)
    assert [row.get("said") for row in rows] == ["fine", None, None, "fine", "fine"]
    assert "too many tokens" in rows[1]["error"] and "crash" in rows[2]["error"]
    asked = [text_of(body) for body in chat.asked]
    assert asked.count("number 1") == 1 and asked.count("number 2") == 6 and asked[-1] == "number 2"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((401, {"error": {"message": "wrong key"}}), "wrong key"),
        ((404, {"error": {"message": "no model m"}}), "no model m"),
        ((200, b"<html>"), "no answer of a chat"),
        ((200, {"choices": []}), "no answer of a chat"),
        ("garbage", "no JSON"),
    ],
)
def test_five_failures_in_a_row_stop_the_step_and_the_work_is_kept(tmp_path, bad, words):
    with chat_server(lambda body: "fine" if len(chat.asked) <= 3 else bad) as chat:
        with pytest.raises(EndpointError, match=f"5 failures in a row, the last: .*{words}") as error:
            endpoint(chat, tmp_path, concurrency=1).ask(by_text(20), parse)
        assert chat.url in str(error.value) and len(chat.asked) == 8 and error.value.status == 1
        chat.reply, chat.asked = lambda body: "late", []
        rows = endpoint(chat, tmp_path).ask(by_text(20), parse)
        assert [row["said"] for row in rows] == ["fine"] * 3 + ["late"] * 17 and len(chat.asked) == 17


def test_an_endpoint_that_is_not_there_stops_the_step_whatever_the_number_of_clips(tmp_path):
    with chat_server(lambda body: "fine") as chat:
        pass
    with pytest.raises(EndpointError, match=r"it failed: Connection error.*refused"):
        endpoint(chat, tmp_path).ask(questions(1), parse)


def test_a_time_out_is_a_failure(tmp_path):
    with (
        chat_server(lambda body: time.sleep(0.5) or "late") as chat,
        pytest.raises(EndpointError, match="timed out"),
    ):
        endpoint(chat, tmp_path, timeout=0.05).ask(questions(1), parse)


def test_failures_between_answers_are_not_in_a_row(tmp_path):
    with chat_server(lambda body: "garbage" if len(chat.asked) % 5 else "fine") as chat:
        rows = endpoint(chat, tmp_path, concurrency=1).ask(by_text(20), parse)
    assert sum("error" in row for row in rows) == 16


def test_nothing_is_asked_twice_and_other_questions_are(tmp_path):
    with chat_server(lambda body: "fine") as chat:
        endpoint(chat, tmp_path).ask(questions(3), parse)
        assert endpoint(chat, tmp_path).ask(questions(3), parse)[2]["said"] == "fine" and len(chat.asked) == 3
        endpoint(chat, tmp_path).ask(questions(3, Prompt("And now?")), parse)
        endpoint(chat, tmp_path, max_tokens=77).ask(questions(3), parse)
        Endpoint(EndpointSection(url=chat.url, model="other"), tmp_path).ask(questions(3), parse)
        endpoint(chat, tmp_path).ask([Question(clip_view(0), PROMPT, (0, 2))], parse)
        assert len(chat.asked) == 13


def test_a_torn_line_is_not_an_answer_and_spoils_no_other(tmp_path):
    with chat_server(lambda body: "fine") as chat:
        endpoint(chat, tmp_path).ask(questions(1), parse)
        (file,) = tmp_path.rglob("*.jsonl")
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        endpoint(chat, tmp_path).ask(questions(1), parse)
        assert len(chat.asked) == 2 and file.read_bytes() == whole[:-9] + b"\n" + whole
        endpoint(chat, tmp_path).ask(questions(1), parse)
        assert len(chat.asked) == 2


def test_a_killed_process_has_kept_its_answers(tmp_path):
    program = """
import sys
from pathlib import Path
from tests.prepare.test_endpoint import by_text, parse, endpoint
class Chat: url = sys.argv[1]
endpoint(Chat, Path(sys.argv[2]), concurrency=1).ask(by_text(9), parse)
"""

    def reply(body):
        if len(chat.asked) == 5:
            os.kill(process.pid, signal.SIGKILL)
        return "fine"

    with chat_server(reply) as chat:
        process = subprocess.Popen([sys.executable, "-c", program, chat.url, tmp_path], cwd=Path(__file__).parents[2])
        assert process.wait(60) == -signal.SIGKILL
        chat.asked = []
        chat.reply = lambda body: "fine"
        rows = endpoint(chat, tmp_path).ask(by_text(9), parse)
    assert len(rows) == 9 and len(chat.asked) == 5
    assert {text_of(body) for body in chat.asked} == {f"number {number}" for number in range(4, 9)}


def test_no_more_requests_than_agreed_are_under_way(tmp_path):
    with chat_server(lambda body: time.sleep(0.03) or "fine") as chat:
        endpoint(chat, tmp_path, concurrency=4).ask(questions(24), parse)
    assert chat.most == 4


def test_a_video_that_cannot_be_decoded_is_no_failure_of_the_endpoint(tmp_path):
    with chat_server(lambda body: "fine") as chat:
        asked = [*(Question(broken_clip(number), PROMPT) for number in range(8)), *questions(1)]
        rows = endpoint(chat, tmp_path).ask(asked, parse)
    assert rows[0]["error"] == "decode_error: 0.mp4: Invalid data" and rows[8]["said"] == "fine"


def test_a_refusal_is_an_answer(tmp_path):
    with chat_server(lambda body: (200, completion(None, refusal="I will not."))) as chat:
        (row,) = endpoint(chat, tmp_path).ask(questions(1), parse)
    assert row == {"said": "I will not.", "finish": "stop", "refused": True}


@pytest.mark.parametrize("text", ['{"a": 1}', '```json\n{"a": 1}\n```', ' {"a": 1} '])
def test_json_is_read_also_from_a_fence(text):
    assert read_json(Answer(text, "stop")) == {"a": 1}


@pytest.mark.parametrize("text", ["", "yes", "[1]", '{"a": ', "[" * 100_000])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(ValueError, match="no JSON"):
        read_json(Answer(text, "stop"))


def test_the_key_is_sent_and_never_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with chat_server(lambda body: "fine") as chat:
        endpoint(chat, tmp_path).ask(questions(1), parse)
    assert "secret-key" not in json.dumps(chat.asked)
    assert all(b"secret-key" not in file.read_bytes() for file in tmp_path.rglob("*.jsonl"))
