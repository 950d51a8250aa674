"""What a run reports: scalars for its trackers, gathered without holding up the device between records."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mugv_ds.config.console import CONSOLE, say
from mugv_ds.config.schema import LoggingSection
from mugv_ds.engine.trackers import Background, open_trackers
from mugv_ds.models.flops import card_peak_tflops

_CHUNK = 1 << 24  # elements that the optimizer's probe works on at once


def peak_tflops(section: LoggingSection, device: torch.device) -> float | None:
    """Dense bf16 peak of one device: the config's value, or that of a known chip that is not shared (MIG), or None."""
    if section.peak_tflops is not None or device.type != "cuda":
        return section.peak_tflops
    return card_peak_tflops(torch.cuda.get_device_name(device))


def take_peak_gib(device: torch.device) -> float:
    """Returns the most memory that was allocated on a device since the last call, in GiB; 0 where it is no GPU."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 2**30


def preference_means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """What `objectives.preference.PREFERENCE_TERMS` sum up to, as means; NaN where nothing was summed.

    Beside them: `better_ratio` and `worse_ratio`, each side's mean error by the reference's, and `better_share`, the
    better (good) samples among all.
    """
    value = {name: float(total) for name, total in sums.items()}
    of = {"correct": "count", "margin": "count", "saturated": "count"}
    of |= {f"{side}_{kind}": f"{side}_count" for side in ("better", "worse") for kind in ("loss", "reference")}
    shown = {"correct": "accuracy"}
    means = {shown.get(name, name): _ratio(value[name], value[count]) for name, count in of.items()}
    ratios = {
        f"{side}_ratio": _ratio(means[f"{side}_loss"], means[f"{side}_reference"]) for side in ("better", "worse")
    }
    samples = value["better_count"] + value["worse_count"]
    return means | ratios | {"better_share": _ratio(value["better_count"], samples)}


def _ratio(dividend: float, divisor: float) -> float:
    return dividend / divisor if divisor else math.nan


def quartile_means(sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Means of the flow loss in each quarter of the timesteps, of sums by stream; see `objectives.flow`."""
    means = {}
    for q in range(4):
        loss, count = (sum(float(of[f"{kind}_q{q}"]) for of in sums.values()) for kind in ("loss", "count"))
        if count > 0:
            means[f"train/loss_t{250 * q}-{250 * (q + 1)}"] = loss / count
    return means


