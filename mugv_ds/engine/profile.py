"""Where the time of one training step goes, by torch.profiler."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from mugv_ds.config.schema import LoggingSection
from mugv_ds.engine.process import Process

logger = logging.getLogger(__name__)


@contextmanager
def profiled(section: LoggingSection, step: int, process: Process) -> Iterator[None]:
    """Profiles what runs inside if `step`, counted from 1, is the config's `profile_step` and this is rank 0.

    Writes `profile_step_<N>.txt`, a table of operations and kernels by their own time on the CUDA device (on the CPU
    where there is none), and `profile_step_<N>.json.gz`, a Chrome trace, to `logging.dir`. A run does not end because
    they cannot be written: a warning says why.
    """
    if step != section.profile_step or process.rank != 0:
        yield
        return
    on_cuda = process.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        yield
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    path = Path(section.dir) / f"profile_step_{step}.txt"
    try:
        path.write_text(profiler.key_averages().table(sort_by=key, row_limit=-1, max_name_column_width=80))
        profiler.export_chrome_trace(str(path.with_suffix(".json.gz")))
    except (OSError, RuntimeError) as error:
        logger.warning("the profile of step %d could not be written: %s", step, error)
