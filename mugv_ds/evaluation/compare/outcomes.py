"""What several voters say together of each item, and what that says of the weights."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mugv_ds.evaluation.compare.draw import Comparison, Item, Question
from mugv_ds.evaluation.compare.statistics import (
    bradley_terry,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    sign_test,
    wilson_interval,
)
from mugv_ds.evaluation.compare.votes import Votes

SAID = ("left", "right", "both_good", "both_bad")
ELO = 400 / np.log(10)  # points of a natural logarithm, in the scale of Elo


@dataclass(frozen=True)
class Outcome:
    """What is said of an item. said: by annotator, one of `SAID`; at least one."""

    item: Item
    said: dict[str, str]

    @property
    def counts(self) -> Counter[str]:
        """Returns how many say what."""
        return Counter(self.said.values())

    @property
    def choice(self) -> str | None:
        """Returns what more say than anything else; None where no choice is above all others."""
        (first, most), *others = self.counts.most_common(2)
        return None if others and others[0][1] == most else first

    def better(self) -> str | None:
        """Returns the weights of the better side; None where neither is."""
        return {"left": self.item.left.weights, "right": self.item.right.weights}.get(self.choice)

    def tie(self) -> str:
        """Says in words how annotators are divided."""
        counts = ", ".join(f"{self.counts[name]} {name.replace('_', ' ')}" for name in SAID if self.counts[name])
        return f"item {self.item.id} ({self.item.left.weights} left, {self.item.right.weights} right): {counts}"


def outcomes(comparison: Comparison, votes: Sequence[Votes], question: Question) -> list[Outcome]:
    """Returns what is said of the items that anybody has answered, in the order of the comparison."""
    said: dict[str, dict[str, str]] = {}
    for voter in votes:
        for vote in voter.votes:
            if vote.question == question and vote.choice != "skip":
                said.setdefault(vote.item, {})[voter.annotator] = vote.choice
    return [Outcome(item, said[item.id]) for item in comparison.items if item.id in said]


def summarise(comparison: Comparison, votes: Sequence[Votes]) -> dict[str, Any]:
    """Returns all numbers of the report, of JSON types.

    Of several annotators an item counts once, as most of them say: their votes on one item are not independent, as the
    sign test asks.
    """
    answered = {question: outcomes(comparison, votes, question) for question in comparison.questions}
    return {
        "weights": list(comparison.weights),
        "items": len(comparison.items),
        "seed": comparison.seed,
        "annotators": [_annotator(voter) for voter in votes],
        "questions": {question: _question(comparison, found) for question, found in answered.items() if found},
    }


def _annotator(voter: Votes) -> dict[str, Any]:
    counts = Counter(vote.choice for vote in voter.votes)
    return {"name": voter.annotator} | {choice: counts[choice] for choice in (*SAID, "skip")}


def _question(comparison: Comparison, found: Sequence[Outcome]) -> dict[str, Any]:
    raw = sum((one.counts for one in found), Counter())
    return {
        "items": len(found),
        "votes": raw.total(),
        "pairs": list(_pairs(comparison, found)),
        "strengths": _strengths(comparison, found),
        "agreement": _agreement(found),
        "left": {"left": raw["left"], "right": raw["right"], "p": sign_test(raw["left"], raw["right"])},
        "ties": [one.tie() for one in found if one.choice is None],
    }


def _pairs(comparison: Comparison, found: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """Yields, for every two of the weights, how often either won and whether chance would do as much."""
    for first, second in itertools.combinations(comparison.weights, 2):
        these = [one for one in found if {one.item.left.weights, one.item.right.weights} == {first, second}]
        wins, losses = (sum(one.better() == name for one in these) for name in (first, second))
        low, high = wilson_interval(wins, wins + losses)
        yield {
            "first": first,
            "second": second,
            "items": len(these),
            "wins": wins,
            "losses": losses,
            "both_good": sum(one.choice == "both_good" for one in these),
            "both_bad": sum(one.choice == "both_bad" for one in these),
            "divided": sum(one.choice is None for one in these),
            "win_rate": wins / (wins + losses) if wins + losses else None,
            "interval": [low, high],
            "p": sign_test(wins, losses),
        }


def _strengths(comparison: Comparison, found: Sequence[Outcome]) -> dict[str, Any] | None:
    """Returns Bradley–Terry scores on the scale of Elo with mean 0, the best first; None for two weights."""
    names = comparison.weights
    if len(names) == 2:
        return None
    wins = np.zeros((len(names), len(names)))
    for one in found:
        sides = [names.index(side.weights) for side in (one.item.left, one.item.right)]
        share = {one.item.left.weights: 1.0, one.item.right.weights: 0.0}.get(one.better(), 0.5)
        wins[*sides] += share
        wins[*sides[::-1]] += 1 - share
    fit = bradley_terry(wins)
    scores = [
        {
            "weights": name,
            "score": float(ELO * fit.strength[i]),
            "interval": [float(ELO * end) for end in fit.interval(i)],
        }
        for i, name in enumerate(names)
    ]
    return {"regularised": fit.regularised, "scores": sorted(scores, key=lambda one: -one["score"])}


def _agreement(found: Sequence[Outcome]) -> dict[str, Any] | None:
    """Returns how far annotators agree; None where no item has two."""
    shared = [one for one in found if len(one.said) > 1]
    if not shared:
        return None
    names = sorted({name for one in found for name in one.said})
    ratings = [[one.counts[choice] for choice in SAID] for one in shared]
    complete = [row for row in ratings if sum(row) == len(names)]
    return {
        "items": len(shared),
        "alpha": krippendorff_alpha(ratings),
        "fleiss": {"items": len(complete), "kappa": fleiss_kappa(complete)} if len(names) > 2 else None,
        "cohen": [
            {"first": first, "second": second, "items": len(both), "kappa": cohen_kappa(both)}
            for first, second in itertools.combinations(names, 2)
            if (both := [(one.said[first], one.said[second]) for one in shared if {first, second} <= one.said.keys()])
        ],
    }
