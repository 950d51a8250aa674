"""The sets of a run agree on what made their text features."""

import pytest

from mugv_ds.config import ConfigError, load_config
from mugv_ds.config.text_encoder import write_text_encoder
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import SampleCost
from mugv_ds.models.text import HashTextEncoder
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, write_config, write_dataset

INFO = HashTextEncoder(CHANNELS, TEXT_TOKENS).info


@pytest.fixture
def config(tmp_path):
    train, val, preview = (
        write_dataset(tmp_path / name, [(1, 4, 4)] * 4, name) for name in ("train", "val", "preview")
    )
    preview = {"every": 1, "manifest": str(preview), "dir": "previews"}
    return load_config(write_config(tmp_path / "run", train, data={"val_manifest": str(val)}, preview=preview))


def open_data(config) -> RunData:
    return RunData(config, SampleCost.of(config), 1)


def test_sets_that_claim_nothing_are_taken_as_they_are(tmp_path, config):
    before = open_data(config)
    assert before.text_encoder is None
    write_text_encoder(tmp_path / "preview", INFO)
    after = open_data(config)
    assert after.text_encoder == INFO
    assert after.content() == before.content() | {"text_encoder.json": str(INFO)}, "ranks that read another are refused"


@pytest.mark.parametrize(("name", "key"), [("val", "data.val_manifest"), ("preview", "preview.manifest")])
def test_a_set_of_another_encoder_is_refused(tmp_path, config, name, key):
    write_text_encoder(tmp_path / "train", INFO)
    write_text_encoder(tmp_path / name, HashTextEncoder(CHANNELS + 2, TEXT_TOKENS).info)
    with pytest.raises(
        ConfigError, match=f"data.manifest: text features of hash of width 16 .*; {key}: of hash of width 18"
    ):
        open_data(config)
