"""The page on which people vote: one HTML file with its style and script in it, beside videos under ids.

What came from outside, such as prompts, is escaped, and no script runs in the page but its own, whatever is in it.
"""

import base64
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular
from mugv_ds.evaluation.compare.draw import Comparison
from mugv_ds.files.atomic import write_atomically

PAGE, MEDIA = "index.html", "media"
_HERE = Path(__file__).parent
_MOST_EMBEDDED = 256 << 20  # bytes of videos in one HTML file, which browsers still open
_ASKED = {
    "overall": ("Overall", "Which video is better, all in all?"),
    "motion": ("Motion", "Which moves better: as much as it should, smoothly and naturally?"),
    "physics": ("Physical errors", "Which has fewer errors: things that melt, vanish, pass through others or float?"),
    "match": ("Match", "Which shows better what was asked for: the prompt, and the first frame if there is one?"),
}
QUESTION_LABELS = {name: label for name, (label, _) in _ASKED.items()}
_TYPES = {".mp4": "video/mp4", ".png": "image/png"}


def media_names(comparison: Comparison) -> list[str]:
    """Returns the names of all files that the page shows, in order."""
    videos = {f"{side.id}.mp4" for item in comparison.items for side in (item.left, item.right)}
    return sorted(videos | {f"{item.image}.png" for item in comparison.items if item.image})


def write_page(folder: Path, comparison: Comparison, files: Mapping[str, Path]) -> Path:
    """Writes the page and copies of the videos, in order of their ids: what copies share with a file says nothing.

    Args:
        folder: made anew. files: of every id.

    Returns:
        The HTML file.

    Raises:
        InputError: a video cannot be read. OSError: the file system failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / MEDIA).mkdir(parents=True)
    for name in media_names(comparison):
        try:
            source = open_regular(files[Path(name).stem])
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}") from None
        with source, write_atomically(folder / MEDIA / name) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    page = _render(comparison, {name: f"{MEDIA}/{name}" for name in media_names(comparison)})
    with write_atomically(folder / PAGE) as stream:
        stream.write(page.encode())
    return folder / PAGE


def write_single_page(path: Path, comparison: Comparison, folder: Path) -> None:
    """Writes the page with all videos in it, to send to somebody.

    Args:
        folder: that `write_page` has written.

    Raises:
        InputError: the videos are more than a browser opens. OSError: the file system failed.
    """
    media = {name: folder / MEDIA / name for name in media_names(comparison)}
    size = sum(file.stat().st_size for file in media.values())
    if size > _MOST_EMBEDDED:
        raise InputError(
            f"{path}: {size:,} bytes of videos are too many for one file, which may hold {_MOST_EMBEDDED:,}; send the "
            f"folder {folder}, or draw fewer with --items"
        )
    urls = {
        name: f"data:{_TYPES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"
        for name, file in media.items()
    }
    with write_atomically(path) as stream:
        stream.write(_render(comparison, urls).encode())


def _render(comparison: Comparison, urls: Mapping[str, str]) -> str:
    """Returns the HTML. urls: of the files of `media_names`."""
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_data(comparison, urls),
    )


def _data(comparison: Comparison, urls: Mapping[str, str]) -> dict[str, Any]:
    """Returns all that the page is told of the comparison: no name of weights or of a job."""
    return {
        "id": comparison.id,
        "questions": [{"id": name, "label": _ASKED[name][0], "ask": _ASKED[name][1]} for name in comparison.questions],
        "items": [
            {
                "id": item.id,
                "prompt": item.prompt,
                "image": urls[f"{item.image}.png"] if item.image else None,
                "left": urls[f"{item.left.id}.mp4"],
                "right": urls[f"{item.right.id}.mp4"],
            }
            for item in comparison.items
        ],
    }


def _hash(text: str) -> str:
    """Returns how a content security policy names an inline text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
