"""The recompute level "auto": that of each block, so that a device is filled and the step is the fastest."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from mugv_ds.config.errors import InputError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.models.flops import recomputed_flops
from mugv_ds.models.kept_attention import ON_GPU
from mugv_ds.plan.cost import Runs, Setup, Stage, blocks_pass, piece_of
from mugv_ds.plan.memory import GIB, KEPT, usable_bytes
from mugv_ds.plan.steps import Bucket
from mugv_ds.plan.timing import Timing


def usable_levels(config: TrainConfig, keeping: Sequence[str] = tuple(ON_GPU)) -> list[str]:
    """Returns the levels that the config's attention can run.

    Args:
        keeping: backends of self-attention that give a log-sum-exp.
    """
    gives = config.model.attention == "auto" or config.model.attention in keeping
    return [level for level in KEPT if level != "attention" or gives]


def with_levels(config: TrainConfig, levels: Sequence[str]) -> TrainConfig:
    """Returns the config with these levels of its blocks in the place of "auto"."""
    value = levels[0] if len(set(levels)) == 1 else list(levels)
    parallel = config.parallel.model_copy(update={"activation_checkpointing": value, "memory_gib": None})
    return config.model_copy(update={"parallel": parallel})


def fill_device(
    config: TrainConfig,
    setup: Setup,
    buckets: Sequence[Bucket],
    memory: float | None,
    timing: Timing | None,
    keeping: Sequence[str] = tuple(ON_GPU),
) -> tuple[str, ...]:
    """Chooses the level of each block by `parallel.memory_gib`, or else by what a run can allocate of a device.

    Args:
        memory: bytes of a device; None where there is no bound. The others: see `choose_levels`, `usable_levels`.
    """
    gib, devices = config.parallel.memory_gib, setup.layout.world_size
    limit = gib * GIB if gib is not None else math.inf if memory is None else usable_bytes(memory, devices)
    levels = usable_levels(config, keeping)
    try:
        return choose_levels(setup, buckets, levels, limit, timing)
    except InputError:  # the calibration does not say how so many devices exchange
        return choose_levels(setup, buckets, levels, limit, None)


def choose_levels(
    setup: Setup, buckets: Sequence[Bucket], levels: Sequence[str], limit: float, timing: Timing | None
) -> tuple[str, ...]:
    """Chooses the level of each block.

    All blocks of a stage cost the same, so that two levels are enough: the time that is saved for the memory that is
    taken is the best on one edge of the convex hull of the levels. The blocks that keep less come first: they run
    backward last, when those that keep more have let go of it.

    Args:
        setup: whose own levels are not looked at. buckets: kinds of steps. levels: to choose among.
        limit: bytes of a device. timing: of the machine; None takes the products that run again for the time.
    Returns:
        The level of each block of the model; those that take the least where nothing fits.
    """
    seconds = {level: _seconds(setup, buckets, level, timing) for level in sorted(levels, key=KEPT.get, reverse=True)}
    chosen = (_of_stage(setup, stage, buckets, seconds, limit) for stage in setup.stages)
    return tuple(level for runs in chosen for level, count in runs for _ in range(count))


def _seconds(setup: Setup, buckets: Sequence[Bucket], level: str, timing: Timing | None) -> float:
    """Returns what a block takes in the mean step, up to what all levels share; FLOPs where there is no timing."""
    if timing is None:
        sizes = ((bucket, (setup.dit, bucket.tokens, setup.text_tokens)) for bucket in buckets)
        return sum(b.share * b.micro * b.accumulation * recomputed_flops(*size, level) for b, size in sizes)
    passes = ((b, blocks_pass(setup, ((level, 1),), piece_of(setup, b), timing)) for b in buckets)
    return sum(b.share * b.accumulation * (forward.total + backward.total) for b, (forward, backward) in passes)


def _of_stage(setup: Setup, stage: Stage, buckets: Sequence[Bucket], seconds: dict[str, float], limit: float) -> Runs:
    def peak(runs: Runs) -> float:
        return setup.memory(stage, buckets, runs).peak

    fitting = list(_fullest(stage.blocks, list(seconds), lambda runs: peak(runs) <= limit))
    if not fitting:
        return min((((level, stage.blocks),) for level in seconds), key=peak)
    return min(fitting, key=lambda runs: (sum(count * seconds[level] for level, count in runs), peak(runs)))


def _fullest(blocks: int, levels: Sequence[str], fits: Callable[[Runs], bool]) -> Iterator[Runs]:
    """Yields each level by itself and each two of them, with as many blocks of that which keeps more as fit.

    Args:
        levels: those that keep the most first.
    """
    alone = {level: fits(((level, blocks),)) for level in levels}
    yield from (((level, blocks),) for level in levels if alone[level])
    for more, less in combinations(levels, 2):
        if alone[more] or not alone[less]:
            continue
        low, high = 0, blocks  # so many fit, and so many do not
        while high - low > 1:
            middle = (low + high) // 2
            if fits(((less, blocks - middle), (more, middle))):
                low = middle
            else:
                high = middle
        if low:
            yield (less, blocks - low), (more, low)
