"""`train.py --dry-run` of every shipped config, whose data are not there."""

import re
from pathlib import Path

import pytest

from mugv_ds.config import load_config
from mugv_ds.plan import describe as described
from mugv_ds.plan.describe import describe
from mugv_ds.weights.codec import read_codec_sizes
from tests.helpers.machine import ideal_machine

ROOT = Path(__file__).parents[2]
CONFIGS = [
    path
    for path in sorted(ROOT.glob("ds_configs/**/*.json"))
    if path.parent.name != "vae" and path.parent.parent.name != "vae" and not path.name.startswith("prepare")
    and path.name != "common.json"  # what those of the demo have in common
]  # fmt: skip


@pytest.fixture(scope="module")
def dry_runs():
    """By name: the config, and what is printed before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("/")  # where no data are
        patch.setattr(described, "calibration_of", lambda card, name: ideal_machine())
        configs = {str(path.relative_to(ROOT / "ds_configs")): load_config(path) for path in CONFIGS}
        return {
            name: (config, describe(config, None, read_codec_sizes).split("\nconfig:\n")[0])
            for name, config in configs.items()
        }


def test_every_shipped_config_says_what_is_missing_and_is_planned_in_its_layout(dry_runs):
    assert len(dry_runs) == len(CONFIGS) > 25
    for name, (config, text) in dry_runs.items():
        assert f"  missing: {config.data.manifest}" in text, name
        shape = config.data.budget.shape if config.data.budget is not None else (15, 90, 160)
        latent = "×".join(map(str, shape))
        assert f"latent {latent}: " in text, name
        if config.model.precision == "bf16":
            assert re.search(r"about [\d.]+ GiB a device at the largest shape \(weights [\d.]+, ", text), name
            assert re.search(rf"latent {latent}: about [\d.e+]+ s a step on Ideal H200, [\d,]+ tokens/s, MFU", text), (
                name
            )
        else:
            assert "memory not predicted in" in text and "time not predicted in" in text, name


def memory(text):
    return max(float(gib) for gib in re.findall(r"about ([\d.]+) GiB a device", text))


def test_the_large_configs_fit_their_machines(dry_runs):
    """An H200 has 139.8 GiB and an H100 79.6 (in PyTorch's counting), of which 1 GiB is the context's."""
    assert memory(dry_runs["stage3.json"][1]) * 1.03 < 138.8
    config = load_config(ROOT / "ds_configs/stage3.json", ["parallel.data=2"])
    assert memory(describe(config, 8, read_codec_sizes).split("\nconfig:\n")[0]) * 1.03 < 78.6
    for name, margin in (("h200x4_54k.json", 1.01), ("h200x4_580k.json", 1.03), ("h200x1_lora_54k.json", 1.03)):
        config, text = dry_runs[name]
        assert memory(text) * margin < 138.8, name
        assert config.model.dit().depth == 56
    host = re.search(r"and ([\d.]+) GiB of host memory", dry_runs["h200x4_580k.json"][1])
    assert 4 * float(host[1]) * 1.03 < 512, "four processes on one host of 512 GiB"


def test_where_no_calibration_is_there_only_memory_is_predicted(monkeypatch):
    monkeypatch.setattr(described, "calibration_of", lambda card, name: None)
    text = describe(load_config(ROOT / "ds_configs/stage3.json"), None, read_codec_sizes, "Unheard-of 1")
    assert "time not predicted: no calibration of Unheard-of 1 is shipped" in text
    alone = ideal_machine(collectives=())
    monkeypatch.setattr(described, "calibration_of", lambda card, name: alone)
    text = describe(load_config(ROOT / "ds_configs/stage3.json"), None, read_codec_sizes)
    assert "time not predicted: calibration ideal-h200-torch2.11: no all_to_all was measured" in text
