"""The sets of a run agree on what made their text features, and rows are played by their weights."""

from collections import Counter
from pathlib import Path

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


def weigh(manifest: Path, weights: list) -> None:
    lines = manifest.read_text().splitlines()
    rows = [f"{line},{weight}" for line, weight in zip(lines[1:], weights, strict=True)]
    manifest.write_text("\n".join([f"{lines[0]},weight", *rows]) + "\n")


@pytest.mark.parametrize("mixture", [(), ({"name": "all", "share": [[0, 1.0]]},)], ids=["alone", "in a group"])
def test_rows_are_played_by_their_weight(tmp_path, mixture):
    """A row that does not say has weight 1; a set whose weights are all alike is played as without."""
    manifest = write_dataset(tmp_path, [(1, 4, 4)] * 12)
    config = load_config(write_config(tmp_path, manifest, data={"mixture": mixture}))
    plain = open_data(config)
    weigh(manifest, [0.7] * 12)
    alike = open_data(config)
    assert alike.order() == plain.order() and alike.plan.step(7) == plain.plan.step(7)
    manifest.unlink()
    manifest = write_dataset(tmp_path, [(1, 4, 4)] * 12)
    weigh(manifest, [3, 0.5, *[""] * 10])
    data = open_data(config)
    assert set(data.order()) - set(plain.order()) == {"the rows' weights"}
    played = Counter(ref.item for position in range(900) for ref in data.plan.step(position).refs)
    unit = 900 * 4 / 13.5
    assert all(abs(played[row] - unit * weight) < 3 for row, weight in enumerate([3, 0.5, *[1] * 10]))


def test_a_row_so_heavy_that_it_would_fill_a_step_is_told(tmp_path, caplog):
    manifest = write_dataset(tmp_path, [(1, 4, 4)] * 12 + [(2, 4, 4)] * 12)
    weigh(manifest, [200, *[1] * 23])
    data = open_data(load_config(write_config(tmp_path, manifest)))
    assert (
        "train: 12 rows or pairs of 1 shapes, (1, 4, 4), are so few of their shape, or so unlike in weight"
        in caplog.text
    )
    assert {data.plan.step(position).shape for position in range(40)} == {(2, 4, 4)}


@pytest.mark.parametrize("label", ["good", "bad"])
def test_kto_on_one_class_alone_is_refused(tmp_path, label):
    """The CSV is named. Rows that cannot be read do not count, and one sample of the other class is another matter."""
    manifest = write_dataset(tmp_path, [(1, 4, 4)] * 6)
    lines = manifest.read_text().splitlines()
    other = {"good": "bad", "bad": "good"}[label]
    source = tmp_path / "labels.csv"
    preference = {"objective": "kto", "sources": [{"name": "a", "manifest": str(source)}]}
    data = {"global_batch_size": 2}
    config = load_config(write_config(tmp_path / "run", manifest, data=data, preference=preference))
    source.write_text("\n".join([f"{lines[0]},label", *(f"{line},{label}" for line in lines[1:])]) + "\n")
    with pytest.raises(
        ConfigError, match=f"labels.csv: all 6 samples are labelled {label}, .* add samples of the other"
    ):
        open_data(config)
    mixed = [f"{line},{other if i == 5 else label}" for i, line in enumerate(lines[1:])]
    source.write_text("\n".join([f"{lines[0]},label", *mixed]) + "\n")
    open_data(config)
    (tmp_path / "latents/train-5.pt").write_bytes(b"damaged")
    source.write_text("\n".join([f"{lines[0]},label", *mixed[::-1]]) + "\n")
    with pytest.raises(ConfigError, match="all 5 samples are labelled"):
        open_data(config)
