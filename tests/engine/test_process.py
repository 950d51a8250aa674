"""What ranks tell one another on the host."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mugv_ds.config.errors import InputError, PeerError
from mugv_ds.engine.process import GlooGroup, HostGroup, StoreGroup
from tests.helpers.distributed import run_ranks

TIMEOUT = 3  # seconds, of the group


def wait_for_rank_0() -> None:
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    timeout = timedelta(seconds=TIMEOUT)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False, timeout=timeout)
    for host in (
        GlooGroup(dist.new_group(backend="gloo", timeout=timeout)),
        StoreGroup("test", dist.get_rank(), dist.get_world_size(), store),
    ):
        use(host)


def use(host: HostGroup) -> None:
    calls = []

    def build() -> int:
        if host.rank == 0:
            time.sleep(2 * TIMEOUT)
        calls.append(time.monotonic())
        return len(calls)

    assert host.first_then_all(build) == 1
    assert host.gather(calls[0]) == sorted(host.gather(calls[0])), "rank 0 is first"

    def fail() -> None:
        if host.rank == 0:
            raise InputError("no such manifest")

    with pytest.raises(InputError if host.rank == 0 else PeerError) as error:
        host.first_then_all(fail)
    assert error.value.status == 2
    assert host.first(lambda: {"a": [1]}) == {"a": [1]}
    assert host.gather(["ü", host.rank]) == [["ü", 0], ["ü", 1]]
    numbers = host.rows(torch.tensor([host.rank, 2.5], dtype=torch.float64))
    assert torch.equal(numbers, torch.tensor([[0, 2.5], [1, 2.5]], dtype=torch.float64))
    assert host.all(True) and not host.all(host.rank == 0)

    def only_on_rank_1() -> int:
        if host.rank == 1:
            raise InputError("only here")
        return 1

    with pytest.raises(InputError if host.rank == 0 else PeerError, match="rank 1: only here"):
        host.agree(only_on_rank_1, InputError)


@pytest.mark.long
@pytest.mark.regression
def test_rank_0_may_take_longer_than_a_collective(tmp_path):
    """An index of millions of rows took longer than the time-out, and the work was lost."""
    run_ranks(2, wait_for_rank_0)
