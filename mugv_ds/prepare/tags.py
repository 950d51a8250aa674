"""The step `tags`: what a caption tells of, by which sets are balanced; from an endpoint or a word list."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.prepare.endpoint import Answer, Endpoint, Question, missing_endpoint, read_json
from mugv_ds.prepare.prompts import tags_prompt
from mugv_ds.prepare.units import Step, digest
from mugv_ds.prepare.views import ClipView, Row, Score

STEP = Step("tags", 1, reads=("caption",))

CLASSES = ("subject", "action", "scene", "style")  # what an endpoint is asked for; the paper's entities
_MOST = 16  # tags of a class
_LONGEST = 60  # characters of a tag
_MAX_LIST_BYTES = 1 << 20
_ENTRY = re.compile(r"([a-z][a-z0-9_]*):([a-z0-9][a-z0-9 _-]*?) *= *(.+)")


class WordListError(InputError):
    """A word list cannot be used. The message names file and line."""


def why_skipped(config: PrepareConfig) -> str | None:
    """Returns in words why the step cannot or shall not run; None if it runs, as it does without an endpoint too."""
    return None if config.tags.url is None else missing_endpoint(config.tags, "tags")


def weights(config: PrepareConfig) -> str:
    """Returns a hash of the word list, or of the prompt and of the name of the endpoint's model.

    Raises:
        WordListError: the list cannot be read.
    """
    if config.tags.url is None:
        return digest(_list_text(config))
    return digest(tags_prompt("", CLASSES, _MOST).hash, config.tags.model, config.tags.max_tokens)


def load(config: PrepareConfig, work: Path) -> Score:
    """Returns what tags clips by their captions: `tags` are class:value, sorted.

    Args:
        work: the working folder, for what was answered.

    Raises:
        WordListError: the list cannot be used. EndpointError, when called: see `Endpoint.ask`.
    """
    if config.tags.url is None:
        match = matcher(_list_text(config), config.tags.words or "tags.txt")
        ask = None
    else:
        ask = Endpoint(config.tags, work).ask

    def score(clips: Sequence[ClipView]) -> list[Row]:
        told = [clip for clip in clips if clip.caption]
        if ask is None:
            replies = [{"tags": match(clip.caption)} for clip in told]
        else:
            replies = ask([Question(clip, tags_prompt(clip.caption, CLASSES, _MOST)) for clip in told], _parse)
        found = {clip.clip: reply for clip, reply in zip(told, replies, strict=True)}
        nothing = {"error": "no caption to take tags from"}
        return [{"clip": clip.clip, "error": None, **found.get(clip.clip, nothing)} for clip in clips]

    return score


def matcher(text: str, name: str) -> Callable[[str], list[str]]:
    """Returns what finds a word list's tags in captions: whole words in any case, also with s, es or 's.

    Where several phrases begin at one place, the longest counts, so that a "fire truck" is no fire.

    Args:
        text: lines of `class:value = word, phrase, …`, as in `tags.txt`; # begins a comment. name: of the file.

    Raises:
        WordListError: a line is another, or gives a word or a tag a second time.
    """
    tags: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            raise WordListError(f"{name}:{number}: {line[:80]!r}: must be class:value = word, word, …")
        tag = f"{entry[1]}:{entry[2]}"
        if tag in tags.values():
            raise WordListError(f"{name}:{number}: {tag} has a line already")
        for word in entry[3].lower().split(","):
            word = " ".join(word.split())
            if not word or tags.setdefault(word, tag) != tag:
                raise WordListError(f"{name}:{number}: {word!r} is {'a word of ' + tags[word] if word else 'no word'}")
    if not tags:
        raise WordListError(f"{name}: has no tags")
    words = "|".join(
        re.escape(word).replace(r"\ ", r"\s+") for word in sorted(tags, key=lambda word: (-len(word), word))
    )
    pattern = re.compile(rf"\b({words})(?:'s|e?s)?\b", re.IGNORECASE)

    def match(caption: str) -> list[str]:
        found = pattern.findall(unicodedata.normalize("NFKC", caption).replace("’", "'"))
        return sorted({tags[" ".join(word.lower().split())] for word in found})

    return match


def _parse(answer: Answer) -> Row:
    found = read_json(answer)
    tags = set()
    for name in CLASSES:
        values = found.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{name} is no list of words")
        cleaned = (" ".join(unicodedata.normalize("NFKC", value).lower().split()) for value in values[:_MOST])
        tags |= {f"{name}:{value}" for value in cleaned if value and len(value) <= _LONGEST}
    return {"tags": sorted(tags)}


def _list_text(config: PrepareConfig) -> str:
    if config.tags.words is None:
        return (files("mugv_ds.prepare") / "tags.txt").read_text(encoding="utf-8")
    return read_text_file(config.tags.words, _MAX_LIST_BYTES, WordListError)
