"""Widening: the same function, and copies that can learn apart."""

import json
from pathlib import Path

import pytest
import torch

from mugv_ds.cli import widen
from mugv_ds.config import InputError
from mugv_ds.config.model import PRESETS
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.weights.base import meta_state
from mugv_ds.weights.convert import widen_weights
from mugv_ds.weights.published import PublishedWeights, load_dit
from mugv_ds.weights.widen import Noise, Widened, widen_tensor, widened_sizes
from tests.helpers.records import GOLDEN, load_record, relative, run

CONFIG = DiTConfig(144, 2, 2, caption_channels=16)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """Weights in which nothing is zero or one, so that no rule can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, value in DiT(CONFIG).state_dict().items():
        scale = 1.0 if value.dim() == 1 else value[0].numel() ** -0.5
        state[name] = scale * torch.randn(value.shape, generator=generator)
    path = tmp_path_factory.mktemp("narrow") / "dit.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("noise", ["none", "paired"])
def test_the_output_stays_the_same(tmp_path, narrow, noise, factor):
    report = widen_weights(narrow, tmp_path / "wide", factor=factor, noise=Noise(noise, 0.1, 0))
    assert report.config == widened_sizes(CONFIG, factor) and report.blocks == 2
    assert report.config.num_heads == 2 * factor
    assert report.difference < 1e-6
    assert {p.dtype for p in load_dit(report.path).parameters()} == {torch.float32}


def test_independent_noise_changes_the_output(tmp_path, narrow):
    report = widen_weights(narrow, tmp_path / "wide", factor=2, noise=Noise("iid", 0.1, 0))
    assert 1e-3 < report.difference < 1


def test_the_published_record_survives_widening(tmp_path):
    """First frame given clean, padded captions, odd sides: what the report's own input does not have."""
    model, record = load_record("dit_i2v_batch")
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    report = widen_weights(tmp_path / "dit.pt", tmp_path / "wide", factor=2, noise=Noise("paired", 0.1, 0))
    with torch.no_grad():
        assert relative(run(load_dit(report.path), record), run(model, record)) < 1e-6


def gradient_of_halves(path: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the two halves of the rows of a matrix."""
    model = load_dit(path)
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in ([1, 24, 2, 4, 4], [1, 5, 16]))
    model(x, torch.tensor([500.0]), text).square().mean().backward()
    return model.get_parameter(name).grad.chunk(2)


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "blocks.1.attn.proj.weight", "x_embedder.proj.weight"])
def test_only_noise_lets_the_halves_learn_apart(tmp_path, narrow, name):
    for kind in ("none", "paired"):
        widen_weights(narrow, tmp_path / kind, factor=2, noise=Noise(kind, 0.1, 0))
    assert relative(*gradient_of_halves(tmp_path / "none", name)) < 1e-5
    assert relative(*gradient_of_halves(tmp_path / "paired", name)) > 1e-2


def test_noise_depends_on_seed_and_name_alone(narrow):
    one, same, other = (Widened(PublishedWeights(narrow), 2, Noise("paired", 0.1, seed)) for seed in (0, 0, 1))
    names = ["blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight"]
    forward, backward = [one[name] for name in names], [same[name] for name in reversed(names)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], other[names[0]])
    plain = Widened(PublishedWeights(narrow), 2, Noise("none"))
    noises = [wide - plain[name] for name, wide in zip(names, forward, strict=True)]
    assert relative(*noises) > 1
    assert noises[0].std() / plain[names[0]].square().mean().sqrt() == pytest.approx(0.1, rel=0.02)


def test_the_proxy_widens_to_the_10b():
    """Every name and shape of the published 10B."""
    wide = {name: widen_tensor(name, value, 2) for name, value in meta_state(PRESETS["mugdit_2b"]).items()}
    published = json.loads((GOLDEN / "dit_10b_keys.json").read_text())
    assert {name: list(value.shape) for name, value in wide.items()} == published


def test_the_command_writes_and_reports(tmp_path, narrow, capsys):
    command = ["--weights", str(narrow), "--out", str(tmp_path / "wide"), "--dtype", "bf16", "--check-blocks", "1"]
    assert widen.main(command) == 0
    said = capsys.readouterr().out
    assert "over the first 1 of 2 blocks" in said and "set optimizer.width_reference = 144" in said
    assert {p.dtype for p in load_dit(tmp_path / "wide").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--factor", "1"], "factor 1"),
        (["--noise-scale", "-1"], "noise scale -1"),
        (["--noise-scale", "nan"], "noise scale nan"),
        (["--check-blocks", "3"], "must be 1 to 2"),
        (["--weights", "nowhere"], "nowhere: holds no weights"),
    ],
)
def test_bad_options_are_refused(tmp_path, narrow, capsys, options, complaint):
    command = ["--weights", str(narrow), "--out", str(tmp_path / "wide"), *options]
    assert widen.main(command) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "wide").exists()


def test_a_factor_is_checked_without_the_command(narrow):
    with pytest.raises(InputError, match="factor 0"):
        Widened(PublishedWeights(narrow), 0, Noise("none"))
