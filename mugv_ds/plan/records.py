"""What real runs took: records that predictions are held to, and the scalars and profiles that a run leaves.

`kernels/bench/plan_runs.py` writes records, `tools/plan.py --validate` and a test read them.
"""

import gzip
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular, read_text_file
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.section import Section, Size
from mugv_ds.models.rope import patch_grid

_MAX_RECORD_BYTES = 1 << 20
_MAX_TRACE_BYTES = 1 << 30  # of a profile, unpacked
_Seconds = Annotated[float, Field(ge=0, le=1e6)]
_Gib = Annotated[float, Field(ge=0, le=1e6)]
_Name = Annotated[str, Field(min_length=1, max_length=200)]

# The term of a prediction that a kernel belongs to, by its name; the first that fits.
KERNELS = (
    (
        "attention backward",
        r"PipelinedBackward|FlashAttentionBackward|flash_bwd|fmha_cutlassB|[Pp]reprocess|[Pp]ostprocess",
    ),
    ("attention forward", r"FlashAttentionForward|flash_fwd|fmha_cutlassF|cudnn"),
    ("products", r"nvjet|gemm|Gemm|cutlass_80|cublas|splitK"),
    ("reduction and gather", r"nccl.*(ReduceScatter|AllGather|AllReduce)"),
    ("exchange", r"nccl"),
    ("optimizer", r"adam|Adam|lerp"),
    ("offload", r"Memcpy (DtoH|HtoD)"),
)
REST = "kernels"  # the term of all others


class RunMachine(Section):
    """Where a run ran, and with what."""

    device: _Name
    devices: Annotated[int, Field(ge=1, le=1 << 16)]
    torch: _Name
    cuda: _Name | None
    triton: _Name | None
    deepspeed: _Name
    commit: _Name | None


class Measured(Section):
    """What a run took.

    Attributes:
        step_seconds: median of the steps that count. steps: seconds of all, the first ones and a profiled one too.
        peak_gib: largest allocation of any rank in a step that counts. reserved_gib: what PyTorch had reserved then.
        host_gib: resident host memory of a process of the run at most, pinned memory included. pinned_gib: what
            PyTorch's own allocator pinned of it. None: not measured.
        data_wait_seconds: of a step, at most. losses: of each step.
        kernels: seconds of a profiled step's kernels on one rank, by the term of a prediction; empty: none was.
    """

    step_seconds: _Seconds
    steps: tuple[_Seconds, ...] = Field(max_length=1000)
    peak_gib: _Gib | None
    reserved_gib: _Gib
    host_gib: _Gib | None
    pinned_gib: _Gib
    data_wait_seconds: _Seconds
    losses: tuple[float, ...] = Field(max_length=1000)
    kernels: dict[str, _Seconds] = Field({}, max_length=100)


class RunRecord(Section):
    """One run that a prediction can be held to.

    Attributes:
        config: what was set, merged and complete: `TrainConfig` takes it. world_size: processes.
        shape: latent (T, H, W) of all samples.
    """

    name: _Name
    config: dict[str, Any]
    world_size: Annotated[int, Field(ge=1, le=1 << 16)]
    shape: tuple[Size, Size, Size]
    machine: RunMachine
    measured: Measured

    @property
    def tokens(self) -> int:
        """Returns those of a sample."""
        return patch_grid(*self.shape).tokens

    def train_config(self) -> TrainConfig:
        """Returns the config of the run.

        Raises:
            InputError: it is none; the message names the record.
        """
        try:
            return TrainConfig.model_validate_json(json.dumps(self.config))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise InputError(f"record {self.name}: config.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def to_json(self) -> str:
        """Returns the content of the record's file."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def read_record(path: Path) -> RunRecord:
    """Reads a record.

    Raises:
        InputError: it is none; one line that names file and key.
    """
    try:
        return RunRecord.model_validate_json(read_text_file(path, _MAX_RECORD_BYTES))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; not a record of a run") from None


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads what a run wrote for TensorBoard: tag → (step, value) in order.

    Raises:
        InputError: there are no scalars.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    if not scalars:
        raise InputError(f"{folder}: no TensorBoard scalars in it; name the run's logging.dir")
    return scalars


def steady(steps: Iterable[float]) -> float:
    """Returns the median of the steps from the third on, as the first ones compile; of fewer the last."""
    return statistics.median(later(list(steps)))


def later(values: Sequence[float]) -> Sequence[float]:
    """Returns those of the steps from the third on; of fewer the last."""
    return values[2:] or values[-1:]


def kernel_seconds(trace: Path) -> dict[str, float]:
    """Sums the kernels of a profile (`profile_step_<N>.json.gz`) by the term of a prediction that they belong to.

    Cross-attention runs the kernels of self-attention: of one name all that take less than half of the longest count
    among the rest.

    Raises:
        InputError: it is no profile.
    """
    try:
        with open_regular(trace) as file, gzip.open(file) as unpacked:
            text = unpacked.read(_MAX_TRACE_BYTES + 1)
        if len(text) > _MAX_TRACE_BYTES:
            raise InputError(f"{trace}: more than {_MAX_TRACE_BYTES:,} bytes; profile a shorter step")
        events = json.loads(text)["traceEvents"]
        kernels = [
            (str(event["name"]), float(event["dur"]) / 1e6)
            for event in events
            if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{trace}: not a profile: {error}") from None
    longest: dict[str, float] = {}
    for name, seconds in kernels:
        kind = _kind(name)
        longest[kind] = max(longest.get(kind, 0.0), seconds)
    sums: dict[str, float] = {}
    for name, seconds in kernels:
        kind = _kind(name)
        if kind.startswith("attention") and "rocess" not in name and seconds < 0.5 * longest[kind]:
            kind = REST
        sums[kind] = sums.get(kind, 0.0) + seconds
    return sums


def _kind(kernel: str) -> str:
    return next((kind for kind, pattern in KERNELS if re.search(pattern, kernel)), REST)
