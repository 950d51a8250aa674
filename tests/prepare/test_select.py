import math

import numpy as np
import pyarrow as pa
import pytest

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.rows import PAIR, SELECT
from mugv_ds.prepare.screen import Blocklist, Screening, Source, Sources
from mugv_ds.prepare.select import EXTRAS, Ranks, Selection, check_bounds, gate, judge, limits
from tests.helpers.prepared_rows import clip, clip_id, flipped, hashes_of, unit, video, video_id

NOTHING = Screening(Sources(), Blocklist())
NO_PAIRS = PAIR.empty_table()


def config(**sections):
    return PrepareConfig.model_validate(sections)


def select(units, settings=None, screening=NOTHING, pairs=NO_PAIRS):
    selection = Selection.of(lambda: iter(units), settings or config(), screening, pairs)
    return pa.concat_tables([selection.table(rows) for rows in units])


def reasons(table):
    """(clip or path of what is no clip) → names of its reasons."""
    return {row["clip"] or row["path"]: [one["name"] for one in row["reasons"]] for row in table.to_pylist()}


def one_clip(clip_values=None, video_values=None, **extras):
    return unit([video("v", **(video_values or {}))], [clip("c", "v", **(clip_values or {}))], **extras)


def test_a_good_clip_is_accepted_without_reasons():
    table = select([one_clip()])
    assert table.schema == SELECT
    (row,) = table.to_pylist()
    assert row["accepted"] and row["reasons"] == [] and row["weight"] == 1.0
    assert (row["clip"], row["video"], row["path"]) == (clip_id("c"), video_id("v"), "v.mp4")


# (what of, field, value just inside, value just outside, reason): one for each bound that holds by default.
BOUNDS = [
    ("video", {"duration": 2.0, "claimed": 2.0}, {"duration": 1.99, "claimed": 1.99}, "too_short"),
    ("video", {"fps": 16.0}, {"fps": 15.99}, "low_fps"),
    ("video", {"bitrate": 0.02}, {"bitrate": 0.0199}, "low_bitrate"),
    ("video", {"duration": 9.5}, {"duration": 9.49}, "truncated"),
    ("video", {"interlaced": 0.1}, {"interlaced": 0.12}, "interlaced"),
    ("video", {"hdr": False}, {"hdr": True}, "hdr"),
    ("clip", {"width": 1056, "height": 352}, {"width": 1057, "height": 352}, "aspect"),
    ("clip", {"width": 352, "height": 1056}, {"width": 352, "height": 1057}, "aspect"),
    ("clip", {"height": 352, "width": 640}, {"height": 351, "width": 640}, "too_small"),
    ("clip", {"sharp_min": 200.0}, {"sharp_min": 199.9}, "blurred"),
    ("clip", {"sharp_max": 2000.0}, {"sharp_max": 2000.1}, "too_sharp"),
    ("clip", {"motion": 1.0}, {"motion": 0.99}, "still"),
    ("clip", {"motion": 20.0}, {"motion": 20.1}, "too_fast"),
    ("clip", {"area": 0.6}, {"area": 0.59}, "borders"),
    ("clip", {"repeated": 0.2}, {"repeated": 0.21}, "repeated"),
    ("clip", {"shake": 0.01}, {"shake": 0.0101}, "shake"),
    ("clip", {"luma": 0.05}, {"luma": 0.049}, "too_dark"),
    ("clip", {"luma": 0.95}, {"luma": 0.951}, "too_bright"),
    ("clip", {"dark": 0.8}, {"dark": 0.81}, "dark_pixels"),
    ("clip", {"bright": 0.8}, {"bright": 0.81}, "bright_pixels"),
]


@pytest.mark.parametrize(("of", "inside", "outside", "name"), BOUNDS)
def test_a_score_at_its_bound_is_accepted_and_one_beyond_is_the_reason(of, inside, outside, name):
    assert reasons(select([one_clip(**{f"{of}_values": inside})])) == {clip_id("c"): []}
    (row,) = select([one_clip(**{f"{of}_values": outside})]).to_pylist()
    (reason,) = row["reasons"]
    assert not row["accepted"] and reason["name"] == name and row["weight"] is None
    low, high = reason["low"] or -math.inf, math.inf if reason["high"] is None else reason["high"]
    assert not low <= reason["value"] <= high  # the reason says why


def answers(**shares):
    return [{"question": question, "yes": share} for question, share in shares.items()]


