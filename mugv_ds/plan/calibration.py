"""What a machine was measured to do, as `tools/calibrate.py` writes it: JSON named after card and versions.

Every point is a median of some calls. Times are seconds, sizes are bytes, of one device, unless a field says otherwise.
Between points times are interpolated: see `Curve`.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.config.section import Section

MACHINES = "machines"  # folder of the calibrations that are shipped, beside this file
_MAX_FILE_BYTES = 1 << 22
_MAX_POINTS = 4096
_LEAST_SECONDS = 1e-9  # that a measurement counts as
_MEASURED = {
    *(
        "seconds",
        "forward_s",
        "backward_s",
        "host_forward_s",
        "host_backward_s",
        "kept_bytes",
        "peak_bytes",
        "adamw_s",
        "norm_s",
        "cast_s",
        "average_s",
    ),
    *("products_s", "collective_s", "both_s", "allocated_bytes", "reserved_bytes"),
}

Seconds = Annotated[float, Field(ge=0, le=1e6)]
Extent = Annotated[int, Field(ge=1, le=1 << 40)]  # rows, tokens, heads, elements, bytes
Name = Annotated[str, Field(min_length=1, max_length=200)]
Level = Literal["off", "light", "selective", "attention", "full"]
Collective = Literal["all_to_all", "all_reduce", "reduce_scatter", "all_gather", "send"]


class Machine(Section):
    """What was measured, and with what. memory_bytes: of a device, as the driver gives it. attention: the backend."""

    device: Name
    devices: Extent = Field(description="Of the host, that took part.")
    memory_bytes: Extent
    host_memory_bytes: Extent
    torch: Name
    cuda: Name | None
    triton: Name | None
    attention: Name


class BlockPoint(Section):
    """A block of some width on `batch` sequences of `tokens`, forward and backward, in bf16.

    Attributes:
        attention: whether self-attention ran; without it something that costs next to nothing took its place.
        forward_s, backward_s: of the device, which had not to wait for the host.
        host_forward_s, host_backward_s: in which the host launched them; 0 where device and host are the same.
        kept_bytes: what the forward pass leaves allocated, its output included. peak_bytes: the most that was allocated
            in both passes, gradients of weights and inputs included. Both are beyond what there was before.
    """

    width: Extent
    batch: Extent
    tokens: Extent
    level: Level
    attention: bool
    forward_s: Seconds
    backward_s: Seconds
    host_forward_s: Seconds = 0.0
    host_backward_s: Seconds = 0.0
    kept_bytes: Annotated[int, Field(ge=0)]
    peak_bytes: Annotated[int, Field(ge=0)]


class AttentionPoint(Section):
    """Self-attention alone: `heads` heads of 72 channels of `batch` sequences."""

    batch: Extent
    tokens: Extent
    heads: Extent
    forward_s: Seconds
    backward_s: Seconds


class ProductPoint(Section):
    """A linear over `rows` tokens: its forward pass, and its backward pass, which is two products."""

    rows: Extent
    width_in: Extent
    width_out: Extent
    forward_s: Seconds
    backward_s: Seconds


class EndsPoint(Section):
    """Embedders, final layer and flow loss, without a block between them. The seconds are those of `BlockPoint`."""

    width: Extent
    batch: Extent
    tokens: Extent
    forward_s: Seconds
    backward_s: Seconds
    host_forward_s: Seconds = 0.0
    host_backward_s: Seconds = 0.0


class CollectivePoint(Section):
    """A collective among `ranks` devices of one host.

    Attributes:
        bytes: of what one rank sends to all of its group (all_to_all, reduce_scatter), has (all_reduce), receives in
            all (all_gather), or sends to one other (send).
    """

    kind: Collective
    ranks: Annotated[int, Field(ge=2, le=1 << 16)]
    bytes: Extent
    seconds: Seconds


class CopyPoint(Section):
    """A copy between a device and pinned host memory, or on the device."""

    kind: Literal["to_host", "to_device", "on_device"]
    bytes: Extent
    seconds: Seconds


class OptimizerPoint(Section):
    """What a rank does with its shard in an optimizer step.

    Attributes:
        elements: of the shard. adamw_s: fused AdamW in fp32. norm_s: squared norm and scaling of its gradients.
        cast_s: weights to bf16. average_s: one average of the weights.
    """

    elements: Extent
    adamw_s: Seconds
    norm_s: Seconds
    cast_s: Seconds
    average_s: Seconds


class Overlap(Section):
    """Matrix products and a reduce-scatter, alone and at the same time: how many times longer the products take."""

    ranks: Annotated[int, Field(ge=2, le=1 << 16)]
    products_s: Seconds
    collective_s: Seconds
    both_s: Seconds


class Allocator(Section):
    """Bytes that PyTorch had allocated, and had reserved, at the peak of a block's passes."""

    allocated_bytes: Extent
    reserved_bytes: Extent


