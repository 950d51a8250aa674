import logging
import time

import numpy as np
import pytest

from mugv_ds.data.manifest import ManifestError, open_index
from mugv_ds.data.pairs import labels, pairs
from tests.helpers.dataset import write_dataset

SHAPE = (2, 4, 6)


def index_of(root, header, *values, shapes=None, unreadable=()):
    """The index of samples train-0, train-1, … with columns on top; the latents of some rows are garbage."""
    csv = write_dataset(root, shapes or [SHAPE] * len(values))
    lines = csv.read_text().splitlines()
    csv.write_text("".join(f"{line},{more}\n" for line, more in zip(lines, (header, *values), strict=True)))
    for row in unreadable:
        (root / f"latents/train-{row}.pt").write_bytes(b"garbage")
    return open_index(csv)


def test_the_lower_rank_is_the_better(tmp_path):
    index = index_of(tmp_path, "pair_id,rank", "b,2", "a,1", "b,1", "c,0", "a,2", "c,1")
    rows = pairs(index)
    assert rows.dtype == np.int32
    assert rows.tolist() == [[2, 0], [1, 4], [3, 5]]  # in the order in which the CSV names the pairs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a,1", "a,2", ",1", ",2"], "2 rows have no pair_id, the first is sample 'train-2'"),
        (["a,1", "a,2", "b,1"], r"pair 'b' \('train-2'\) has 1 row;"),
        (["a,1", "b,1", "a,2", "a,3", "b,2"], r"pair 'a' \('train-0', 'train-2', 'train-3'\) has 3 rows;"),
        (["a,1"] * 6, r"pair 'a' \('train-0', 'train-1', 'train-2', 'train-3', …\) has 6 rows;"),
        (["a,1", "a,2", "b,", "b,1"], r"pair 'b' \('train-2', 'train-3'\) lacks a rank"),
        (["a,", "a,"], r"pair 'a' \('train-0', 'train-1'\) lacks a rank"),
        (["a,1", "a,2", "b,3", "b,3"], r"pair 'b' \('train-2', 'train-3'\) has rank 3 twice"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path, values, message):
    with pytest.raises(ManifestError, match=message):
        pairs(index_of(tmp_path, "pair_id,rank", *values))


def test_no_preferences_in_the_manifest(tmp_path):
    index = open_index(write_dataset(tmp_path, [SHAPE] * 2))
    with pytest.raises(ManifestError, match="2 rows have no pair_id"):
        pairs(index)
    with pytest.raises(ManifestError, match="2 samples have no label"):
        labels(index)


def test_latents_of_two_shapes(tmp_path):
    index = index_of(tmp_path, "pair_id,rank", "a,1", "a,2", "b,1", "b,2", shapes=[SHAPE] * 3 + [(3, 4, 6)])
    with pytest.raises(ManifestError, match=r"'train-2', 'train-3'\) .* \(2, 4, 6\) and \(3, 4, 6\); encode both"):
        pairs(index)


def test_pairs_that_cannot_be_read_are_left_out_and_counted(tmp_path, caplog):
    values = ["a,1", "a,2", "b,1", "b,2", "c,2", "c,1"]
    index = index_of(tmp_path, "pair_id,rank", *values, unreadable=(0, 4, 5))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert pairs(index).tolist() == [[2, 3]]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: 2 of 3 pairs are left out, one of their latents could not be read"
    ]


def test_no_pair_can_be_read(tmp_path):
    with pytest.raises(ManifestError, match="no pair has two latents that can be read"):
        pairs(index_of(tmp_path, "pair_id,rank", "a,1", "a,2", unreadable=(0,)))


def test_labels(tmp_path):
    good = labels(index_of(tmp_path, "label", "good", "bad", "", "good", unreadable=(2,)))
    assert good.dtype == bool
    assert good.tolist() == [True, False, False, True]


def test_missing_labels(tmp_path):
    with pytest.raises(ManifestError, match="2 samples have no label, the first is 'train-1'"):
        labels(index_of(tmp_path, "label", "good", "", "", "bad", "", unreadable=(4,)))


def test_many_pairs(tmp_path):
    n = 50_000
    csv = tmp_path / "train.csv"
    row = "{i},real,l/{i}.pt,t/{i}.pt,41,360,640,pair-{pair},{rank}\n".format
    csv.write_text(
        "sample_id,source,latent_path,text_feat_path,num_frames,height,width,pair_id,rank\n"
        + "".join(row(i=i, pair=i % n, rank=1 + (i % n + i // n) % 2) for i in range(2 * n))
    )
    index = open_index(csv)  # several chunks of the index, in which the halves of a pair are far apart
    begin = time.monotonic()
    rows = pairs(index)
    assert time.monotonic() - begin < 2
    first = np.arange(n)
    assert (rows == np.where(first[:, None] % 2, [[n, 0]], [[0, n]]) + first[:, None]).all()
