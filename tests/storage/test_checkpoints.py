"""Runs of two ranks whose checkpoints are in a real S3 server, and what a store or a kill does to them."""

import json
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest

from mugv_ds.checkpoint.manifest import MANIFEST_NAME
from mugv_ds.files.objects import ObjectFolder
from tests.faults.conftest import configure, equal
from tests.faults.runs import SHAPES, Done, Run
from tests.helpers import store
from tests.helpers.dataset import write_dataset
from tests.helpers.store import SECRET, Proxy, Request, cuts, fails, flips

KINDS = ("ema_0.050", "ema_0.100", "exp_avg", "exp_avg_sq", "weight")
KEPT = ["step-00000000", "step-00000003", "step-00000006"]


def at_store(rank: int, *, endpoint: str, copies: Path | None = None) -> None:
    """This rank finds the store, and has little patience; its client has none of its own."""
    import s3fs

    store.enter(endpoint)
    s3fs.S3FileSystem.retries = 1
    if copies is not None:
        os.environ["MUGV_DS_CACHE"] = str(copies)


def start(config: Path, proxy: Proxy, *overrides: str) -> Run:
    fault = partial(at_store, endpoint=proxy.url, copies=config.parent / "copies")
    return Run(config, 2, *overrides, faults={0: fault, 1: fault})


def run(config: Path, proxy: Proxy, *overrides: str) -> Done:
    return start(config, proxy, *overrides).finish()


def is_put(request: Request, name: str) -> bool:
    return request.method == "PUT" and name in request.path


def in_the_store(folder: ObjectFolder) -> dict[str, list[str]]:
    return {name: folder.names(name) for name in folder.names() if name.startswith("step-")}


def complete(step: int) -> list[str]:
    return sorted([MANIFEST_NAME, *(f"rank-{rank}.{kind}.safetensors" for rank in (0, 1) for kind in KINDS)])


@pytest.fixture
def folder(bucket, proxy) -> ObjectFolder:
    return ObjectFolder(f"{bucket}/run", "checkpoint.dir")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), SHAPES)


def short(folder: Path, manifest: Path, **checkpoint) -> Path:
    """The config of a run of six steps, saved at the start and every three."""
    return configure(folder, manifest, schedule={"steps": 6}, checkpoint={"save_every": 3, **checkpoint})


@pytest.fixture(scope="session")
def reference(tmp_path_factory, manifest) -> Done:
    """A run that nothing happened to, whose checkpoints are in a folder."""
    done = Run(short(tmp_path_factory.mktemp("reference"), manifest), 2).finish()
    assert done.codes == [0, 0], done.output
    return done


@pytest.fixture
def config(tmp_path, folder, manifest) -> Path:
    return short(tmp_path, manifest, dir=str(folder), local_dir=str(tmp_path / "checkpoints"))


