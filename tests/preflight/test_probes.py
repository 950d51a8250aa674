"""What ranks measure together, on hosts of unequal size."""

from pathlib import Path

import torch
import torch.distributed as dist

from mugv_ds.preflight.probes import LABELS, Probes
from tests.helpers.distributed import run_ranks

HOSTS = [[0, 1], [2]]


def measure(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    probes = Probes(rank, HOSTS, torch.device("cpu"))
    torch.save({name: probe() for name, probe in probes.all().items()}, out / f"rank{rank}.pt")


def test_all_ranks_measure_the_same_and_take_part_where_they_can(tmp_path):
    run_ranks(3, measure, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(3)]
    names = set(LABELS) - {"to_host", "to_device"}  # which on a CPU are copies on the device
    assert all(rank.keys() == names for rank in ranks)
    on_host = {"host_exchange", "host_all_to_all", "host_all_reduce"}
    assert {name for name, rate in ranks[2].items() if rate is None} == on_host  # it is alone there
    assert {name for name, rate in ranks[1].items() if rate is None} == {"exchange"}  # no other host has a second rank
    assert ranks[0]["host_all_reduce"] == ranks[1]["host_all_reduce"]
    assert len({rank["all_to_all"] for rank in ranks}) == 1
    assert all(rate > 0 for rank in ranks for rate in rank.values() if rate is not None)
