"""The report tells every number, shows the clips, and is harmless whatever paths and captions say."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise

import cv2
import numpy as np
import pyarrow as pa
import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.compare import Compared
from mugv_ds.prepare.dedup import DedupRows, find_pairs
from mugv_ds.prepare.report import _MEANINGS, Bucket, Facts, plain, write_report
from mugv_ds.prepare.rows import PAIR
from mugv_ds.prepare.screen import Blocklist, Screening, Source, Sources
from mugv_ds.prepare.select import EXTRAS, Selection, limits
from mugv_ds.prepare.summary import Histogram
from mugv_ds.prepare.verify import Check, Verified
from mugv_ds.prepare.whatif import what_if
from tests.helpers.prepared_rows import clip, flipped, hashes_of, unit, video

HOSTILE = '<script>alert("x")</script>&"\'\u202egnp.exe\n\x00'
SCREENING = Screening(
    Sources([("films/*", Source("CC-BY 4.0", True, origin="archive")), ("*", Source("CC0", True, origin=HOSTILE))]),
    Blocklist(),
)
CONFIG = PrepareConfig.model_validate({"balance": {"group": "subject"}})


def units(count=8):
    generator = np.random.default_rng(0)
    for number in range(count):
        names = [f"{number}-{i}" for i in range(12)]
        clips = [
            clip(
                name,
                f"v{number}-{i % 3}",
                motion=float(generator.lognormal(1.0, 1.1)),
                sharp_min=float(generator.lognormal(6, 0.7)),
                sharp_med=float(generator.lognormal(6.3, 0.7)),
                sharp_max=float(generator.lognormal(6.7, 0.5)),
                shake=float(generator.lognormal(-5.5, 0.6)),
                duration=float(generator.uniform(2, 5)),
            )
            for i, name in enumerate(names)
        ]
        clips[3] |= {"phash": flipped(hashes_of("same"), 2, seed=number), "sharp_min": 300.0, "motion": 4.0}
        clips[4] |= {"reason": "too_short_scene", "duration": 0.7, "phash": None, "phash_mirror": None}
        videos = [video(f"v{number}-{i}", path=f"films/{number}/{i}.mp4") for i in range(2)]
        videos.append(video(f"v{number}-2", path=f"{number}{HOSTILE}.mp4"))
        broken = video(f"bad{number}", path=f"films/broken{number}.mp4", error="unreadable", detail=HOSTILE)
        tags = [{"clip": name, "tags": [f"subject:{'dog' if i % 3 else HOSTILE}"]} for i, name in enumerate(names)]
        yield unit([*videos, broken], clips, [{"path": f"again{number}.mp4", "video": videos[0]["video"]}], tags=tags)


def look(example, count, longest):
    """Draws frames whose colour follows from the clip; of one unit there are none."""
    if example.unit == 5:
        return None
    seed = int(example.clip["clip"][:6], 16)
    y, x = np.mgrid[:135, :240]
    frame = np.stack([x + seed, y * 2 + seed // 7, x + y + seed // 11], -1) % 256
    return np.repeat(frame[None].astype(np.uint8), count, 0)


def facts(selection, **changes):
    frames = np.random.default_rng(1).integers(0, 255, (4, 90, 160, 3), np.uint8)
    known = {
        "config": CONFIG,
        "command": f"python tools/prepare.py run --videos {HOSTILE}",
        "versions": {"mugv_ds": "0.1.0", "codec": "a1b2c3"},
        "ran": ("tags",),
        "skipped": {"aesthetic": "aesthetic.clip names no model", "text": "text.enabled is false"},
        "stale": {"clips": 3},
        "duplicates": selection.duplicates,
        "samples": {"train": 40, "val": 2},
        "buckets": [
            Bucket("352x640x48f24", 42, 84.0, 5280, 42 << 20, 21),
            Bucket("720x1280x120f24", 3, 15.0, 54000, 3 << 23),
        ],
        "caption_tokens": np.bincount(np.random.default_rng(2).poisson(140, 500)),
        "verified": Verified(
            (
                Check("normalisation", "pass", "the likeliest of three is right"),
                Check("PSNR", "fail", "median 21.3 dB", 21.3, low=24.0),
                Check("equal captions", "warn", "1.40% of 42 rows", 0.014, high=0.01),
                Check("text features", "not checked", "no text encoder was given"),
            ),
            (Compared("0" * 32, "352x640x48f24", 31.25, (0.5, 0.5), 0.0, {}, {}, frames, frames),),
        ),
        "ties": (f"clip {HOSTILE}: 1 say good, 1 bad",),
    }  # fmt: skip
    return Facts(**known | changes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [DedupRows(one.clips.filter(pa.compute.is_null(one.clips["reason"]))) for one in units()]
    return find_pairs(rows, CONFIG.dedup, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def selection(pairs):
    return Selection.of(units, CONFIG, SCREENING, pairs)


def write(folder, selection, order=slice(None), **changes):
    rows = [(number, one, selection.table(one)) for number, one in enumerate(units())][order]
    return write_report(folder, rows, facts(selection, **changes), look)


@pytest.fixture(scope="module")
def report(tmp_path_factory, selection):
    folder = tmp_path_factory.mktemp("report")
    return folder, write(folder, selection)


class Page(HTMLParser):
    """Collects what the tests ask of: tags with attributes, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def of(self, *names):
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def page(report):
    return Page((report[0] / "index.html").read_text())


def test_nothing_from_outside_becomes_markup(report, page):
    assert not page.of("script", "iframe", "link", "object")
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    html = (report[0] / "index.html").read_text()
    assert "&lt;script&gt;alert(" in html and "\u202e" not in html and "\0" not in html
    assert any("default-src 'none'" in meta.get("content", "") for meta in page.of("meta"))


