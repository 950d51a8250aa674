"""Rows whose tensors lie in shards: indexed from headers that are read once, and read like files of their own."""

import csv
import logging
import os
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mugv_ds.config import load_config
from mugv_ds.config.errors import InputError, TrainingError
from mugv_ds.data import headers, places
from mugv_ds.data.index import PLACES
from mugv_ds.data.loader import loader
from mugv_ds.data.manifest import ManifestError, PathError, build_index, open_index
from mugv_ds.data.quarantine import Replacing
from mugv_ds.data.run_data import RunData
from mugv_ds.data.sample import SampleError, read_row, stored_latent, stored_text
from mugv_ds.data.shards import write_shard
from mugv_ds.models.flops import SampleCost
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, shard_dataset, write_config, write_dataset

SHAPES = [(2, 4, 6), (1, 4, 4), (2, 4, 6), (3, 2, 2), (1, 4, 4)] * 2
SIZES = {"channels": CHANNELS, "max_text_tokens": TEXT_TOKENS}


def put(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def whole(tmp_path) -> tuple[list, Path]:
    """The samples of a data set of single files, and the CSV of the same ones in shards."""
    single = write_dataset(tmp_path, SHAPES)
    index = open_index(single)
    samples = [read_row(index, i, **SIZES) for i in range(len(SHAPES))]
    return samples, shard_dataset(single, range(10))


def test_samples_are_bit_equal_to_those_of_single_files(whole):
    expected, sharded = whole
    index = open_index(sharded)
    assert [tuple(shape) for shape in index.shapes().tolist()] == SHAPES
    for i, sample in enumerate(expected):
        got = read_row(index, i, **SIZES)
        assert torch.equal(got.latent, sample.latent) and got.latent.is_contiguous()
        assert torch.equal(got.text, sample.text) and torch.equal(got.text_mask, sample.text_mask)
        assert got.row.latent_path == f"latents/sharded{i // 3:06}.safetensors#train-{i}"
        assert got.row.latent_entry.shape == (24, *SHAPES[i])
        assert got.row.text_entry.shape == (int(sample.text_mask.sum()), CHANNELS)


def test_an_index_of_shards_pickles_small_and_knows_its_files(whole):
    index = open_index(whole[1])
    other = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 1000 and other.row(3) == index.row(3) and other.content == index.content
    assert index.places().dtype == PLACES and not index.places().flags.writeable
    without = open_index(write_dataset(whole[1].parent, SHAPES, "other"))
    assert without.places() is None and without.row(0).latent_entry is None and without.row(0).text_entry is None


def test_a_csv_that_mixes_shards_and_files_trains_as_one(tmp_path):
    """The plan is that of single files, and every micro-batch the same bits: order, noise, captions, all."""
    shapes = [(2, 4, 6), (1, 4, 4)] * 6
    made = []
    for name, rows in (("single", ()), ("mixed", (0, 1, 2, 5, 7, 10))):
        manifest = write_dataset(tmp_path / name, shapes)
        config = load_config(write_config(tmp_path / name, shard_dataset(manifest, rows), data={"num_workers": 2}))
        data = RunData(config, SampleCost.of(config), 1)
        assert data.text_encoder is None
        batches = loader(
            lambda step, data=data: data.plan.step(step).micro_batches(0, 1),
            start_step=0,
            stop_step=8,
            make=Replacing(data.readers),
            name=lambda ref: str(ref.item),
            num_workers=2,
        )
        made.append((data.order(), [reading for step in batches for reading in step]))
        assert (data.train.places() is not None) == bool(rows)
    assert made[0][0] == made[1][0]
    assert len(made[0][1]) == len(made[1][1]) == 32
    for one, other in zip(made[0][1], made[1][1], strict=True):
        assert one.quarantined == other.quarantined == ()
        assert all(torch.equal(a, b) for a, b in zip(one.batch, other.batch, strict=True))


@pytest.fixture
def opened(monkeypatch) -> Counter:
    """How often the header of each shard is read."""
    counter: Counter = Counter()

    def counted(blob):
        counter[Path(blob.name).name] += 1
        return read(blob)

    read = places.read_header
    monkeypatch.setattr(places, "read_header", counted)
    return counter


@pytest.mark.parametrize("order", ["as written", "shuffled"])
def test_each_header_is_read_once_whatever_the_order_of_the_rows(whole, opened, order):
    expected, sharded = whole
    rows = rows_of(sharded)
    if order == "shuffled":
        random.Random(0).shuffle(rows)
    index = open_index(put(sharded, rows))
    assert opened == dict.fromkeys((f"sharded{unit:06}.safetensors" for unit in range(4)), 2), "of latents and of text"
    by_id = {sample.row.sample_id: sample for sample in expected}
    for i in range(len(index)):
        got = read_row(index, i, **SIZES)
        assert torch.equal(got.latent, by_id[got.row.sample_id].latent)
        assert torch.equal(got.text, by_id[got.row.sample_id].text)
    opened.clear()
    open_index(sharded)
    assert not opened, "an index that holds is left as it is"


def test_rows_may_share_a_tensor_and_keys_need_not_be_ids(tmp_path, whole):
    rows = rows_of(whole[1])
    rows.append(rows[4] | {"sample_id": "again"})
    index = open_index(put(whole[1], rows))
    assert index.row(10).latent_path == rows[4]["latent_path"]
    assert torch.equal(read_row(index, 10, **SIZES).latent, whole[0][4].latent)


def change(path: Path, row: int, **columns: str) -> Path:
    rows = rows_of(path)
    rows[row] |= columns
    return put(path, rows)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


LATENTS, TEXTS = "latents/sharded000000.safetensors", "text_features/sharded000000.safetensors"
NO_TENSOR = r"no such tensor in this shard, which has 3, as 'train-0'"


def renamed(column: str, shard: str) -> Callable[[Path], object]:
    return lambda manifest: change(manifest, 1, **{column: f"{shard}#none"})


def reshaped(shard: str, *shape: int) -> Callable[[Path], None]:
    def write(manifest: Path) -> None:
        tensors = load_file(manifest.parent / shard)
        write_shard(manifest.parent / shard, tensors | {"train-1": torch.zeros(shape)})

    return write


LEFT_OUT = {
    "latent: unknown key": (renamed("latent_path", LATENTS), [1], NO_TENSOR),
    "text: unknown key": (renamed("text_feat_path", TEXTS), [1], NO_TENSOR),
    "latent: no shard": (lambda manifest: (manifest.parent / LATENTS).unlink(), [0, 1, 2], "missing"),
    "text: no shard": (lambda manifest: (manifest.parent / TEXTS).unlink(), [0, 1, 2], "missing"),
    "latent: damaged": (lambda manifest: flip(manifest.parent / LATENTS, 8), [0, 1, 2], "its header is damaged"),
    "latent: cut": (lambda manifest: os.truncate(manifest.parent / LATENTS, 700), [0, 1, 2], "the file has 700"),
    "latent: of 16 channels": (reshaped(LATENTS, 16, 1, 4, 4), [1], r"\[16, 1, 4, 4\], expected \[24, T, H, W\]"),
    "latent: of rank 5": (reshaped(LATENTS, 1, 24, 1, 4, 4), [1], r"shape \[1, 24, 1, 4, 4\], expected"),
    "latent: wide": (reshaped(LATENTS, 24, 1, 1, 769), [1], "positions for sides of at most 768"),
    "text: of rank 4": (reshaped(TEXTS, 1, 1, 3, CHANNELS), [1], r"expected text features \[L, C\]"),
    "text: of 65536 tokens": (reshaped(TEXTS, 65536, 1), [1], r"shape \[65536, 1\], expected text features"),
}


@pytest.mark.parametrize(("harm", "rows", "message"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_rows_with_a_bad_tensor_are_left_out_with_their_line_file_and_key(whole, caplog, harm, rows, message):
    sharded = whole[1]
    harm(sharded)
    with caplog.at_level(logging.WARNING):
        index = open_index(sharded)
    assert np.flatnonzero(~index.shapes().any(axis=1)).tolist() == rows
    assert f"{len(rows)} of 10 rows are left out" in caplog.text
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out: ")]
    assert len(told) == len(rows)
    for row, line in zip(rows, told, strict=True):
        assert re.match(rf"left out: .*sharded\.csv:{row + 2}: .*sharded000000\.safetensors#(train-{row}|none): ", line)
        assert re.search(message, line)
    for row in rows:
        with pytest.raises(SampleError, match=r"\.safetensors"):
            read_row(index, row, **SIZES)
    assert torch.equal(read_row(index, 5, **SIZES).latent, whole[0][5].latent)


def test_an_index_without_a_readable_row_is_refused(whole):
    for path in whole[1].parent.glob("latents/*"):
        path.write_bytes(b"")
    with pytest.raises(ManifestError, match=r"no row has a readable latent; the first: .*sharded\.csv:2: .*0 bytes"):
        open_index(whole[1])


def test_a_row_that_contradicts_its_latent_is_refused(whole):
    sharded = whole[1]
    good = {"num_frames": "", "height": "", "width": ""}
    rows = [row | good for row in rows_of(sharded)]
    rows[3] |= {"num_frames": "17", "height": "16", "width": "16"}
    assert open_index(put(sharded, rows)).shapes()[3].tolist() == [3, 2, 2]
    rows[4]["height"] = "48"
    expected = r"sharded\.csv:6: height = 48 means 6 in the latent, but .*sharded000001\.safetensors#train-4 has 4"
    with pytest.raises(ManifestError, match=expected):
        open_index(put(sharded, rows))


@pytest.mark.parametrize("column", ["latent_path", "text_feat_path"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.safetensors#", "'' cannot be the key"),
        ("a.safetensors#b#c", "'b#c' cannot be the key"),
        ("a.safetensors#" + "k" * 201, "cannot be the key"),
        ("../a.safetensors#k", "leads out"),
        ("/a.safetensors#k", "absolute"),
        ("s3://bucket/a.safetensors#k", "a URL or pipe"),
        ("pipe:cat .safetensors#k", "a URL or pipe"),
    ],
)
def test_bad_paths_into_shards(whole, column, path, message):
    with pytest.raises(PathError, match=rf"sharded\.csv:3: .*{message}"):
        open_index(change(whole[1], 1, **{column: path}))


def link_out(shard: Path) -> None:
    outside = shard.parents[1].with_name(f"outside-{shard.parent.name}")
    shard.rename(outside)
    shard.symlink_to(outside)


def as_fifo(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


def as_loop(shard: Path) -> None:
    shard.unlink()
    shard.symlink_to(shard)


@pytest.mark.parametrize("folder", ["latents", "text_features"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [(link_out, "leads out"), (as_fifo, "not a regular file"), (as_loop, "[Ll]oop")],
    ids=["out", "FIFO", "loop"],
)
def test_shards_that_are_somewhere_else_or_something_else(whole, folder, harm, message):
    """Refused when the index is built, as with single files; and set aside if it happens later."""
    index = open_index(whole[1])
    harm(whole[1].parent / f"{folder}/sharded000001.safetensors")
    with pytest.raises(PathError, match=message):
        read_row(index, 4, **SIZES)
    column = "latent_path" if folder == "latents" else "text_feat_path"
    with pytest.raises(PathError, match=rf"sharded\.csv:5: {column}: .*{message}"):
        open_index(whole[1], whole[1].parent / "anew")


LATER = {
    "a flipped bit": (lambda shard, entry: flip(shard, entry.offset + 7), r"#train-4: damaged, .*CRC-32"),
    "cut": (lambda shard, entry: os.truncate(shard, entry.offset + 7), "truncated"),
    "gone": (lambda shard, entry: shard.unlink(), "missing"),
    "emptied": (lambda shard, entry: shard.write_bytes(b""), "truncated: 0 bytes"),
    "written anew": (
        lambda shard, entry: write_shard(shard, {"train-4": torch.ones(24, 40, 2, 2)}),
        "damaged|truncated",
    ),
}


@pytest.mark.parametrize("folder", ["latents", "text_features"])
@pytest.mark.parametrize(("harm", "message"), LATER.values(), ids=LATER)
def test_damage_after_the_index_was_built_is_a_bad_sample(whole, folder, harm, message):
    index = open_index(whole[1])
    row = index.row(4)
    entry = row.latent_entry if folder == "latents" else row.text_entry
    harm(whole[1].parent / f"{folder}/sharded000001.safetensors", entry)
    with pytest.raises(SampleError, match=message) as error:
        read_row(index, 4, **SIZES)
    assert f"{folder}/sharded000001.safetensors" in str(error.value)


def test_values_are_checked_in_shards_too(tmp_path, whole):
    root = whole[1].parent
    latents = {"nan": torch.full((24, 1, 2, 2), torch.nan), "huge": torch.full((24, 1, 2, 2), 1e30)}
    text = {"nan": torch.full((2, CHANNELS), torch.nan), "wide": torch.ones(2, CHANNELS + 1)}
    write_shard(root / "latents/bad.safetensors", latents)
    write_shard(root / "text_features/bad.safetensors", text | {"long": torch.ones(TEXT_TOKENS + 1, CHANNELS)})
    files = open_index(whole[1]).files
    for key, message in (("nan", "96 NaN"), ("huge", "values up to 1e\\+30")):
        with pytest.raises(SampleError, match=rf"bad\.safetensors#{key}: .*{message}"):
            stored_latent(files, f"latents/bad.safetensors#{key}", (1, 2, 2))
    with pytest.raises(SampleError, match=r"#nan: T, H, W = \[1, 2, 2\], but the manifest means \[1, 2, 3\]"):
        stored_latent(files, "latents/bad.safetensors#nan", (1, 2, 3))
    for key, message in (
        ("nan", "32 NaN"),
        ("wide", r"shape \[2, 17\], expected \[L, 16\]"),
        ("long", "7 tokens, at most 6"),
    ):
        with pytest.raises(SampleError, match=rf"bad\.safetensors#{key}: .*{message}"):
            stored_text(files, f"text_features/bad.safetensors#{key}", CHANNELS, TEXT_TOKENS)


def test_the_null_text_may_lie_in_a_shard(tmp_path):
    manifest = write_dataset(tmp_path, SHAPES)
    negative = torch.load(tmp_path / "text_features/negative.pt", weights_only=True)["y"][0, 0]
    write_shard(tmp_path / "text_features/negative.safetensors", {"negative": negative[:4]})
    path = "text_features/negative.safetensors#negative"
    config = load_config(write_config(tmp_path, manifest, data={"null_text_path": path}, flow={"caption_drop": 1.0}))
    text, mask = RunData(config, SampleCost.of(config), 1).readers.readers[0].null_text()
    assert torch.equal(text[:4], negative[:4]) and not text[4:].any() and mask.tolist() == [True] * 4 + [False] * 2


def test_only_new_rows_headers_are_read(whole, opened):
    sharded = whole[1]
    rows = rows_of(sharded)
    missing = sharded.parent / "latents/sharded000003.safetensors"
    content = missing.read_bytes()
    missing.unlink()
    old = open_index(put(sharded, rows))
    assert not old.shapes()[9].any() and old.shapes()[:9].all()
    missing.write_bytes(content)
    opened.clear()
    again = open_index(put(sharded, [*rows, rows[0] | {"sample_id": "new"}]))
    assert again.shapes().all() and again.row(2) == old.row(2)
    assert opened == {"sharded000003.safetensors": 2, "sharded000000.safetensors": 2}, "the row's that was bad, the new"
    assert torch.equal(read_row(again, 9, **SIZES).latent, whole[0][9].latent)


@pytest.fixture
def small_parts(monkeypatch):
    """A process for any number of headers, and parts of four rows."""
    monkeypatch.setattr(places, "_FEW_ROWS", 0)
    monkeypatch.setattr(places, "_PART_ROWS", 4)
    monkeypatch.setattr(places, "_TASK_ROWS", 1)
    monkeypatch.setattr(headers.os, "sched_getaffinity", lambda pid: {0})


def test_a_build_that_ends_goes_on_where_it_was(whole, small_parts, monkeypatch, caplog):
    """Parts are kept, but what was bad is asked for again, and a damaged part is told and read again."""
    sharded = change(whole[1], 1, latent_path=f"{LATENTS}#none")
    monkeypatch.setattr(headers, "processes", lambda *_: ThreadPoolExecutor(1))  # starting one takes seconds
    expected = open_index(sharded, sharded.parent / "other").places().tobytes()
    keep, kept = headers.write_part, []

    def keep_and_stop(path, part):
        keep(path, part)
        kept.append(path)
        if len(kept) == 3:
            raise TrainingError("stopped")

    monkeypatch.setattr(headers, "write_part", keep_and_stop)
    with pytest.raises(TrainingError, match="stopped"):
        build_index(sharded)
    assert [path.stem for path in kept] == ["latent-000000000000", "latent-000000000006", "latent-000000000009"]
    kept[1].write_bytes(b"\x93NUMPY")
    monkeypatch.setattr(headers, "write_part", keep)
    asked, read = [], places.Reader.read

    def listed(reader, columns, task, threads):
        asked.append((reader.side, task.rows.tolist()))
        return read(reader, columns, task, threads)

    monkeypatch.setattr(places.Reader, "read", listed)
    caplog.clear()
    index = open_index(sharded)
    assert asked == [
        *(("latent", rows) for rows in ([1], [6, 7, 8])),
        *(("text", rows) for rows in ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9])),
    ]
    assert index.places().tobytes() == expected
    assert "damaged" in caplog.text and f"sharded.csv:3: {LATENTS}#none: " in caplog.text
    assert not list(sharded.parent.glob(".index/*.parts"))


def test_headers_and_errors_come_from_processes(whole, small_parts):
    """In the order of the rows, latents first: what is bad before a path that leads out is an answer, that an error."""
    (whole[1].parent / LATENTS).unlink()
    link_out(whole[1].parent / "text_features/sharded000003.safetensors")
    with pytest.raises(PathError, match=r"sharded\.csv:11: text_feat_path: .*leads out"):
        open_index(whole[1])
    parts = {path.stem: np.load(path)["row"].tolist() for path in whole[1].parent.glob(".index/*.parts/*.npy")}
    assert parts["latent-000000000000"] == [3, 4, 5] and parts["latent-000000000006"] == [6, 7, 8]


def test_damaged_places_are_noticed_and_made_anew(whole, caplog):
    path = build_index(whole[1])
    expected = path.with_suffix(".places.npy").read_bytes()
    for harm in (lambda file: flip(file, len(expected) - 5), lambda file: os.truncate(file, 300), Path.unlink):
        harm(path.with_suffix(".places.npy"))
        caplog.clear()
        assert open_index(whole[1]).row(3).latent_entry is not None
        assert "the index is built anew" in caplog.text
        assert path.with_suffix(".places.npy").read_bytes() == expected


def test_ranks_that_see_other_shards_have_other_content(whole):
    before = open_index(whole[1], whole[1].parent / "one").content
    shard = whole[1].parent / LATENTS
    write_shard(shard, {f"train-{i}": torch.ones(24, *SHAPES[i]) for i in range(3)})
    after = open_index(whole[1], whole[1].parent / "other")
    assert after.content != before and after.shapes().all()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "heavy", "1e4", "1e-4"])
def test_a_weight_that_is_none_is_refused(whole, value):
    rows = [row | {"weight": "1"} for row in rows_of(whole[1])]
    rows[2]["weight"] = value
    with pytest.raises(InputError, match=rf"sharded\.csv:4: weight = '{value}': must be a number from 0\.001 to 1000"):
        open_index(put(whole[1], rows))


def test_weights_are_carried(whole):
    rows = [row | {"weight": ""} for row in rows_of(whole[1])]
    rows[2]["weight"] = "2.5"
    index = open_index(put(whole[1], rows))
    assert [index.row(i).weight for i in (0, 2)] == [None, 2.5]
    assert index.column("weight").to_pylist() == [None, None, 2.5, *[None] * 7]
