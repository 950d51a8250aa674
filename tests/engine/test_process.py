"""How a process joins its run: the time-outs of its groups, its limit of open files, what the launcher tells it."""

import json
import resource
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mugv_ds.config import InputError, PeerError, Status, load_config
from mugv_ds.config.environment import read_environment
from mugv_ds.config.errors import ConfigError
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.process import HostGroup, raise_file_limit, start_process
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.distributed import run_ranks

ROOT = Path(__file__).parents[2]
GOOD = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def list_timeouts(config: Path) -> None:
    """Every rank writes the time-outs of all its groups, in seconds."""
    loaded = load_config(config)
    build_engine(loaded, start_process(loaded), shape=(2, 4, 6))
    groups = dist.distributed_c10d._world.pg_map
    seconds = [group._get_backend(torch.device("cpu")).options._timeout / timedelta(seconds=1) for group in groups]
    (config.parent / f"timeouts-{dist.get_rank()}").write_text(json.dumps(seconds))


def test_every_group_takes_the_timeout_of_the_config(tmp_path):
    """Also those that DeepSpeed makes, and those of a sequence: five minutes more than the watchdog's."""
    parallel = {"data": 1, "sequence": 2, "pipeline": 2}
    manifest = write_dataset(tmp_path / "data", [(2, 4, 6)] * 4)
    run_ranks(4, list_timeouts, write_config(tmp_path, manifest, parallel=parallel, guard={"timeout_s": 4321.0}))
    for rank in range(4):
        seconds = json.loads((tmp_path / f"timeouts-{rank}").read_text())
        # The default one, two for the host, the sequence's; the others are DeepSpeed's.
        assert len(seconds) > 4 and set(seconds) == {4321.0 + 300.0}, seconds


def fail_differently() -> None:
    """Rank 0 finds the input wrong, rank 1 cannot go on, rank 2 fails at nothing."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    failure = [InputError("wrong"), ZeroDivisionError(), None][rank]
    with pytest.raises((InputError, ZeroDivisionError, PeerError)) as caught:
        HostGroup(dist.group.WORLD).raise_together(failure)
    assert isinstance(caught.value, PeerError) == (rank == 2) and caught.value.status == Status.FAILED


def test_the_worst_status_of_several_failures_counts_on_all_ranks():
    run_ranks(3, fail_differently)


def test_the_limit_of_open_files_is_raised():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(before[1], 65_536), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"RANK": None, "MASTER_PORT": ""}, "RANK, MASTER_PORT: not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': must be a whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK = '-1': must be a whole number"),
        ({"RANK": "2"}, "RANK = 2: must be below WORLD_SIZE = 2"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT = 70000: must be 1..65535"),
    ],
)
def test_what_the_launcher_says_is_checked(monkeypatch, change, complaint):
    for name, value in (GOOD | change).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=complaint):
        read_environment()


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("MASTER_PORT", None), ("MASTER_PORT", "taken")])
def test_a_launch_that_cannot_be_ends_with_one_line(tmp_path, monkeypatch, name, value):
    config = write_config(tmp_path, write_dataset(tmp_path / "data", [(2, 4, 6)] * 4))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
        environment = GOOD | alone | {name: str(taken.getsockname()[1]) if value == "taken" else value}
        for key, text in environment.items():
            monkeypatch.setenv(key, text) if text is not None else monkeypatch.delenv(key, raising=False)
        command = [sys.executable, "mugv_ds/train.py", "--config", str(config)]
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert name in error
