"""The sections of a config that are about a run's operation: the checks before it, and what is watched in it."""

from typing import Annotated

from pydantic import Field

from mugv_ds.config.section import Section, Share, StepsOrNever


class PreflightSection(Section):
    """Bounds of the checks before a run (`tools/preflight.py`, `guard.preflight`). All values are ours."""

    calibrated_share: Share = Field(
        0.8,
        description="Least share of the calibrated speed of a card (matrix product, copies, all-to-all and all-reduce "
        "of a host's ranks), where a calibration of it is shipped.",
    )
    median_share: Share = Field(
        0.8,
        description="Least share of the median rank's speed, for what is not calibrated, and of its GPU's clock at "
        "work. On CPUs that do other work too it may have to be less.",
    )
    free_memory_share: Share = Field(0.9, description="Least share of a GPU's memory that is free; of a CPU none.")
    xid_hours: float = Field(
        24.0,
        gt=0,
        le=10**4,
        description="Xid errors that the kernel logged of a GPU in the last so many hours count; those that programs "
        "cause (13, 31, 43, 45) do not.",
    )
    clock_skew_s: float = Field(
        1.0, gt=0, le=10**6, description="Most seconds that the clock of a rank's host is off the median rank's."
    )
    checkpoint_mib: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        64, description="MiB that each rank writes to checkpoint.dir, all at once, and removes."
    )
    checkpoint_mib_s: float = Field(
        20.0, ge=0, le=10**6, description="Least MiB a second that each rank then writes; 0: any."
    )
    timeout_s: float = Field(
        60.0,
        ge=1,
        le=24 * 3600,
        description="Seconds that a single check may take, after which the ranks that hold it up are named.",
    )


class MonitorSection(Section):
    """What is watched in the model as it trains, and the bounds above which it is an incident. All values are ours.

    Of a monitored step the first micro-batch of each data rank is looked at, and the largest value among them counts.
    """

    every: StepsOrNever = Field(
        100, description="Steps between monitored steps; 0: none. The steps between them cost nothing."
    )
    tokens: Annotated[int, Field(ge=1, le=1 << 14)] = Field(
        256,
        description="Tokens, evenly spread over the first sample's sequence, whose queries and keys are compared, all "
        "with all.",
    )
    max_activation: float = Field(
        10_000.0,
        gt=0,
        le=1e38,
        description="Largest |x| of the residual stream after a block, of all tokens and channels (massive "
        "activations, arXiv 2510.11538).",
    )
    max_channel_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Largest share of the residual stream's energy Σx² in a single channel, after a block "
        "(arXiv 2510.11538); 1: no alarm.",
    )
    max_mean_share: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Largest share of the residual stream's energy in the mean over a sample's tokens, after a block "
        "(collapse, arXiv 2605.06169); 1: no alarm.",
    )
    max_logit: float = Field(
        100.0,
        gt=0,
        le=1e38,
        description="Largest q·k/√72 of self-attention before its softmax, of the sampled tokens, over heads.",
    )
