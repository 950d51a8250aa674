"""Votes without a browser."""

import json
from collections.abc import Callable
from hashlib import md5
from pathlib import Path

from mugv_ds.evaluation.compare.draw import QUESTIONS, Comparison, Item, draw, write_comparison
from mugv_ds.evaluation.compare.page import write_page


def build(results: Path, folder: Path, *weights: str, **given) -> Comparison:
    """Draws a comparison of all questions and writes it with its page; returns it."""
    comparison, files = draw(results, weights, QUESTIONS, **{"seed": 0} | given)
    folder.mkdir()
    write_comparison(folder, comparison)
    write_page(folder / "page", comparison, files)
    return comparison


def ballot(comparison: Comparison, annotator: str, choice: Callable[[Item], str | None]) -> dict:
    """What a browser would send: of each item the choice in answer to "overall", or none for None."""
    votes = [
        {"item": item.id, "question": "overall", "choice": said}
        for item in comparison.items
        if (said := choice(item)) is not None
    ]
    voter = md5(annotator.encode(), usedforsecurity=False).hexdigest()
    who = {"comparison": comparison.id, "voter": voter, "annotator": annotator}
    return who | {"revision": len(votes), "votes": votes}


def cast(folder: Path, content: dict) -> None:
    """Writes votes as the server does."""
    (folder / "votes").mkdir(exist_ok=True)
    (folder / "votes" / f"{content['voter']}.json").write_text(json.dumps(content))


def prefer(weights: str) -> Callable[[Item], str | None]:
    """Always calls these weights' video better; does not answer where they have none."""
    return lambda item: {item.left.weights: "left", item.right.weights: "right"}.get(weights)
