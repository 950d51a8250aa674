"""The multimodal filter: its questions, its windows, and a caption in the same answer."""

import json

import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare import caption, vlm
from mugv_ds.prepare.endpoint import EndpointError
from mugv_ds.prepare.prompts import QUESTIONS
from tests.helpers.chat import chat_server, completion, text_of
from tests.helpers.clip_views import broken_clip, clip_view

ALL_NO = dict.fromkeys(QUESTIONS, "no")


def config(chat, **more):
    return PrepareConfig(vlm={"url": chat.url, "model": "m", "concurrency": 1, **more}, caption={"sidecar": False})


def shares(row):
    return {answer["question"]: answer["yes"] for answer in row["answers"]}


def test_shares_of_windows_are_kept_and_unsure_is_not_yes(tmp_path):
    said = iter([ALL_NO | {"shake": "yes"}, ALL_NO | {"shake": "Yes", "border": "unsure"}, ALL_NO, ALL_NO])
    with chat_server(lambda body: json.dumps(next(said))) as chat:
        long, broken, short = vlm.load(config(chat), tmp_path)(
            [clip_view(0, duration=15.0), broken_clip(1), clip_view(2, duration=5.0)]
        )
    assert shares(long) == dict.fromkeys(QUESTIONS, 0.0) | {"shake": 2 / 3}
    assert (long["model"], long["error"]) == ("m", None)
    assert "Invalid data" in broken["error"] and "answers" not in broken
    assert set(shares(short).values()) == {0.0}
    assert len(chat.asked) == 4 and all(len(body["messages"][0]["content"]) == 9 for body in chat.asked)


@pytest.mark.parametrize(
    "answer", [ALL_NO | {"shake": "maybe"}, dict.fromkeys(list(QUESTIONS)[1:], "no"), ALL_NO | {"border": None}]
)
def test_other_words_and_missing_answers_are_no_answer(tmp_path, answer):
    with chat_server(lambda body: json.dumps(answer)) as chat:
        (row,) = vlm.load(config(chat), tmp_path)([clip_view(0)])
    assert "is not answered by yes, no or unsure" in row["error"]


def test_an_answer_that_was_cut_is_no_answer(tmp_path):
    with chat_server(lambda body: (200, completion('{"overlay_text": "n', "length"))) as chat:
        (row,) = vlm.load(config(chat), tmp_path)([clip_view(0)])
    assert row["error"].startswith("no JSON") and "(length)" in row["error"]


def test_one_request_answers_filter_and_caption(tmp_path):
    words = "A red ball rolls over a table."
    with chat_server(lambda body: json.dumps(ALL_NO | {"caption": words})) as chat:
        merged = config(chat, merge=True)
        clips = [clip_view(0, duration=30.0), clip_view(1)]
        assert all(row["error"] is None for row in vlm.load(merged, tmp_path)(clips))
        rows = caption.load(merged, tmp_path)(clips)
    assert [row["caption"] for row in rows] == [words] * 2 and rows[0]["source"] == "m" and rows[0]["reason"] is None
    assert len(chat.asked) == 2 and "at most 180 words" in text_of(chat.asked[0])
    assert caption.why_skipped(merged) is None


def test_the_answer_must_have_the_caption_that_was_asked_for(tmp_path):
    with chat_server(lambda body: json.dumps(ALL_NO)) as chat:
        (row,) = vlm.load(config(chat, merge=True), tmp_path)([clip_view(0)])
    assert row["error"].startswith("no caption")


def test_what_decides_the_answers_is_in_the_key_and_where_they_come_from_is_not():
    def key(**more):
        given = PrepareConfig(vlm={"url": "http://a/v1", "model": "m", **more})
        return vlm.STEP.key(given, weights=vlm.weights(given))

    assert key() == key(url="https://b/v1", concurrency=3, timeout=7.0, threshold=0.9)
    others = [key(model="n"), key(frames=4), key(side=224), key(window=2.0), key(max_tokens=50), key(merge=True)]
    assert len({key(), *others}) == 7


def test_without_an_endpoint_it_is_skipped_and_a_dead_one_is_an_error(tmp_path):
    assert vlm.why_skipped(PrepareConfig()) == "vlm.url not given"
    with chat_server(lambda body: "") as chat:
        pass
    with pytest.raises(EndpointError):
        vlm.load(config(chat), tmp_path)([clip_view(0)])


def test_an_endpoint_needs_a_model():
    with pytest.raises(ValueError, match="an endpoint needs a model"):
        PrepareConfig(vlm={"url": "http://a/v1"})
