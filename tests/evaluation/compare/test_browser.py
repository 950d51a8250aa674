"""The page as people use it: in a browser, by keyboard."""

import itertools
import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from mugv_ds.evaluation.compare.draw import read_comparison
from mugv_ds.evaluation.compare.votes import Box
from tests.helpers.browser import chromium, served
from tests.helpers.evaluated import write_evaluation

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools/compare.py"))
KEYS = ("ArrowLeft", "ArrowRight", "b", "x", "s")
CHOICES = dict(zip(KEYS, ("left", "right", "both_good", "both_bad", "skip"), strict=True))


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    prompts = [f"A square number {number} <b>moves</b> </script> right." for number in range(21)]
    write_evaluation(root / "eval", ["sft", "dpo"], prompts, images=True)
    command = ["build", str(root / "eval/sft"), str(root / "eval/dpo"), "--out", str(root / "out"), "--single"]
    assert TOOL["main"]([*command, "--questions", "overall", "motion"]) == 0
    return root / "out"


@pytest.fixture
def page(browser):
    """A page in a profile of its own; what goes wrong in it fails the test."""
    context = browser.new_context(viewport={"width": 900, "height": 760})
    page, trouble = context.new_page(), []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda message: message.type == "error" and trouble.append(message.text))
    page.set_default_timeout(10_000)
    yield page
    context.close()
    # Where a server refuses votes or is away, as in some tests, the browser itself writes a line.
    assert not [line for line in trouble if not re.search("status of 40[39]|net::ERR_", line)], trouble


def start(page, name: str, *more: str) -> None:
    """Gives a name, and ticks more questions than the first."""
    page.fill("#name", name)
    for question in more:
        page.check(f"#choose input[value={question}]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#start", state="hidden")


def press(page, key: str) -> None:
    """Presses a key of a vote once both videos can be seen."""
    page.wait_for_selector("#work #wait", state="hidden")
    page.keyboard.press(key)


def kept(page) -> dict:
    """What the browser keeps of the present annotator."""
    store = json.loads(page.evaluate("Object.entries(localStorage).find(([key]) => key.startsWith('mugv'))[1]"))
    return store["people"][store["current"]]


