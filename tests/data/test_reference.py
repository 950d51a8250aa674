import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mugv_ds.config.errors import InputError
from mugv_ds.data import reference
from mugv_ds.data.reference import REFERENCE_SCHEMA, KeyMismatch, ReferenceKey, read_reference, write_reference

KEY = ReferenceKey(weights="a" * 64, data="b" * 64, noise='{"seed": 0, "shift": "resolution", "first_frame": 0.5}')
IDS = ["z", "a", "m"]
LOSSES = np.array([[0.1, 0.2, np.nan], [0.3, np.nan, 1 / 3], [np.nan, np.nan, np.nan]])


def rows(losses=LOSSES):
    """The table of the entries of losses [len(IDS), visits] that are not NaN."""
    sample, visit = np.nonzero(~np.isnan(losses))
    return table([IDS[i] for i in sample], visit, losses[sample, visit])


def table(sample_ids, visits, losses):
    timesteps = np.linspace(0, 1000, len(losses))
    columns = {"sample_id": list(sample_ids), "visit": visits, "timestep": timesteps, "loss": losses}
    columns["content"] = np.arange(len(losses))
    return pa.table(columns).cast(REFERENCE_SCHEMA)


def foreign(path, content, header=None, **options):
    """A Parquet file that `write_reference` would not write."""
    header = json.dumps(dataclasses.asdict(KEY) | {"version": 2}) if header is None else header
    with pq.ParquetWriter(path, content.schema, store_schema=False, **options) as writer:
        writer.write_table(content)
        writer.add_key_value_metadata({"mugv_ds.reference": header})
    return path


@pytest.fixture
def cache(tmp_path):
    path = tmp_path / "runs" / "reference.parquet"
    write_reference(path, KEY, rows())
    return path


def test_round_trip(cache):
    losses = read_reference(cache, KEY, IDS)["loss"]
    assert losses.dtype == np.float64
    np.testing.assert_array_equal(losses, LOSSES)  # bitwise: fp64 is kept
    np.testing.assert_array_equal(read_reference(cache, KEY, IDS[::-1])["loss"], LOSSES[::-1])
    assert list(cache.parent.iterdir()) == [cache]


def test_the_file_is_sorted_and_plain(tmp_path):
    """Rows in any order, with pandas' metadata, give the same file; it holds no Arrow schema."""
    paths = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for path, order in zip(paths, ([0, 1, 2, 3], [3, 1, 0, 2]), strict=True):
        write_reference(path, KEY, rows().take(order).replace_schema_metadata({"pandas": "{}"}))
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert list(pq.read_metadata(paths[0]).metadata) == [b"mugv_ds.reference"]
    content = pq.read_table(paths[0])
    assert content["sample_id"].to_pylist() == ["a", "a", "z", "z"]
    assert content["visit"].to_pylist() == [0, 2, 0, 1]


def test_writing_again_replaces(cache):
    write_reference(cache, KEY, rows(LOSSES + 1))
    np.testing.assert_array_equal(read_reference(cache, KEY, IDS)["loss"], LOSSES + 1)


def test_no_rows(tmp_path):
    write_reference(tmp_path / "r", KEY, rows(LOSSES[:, :0]))
    assert read_reference(tmp_path / "r", KEY, IDS).shape == (3, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (table("aba", [0, 0, 0], [0.1, 0.2, 0.3]), "sample 'a', visit 0, has more than one loss.*nothing was written"),
        (table("ab", [0, -1], [0.1, 0.2]), "sample 'b', visit -1, has a negative visit"),
        (table("ab", [0, 3], [0.1, np.inf]), "sample 'b', visit 3, has a loss that is not finite"),
        (table("ab", [0, 3], [np.nan, 0.1]), "sample 'a', visit 0, has a loss that is not finite"),
    ],
)
def test_rows_that_are_not_written(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        write_reference(tmp_path / "r", KEY, content)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        rows().drop("timestep"),
        rows().append_column("more", [[1, 2, 3, 4]]),
        rows().set_column(3, "loss", pa.array([None] * 4, pa.float64())),
        rows().set_column(1, "visit", pa.array([1 << 31] * 4)),
    ],
)
def test_columns_that_are_not_written(tmp_path, content):
    with pytest.raises(ValueError):
        write_reference(tmp_path / "r", KEY, content)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": "c" * 64}, f"weights, '{'a' * 40}…' where this run has '{'c' * 40}…';"),
        ({"data": "b" * 63 + "c"}, f"data, '…{'b' * 21}' where this run has '…{'b' * 20}c';"),
        ({"noise": KEY.noise.replace("0.5", "7")}, """where this run has '…on", "first_frame": 7}';"""),
        ({"noise": KEY.noise[:-1]}, """noise, '…, "first_frame": 0.5}' where this run has '…, "first_frame": 0.5';"""),
        ({"data": "", "weights": "x"}, f"where this run has 'x' and other data, '{'b' * 40}…' where this run has '';"),
    ],
)
def test_losses_of_another_run(cache, change, said):
    with pytest.raises(KeyMismatch) as caught:
        read_reference(cache, dataclasses.replace(KEY, **change), IDS)
    message = str(caught.value)
    assert message.startswith(f"{cache}: computed from other ") and said in message
    assert message.endswith("make it with make reference CONFIG=…")


