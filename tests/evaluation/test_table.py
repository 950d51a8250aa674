"""The table's numbers, against what is computed by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from mugv_ds.evaluation.measures import DEMO_MEASURES, MEASURES
from mugv_ds.evaluation.results import Result
from mugv_ds.evaluation.table import bootstrap, make_table, text_lines, write_table


def result(weights: str, job: str, prompt: str) -> Result:
    return Result(weights, job, prompt, 0, 0, None, Path(f"{weights}/{job}.mp4"), {}, None, None)


def table_of(values: dict[str, dict[str, float]], prompts: dict[str, str], name: str = "motion"):
    results = [result(weights, job, prompts[job]) for weights, of in values.items() for job in of]
    measured = {(weights, job): {name: value} for weights, of in values.items() for job, value in of.items()}
    return make_table(results, measured, MEASURES | DEMO_MEASURES, weights=list(values), wanted=len(prompts))


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = bootstrap(values)
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean()) and found.prompts == 400
    assert (found.low, found.high) == pytest.approx((found.mean - 1.96 * error, found.mean + 1.96 * error), abs=0.02)
    assert bootstrap(values) == found
    few = bootstrap(values[:5])
    assert (few.low, few.high, few.excludes_zero) == (None, None, False) and bootstrap(values[:6]).low is not None


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(2)
    held = [(found := bootstrap(rng.normal(1, 1, 50))).low <= 1 <= found.high for _ in range(100)]
    assert 88 <= sum(held) <= 99


def test_differences_are_paired_over_prompts():
    """What prompts have in common, which is far more than what the weights differ by, cancels."""
    rng, prompts = np.random.default_rng(0), {f"{n:02d}": f"prompt {n}" for n in range(30)}
    common = {job: rng.normal(0, 100) for job in prompts}
    better = {job: value + 1 + rng.normal(0, 0.5) for job, value in common.items()}
    (line,) = table_of({"a": common, "b": better}, prompts).lines
    (difference,) = line.differences
    assert (difference.weights, difference.minus) == ("b", "a") and difference.interval.excludes_zero
    assert difference.interval.mean == pytest.approx(1, abs=0.3)
    assert line.means["a"].low < line.means["b"].mean < line.means["a"].high  # unpaired nothing would be seen
    (same,) = table_of({"a": common, "b": dict(common)}, prompts).lines[0].differences
    assert (same.interval.mean, same.interval.low, same.interval.high) == (0, 0, 0) and not same.interval.excludes_zero


def test_draws_of_one_prompt_count_once():
    prompts = {"00": "red", "01": "red", "02": "red", "03": "blue"}
    (line,) = table_of({"a": {"00": 1.0, "01": 1.0, "02": 1.0, "03": 0.0}}, prompts).lines
    assert line.means["a"].mean == 0.5 and line.means["a"].prompts == 2


def test_only_what_both_have_is_compared():
    prompts = {"00": "red", "01": "green", "02": "blue"}
    table = table_of({"a": {"00": 1.0, "01": 2.0}, "b": {"01": 5.0, "02": 9.0}, "c": {}}, prompts)
    (line,) = table.lines
    (difference,) = line.differences
    assert (difference.interval.mean, difference.interval.prompts) == (3.0, 1)
    assert table.videos == {"a": 2, "b": 2, "c": 0} and list(line.means) == ["a", "b"]


def test_the_files_say_what_the_terminal_does(tmp_path):
    prompts = {f"{n:02d}": f"prompt {n}" for n in range(12)}
    values = {"sft": dict.fromkeys(prompts, 0.0), "dpo": dict.fromkeys(prompts, 1.0) | {"00": 0.0}}
    table = table_of(values, prompts, "right")
    write_table(tmp_path, table, {"<script>": "&"})
    (difference,) = json.loads((tmp_path / "table.json").read_text())["measures"]["right"]["differences"]
    assert difference["mean"] == pytest.approx(11 / 12) and difference["excludes_zero"] and difference["prompts"] == 12
    page, text = (tmp_path / "table.html").read_text(), "\n".join(text_lines(table))
    low, high = (f"{difference[side]:+.4g}" for side in ("low", "high"))
    assert f"+0.9167 [{low}, {high}]" in text and f"+0.9167 [{low}, {high}]" in page
    assert "dpo − sft" in text and ">differs<" in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "http" not in page.split("</head>")[1]
    before = (tmp_path / "table.html").stat().st_mtime_ns
    write_table(tmp_path, table, {"<script>": "&"})
    assert (tmp_path / "table.html").stat().st_mtime_ns == before
