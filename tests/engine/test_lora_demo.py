"""DPO by LoRA on the demo moves its videos as DPO of all weights does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.distributed import free_port
from tests.helpers.launcher import ROOT

SAMPLED = "--frames 16 --height 48 --width 48 --fps 8 --output-fps 8 --shift 1.0 --batch 8 --repeat 3 --guidance 1"


def command(folder: Path, script: str, *arguments: str) -> str:
    """Runs a script of the repository in a folder; returns what it printed."""
    line = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(line, cwd=folder, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained(folder: Path, name: str) -> None:
    """Trains a debug config on two processes, as `make … PRESET=debug` does, without previews."""
    launch = ["--hostfile", str(ROOT / "hostfiles/localhost"), "--node_rank", "0", "--master_addr", "127.0.0.1"]
    launch += ["--master_port", str(free_port()), str(ROOT / "mugv_ds/train.py")]
    config = ["--config", str(ROOT / f"ds_configs/debug/{name}.json"), "--set", "preview.every=0"]
    command(folder, "tools/launch.py", *launch, *config)


@pytest.mark.long
def test_four_of_five_videos_move_right_after_dpo_by_lora(tmp_path):
    """By their pixels, of 54 that are asked to move sideways; after SFT about half of them do."""
    command(tmp_path, "tools/make_demo_data.py", "--out", "data/demo")
    for name in ("stage1", "stage2", "stage3", "sft", "dpo_lora"):
        trained(tmp_path, name)
    command(tmp_path, "tools/convert_hf.py", "--ckpt", "runs/debug/dpo_lora/checkpoints", "--out", "exports/dpo_lora")
    given = ["--weights", "exports/dpo_lora", "--codec", "data/demo/codec.safetensors", "--text-encoder", "hash"]
    given += ["--prompts", "data/demo/prompts_sideways.txt", *SAMPLED.split(), "--out", "samples"]
    command(tmp_path, "tools/sample.py", *given)
    verdict = command(tmp_path, "tools/measure_motion.py", "--videos", "samples").splitlines()[-1]
    right, total = map(int, re.match(r"(\d+) of (\d+) move right", verdict).groups())
    assert total == 54 and right >= 0.8 * total, verdict
