"""The learning rate as a share of its peak."""

import math

from mugv_ds.config.schema import ScheduleSection


def rate_factor(section: ScheduleSection, step: int) -> float:
    """Share of the peak rate at optimizer step `step`, counted from 0.

    Linear warm-up over `warmup_steps`, of which the last has the peak rate; then constant, or down to
    `final_lr_ratio` at step `steps`, in a straight line or as half a cosine (Loshchilov & Hutter 2017).
    """
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    if section.kind == "constant":
        return 1.0
    progress = min((step - section.warmup_steps) / max(section.steps - section.warmup_steps, 1), 1.0)
    remaining = 1 - progress if section.kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return section.final_lr_ratio + (1 - section.final_lr_ratio) * remaining
