"""Fragments: there as a whole under a key of all that they follow from, or not at all."""

import pyarrow as pa
import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.units import FragmentError, Fragments, Step, digest, read_table

ROWS = pa.table({"clip": ["a", "b"], "value": [1.0, 2.0]})


def test_the_same_rows_have_the_same_bytes(tmp_path):
    fragments = Fragments(tmp_path / "step")
    first = fragments.write(3, "0" * 12, ROWS).read_bytes()
    chunked = pa.concat_tables([ROWS.slice(0, 1), ROWS.slice(1)]).replace_schema_metadata({"when": "now"})
    assert fragments.write(3, "0" * 12, chunked.combine_chunks()).read_bytes() == first


def test_additions_follow_and_others_are_stale(tmp_path):
    fragments = Fragments(tmp_path / "step")
    key, other = digest("now"), digest("before")
    paths = [fragments.write(0, key, ROWS, number) for number in range(3)]
    stale = [fragments.write(0, other, ROWS), fragments.write(7, key, ROWS)]
    (tmp_path / "step" / "u000000-x.parquet.0f.tmp").touch()
    assert fragments.find(0, key) == paths
    assert set(fragments.others({0: key})) == {*stale, tmp_path / "step" / "u000000-x.parquet.0f.tmp"}


def test_a_key_follows_from_the_declared_fields_and_nothing_else():
    step = Step("text", 1, fields=("text", "encode.dtype"))
    config = PrepareConfig()
    same = PrepareConfig.model_validate_json('{"select": {"sharp": {"low": 1.0}}, "encode": {"shard_mb": 5}}')
    other = PrepareConfig.model_validate_json('{"encode": {"dtype": "float32"}}')
    assert step.key(config) == step.key(same) != step.key(other)
    others = (step.key(config, ["a"]), step.key(config, weights="w"), Step("text", 2, step.fields).key(config))
    assert len({step.key(config), *others}) == 4


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "other columns"])
def test_a_damaged_fragment_is_named(tmp_path, damage):
    path = Fragments(tmp_path).write(0, digest(1), ROWS)
    content = {"cut": path.read_bytes()[:-20], "noise": b"x" * 100, "empty": b""}.get(damage)
    if content is not None:
        path.write_bytes(content)
    schema = pa.schema([("clip", pa.string()), ("value", pa.int32())]) if content is None else None
    with pytest.raises(FragmentError, match=rf"{path.name}.*prepare.py repair"):
        read_table(path, schema=schema)
