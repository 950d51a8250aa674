"""The model card beside exported weights: what it names, that it cannot be broken out of, and that its code runs."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from mugv_ds.checkpoint.reader import open_checkpoint
from mugv_ds.cli.convert_hf import main
from mugv_ds.config.errors import InputError
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.weights.card import escaped, model_card
from mugv_ds.weights.published import PublishedWeights, load_dit
from tests.helpers.saved import write_checkpoint

CONFIG = DiTConfig(144, 2, 2, caption_channels=16)
MODEL = {"hidden_size": 144, "depth": 2, "num_heads": 2, "caption_channels": 16, "precision": "fp32"}
HOSTILE = "x|y`*<script>alert(1)</script>\n---\n# title"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("card") / "run"
    write_checkpoint(folder, 30, DiT(CONFIG).state_dict().items(), averages={"ema_0.050": 0.5}, model=MODEL)
    return folder


def convert(run: Path, out: Path, *arguments: str) -> str:
    assert main(["--ckpt", str(run), "--out", str(out), *arguments]) == 0
    return (out / "README.md").read_text()


def head_of(card: str) -> dict:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


@pytest.mark.parametrize("how", [(), ("--format", "safetensors"), ("--layout", "diffusers")])
def test_the_code_of_the_card_loads_the_weights(run, tmp_path, monkeypatch, how):
    """As it stands, in the folder of the card; the weights are the checkpoint's."""
    card = convert(run, tmp_path / "out", *how)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    state = names["model"].state_dict()
    with open_checkpoint(run) as saved:
        assert state.keys() == set(saved.names())
        assert all(torch.equal(value, saved.read(name)) for name, value in state.items())


def test_the_card_names_what_the_checkpoint_knows(run, tmp_path):
    card = convert(run, tmp_path / "out", "--license", "apache-2.0")
    with open_checkpoint(run) as saved:
        manifest = saved.manifest
    assert head_of(card)["license"] == "apache-2.0" and head_of(card)["library_name"] == "mugv_ds"
    assert "| steps | 30 of " in card and manifest.config_sha256 in card and "ema\\_0.050" in card
    assert "| initial weights | drawn from the seed " in card
    assert f"| the sample ids | {'0' * 64} |" in card
    assert "| model.hidden\\_size | 144 |" in card
    assert "| unused | not there when this card was written |" in card


def test_the_same_checkpoint_gives_the_same_card(run, tmp_path):
    assert convert(run, tmp_path / "a") == convert(run, tmp_path / "b")


def changed(run: Path, out: Path, **values) -> str:
    """The card of the checkpoint with other values in its manifest."""
    with open_checkpoint(run) as saved:
        saved.manifest = saved.manifest.model_copy(update=values)
        return model_card(saved, "pt")


def test_lineage_goes_back_to_the_first_run(run, tmp_path):
    """A run that started from a checkpoint of another one, which is named with its step and its config's digest."""
    with open_checkpoint(run) as saved:
        parent, start = saved.folder, saved.manifest.start
        digest = saved.manifest.config_sha256
    card = changed(run, tmp_path, start=start.model_copy(update={"path": str(parent)}))
    lineage = card.partition("## Lineage")[2].partition("## Data")[0].splitlines()
    assert f"step 30, config SHA-256 {digest}" in lineage[6] and "initial weights" in lineage[7]


def test_data_that_are_there_are_named_with_digest_and_licences(run, tmp_path):
    csv = tmp_path / "train.csv"
    csv.write_text("sample_id\n")
    rows = pyarrow.table({"licence": ["CC-BY-4.0", "CC-BY-4.0", HOSTILE, None]})
    pyarrow.parquet.write_table(rows, tmp_path / "provenance.parquet")
    with open_checkpoint(run) as saved:
        config = json.loads(json.dumps(saved.manifest.config))
    config["data"]["manifest"] = str(csv)
    card = changed(run, tmp_path, config=config)
    assert "SHA-256 " in card and "CC-BY-4.0: 2" in card and "not known: 1" in card and "<script>" not in card


def test_what_files_say_is_escaped(run, tmp_path):
    """A commit, a name of the data and a version that try to end the head, the row or the text."""
    card = changed(run, tmp_path, git_commit=HOSTILE, data={HOSTILE: HOSTILE}, versions={"mugv_ds": HOSTILE})
    assert "<script>" not in card and "\n# title" not in card
    assert card.split("\n").count("---") == 2, "of the head"
    for line in card.splitlines():
        if line.startswith("| "):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    assert escaped("[a](http://b)") == "\\[a\\]\\(http&#58;//b\\)"


def test_an_evaluation_is_shown(run, tmp_path):
    (tmp_path / "table.json").write_text(
        json.dumps(
            {
                "videos": {"sft": 8},
                "measures": {
                    "motion": {
                        "title": "motion",
                        "unit": "px",
                        "means": {"sft": {"mean": 2.5, "low": 2.0, "high": 3.0}},
                    }
                },
            }
        )
    )
    assert "| motion | 2.5 from 2 to 3 | px |" in convert(run, tmp_path / "out", "--evaluation", str(tmp_path))


def test_an_evaluation_that_is_none_is_refused(run, tmp_path, capsys):
    (tmp_path / "table.json").write_text("[]")
    assert main(["--ckpt", str(run), "--out", str(tmp_path / "out"), "--evaluation", str(tmp_path)]) == 2
    assert "table.json: no table of tools/evaluate.py" in capsys.readouterr().err
    with open_checkpoint(run) as saved, pytest.raises(InputError):
        model_card(saved, "pt", evaluation=tmp_path / "none.json")


def test_the_layout_of_diffusers(run, tmp_path):
    """Its files under its names, which everything that reads weights takes by the folder."""
    card = convert(run, tmp_path / "out", "--layout", "diffusers")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {
        *("README.md", "model_index.json", "transformer/config.json"),
        "transformer/diffusion_pytorch_model.safetensors",
    }
    assert "transformer" in json.loads((tmp_path / "out/model_index.json").read_text())
    assert json.loads((tmp_path / "out/transformer/config.json").read_text())["_class_name"] == "DiT"
    assert "diffusers itself has no class for this model" in card
    assert set(PublishedWeights(tmp_path / "out")) == DiT(CONFIG).state_dict().keys()
    assert load_dit(tmp_path / "out").config == CONFIG


def test_formats_that_diffusers_has_not_are_refused(run, tmp_path, capsys):
    assert main(["--ckpt", str(run), "--out", str(tmp_path / "out"), "--layout", "diffusers", "--format", "pt"]) == 2
    assert "leave out --format pt" in capsys.readouterr().err
