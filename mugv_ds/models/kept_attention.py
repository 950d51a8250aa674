"""Self-attention whose output and log-sum-exp are kept from the forward pass, so that a block runs again without it.

A flash backward pass needs q, k, v, o and the log-sum-exp of the softmax (Dao 2023, FlashAttention-2, algorithm 2). The
first three are made again cheaply, by products that grow with the tokens; the other two cost a forward pass, which
grows with their square. So they are kept, and the operator that runs again takes them instead of computing them.

Shape suffixes: B batch, N tokens, H heads, d = 72 head dimension.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from mugv_ds.config.errors import ConfigError

Held = Callable[[], tuple[Tensor, ...]]  # gives back what was kept, once
Keep = Callable[[tuple[Tensor, ...]], Held]  # keeps tensors for the backward pass


def on_device(tensors: tuple[Tensor, ...]) -> Held:
    """Keeps tensors where they are."""
    return lambda: tensors


class Statistics(Protocol):
    """An attention backend with its forward and backward pass apart.

    The tensors are laid out as in `attention.PackedAttention.packed`: qkv [B, N, 3, H, 72], of which the first `tokens`
    tokens take part.
    """

    def forward(self, qkv: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Returns o [B, N, H, 72], zero for padding, and the log-sum-exp, whose shape is the backend's own."""

    def backward(self, do: Tensor, qkv: Tensor, o: Tensor, log_sum: Tensor, tokens: int) -> Tensor:
        """Returns the gradient of qkv, zero for padding."""


class Flash4Statistics:
    """FlashAttention-4, see `mugv_kernels.flash4`."""

    def forward(self, qkv: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        from mugv_kernels.flash4 import packed_forward

        return packed_forward(qkv, tokens)

    def backward(self, do: Tensor, qkv: Tensor, o: Tensor, log_sum: Tensor, tokens: int) -> Tensor:
        from mugv_kernels.flash4 import packed_backward

        return packed_backward(do, qkv, o, log_sum, tokens)


class AtenStatistics:
    """A kernel of PyTorch's scaled dot-product attention, by its operators.

    Args:
        forward: (q, k, v) each [B, H, N, 72] → o of that shape, the log-sum-exp, and more that is not needed.
        backward: (do, q, k, v, o, log-sum-exp) → dq, dk, dv and more.
    """

    def __init__(self, forward: Callable[..., tuple[Any, ...]], backward: Callable[..., tuple[Any, ...]]) -> None:
        self._forward, self._backward = forward, backward

    def forward(self, qkv: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        o_BHNd, log_sum, *_ = self._forward(*_heads_first(qkv[:, :tokens]))
        o = qkv.new_zeros(*qkv.shape[:2], *qkv.shape[3:])
        o[:, :tokens] = o_BHNd.transpose(1, 2)
        return o, log_sum

    def backward(self, do: Tensor, qkv: Tensor, o: Tensor, log_sum: Tensor, tokens: int) -> Tensor:
        do_BHNd, o_BHNd = (x[:, :tokens].transpose(1, 2) for x in (do, o))
        gradients = self._backward(do_BHNd, *_heads_first(qkv[:, :tokens]), o_BHNd, log_sum)[:3]
        dqkv = torch.zeros(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        torch.stack([x.transpose(1, 2) for x in gradients], dim=2, out=dqkv[:, :tokens])
        return dqkv


def _heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in qkv.unbind(2))


def _flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
    state = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)  # of dropout; there is none
    sizes = None, None, q.shape[2], k.shape[2]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return backward(do, q, k, v, o, log_sum, *sizes, 0.0, False, *state)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)


def _cudnn_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
    state = q.new_empty((), dtype=torch.int64), q.new_empty((), dtype=torch.int64)
    sizes = None, None, q.shape[2], k.shape[2]
    backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return backward(do, q, k, v, o, log_sum, *state, None, *sizes, 0.0, False)


def _cpu_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sum: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, log_sum, 0.0, False)


