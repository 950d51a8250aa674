"""The command on a small folder: killed anywhere it goes on with the same bytes; changed bounds encode nothing anew."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.data.manifest import open_index
from mugv_ds.prepare import rows
from mugv_ds.prepare.chain import EXTRAS, GATE_STEP, Folders
from mugv_ds.prepare.encode import FIT_STEP
from mugv_ds.prepare.manifest import read_rows
from mugv_ds.prepare.run import DEDUP_STEP, SELECT_STEP, Preparation
from mugv_ds.prepare.scan import _FILES, _PLAN, Scan
from mugv_ds.prepare.units import write_table
from tests.helpers.preparation import Prepared


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A preparation that ran once, undisturbed."""
    prepared = Prepared(tmp_path_factory.mktemp("whole"))
    prepared.said = prepared.run()
    prepared.made = prepared.hashes()
    return prepared


@pytest.fixture
def again(whole):
    """The same folder as it was after that run."""
    backup = whole.root / "backup"
    for name in ("work", "out"):
        shutil.copytree(whole.root / name, backup / name)
    yield whole
    for name in ("work", "out"):
        shutil.rmtree(whole.root / name)
        (backup / name).rename(whole.root / name)
    backup.rmdir()
    whole.configure()


def accepted(prepared):
    paths = sorted((prepared.work / "select").glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    newest = {path.name[:7]: path for path in paths}
    return sum(sum(pq.read_table(path)["accepted"].to_pylist()) for path in newest.values())


def test_the_set_is_made_verified_and_reported(whole):
    assert "none failed" in whole.said and "FAILED" not in whole.said
    assert (whole.work / "report" / "index.html").stat().st_size > 10_000
    index = open_index(whole.out / "train.csv", whole.root / "index")
    assert len(index) + len(open_index(whole.out / "val.csv", whole.root / "index")) == accepted(whole) > 0
    assert "skipped: text.enabled is false" in whole.said


def test_a_second_run_does_nothing(again):
    before = {path: path.stat().st_mtime_ns for path in again.files() if path.suffix in (".parquet", ".safetensors")}
    said = again.run()
    assert again.hashes() == again.made
    for step in ("probe", "split", "fit", "encode", "embed"):
        assert f"{step}: 0 units" in said
    unchanged = {path: path.stat().st_mtime_ns for path in before if path.parent.name in ("videos", "clips", "encode")}
    assert unchanged.items() <= before.items() and unchanged


def test_a_changed_bound_encodes_nothing_anew(again):
    stricter = again.run("what-if", "--set", "select.motion.high=1.5")
    again.configure(select={"motion": {"low": 3.0, "high": 20.0}})
    said = again.run("select")
    assert "accepted" in stricter and "accepted" in said
    said = again.run()
    assert "encode: 0 units" in said and "probe: 0 units" in said
    again.configure()
    assert "encode: 0 units" in again.run()
    again.run("gc")  # of decisions under the other bound, which the report counts
    again.run()
    assert again.hashes() == again.made


def test_new_videos_make_new_units_and_shards(again):
    shards = {name: value for name, value in again.made.items() if name.startswith("out/latents")}
    more = Prepared(again.root / "more", count=7)
    for name in ("5.mp4", "5.txt", "6.mp4", "6.txt"):
        shutil.copy(more.videos / name, again.videos / name)
    try:
        said = again.run()
        assert "probe: 1 units, 2 rows" in said
        assert shards.items() <= again.hashes().items()
        assert len(pq.read_table(again.out / "provenance.parquet")) > 5
    finally:
        for name in ("5.mp4", "5.txt", "6.mp4", "6.txt"):
            (again.videos / name).unlink()
        shutil.rmtree(again.root / "more")


def test_videos_that_a_limited_run_left_out_are_probed_later(again):
    """What was not there for a run is not missing for ever."""
    again.run("scan")
    shutil.rmtree(again.work / "videos")
    again.run("scan", "--limit", "2")
    assert "3 units" in again.run("probe")
    again.run("scan")
    assert "2 units, 4 rows" in again.run("probe")
    newest = {path.name[:7]: path for path in sorted((again.work / "videos").iterdir(), key=os.path.getmtime)}
    assert not any(error for path in newest.values() for error in pq.read_table(path)["error"].to_pylist())


def test_a_video_that_went_keeps_what_is_known_of_it(again):
    (again.videos / "0.mp4").rename(again.root / "0.mp4")
    try:
        said = again.run(status=1)  # as the pixels of its samples cannot be compared any more
    finally:
        (again.root / "0.mp4").rename(again.videos / "0.mp4")
    assert "probe: 0 units" in said and "encode: 0 units" in said


def test_a_file_that_moves_to_where_it_is_allowed_is_let_in(again):
    sources = again.root / "sources.csv"
    sources.write_text("path,licence,allowed\nno/*,,no\n*,CC0,yes\n")
    again.configure(screen={"sources": str(sources)})
    (again.videos / "no").mkdir()
    for name in ("0.mp4", "0.txt"):
        (again.videos / name).rename(again.videos / "no" / name)
    try:
        again.run()
        provenance = pq.read_table(again.out / "provenance.parquet")["path"].to_pylist()
        assert not any(path.startswith("no/") for path in provenance)
        shutil.rmtree(again.work / "caption")  # as if it had never been let in
    finally:
        for name in ("0.mp4", "0.txt"):
            (again.videos / "no" / name).rename(again.videos / name)
        (again.videos / "no").rmdir()
    again.run()
    assert "0.mp4" in pq.read_table(again.out / "provenance.parquet")["path"].to_pylist()


def test_a_bucket_that_is_gone_leaves_the_set(again):
    """Its units keep their place in the plan, and what is accepted is in them too."""
    again.configure(encode={"buckets": [{"height": 32, "width": 48, "frames": 16, "fps": 20.0}]})
    again.run()
    assert set(pq.read_table(again.out / "provenance.parquet")["bucket"].to_pylist()) == {"32x48x16f20"}
    assert {row["unit"] for row in pq.read_table(again.work / "plan" / "encode.parquet").to_pylist()} > {0}


def test_decisions_follow_from_which_steps_run_even_where_these_found_nothing():
    """A step that has not run rejects what it was to measure; left out of the config it does not."""
    preparation = Preparation(PrepareConfig(), Folders(*3 * [Path("none")]), None, None, print)
    preparation._use(Scan(_FILES.empty_table(), _PLAN.empty_table()))
    keys = {preparation._select_key}
    preparation._memo.clear()
    preparation.chain.skipped["tags"] = "left out"
    assert preparation._select_key not in keys


def test_a_damaged_fragment_is_named_and_repaired(again):
    path = next((again.work / "clips").glob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-30])
    for select in (again.work / "select").glob("*"):
        select.unlink()
    said = again.run(status=2)
    assert path.name in said and "repair" in said
    assert "1 fragments removed" in again.run("repair")
    again.run()
    assert again.hashes() == again.made


