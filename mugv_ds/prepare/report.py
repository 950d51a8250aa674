"""The report of a preparation: one HTML file that needs nothing else, and the same numbers as JSON.

What came from outside, such as paths and captions, is escaped, and no script runs in the page, whatever is in it.
"""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pyarrow as pa
from markupsafe import Markup

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.files.atomic import write_atomically
from mugv_ds.prepare.charts import Mark, curve_chart, histogram_chart, number
from mugv_ds.prepare.rows import DUPLICATE
from mugv_ds.prepare.select import UnitRows
from mugv_ds.prepare.summary import EXAMPLES, Bounded, Example, Histogram, Summary
from mugv_ds.prepare.verify import Verified

_TEMPLATE = "report.html"
_QUALITY = 80  # of JPEG
_THUMBNAIL, _SHEET = 240, 160  # longest side, in pixels
_LONGEST = 300  # characters of a text from outside
_CUT = 300  # tokens of a caption that the published model reads

# What a reason means, for who did not write the config.
_MEANINGS = {
    "duplicate_file": "the same content as another file",
    "blocked": "on the blocklist",
    "not_allowed": "the table of sources says no",
    "no_licence": "no row of the table of sources allows it",
    "hdr": "PQ or HLG colours, which are not converted",
    "too_short_scene": "the rest of a scene is shorter than a clip",
    "unmeasured": "a score with a bound is missing",
    "not_top": "accepted, but not among the best",
    "caption_missing": "no caption",
    "caption_error": "the caption could not be had",
    "duplicate_picture": "frames like those of a better clip",
    "duplicate_mirror": "frames like those of a better clip, mirrored",
    "duplicate_source": "too many alike of one video",
    "duplicate_caption": "caption and frames like those of a better clip",
    "duplicate_embedding": "looks like a better clip to the image model",
    "blurred": "frames less sharp than asked for",
    "too_sharp": "frames sharper than asked for: noise or grain",
    "still": "less motion than asked for",
    "too_fast": "more motion than asked for",
    "borders": "borders leave too little of the picture",
    "repeated": "frames equal to the one before: still, slideshow or slowed down",
    "shake": "the camera shakes",
    "too_small": "smaller than the bucket, and never enlarged",
    "truncated": "less could be decoded than the header claims",
    "overlay_text": "text laid over the picture",
    "unaesthetic": "aesthetic score below the bound",
    "crops_too_much": "no bucket has a shape near enough",
    "fps_too_low": "too few frames a second for the bucket",
    "unreadable": "no decoder could open it",
    "no_video_stream": "sound only, or a picture on a cover",
    "not_a_video": "of no container of videos, whatever its name says",
    "encrypted": "its frames are encrypted",
    "decode_error": "decoding failed on the way",
    "too_large": "frames larger than the decoder may take",
    "crashed": "it killed its decoder, twice",
    "timed_out": "decoding took longer than it may",
    "changed_while_reading": "it was being written meanwhile",
    "missing": "it was in an earlier scan, and no file has its content now",
    "too_short": "shorter than asked for",
    "too_long": "longer than asked for",
    "low_fps": "too few frames a second",
    "high_fps": "more frames a second than asked for",
    "low_bitrate": "compressed too hard",
    "high_bitrate": "compressed less than asked for",
    "interlaced": "fields of two times in one frame",
    "aspect": "too wide or too tall",
    "too_dark": "darker than asked for on the whole",
    "too_bright": "brighter than asked for on the whole",
    "dark_pixels": "too much of the picture is black",
    "bright_pixels": "too much of the picture is white",
    "nsfw": "nudity",
    "faces": "more or fewer faces than asked for",
}

_SCORES = {
    "duration": "duration of videos, s",
    "fps": "frames a second",
    "bitrate": "bits a pixel",
    "decoded": "decoded ÷ claimed duration",
    "interlaced": "share of interlaced frames",
    "aspect": "width ÷ height",
    "short_side": "short side, px",
    "sharp_min": "sharpness, least of a clip",
    "sharp_med": "sharpness, median of a clip",
    "sharp_max": "sharpness, largest of a clip",
    "motion": "motion, px",
    "area": "picture left by borders",
    "repeated": "share of repeated frames",
    "shake": "shake, of the short side",
    "luma": "mean luma",
    "dark": "share of dark pixels",
    "bright": "share of bright pixels",
    "overlay": "picture under text",
    "aesthetic": "aesthetic score",
    "nsfw": "score of nudity",
    "faces": "faces",
    "clip_duration": "duration of clips, s",
}

