"""The set lists what was accepted, splits by videos, has the same bytes again, and lets go of what is withdrawn."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mugv_ds.config.errors import InputError
from mugv_ds.config.load import load_config
from mugv_ds.config.prepare_schema import ValidationSection
from mugv_ds.data.run_data import RunData
from mugv_ds.data.shards import read_header
from mugv_ds.data.storage import open_file
from mugv_ds.models.flops import SampleCost
from mugv_ds.prepare import manifest as manifest_module
from mugv_ds.prepare.manifest import COLUMNS, Parts, _split, forget_overwritten, read_manifest, read_rows, withdraw
from mugv_ds.prepare.units import Fragments
from tests.helpers.dataset import write_config
from tests.helpers.prepared import PreparedSet


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> PreparedSet:
    prepared = PreparedSet(tmp_path_factory.mktemp("set"))
    prepared.run()
    return prepared


@pytest.fixture
def copied(made, tmp_path) -> PreparedSet:
    """The set in a folder of its own, to be changed."""
    for name in ("work", "out"):
        shutil.copytree(getattr(made, name), tmp_path / name)
    twin = object.__new__(PreparedSet)
    twin.__dict__ |= {name: value for name, value in vars(made).items() if name != "parts"}
    twin.work, twin.out = tmp_path / "work", tmp_path / "out"
    return twin


def rows(prepared, *names):
    return [row for name in names or ("train", "val") for row in read_rows(prepared.out / f"{name}.csv")]


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_clip_is_a_row_with_all_columns(made):
    found = {row["sample_id"]: row for row in rows(made)}
    assert sorted(found) == sorted(clip["clip"] for clip in made.clips)
    for i, clip in enumerate(made.clips):
        row = found[clip["clip"]]
        assert tuple(row) == COLUMNS and row["source"] == "generated" and row["kind"] == "video"
        frames = 16 if len(made.films[i]) >= 16 else 8
        assert [row[name] for name in ("height", "width", "num_frames", "fps")] == ["32", "48", str(frames), "24"]
        assert row["caption"] == made.caption(i) and float(row["weight"]) == 1 + i / 4
        for column in ("latent_path", "text_feat_path"):
            shard, key = row[column].split("#")
            with open_file(made.out / shard) as blob:
                assert key in read_header(blob)


def test_the_trainer_reads_the_set(made, tmp_path):
    """By the readers and the plan of a run, whose config names the set as it lies."""
    path = write_config(
        tmp_path,
        made.out / "train.csv",
        model={"caption_channels": made.config.embed.channels},
        data={
            "val_manifest": str(made.out / "val.csv"),
            "index_dir": str(tmp_path / "index"),
            "global_batch_size": 2,
            "max_text_tokens": 40,
        },
    )
    config = load_config(path)
    data = RunData(config, SampleCost.of(config), data_ranks=1)
    assert data.text_encoder == made.encoder.info
    assert data.shapes == {(2, 4, 6), (1, 4, 6)}
    flows = data.readers.readers[0]
    for item in range(len(data.train)):
        (batch,) = flows.read(item, 0)
        assert batch.fps == 24 and batch.target.shape[0] == 24
        i = next(i for i, clip in enumerate(made.clips) if clip["clip"] == flows.name(item))
        expected, mask = made.encoder([made.caption(i) + made.config.embed.suffix])
        dropped = torch.equal(batch.text, flows.null_text()[0])
        assert dropped or ((batch.text - expected[0]).abs().max() < 0.02 and batch.text_mask.equal(mask[0]))
    assert len(data.held_out_flows().index) == len(rows(made, "val"))


def test_rows_are_ordered_by_bucket_unit_and_clip(made):
    for name in ("train", "val"):
        order = [(row["latent_path"].partition("#")[0], row["sample_id"]) for row in rows(made, name)]
        assert order == sorted(order)


def test_the_manifest_names_every_file_as_it_is(made):
    manifest = read_manifest(made.out)
    listed = manifest["files"] | manifest["shards"]
    assert set(listed) | {"MANIFEST.json"} == {str(path) for path in content(made.out)}
    for path, facts in listed.items():
        data = (made.out / path).read_bytes()
        assert (facts["bytes"], facts["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest["counts"] == {"train": len(rows(made, "train")), "val": len(rows(made, "val")), "left_out": {}}


def test_provenance_says_where_samples_come_from(made):
    provenance = pq.read_table(made.out / "provenance.parquet").to_pylist()
    sides = {row["sample_id"]: name for name in ("train", "val") for row in rows(made, name)}
    assert {row["sample"]: row["set"] for row in provenance} == sides
    by_clip = {row["clip"]: row for row in provenance}
    for i, clip in enumerate(made.clips):
        row = by_clip[clip["clip"]]
        assert (row["video"], row["path"]) == (clip["video"], f"{i}.mp4")
        assert (row["licence"], row["origin"]) == ("CC-BY" if i % 2 else "CC0", "drawn")
        assert row["start_pts"] == clip["first_pts"] and row["time_error"] < 1e-3 and row["left"] == 1.0
        assert row["pixel_luma"] == pytest.approx(made.films[i][:16].mean() / 255, abs=0.08)


def test_the_same_bytes_again(made, copied, tmp_path):
    before = content(made.out)
    copied.write()
    assert content(copied.out) == before
    shutil.rmtree(copied.out), shutil.rmtree(copied.work)
    copied.out.mkdir()
    copied.run()
    assert content(copied.out) == before


def test_another_selection_writes_no_shard_anew(copied):
    shards = {path: data for path, data in content(copied.out).items() if path.suffix == ".safetensors"}
    kept = [clip["clip"] for clip in copied.clips[:5]]
    copied.accept(kept)
    manifest = copied.write()
    assert sorted(row["sample_id"] for row in rows(copied)) == sorted(kept)
    assert {path: data for path, data in content(copied.out).items() if path.suffix == ".safetensors"} == shards
    assert manifest["counts"]["train"] + manifest["counts"]["val"] == 5
    copied.accept([])
    with pytest.raises(InputError, match="no clip is left for the set"):
        copied.write()


def test_videos_that_belong_together_are_on_one_side(made, copied):
    held_out = {row["sample_id"] for row in rows(made, "val")}
    assert 0 < len(held_out) < len(made.clips)
    inside = next(clip["clip"] for clip in made.clips if clip["clip"] in held_out)
    others = [clip["clip"] for clip in made.clips if clip["clip"] not in held_out]
    for other in others:
        copied.together = [(inside, other)]
        copied.write()
        sides = {row["sample_id"]: name for name in ("train", "val") for row in rows(copied, name)}
        assert sides[inside] == sides[other]
        moved = {clip for clip, side in sides.items() if (side == "val") != (clip in held_out)}
        assert moved <= {inside, other} or len({*sides.values()}) == 2  # or one had to be moved, lest a side be empty


def test_a_set_may_have_no_sample_held_out(copied):
    copied.config = copied.config.model_copy(update={"validation": ValidationSection(share=0)})
    assert copied.write()["counts"] == {"train": copied.count, "val": 0, "left_out": {}}
    assert not rows(copied, "val")


def test_labels_and_pairs_get_files_that_the_trainer_takes(copied):
    clips = [clip["clip"] for clip in copied.clips]
    copied.labels = [
        {"clip": clips[0], "label": "good"},
        {"clip": clips[1], "label": "bad"},
        {"clip": clips[4], "pair_id": "p", "rank": 2},
        {"clip": clips[5], "pair_id": "p", "rank": 1},
        {"clip": clips[2], "pair_id": "q", "rank": 1},
        {"clip": clips[3], "pair_id": "q", "rank": 2},  # of another length
    ]
    copied.write()
    labelled = {row["sample_id"]: row["label"] for row in rows(copied) if row["label"]}
    assert labelled == {clips[0]: "good", clips[1]: "bad"}
    files = sorted(path.stem for path in copied.out.glob("*.csv"))
    pairs = [name for name in files if name.startswith("pairs")]
    assert len(pairs) == 1 and {row["pair_id"] for row in rows(copied, *pairs)} == {"p"}
    assert sorted(row["rank"] for row in rows(copied, *pairs)) == ["1", "2"]
    copied.labels = []
    copied.write()
    assert sorted(path.stem for path in copied.out.glob("*.csv")) == ["train", "val"]


def test_what_is_withdrawn_leaves_the_set_and_stays_out(copied):
    video = copied.clips[1]["video"]
    gone, shards = withdraw(copied.out, videos=[video])
    assert gone == 1 and len(shards) == 2
    ids = [row["sample_id"] for row in rows(copied)]
    assert copied.clips[1]["clip"] not in ids and len(ids) == copied.count - 1
    assert pq.read_table(copied.out / "provenance.parquet").num_rows == copied.count - 1
    manifest = read_manifest(copied.out)
    assert manifest["counts"]["left_out"] == {"withdrawn": 1}
    for path, facts in (manifest["files"] | manifest["shards"]).items():
        assert hashlib.sha256((copied.out / path).read_bytes()).hexdigest() == facts["sha256"]
    before = content(copied.out)
    copied.run()
    assert content(copied.out) == before


def test_purging_takes_a_licence_out_of_the_shards_too(copied):
    names = {clip["clip"] for i, clip in enumerate(copied.clips) if i % 2}
    gone, shards = withdraw(copied.out, licences=["CC-BY"], purge=True, work=copied.work)
    assert gone == len(names)
    assert "latents/32x48x8f24/u000001.safetensors" in shards  # which had no others
    left = list(copied.out.rglob("*.safetensors"))
    assert len(left) == 2
    for path in left:
        with open_file(path) as blob:
            assert set(read_header(blob)) == {clip["clip"] for clip in copied.clips} - names
    before = content(copied.out)
    copied.run()
    assert content(copied.out) == before
    assert {row["sample_id"] for row in rows(copied)}.isdisjoint(names)


def test_purging_takes_clips_out_of_shards_that_are_not_in_the_set(copied):
    """They were encoded and then rejected, so that nothing beside the shards' fragments tells of them."""
    gone, *others = [clip["clip"] for clip in copied.clips]
    copied.accept(others)
    copied.write()
    for number, part in enumerate(copied.parts):
        Fragments(copied.work / "clips").write(number, "0" * 12, part["clips"])
    samples, shards = withdraw(copied.out, [copied.clips[0]["video"]], purge=True, work=copied.work)
    assert samples == 0 and len(shards) == 2
    for path in copied.out.rglob("*.safetensors"):
        with open_file(path) as blob:
            assert gone not in read_header(blob)
    assert all(
        hashlib.sha256((copied.out / path).read_bytes()).hexdigest() == facts["sha256"]
        for path, facts in read_manifest(copied.out)["shards"].items()
    )