def test_a_shard_that_is_gone_is_made_anew_by_repair(again):
    """And so is one that lacks a clip whose video could not be read for a while."""
    shard = next((again.out / "latents").rglob("*.safetensors"))
    shard.unlink()
    assert "1 fragments removed" in again.run("repair")
    again.run()
    assert again.hashes() == again.made
    assert "0 fragments removed" in again.run("repair")


def test_a_video_that_timed_out_gets_its_clips_after_repair(again):
    """What follows from a probed video has the same keys, and is made anew all the same."""
    path = next((again.work / "videos").glob("u000000-*"))
    timed_out = [row | {"error": "timed_out"} for row in pq.read_table(path).to_pylist()]
    write_table(path, pa.Table.from_pylist(timed_out, rows.VIDEO))
    for step in ("clips", "fit", "gate"):
        next((again.work / step).glob("u000000-*")).unlink()
    shutil.rmtree(again.work / "select")
    assert "split: 1 units, 0 rows" in again.run()
    assert "4 fragments removed" in again.run("repair")
    assert "split: 1 units" in again.run()
    made, found = ({k: v for k, v in of.items() if k.startswith("out")} for of in (again.made, again.hashes()))
    assert found == made


def test_a_sidecar_that_changed_is_read_again_after_repair(again):
    """A run does not look for it."""
    sidecar = again.videos / "0.txt"
    before = sidecar.read_text()
    try:
        sidecar.write_text("a film that was described anew")
        again.run()
        assert again.hashes() == again.made
        assert "2 fragments removed" in again.run("repair")  # of captions and tags
        again.run()
        told = {row["caption"] for name in ("train", "val") for row in read_rows(again.out / f"{name}.csv")}
        assert "a film that was described anew" in told and before not in told
        assert "0 fragments removed" in again.run("repair")
    finally:
        sidecar.write_text(before)