Look = Callable[[Example, int, int], "np.ndarray | None"]


@dataclass(frozen=True)
class Bucket:
    """What is in a bucket. tokens: that the model sees of a sample. steps: that an epoch of it makes, if known."""

    name: str
    samples: int
    seconds: float
    tokens: int
    bytes: int
    steps: int | None = None


@dataclass(frozen=True)
class Facts:
    """What is told beside the clips.

    Attributes:
        command: that makes the set again. versions: of packages and weights. ran: optional steps that ran; of the
            others `skipped` says why, for people. stale: step → fragments that no longer count.
        duplicates: as `rows.DUPLICATE`. samples: set (train, val) → rows.
        caption_tokens: captions by number of tokens before they are cut, int64 [tokens], or None.
        verified: by verify, if it ran. ties: of labels that were dropped.
    """

    config: PrepareConfig
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    ran: Sequence[str] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    stale: Mapping[str, int] = field(default_factory=dict)
    duplicates: pa.Table = field(default_factory=DUPLICATE.empty_table)
    samples: Mapping[str, int] = field(default_factory=dict)
    buckets: Sequence[Bucket] = ()
    caption_tokens: np.ndarray | None = None
    verified: Verified | None = None
    ties: Sequence[str] = ()


def write_report(
    folder: Path, units: Iterable[tuple[int, UnitRows, pa.Table]], facts: Facts, look: Look
) -> dict[str, Any]:
    """Writes index.html and report.json, whose bytes follow from what they tell alone; returns what is in the latter.

    Args:
        folder: of the report; made if it is missing.
        units: (number, rows, its rows.SELECT) of each unit of videos, in any order.
        look: (example, frames, longest side) → uint8 RGB [N, H, W, 3], or None where it cannot be decoded.

    Raises:
        OSError: the file system failed.
    """
    summary = Summary(facts.config, facts.ran, facts.duplicates)
    for number_, rows, selected in units:
        summary.add(number_, rows, selected)
    numbers = _numbers(summary, facts)
    page = _page(summary, facts, numbers, look)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", _json(numbers)), ("index.html", page)):
        with write_atomically(folder / name) as stream:
            stream.write(text.encode())
    return numbers


