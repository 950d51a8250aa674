import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mugv_ds.config.prepare_schema import DedupSection, PrepareConfig
from mugv_ds.prepare.dedup import DedupRows, distances, find_pairs, keep, signatures
from mugv_ds.prepare.rows import AESTHETIC, CAPTION, DUPLICATE
from mugv_ds.prepare.screen import Blocklist, Screening, Sources
from mugv_ds.prepare.select import Ranks, judge
from tests.helpers.prepared_rows import clip, clip_id, flipped, hashes_of, unit, video

NOTHING = Screening(Sources(), Blocklist())


def units_of(*clips):
    """One unit for each video of the clips."""
    by_video = {}
    for one in clips:
        by_video.setdefault(one["video"], []).append(one)
    return [unit([video("") | {"video": name}], rows) for name, rows in by_video.items()]


def pairs_of(tmp_path, units, captions=None, vectors=None, **changes):
    """(a, b) → (kind, distance), of ids in order."""
    rows = [
        DedupRows(
            rows.clips,
            None if captions is None else table(CAPTION, captions, "caption"),
            None if vectors is None else table(AESTHETIC, vectors, "embedding"),
        )
        for rows in units
    ]
    return find_pairs(rows, DedupSection(**changes), tmp_path)


def table(schema, values, column):
    rows = [dict.fromkeys(schema.names) | {"clip": clip_id(name), column: value} for name, value in values.items()]
    return pa.Table.from_pylist(rows, schema)


def names(pairs):
    return {frozenset((row["a"], row["b"])): row["kind"] for row in pairs.to_pylist()}


def pair(*names):
    return frozenset(clip_id(name) for name in names)


def duplicates(units, pairs, **changes):
    """Clip that gives way → (of, kind)."""
    config = PrepareConfig(dedup=DedupSection(**changes))
    ranks = Ranks.of(units)
    found = keep(lambda: ((u.clips, judge(u, config, NOTHING, ranks)) for u in units), pairs, config.dedup)
    assert found.schema == DUPLICATE and found["clip"].to_pylist() == sorted(found["clip"].to_pylist())
    return {row["clip"]: (row["of"], row["kind"]) for row in found.to_pylist()}


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 0.995, 1.0), (6, 0.9, 1.0)])
def test_recall_of_changed_frames(tmp_path, bits, least, most):
    """Of clips whose 8 frames differ by 4 bits all meet, by 6 bits 96 of 100; others do not."""
    count = 400
    clips = [
        one
        for i in range(count)
        for one in (
            clip(f"a{i}", f"v{i}"),
            clip(f"b{i}", f"w{i}", phash=flipped(hashes_of(f"a{i}"), bits, seed=i)),
        )
    ]
    rows = unit([], clips)
    found = names(pairs_of(tmp_path, [rows]))
    right = sum(pair(f"a{i}", f"b{i}") in found for i in range(count))
    assert least <= right / count <= most
    assert len(found) == right
    assert set(found.values()) == {"picture"}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bits", "found"), [((6,) * 8, True), ((7,) + (6,) * 7, False)])
def test_the_mean_distance_at_its_bound_is_a_duplicate_and_beyond_is_none(tmp_path, bits, found):
    """The changed bits all lie in one band, so that the pair is a candidate for certain."""
    hashes = hashes_of("a")
    changed = [one ^ ((1 << count) - 1) for one, count in zip(hashes, bits, strict=True)]
    pairs = pairs_of(tmp_path, units_of(clip("a", "v"), clip("b", "w", phash=changed)))
    assert (names(pairs) == {pair("a", "b"): "picture"}) is found


@pytest.mark.parametrize(("bits", "found"), [(16, True), (17, False)])
def test_the_worst_frame_at_its_bound_is_a_duplicate_and_beyond_is_none(tmp_path, bits, found):
    hashes = hashes_of("a")
    changed = [hashes[0] ^ ((1 << bits) - 1), *hashes[1:]]
    pairs = pairs_of(tmp_path, units_of(clip("a", "v"), clip("b", "w", phash=changed)))
    assert bool(len(pairs)) is found


