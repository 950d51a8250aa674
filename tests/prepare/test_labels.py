import pytest

from mugv_ds.config.errors import InputError
from mugv_ds.data.paths import ManifestError
from mugv_ds.prepare.labels import read_labels
from tests.helpers.prepared_rows import clip_id

IDS = {name: clip_id(name) for name in "abcdefgh"}


def labels(tmp_path, text):
    """Reads labels.csv, of which {a}, {b} … are the ids of clips."""
    path = tmp_path / "labels.csv"
    path.write_text(text.format(**IDS))
    return read_labels(path, set(IDS.values()))


def rows(found):
    names = {one: name for name, one in IDS.items()}
    return {names[row["clip"]]: (row["label"], row["pair_id"], row["rank"]) for row in found.rows.to_pylist()}


def test_labels_and_pairs_of_one_annotator(tmp_path):
    found = labels(tmp_path, "id,label,pair_id,rank\n{a},good,,\n{b},bad,p,2\n{c},,p,1\n")
    assert rows(found) == {"a": ("good", None, None), "b": ("bad", "p", 2), "c": (None, "p", 1)}
    assert found.ties == ()
    assert found.rows["clip"].to_pylist() == sorted(found.rows["clip"].to_pylist())


def test_any_axis_that_is_bad_makes_the_clip_bad(tmp_path):
    found = labels(tmp_path, "id,label,axis\n{a},good,motion\n{a},bad,content\n{b},good,motion\n{b},good,content\n")
    assert rows(found) == {"a": ("bad", None, None), "b": ("good", None, None)}


def test_the_majority_of_annotators_counts_and_ties_are_dropped_and_listed(tmp_path):
    text = "id,label,axis,annotator\n"
    for who, a, b in (("x", "good", "good"), ("y", "good", "bad"), ("z", "bad", None)):
        text += "".join(f"{{{name}}},{label},m,{who}\n" for name, label in (("a", a), ("b", b)) if label)
    found = labels(tmp_path, text)
    assert rows(found) == {"a": ("good", None, None)}
    assert found.ties == (f"clip {IDS['b']}: 1 say good, 1 bad",)


def test_the_majority_counts_for_pairs_too(tmp_path):
    text = "id,pair_id,rank,annotator\n"
    for who, first, second in (("x", 1, 2), ("y", 5, 9), ("z", 2, 1)):
        text += f"{{a}},p,{first},{who}\n{{b}},p,{second},{who}\n"
    for who, first, second in (("x", 1, 2), ("y", 2, 1)):
        text += f"{{c}},q,{first},{who}\n{{d}},q,{second},{who}\n"
    found = labels(tmp_path, text)
    assert rows(found) == {"a": (None, "p", 1), "b": (None, "p", 2)}
    assert found.ties == ("pair q: 1 say one is better, 1 the other",)


BAD = {
    "no header": ("", "1: empty"),
    "no rows": ("id,label\n", "1: only a header"),
    "no id column": ("clip,label\n{a},good\n", "1: missing column 'id'"),
    "unknown id": ("id,label\n{a},good\n00000000000000000000000000000000,good\n", "3: no clip has the id 0000"),
    "id that is none": ("id,label\n../x,good\n", "2: id '../x': must be the 32 hex"),
    "unknown label": ("id,label\n{a},perhaps\n", "2: unknown label 'perhaps'"),
    "nothing said": ("id,label,pair_id,rank\n{a},,,\n", "2: neither label nor pair_id"),
    "rank without pair": ("id,rank\n{a},1\n", "2: pair_id and rank go together"),
    "pair without rank": ("id,pair_id\n{a},p\n", "2: pair_id and rank go together"),
    "axis without label": ("id,pair_id,rank,axis\n{a},p,1,motion\n", "2: axis 'motion' without a label"),
    "rank that is no number": ("id,pair_id,rank\n{a},p,first\n", "2: rank = 'first': must be a whole number"),
    "said twice": ("id,label\n{a},good\n{a},bad\n", "3: who gave no name has labelled clip"),
    "ranked twice": ("id,pair_id,rank\n{a},p,1\n{a},p,2\n", "3: who gave no name has ranked clip"),
    "pair of one": ("id,pair_id,rank\n{a},p,1\n", "2: pair 'p' has 1 clip by"),
    "pair of three": ("id,pair_id,rank\n{a},p,1\n{b},p,2\n{c},p,3\n", "4: pair 'p' has 3 clips"),
    "half a pair by one": (
        "id,pair_id,rank,annotator\n{a},p,1,x\n{b},p,2,x\n{a},p,1,y\n",
        "4: pair 'p' has 1 clip by annotator 'y'",
    ),
    "equal ranks": ("id,pair_id,rank\n{a},p,1\n{b},p,1\n", "3: pair 'p' has rank 1 twice"),
    "in two pairs": ("id,pair_id,rank\n{a},p,1\n{b},p,2\n{a},q,1\n{c},q,2\n", "4: clip .* of pair 'q' is in pair 'p'"),
    "long name": ("id,label,annotator\n{a},good," + "x" * 300 + "\n", "2: annotator has 300 characters"),
    "open quote": ('id,label\n{a},"good\n', "2: .*quote"),
    "too many values": ("id,label\n{a},good,3\n", "2: 3 values, the header has 2"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_labels_are_named_with_their_line(tmp_path, text, message):
    with pytest.raises(ManifestError, match=f"labels.csv:{message}"):
        labels(tmp_path, text)


def test_labels_must_be_a_file(tmp_path):
    with pytest.raises(InputError, match=r"labels\.csv"):
        read_labels(tmp_path / "labels.csv", set())
