"""Files under an fsspec URL: the same samples, fetched by ranges; and what a store may do wrong."""

import errno
import logging
import pickle
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from mugv_ds.config import load_config
from mugv_ds.config.errors import ConfigError, TransientError
from mugv_ds.data import patience
from mugv_ds.data.manifest import ManifestError, PathError, build_index, open_index
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.plan import SampleRef
from mugv_ds.data.quarantine import Replacing
from mugv_ds.data.run_data import RunData
from mugv_ds.data.sample import SampleError, UnsafeFileError, read_row
from mugv_ds.data.shards import write_shard
from mugv_ds.data.storage import Bucket, Folder, Range, files_below
from mugv_ds.models.flops import SampleCost
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, shard_dataset, write_config, write_dataset

SHAPES = [(2, 4, 6)] * 4 + [(1, 4, 4)] * 2
SIZES = {"channels": CHANNELS, "max_text_tokens": TEXT_TOKENS}
URL = "store://bucket/set"


class Store(MemoryFileSystem):
    """An object store in memory that tells what it is asked for, and fails when it is told to."""

    protocol = "store"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    asked: ClassVar[list] = []
    failures: ClassVar[dict] = {}  # name of a method → what it raises, or what it raises time by time

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("store://", "memory://"))

    def _fail(self, what):
        failure = self.failures.get(what)
        if isinstance(failure, list):
            failure = failure.pop(0) if failure else None
        if failure is not None:
            raise failure

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.asked.append(("cat_file", path.rpartition("/")[2], start, end))
        self._fail("cat_file")
        return super().cat_file(path, start=start, end=end, **kwargs)

    def cat_ranges(self, paths, starts, ends, **kwargs):
        self.asked.append(("cat_ranges", len(paths)))
        self._fail("cat_ranges")
        return [
            super(Store, self).cat_file(path, start=a, end=b) for path, a, b in zip(paths, starts, ends, strict=True)
        ]

    def info(self, path, **kwargs):
        self._fail("info")
        return super().info(path, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._fail("ls")
        return super().ls(path, detail=detail, **kwargs)


@pytest.fixture(autouse=True)
def store(monkeypatch) -> Store:
    fsspec.register_implementation("store", Store, clobber=True)
    for name, empty in (("store", {}), ("pseudo_dirs", [""]), ("asked", []), ("failures", {})):
        monkeypatch.setattr(Store, name, empty)
    return Store()


@pytest.fixture
def remote(tmp_path, store) -> tuple[list, Path]:
    """The samples of a data set of single files, and a CSV of shards and single files that lie in the store."""
    single = write_dataset(tmp_path / "local", SHAPES)
    index = open_index(single)
    samples = [read_row(index, i, **SIZES) for i in range(len(SHAPES))]
    sharded = shard_dataset(single, range(1, 6))
    for folder in ("latents", "text_features"):
        for file in (tmp_path / "local" / folder).iterdir():
            store.pipe_file(f"/bucket/set/{folder}/{file.name}", file.read_bytes())
            file.unlink()
    return samples, sharded


def upload(store: Store, path: str, content: bytes) -> None:
    store.pipe_file(f"/bucket/set/{path}", content)


def test_samples_are_those_of_local_files(remote, store):
    """Rows in shards and rows of single files; and a tensor is one range."""
    expected, sharded = remote
    index = open_index(sharded, root=URL)
    assert index.places()["latent_dtype"].tolist() == [0, 3, 3, 3, 3, 3]
    for i, sample in enumerate(expected):
        store.asked.clear()
        got = read_row(index, i, **SIZES)
        assert torch.equal(got.latent, sample.latent) and torch.equal(got.text, sample.text)
        assert torch.equal(got.text_mask, sample.text_mask)
        if i:
            latent, text = got.row.latent_entry, got.row.text_entry
            shard = f"sharded{(i - 1) // 3:06}.safetensors"
            assert store.asked == [
                ("cat_file", shard, latent.offset, latent.offset + latent.size),
                ("cat_file", shard, text.offset, text.offset + text.size),
            ]
    assert pickle.loads(pickle.dumps(index)).row(3) == index.row(3) and len(pickle.dumps(index)) < 1000


def test_headers_are_read_by_ranges_too(remote, store, tmp_path):
    """A small one in a single range, a long one in two."""
    store.asked.clear()
    index = open_index(remote[1], root=URL)
    ranges = [asked for asked in store.asked if asked[1].startswith("sharded")]
    assert len(ranges) == 4 and all(start == 0 and end <= 1 << 16 for _, _, start, end in ranges)
    many = {f"{i:0100}": torch.ones(24, 1, 4, 4) for i in range(500)}
    write_shard(tmp_path / "many.safetensors", many)
    upload(store, "latents/many.safetensors", (tmp_path / "many.safetensors").read_bytes())
    line = f"more,generated,latents/many.safetensors#{7:0100},{index.row(2).text_feat_path}\n"
    remote[1].write_text(remote[1].read_text() + line)
    store.asked.clear()
    assert open_index(remote[1], root=URL).row(6).latent_entry.size == 24 * 16 * 4
    (first, second) = [asked[2:] for asked in store.asked if asked[1] == "many.safetensors"]
    assert first == (0, 1 << 16) and second[0] == 1 << 16 and second[1] < 1 << 18


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_micro_batch_is_fetched_at_once(remote, store, drop, tmp_path):
    """Latents and captions of all its samples, but no captions that are dropped."""
    overrides = {"data": {"root": URL}, "flow": {"caption_drop": drop}}
    config = load_config(write_config(tmp_path / "run", remote[1], **overrides))
    data = RunData(config, SampleCost.of(config), 1)
    refs = [SampleRef(0, row, 5) for row in (1, 2, 3)]
    local = Replacing(data.readers)
    store.asked.clear()
    reading = local(refs)
    assert reading.quarantined == ()
    assert store.asked[0] == ("cat_ranges", 3 if drop else 6)
    assert [asked[1] for asked in store.asked[1:]] == ["negative.pt"] * 3 * bool(drop)
    store.failures["cat_ranges"] = OSError(errno.EIO, "no")
    alone = local(refs)
    assert all(torch.equal(one, other) for one, other in zip(alone.batch, reading.batch, strict=True))


def test_a_run_reads_all_its_sets_from_the_root(remote, store, tmp_path):
    sections = {"data": {"root": URL, "val_manifest": str(remote[1])}}
    config = load_config(write_config(tmp_path / "run", remote[1], **sections))
    data = RunData(config, SampleCost.of(config), 1)
    assert str(data.train.files) == str(data.validation.files) == URL
    assert data.train.root == remote[1].parent
    text, mask = data.readers.readers[0].null_text()
    assert mask.all() and text.shape == (TEXT_TOKENS, CHANNELS)


def test_an_index_is_of_its_root(remote, store, tmp_path):
    """The same CSV may be read from several places, whose shards may differ."""
    here = build_index(remote[1], root=URL)
    for name in list(store.store):
        store.pipe_file(name.replace("/set/", "/copy/"), store.cat_file(name))
    there = build_index(remote[1], root="store://bucket/copy")
    assert here != there and here.parent == there.parent and build_index(remote[1], root=URL) == here
    assert open_index(remote[1], root=URL).digest == open_index(remote[1], root="store://bucket/copy").digest
    with pytest.raises(ManifestError, match="no row has a readable latent"):
        open_index(remote[1])


def test_local_roots_are_folders_with_their_checks(tmp_path):
    """Also as file:// URLs: a link may not lead out."""
    manifest = write_dataset(tmp_path / "set", SHAPES)
    manifest = manifest.rename(tmp_path / "train.csv")
    for root in (str(tmp_path / "set"), f"file://{tmp_path}/set"):
        assert files_below(root) == Folder(tmp_path / "set")
        assert open_index(manifest, root=root).shapes().any(axis=1).all()
    outside = tmp_path / "outside.pt"
    (tmp_path / "set/latents/train-2.pt").rename(outside)
    (tmp_path / "set/latents/train-2.pt").symlink_to(outside)
    with pytest.raises(PathError, match=r"train\.csv:4: latent_path: .*leads out"):
        open_index(manifest, tmp_path / "anew", f"file://{tmp_path}/set")


@pytest.mark.parametrize(
    "path", ["a%2e%2e/x.pt", "a?versionId=1", "a#b.pt", "a*.pt", "a/b::c.pt", "a\\..\\b.pt", "a\tb"]
)
def test_what_a_server_may_take_for_more_than_a_name_is_refused(path):
    with pytest.raises(PathError, match="which may be no part of a name in store://bucket/set"), Bucket(URL).open(path):
        pass


@pytest.mark.parametrize("path", ["../x.pt", "a/../../x.pt", "/x.pt", "store://other/x.pt", ""])
def test_paths_in_a_store_are_checked_as_those_of_files(path):
    with pytest.raises(PathError), Bucket(URL).open(path):
        pass


def test_a_path_is_made_plain_before_the_store_sees_it(store):
    upload(store, "a/x", b"12345")
    with Bucket(URL).open("a/./b/../x") as blob:
        assert blob.read(1, 3).tobytes() == b"234" and blob.size() == 5


@pytest.mark.parametrize(("root", "message"), [("nowhere://bucket", "nowhere"), ("abfs://container/x", "[Ii]nstall")])
def test_a_url_that_cannot_be_opened(root, message, remote):
    with pytest.raises(ConfigError, match=rf"data\.root = '{root}': .*{message}"):
        open_index(remote[1], root=root)


BAD_OBJECTS = {
    "gone": (lambda store, path: store.rm_file(f"/bucket/set/{path}"), "missing"),
    "short": (lambda store, path: upload(store, path, b"x" * 100), r"\d+ bytes came, and \d+ from \d+ on are wanted"),
    "changed": (
        lambda store, path: upload(store, path, bytes(len(store.cat_file(f"/bucket/set/{path}")))),
        "damaged, or written anew",
    ),
}


@pytest.mark.parametrize("folder", ["latents", "text_features"])
@pytest.mark.parametrize(("harm", "message"), BAD_OBJECTS.values(), ids=BAD_OBJECTS)
def test_a_bad_object_is_a_bad_sample_by_its_url(remote, store, harm, message, folder):
    index = open_index(remote[1], root=URL)
    harm(store, f"{folder}/sharded000000.safetensors")
    with pytest.raises(SampleError, match=rf"{URL}/{folder}/sharded000000\.safetensors.*{message}"):
        read_patiently(lambda: read_row(index, 2, **SIZES), index.files)


def test_bad_shards_in_a_store_leave_rows_out(remote, store, caplog):
    upload(store, "latents/sharded000000.safetensors", b"<html>")
    store.rm_file("/bucket/set/latents/train-0.pt")
    with caplog.at_level(logging.WARNING):
        index = open_index(remote[1], root=URL)
    assert index.shapes().any(axis=1).tolist() == [False] * 4 + [True] * 2
    assert f"sharded.csv:2: {URL}/latents/train-0.pt: missing" in caplog.text
    assert f"sharded.csv:3: latents/sharded000000.safetensors#train-1: {URL}/latents/sharded0000" in caplog.text
    assert "HTML or XML page" in caplog.text


def test_code_in_an_object_stops_the_index(remote, store):
    upload(store, "latents/train-0.pt", b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UnsafeFileError, match=rf"sharded\.csv:2: {URL}/latents/train-0\.pt: a bare pickle"):
        open_index(remote[1], root=URL)


def test_a_single_file_beyond_all_sense_is_not_fetched(remote, store, monkeypatch):
    monkeypatch.setattr(Store, "info", lambda self, path: {"size": 1 << 40})
    with (
        pytest.raises(
            SampleError, match=r"train-0\.pt: 1099511627776 bytes; a file of one sample has at most 1073741824"
        ),
        Bucket(URL).whole("latents/train-0.pt"),
    ):
        pass


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    return slept


class ClientError(Exception):
    """As botocore and aiohttp have theirs, which are no OSError."""


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.EBUSY, "SlowDown"), OSError("reset"), TimeoutError(), ClientError("503\nService Unavailable")],
    ids=repr,
)
def test_a_failure_that_passes_is_waited_for(remote, store, pauses, failure):
    index = open_index(remote[1], root=URL)
    store.failures["cat_file"] = [failure, failure]
    got = read_patiently(lambda: read_row(index, 3, **SIZES), index.files)
    assert torch.equal(got.latent, remote[0][3].latent)
    assert len(pauses) == 2
    store.failures["cat_file"] = failure
    with pytest.raises(SampleError, match=rf"{URL}/latents/sharded000000\.safetensors: .*, time and again"):
        read_patiently(lambda: read_row(index, 3, **SIZES), index.files)


