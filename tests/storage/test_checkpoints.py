"""Runs whose checkpoints are in a real S3 server, and what a store or a kill does to them."""

import json
import os
import signal
import threading
from functools import partial
from pathlib import Path

from mugv_ds.checkpoint.manifest import MANIFEST_NAME
from mugv_ds.files.objects import ObjectFolder
from tests.faults.conftest import configure, equal, manifest, reference  # noqa: F401
from tests.faults.runs import Done, Run
from tests.helpers import store
from tests.helpers.store import SECRET, Request, cuts, fails, flips

KINDS = ("ema_0.050", "ema_0.100", "exp_avg", "exp_avg_sq", "weight")


def at_store(rank: int, *, endpoint: str) -> None:
    """This rank finds the store, and has little patience; its client has none of its own."""
    import s3fs

    store.enter(endpoint)
    s3fs.S3FileSystem.retries = 1


def start(config: Path, proxy, *overrides: str) -> Run:
    fault = partial(at_store, endpoint=proxy.url)
    return Run(config, 2, *overrides, faults={0: fault, 1: fault})


def run(config: Path, proxy, *overrides: str) -> Done:
    return start(config, proxy, *overrides).finish()


def is_put(request: Request, name: str) -> bool:
    return request.method == "PUT" and name in request.path


def in_the_store(folder: ObjectFolder) -> dict[str, list[str]]:
    return {name: folder.names(name) for name in folder.names() if name.startswith("step-")}


def complete(step: int) -> list[str]:
    return sorted([MANIFEST_NAME, *(f"rank-{rank}.{kind}.safetensors" for rank in (0, 1) for kind in KINDS)])


def test_faults_of_the_store_and_kill_9_in_an_upload(tmp_path, bucket, proxy, manifest, reference):  # noqa: F811
    """One run, killed and started again, always bitwise as the one that nothing happened to.

    500s, 503s and cut uploads while it saves; kill -9 while a file is on its way; a bit that flips in an upload, which
    the next start finds; and lists of the past.
    """
    url = f"{bucket}/run"
    config = configure(tmp_path, manifest, checkpoint={"dir": url, "local_dir": str(tmp_path / "checkpoints")})
    folder = ObjectFolder(url, "checkpoint.dir")

    for act in (fails(500, "InternalError"), fails(503, "SlowDown"), cuts):
        proxy.fault(lambda request: is_put(request, "step-00000004/"), act, times=2)
    killed = threading.Event()
    first = start(config, proxy)

    def kills(request: Request, forward) -> None:
        os.kill(first.ranks[1].pid, signal.SIGKILL)
        killed.set()

    proxy.fault(lambda request: is_put(request, "step-00000008/rank-1.exp_avg."), kills)
    done = first.finish()
    assert killed.is_set() and done.codes[1] == -signal.SIGKILL and done.codes[0] != 0 and not proxy.left, done.output
    there = in_the_store(folder)
    assert there["step-00000004"] == complete(4) and there["step-00000000"] == complete(0)
    assert there["step-00000008"] and MANIFEST_NAME not in there["step-00000008"]

    proxy.fault(lambda request: is_put(request, "step-00000010/rank-1.weight."), flips)
    done = run(config, proxy)
    assert "going on after step 4\n" in done.output and done.codes == [0, 0] and not proxy.left, done.output
    assert equal(done, reference)
    assert [*in_the_store(folder)] == ["step-00000004", "step-00000008", "step-00000010"]  # checkpoint.keep_last = 3

    done = run(config, proxy)
    assert f"passed over: {url}/step-00000010/rank-1.weight" in done.output or "FlexibleChecksumError" in done.output
    assert "passed over" in done.output and "going on after step 8\n" in done.output, done.output
    assert done.codes == [0, 0] and equal(done, reference), done.output
    assert in_the_store(folder)["step-00000010"] == complete(10)

    folder.remove([f"step-00000010/{name}" for name in complete(10)])
    assert "step-00000010" not in folder.names()
    proxy.stale = True  # from here on lists are as this one
    proxy_keeps = len(proxy.seen)
    done = run(config, proxy)
    assert "going on after step 8\n" in done.output and equal(done, reference), done.output
    done = run(config, proxy)
    assert f"{url}/latest: names step-00000010, which the store does not list" in done.output, done.output
    assert "going on after step 10\n" in done.output and len(proxy.seen) > proxy_keeps

    kept = [*tmp_path.rglob("*.jsonl"), *tmp_path.glob("output-*"), *tmp_path.rglob("rank*.log")]
    manifests = [
        folder.read(f"{name}/{MANIFEST_NAME}", 1 << 24).decode() for name in ("step-00000008", "step-00000010")
    ]
    assert kept and not any(SECRET in text for text in [*(file.read_text() for file in kept), *manifests])
    assert json.loads(manifests[0])["config"]["checkpoint"]["dir"] == url
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000010\n"
    assert {path.name for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} <= {
        "lock", "latest", "incidents.jsonl",
    }  # fmt: skip