def test_kill_9_in_an_upload_resumes_bitwise_from_the_one_before(tmp_path, config, folder, proxy, reference):
    """While 500s, 503s and cut uploads go on; and nothing secret is written anywhere."""
    for act in (fails(500, "InternalError"), fails(503, "SlowDown"), cuts):
        proxy.fault(lambda request: is_put(request, "step-00000003/"), act, times=2)
    killed = threading.Event()
    first = start(config, proxy)

    def kills(request: Request, forward) -> None:
        os.kill(first.ranks[1].pid, signal.SIGKILL)
        killed.set()

    proxy.fault(lambda request: is_put(request, "step-00000006/rank-1.exp_avg."), kills)
    done = first.finish()
    assert killed.is_set() and done.codes[1] == -signal.SIGKILL and done.codes[0] != 0 and not proxy.left, done.output
    there = in_the_store(folder)
    assert there["step-00000003"] == complete(3) and there["step-00000000"] == complete(0)
    assert there["step-00000006"] and MANIFEST_NAME not in there["step-00000006"]

    done = run(config, proxy, "checkpoint.keep_last=2")
    assert "going on after step 3\n" in done.output and done.codes == [0, 0], done.output
    assert equal(done, reference)
    assert in_the_store(folder) == {name: complete(int(name[5:])) for name in KEPT[1:]}
    assert folder.names() == ["latest", *KEPT[1:]]

    said = [*tmp_path.rglob("*.jsonl"), *tmp_path.glob("output-*"), *tmp_path.rglob("rank*.log")]
    manifests = [folder.read(f"{name}/{MANIFEST_NAME}", 1 << 24).decode() for name in KEPT[1:]]
    assert said and not any(SECRET in text for text in [*(file.read_text() for file in said), *manifests])
    assert json.loads(manifests[0])["config"]["checkpoint"]["dir"] == str(folder)
    local = {path.name for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert local == {"lock", "latest", "incidents.jsonl"} or local == {"lock", "latest"}


@pytest.mark.long
def test_what_a_store_has_damaged_or_does_not_list(config, folder, proxy, reference):
    """A bit that flips in an upload, and a file that is gone: named, passed over, bitwise from the one before."""
    proxy.fault(lambda request: is_put(request, "step-00000006/rank-1.weight."), flips)
    done = run(config, proxy)
    assert done.codes == [0, 0] and not proxy.left and equal(done, reference), done.output
    folder.remove(["step-00000003/rank-0.exp_avg.safetensors"])
    done = run(config, proxy)
    assert f"passed over: {folder}/step-00000006/rank-1.weight.safetensors" in done.output, done.output
    assert f"passed over: {folder}/step-00000003/rank-0.exp_avg.safetensors: missing" in done.output
    assert done.codes == [0, 0] and equal(done, reference), done.output  # from step 0
    assert in_the_store(folder) == {name: complete(int(name[5:])) for name in KEPT}

    folder.remove([f"step-00000006/{name}" for name in complete(6)])
    assert folder.names() == ["latest", *KEPT[:2]]
    proxy.stale = True  # from here on lists are as this one
    done = run(config, proxy)
    assert "going on after step 3\n" in done.output and equal(done, reference), done.output
    done = run(config, proxy)
    assert f"{folder}/latest: names step-00000006, which the store does not list" in done.output, done.output
    assert "going on after step 6\n" in done.output and done.codes == [0, 0]


@pytest.mark.long
def test_a_store_that_stays_away_ends_the_run_which_goes_on_when_it_is_back(config, folder, proxy, reference):
    proxy.fault(lambda request: is_put(request, "step-00000006/"), fails(503, "SlowDown"), times=1000)
    done = run(config, proxy)
    assert 0 not in done.codes, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert f"{folder}/step-00000006/rank-" in line and SECRET not in done.output
    assert folder.read("latest", 100) == b"step-00000003\n" and folder.names() == ["latest", *KEPT[:2]]
    proxy.reset()
    done = run(config, proxy)
    assert "going on after step 3\n" in done.output and done.codes == [0, 0] and equal(done, reference), done.output


@pytest.mark.long
def test_another_layout_and_another_run_start_from_the_store(tmp_path, config, folder, proxy, manifest, reference):
    """One rank goes on from what two have saved; and checkpoint.init_from takes the run's URL."""
    assert run(config, proxy).codes == [0, 0]
    one = Run(
        config,
        1,
        "parallel.data=1",
        "checkpoint.resume=must",
        faults={0: partial(at_store, endpoint=proxy.url)},
    ).finish()
    assert one.codes == [0] and "going on after step 6\n" in one.output, one.output

    starts = []
    for name, init in (("url", str(folder)), ("local", str(reference.folder / "checkpoints"))):
        other = configure(tmp_path / name, manifest, schedule={"steps": 2}, checkpoint={"init_from": init})
        done = run(other, proxy)
        assert done.codes == [0, 0] and f"starting fresh, from {init}/step-00000006" in done.output, done.output
        starts.append(done)
    assert equal(*starts)
