"""Batch sizes: how many samples of each latent shape a step holds, and how many a data rank holds at once.

Samples of different shapes cost very different time and memory, so with a budget a step holds as many of a shape as
cost what a step of the reference shape costs.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import DataSection
from mugv_ds.data.manifest import Shape

_TOLERANCE = 0.03  # how far the cost of a step may be off, so that its samples split into equal micro-batches
_SPLITS = 2**4 * 3**2 * 5 * 7  # a number of samples splits the better, the larger its common divisor with this


@dataclass(frozen=True)
class Workload:
    """What a sample costs, and how many ranks share the cost.

    Attributes:
        tokens: tokens of a sample that one device holds, as a function of the latent shape.
        cost: of a sample's forward and backward pass, in FLOPs or in seconds, as a function of the latent shape.
        data_ranks: number of data-parallel replicas that share a step.
    """

    tokens: Callable[[Shape], int]
    cost: Callable[[Shape], float]
    data_ranks: int


@dataclass(frozen=True)
class BatchSize:
    """The batch sizes of one shape, in items (samples, or pairs).

    Attributes:
        step: items of a global step.
        micro: items that a data rank holds at once (a micro-batch).
    """

    step: int
    micro: int


def batch_sizes(
    shapes: Iterable[Shape],
    data: DataSection,
    load: Workload,
    *,
    item_size: int = 1,
    companions: Callable[[int], int] = lambda samples: 0,
) -> dict[Shape, BatchSize]:
    """Returns the batch sizes of each shape. Those of a step depend on the config alone, not on the layout.

    Args:
        shapes: latent (T, H, W).
        data: section of the config.
        load: what a sample costs.
        item_size: number of samples that stay together: 2 for pairs.
        companions: number of SFT samples that accompany a step of so many samples; they are split into micro-batches
            of the same size.

    Raises:
        ConfigError: a step cannot be split evenly over the data ranks, or one item is more than a device may hold.
    """
    return {shape: _batch_size(shape, data, load, item_size, companions) for shape in shapes}


def _batch_size(
    shape: Shape, data: DataSection, load: Workload, item_size: int, companions: Callable[[int], int]
) -> BatchSize:
    budget, ranks = data.budget, load.data_ranks
    most = data.micro_batch_size // item_size
    if data.micro_batch_size % item_size or data.global_batch_size % item_size:
        raise ConfigError(
            f"data.micro_batch_size = {data.micro_batch_size}, data.global_batch_size = {data.global_batch_size}: must "
            f"be multiples of {item_size}, as pairs stay together"
        )
    step = data.global_batch_size // item_size
    if budget is not None:
        if budget.multiple % ranks:
            raise ConfigError(f"data.budget.multiple = {budget.multiple}: must be a multiple of the {ranks} data ranks")
        wanted = step * load.cost(budget.shape) / load.cost(shape)
        step = _divisible(wanted / budget.multiple) * budget.multiple
        tokens = item_size * load.tokens(shape)
        if tokens > budget.device_tokens:
            raise ConfigError(
                f"data.budget.device_tokens = {budget.device_tokens}: latents of {'×'.join(map(str, shape))} take "
                f"{tokens:,} tokens a device; raise it, raise parallel.sequence, or leave such rows out"
            )
        most = min(most, budget.device_tokens // tokens)
    elif step % (ranks * most):
        raise ConfigError(
            f"data.global_batch_size = {data.global_batch_size}: must be a multiple of {ranks} data ranks × "
            f"data.micro_batch_size {data.micro_batch_size}"
        )
    more = companions(step * item_size)
    sizes = (size for size in range(most, 0, -1) if not step % (ranks * size) and not more % (ranks * size * item_size))
    micro = next(sizes, None)
    if micro is None:
        raise ConfigError(
            f"preference.sft_ratio or reward.data_ratio: gives {more} SFT samples beside {step * item_size}, which "
            f"{ranks} data ranks with micro-batches of multiples of {item_size} cannot share evenly; use another ratio"
        )
    return BatchSize(step, micro)


def _divisible(wanted: float) -> int:
    """Returns the whole number within 3% of `wanted` that splits into equal parts best, whatever the layout.

    A prime number of samples would force micro-batches of one, however many a device holds. Where no whole number lies
    that near, it is the nearest one from 1 on.
    """
    near = range(math.ceil(wanted * (1 - _TOLERANCE)), math.floor(wanted * (1 + _TOLERANCE)) + 1)
    nearest = max(round(wanted), 1)
    return max(near, key=lambda n: (math.gcd(n, _SPLITS), -abs(n - wanted)), default=nearest)