def reward_means(sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Means of what `objectives.reward.REWARD_TERMS` sum up to, by tag; none where there are no rollouts."""
    means = {}
    for of in sums.values():
        if (count := float(of.get("rollouts", 0))) > 0:
            means |= {f"train/{name}": float(of[name]) / count for name in ("positive", "negative", "moved")}
    return means


class Expected(NamedTuple):
    """What is predicted of a step. seconds: None where no calibration says. peak_gib: of the fullest device."""

    seconds: float | None
    peak_gib: float


class OptimizerProbe:
    """Sums over the optimizer's fp32 partitions, taken right before a step, when gradients are reduced and clipped.

    Each rank holds a distinct part of the parameters and of their gradients, so sums over all ranks are global.

    Args:
        optimizer: the `DistributedOptimizer`, or one of PyTorch's.
        parameters: number of parameters on this rank's stage. replicas: ranks that hold the same stage.
    """

    def __init__(self, optimizer, parameters: int, replicas: int) -> None:
        self.armed = False
        self._stage_parameters, self._replicas = parameters, replicas
        self._sums: Tensor | None = None
        optimizer.register_step_pre_hook(self._look)

    def _look(self, optimizer, *_) -> None:
        if not self.armed:
            return
        # An optimizer that steps over its parts one after the other has the gradients of one of them at a time.
        parts = [part for group in optimizer.param_groups for part in group["params"] if part.grad is not None]
        # In chunks: whole, the temporaries would be the peak of the step's memory.
        weights, gradients = (
            [chunk for part in parts for chunk in tensor(part).flatten().split(_CHUNK)]
            for tensor in (torch.Tensor.detach, lambda part: part.grad)
        )
        squares = sum(chunk.square().sum(dtype=torch.float64) for chunk in weights)
        zeros = sum((chunk == 0).sum() for chunk in gradients)
        held = sum(part.numel() for part in parts)
        sums = torch.stack([squares, zeros.double(), squares.new_tensor(held)])
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self) -> dict[str, float]:
        """Parameter norm and share of zeros in the gradient at the last step. All ranks call it.

        Nothing where DeepSpeed made no update because the gradient was not finite, which it does on all ranks.
        """
        if self._sums is None:
            return {}
        sums = torch.cat([self._sums, self._sums.new_tensor([self._stage_parameters / self._replicas])])
        self._sums = None
        dist.all_reduce(sums)
        squares, zeros, held, parameters = sums.tolist()
        padding = held - parameters  # of the shards, whose gradient is zero
        return {"param_norm": squares**0.5, "grad_zero_share": (zeros - padding) / parameters}


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


class Recorder:
    """Gives the scalars of every `logging.every`-th step to the trackers; on rank 0, all ranks take part.

    A tracker that does not take them is left out, and that is said once; see `engine.trackers`.

    Args:
        section: the config. rank: global rank. world_size: processes. steps: of the run, start: first step of this
        process's part. peak: dense bf16 TFLOP/s of one device, or None.
        means: makes scalars of the sums of the steps' terms, by stream.
        facts: what trackers note of the run once, see `trackers.run_facts`.
    """

    def __init__(
        self,
        section: LoggingSection,
        *,
        rank: int,
        world_size: int,
        start: int,
        steps: int,
        peak: float | None,
        means: Callable[[Mapping[str, Mapping[str, Tensor]]], dict[str, float]] = quartile_means,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._every, self._world_size, self._peak, self._steps = section.every, world_size, peak, steps
        self._means = means
        # What an earlier process wrote up to the step that this one goes on from holds.
        purge = start + 1 if start else 0
        self._says = rank == 0
        self._trackers: list[Background] = []
        if rank == 0:
            self._trackers = open_trackers(section.trackers, section.dir, facts or {}, purge)
        self._bar = tqdm(
            total=steps,
            initial=start,
            disable=rank != 0 or not section.progress or not CONSOLE.bar.isatty(),
            unit="step",
            file=CONSOLE.bar,
            dynamic_ncols=True,
        )
        self._lines = rank == 0 and section.progress and self._bar.disable  # in place of the bar
        self._begin_window()

    def _begin_window(self) -> None:
        self._begin = time.perf_counter()
        self._steps_taken, self._counted, self._flops = 0, {}, {}
        self._losses: list[Tensor] = []
        self._samples: dict[str, int] = {}  # by stream
        self._expected: list[Expected] = []
        self._sums: dict[str, dict[str, Tensor]] = {}  # of every term, by stream

    def due(self, step: int) -> bool:
        """Whether the scalars are written at the end of this step."""
        return (step + 1) % self._every == 0 or step + 1 == self._steps

    def step(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        *,
        stream: str,
        samples: int,
        model_flops: float | None = None,
        hardware_flops: float | None = None,
        **counted: int,
    ) -> None:
        """Notes a finished step: loss and sums of terms as tensors; the rest of all ranks together.

        Losses that are NaN count in no mean.

        Args:
            terms: see `engine.objective.Objective`. stream: that the step was of.
            model_flops, hardware_flops: see `models.flops.StepFlops`; None where they are not known.
            counted: what else is reported by the second, such as tokens.
        """
        self._losses.append(loss.detach())
        sums = self._sums.setdefault(stream, {})
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + torch.where(loss.isfinite(), value, 0.0)
        self._samples[stream] = self._samples.get(stream, 0) + samples
        self._steps_taken += 1
        _add(self._counted, {"samples": samples, **counted})
        if model_flops is not None:
            _add(self._flops, {"model_flops": model_flops, "hardware_flops": hardware_flops})
        self._bar.update()

    def expect(self, expected: Expected) -> None:
        """Notes what was predicted of the step that is taken; it is written beside what is measured."""
        self._expected.append(expected)

    def record(
        self, done: int, *, rate: float, norm: float, probe: OptimizerProbe, waited: float
    ) -> dict[str, dict[str, float]]:
        """Writes the scalars since the last record. All ranks call it.

        Args:
            done: steps taken.
            rate, norm: learning rate and global gradient norm (before clipping) of the last step.
            probe: armed for the last step.
            waited: seconds this rank spent waiting for data since the last record; the longest of all ranks is written.

        Returns:
            Means of the preference terms, by stream; the same on all ranks.
        """
        loss = torch.stack(self._losses).nanmean().item()  # waits for the device
        preferences = self._preference_means()
        scalars = {
            "train/loss": loss,
            **self._means(self._sums),
            **reward_means(self._sums),
            **{f"data/share_{stream}": count / self._counted["samples"] for stream, count in self._samples.items()},
            **{f"preference/{stream}/{name}": m for stream, of in preferences.items() for name, m in of.items()},
            "train/lr": rate,
            "train/grad_norm": norm,
            **{f"train/{name}": value for name, value in probe.read().items()},
            **self._speeds(waited),
            **self._predictions(),
        }
        self.write(done, scalars.items())
        shown = self._shown(scalars)
        self._bar.set_postfix(shown)
        if self._lines:
            left = (self._steps - done) * scalars["speed/seconds_per_step"]
            parts = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {done}/{self._steps}: {parts}, {tqdm.format_interval(left)} left")
        self._begin_window()
        return preferences

    @staticmethod
    def _shown(scalars: Mapping[str, float]) -> dict[str, str]:
        """What the progress bar shows of a record; what is not known is left out."""
        forms = {
            "loss": ("train/loss", "{:.4f}"),
            "lr": ("train/lr", "{:.2e}"),
            "tokens/s": ("speed/tokens_per_second", "{:,.0f}"),
            "mfu": ("speed/mfu", "{:.1%}"),
            "wait": ("speed/data_wait_share", "{:.0%}"),
        }
        return {name: form.format(scalars[key]) for name, (key, form) in forms.items() if key in scalars}

    def _predictions(self) -> dict[str, float]:
        """Returns what was predicted of the steps since the last record; nothing where nothing was."""
        seconds = [expected.seconds for expected in self._expected if expected.seconds is not None]
        scalars = {"plan/step_seconds": sum(seconds) / len(seconds)} if len(seconds) == self._steps_taken else {}
        if self._expected:
            scalars["plan/peak_gib"] = max(expected.peak_gib for expected in self._expected)
        return scalars

    def _speeds(self, waited: float) -> dict[str, float]:
        """Returns speed and memory since the last record, after the device has finished. All ranks call it."""
        seconds = time.perf_counter() - self._begin
        device = self._losses[0].device
        host = psutil.Process().memory_info().rss / 2**30
        worst = torch.tensor([waited, take_peak_gib(device), host], dtype=torch.float64, device=device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        waited, memory, host = worst.tolist()
        speeds = {
            "speed/seconds_per_step": seconds / self._steps_taken,
            **{f"speed/{name}_per_second": count / seconds for name, count in self._counted.items()},
            "speed/data_wait_seconds": waited,
            "speed/data_wait_share": waited / seconds,
            "memory/host_gib": host,  # of the largest process of a rank
        }
        if self._flops:
            tflops = {name: count / seconds / self._world_size / 1e12 for name, count in self._flops.items()}
            speeds["speed/model_tflops_per_device"] = tflops["model_flops"]
            if self._peak is not None:
                speeds["speed/mfu"] = tflops["model_flops"] / self._peak
                speeds["speed/hfu"] = tflops["hardware_flops"] / self._peak
        if device.type == "cuda":
            speeds["memory/peak_gib"] = memory
        return speeds

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """What runs inside does not count towards the speed: validation, checkpoints."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def _preference_means(self) -> dict[str, dict[str, float]]:
        return {stream: preference_means(sums) for stream, sums in self._sums.items() if "correct" in sums}

    def write(self, step: int, scalars: Iterable[tuple[str, float]]) -> None:
        """Writes scalars at this step; on ranks other than 0 nothing happens."""
        named = dict(scalars)
        for tracker in self._trackers:
            tracker.log(step, named)

    def video(self, step: int, name: str, path: Path) -> None:
        """Shows a video, an mp4 file, at this step; on ranks other than 0 nothing happens."""
        for tracker in self._trackers:
            tracker.video(step, name, path)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar, on rank 0."""
        if self._says:
            with tqdm.external_write_mode(file=CONSOLE.bar):
                say(line)

    def close(self) -> None:
        """Ends the bar and flushes what trackers hold."""
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()