EXTRA_BOUNDS = [
    ("text", {"overlay": 0.02}, {"overlay": 0.021}, "overlay_text", {}),
    ("aesthetic", {"aesthetic": 4.5}, {"aesthetic": 4.49}, "unaesthetic", {}),
    ("safety", {"nsfw": 0.8}, {"nsfw": 0.81}, "nsfw", {"nsfw": {"high": 0.8}}),
    ("safety", {"faces": 2}, {"faces": 3}, "faces", {"faces": {"high": 2.0}}),
    ("vlm", {"answers": answers(border=0.49)}, {"answers": answers(border=0.5)}, "vlm_border", {}),
    ("caption", {"caption": "A dog."}, {"caption": "", "reason": "caption_empty"}, "caption_empty", {}),
    ("caption", {"caption": "A dog."}, {"caption": None}, "caption_missing", {}),
    ("caption", {"caption": "A dog."}, {"caption": None, "error": "500"}, "caption_error", {}),
]


@pytest.mark.parametrize(("step", "inside", "outside", "name", "bounds"), EXTRA_BOUNDS)
def test_bounds_of_optional_steps_hold_where_they_ran(step, inside, outside, name, bounds):
    settings = config(select=bounds)
    assert reasons(select([one_clip(**{step: [{"clip": "c"} | inside]})], settings)) == {clip_id("c"): []}
    assert reasons(select([one_clip(**{step: [{"clip": "c"} | outside]})], settings)) == {clip_id("c"): [name]}


def test_a_score_that_a_step_could_not_give_is_a_reason_and_one_that_the_gate_kept_from_it_is_none():
    rows = unit(
        [video("v")],
        [clip("failed", "v"), clip("closed", "v", motion=0.1)],
        text=[{"clip": "failed", "error": "no frames"}],
    )
    assert reasons(select([rows])) == {clip_id("failed"): ["unmeasured"], clip_id("closed"): ["still"]}
    assert reasons(select([one_clip({"motion": None})])) == {clip_id("c"): ["unmeasured"]}


def test_all_reasons_are_told():
    rows = one_clip({"motion": 0.5, "sharp_min": 10.0, "shake": 0.5}, {"fps": 10.0, "error": "truncated"})
    assert reasons(select([rows])) == {clip_id("c"): ["truncated", "low_fps", "blurred", "still", "shake"]}


def test_a_video_without_clips_and_a_copy_of_a_file_have_their_reasons():
    rows = unit(
        [video("v"), video("broken", error="unreadable", duration=None, fps=None, bitrate=None, interlaced=None)],
        [clip("c", "v")],
        copies=[{"path": "again/v.mp4", "video": video_id("v")}],
    )
    table = select([rows])
    assert reasons(table) == {clip_id("c"): [], "broken.mp4": ["unreadable"], "again/v.mp4": ["duplicate_file"]}
    assert table["video"].to_pylist() == [video_id("v"), video_id("broken"), video_id("v")]


def test_a_rest_of_a_scene_has_its_reason_and_nothing_else_is_asked_of_it():
    rest = dict.fromkeys(("sharp_min", "sharp_max", "motion", "area", "phash", "shake", "luma")) | {"duration": 1.2}
    (row,) = select([one_clip({"reason": "too_short_scene"} | rest)]).to_pylist()
    (reason,) = row["reasons"]
    assert (reason["step"], reason["name"], reason["value"], reason["low"]) == ("split", "too_short_scene", 1.2, 2.0)


def test_a_clip_that_no_bucket_takes_has_the_reason_why():
    fits = [
        {"clip": "good", "bucket": "352x640x48f24"},
        {"clip": "crop", "name": "crops_too_much", "value": 0.5, "low": 0.75},
        {"clip": "small", "name": "too_small", "value": 100.0, "low": 352.0},
        {"clip": "narrow", "name": "too_small", "value": 400.0, "low": 640.0},
    ]
    small = {"width": 100, "height": 100}
    clips = [clip("good", "v"), clip("crop", "v"), clip("small", "v", **small), clip("narrow", "v")]
    rows = unit([video("v")], clips, fits=fits)
    table = select([rows])
    assert list(reasons(table).values()) == [[], ["crops_too_much"], ["too_small"], ["too_small"]]
    (reason,) = table["reasons"].to_pylist()[1]
    assert (reason["step"], reason["value"], reason["low"], reason["high"]) == ("fit", 0.5, 0.75, None)
    assert gate(rows, config(), NOTHING)["open"].to_pylist() == [True, False, False, False]