@pytest.mark.parametrize("ended_in", ["write_preferences", "_purge", "_purge_fragment", "_write_json"])
def test_withdrawing_goes_on_wherever_it_was_ended(ended_in, copied, tmp_path, monkeypatch):
    video, clip = copied.clips[1]["video"], copied.clips[1]["clip"]
    real, calls = getattr(manifest_module, ended_in), []

    def end(*arguments):
        calls.append(arguments)
        if ended_in != "_write_json" or arguments[0].name == "MANIFEST.json":
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(manifest_module, ended_in, end)
    with pytest.raises(KeyboardInterrupt):
        withdraw(copied.out, [video], purge=True, work=copied.work)
    monkeypatch.undo()
    withdraw(copied.out, [video], purge=True, work=copied.work)
    assert clip not in {row["sample_id"] for row in rows(copied)}
    for path in copied.out.rglob("*.safetensors"):
        with open_file(path) as blob:
            assert clip not in read_header(blob)
    before = content(copied.out)
    copied.run()
    again = content(copied.out)
    assert {path for path in before if before[path] != again[path]} <= {Path("MANIFEST.json")}


def test_a_set_is_forgotten_before_its_shards_become_others(copied):
    keys = copied.keys["encode"]
    assert not forget_overwritten(copied.out, "encode", {}) and not forget_overwritten(copied.out, "encode", keys)
    assert not forget_overwritten(copied.out, "encode", {len(keys): "ffffffffffff"}), "a new shard overwrites none"
    assert forget_overwritten(copied.out, "encode", {0: "ffffffffffff"})
    assert sorted(path.name for path in copied.out.iterdir() if path.suffix in (".csv", ".json")) == [
        "text_encoder.json"
    ]
    assert not forget_overwritten(copied.out, "encode", {0: "ffffffffffff"})
    before = content(copied.out)
    copied.write()
    assert before.keys() < content(copied.out).keys()