def test_missing(tmp_path):
    for path in (tmp_path / "none.parquet", tmp_path):
        with pytest.raises(InputError, match="no such file; make it with make reference CONFIG=…"):
            read_reference(path, KEY, IDS)


def test_unknown_sample(cache):
    with pytest.raises(InputError, match="sample 'z' is not in the manifest"):
        read_reference(cache, KEY, ["a", "m"])


def test_damage_is_seen(cache):
    """Any byte of the pages, the footer's length or the magic number; and every way to cut the file short."""
    sound = cache.read_bytes()
    footer = len(sound) - 8 - int.from_bytes(sound[-8:-4], "little")
    assert 100 < footer < len(sound)
    for position in [*range(footer), *range(len(sound) - 8, len(sound))]:
        damaged = bytearray(sound)
        damaged[position] ^= 0x55
        cache.write_bytes(damaged)
        try:
            losses = read_reference(cache, KEY, IDS)["loss"]
        except InputError:
            continue
        np.testing.assert_array_equal(losses, LOSSES)  # a byte that does not matter, as the magic number in front
    for length in range(0, len(sound), 7):
        cache.write_bytes(sound[:length])
        with pytest.raises(InputError, match=r"not a sound Parquet file \(.+\); make it"):
            read_reference(cache, KEY, IDS)


@pytest.mark.parametrize("header", ["", "[" * 100_000, "[]", '{"version": 1}', '{"version": 1, "weights": {}}', "\x00"])
def test_not_our_metadata(tmp_path, header):
    with pytest.raises(InputError, match="not a file of a reference's losses"):
        read_reference(foreign(tmp_path / "r", rows(), header), KEY, IDS)


def test_other_version(tmp_path):
    header = json.dumps(dataclasses.asdict(KEY) | {"version": 3})
    with pytest.raises(InputError, match="written in version 3, this program reads 2"):
        read_reference(foreign(tmp_path / "r", rows(), header), KEY, IDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pa.table({"x": [1]}), "not the columns of a reference's losses: x int64"),
        (rows().set_column(3, "loss", [["1", "2", "3", "4"]]), "not the columns.*loss string"),
        (pa.table(rows().to_pydict()), "not the columns"),
        (table("aa", [0, 0], [0.1, 0.2]), "sample 'a', visit 0, has more than one loss, or is out of order"),
        (table("za", [0, 0], [0.1, 0.2]), "sample 'a', visit 0, has more than one loss, or is out of order"),
        (table("a", [0], [np.nan]), "sample 'a', visit 0, has a loss that is not finite"),
        (table("a", [-1], [0.5]), "sample 'a', visit -1, has a negative visit"),
        (table("a", [(1 << 31) - 1], [0.5]), "2147483648 visits of 3 samples are too many"),
        (
            rows().set_column(0, REFERENCE_SCHEMA[0], pa.array([b"\xff"] * 4).cast(pa.string(), safe=False)),
            "not a sound Parquet file",
        ),
    ],
)
def test_tables_that_we_would_not_write(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_reference(foreign(tmp_path / "r", content), KEY, IDS)


def test_killed_while_writing(tmp_path):
    """Killed when all is written but not yet safe on the disk: what was there before stays."""
    path = tmp_path / "r.parquet"
    program = (
        "import os, signal; from tests.data.test_reference import KEY, LOSSES, rows, write_reference\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"write_reference({str(path)!r}, KEY, rows(LOSSES + 1))"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert [left.suffix for left in tmp_path.iterdir()] == [".tmp"]
    write_reference(path, KEY, rows())
    assert subprocess.run(command).returncode == -signal.SIGKILL
    np.testing.assert_array_equal(read_reference(path, KEY, IDS)["loss"], LOSSES)


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_reference(tmp_path / "r", KEY, rows())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("visit", "samples"), [(1 << 28, 1), (1 << 27, 2), (2**31 - 1, 1)])
def test_a_file_that_asks_for_more_memory_than_it_may_is_refused(tmp_path, visit, samples):
    """More than 2^28 losses, which are 2 GiB, are not those of a run; one row can ask for them."""
    path = foreign(tmp_path / "r.parquet", table(["a"], [visit], np.ones(1)))
    with pytest.raises(InputError, match=f"{visit + 1} visits of {samples} samples are too many"):
        read_reference(path, KEY, ["a", "b"][:samples])


def test_the_bound_itself_may_be_used(tmp_path, monkeypatch):
    path = foreign(tmp_path / "r.parquet", table(["a", "b"], [0, 2], np.ones(2)))
    monkeypatch.setattr(reference, "_MAX_VALUES", 6)
    assert read_reference(path, KEY, ["a", "b"]).shape == (2, 3)
    monkeypatch.setattr(reference, "_MAX_VALUES", 5)
    with pytest.raises(InputError, match="3 visits of 2 samples are too many"):
        read_reference(path, KEY, ["a", "b"])
    for most, message in ((2, "3 visits of 1 samples|is not in the manifest"), (1, "2 rows are too many")):
        monkeypatch.setattr(reference, "_MAX_VALUES", most)
        with pytest.raises(InputError, match=message):
            read_reference(path, KEY, ["a"])
