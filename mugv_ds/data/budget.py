"""How many samples of each latent shape a step holds, and how many a data rank holds at once."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import DataSection
from mugv_ds.data.manifest import Shape

_TOLERANCE = 0.03  # by which the cost of a step may be off, so that its samples split well
_SPLITS = 2**4 * 3**2 * 5 * 7


@dataclass(frozen=True)
class Workload:
    """What a sample asks of the machine.

    Attributes:
        tokens: of a sample on one device, by latent shape.
        flops: of a sample's forward and backward pass, by latent shape.
        data_ranks: replicas that share a step.
    """

    tokens: Callable[[Shape], int]
    flops: Callable[[Shape], float]
    data_ranks: int


@dataclass(frozen=True)
class BatchSize:
    """Of one shape. step: items (samples, or pairs) of a global step. micro: items that a data rank holds at once."""

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
    """The batch sizes of each shape; those of a step do not depend on the layout.

    Args:
        shapes: latent (T, H, W). data: the config. load: of the samples.
        item_size: samples that stay together: 2 for pairs.
        companions: more samples of a step that has so many, which are split into micro-batches of the same size.

    Raises:
        ConfigError: a step cannot be split evenly, or one item is more than a device may hold.
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
        wanted = step * load.flops(budget.shape) / load.flops(shape)
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
            f"preference.sft_ratio: gives {more} SFT samples beside {step * item_size}, which {ranks} data ranks with "
            f"micro-batches of multiples of {item_size} cannot share evenly; use another ratio"
        )
    return BatchSize(step, micro)


def _divisible(wanted: float) -> int:
    """The whole number from 1 near `wanted` that splits into the most equal parts; the layout does not enter.

    A prime number of samples could only be read one by one, however many a device holds.
    """
    near = range(math.ceil(wanted * (1 - _TOLERANCE)), math.floor(wanted * (1 + _TOLERANCE)) + 1)
    nearest = max(round(wanted), 1)
    return max(near, key=lambda n: (math.gcd(n, _SPLITS), -abs(n - wanted)), default=nearest)
