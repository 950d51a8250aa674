"""A copy of the tensors that a checkpoint saves, in host memory, so that training can go on while it is written."""

from collections.abc import Mapping

import torch
from torch import Tensor

_ALIGNMENT = 8  # bytes; of every copy, so that it can be seen as any dtype


class HostMemory:
    """A buffer that is kept from copy to copy; its pages are locked, so that copies from a GPU run at full speed."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._locked = False

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors; they are valid until the next call."""
        sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        if self._buffer.numel() != sum(sizes):
            self.release()
            self._buffer = torch.empty(sum(sizes), dtype=torch.uint8)
            if on_gpu and sizes:
                # Not pin_memory=True, which takes the next power of two.
                cuda = torch.cuda.cudart()
                torch.cuda.check_error(cuda.cudaHostRegister(self._buffer.data_ptr(), self._buffer.nbytes, 0))
                self._locked = True
        copies, offset = {}, 0
        for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
            copies[name] = self._buffer[offset : offset + tensor.nbytes].view(tensor.dtype)
            copies[name].copy_(tensor, non_blocking=True)
            offset += size
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def release(self) -> None:
        """Frees the buffer; copies are no longer valid."""
        if self._locked:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr()))
            self._locked = False
        self._buffer = torch.empty(0, dtype=torch.uint8)


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity."""
    if not tensors:
        return None
    # Least and largest pass a NaN on, and take one pass over the tensor and no memory.
    ends = torch.stack([torch.stack(torch.aminmax(tensor)) for tensor in tensors.values()])
    finite = ends.isfinite().all(dim=1).tolist()  # waits once
    return next((name for name, good in zip(tensors, finite, strict=True) if not good), None)