def test_a_mirrored_clip_is_found_unless_told_otherwise(tmp_path):
    a = clip("a", "v")
    b = clip("b", "w", phash=a["phash_mirror"], phash_mirror=a["phash"])
    assert names(pairs_of(tmp_path, units_of(a, b))) == {pair("a", "b"): "mirror"}
    assert names(pairs_of(tmp_path, units_of(a, b), mirror=False)) == {}


def test_flat_frames_have_no_hash_and_make_no_pair(tmp_path):
    flat = [0] * 5
    a, b = (clip(name, name, phash=hashes_of("a")[:3] + flat, phash_mirror=[0] * 8) for name in "ab")
    assert len(pairs_of(tmp_path, units_of(a, b))) == 0  # three frames are too few
    a, b = (clip(name, name, phash=hashes_of("a")[:4] + flat[:4], phash_mirror=[0] * 8) for name in "ab")
    assert len(pairs_of(tmp_path, units_of(a, b))) == 1


def test_clips_of_one_video_are_no_pair_but_at_most_so_many_stay(tmp_path):
    alike = [clip(f"c{i}", "v", phash=flipped(hashes_of("c"), 4, seed=i), sharp_med=500.0 + i) for i in range(5)]
    other = clip("other", "v")
    units = units_of(*alike, other)
    pairs = pairs_of(tmp_path, units)
    assert len(pairs) == 0
    gone = duplicates(units, pairs, per_source=3)
    assert gone == {clip_id("c0"): (clip_id("c4"), "source"), clip_id("c1"): (clip_id("c4"), "source")}
    assert duplicates(units, pairs, per_source=5) == {}
    assert duplicates(units, pairs, per_source=3, per_source_mean=1.0) == {}


def test_captions_alike_are_duplicates_only_with_pictures_alike(tmp_path):
    text = "a brown dog runs over a green field while a man in a red coat watches from the road behind it"
    captions = dict.fromkeys(("a", "near", "far"), text) | {
        "another": "an old tram crosses the bridge at night in rain"
    }
    clips = [
        clip("a", "v"),
        clip("near", "w", phash=flipped(hashes_of("a"), 12)),
        clip("far", "x"),
        clip("another", "y", phash=flipped(hashes_of("a"), 12, seed=9)),
    ]
    units = units_of(*clips)
    assert names(pairs_of(tmp_path, units)) == {}
    assert names(pairs_of(tmp_path, units, captions)) == {pair("a", "near"): "caption"}


def test_the_likeness_of_captions_is_estimated():
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(50):
        words = [str(word) for word in generator.integers(0, 10**6, 60)]
        shift = int(generator.integers(0, 20))
        _, (a, b) = signatures([" ".join(words[:40]), " ".join(words[shift : shift + 40])])
        errors.append((a == b).mean() - (38 - shift) / (38 + shift))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.05
    there, found = signatures([None, "", "…", "Two words", "two WORDS"])
    assert there.tolist() == [3, 4] and (found[0] == found[1]).all()


def test_embeddings_alike_are_duplicates(tmp_path):
    pytest.importorskip("faiss", reason="extra prepare-embed")
    generator = np.random.default_rng(0)
    vectors = {name: generator.normal(size=16) for name in ("a", "c", "d", "e")}
    vectors["b"] = vectors["a"] * 3 + 0.01 * generator.normal(size=16)
    embeddings = {name: vector.astype(np.float16) for name, vector in vectors.items()}
    units = units_of(*(clip(name, name) for name in vectors))
    found = [pairs_of(tmp_path, order, vectors=embeddings, embeddings=True) for order in (units, units[::-1])]
    assert names(found[0]) == {pair("a", "b"): "embedding"} and found[0]["distance"][0].as_py() > 0.99
    assert found[0].equals(found[1])
    assert names(pairs_of(tmp_path, units, vectors=embeddings)) == {}


