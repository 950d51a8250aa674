"""A run's place in a real S3 server, without ranks: the order of what is written, old lists, damage, the lock."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

from mugv_ds.checkpoint import files, places
from mugv_ds.checkpoint.manifest import MANIFEST_NAME, BrokenCheckpointError, Manifest
from mugv_ds.checkpoint.places import ObjectLock, ObjectPlace, newest_manifest
from mugv_ds.checkpoint.reader import CheckpointReader
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.schema import CheckpointSection
from mugv_ds.files.objects import ObjectFolder
from tests.helpers.saved import write_checkpoint
from tests.helpers.store import fails, flips, loses

TENSORS = {"a.weight": torch.arange(35.0).view(5, 7)}
FILES = ["rank-0.weight.safetensors", "rank-1.weight.safetensors"]


@pytest.fixture
def url(bucket) -> str:
    return f"{bucket}/run"


@pytest.fixture
def quick_beats(monkeypatch) -> None:
    monkeypatch.setattr(places, "BEAT_SECONDS", 0.1)


@pytest.fixture
def place(url, proxy, tmp_path) -> ObjectPlace:
    """One that is open and joined."""
    made = ObjectPlace(ObjectFolder(url, "checkpoint.dir"), tmp_path / "local", 0)
    made.join(made.open())
    yield made
    made.release()


def save(place: ObjectPlace, step: int, tmp_path: Path) -> Manifest:
    """Saves a small checkpoint as the store does, as all of its ranks."""
    local = write_checkpoint(tmp_path / f"run-{step}", step, TENSORS.items())
    place.start(step, 0)
    folder = place.unfinished(step, 0)
    for name in FILES:
        shutil.copy(local / name, folder)
        place.put(step, name)
    place.written(step)
    manifest = files.read_manifest(local)
    place.commit(step, manifest)
    place.point_latest(step)
    return manifest


def names(proxy, method: str) -> list[str]:
    return ["/".join(path.partition("?")[0].split("/")[3:]) for asked, path in proxy.seen if asked == method]


def test_the_marker_is_written_last_and_removed_first(place, proxy, tmp_path):
    save(place, 3, tmp_path)
    written = [name for name in names(proxy, "PUT") if name != "lock"]
    assert written == [f"step-00000003/{name}" for name in (*FILES, MANIFEST_NAME)] + ["latest"]
    assert place.steps() == [3] and place.candidates() == ([3], None)
    assert not list((tmp_path / "local").rglob("*.safetensors"))
    bodies = []
    proxy.fault(
        lambda request: "delete" in request.path, lambda request, go: bodies.append(request.body) or go(request), 9
    )
    place.remove(3)
    removed = [body for body in bodies if b"<Key>" in body]
    assert MANIFEST_NAME.encode() in removed[0] and b"rank-" not in removed[0] and b"rank-1" in removed[1]
    assert place.steps() == [] and ObjectFolder(f"{place}/step-00000003", "").names() == []


def test_what_was_saved_is_read_back(place, url, tmp_path):
    manifest = save(place, 3, tmp_path)
    assert place.manifest(3) == manifest
    place.verify(manifest, [], FILES[:1])
    assert [path.name for path in place.folder(3).iterdir()] == FILES[:1]
    place.verify(manifest, [], FILES)
    with CheckpointReader(place.folder(3), manifest) as saved:
        assert torch.equal(saved.read("a.weight"), TENSORS["a.weight"])
    place.read(3)
    assert not place.folder(3).exists()
    assert newest_manifest(CheckpointSection(dir=url, local_dir=str(tmp_path / "local"))) == manifest


def test_a_step_without_a_marker_does_not_exist(place, url, proxy, tmp_path):
    save(place, 3, tmp_path)
    save(place, 5, tmp_path)
    objects = ObjectFolder(url, "")
    objects.remove([f"step-00000005/{MANIFEST_NAME}"])
    assert place.steps() == [3]
    assert place.candidates() == (
        [3],
        f"{url}/latest: names step-00000005, which is not there; the newest in the list is taken",
    )
    with pytest.raises(BrokenCheckpointError, match=rf"{url}/step-00000005/{MANIFEST_NAME}: missing"):
        place.manifest(5)
    place.release()
    place.join(place.open())
    assert objects.names("step-00000005") == [] and len(objects.names("step-00000003")) == 3


def test_lists_of_the_past(place, url, proxy, tmp_path):
    """One that lacks the newest: `latest` names it. One that has what is removed: nobody takes it."""
    save(place, 3, tmp_path)
    assert place.steps() == [3]
    proxy.stale = True
    save(place, 5, tmp_path)
    note = f"{url}/latest: names step-00000005, which the store does not list; it is there and taken"
    assert place.steps() == [3] and place.candidates() == ([5, 3], note)
    place.remove(3)
    assert place.steps() == [] and place.candidates() == ([5], note)


def test_a_latest_that_leads_elsewhere_is_refused(place, url):
    for content in (b"\n", b"../../elsewhere", b"step-1"):
        ObjectFolder(url, "").write("latest", content)
        with pytest.raises(CheckpointError, match=rf"{url}/latest: names .*, which is not a checkpoint"):
            place.candidates()
    ObjectFolder(url, "").write("latest", b"step-00000005")
    with pytest.raises(CheckpointError, match=rf"{url}/latest: names step-00000005, but there is no checkpoint"):
        place.candidates()


def flip(objects: ObjectFolder, path: str) -> None:
    content = bytearray(objects.read(path, 1 << 20))
    content[-3] ^= 1
    objects.write(path, bytes(content))


DAMAGE = {
    "flipped": (flip, "its SHA-256 differs"),
    "short": (lambda objects, path: objects.write(path, objects.read(path, 1 << 20)[:-4]), "bytes, the manifest says"),
    "deleted": (lambda objects, path: objects.remove([path]), "missing"),
}


def test_damage_is_told_by_the_url(place, url, tmp_path):
    manifest, objects, path = save(place, 3, tmp_path), ObjectFolder(url, ""), f"step-00000003/{FILES[1]}"
    sound = objects.read(path, 1 << 20)
    for damage, complaint in DAMAGE.values():
        objects.write(path, sound)
        damage(objects, path)
        place.verify(manifest, [], FILES[:1])  # what another rank needs is as it was
        with pytest.raises(BrokenCheckpointError, match=rf"^{url}/{path}: .*{complaint}") as error:
            place.verify(manifest, [], FILES[1:])
        assert str(tmp_path) not in str(error.value) and not (place.folder(3) / FILES[1]).exists()


def test_a_bit_that_flips_in_an_upload_is_found_by_who_reads(place, url, proxy, tmp_path):
    proxy.fault(lambda request: request.method == "PUT" and FILES[0] in request.path, flips)
    manifest = save(place, 3, tmp_path)
    with pytest.raises(BrokenCheckpointError, match=rf"{url}/step-00000003/{FILES[0]}.*hecksum"):
        place.verify(manifest, [], FILES)


def test_a_bit_that_flips_in_a_marker_or_in_latest_is_passed_over(place, url, proxy, tmp_path):
    save(place, 3, tmp_path)
    for name in (MANIFEST_NAME, "latest"):
        proxy.fault(lambda request, name=name: request.method == "PUT" and request.path.endswith(f"/{name}"), flips)
    save(place, 5, tmp_path)
    assert not proxy.left
    with pytest.raises(BrokenCheckpointError, match=rf"{url}/step-00000005/{MANIFEST_NAME}: .*hecksum"):
        place.manifest(5)
    steps, note = place.candidates()
    assert steps == [5, 3] and note.startswith(f"{url}/latest: FlexibleChecksumError")
    assert newest_manifest(CheckpointSection(dir=url, local_dir=str(tmp_path / "local"))).step == 3


def test_a_bit_that_flips_in_a_download_is_fetched_again(place, proxy, tmp_path):
    manifest = save(place, 3, tmp_path)

    def flipped(request, forward):
        answer = forward(request)
        body = bytearray(answer.body)
        body[-3] ^= 1
        plain = [header for header in answer.headers if "checksum" not in header[0].lower()]
        return type(answer)(answer.status, plain, bytes(body))

    proxy.fault(lambda request: request.method == "GET" and FILES[0] in request.path, flipped)
    place.verify(manifest, [], FILES)
    assert not proxy.left


def test_a_marker_that_is_damaged_or_of_another_step_is_broken(place, url, tmp_path):
    save(place, 3, tmp_path)
    objects, marker = ObjectFolder(url, ""), f"step-00000003/{MANIFEST_NAME}"
    objects.write("step-00000004/MANIFEST.json", objects.read(marker, 1 << 20))
    with pytest.raises(BrokenCheckpointError, match="is of step 3"):
        place.manifest(4)
    flip(objects, marker)
    with pytest.raises(BrokenCheckpointError, match="not a whole manifest"):
        place.manifest(3)


@pytest.mark.long
def test_an_upload_that_is_lost_for_good_is_not_committed(place, proxy, tmp_path):
    proxy.fault(lambda request: request.method == "PUT" and FILES[0] in request.path, loses, times=100)
    with pytest.raises(OSError, match=f"0 bytes are there.*{FILES[0]}"):
        save(place, 3, tmp_path)
    assert place.steps() == []


def another(place: ObjectPlace, url: str, tmp_path: Path) -> ObjectPlace:
    return ObjectPlace(ObjectFolder(url, ""), tmp_path / "another", 0)


def test_a_second_run_is_refused(quick_beats, place, url, tmp_path):
    process = rf"process \d+ on {socket.gethostname()}"
    with pytest.raises(CheckpointError, match=rf"{url}/lock: another run uses this place \({process}\)"):
        another(place, url, tmp_path).open()
    save(place, 3, tmp_path)
    second = another(place, url, tmp_path)
    place.release()
    second.join(second.open())
    second.release()
    assert ObjectFolder(url, "").names() == ["latest", "step-00000003"]


def test_a_lock_that_falls_silent_is_taken_over_and_its_holder_commits_no_more(quick_beats, place, url, tmp_path):
    place._lock._ended.set()  # as if the process had been stopped
    place._lock._thread.join()
    second = another(place, url, tmp_path)
    begin = time.monotonic()
    second.join(second.open())
    assert time.monotonic() - begin >= 0.4
    with pytest.raises(CheckpointError, match="another run uses this place"):
        save(place, 3, tmp_path)
    assert second.steps() == []
    save(second, 4, tmp_path)
    second.release()


def test_a_lock_of_a_process_that_has_ended_is_taken_over_at_once(url, proxy, tmp_path, monkeypatch):
    objects = ObjectFolder(url, "")
    about = {"holder": f"process 999999999 on {socket.gethostname()}", "token": "x", "beat": 1}
    objects.write("lock", json.dumps(about).encode())
    begin = time.monotonic()
    lock = ObjectLock(objects)
    assert time.monotonic() - begin < 5 and ObjectLock.holder(objects)["token"] == lock.token
    lock.release()
    assert objects.names() == []


def test_a_lock_that_two_take_at_once_has_one_holder(url, proxy, monkeypatch):
    """The store refuses the second one's new object; here the first one's is made between look and write."""
    objects = ObjectFolder(url, "")
    first = []
    holder = ObjectLock.holder

    def look(folder):
        found = holder(folder)
        if not first:
            first.append(None)
            first[0] = ObjectLock(ObjectFolder(url, ""))
        return found

    monkeypatch.setattr(ObjectLock, "holder", staticmethod(look))
    with pytest.raises(CheckpointError, match="another run uses this place"):
        ObjectLock(objects)
    first[0].check()
    first[0].release()


def test_a_lock_whose_first_answer_is_lost_is_had(url, proxy):
    objects = ObjectFolder(url, "")

    def done_but_not_said(request, forward):
        forward(request)

    proxy.fault(lambda request: request.method == "PUT" and "lock" in request.path, done_but_not_said)
    ObjectLock(objects).release()
    assert not proxy.left


def test_another_store_is_told_apart(place):
    with pytest.raises(CheckpointError, match="does not see what rank 0 wrote there"):
        place.join("0" * 32)


@pytest.mark.long
def test_a_store_that_is_away_ends_with_its_name(url, proxy, tmp_path):
    proxy.fault(lambda request: True, fails(503, "SlowDown"), times=100)
    with pytest.raises(OSError, match=rf"{url}/lock"):
        ObjectPlace(ObjectFolder(url, ""), tmp_path, 0).open()


def test_a_probe_leaves_nothing_behind_and_says_what_is_denied(url, proxy, tmp_path):
    objects = ObjectFolder(url, "checkpoint.dir")
    place = ObjectPlace(objects, tmp_path / "local", 3)
    assert place.probe(".preflight-3", 1 << 16) > 0
    assert ("PUT" in {method for method, _ in proxy.seen}) and objects.names() == []
    proxy.fault(lambda request: request.method == "PUT", fails(403, "AccessDenied"), times=9)
    with pytest.raises(PermissionError):
        place.probe(".preflight-3", 1 << 16)
    assert list((tmp_path / "local/rank-3").iterdir()) == []
