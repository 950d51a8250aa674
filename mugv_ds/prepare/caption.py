"""The step `caption`: what is written about a clip, by people or by a multimodal model, and whether it can be used.

A model's captions are not reproducible: they are inputs of all that follows.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.data.manifest import hash_csv
from mugv_ds.prepare.endpoint import Answer, Endpoint, Prompt, Question, missing_endpoint, read_json
from mugv_ds.prepare.given import CaptionFile, sidecar_caption
from mugv_ds.prepare.prompts import caption_prompt, filter_prompt
from mugv_ds.prepare.units import Step, digest
from mugv_ds.prepare.views import ClipView, Row, Score, why

STEP = Step("caption", 1, fields=("caption.sidecar", "vlm.merge"))

_REPEATED_WORDS, _REPEATED_TIMES = 10, 3
_LEAST_LETTERS = 0.5
_REFUSED = re.compile(
    r"(i'?m sorry|i am sorry|sorry,|i apologi[sz]e|i can(no|')t|i am (unable|not able)|i'?m (unable|not able)"
    r"|unfortunately,? i|as an ai\b)",
    re.IGNORECASE,
)
_META = re.compile(
    r"(sure[,!.]|certainly[,!.]|of course[,!.]|here (is|are)\b|here's\b|\W*caption\W*:"
    r"|(the|this|these|in (the|this|these)) (\w+ )?(video|clip|footage|frame|image|picture|sequence)s?\b)",
    re.IGNORECASE,
)
_CODE = re.compile(r"[A-Za-z0-9+/=_-]{60}|\ufffd")  # base64 and the like, and what could not be decoded


def why_skipped(config: PrepareConfig) -> str | None:
    """Returns in words why the step cannot or shall not run; None if it runs."""
    missing = _missing(config)
    if _endpoint(config).url is not None:
        return missing
    if config.caption.file is not None or config.caption.sidecar:
        return None
    return f"caption.file not given, caption.sidecar is false, and {missing}"


def weights(config: PrepareConfig) -> str:
    """Returns a hash of the CSV of captions, of the prompt and what is shown with it, and of the model's name.

    Raises:
        ManifestError: the CSV cannot be read.
    """
    section = _endpoint(config)
    asked = None if section.url is None else (_prompt(config).hash, section.model, section.max_tokens)
    return digest(None if config.caption.file is None else hash_csv(Path(config.caption.file)), asked)


def check_given(config: PrepareConfig, work: Path, clips: Iterable[tuple[str, str]]) -> None:
    """Checks that every caption of the CSV, if there is one, is about something that is there.

    Args:
        work, clips: see `CaptionFile` and its `check_known`.

    Raises:
        ManifestError, PathError: see there.
    """
    if config.caption.file is not None:
        CaptionFile(Path(config.caption.file), work).check_known(clips)


def load(config: PrepareConfig, work: Path) -> Score:
    """Returns what captions clips: by the CSV, else by a sidecar, else by the endpoint.

    `caption` is there also where `reason` says why it cannot be used: see `fault`, or caption_missing.

    Args:
        work: the working folder, for the captions of the CSV and for what was answered.

    Raises:
        ManifestError, PathError: see `CaptionFile`. EndpointError, when called: see `Endpoint.ask`.
    """
    file = None if config.caption.file is None else CaptionFile(Path(config.caption.file), work)
    section, prompt = _endpoint(config), _prompt(config)
    endpoint = None if section.url is None else Endpoint(section, work)

    def parse(answer: Answer) -> Row:
        caption = answer.text
        if config.vlm.merge and not answer.refused:
            caption = read_json(answer).get("caption")
            if not isinstance(caption, str):
                raise ValueError("no caption")
        return {"caption": caption.strip(), "reason": fault(caption, answer.finish, answer.refused)}

    def given(clip: ClipView) -> Row | None:
        caption, source = (file.find(clip) if file else None), "file"
        if caption is None and config.caption.sidecar:
            try:
                caption, source = sidecar_caption(clip.root, clip.relative), "sidecar"
            except (InputError, OSError) as error:
                return {"error": why(clip, error)}
        return None if caption is None else {"caption": caption.strip(), "reason": fault(caption), "source": source}

    def score(clips: Sequence[ClipView]) -> list[Row]:
        rows = [given(clip) for clip in clips]
        numbers = [number for number, row in enumerate(rows) if row is None]
        if endpoint is None:
            replies = [{"reason": "caption_missing"}] * len(numbers)
        else:
            made_by = {"source": section.model, "prompt": prompt.hash}
            replies = [
                reply if "error" in reply else reply | made_by
                for reply in endpoint.ask([Question(clips[number], prompt) for number in numbers], parse)
            ]
        for number, reply in zip(numbers, replies, strict=True):
            rows[number] = reply
        return [{"clip": clip.clip, "error": None, **row} for clip, row in zip(clips, rows, strict=True)]

    return score


def fault(caption: str, finish: str = "stop", refused: bool = False) -> str | None:
    """Returns why a caption cannot be used; None if it can.

    caption_refused: the model declined. caption_empty: there are no words. caption_truncated: it ends where the answer
    reached its longest. caption_repeats: the same ten words come three times, as of a model that runs in circles.
    caption_not_language: less than half of it are letters, or it holds code. caption_meta: it is about the video or the
    answer, not about the scene.

    Args:
        finish, refused: of the answer; see `Answer`.
    """
    text = unicodedata.normalize("NFKC", caption.replace("’", "'")).strip()
    if refused or finish == "content_filter" or _REFUSED.match(text):
        return "caption_refused"
    if not re.search(r"\w", text):
        return "caption_not_language" if text else "caption_empty"
    if finish == "length":
        return "caption_truncated"
    said = re.findall(r"\w+", text.lower())
    runs = Counter(zip(*(said[start:] for start in range(_REPEATED_WORDS)), strict=False))
    if runs and max(runs.values()) >= _REPEATED_TIMES:
        return "caption_repeats"
    signs = [unicodedata.category(letter)[0] for letter in text if not letter.isspace()]
    if sum(sign in "LM" for sign in signs) < _LEAST_LETTERS * len(signs) or _CODE.search(text):
        return "caption_not_language"
    return "caption_meta" if _META.match(text) else None


def _endpoint(config: PrepareConfig):
    return config.vlm if config.vlm.merge else config.caption


def _prompt(config: PrepareConfig) -> Prompt:
    return filter_prompt(config) if config.vlm.merge else caption_prompt(config)


def _missing(config: PrepareConfig) -> str | None:
    return missing_endpoint(_endpoint(config), "vlm" if config.vlm.merge else "caption")
