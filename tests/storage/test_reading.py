"""Training on latents and text features that are in a real S3 server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import store
from tests.helpers.dataset import shard_dataset, write_config, write_dataset
from tests.helpers.distributed import free_port

ROOT = Path(__file__).parents[2]
SHAPE = (2, 6, 6)  # of the demo's clips
ROWS, BATCH, STEPS = 48, 16, 24  # an epoch is 3 steps; ds_configs/debug.json has 16 samples of a rank in a step


@pytest.fixture
def manifest(tmp_path, server, bucket) -> str:
    """The URL of a CSV, with all of its samples in shards beside it."""
    sharded = shard_dataset(write_dataset(tmp_path / "set", [SHAPE] * ROWS), range(ROWS), size=8)
    for file in [sharded, *sharded.parent.glob("*/*.*")]:
        store.put(server, f"{bucket}/set/{file.relative_to(sharded.parent)}", file.read_bytes())
    return f"{bucket}/set/{sharded.name}"


def train(config: Path, endpoint: str, copies: Path) -> None:
    """One process, as it is started by a launcher."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "MUGV_DS_CACHE": str(copies)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "mugv_ds/train.py"), "--config", str(config)],
        env=os.environ | store.environment(endpoint) | rank | address | own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_after_the_first_epoch_training_waits_less_than_a_hundredth_of_a_step(tmp_path, manifest, proxy):
    """The debug model, two loader workers and a cache, out of which the later epochs come."""
    config = write_config(
        tmp_path / "run",
        manifest,
        model={"preset": "mugdit_debug", "hidden_size": None, "num_heads": None},
        data={
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "num_workers": 2,
            "cache_dir": str(tmp_path / "cache"),
            "cache_gib": 1.0,
        },
        schedule={"steps": STEPS, "warmup_steps": 0},
        logging={"every": 3},
        checkpoint={"save_every": 0},
    )
    train(config, proxy.url, tmp_path / "copies")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    shares = {event.step: event.value for event in events.Scalars("speed/data_wait_share")}
    seconds = {event.step: event.value for event in events.Scalars("speed/seconds_per_step")}
    print({step: (f"{share:.4%}", f"{seconds[step]:.3f} s") for step, share in shares.items()})
    assert [*shares] == [*range(3, STEPS + 1, 3)]
    assert all(share < 0.01 for step, share in shares.items() if step > ROWS // BATCH), shares
    fetched = [path for method, path in proxy.seen if method == "GET" and ".safetensors" in path]
    assert len(fetched) < 4 * ROWS  # two workers are ahead by more than an epoch, and may both miss what is new