@pytest.mark.parametrize("failure", [ClientError("no route"), PermissionError("ExpiredToken")], ids=repr)
def test_a_store_that_is_away_is_no_sample_s_fault(remote, store, pauses, failure):
    """Nor one whose credentials have expired: setting aside every sample would train on nothing."""
    index = open_index(remote[1], root=URL)
    store.failures.update(dict.fromkeys(("cat_file", "ls", "info"), failure))
    with pytest.raises(TransientError, match=rf"{URL}: .*{failure}.*away for minutes"):
        read_patiently(lambda: read_row(index, 3, **SIZES), index.files)
    assert sum(pauses) > 200
    with pytest.raises(TransientError, match=r"sharded\.csv:[23]: .*away for minutes"):
        open_index(remote[1], remote[1].parent / "anew", URL)


def test_an_object_that_may_not_be_read_is_a_bad_sample(remote, store, pauses):
    index = open_index(remote[1], root=URL)
    store.failures["cat_file"] = PermissionError("AccessDenied")
    with pytest.raises(SampleError, match=rf"{URL}/latents/sharded000000\.safetensors: PermissionError: AccessDenied"):
        read_patiently(lambda: read_row(index, 3, **SIZES), index.files)
    assert not pauses


def test_what_is_fetched_is_handed_out_once_and_not_kept(store):
    upload(store, "x", b"0123456789")
    bucket, wanted = Bucket(URL), [Range("x", 2, 3), Range("x", 5, 2)]
    bucket.fetch(wanted)
    assert bucket.read(wanted[0]).tobytes() == b"234" and store.asked == [("cat_ranges", 2)]
    assert bucket.read(wanted[0]).tobytes() == b"234" and store.asked[1:] == [("cat_file", "x", 2, 5)]
    bucket.fetch([Range("gone", 0, 1)])
    assert bucket.read(wanted[1]).tobytes() == b"56" and store.asked[-1][0] == "cat_file"
