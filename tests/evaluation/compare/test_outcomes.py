"""What several annotators say together, and what the report says of it."""

import json
import re

import pytest

from mugv_ds.evaluation.compare.outcomes import ELO, outcomes, summarise
from mugv_ds.evaluation.compare.report import describe, write_report
from mugv_ds.evaluation.compare.statistics import bradley_terry, sign_test
from mugv_ds.evaluation.compare.votes import parse_votes
from tests.helpers.voting import ballot, prefer


def votes_of(comparison, **choices):
    """Votes by annotator: a choice for each item, or a list of them in the items' order."""
    found = []
    for annotator, given in choices.items():
        said = given if callable(given) else dict(zip((item.id for item in comparison.items), given, strict=False)).get
        by_item = given if callable(given) else (lambda item, said=said: said(item.id))
        content = json.dumps(ballot(comparison, annotator, by_item)).encode()
        found.append(parse_votes(content, comparison, annotator))
    return found


@pytest.mark.parametrize(
    ("said", "choice"),
    [
        (["left"], "left"),
        (["left", "left", "right"], "left"),
        (["left", "right"], None),
        (["left", "both_good"], None),
        (["both_bad", "both_bad", "left"], "both_bad"),
        (["left", "left", "right", "right", "both_good"], None),
        (["left", "skip"], "left"),
    ],
)
def test_the_choice_that_more_make_than_any_other_counts(compared, said, choice):
    _, comparison = compared
    votes = votes_of(comparison, **{f"annotator {i}": [one] for i, one in enumerate(said)})
    (outcome,) = outcomes(comparison, votes, "overall")
    assert outcome.choice == choice
    assert outcomes(comparison, votes, "motion") == []
    if choice is None:
        assert summarise(comparison, votes)["questions"]["overall"]["ties"] == [outcome.tie()]


def test_skips_alone_say_nothing(compared):
    _, comparison = compared
    votes = votes_of(comparison, Ana=["skip"] * 8)
    numbers = summarise(comparison, votes)
    assert numbers["questions"] == {} and numbers["annotators"][0]["skip"] == 8
    assert list(describe(numbers)) == ["no votes yet"]


def test_numbers_of_two_weights(compared):
    """Sides are turned back into weights: who always prefers dpo says left and right."""
    _, comparison = compared
    choices = [*(prefer("dpo")(item) for item in comparison.items[:5]), prefer("sft")(comparison.items[5])]
    votes = votes_of(comparison, Ana=[*choices, "both_good", "both_bad"], Ben=choices[:3])
    assert {"left", "right"} == set(choices[:5])
    found = summarise(comparison, votes)["questions"]["overall"]
    (pair,) = found["pairs"]
    assert (pair["first"], pair["wins"], pair["losses"]) == ("sft", 1, 5)
    assert (pair["both_good"], pair["both_bad"], pair["divided"], pair["items"]) == (1, 1, 0, 8)
    assert pair["win_rate"] == pytest.approx(1 / 6) and pair["p"] == sign_test(1, 5)
    assert pair["interval"][0] < 1 / 6 < pair["interval"][1]
    assert found["strengths"] is None and found["votes"] == 11 and found["items"] == 8
    assert found["left"]["left"] + found["left"]["right"] == 9
    assert found["agreement"]["cohen"] == [{"first": "Ana", "second": "Ben", "items": 3, "kappa": pytest.approx(1)}]


def test_three_weights_have_scores(three):
    _, comparison = three
    order = ("kto", "dpo", "sft")  # the best first, with one upset and one tie

    def choice(item):
        if item == comparison.items[0]:
            return "both_good"
        best = min((item.left, item.right), key=lambda side: order.index(side.weights))
        better = "left" if best is item.left else "right"
        return {"left": "right", "right": "left"}[better] if item == comparison.items[1] else better

    found = summarise(comparison, votes_of(comparison, Ana=choice))["questions"]["overall"]
    scores = found["strengths"]["scores"]
    assert [one["weights"] for one in scores] == list(order)
    assert sum(one["score"] for one in scores) == pytest.approx(0, abs=1e-6)
    names = comparison.weights
    wins = [[0.0] * 3 for _ in names]
    for item in comparison.items:
        said, left, right = choice(item), names.index(item.left.weights), names.index(item.right.weights)
        wins[left][right] += {"left": 1, "both_good": 0.5}.get(said, 0)
        wins[right][left] += {"right": 1, "both_good": 0.5}.get(said, 0)
    fit = bradley_terry(wins)
    assert scores[0]["score"] == pytest.approx(ELO * fit.strength[names.index("kto")])
    assert found["strengths"]["regularised"] == fit.regularised


def test_annotators_who_left_out_items_are_compared_where_they_meet(compared):
    _, comparison = compared
    said = ["left", "right", "both_good", "both_bad"] * 2
    votes = votes_of(comparison, Ana=said, Ben=said[:6], Cem=[*said[:2], "left", "left"])
    agreement = summarise(comparison, votes)["questions"]["overall"]["agreement"]
    assert agreement["items"] == 6 and agreement["fleiss"]["items"] == 4
    kappas = {(one["first"], one["second"]): (one["items"], one["kappa"]) for one in agreement["cohen"]}
    assert kappas["Ana", "Ben"] == (6, pytest.approx(1)) and kappas["Ana", "Cem"][0] == 4
    assert 0 < kappas["Ana", "Cem"][1] < 1 and 0 < agreement["alpha"] < 1


def test_the_report_is_one_page_of_the_same_bytes_that_runs_no_script_whatever_names_are(three, tmp_path):
    _, comparison = three
    evil = "<script>alert(1)</script>"
    votes = votes_of(comparison, **{evil: prefer("dpo"), "Ben": ["both_bad", "left"], "Cem": ["left", "right"]})
    numbers = summarise(comparison, votes)
    page = write_report(tmp_path / "report", numbers).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert "http:" not in page and "src=" not in page and " style=" not in page
    assert json.loads((tmp_path / "report/report.json").read_text()) == json.loads(json.dumps(numbers))
    write_report(tmp_path / "again", numbers)
    for name in ("index.html", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "report" / name).read_bytes()
    lines = "\n".join(describe(numbers))
    assert re.search(r"sft better \d+, dpo better \d+, .*sign test p = ", lines) and "Elo" in lines
    for value in re.findall(r'(?:width|x)="(-?[\d.e-]+)"', page):
        assert -1e-9 <= float(value) <= 100 + 1e-9