def test_the_page_needs_nothing_else(page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,")), (tag, attributes)


def test_pictures_have_texts_tables_headings_and_links_targets(page):
    assert len(page.of("img")) > 20
    assert all(image["alt"] for image in page.of("img"))
    assert all(chart.get("aria-label") or chart.get("aria-hidden") for chart in page.of("svg"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.of("th"))
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {link["href"][1:] for link in page.of("a")} <= targets


def test_every_section_tells_its_numbers(report, page):
    _, numbers = report
    text = " ".join(page.text)
    for reason in numbers["reasons"]:
        assert reason in text
    for said in (
        "Skipped steps",
        "aesthetic.clip names no model",
        "Stale fragments",
        "720x1280x120f24",
        "PSNR 31.2 dB",
    ):
        assert said in text
    for said in ("✓ pass", "✗ fail", "! warn", "not checked", "at least 24", "CC-BY 4.0", "archive", "stays", "+"):
        assert said in text
    assert json.loads((report[0] / "report.json").read_text()) == json.loads(json.dumps(numbers))


def test_the_numbers_are_those_of_selection(report, selection, pairs):
    _, numbers = report
    counts = what_if(units, CONFIG, CONFIG, SCREENING, SCREENING, pairs).now
    assert numbers["clips"]["accepted"] == counts.accepted > 0
    assert {name: row["clips"] for name, row in numbers["reasons"].items() if row["clips"]} == dict(counts.reasons)
    assert {name: row["alone"] for name, row in numbers["reasons"].items() if row["alone"]} == dict(counts.alone)
    assert numbers["files"] == {"videos": 32, "copies": 8, "not_decoded": 8, "bytes": 32_000}
    assert numbers["clips"]["long_enough"] == 88
    assert numbers["duplicates"]["clips"] == len(selection.duplicates) > 0
    assert sum(row["clips"] for row in numbers["licences"]) == 96
    assert {row["licence"] for row in numbers["licences"]} == {"CC-BY 4.0", "CC0"}
    # Lifting the bound on motion keeps what has no other reason.
    assert numbers["bounds"]["motion"]["kept_without"] == pytest.approx(
        (counts.accepted + counts.alone["still"] + counts.alone["too_fast"]) / 96
    )


def test_the_order_of_units_changes_no_byte(report, selection, tmp_path):
    write(tmp_path, selection, slice(None, None, -1))
    for name in ("index.html", "report.json"):
        assert (tmp_path / name).read_bytes() == (report[0] / name).read_bytes()


def test_an_empty_preparation_has_a_report(tmp_path):
    nothing = unit([], [])
    selection = Selection.of(lambda: iter([nothing]), CONFIG, SCREENING, PAIR.empty_table())
    write_report(tmp_path, [(0, nothing, selection.table(nothing))], Facts(CONFIG, "make prepare"), look)
    assert "Nothing was rejected." in (tmp_path / "index.html").read_text()


def test_histograms_count_what_lies_beyond_and_place_ends():
    histogram = Histogram(1.0, 100.0, True)
    histogram.add(np.array([0.0, 0.5, 1.0, 10.0, 100.0, 101.0, np.nan]))
    assert histogram.total == 6
    assert histogram.counts[0] == 2 and histogram.counts[-1] == 1
    assert histogram.below()[[0, 1000, -1]].tolist() == [2, 3, 5]
    assert (histogram.place(10.0), histogram.place(0.1), histogram.place(1e6)) == (0.5, 0.0, 1.0)
    assert histogram.quantile(0.5) == pytest.approx(1.0, rel=0.01)
    alike = Histogram(0.0, 1.0, False)
    alike.add(np.full(9, 0.1234))
    assert alike.quantile(0.05) == alike.quantile(0.95) == 0.1234


def test_texts_from_outside_are_plain():
    assert plain("a\u202eb\n\x00\udc80") == r"a\u202eb\n\x00\udc80"
    assert len(plain("x" * 10**6)) == 301


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage"),
)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_it_at_two_widths(report, tmp_path):
    """In frames beside each other, as headless Chromium draws no window narrower than 500 pixels."""
    widths, height, picture, frames = (400, 1400), 1500, tmp_path / "page.png", tmp_path / "frames.html"
    url = (report[0] / "index.html").as_uri()
    framed = [f'<iframe src="{url}" width="{width}" height="{height}" frameborder="0"></iframe>' for width in widths]
    frames.write_text(f'<body style="margin:0; display:flex">{"".join(framed)}')
    window = [f"--window-size={sum(widths)},{height}", f"--screenshot={picture}"]
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}/profile", *window, frames.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert picture.exists(), done.stderr.decode()[-2000:]
    pixels = cv2.imread(str(picture))
    for page in np.split(pixels, [widths[0]], axis=1):
        assert len(np.unique(page.reshape(-1, 3), axis=0)) > 100  # text, bars, pictures: not a blank page
        below = page[400:]  # the links at the top
        edges = below[:, [0, 1, 2, -3, -2, -1]].reshape(-1, 3)
        assert len(np.unique(edges, axis=0)) == 1  # the ground alone: nothing reaches out of the page


ERRORS = {
    *("unreadable", "no_video_stream", "not_a_video", "encrypted", "decode_error", "too_large", "crashed", "timed_out"),
    *("changed_while_reading", "missing"),
}


def test_every_reason_has_a_meaning():
    names = {name for limit in limits(PrepareConfig(), EXTRAS) for name in (limit.below, limit.above)}
    assert not {name for name in names | ERRORS if name not in _MEANINGS}