BETTER = [
    ({}, {"motion": 0.1}),  # accepted by the bounds
    ({"width": 1920, "height": 1080}, {"sharp_med": 900.0}),  # more pixels
    ({"sharp_med": 900.0}, {"sharp_med": 300.0}),  # composite
]


@pytest.mark.parametrize(("better", "worse"), BETTER)
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_the_best_of_a_group_stays(tmp_path, better, worse, names):
    one, other = names
    units = units_of(clip(one, one, **better), clip(other, other, **worse | {"phash": hashes_of(one)}))
    assert duplicates(units, pairs_of(tmp_path, units)) == {clip_id(other): (clip_id(one), "picture")}


def test_of_equals_the_lower_id_stays(tmp_path):
    units = units_of(*(clip(name, name, phash=hashes_of("a")) for name in "abc"))
    low, *others = sorted(clip_id(name) for name in "abc")
    assert duplicates(units, pairs_of(tmp_path, units)) == dict.fromkeys(others, (low, "picture"))


def test_clips_that_are_joined_over_others_are_one_group_and_one_video_of_it_stays(tmp_path):
    first = hashes_of("a")
    second = [one ^ 0b11111 for one in first]  # 5 bits
    third = [one ^ 0b1111100000 for one in second]  # 10 bits from the first, 5 from the second
    clips = [clip("a", "a", width=1920), clip("b", "b", phash=second), clip("c", "c", phash=third)]
    again = clip("a again", "a", width=1920)
    units = units_of(*clips, again | {"phash": [one ^ 1 for one in first]})
    gone = duplicates(units, pairs_of(tmp_path, units))
    assert set(gone) == {clip_id("b"), clip_id("c")}
    assert {of for of, _ in gone.values()} <= {clip_id("a"), clip_id("a again")}


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_work_changes_nothing(tmp_path, seed):
    generator = np.random.default_rng(seed)
    clips = [
        clip(
            f"{i}-{j}", f"v{j}-{i % 7}", phash=flipped(hashes_of(f"{i}"), 2, seed=j), sharp_med=300.0 + (i * 7 + j) % 90
        )
        for i, j in itertools.product(range(20), range(4))
    ]
    units = units_of(*clips)
    pairs = pairs_of(tmp_path, units)
    assert len(pairs) == 20 * 3
    mixed = [units[i] for i in generator.permutation(len(units))]
    assert pairs_of(tmp_path, mixed).equals(pairs)
    assert duplicates(mixed, pairs) == duplicates(units, pairs)


def test_a_crowd_of_equal_clips_is_one_group(tmp_path):
    """Far more share a key than each is compared with; still they are all joined."""
    clips = [clip(f"c{i}", f"v{i}", phash=hashes_of("c"), phash_mirror=hashes_of("m")) for i in range(500)]
    units = [unit([video(f"v{i}") for i in range(500)], clips)]
    pairs = pairs_of(tmp_path, units)
    assert len(pairs) == 499
    assert len(duplicates(units, pairs)) == 499


def test_distances():
    one = np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.uint64)
    other = one ^ np.array([[1 << 40, 0, 0, 0, 0, 0, 0, 7 << 50]], np.uint64)
    mean, worst = distances(one, other)
    assert (mean[0], worst[0]) == (0.5, 3)


def test_an_id_that_is_twice_is_refused(tmp_path):
    units = units_of(clip("a", "v"), clip("a", "w"))
    with pytest.raises(ValueError, match=f"clip {clip_id('a')} is there twice"):
        pairs_of(tmp_path, units)


@pytest.mark.long
def test_a_million_clips_take_less_than_a_gibibyte(tmp_path):
    """Duplicates and selection of 1,000,000 generated clips of 50,000 videos, with captions, in one process."""
    command = [sys.executable, "-m", "tests.helpers.many_clips", "1000000", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    print(done.stdout)
    found = json.loads(done.stdout)
    assert (found["clips"], found["pairs"], found["duplicates"]) == (1_000_000, 100_000, 100_000)
    assert found["peak"] < 1 << 30
    assert sum(found["seconds"].values()) < 20 * 60