def plain(text: object) -> str:
    """Returns a text from outside as it can be shown: not too long, with what cannot be printed written out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


def _json(numbers: Mapping[str, Any]) -> str:
    return f"{json.dumps(numbers, indent=1, sort_keys=True, ensure_ascii=True)}\n"


def _numbers(summary: Summary, facts: Facts) -> dict[str, Any]:
    """Returns all numbers of the report, of JSON types."""
    counts, clips = summary.counts, max(summary.counts.clips, 1)
    return {
        "files": {
            "videos": summary.videos,
            "copies": summary.copies,
            "not_decoded": summary.undecoded,
            "bytes": summary.bytes,
        },
        "clips": {
            "all": counts.clips,
            "long_enough": summary.whole,
            "passed_cheap_scores": summary.passed_cheap,
            "accepted": counts.accepted,
            "hours": counts.seconds / 3600,
            "accepted_hours": counts.accepted_seconds / 3600,
        },
        "samples": dict(facts.samples),
        "skipped": dict(facts.skipped),
        "stale": dict(facts.stale),
        "versions": dict(facts.versions),
        "command": facts.command,
        "reasons": {
            name: {
                "step": summary.steps[name],
                "clips": counts.reasons[name],
                "share": counts.reasons[name] / clips,
                "alone": counts.alone[name],
                "files": counts.files[name],
            }
            for name in sorted({*counts.reasons, *counts.files})
        },
        "errors": [{"path": path, "error": error, "detail": detail} for path, error, detail in summary.errors],
        "bounds": {
            score: {
                "low": bounded.limit.bound.low,
                "high": bounded.limit.bound.high,
                "published": list(bounded.limit.published),
                "kept_without": bounded.free.total / clips,
                "quantiles": _quantiles(bounded.all),
            }
            for score, bounded in summary.bounded.items()
        },
        "scores": {score: _quantiles(histogram) for score, histogram in summary.shown.items()},
        "sizes": {f"{width}x{height}": n for (width, height), n in _largest(summary.sizes)},
        "tags": {
            tag: {"clips": summary.tags[tag], "weight": summary.weighed.get(tag, 0.0)}
            for tag in summary.frequent_tags()
        },
        "caption_tokens": None if facts.caption_tokens is None else np.asarray(facts.caption_tokens).tolist(),
        "buckets": [vars(bucket) for bucket in facts.buckets],
        "duplicates": {
            "clips": len(facts.duplicates),
            "groups": {str(size): n for size, n in sorted(summary.group_sizes.items())},
        },
        "verified": None if facts.verified is None else facts.verified.report(),
        "licences": [
            {"licence": licence, "origin": origin, **_licence(found)}
            for (licence, origin), found in sorted(summary.licences.items())
        ],
        "ties": list(facts.ties),
    }


def _licence(found: Any) -> dict[str, float]:
    return {
        "clips": found.clips,
        "hours": found.milliseconds / 3.6e6,
        "accepted": found.accepted,
        "accepted_hours": found.accepted_milliseconds / 3.6e6,
    }


def _quantiles(histogram: Histogram) -> dict[str, float | int | None]:
    values = {f"{share:.0%}": histogram.quantile(share) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return {"clips": histogram.total} | values


def _largest(counts: Mapping[Any, int]) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:12]


def _page(summary: Summary, facts: Facts, numbers: Mapping[str, Any], look: Look) -> str:
    """Returns the HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "plain": plain,
        "percent": lambda share: f"{share:.1%}",
        "bytes": _bytes,
        "time": _time,
    }
    compared = facts.verified.compared if facts.verified else ()
    meanings = {name: _MEANINGS.get(name, _meaning(name)) for name in numbers["reasons"]}
    return environment.get_template(_TEMPLATE).render(
        numbers=numbers,
        facts=facts,
        meanings=meanings,
        funnel=list(_funnel(numbers)),
        examples={name: _pictures(name, some, look) for name, some in summary.examples.items()},
        most=EXAMPLES,
        curves=[curve for bounded in summary.bounded.values() for curve in _curves(bounded, numbers)],
        lifted=sorted(
            ((n, r) for n, r in numbers["reasons"].items() if r["alone"]), key=lambda item: (-item[1]["alone"], item[0])
        ),
        charts=list(_charts(summary, facts)),
        cut=_CUT,
        groups=[_group(of, rows, summary, look) for of, rows in summary.groups],
        sheets=[(one, _image(_rows_of(one.source)), _image(_rows_of(one.decoded))) for one in compared],
        failed=sum(check.status == "fail" for check in facts.verified.checks) if facts.verified else 0,
    )


def _meaning(name: str) -> str:
    if name.startswith("vlm_"):
        return f"the multimodal model says yes to {name[4:]!r}"
    return ""


def _funnel(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int]]:
    """Yields (name, what is meant, count, of how many) from the files to the samples."""
    files, clips = numbers["files"], numbers["clips"]
    found = files["videos"] + files["copies"]
    yield "files", "found in the folder of videos", found, found
    yield "videos", "of different content", files["videos"], found
    yield "decoded", "to their end", files["videos"] - files["not_decoded"], found
    yield "scenes", "clips, and rests of scenes", clips["all"], clips["all"]
    yield "clips", "long enough", clips["long_enough"], clips["all"]
    yield "passed", "all cheap scores and the screening", clips["passed_cheap_scores"], clips["all"]
    yield "accepted", "no reason against them", clips["accepted"], clips["all"]
    samples = sum(numbers["samples"].values())
    if samples:
        yield (
            "samples",
            ", ".join(f"{count:,} {name}" for name, count in numbers["samples"].items()),
            samples,
            max(clips["all"], samples),
        )


