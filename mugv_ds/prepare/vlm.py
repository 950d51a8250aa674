"""The step `vlm`: what scores cannot see of a clip is asked of a multimodal model, as by the paper's filter."""

from collections.abc import Sequence
from itertools import islice
from math import ceil
from pathlib import Path

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.endpoint import Answer, Endpoint, Question, missing_endpoint, read_json
from mugv_ds.prepare.prompts import QUESTIONS, filter_prompt
from mugv_ds.prepare.units import Step
from mugv_ds.prepare.views import ClipView, Row, Score

# vlm.threshold is not among them: the share that says yes is kept, and what it means is decided later.
STEP = Step("vlm", 1, fields=("vlm.model", "vlm.window", "vlm.max_tokens"))

_ANSWERS = ("yes", "no", "unsure")


def why_skipped(config: PrepareConfig) -> str | None:
    """Returns in words why the step cannot or shall not run; None if it runs."""
    return missing_endpoint(config.vlm, "vlm")


def weights(config: PrepareConfig) -> str:
    """Returns a hash of the prompt and of what is shown with it; the model's weights are the endpoint's."""
    return filter_prompt(config).hash


def load(config: PrepareConfig, work: Path) -> Score:
    """Returns what asks about clips.

    `answers` has for each question the share of the clip's windows that say yes; unsure is not yes.

    Args:
        work: the working folder, for what was answered.

    Raises, when called:
        EndpointError: see `Endpoint.ask`.
    """
    endpoint, prompt = Endpoint(config.vlm, work), filter_prompt(config)

    def parse(answer: Answer) -> Row:
        found = read_json(answer)
        if config.vlm.merge and not isinstance(found.get("caption"), str):
            raise ValueError("no caption")
        said = {name: str(found.get(name)).strip().lower() for name in QUESTIONS}
        for name, word in said.items():
            if word not in _ANSWERS:
                raise ValueError(f"{name} is not answered by yes, no or unsure")
        return {name: word == "yes" for name, word in said.items()}

    def score(clips: Sequence[ClipView]) -> list[Row]:
        parts = [1 if config.vlm.merge else max(1, ceil(clip.duration / config.vlm.window)) for clip in clips]
        questions = [
            Question(clip, prompt, (part, count))
            for clip, count in zip(clips, parts, strict=True)
            for part in range(count)
        ]
        replies = iter(endpoint.ask(questions, parse))
        return [
            _row(clip, config.vlm.model, list(islice(replies, count))) for clip, count in zip(clips, parts, strict=True)
        ]

    return score


def _row(clip: ClipView, model: str, windows: list[Row]) -> Row:
    errors = [window["error"] for window in windows if "error" in window]
    if errors:
        return {"clip": clip.clip, "error": errors[0]}
    answers = [{"question": name, "yes": sum(window[name] for window in windows) / len(windows)} for name in QUESTIONS]
    return {"clip": clip.clip, "answers": answers, "model": model, "error": None}