def test_clips_of_a_video_that_went_are_not_looked_at(again):
    shutil.rmtree(again.work / "caption")
    (again.videos / "0.mp4").rename(again.root / "0.mp4")
    try:
        again.run()
    finally:
        (again.root / "0.mp4").rename(again.videos / "0.mp4")
    assert "0.mp4" not in pq.read_table(again.out / "provenance.parquet")["path"].to_pylist()


def test_garbage_is_collected(again):
    stale = again.work / "clips" / "u000000-0123456789ab.parquet"
    shutil.copy(next((again.work / "clips").glob("*.parquet")), stale)
    half = again.out / "latents" / "x.safetensors.0f.tmp"  # as a killed run leaves it, before the next begins
    half.write_bytes(b"half")
    assert "1" in next(line for line in again.run("status").splitlines() if line.startswith("split")).split()[-1]
    assert "2 files" in again.run("gc")
    assert again.hashes() == again.made and not half.exists()


def test_a_withdrawn_video_is_out_for_good(again):
    said = again.run("withdraw", "--video", "0.mp4", "--purge")
    assert "samples taken out" in said
    assert "0.mp4" not in pq.read_table(again.out / "provenance.parquet")["path"].to_pylist()
    again.run()
    assert "0.mp4" not in pq.read_table(again.out / "provenance.parquet")["path"].to_pylist()


@pytest.mark.long
def test_a_signal_stops_the_run_which_goes_on(again):
    shutil.rmtree(again.work)
    shutil.rmtree(again.out)
    process = again.start()
    while not (again.work / "videos").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    again.run()
    assert again.hashes() == again.made


def kill_and_resume(prepared, seed, kills):
    """Kills a run that begins anew `kills` times, each when a random number of files is there, then lets it finish."""
    for folder in (prepared.work, prepared.out):
        shutil.rmtree(folder)
    draw = random.Random(seed)
    for place in sorted(draw.randrange(1, len(prepared.made)) for _ in range(kills)):
        prepared.kill_when(place)
        time.sleep(draw.random() * 0.05)
    prepared.run()
    assert prepared.hashes() == prepared.made


def test_killed_runs_go_on_with_the_same_bytes(again):
    kill_and_resume(again, seed=0, kills=1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_killed_at_twenty_places(again, seed):
    """Five kills a seed."""
    kill_and_resume(again, seed, kills=5)


@pytest.mark.long
def test_ray_makes_the_same_bytes(again):
    pytest.importorskip("ray")
    for folder in (again.work, again.out):
        shutil.rmtree(folder)
    again.run("run", "--ray", "auto", here=False)
    assert again.hashes() == again.made


def test_every_key_of_the_config_decides_what_it_should():
    """Bounds and sizes of what comes later are in no key of what is measured; what is measured is in some key."""
    steps = (GATE_STEP, FIT_STEP, DEDUP_STEP, SELECT_STEP, *(module.STEP for module in EXTRAS.values()))
    fields = {step.name: tuple(step.values(PrepareConfig())) for step in steps}
    assert all(fields[step.name] == step.fields for step in steps)
    assert not any(field.startswith(("select", "encode", "embed")) for name in EXTRAS for field in fields[name])


def test_two_runs_in_one_folder_are_refused(again, tmp_path):
    shutil.rmtree(again.work)
    process = again.start()
    while not (again.work / "lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    said = again.run(status=2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "another run is at work" in said


@pytest.mark.regression
def test_a_set_of_another_working_folder_is_not_overwritten(whole, tmp_path):
    other = Prepared.__new__(Prepared)
    other.root, other.videos, other.work, other.out = whole.root, whole.videos, tmp_path, whole.out
    said = other.run(status=2)
    assert f"{whole.out}: is the set of another working folder than {tmp_path}" in said and "--out" in said
    assert whole.hashes() == whole.made


def test_a_folder_of_something_else_is_refused(whole, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    other = Prepared.__new__(Prepared)
    other.root, other.videos, other.work, other.out = whole.root, whole.videos, tmp_path, whole.out
    assert "holds something else" in other.run(status=2)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["thesis.tex"]
