"""The command line of train.py: what it prints and refuses before anything starts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.dataset import write_config, write_dataset

ROOT = Path(__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "mugv_ds/train.py", *arguments]
    outer = {name: value for name, value in os.environ.items() if name not in {"WORLD_SIZE", "RANK", "LOCAL_RANK"}}
    return subprocess.run(
        command, cwd=ROOT, env=outer | environment, text=True, capture_output=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("run")
    manifest = write_dataset(root / "data", [(2, 4, 6)] * 3 + [(1, 4, 5)])
    return str(write_config(root, manifest))


def test_dry_run_describes_the_run(config):
    overrides = ("--set", "parallel.sequence=2", "--set", "parallel.pipeline=2", "--set", "parallel.data=2")
    overrides += ("--set", "parallel.activation_checkpointing=full")
    overrides += ("--set", "data.max_row_share=1")  # the single row of one shape fills a step alone
    done = run("--dry-run", "--config", config, *overrides)
    assert done.returncode == 0, done.stderr
    description, merged = done.stdout.split("config:\n")
    assert "8 processes = data 2 × sequence 2 × pipeline 2" in description
    stages = [line for line in description.splitlines() if line.startswith("  stage")]
    counts = [int(line.split(", ")[1].split(" ")[0].replace(",", "")) for line in stages]
    assert len(counts) == 2 and f"parameters: {sum(counts):,} " in description
    assert "4 = data 2 × accumulation 2 × micro-batch 1" in description
    assert "train, latent 2×4×6 (3 rows or pairs): 14 tokens a sample; samples a step: 4 = " in description
    assert "1×4×5 (1 rows or pairs): 8 tokens a sample" in description and "; 32 tokens, " in description
    model, hardware = re.findall(r"([\d.]+) model TFLOP a step, ([\d.]+) with what runs again", description)[0]
    assert float(hardware) == pytest.approx(4 / 3 * float(model), rel=0.02)  # ends of the model are not recomputed
    assert json.loads(merged)["parallel"]["pipeline"] == 2


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (
            "parallel.sequence=5",
            "parallel.sequence = 5: does not divide the 4 attention heads of mugdit_debug; use 1, 2 or 4",
        ),
        ("parallel.pipeline=3", "use at most 2"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key"),
        ("data.micro_batch_size=5", "data.micro_batch_size = 5"),
        ("deepspeed.zero_optimisation={}", "did you mean deepspeed.zero_optimization?"),
    ],
)
def test_a_config_that_cannot_run_is_refused_in_one_line(override, complaint):
    done = run("--dry-run", "--config", "ds_configs/debug.json", "--set", override)
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert complaint in done.stderr


def test_dry_run_predicts_the_memory_of_bf16_runs(config):
    bf16 = run("--dry-run", "--config", config, "--set", "model.precision=bf16")
    assert bf16.returncode == 0, bf16.stderr
    assert re.search(r"stage 0: .* about \d+\.\d GiB a device", bf16.stdout)
    fp32 = run("--dry-run", "--config", config).stdout
    assert "GiB" not in fp32 and "parameters, memory not predicted in fp32" in fp32


def test_a_dry_run_names_a_missing_manifest_and_goes_on_without_it(config):
    done = run("--dry-run", "--config", config, "--set", "data.manifest=nowhere.csv")
    assert done.returncode == 0
    assert "  missing: nowhere.csv; what follows is for the shape of the published model" in done.stdout


def test_the_world_must_fit_the_layout(config):
    done = run("--dry-run", "--config", config, "--set", "parallel.sequence=2", WORLD_SIZE="3")
    assert done.returncode == 2
    assert "2 processes, but 3 were started" in done.stderr


def test_without_the_launcher_nothing_starts(config):
    done = run("--config", config)
    assert done.returncode == 2 and "without the deepspeed launcher" in done.stderr


TRAINED = [p for p in (ROOT / "ds_configs").rglob("*.json") if p.stem != "common" and "vae" not in p.parts]


@pytest.mark.parametrize(
    "config", sorted(p for p in TRAINED if not p.stem.startswith("prepare")), ids=lambda path: path.stem
)
def test_the_configs_that_ship_are_valid(config):
    from mugv_ds.config import load_config
    from mugv_ds.config.deepspeed import deepspeed_config

    loaded = load_config(config)
    assert deepspeed_config(loaded, loaded.parallel.data or 8)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("name", ["prepare", "prepare_demo"])
def test_the_configs_of_preparations_are_valid(name):
    from mugv_ds.config import load_config
    from mugv_ds.config.prepare_schema import PrepareConfig

    assert load_config(ROOT / "ds_configs" / f"{name}.json", (), PrepareConfig).encode.vae
