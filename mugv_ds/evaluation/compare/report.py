"""The report of a comparison: HTML that needs nothing else, the same numbers as JSON, and lines for the terminal."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mugv_ds.evaluation.compare.page import QUESTION_LABELS
from mugv_ds.files.atomic import write_atomically

_HERE = Path(__file__).parent


def write_report(folder: Path, numbers: Mapping[str, Any]) -> Path:
    """Writes index.html and report.json of what `outcomes.summarise` returns; returns the path of the former.

    Raises:
        OSError: the file system failed.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "p": _p, "number": _number}
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = environment.get_template("report.html").render(
        numbers=numbers, labels=QUESTION_LABELS, style=Markup(style), style_hash=f"sha256-{digest}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.json": json.dumps(numbers, indent=1, sort_keys=True) + "\n", "index.html": page}
    for name, text in texts.items():
        with write_atomically(folder / name) as stream:
            stream.write(text.encode())
    return folder / "index.html"


def describe(numbers: Mapping[str, Any]) -> Iterator[str]:
    """Yields the report's lines for the terminal."""
    for question, found in numbers["questions"].items():
        yield f"{QUESTION_LABELS[question]}: {found['items']} of {numbers['items']} items, {found['votes']} votes"
        for pair in found["pairs"]:
            low, high = pair["interval"]
            yield (
                f"  {pair['first']} better {pair['wins']}, {pair['second']} better {pair['losses']}, both good "
                f"{pair['both_good']}, both bad {pair['both_bad']}, divided {pair['divided']}: {pair['first']} wins "
                f"{_percent(pair['win_rate'])} [{_percent(low)}, {_percent(high)}], sign test p = {_p(pair['p'])}"
            )
        if found["strengths"]:
            for one in found["strengths"]["scores"]:
                low, high = one["interval"]
                yield f"  {one['weights']}: {one['score']:+.0f} Elo [{low:+.0f}, {high:+.0f}] (Bradley–Terry)"
            if found["strengths"]["regularised"]:
                yield "  (scores with half a win added to both sides of each pair: somebody always won, or never met)"
        if found["agreement"]:
            yield f"  annotators agree with Krippendorff's alpha {_number(found['agreement']['alpha'])}"
        left = found["left"]
        yield f"  left {left['left']}, right {left['right']}: p = {_p(left['p'])} that sides do not matter"
    if not numbers["questions"]:
        yield "no votes yet"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
