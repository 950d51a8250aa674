"""What post-training does to the demo's videos, judged from their pixels; after SFT about half move right."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.distributed import free_port
from tests.helpers.launcher import ROOT

SAMPLED = "--frames 16 --height 48 --width 48 --fps 8 --output-fps 8 --shift 1.0 --batch 8 --repeat 3 --guidance 1"


def command(folder: Path, script: str, *arguments: str) -> str:
    """Runs a script of the repository in a folder; returns what it printed."""
    line = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(line, cwd=folder, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained(folder: Path, name: str, *settings: str) -> None:
    """Trains a debug config on two processes, as `make … PRESET=debug` does, without previews."""
    launch = ["--hostfile", str(ROOT / "hostfiles/localhost"), "--node_rank", "0", "--master_addr", "127.0.0.1"]
    launch += ["--master_port", str(free_port()), str(ROOT / "mugv_ds/train.py")]
    config = ["--config", str(ROOT / f"ds_configs/debug/{name}.json")]
    config += [part for setting in ("preview.every=0", *settings) for part in ("--set", setting)]
    command(folder, "tools/launch.py", *launch, *config)


def share_that_moves_right(folder: Path, name: str) -> float:
    """Samples a run's weights: 54 videos that are asked to move sideways."""
    command(folder, "tools/convert_hf.py", "--ckpt", f"runs/debug/{name}/checkpoints", "--out", f"exports/{name}")
    given = ["--weights", f"exports/{name}", "--codec", "data/demo/codec.safetensors", "--text-encoder", "hash"]
    given += ["--prompts", "data/demo/prompts_sideways.txt", *SAMPLED.split(), "--out", f"samples/{name}"]
    command(folder, "tools/sample.py", *given)
    verdict = command(folder, "tools/measure_motion.py", "--videos", f"samples/{name}").splitlines()[-1]
    right, total = map(int, re.match(r"(\d+) of (\d+) move right", verdict).groups())
    assert total == 54
    return right / total


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder with the demo's data and its runs up to SFT."""
    folder = tmp_path_factory.mktemp("demo")
    command(folder, "tools/make_demo_data.py", "--out", "data/demo")
    for name in ("stage1", "stage2", "stage3", "sft"):
        trained(folder, name)
    return folder


@pytest.mark.long
def test_four_of_five_videos_move_right_after_dpo_by_lora(demo):
    trained(demo, "dpo_lora")
    assert share_that_moves_right(demo, "dpo_lora") >= 0.8


@pytest.mark.long
def test_a_reward_for_moving_right_is_learned_in_ten_minutes_and_costs_neither_data_nor_diversity(demo):
    """By the clock, on two cores that have nothing else to do."""
    judge = {"name": "demo", "weights": {"right": 1.0}, "batch": 256}
    judge["command"] = ["python", str(ROOT / "tools/demo_reward.py")]
    begin = time.monotonic()
    trained(demo, "reward", f"reward.functions={json.dumps([judge])}")
    seconds = time.monotonic() - begin
    events = EventAccumulator(str(demo / "runs/debug/reward/tensorboard"))
    events.Reload()
    right, diversity, held_out = (
        [event.value for event in events.Scalars(tag)]
        for tag in ("reward/right", "reward/diversity", "validation/loss")
    )
    sampled = share_that_moves_right(demo, "reward")
    print(f"\n{seconds:.0f} s; right {right[0]:.3f} … {right[-5:]}, sampled {sampled:.3f}")
    print(f"diversity {diversity[0]:.3f} … {diversity[-1]:.3f}; held-out {held_out[0]:.4f} … {held_out[-1]:.4f}")
    assert 0.35 < right[0] < 0.65 and sum(right[-5:]) / 5 >= 0.95 and sampled >= 0.95
    assert held_out[-1] <= 1.02 * held_out[0]
    assert diversity[-1] >= 0.5 * diversity[0]  # left and right were part of it
    assert seconds < 600
