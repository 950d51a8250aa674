"""One evaluation of three weights, and comparisons of them."""

from pathlib import Path

import pytest

from tests.helpers.evaluated import write_evaluation
from tests.helpers.voting import build

PROMPTS = [f"A square number {number} moves right." for number in range(8)]


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Path:
    """An evaluation of sft, dpo and kto with everything kept."""
    folder = tmp_path_factory.mktemp("evaluation") / "eval"
    return write_evaluation(folder, ["sft", "dpo", "kto"], PROMPTS, frames=2, images=True)


@pytest.fixture
def compared(results, tmp_path):
    """(folder, comparison) of sft and dpo."""
    return tmp_path / "out", build(results, tmp_path / "out", "sft", "dpo")


@pytest.fixture
def three(results, tmp_path):
    """(folder, comparison) of sft, dpo and kto."""
    return tmp_path / "three", build(results, tmp_path / "three", "sft", "dpo", "kto")