def test_the_first_source_that_fits_counts_and_its_licence_is_carried():
    sources = Sources(
        [
            ("a/secret.mp4", Source(licence="none", allowed=False)),
            ("a/*", Source(licence="CC-BY", allowed=True, origin="archive")),
            ("a/secret2.mp4", Source(licence="none", allowed=False)),
            ("b.mp4", Source(licence="?")),
        ]
    )
    paths = ["a/secret.mp4", "a/x/y.mp4", "a/secret2.mp4", "b.mp4", "c.mp4"]
    rows = unit([video(path, path=path) for path in paths], [clip(path, path) for path in paths])
    screening = Screening(sources, Blocklist())
    table = select([rows], config(screen={"require_licence": True}), screening)
    assert list(reasons(table).values()) == [["not_allowed"], [], [], ["no_licence"], ["no_licence"]]
    assert table["licence"].to_pylist() == ["none", "CC-BY", "CC-BY", "?", None]
    assert table["origin"].to_pylist()[1] == "archive"
    assert list(reasons(select([rows], None, screening)).values()) == [["not_allowed"], [], [], [], []]


def test_blocked_files_and_frames_are_rejected():
    rows = unit([video("v"), video("w")], [clip("c", "v"), clip("near", "w"), clip("far", "w")])
    listed = flipped(hashes_of("near"), 6)[3]
    beyond = flipped(hashes_of("far"), 7)[3]
    screening = Screening(Sources(), Blocklist(frozenset([video_id("v")]), np.array([listed, beyond], np.uint64)))
    table = select([rows], None, screening)
    assert list(reasons(table).values()) == [["blocked"], ["blocked"], []]
    assert table["reasons"].to_pylist()[1][0]["value"] == 6.0


def test_the_gate_opens_for_what_only_costly_steps_could_reject():
    rows = unit(
        [video("v"), video("blocked")],
        [clip("good", "v"), clip("still", "v", motion=0.1), clip("b", "blocked")],
        text=[{"clip": "good", "overlay": 0.9}],
    )
    screening = Screening(Sources(), Blocklist(frozenset([video_id("blocked")])))
    assert gate(rows, config(), screening)["open"].to_pylist() == [True, False, False]


SCORED = {"safety": {"nsfw": True, "faces": True}}


@pytest.mark.parametrize(
    ("sections", "ran", "key"),
    [
        ({"select": {"overlay": {"high": 0.1}}}, (), "select.overlay"),
        ({"select": {"aesthetic": {"low": 4.0}}}, ("text",), "select.aesthetic"),
        ({"select": {"nsfw": {"high": 0.8}}, "safety": {"faces": True}}, ("safety",), "select.nsfw"),
        ({"select": {"faces": {"high": 2.0}}}, (), "select.faces"),
        ({"select": {"vlm": ("border",)}}, (), "select.vlm"),
        ({"balance": {"group": "subject"}}, (), "balance.group"),
        ({"balance": {"up": {"person": 2.0}}}, (), "balance.up"),
        ({"dedup": {"embeddings": True}}, (), "dedup.embeddings"),
    ],
)
def test_a_bound_on_what_no_clip_will_have_is_refused_and_the_key_named(sections, ran, key):
    with pytest.raises(ConfigError, match=f"^{key}: asks for a score that no clip has"):
        check_bounds(config(**sections), ran)
    check_bounds(config(**{**SCORED, **sections, "safety": SCORED["safety"]}), EXTRAS)
    check_bounds(config(), ())


def test_a_question_that_is_never_asked_is_refused():
    with pytest.raises(ConfigError, match=r"select\.vlm: no question 'borders'; there are overlay_text, "):
        check_bounds(config(select={"vlm": ("border", "borders")}), EXTRAS)


