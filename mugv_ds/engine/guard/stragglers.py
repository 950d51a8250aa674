"""Which rank computes more slowly than the others.

A rank's step takes as long as that of the slowest, because all wait for one another. So what is timed is work in which
nothing is waited for: the feed-forward layer of the stage's first block, which every rank runs on as many tokens.
"""

import statistics
import time

import torch
from torch import nn


class Stopwatch:
    """Times every forward pass of a layer in training: in evaluation ranks may have work of different size.

    Args:
        layer: one that sends and receives nothing. device: where it runs.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin = None
        self._passes: list[tuple] = []
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave)

    def _enter(self, *_) -> None:
        self._begin = self._now()  # of a recomputation that breaks off half-way nothing follows

    def _leave(self, layer: nn.Module, *_) -> None:
        if layer.training:
            self._passes.append((self._begin, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Seconds since the last call; the device must be through with that work."""
        passes, self._passes = self._passes, []
        if self._cuda:
            return sum(begin.elapsed_time(end) for begin, end in passes) / 1e3
        return sum(end - begin for begin, end in passes)


class Stragglers:
    """Compares ranks over windows of steps.

    Args:
        factor: how many times the median rank's time is too slow. window: steps.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._window = factor, window
        self._seconds: list[list[float]] = []

    def note(self, seconds: list[float]) -> list[tuple[int, float]]:
        """(rank, times the median) of the ranks that were too slow over a window that this step completes.

        Args:
            seconds: of each rank, for one step.
        """
        self._seconds.append(seconds)
        if len(self._seconds) < self._window:
            return []
        # The median over steps, so that one hiccup is no straggler.
        usual = [statistics.median(steps) for steps in zip(*self._seconds, strict=True)]
        self._seconds = []
        middle = statistics.median_low(usual)
        return [(rank, own / middle) for rank, own in enumerate(usual) if own > self._factor * middle > 0]
