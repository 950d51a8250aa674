"""The cache of samples: whole entries that are checked, a limit, what goes first, many processes at once."""

import multiprocessing
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from mugv_ds.config import load_config
from mugv_ds.config.errors import ConfigError
from mugv_ds.data.cache import Cache, CachedBucket
from mugv_ds.data.manifest import ManifestError, PathError, open_index
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.sample import SampleError, read_row
from mugv_ds.data.storage import Bucket, Range
from mugv_ds.files.objects import ObjectFolder
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, shard_dataset, write_config, write_dataset
from tests.helpers.store import cuts_answer, fails, put

SHAPES = [(2, 4, 6)] * 4 + [(1, 4, 4)] * 2
SIZES = {"channels": CHANNELS, "max_text_tokens": TEXT_TOKENS}


def content(number: int, size: int = 96) -> np.ndarray:
    return np.full(size, number, np.uint8)


def entries(cache: Cache) -> list[Path]:
    return list(cache.folder.glob("??/*"))


def test_what_is_put_is_there_and_what_is_damaged_is_not(tmp_path, caplog):
    cache = Cache(tmp_path / "cache", 1000)
    assert cache.get("a") is None and not cache.holds("a")
    cache.put("a", content(7))
    assert cache.get("a").tolist() == [7] * 96 and cache.holds("a") and cache.get("b") is None
    (entry,) = entries(cache)
    for damage in (entry.read_bytes()[:-1], b"", b"x" * 100):
        entry.write_bytes(damage)
        assert cache.get("a") is None and not entry.exists()
        cache.put("a", content(7))
    entry.unlink()
    entry.mkdir()
    assert cache.get("a") is None
    assert caplog.text.count("data.cache_dir") == 1  # it is said once


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    """Ten entries of 100 bytes fit; then room is made down to nine tenths."""
    cache = Cache(tmp_path / "cache", 1000)
    for number in range(10):
        cache.put(str(number), content(number))
        os.utime(cache._path(str(number)), ns=(number, number))
    assert len(entries(cache)) == 10 and (cache.folder / "size").read_text() == "1000"
    assert cache.get("0") is not None  # and is the last that was used
    cache.put("new", content(1))
    assert [number for number in range(10) if cache.holds(str(number))] == [0, *range(3, 10)] and cache.holds("new")
    assert (cache.folder / "size").read_text() == "900"
    cache.put("huge", content(1, 2000))
    assert not cache.holds("huge") and len(entries(cache)) == 9
    cache.drop("new")
    assert (cache.folder / "size").read_text() == "800"


def test_a_size_that_is_lost_is_counted_anew(tmp_path):
    cache = Cache(tmp_path / "cache", 1000)
    cache.put("a", content(1))
    for lost in ("", "x", "-5"):
        (cache.folder / "size").write_text(lost)
        cache.put(lost or "b", content(2))
        assert (cache.folder / "size").read_text() == str(100 * len(entries(cache)))