def many(count=60, per_unit=7):
    """Units of clips with scores all over the place, some rejected."""
    names = [f"c{i}" for i in range(count)]
    clips = [
        clip(name, f"v{i // 3}", motion=0.5 + i * 0.37 % 25, sharp_med=100.0 + i * 71 % 900, width=640 + i % 5 * 16)
        for i, name in enumerate(names)
    ]
    units = []
    for part in _batched(count // 3, per_unit):
        rows = [one for one in clips if any(one["video"] == video_id(f"v{v}") for v in part)]
        own = [name for i, name in enumerate(names) if i // 3 in part]
        tags = [
            {"clip": name, "tags": [f"subject:{'dog' if int(name[1:]) % 4 else 'person'}", "scene:street"]}
            for name in own
        ]
        aesthetics = [{"clip": name, "aesthetic": 3.0 + int(name[1:]) * 0.13 % 4} for name in own]
        units.append(unit([video(f"v{v}") for v in part], rows, tags=tags, aesthetic=aesthetics))
    return units


def _batched(count, size):
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


PAIRS = pa.Table.from_pylist([{"a": clip_id("c7"), "b": clip_id("c31"), "kind": "picture", "distance": 2.0}], PAIR)
FULL = {"select": {"top": 0.5}, "balance": {"group": "subject", "up": {"person": 2.0}, "clip": (0.01, 100.0)}}


@pytest.mark.parametrize(
    ("order", "size"), [(slice(None, None, -1), 7), (slice(None), 1), (slice(None, None, -1), 100)]
)
def test_the_order_and_size_of_units_change_nothing(order, size):
    expected = select(many(), config(**FULL), pairs=PAIRS).sort_by("clip")
    assert {"not_top", "duplicate_picture", "unaesthetic"} <= {n for names in reasons(expected).values() for n in names}
    assert select(many(per_unit=size)[order], config(**FULL), pairs=PAIRS).sort_by("clip").equals(expected)


def test_the_composite_is_the_mean_percentile_of_its_scores():
    rows = unit([video("v")], [clip(f"c{i}", "v", sharp_med=300.0 + i, motion=5.0 * 1.1**i) for i in range(4)])
    composite = judge(rows, config(), NOTHING, Ranks.of([rows]))["composite"].to_pylist()
    # Sharpness ranks 0 … 3 as 1/8, 3/8, 5/8, 7/8; motion, best at 5, the other way round.
    assert composite == pytest.approx([0.5] * 4)
    rows = unit([video("v")], [clip(f"c{i}", "v", sharp_med=300.0 + i, motion=None) for i in range(4)])
    assert judge(rows, config(), NOTHING, Ranks.of([rows]))["composite"].to_pylist() == [1 / 8, 3 / 8, 5 / 8, 7 / 8]


def test_top_keeps_the_best_share_of_the_accepted_and_breaks_ties_by_id():
    rows = unit([video("v")], [clip(f"c{i}", "v") for i in range(9)] + [clip("bad", "v", motion=0.0, sharp_med=1e4)])
    table = select([rows], config(select={"top": 0.34}, dedup={"per_source": 100}))
    kept = [row["clip"] for row in table.to_pylist() if row["accepted"]]
    assert sorted(kept) == sorted(clip_id(f"c{i}") for i in range(9))[:3]  # of nine, all with one composite
    assert reasons(table)[clip_id("bad")] == ["still"]


def test_weights_are_the_inverse_roots_of_the_groups_sizes_of_mean_one():
    tags = ["person"] + ["dog"] * 4
    rows = unit(
        [video("v")],
        [clip(f"c{i}", "v") for i in range(5)],
        tags=[{"clip": f"c{i}", "tags": [f"subject:{tag}"]} for i, tag in enumerate(tags)],
    )
    table = select([rows], config(balance={"group": "subject"}))
    assert table["group"].to_pylist() == tags
    mean = (1 + 4 * 0.5) / 5
    assert table["weight"].to_pylist() == pytest.approx([1 / mean] + [0.5 / mean] * 4)
    table = select([rows], config(balance={"up": {"person": 6.0}}))
    assert table["weight"].to_pylist() == pytest.approx([3.0] + [0.5] * 4)
    table = select([rows], config(balance={"up": {"person": 6.0}, "clip": (0.6, 2.0)}))
    assert table["weight"].to_pylist() == pytest.approx([2.0] + [0.6] * 4)


def test_the_median_rule_asks_of_sharpness_only_the_median():
    rows = one_clip({"sharp_min": 1.0, "sharp_med": 300.0, "sharp_max": 1e5})
    assert reasons(select([rows])) == {clip_id("c"): ["blurred", "too_sharp"]}
    assert reasons(select([rows], config(select={"sharp": {"low": 200.0, "high": 2000.0, "rule": "median"}}))) == {
        clip_id("c"): []
    }


def test_every_limit_has_a_test_here():
    told = {name for *_, name in BOUNDS} | {name for *_, name, _ in EXTRA_BOUNDS}
    for limit in limits(config(select={"nsfw": {"high": 0.8}, "faces": {"high": 2.0}})):
        assert limit.bound.low is None or limit.below in told
        assert limit.bound.high is None or limit.above in told