def test_a_held_out_video_stays_so_when_ones_like_it_come():
    """They come in later units, and nothing depends on which of the ids is lower."""
    first, later = ([hashlib.sha256(f"{when} {n}".encode()).hexdigest() for n in range(20)] for when in ("a", "b"))
    select = [selected(range(20), first), selected(range(20, 40), later)]
    before = _split(parts_of(select[:1]), 0.5)
    after = _split(parts_of(select, [(f"c{n}", f"c{n + 20}") for n in range(20)]), 0.5)
    assert [after(video) for video in first] == [before(video) for video in first] == [after(one) for one in later]
    assert 5 < sum(map(after, first)) < 15


def test_a_long_chain_of_videos_that_belong_together_is_quick():
    ids = [f"{number:064x}" for number in range(20_000)]
    chain = [(f"c{n}", f"c{n + 1}") for n in reversed(range(len(ids) - 2))]
    began = time.process_time()
    is_held_out = _split(parts_of([selected(range(len(ids)), ids)], chain), 0.1)
    assert len({is_held_out(video) for video in ids[:-1]}) == 1 and time.process_time() - began < 5


def selected(numbers, videos):
    return pa.table({"clip": [f"c{n}" for n in numbers], "video": videos, "accepted": [True] * len(videos)})


def parts_of(select, together=()):
    """A set of which only the selection is known."""
    none = pa.table({"unit": pa.array([], pa.int32())})
    return Parts(len(select), none, none, lambda _, part, names: select[part].select(names), None, together=together)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"videos": 3, "licences": []}', "["])
def test_a_damaged_list_of_what_is_withdrawn_is_not_taken_for_an_empty_one(copied, text):
    (copied.out / "withdrawn.json").write_text(text)
    with pytest.raises(InputError, match=r"withdrawn\.json: damaged"):
        copied.write()


def test_a_damaged_manifest_is_named(copied):
    path = copied.out / "MANIFEST.json"
    path.write_text(json.dumps({"format": 7}))
    with pytest.raises(InputError, match=r"MANIFEST\.json: damaged \(of format 7"):
        withdraw(copied.out, videos=["x"])
