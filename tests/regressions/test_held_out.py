"""What held-out samples and a run's typical shape are; both were wrong once."""

from collections import Counter
from itertools import product

import pytest

from mugv_ds.config import ConfigError, load_config
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import SampleCost
from mugv_ds.plan.balance import balance_report
from tests.engine.test_preference import annotate
from tests.helpers.dataset import write_config, write_dataset

pytestmark = pytest.mark.regression


def read(path) -> RunData:
    config = load_config(path)
    return RunData(config, SampleCost.of(config), 1)


def quarter(reader, item: int) -> int:
    return int(reader.time(item, 0) // 250)


def test_each_shape_is_measured_in_every_quarter(tmp_path):
    """Four shapes that take turns: every row of one shape had the same quarter, that of its number."""
    shapes = [(1, 4, 4), (2, 4, 4), (1, 4, 6), (2, 4, 6)]
    manifest = write_dataset(tmp_path, shapes * 8)
    reader = read(write_config(tmp_path, manifest, data={"val_manifest": str(manifest)})).held_out_flows()
    counts = Counter((tuple(reader.shapes[item].tolist()), quarter(reader, item)) for item in range(len(reader.shapes)))
    assert counts == dict.fromkeys(product(shapes, range(4)), 2)


def test_good_and_bad_are_measured_in_the_same_quarters(tmp_path):
    """Labels take turns; good ones were in the quarters 0 and 2 and bad ones in 1 and 3."""
    manifest = write_dataset(tmp_path, [(1, 4, 6)] * 48)
    labelled = annotate(manifest, "kto")
    text = labelled.read_text()
    header, *rows = text.splitlines()
    rows = [row.replace(",good", ",bad").replace(",bad", ",good" if i % 2 else ",bad") for i, row in enumerate(rows)]
    labelled.write_text("\n".join([header, *rows]) + "\n")
    source = {"name": "a", "manifest": str(labelled), "val_manifest": str(labelled)}
    preference = {"objective": "kto", "sources": [source]}
    reader = read(write_config(tmp_path, manifest, preference=preference)).held_out_annotations(0)
    counts = Counter((int(reader.roles[item, 0]), quarter(reader, item)) for item in range(len(reader.roles)))
    assert counts == dict.fromkeys(product((1, -1), range(4)), 6)


def test_the_typical_shape_is_one_that_there_is(tmp_path):
    """It was the largest of each side: of a long small clip and a large image, a long large clip that nobody has."""
    manifest = write_dataset(tmp_path, [(8, 4, 4)] * 4 + [(1, 8, 8)] * 4)
    assert read(write_config(tmp_path, manifest)).typical_shape == (8, 4, 4)


def test_a_shape_with_few_rows_does_not_fill_steps_with_copies(tmp_path, caplog):
    """One row of its shape filled whole steps with copies of itself; it is left out and told, and counted."""
    manifest = write_dataset(tmp_path, [(1, 4, 4)] * 6 + [(2, 4, 4)] + [(1, 4, 6)] * 3)
    path = write_config(tmp_path, manifest)  # four samples a step
    plan = read(path).plan
    played = {plan.step(i).shape for i in range(200)}
    assert played == {(1, 4, 4), (1, 4, 6)}
    assert "1 rows or pairs of 1 shapes, (2, 4, 4)" in caplog.text
    text = balance_report(load_config(path), 1, steps=8)
    assert "rows that are never played: 1 of 10" in text
    assert "fewer of their shape than a step: 3" in text
    with pytest.raises(ConfigError, match=r"no others; add rows, or lower data\.global_batch_size"):
        read(write_config(tmp_path / "few", write_dataset(tmp_path / "few", [(1, 4, 4), (2, 4, 4)])))