# By name of the backend in `attention.BACKENDS`. On a CPU PyTorch has one kernel, on a GPU it picks one of several.
ON_CPU: dict[str, Statistics] = {
    "sdpa": AtenStatistics(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, _cpu_backward)
}
ON_GPU: dict[str, Statistics] = {
    "flash4": Flash4Statistics(),
    "flash2": AtenStatistics(torch.ops.aten._scaled_dot_product_flash_attention, _flash_backward),
    "cudnn": AtenStatistics(_cudnn_forward, _cudnn_backward),
}


class Kept:
    """What a block keeps for its backward pass: its input, and what its self-attention gave.

    Args:
        x: the block's input, [B, N, D].
        keep: keeps what the attention gave. with_input: and the input with it; else that stays where it is.
    """

    def __init__(self, x: Tensor, keep: Keep, with_input: bool) -> None:
        self._x: Tensor | None = x
        self._gradient = x.requires_grad
        self._keep, self._with_input = keep, with_input
        self._held: Held | None = None
        self._left: tuple[Tensor, Tensor] | None = None

    def input(self) -> Tensor:
        """Returns the block's input, for the forward pass or to run again."""
        if self._held is None:
            return self._x
        *x, o, log_sum = self._held()
        self._held, self._left = None, (o, log_sum)
        return x[0].requires_grad_(self._gradient) if self._with_input else self._x

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Returns o and the log-sum-exp where the block runs again, for which `input` has brought them back."""
        left, self._left = self._left, None
        return left

    def put(self, o: Tensor, log_sum: Tensor) -> None:
        """Keeps what the forward pass gave."""
        if self._with_input:
            self._held = self._keep((self._x.detach(), o, log_sum))
            self._x = None
        else:
            self._held = self._keep((o, log_sum))


class KeptAttention:
    """Self-attention by a backend's statistics; a `PackedAttention`.

    Args:
        statistics: the backend. kept: of the block that calls; None computes as any backend does.
    """

    def __init__(self, statistics: Statistics, kept: Kept | None = None) -> None:
        self._statistics, self._kept = statistics, kept

    def keeping(self, kept: Kept) -> "KeptAttention":
        """Returns the attention that puts into `kept` what it computes, and takes from it what is there."""
        return KeptAttention(self._statistics, kept)

    def packed(self, qkv: Tensor, tokens: int) -> Tensor:
        """Attends among the first `tokens` tokens: [B, N, 3, H, 72] → o [B, N, H, 72], zero for the other tokens."""
        return _Attend.apply(qkv, tokens, self._statistics, self._kept)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attends: q, k and v, each [B, N, H, 72] → o of that shape."""
        return self.packed(torch.stack([q, k, v], dim=2), q.shape[1])


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, tokens: int, statistics: Statistics, kept: Kept | None) -> Tensor:
        left = None if kept is None else kept.take()
        if left is None:
            left = statistics.forward(qkv, tokens)
            if kept is not None:
                kept.put(*(x.detach() for x in left))  # o itself becomes part of the graph
        o, log_sum = left
        ctx.save_for_backward(qkv, o, log_sum)
        ctx.tokens, ctx.statistics = tokens, statistics
        return o

    @staticmethod
    def backward(ctx, do: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.statistics.backward(do, *ctx.saved_tensors, ctx.tokens), None, None, None


def statistics_of(device: torch.device) -> dict[str, Statistics]:
    """Returns the backends of a device whose log-sum-exp is to be had, by name."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def check_kept(backend: str, device: torch.device) -> None:
    """Checks that what a backend gives can be kept.

    Raises:
        ConfigError: it gives no log-sum-exp on this device.
    """
    known = statistics_of(device)
    if backend != "auto" and backend not in known:
        raise ConfigError(
            f'model.attention = "{backend}": gives no log-sum-exp on {device.type}, which '
            f'parallel.activation_checkpointing = "attention" keeps; set it to auto or {" or ".join(known)}, or choose '
            "another level"
        )
