"""What held-out samples and a run's typical shape are; both were wrong once."""

from collections import Counter
from itertools import product

import pytest

from mugv_ds.config import load_config
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import SampleCost
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
