import pyarrow as pa
import pytest

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.rows import PAIR
from mugv_ds.prepare.screen import Blocklist, Screening, Source, Sources
from mugv_ds.prepare.select import Selection
from mugv_ds.prepare.whatif import Counts, explain, what_if
from tests.helpers.prepared_rows import clip, clip_id, hashes_of, unit, video, video_id

NOTHING = Screening(Sources(), Blocklist())
PAIRS = pa.Table.from_pylist([{"a": clip_id("c1"), "b": clip_id("d1"), "kind": "picture", "distance": 2.0}], PAIR)


def units():
    """Two units; what is accepted depends on each key that the tests change."""
    for name in "cd":
        clips = [clip(f"{name}{i}", name, motion=0.3 + i * 0.4, sharp_min=120.0 + 40 * i) for i in range(8)]
        clips[5] |= {"phash": hashes_of("same")}
        clips[6] |= {"phash": hashes_of("same")}
        seen = [{"clip": f"{name}{i}", "aesthetic": 4.0 + i * 0.2} for i in range(2, 8)]
        yield unit([video(name)], clips, aesthetic=seen)
    yield unit([video("broken", error="unreadable")], [], copies=[{"path": "again.mp4", "video": video_id("broken")}])


def config(**sections):
    return PrepareConfig.model_validate(sections)


CHANGES = [
    {"select": {"motion": {"low": 2.0}}},
    {"select": {"sharp": {"low": 250.0, "high": 300.0, "rule": "median"}}},
    {"select": {"aesthetic": {"low": 5.0}}},
    {"select": {"duplicates": False}},
    {"select": {"top": 0.3}},
    {"screen": {"require_licence": True}},
    {"dedup": {"per_source": 1}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change))
def test_what_if_tells_what_selecting_would(change):
    found = what_if(units, config(), config(**change), NOTHING, NOTHING, PAIRS)
    for settings, counts in ((config(), found.now), (config(**change), found.then)):
        selection, real = Selection.of(units, settings, NOTHING, PAIRS), Counts()
        for rows in units():
            real.add(rows, selection.table(rows))
        assert counts == real
    assert found.now != found.then


def test_counts_tell_what_one_bound_alone_keeps_out():
    found = what_if(units, config(), config(), NOTHING, NOTHING, PAIRS)
    assert found.now == found.then and found.unscored == 0
    assert (found.now.clips, found.now.seconds) == (16, 80.0)
    assert found.now.reasons["still"] == 4 and found.now.alone["still"] == 0  # i = 0, 1; both are blurred as well
    assert found.now.reasons["blurred"] == 4
    assert found.now.files == {"unreadable": 1, "duplicate_file": 1}
    text = "\n".join(found.lines())
    assert "accepted" in text and "still" in text


def test_clips_that_the_optional_steps_have_not_seen_are_counted():
    loose = config(select={"motion": {"low": 0.5}, "sharp": {"low": 100.0, "high": 2000.0}})
    found = what_if(units, config(), loose, NOTHING, NOTHING, PAIRS)
    assert found.unscored == 1  # c1 or d1: the other is its duplicate
    assert "have to look at first: 1" in "\n".join(found.lines())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"dedup": {"mean": 3.0}}, "dedup.mean"),
        ({"probe": {"sharp_side": 360}}, "probe.sharp_side"),
        ({"split": {"margin": 1}}, "split.margin"),
    ],
)
def test_what_would_have_to_be_measured_anew_is_refused(change, key):
    with pytest.raises(ConfigError, match=f"^{key}: what-if answers for select"):
        what_if(units, config(), config(**change), NOTHING, NOTHING, PAIRS)


def test_explain_tells_every_score_bound_and_reason():
    screening = Screening(Sources([("*", Source(licence="CC0\n", origin="x"))]), Blocklist())
    selection = Selection.of(units, config(), screening, PAIRS)
    (found,) = explain(clip_id("c0"), units, selection)
    text = "\n".join(found.lines())
    assert "rejected" in text and "REASON blurred: sharp_min (score) is 120, must lie in [200, ∞]" in text
    assert "REASON still: motion (score) is 0.3, must lie in [1, 20]" in text
    assert "licence 'CC0\\n'" in text
    for score in ("duration", "fps", "sharp_max", "shake", "aesthetic"):
        assert score in text
    of_video = explain(video_id("c"), units, selection)
    assert len(of_video) == 8
    assert [one.selected for one in explain("c.mp4", units, selection)] == [one.selected for one in of_video]
    (copy,) = explain("again.mp4", units, selection)
    assert copy.clip is None and "REASON duplicate_file" in "\n".join(copy.lines())
    (pair,) = {one.selected["clip"] for one in explain(clip_id("c1"), units, selection)}
    assert any("gives way to" in line for one in explain(pair, units, selection) for line in one.lines())
    with pytest.raises(InputError, match=r"'nothing\.mp4': no clip"):
        explain("nothing.mp4", units, selection)
