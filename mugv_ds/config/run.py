"""What the configs of all training runs have in common, as far as the engine asks for it."""

from typing import Any, Literal, Protocol

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


class Showing(Protocol):
    """The section "preview"."""

    every: int


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
    deepspeed: dict[str, Any]

    @property
    def parallel(self) -> ParallelSection: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...
