"""What the training command sets before PyTorch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