def test_a_disk_that_takes_nothing_fails_no_reading(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file", 1000)
    cache.put("a", content(1))
    assert cache.get("a") is None
    cache.drop("a")


def hammer(folder: Path, seed: int) -> None:
    cache, random = Cache(folder, 4000), np.random.default_rng(seed)
    for _ in range(150):
        number = int(random.integers(60))
        found = cache.get(str(number))
        assert found is None or found.tolist() == [number] * 96
        cache.put(str(number), content(number))


def test_many_processes_share_it(tmp_path):
    """None sees a half entry, and the limit holds."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hammer, args=(tmp_path / "cache", seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    there = entries(Cache(tmp_path / "cache", 4000))
    assert 0 < sum(path.stat().st_size for path in there) <= 4000 and not list(tmp_path.rglob("*.tmp"))


@pytest.fixture
def remote(tmp_path, server, bucket, proxy) -> tuple[str, list]:
    """The URL of a data set with its CSV, of shards and single files, and its samples."""
    single = write_dataset(tmp_path / "local", SHAPES)
    index = open_index(single)
    samples = [read_row(index, i, **SIZES) for i in range(len(SHAPES))]
    sharded = shard_dataset(single, range(1, 6))
    for file in [sharded, *(tmp_path / "local").glob("[lt]*/*.*")]:
        put(server, f"{bucket}/set/{file.relative_to(tmp_path / 'local')}", file.read_bytes())
    return f"{bucket}/set", samples


@pytest.fixture
def cached(remote, tmp_path, monkeypatch):
    """An index of the CSV at the URL, whose samples are cached."""
    monkeypatch.setenv("MUGV_DS_CACHE", str(tmp_path / "copies"))
    return open_index(f"{remote[0]}/sharded.csv", cache=Cache(tmp_path / "cache", 1 << 20))


def same(index, samples) -> bool:
    read = [read_row(index, i, **SIZES) for i in range(len(samples))]
    return all(
        torch.equal(a.latent, b.latent) and torch.equal(a.text, b.text) for a, b in zip(read, samples, strict=True)
    )


def test_a_manifest_and_its_samples_are_read_from_a_store_once(remote, cached, proxy, tmp_path):
    url, samples = remote
    assert str(cached.files) == url and cached.root.is_relative_to(tmp_path / "copies")
    cached.fetch((i, True) for i in range(len(SHAPES)))
    assert same(cached, samples)
    asked = len(proxy.seen)
    cached.fetch((i, True) for i in range(len(SHAPES)))
    assert same(cached, samples) and len(proxy.seen) == asked
    again = open_index(f"{url}/sharded.csv", cache=Cache(tmp_path / "cache", 1 << 20))
    assert again.root == cached.root and not any(
        "sharded.csv" in path for method, path in proxy.seen[asked:] if method == "GET"
    )


def test_a_manifest_that_changes_is_copied_anew(remote, cached, proxy):
    url, _ = remote
    objects = ObjectFolder(url, "")
    text = objects.read("sharded.csv", 1 << 20)
    objects.write("sharded.csv", b"".join(text.splitlines(keepends=True)[:-1]))
    assert len(open_index(f"{url}/sharded.csv")) == len(SHAPES) - 1
    with pytest.raises(ManifestError, match=rf"{url}/none\.csv: missing"):
        open_index(f"{url}/none.csv")


def test_a_damaged_entry_is_fetched_again(remote, cached, proxy):
    _, samples = remote
    assert same(cached, samples)
    for path in entries(cached.files.cache):
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    asked = len(proxy.seen)
    assert same(cached, samples) and len(proxy.seen) > asked


def test_a_damaged_object_is_not_kept(remote, cached, proxy):
    """A bit that flips on the way is fetched again by who reads; the cache has nothing of it."""
    row = cached.row(2)
    shard = row.latent_path.partition("#")[0]
    wanted = Range(shard, row.latent_entry.offset, row.latent_entry.size, row.latent_entry.crc ^ 1)
    assert zlib.crc32(cached.files.read(wanted)) == row.latent_entry.crc
    assert not entries(cached.files.cache)
    objects = ObjectFolder(remote[0], "")
    whole = cached.row(0).latent_path
    sound = objects.read(whole, 1 << 20)
    objects.write(whole, b"<html>")
    with pytest.raises(SampleError, match=rf"{remote[0]}/{whole}: "):
        read_row(cached, 0, **SIZES)
    objects.write(whole, sound)
    assert read_row(cached, 0, **SIZES).latent.isfinite().all()


@pytest.mark.parametrize(
    "act",
    [
        fails(500, "InternalError"),
        pytest.param(fails(503, "SlowDown"), marks=pytest.mark.long),
        pytest.param(cuts_answer, marks=pytest.mark.long),
    ],
    ids=["500", "503", "cut"],
)
def test_a_store_that_fails_for_a_moment_costs_no_sample(remote, cached, proxy, act, monkeypatch):
    monkeypatch.setattr("mugv_ds.data.patience.time.sleep", lambda _: None)
    proxy.fault(lambda request: request.method == "GET" and "safetensors" in request.path, act, times=2)
    got = read_patiently(lambda: read_row(cached, 3, **SIZES), cached.files)
    assert torch.equal(got.latent, remote[1][3].latent) and not proxy.left


@pytest.mark.parametrize("path", ["../x.pt", "a/../../x.pt", "/x.pt", "s3://other/x.pt", "a?versionId=1", "a#b"])
def test_paths_lead_out_of_a_url_no_more_than_out_of_a_folder(path, bucket, proxy, tmp_path):
    files = CachedBucket(Bucket(f"{bucket}/set"), Cache(tmp_path, 1000))
    for opening in (files.open, files.whole):
        with pytest.raises(PathError), opening(path):
            pass
    assert not proxy.seen


SECRET_URLS = [
    "s3://me:pass@bucket/x",
    "https://host/x?X-Amz-Signature=pass",
    "s3://AKIA:pa/ss@b/x",
    "a::s3://u:pass@b/x",
]


@pytest.mark.parametrize("url", SECRET_URLS)
@pytest.mark.parametrize("key", ["data.root", "data.manifest", "checkpoint.dir", "checkpoint.init_from"])
def test_a_url_with_a_secret_is_refused_and_not_shown(key, url, tmp_path):
    """It would be in every checkpoint. Also on the command line, and in a file."""
    config = write_config(tmp_path, Path("x.csv"))
    with pytest.raises(ConfigError, match=rf"{key} = .*a URL without password, query and fragment") as error:
        load_config(config, [f"{key}={url}"])
    assert "pass" not in str(error.value).replace("without password", "") and "pa/ss" not in str(error.value)


def test_a_url_of_checkpoints_needs_a_local_folder(tmp_path):
    config = write_config(tmp_path, Path("x.csv"))
    with pytest.raises(ConfigError, match=r"checkpoint\.local_dir: required when"):
        load_config(config, ["checkpoint.dir=s3://bucket/run"])
    with pytest.raises(ConfigError, match=r"checkpoint\.local_dir: .*no effect otherwise"):
        load_config(config, ["checkpoint.local_dir=x"])
    with pytest.raises(ConfigError, match=r"checkpoint\.dir = file:///x: name the folder itself"):
        load_config(config, ["checkpoint.dir=file:///x", "checkpoint.local_dir=x"])
    with pytest.raises(ConfigError, match=r"data\.cache_dir, data\.cache_gib: one says nothing"):
        load_config(config, ["data.cache_dir=x"])
    assert load_config(config, ["checkpoint.dir=abfs://container@account.host/x", "checkpoint.local_dir=x"])
