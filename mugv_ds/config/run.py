"""What the configs of all training runs have in common, as far as the engine asks for it."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from mugv_ds.config.operation_schema import PreflightSection
from mugv_ds.config.schema import (
    CheckpointSection,
    GuardSection,
    LoggingSection,
    OptimizerSection,
    ParallelSection,
    ScheduleSection,
)


class Precision(Protocol):
    """The section "model", of whatever model."""

    @property
    def dtype(self) -> Literal["bf16", "fp32"]: ...


class Reading(Protocol):
    """The section "data"."""

    seed: int
    num_workers: int
    global_batch_size: int


class Showing(Protocol):
    """The section "preview"."""

    every: int
    dir: str | None


class RunConfig(Protocol):
    """A training run: `schema.TrainConfig` of the DiT, or `vae_schema.VaeTrainConfig`."""

    model: Precision
    data: Reading
    optimizer: OptimizerSection
    schedule: ScheduleSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    preview: Showing
    guard: GuardSection
    preflight: PreflightSection
    deepspeed: dict[str, Any]

    @property
    def parallel(self) -> ParallelSection: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


def overview(config: RunConfig, own: Mapping[str, str]) -> str:
    """Returns what a run begins with on the terminal, a line each: how long it is, how it learns, where its files go.

    Args:
        config: the run. own: what comes before these lines and one kind of run knows alone: name → text.
    """
    logging, schedule, checkpoint, preview = config.logging, config.schedule, config.checkpoint, config.preview
    saved = f"every {checkpoint.save_every:,} steps" if checkpoint.save_every else "never"
    curves = ", ".join(logging.trackers) or "nowhere"
    rows = {
        **own,
        "steps": f"{schedule.steps:,} of {config.data.global_batch_size} samples",
        "learning rate": f"{schedule.kind}, {config.optimizer.lr:g} after {schedule.warmup_steps:,} steps of warm-up",
        "checkpoints": f"{checkpoint.dir}, {saved}",
        "curves": f"{logging.dir} ({curves}), every {logging.every:,} steps",
        "previews": f"every {preview.every:,} steps, to {preview.dir}" if preview.every else "none",
        "logs": f"{logging.dir}/rank<k>.log",
    }
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items())
