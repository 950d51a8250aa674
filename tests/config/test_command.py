"""What the training command does before PyTorch is imported: how many replicas there are, and what PyTorch is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mugv_ds.config import load_config
from mugv_ds.config.command import fit_to_launch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, sys
from mugv_ds.config import TrainConfig
from mugv_ds.config.command import training_command
from mugv_ds.config.console import say

def train(config):
    found = [f"{name}={os.environ[name]}" for name in os.environ if "ALLOC_CONF" in name]
    say(" ".join([str("torch" in sys.modules), *found]))
    return 0

sys.exit(training_command(["--config", "ds_configs/debug.json", "--set", f"logging.dir={sys.argv[1]}"], "", TrainConfig,
                          train, None))
"""
LAUNCH = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("processes", "settings", "replicas"),
    [
        (4, [], 4),
        (3, [], 2),  # 8 samples in micro-batches of 1
        (100, [], 8),
        (6, ["parallel.sequence=2"], 2),
        (1, ["parallel.sequence=2"], 1),  # refused later, by the number that is needed
        (8, ["data.micro_batch_size=4"], 2),
        (5, ["parallel.data=5"], 5),
    ],
)
def test_a_run_takes_as_many_replicas_as_its_steps_can_be_split_over(processes, settings, replicas):
    given = ["data.global_batch_size=8", "data.micro_batch_size=1", "parallel.data=fit", *settings]
    assert load_config("ds_configs/debug.json", given).fitted(processes).parallel.data == replicas


def test_with_a_budget_the_steps_are_multiples_that_can_be_split():
    config = load_config("ds_configs/stage3.json", ["parallel.data=fit", "parallel.sequence=4"])
    multiple = config.data.budget.multiple
    assert config.fitted(4 * multiple + 4).parallel.data == multiple
    assert config.fitted(4 * (multiple - 1)).parallel.data == multiple // 2


@pytest.mark.parametrize("rank", range(4))
def test_processes_that_are_left_over_are_the_last_ones(rank, monkeypatch, capsys):
    for name, value in (LAUNCH | {"RANK": str(rank), "WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    given = ["data.global_batch_size=6", "data.micro_batch_size=1", "parallel.data=fit"]
    config = fit_to_launch(load_config("ds_configs/debug.json", given))
    assert (config is None) == (rank == 3)
    assert os.environ["WORLD_SIZE"] == ("3" if rank < 3 else "4")
    assert config is None or config.parallel.data == 3
    note = "note: 1 of 4 processes are left over and end: the samples of a step are split over 3 replicas of 1\n"
    assert capsys.readouterr().out == (note if rank == 3 else "")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"),
        (
            {"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"},
            "PYTORCH_ALLOC_CONF=garbage_collection_threshold:0.8",
        ),
    ],
)
def test_device_memory_grows_in_place_unless_the_user_says_otherwise(tmp_path, given, expected):
    outer = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=outer | LAUNCH | given, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.split("\n")[0] == f"False {expected}", done.stderr
