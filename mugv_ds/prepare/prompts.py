"""What multimodal models are asked about clips."""

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.endpoint import Prompt

# The filter's questions: the paper's three (heavy post-processing, altered speed, shake) in detail, and what scores see
# badly. Each is put so that yes is a fault.
QUESTIONS = {
    "overlay_text": "Is text laid over the picture, such as titles, subtitles or a chat? Text on things in the scene "
    "does not count.",
    "watermark_or_logo": "Is there a watermark, or the logo of a channel, a website or an app?",
    "border": "Are there bars or a decorated frame around the picture, or a blurred copy of it beside it?",
    "split_screen": "Is the picture made of several videos side by side, or of one inside another?",
    "effect_or_filter": "Were effects put on it, such as stickers, emojis, strong colour filters, glitches or "
    "kaleidoscopes?",
    "slideshow": "Is it a series of still pictures, or one still picture that is moved or zoomed?",
    "screen_or_game": "Is it a recording of a screen, of software or of a computer game?",
    "speed_changed": "Does it play faster, slower or backwards, as in a time lapse or in slow motion?",
    "shake": "Does the camera shake so that it disturbs?",
    "scene_change": "Does one scene end and another begin, be it by a cut, a fade, a dissolve or a wipe?",
    "blurred_region": "Is part of the picture blurred or pixelated to hide it?",
    "rotated": "Does the picture lie on its side, or upside down?",
}


def filter_prompt(config: PrepareConfig) -> Prompt:
    """Returns the prompt of the filter, which with `vlm.merge` asks for a caption too."""
    questions = "\n".join(f"- {name}: {question}" for name, question in QUESTIONS.items())
    text = (
        "These are frames of one video clip, in their order. Answer each question with yes, no or unsure. Say yes only "
        f"of what you clearly see.\n{questions}"
    )
    shape: dict[str, dict] = {name: {"type": "string", "enum": ["yes", "no", "unsure"]} for name in QUESTIONS}
    if config.vlm.merge:
        text += f"\nThen give a caption of the clip. {_caption_text(config)}"
        shape["caption"] = {"type": "string"}
    text += f"\nAnswer as one JSON object with the keys {', '.join(shape)}."
    schema = {"type": "object", "properties": shape, "required": list(shape), "additionalProperties": False}
    return Prompt(text, config.vlm.frames, config.vlm.side, schema)


def caption_prompt(config: PrepareConfig) -> Prompt:
    """Returns the prompt that asks for a caption alone."""
    text = f"These are frames of one video clip, in their order. {_caption_text(config)}"
    return Prompt(config.caption.prompt or text, config.caption.frames, config.caption.side)


def _caption_text(config: PrepareConfig) -> str:
    return config.caption.prompt or (
        f"Describe in English, in one paragraph of at most {config.caption.words} words: the main subjects and how "
        "they look; what they do and how they move; the background; the camera's view and its motion; light and style. "
        "Describe only what can be seen, as a scene and not as a video or frames: begin with the subject, and add no "
        "opinions, guesses or lists."
    )


def tags_prompt(caption: str, classes: tuple[str, ...], most: int) -> Prompt:
    """Returns the prompt that asks for the tags of a caption: a list for each class, of at most so many."""
    text = (
        f"Below is the caption of a video clip. Extract from it, for each of {', '.join(classes)}, the terms that it "
        f"names: at most {most} each, most important first, each one to three English words in lower case, nouns in "
        "the singular and verbs in the infinitive. Leave a list empty rather than guess.\n"
        f"Answer as one JSON object with the keys {', '.join(classes)}, each a list of strings.\n\nCaption: {caption}"
    )
    shape = {name: {"type": "array", "items": {"type": "string"}} for name in classes}
    schema = {"type": "object", "properties": shape, "required": list(classes), "additionalProperties": False}
    return Prompt(text, schema=schema)
