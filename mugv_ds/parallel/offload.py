"""Saved activations that wait for the backward pass in host memory.

Copies run on streams of their own, beside the computation: out as soon as something is kept, and back while the block
behind it, the one after it in the model, runs backward. Two blocks' activations are on the device at once, that which
is used and that which is on its way.
"""

import bisect
import weakref

import psutil
import torch
from torch import Tensor

from mugv_ds.config.errors import ConfigError
from mugv_ds.models.kept_attention import Held


class Offload:
    """Keeps tensors in host memory, pinned where there is a GPU; `keep` is a `models.kept_attention.Keep`.

    What is kept one after the other in a forward pass is taken back in reverse order.

    Args:
        device: that the tensors are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else None
        self._last: _Entry | None = None
        self._free: list[Tensor] = []  # host memory that is not in use, in ascending size

    def keep(self, tensors: tuple[Tensor, ...]) -> Held:
        """Starts to copy tensors to host memory; the result is called once, and gives them back on the device."""
        if self._last is not None:
            self._last.leave_device()
        self._last = _Entry(self, tensors, self._last)
        return self._last.take

    def to_host(self, tensors: list[Tensor]) -> "tuple[list[Tensor], torch.cuda.Event | None]":
        """Starts to copy contiguous tensors to host memory; returns the copies, as bytes, and when they are there."""
        copies = [self._host(tensor.numel() * tensor.element_size()) for tensor in tensors]
        pairs = [(copy[: x.numel() * x.element_size()], _as_bytes(x)) for copy, x in zip(copies, tensors, strict=True)]
        return copies, self._copy(pairs, 0)

    def to_device(self, copies: list[Tensor], like: list[Tensor]) -> "tuple[list[Tensor], torch.cuda.Event | None]":
        """Starts to copy them back; returns the tensors and when they are there. like: of their shapes, on "meta"."""
        tensors = [torch.empty_like(x, device=self._device) for x in like]
        pairs = [(_as_bytes(x), copy[: x.numel() * x.element_size()]) for x, copy in zip(tensors, copies, strict=True)]
        return tensors, self._copy(pairs, 1)

    def _copy(self, pairs: list[tuple[Tensor, Tensor]], stream: int) -> "torch.cuda.Event | None":
        if self._streams is None:
            for to, of in pairs:
                to.copy_(of)
            return None
        self._streams[stream].wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._streams[stream]):
            for to, of in pairs:
                to.copy_(of, non_blocking=True)
            return self._streams[stream].record_event()

    def wait(self, event: "torch.cuda.Event | None") -> None:
        """Has what is computed from now on wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def _host(self, size: int) -> Tensor:
        """Returns at least so many bytes of host memory."""
        fitting = bisect.bisect_left(self._free, size, key=len)
        if fitting < len(self._free):
            return self._free.pop(fitting)
        if self._free:
            self._free.pop()  # those that are too small make room: as many are in use as ever were
        return pinned(size) if self._streams is not None else torch.empty(size, dtype=torch.uint8)

    def give_back(self, copies: list[Tensor]) -> None:
        """Takes back host memory that is not in use any more."""
        for copy in copies:
            bisect.insort(self._free, copy, key=len)


class _Entry:
    """Tensors that were kept together, and those before them."""

    def __init__(self, offload: Offload, tensors: tuple[Tensor, ...], before: "_Entry | None") -> None:
        self._offload, self._before = offload, before
        self._tensors: list[Tensor] | None = [x.contiguous() for x in tensors]  # on the device
        self._like = [torch.empty_like(x, device="meta") for x in self._tensors]
        self._copies, self._event = offload.to_host(self._tensors)

    def leave_device(self) -> None:
        """Lets go of the tensors, once they are in host memory."""
        if self._tensors is not None:
            self._offload.wait(self._event)  # their memory is used again by what is computed from now on
            self._tensors = None

    def fetch(self) -> None:
        """Starts to bring the tensors back."""
        if self._tensors is None and self._copies is not None:
            self._tensors, self._event = self._offload.to_device(self._copies, self._like)

    def take(self) -> tuple[Tensor, ...]:
        """Returns the tensors, and has those before them fetched."""
        self.fetch()
        self._offload.wait(self._event)
        self._offload.give_back(self._copies)
        tensors, before = tuple(self._tensors), self._before
        self._tensors = self._copies = self._before = None
        if before is not None:
            before.fetch()
        return tensors


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def pinned(size: int) -> Tensor:
    """Returns so many bytes of pinned host memory; PyTorch's own allocator would round them up to a power of two."""
    memory = torch.empty(size, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
    return memory


def check_host_memory(needed: float, processes: int) -> None:
    """Checks that a host has the memory that its processes will keep activations in.

    Args:
        needed: bytes of a process, see `plan.predict.predict_host_memory`. processes: of this run on the host.

    Raises:
        ConfigError: it has not.
    """
    available = psutil.virtual_memory().available
    if needed * processes > available:
        raise ConfigError(
            f"parallel.offload: {processes} processes of this host need {needed * processes / 2**30:.1f} GiB of its "
            f"memory, of which {available / 2**30:.1f} are available; spread the run over more hosts, or set it to "
            "attention_output or none"
        )
