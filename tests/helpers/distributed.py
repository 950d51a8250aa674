"""Runs a function in several real processes, as the launcher would start them."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mugv_ds.checkpoint.fragments import fragments

TIME_OUT = timedelta(minutes=3)


def run_ranks(world_size: int, function: Callable, *args) -> None:
    """Calls `function(*args)`, a function of a test module, in `world_size` processes (gloo) and waits for all.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed; the message holds its traceback.
    """
    mp.start_processes(_start, (world_size, free_port(), function, args), nprocs=world_size, start_method="forkserver")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def set_environment(rank: int, world_size: int, port: int) -> None:
    """Makes this process a rank of a launch on this host, as the launcher's environment does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _start(rank: int, world_size: int, port: int, function: Callable, args: tuple) -> None:
    set_environment(rank, world_size, port)
    torch.set_num_threads(max((os.cpu_count() or 1) // world_size, 1))  # as in a run; more wait for one another
    try:
        function(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def whole_state(engine, kind: str) -> dict[str, torch.Tensor]:
    """Puts together what all ranks hold of "weight", "exp_avg" or "exp_avg_sq" of this stage's trained parameters."""
    own = {fragment.name: fragment for fragment in fragments(engine)}
    whole = {}
    for prefix, layer in engine.module.named_layers():
        for name, parameter in layer.named_parameters():
            if not parameter.requires_grad:
                continue
            flat = torch.zeros(parameter.numel())
            if (fragment := own.get(prefix + name)) is not None:
                flat[fragment.start : fragment.start + fragment.numel] = fragment.tensors[kind]
            dist.all_reduce(flat, group=engine.optimizer.dp_process_group)
            whole[prefix + name] = flat.view(parameter.shape)
    return whole
