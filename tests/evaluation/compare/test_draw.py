"""The draw is fair, told by its seed, and hidden from who votes."""

import itertools
import json
import re
from collections import Counter

import pytest

from mugv_ds.config import InputError
from mugv_ds.evaluation.compare.draw import QUESTIONS, draw, read_comparison, write_comparison
from mugv_ds.evaluation.compare.page import write_page, write_single_page
from tests.evaluation.compare.conftest import PROMPTS


def test_every_two_weights_meet_once_a_prompt_and_sides_are_even_over_seeds(results):
    left = Counter()
    for seed in range(40):
        comparison, files = draw(results, ["sft", "dpo", "kto"], QUESTIONS, seed=seed)
        met = Counter((item.job, frozenset((item.left.weights, item.right.weights))) for item in comparison.items)
        assert set(met.values()) == {1} and len(met) == 3 * len(PROMPTS)
        left.update((item.left.weights, item.right.weights) for item in comparison.items)
        assert {side.id for item in comparison.items for side in (item.left, item.right)} <= files.keys()
    for first, second in itertools.combinations(("sft", "dpo", "kto"), 2):
        n = left[first, second] + left[second, first]
        assert n == 40 * len(PROMPTS) and abs(left[first, second] - n / 2) < 4 * (n / 4) ** 0.5


def test_the_same_seed_draws_the_same_and_a_side_does_not_depend_on_other_items(results):
    whole, _ = draw(results, ["sft", "dpo", "kto"], QUESTIONS, seed=3)
    again, _ = draw(results, ["sft", "dpo", "kto"], QUESTIONS, seed=3)
    assert whole == again and whole.id == again.id
    few, files = draw(results, ["sft", "dpo"], ["overall"], seed=3, limit=5)
    assert len(few.items) == 5 and set(few.items) <= set(whole.items) and few.id != whole.id
    assert len(files) == 10 + len({item.image for item in few.items} - {None})
    other, _ = draw(results, ["sft", "dpo", "kto"], QUESTIONS, seed=4)
    assert [item.job for item in whole.items] != [item.job for item in other.items]


def test_nothing_that_a_browser_loads_names_weights_or_jobs(compared, results):
    folder, comparison = compared
    write_single_page(folder / "page.html", comparison, folder / "page")
    names = sorted(path.name for path in (folder / "page/media").iterdir())
    assert len(names) == 2 * len(PROMPTS) + len(PROMPTS) // 2
    assert all(re.fullmatch(r"[0-9a-f]{16}\.(mp4|png)", name) for name in names)
    for path in (folder / "page/index.html", folder / "page.html"):
        page = path.read_text()
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
        assert {key for item in data["items"] for key in item} == {"id", "prompt", "image", "left", "right"}
        assert set(data) == {"id", "questions", "items"}
        for secret in ("sft", "dpo", *(item.job for item in comparison.items), str(results)):
            assert not re.search(rf"\b{re.escape(secret)}\b", re.sub("base64,[A-Za-z0-9+/=]*", "", page)), secret
        assert "http:" not in page and "https:" not in page and "src=" not in page.partition("<body>")[0]
    times = [(folder / "page/media" / name).stat().st_mtime_ns for name in names]
    assert times == sorted(times)  # copies, made in the order of their names


def test_prompts_cannot_leave_their_place_in_the_page(results, tmp_path):
    comparison, files = draw(results, ["sft", "dpo"], QUESTIONS, seed=0, limit=1)
    evil = "</script><script>alert(1)</script><!-- & \u2028 {{ 7 * 7 }}"
    item = comparison.items[0].model_copy(update={"prompt": evil})
    page = write_page(tmp_path / "page", comparison.model_copy(update={"items": (item,)}), files).read_text()
    assert "alert(1)</script>" not in page and page.count("<script") == page.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["items"][0]["prompt"] == evil


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["sft", "nobody"], "no videos of 'nobody'; there are some of sft, dpo, kto"),
        (["sft"], "two or more"),
        (["sft", "sft"], "each once"),
    ],
)
def test_weights_that_cannot_be_compared_are_refused(results, weights, message):
    with pytest.raises(InputError, match=message):
        draw(results, weights, QUESTIONS, seed=0)


@pytest.mark.parametrize("content", ["", "[]", '{"items": []}', "[" * 100_000])
def test_a_damaged_draw_is_one_error(compared, content):
    folder, _ = compared
    (folder / "comparison.json").write_text(content)
    with pytest.raises(InputError, match=r"comparison\.json: .+") as error:
        read_comparison(folder)
    assert "\n" not in str(error.value)


def test_the_draw_reads_back_as_it_was(compared):
    folder, comparison = compared
    before = (folder / "comparison.json").read_bytes()
    assert read_comparison(folder) == comparison and read_comparison(folder).id == comparison.id
    write_comparison(folder, comparison)
    assert (folder / "comparison.json").read_bytes() == before
    with pytest.raises(InputError, match=r"holds no comparison\.json"):
        read_comparison(folder / "page")