def test_forty_votes_by_keyboard_survive_a_reload_and_are_undone_exported_and_on_the_disk(page, folder, tmp_path):
    comparison = read_comparison(folder)
    with served(folder) as address:
        page.goto(address)
        start(page, "Ana", "motion")
        expected = []
        for number in range(40):
            if number == 17:
                before = kept(page)["votes"]
                page.reload()
                assert kept(page)["votes"] == before and len(before) == 17
            item, question = comparison.items[number // 2], comparison.questions[number % 2]
            assert page.inner_text("#prompt") == item.prompt
            expected.append({"item": item.id, "question": question, "choice": CHOICES[KEYS[number % 5]]})
            press(page, KEYS[number % 5])
        assert page.inner_text("#count") == "40 of 42, 8 skipped"
        for _ in range(2):
            page.keyboard.press("u")
        press(page, "b")
        expected[38:] = [expected[38] | {"choice": "both_good"}]
        assert kept(page)["votes"] == expected
        page.wait_for_selector("#saved:has-text('on disk')")
        with page.expect_download() as download:
            page.keyboard.press("e")
        exported = tmp_path / "votes.json"
        download.value.save_as(exported)
        for key in ("ArrowLeft", "ArrowRight", "x"):
            press(page, key)
        page.wait_for_selector("#done")
    (votes,) = Box(folder / "votes", comparison).read()
    assert votes.annotator == "Ana" and [vote.model_dump() for vote in votes.votes][:39] == expected
    assert len(votes.votes) == 42

    # The export is older than what is there; alone, it is taken.
    assert TOOL["main"](["import", str(folder), str(exported)]) == 2
    (folder / "votes" / f"{votes.voter}.json").unlink()
    assert TOOL["main"](["import", str(folder), str(exported)]) == 0
    (votes,) = Box(folder / "votes", comparison).read()
    assert [vote.model_dump() for vote in votes.votes] == expected


def test_both_videos_play_in_step_and_begin_again(page, folder):
    with served(folder) as address:
        page.goto(address)
        start(page, "Watcher")
        page.wait_for_selector("#wait", state="hidden")
        state = "[...document.querySelectorAll('video')].map((video) => [video.currentTime, video.duration])"
        times = []
        for _ in range(24):
            (left, length), (right, other) = page.evaluate(state)
            assert length == other == pytest.approx(1.0) and abs(left - right) <= 0.2
            times.append(left)
            page.wait_for_timeout(100)
        assert max(times) > 0.8 and any(later < earlier for earlier, later in itertools.pairwise(times))
        page.keyboard.press(" ")
        (left, _), (right, _) = page.evaluate(state)
        page.wait_for_timeout(200)
        assert page.evaluate(state) == [[left, 1.0], [right, 1.0]] or left == pytest.approx(right, abs=0.1)
        assert page.evaluate("[...document.querySelectorAll('video')].every((video) => video.paused)")


def test_votes_given_while_the_server_is_away_reach_the_disk_later(page, folder):
    comparison = read_comparison(folder)
    with served(folder) as address:
        port = int(address.split(":")[2].split("/")[0])
        page.goto(address)
        start(page, "Offline")
        press(page, "ArrowLeft")
        page.wait_for_selector("#saved:has-text('on disk')")
    press(page, "x")
    page.wait_for_selector("#saved:has-text('in this browser only')")
    with served(folder, port) as address:
        press(page, "b")  # the old page has the old token
        page.wait_for_selector("#saved:has-text('open the new address')")
        page.goto(address)
        page.wait_for_selector("#saved:has-text('on disk')")
    (votes,) = (one for one in Box(folder / "votes", comparison).read() if one.annotator == "Offline")
    assert [vote.choice for vote in votes.votes] == ["left", "both_bad", "both_good"]


def test_of_two_people_with_one_name_the_second_is_asked_and_none_of_their_votes_is_lost(browser, page, folder):
    comparison = read_comparison(folder)
    with served(folder) as address:
        page.goto(address)
        start(page, "Kim")
        press(page, "ArrowLeft")
        page.wait_for_selector("#saved:has-text('on disk')")
        context = browser.new_context()
        other = context.new_page()
        other.goto(address)
        start(other, "kim")
        other.wait_for_selector("#taken", state="visible")
        assert "1 answer" in other.inner_text("#taken-text")
        other.click("#rename")
        start(other, "Kim B.")
        press(other, "ArrowRight")
        other.wait_for_selector("#saved:has-text('on disk')")
        context.close()

        context = browser.new_context()  # the first person, in another browser
        other = context.new_page()
        other.goto(address)
        start(other, "Kim")
        other.wait_for_selector("#taken", state="visible")
        other.click("#adopt")
        assert other.inner_text("#prompt") == comparison.items[1].prompt
        press(other, "b")
        other.wait_for_selector("#saved:has-text('on disk')")
        context.close()
        press(page, "x")  # the first browser does not know of that vote, which stays
        page.wait_for_selector("#saved:has-text('on disk')")
    votes = {one.annotator: [vote.choice for vote in one.votes] for one in Box(folder / "votes", comparison).read()}
    assert votes["Kim"][0] == "left" and len(votes["Kim"]) == 2 and votes["Kim B."] == ["right"]


@pytest.mark.parametrize("name", ["page/index.html", "page.html"])
def test_without_a_server_the_file_keeps_votes_and_exports_them(page, folder, name, tmp_path):
    page.goto((folder / name).as_uri())
    start(page, "File")
    for key in KEYS[:4]:
        press(page, key)
    page.reload()
    assert page.inner_text("#count") == "4 of 21"
    assert "in this browser" in page.inner_text("#saved")
    with page.expect_download() as download:
        page.click("#export")
    content = json.loads(Path(download.value.path()).read_text())
    assert Counter(vote["choice"] for vote in content["votes"]) == Counter(CHOICES[key] for key in KEYS[:4])
    assert re.fullmatch("[0-9a-f]{32}", content["voter"]) and content["comparison"] == read_comparison(folder).id


@pytest.mark.parametrize("size", [(400, 860), (900, 760), (1600, 900)])
def test_nothing_is_cut_off_and_videos_are_large_at_every_size(page, folder, size):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.goto((folder / "page/index.html").as_uri())
    start(page, "Looker")
    page.wait_for_selector("#wait", state="hidden")
    width, height = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
    assert (width, height) <= size
    boxes = [video.bounding_box() for video in page.query_selector_all("video")]
    assert all(box["width"] >= 180 and box["x"] >= 0 and box["x"] + box["width"] <= size[0] for box in boxes)
    buttons = [button for button in page.query_selector_all("button") if button.is_visible()]
    assert len(buttons) >= 11 and all(button.inner_text().strip() for button in buttons)
    for button in buttons:
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= size[0] and box["y"] + box["height"] <= size[1]
