"""Tags by a list of words, and by an endpoint."""

import json

import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare import tags
from mugv_ds.prepare.tags import WordListError, matcher
from tests.helpers.chat import chat_server, text_of
from tests.helpers.clip_views import clip_view

LIST = """
# what is drawn
animal:dog = dog, puppy, puppies
nature:fire = fire
vehicle:truck = truck, fire truck
"""


def built_in(text):
    (row,) = tags.load(PrepareConfig(), None)([clip_view(0, caption=text)])
    return row["tags"]


def test_whole_words_count_in_any_case_and_number():
    match = matcher(LIST, "list")
    assert match("Two DOGS and a puppy’s toy") == ["animal:dog"]
    assert match("hotdogma firemen dogged") == []
    assert match("A red fire\n truck.") == ["vehicle:truck"]
    assert match("A fire near the truck") == ["nature:fire", "vehicle:truck"]


def test_the_built_in_list_has_nine_classes_and_finds_what_captions_tell():
    lines = [line.partition("=")[0] for line in tags._list_text(PrepareConfig()).splitlines() if ":" in line]
    names = [line.strip() for line in lines if not line.startswith("#")]
    assert len(names) == len(set(names)) == 85 and len({name.partition(":")[0] for name in names}) == 9
    found = built_in("An old woman walks her dog along a beach at sunset while children play near the waves.")
    assert found == ["action:walk", "animal:dog", "nature:sea", "nature:sunset", "people:child", "people:elderly"]
    assert built_in("Blue.") == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dog, cat", r"list:1: 'dog, cat': must be class:value = word, word, …"),
        ("animal:dog = dog,, cat", "list:1: '' is no word"),
        ("a:dog = dog\n\nb:hound = dog", "list:3: 'dog' is a word of a:dog"),
        ("a:dog = dog\na:dog = hound", "list:2: a:dog has a line already"),
        ("# nothing", "list: has no tags"),
    ],
)
def test_bad_lists_are_named_by_line(line, words):
    with pytest.raises(WordListError, match=words):
        matcher(line, "list")


def test_a_list_of_ones_own_changes_the_key(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(LIST)
    own = PrepareConfig(tags={"words": str(path)})
    first = tags.weights(own)
    assert first != tags.weights(PrepareConfig())
    path.write_text(LIST + "animal:cat = cat\n")
    assert tags.weights(own) != first
    path.write_bytes(b"\xff")
    with pytest.raises(WordListError, match=r"words\.txt: not UTF-8"):
        tags.load(own, tmp_path)


def test_an_endpoint_names_tags_of_captions_without_frames(tmp_path):
    answer = {"subject": ["Dog ", "dog", "x" * 99], "action": ["run"], "scene": [], "style": ["close  up"]}
    with chat_server(lambda body: json.dumps(answer)) as chat:
        config = PrepareConfig(tags={"url": chat.url, "model": "m"})
        score = tags.load(config, tmp_path)
        clips = [clip_view(0, caption="A dog runs."), clip_view(1)]
        told, untold = score(clips)
        score(clips)
        assert len(chat.asked) == 1 and text_of(chat.asked[0]).endswith("Caption: A dog runs.")
        assert len(chat.asked[0]["messages"][0]["content"]) == 1
        score([clip_view(0, caption="A cat sleeps.")])
        assert len(chat.asked) == 2
        chat.reply = lambda body: json.dumps(answer | {"scene": "park"})
        (bad,) = score([clip_view(2, caption="A park.")])
    assert told["tags"] == ["action:run", "style:close up", "subject:dog"]
    assert untold == {"clip": f"{1:032x}", "error": "no caption to take tags from"}
    assert bad["error"].startswith("scene is no list of words")
    assert tags.STEP.key(config, weights=tags.weights(config)) != tags.STEP.key(
        PrepareConfig(), weights=tags.weights(PrepareConfig())
    )
