"""The pieces of the parameters, and of the optimizer's state, that this rank owns, by published name.

With ZeRO-1 a rank owns pieces of the flat fp32 masters of its stage, which begin and end anywhere in a parameter; the
engine's optimizer knows which (`engine.distributed_optimizer.DistributedOptimizer.shards`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mugv_ds.checkpoint.manifest import WEIGHT, Counters


@dataclass(frozen=True)
class Fragment:
    """Elements `start` … `start + numel - 1` of one flattened parameter, and what belongs to them.

    Attributes:
        name: of the parameter, as published.
        start: first element. numel: their number.
        tensors: kind ("weight", "exp_avg" and, of AdamW, "exp_avg_sq") → fp32 [numel], views into what the optimizer
            works on.
    """

    name: str
    start: int
    numel: int
    tensors: dict[str, Tensor]


class Engine(Protocol):
    """A DeepSpeed engine with ZeRO-1 around a module that names its layers, as `parallel.pipeline.DiTPipeline` does."""

    module: Any
    optimizer: Any
    basic_optimizer: torch.optim.AdamW
    lr_scheduler: Any
    global_steps: int
    skipped_steps: int
    global_samples: int

    def train_batch_size(self) -> int: ...


def fragments(engine: Engine, prefix: str = "") -> list[Fragment]:
    """All fragments of this rank, in the order of the model. Moments that do not exist yet are made, as zeros.

    Parameters that the optimizer does not have, such as the base of adapters, have none.

    Args:
        prefix: put before the names of all its parameters.
    """
    return list(_fragments(engine, prefix))


def _fragments(engine: Engine, of_engine: str) -> Iterator[Fragment]:
    for prefix, layer in engine.module.named_layers():
        for name, parameter in layer.named_parameters():
            shard = engine.optimizer.shards.get(parameter)
            if shard is None:  # this rank owns nothing of it, or it is no parameter of the optimizer
                continue
            whole = {WEIGHT: shard.master} | engine.optimizer.moments(shard.master)
            tensors = {kind: t.detach().narrow(0, shard.offset, shard.numel) for kind, t in whole.items()}
            yield Fragment(of_engine + prefix + name, shard.start, shard.numel, tensors)


def read_counters(engine: Engine) -> Counters:
    """What the engine, its schedule and its optimizer have counted."""
    states = engine.basic_optimizer.state.values()
    return Counters(
        global_steps=engine.global_steps,
        skipped_steps=engine.skipped_steps,
        schedule_steps=engine.lr_scheduler.last_epoch,
        optimizer_steps=max((int(state["step"]) for state in states), default=0),
    )


def set_counters(engine: Engine, counters: Counters) -> None:
    """Sets what `read_counters` reads, and the learning rate that follows from the config's schedule.

    DeepSpeed counts a sample once for each of the ranks that share its sequence, so its number of samples is that of
    this layout.
    """
    optimizer, scheduler, taken = engine.basic_optimizer, engine.lr_scheduler, counters.schedule_steps
    engine.global_steps, engine.skipped_steps = counters.global_steps, counters.skipped_steps
    engine.global_samples = counters.global_steps * engine.train_batch_size()
    for state in optimizer.state.values():
        state["step"].fill_(counters.optimizer_steps)
    rates = [base * factor(taken) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict(
        scheduler.state_dict() | {"last_epoch": taken, "_step_count": taken + 1, "_last_lr": rates}
    )
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def refresh_weights(engine: Engine) -> None:
    """Rounds the masters to the weights that the model computes with, on all ranks. All ranks call it."""
    engine.optimizer.update_lp_params()