def _curves(bounded: Bounded, numbers: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields, for either end of a bound, the share of clips that would be kept if it were elsewhere."""
    limit, free = bounded.limit, bounded.free
    clips = max(numbers["clips"]["all"], 1)
    below, edges = free.below(), free.edges
    ends = {"low": limit.bound.low, "high": limit.bound.high}
    for end, present in ends.items():
        if present is None or not bounded.all.total:
            continue
        if end == "low":
            top = (
                free.total
                if ends["high"] is None
                else int(below[np.searchsorted(edges, ends["high"]).clip(max=len(below) - 1)])
            )
            kept = np.maximum(top - below, 0)
        else:
            under = (
                0
                if ends["low"] is None
                else int(below[(np.searchsorted(edges, ends["low"], side="right") - 1).clip(min=0)])
            )
            kept = np.maximum(below - under, 0)
        published = limit.published[end == "high"]
        marks = [Mark(present, "present")] + ([] if published is None else [Mark(published, "published")])
        title = f"{_SCORES[limit.score]} {'≥' if end == 'low' else '≤'}"
        present_share, most = numbers["clips"]["accepted"] / clips, free.total / clips
        text = f"{present_share:.1%} of clips are kept at {number(present)}, {most:.1%} without this bound"
        yield {
            "title": title,
            "kept": present_share,
            "most": most,
            "present": present,
            "published": published,
            "chart": curve_chart(free, kept / clips, title, text, marks),
        }


def _charts(summary: Summary, facts: Facts) -> Iterator[tuple[str, str, Markup]]:
    """Yields (title, median in words, chart) of the distributions."""
    found: list[tuple[str, Histogram, list[float | None]]] = [
        (_SCORES[score], bounded.all, [bounded.limit.bound.low, bounded.limit.bound.high])
        for score, bounded in summary.bounded.items()
    ]
    found += [(_SCORES[score], histogram, []) for score, histogram in summary.shown.items()]
    if facts.caption_tokens is not None:
        tokens = Histogram(0.0, float(max(len(facts.caption_tokens), 2 * _CUT)), False)
        tokens.add(np.repeat(np.arange(len(facts.caption_tokens), dtype=np.float64), facts.caption_tokens))
        found.append(("tokens of captions", tokens, [float(_CUT)]))
    for title, histogram, bounds in found:
        if histogram.total:
            marks = [Mark(value, "present") for value in bounds if value is not None]
            median = f"median {number(histogram.quantile(0.5))}"
            yield title, median, histogram_chart(histogram, title, marks)


def _pictures(name: str, examples: Sequence[Example], look: Look) -> list[dict[str, Any]]:
    """Returns for each example its picture, if there is one, and what is said of it."""
    shown = []
    for example in examples:
        reason = example.reason or {}
        frames = look(example, 1, _THUMBNAIL)
        shown.append(
            {
                "picture": None if frames is None else _image(frames[0]),
                "path": example.path,
                "clip": example.clip["clip"],
                "start": example.clip["start"] or 0.0,
                "duration": example.clip["duration"] or 0.0,
                "field": reason.get("field", ""),
                "value": reason.get("value"),
                "low": reason.get("low"),
                "high": reason.get("high"),
                "alt": f"Example of {name}: a frame of {plain(example.path)}",
            }
        )
    return shown


def _group(of: str, rows: Sequence[Mapping[str, Any]], summary: Summary, look: Look) -> dict[str, Any]:
    """Returns a group of duplicates: the clip that stays, and those that give way to it, each with a picture."""
    known = [(summary.known.get(of), None)] + [(summary.known.get(row["clip"]), row) for row in rows[: EXAMPLES - 1]]
    shown = []
    for example, row in known:
        frames = None if example is None else look(example, 1, _THUMBNAIL)
        shown.append(
            {
                "picture": None if frames is None else _image(frames[0]),
                "path": "not in this set" if example is None else example.path,
                "clip": of if row is None else row["clip"],
                "kind": "stays" if row is None else row["kind"],
                "distance": None if row is None else row["distance"],
            }
        )
    return {"size": len(rows) + 1, "clips": shown}


def _rows_of(frames: np.ndarray) -> np.ndarray:
    """Returns frames [N, H, W, 3] beside each other, with white lines between."""
    height, width = frames.shape[1:3]
    scale = min(1.0, _SHEET / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
    line = np.full((size[1], 2, 3), 255, np.uint8)
    return np.concatenate([part for frame in small for part in (frame, line)][:-1], axis=1)


def _image(frame: np.ndarray) -> dict[str, Any]:
    """Returns an RGB frame as the URL of a JPEG that is part of the page, and its size."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    url = f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
    return {"url": Markup(url), "height": frame.shape[0], "width": frame.shape[1]}


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _time(hours: float) -> str:
    """Returns hours as people say them."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.1f} min" if hours < 1 else f"{hours:,.1f} h"