class Calibration(Section):
    """All that was measured of one kind of machine. What has no points was not measured there.

    Attributes:
        launch_s: of a kernel that does nothing. context_bytes: of the device that were taken outside of PyTorch's
            allocator.
    """

    machine: Machine
    blocks: tuple[BlockPoint, ...] = Field((), max_length=_MAX_POINTS)
    attention: tuple[AttentionPoint, ...] = Field((), max_length=_MAX_POINTS)
    products: tuple[ProductPoint, ...] = Field((), max_length=_MAX_POINTS)
    ends: tuple[EndsPoint, ...] = Field((), max_length=_MAX_POINTS)
    collectives: tuple[CollectivePoint, ...] = Field((), max_length=_MAX_POINTS)
    copies: tuple[CopyPoint, ...] = Field((), max_length=_MAX_POINTS)
    optimizer: tuple[OptimizerPoint, ...] = Field((), max_length=_MAX_POINTS)
    overlap: tuple[Overlap, ...] = Field((), max_length=_MAX_POINTS)
    allocator: tuple[Allocator, ...] = Field((), max_length=_MAX_POINTS)
    launch_s: Seconds | None = None
    context_bytes: Annotated[int, Field(ge=0)] | None = None

    def plus(self, section: str, point: Section) -> "Calibration":
        """Returns this with one more point of a section, which takes the place of the one of the same sizes."""
        others = tuple(other for other in getattr(self, section) if _sizes(other) != _sizes(point))
        return self.model_copy(update={section: (*others, point)})

    @property
    def name(self) -> str:
        """Returns what its file is called, without the suffix: card and version of PyTorch."""
        return machine_name(self.machine.device, self.machine.torch)

    def to_json(self) -> str:
        """Returns the content of its file."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def _sizes(point: Section) -> dict[str, object]:
    """What was measured at, without what was measured."""
    return point.model_dump(exclude={name for name in type(point).model_fields if name in _MEASURED})


def machine_name(device: str, torch_version: str) -> str:
    """Returns the name of a calibration: "NVIDIA H200", "2.11.0+cu130" → "nvidia-h200-torch2.11"."""
    card = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    return f"{card}-torch{'.'.join(torch_version.split('+')[0].split('.')[:2])}"


def shipped() -> list[str]:
    """Returns the names of the calibrations that come with the package, in order."""
    folder = files("mugv_ds.plan") / MACHINES
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_calibration(name: str | Path) -> Calibration:
    """Reads a calibration.

    Args:
        name: one of `shipped()`, or the path of a file.

    Raises:
        InputError: there is none, or it is not a calibration; one line that names file and key.
    """
    path = Path(name)
    if path.suffix != ".json":
        if name not in shipped():
            known = ", ".join(shipped()) or "none"
            raise InputError(f"calibration {name}: not shipped ({known} is); give one, or the path of a .json file")
        path = Path(str(files("mugv_ds.plan") / MACHINES / f"{name}.json"))
    text = read_text_file(path, _MAX_FILE_BYTES)
    try:
        return Calibration.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {key or 'content'}: {first['msg']}; make it anew with `make calibrate`") from None


def calibration_of(card: str | None, name: str | None = None) -> Calibration | None:
    """Returns the calibration to predict with.

    Args:
        card: of the machine, as the driver names it; the newest that is shipped of it is taken. None: of any machine,
            the first that is shipped. name: of the calibration, which is then taken.

    Raises:
        InputError: there is none of this name.
    """
    if name is not None:
        return load_calibration(name)
    wanted = "" if card is None else machine_name(card, "").rpartition("-torch")[0] + "-torch"
    known = [name for name in shipped() if name.startswith(wanted)]
    if not known:
        return None
    return load_calibration(known[0] if card is None else max(known, key=_version))


def _version(name: str) -> list[int]:
    return [int(number) for number in name.rpartition("-torch")[2].split(".") if number.isdecimal()]


class Curve:
    """Seconds by size, of what was measured at some sizes.

    Between two of them the seconds per unit are linear in the logarithms of both, so that time is a power of the size.
    Beyond the largest they stay; below the smallest the time does, as it is that of starting.

    Args:
        points: (size, seconds), all positive; of several of one size the mean counts.

    Raises:
        ValueError: there are no points.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        by_size: dict[float, list[float]] = {}
        for size, seconds in points:
            by_size.setdefault(size, []).append(seconds)
        if not by_size:
            raise ValueError("nothing was measured")
        self._sizes = sorted(by_size)
        self._logs = [math.log(size) for size in self._sizes]
        means = [max(sum(by_size[size]) / len(by_size[size]), _LEAST_SECONDS) for size in self._sizes]
        self._first = means[0]
        self._rates = [math.log(seconds / size) for size, seconds in zip(self._sizes, means, strict=True)]

    def __call__(self, size: float) -> float:
        """Returns the seconds that something of this size takes."""
        if size <= self._sizes[0]:
            return self._first
        if size >= self._sizes[-1]:
            return size * math.exp(self._rates[-1])
        at = bisect_right(self._sizes, size)
        log = math.log(size)
        share = (log - self._logs[at - 1]) / (self._logs[at] - self._logs[at - 1])
        return size * math.exp(self._rates[at - 1] + share * (self._rates[at] - self._rates[at - 1]))
