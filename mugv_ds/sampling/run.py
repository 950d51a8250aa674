"""Samples a list of videos in stages, each of which loads one model, uses it for the whole list and lets it go.

text features → first frames → latents → pixels. What a stage makes is in the output folder before the next begins, so
that a list goes on where it was stopped.
"""

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_bytes_file
from mugv_ds.data.video import contact_sheet, read_some_frames
from mugv_ds.files.atomic import write_atomically
from mugv_ds.models import reuse
from mugv_ds.parallel.guidance import GuidancePair
from mugv_ds.sampling.jobs import Job
from mugv_ds.sampling.outputs import LATENT_SUFFIX, Outputs, files_named, read_latent_file
from mugv_ds.sampling.sampler import Model
from mugv_ds.sampling.settings import SamplingSettings
from mugv_ds.sampling.stages import (
    Codec,
    FirstFrame,
    TextEncoder,
    denoise,
    encode_first_frame,
    read_first_frame,
    video_parts,
)

_MAX_CONDITION_BYTES = 1 << 30
_TEXTS_AT_ONCE = 32
_SHOWN = 32  # videos on a contact sheet
_GIB = 2**30


def _call(function: Callable[[], Any]) -> Any:
    return function()


@dataclass(frozen=True)
class Workers:
    """This process among all that sample together; by default it is alone.

    Attributes:
        replica, replicas: videos are shared out over replicas, of which this process belongs to one.
        leads: whether it is the first of all. writes: whether it is the first of its replica.
        attempt: calls a function, and returns its result once it has succeeded on all processes.
        first_then_all: calls a function on the process that leads, which may take long, and then on the others.
        first: calls a function on the process that leads, and returns its result, of JSON types, on all.
        pair: guidance's other branch is on another process; None if it is not.
    """

    replica: int = 0
    replicas: int = 1
    leads: bool = True
    writes: bool = True
    attempt: Callable[[Callable[[], Any]], Any] = _call
    first_then_all: Callable[[Callable[[], Any]], Any] = _call
    first: Callable[[Callable[[], Any]], Any] = _call
    pair: GuidancePair | None = None


@dataclass(frozen=True)
class Denoiser:
    """A DiT that is ready to sample.

    Attributes:
        call: predicts velocities; on all processes of a replica together. module: holds the blocks of this process.
        total: sums a tensor over the processes that share a sample's tokens.
    """

    call: Model
    module: reuse.Model
    total: Callable[[Tensor], Tensor] = lambda x: x


class Loaders(Protocol):
    """Loads the parts of the sampler, each when its stage begins, onto the device.

    The first two are called by the process that leads. All processes call the others together, also those of a replica
    that has no video: they make groups of processes, and agree on how to compute.
    """

    def text_encoder(self) -> TextEncoder: ...

    def image_codec(self) -> Codec: ...

    def denoiser(self) -> Denoiser: ...

    def decode(self) -> Callable[[Tensor], Iterator[Tensor]]:
        """Returns what yields the pixels of latents window by window, on all processes of a replica together."""


@dataclass
class Timer:
    """Seconds and, on a GPU, the peak memory of each stage on this process."""

    device: torch.device
    stages: dict[str, tuple[float, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage; memory that is let go in it is given back at its end."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        begin = time.perf_counter()
        yield
        gc.collect()
        peak = 0.0
        if cuda:
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) / _GIB
            torch.cuda.empty_cache()
        self.stages[name] = (time.perf_counter() - begin, peak)

    def lines(self) -> list[str]:
        """Returns a line a stage: seconds, share, peak."""
        total = sum(seconds for seconds, _ in self.stages.values()) or 1.0
        return [
            f"{name:13} {seconds:8.1f} s  {seconds / total:6.1%}" + (f"  {peak:6.1f} GiB peak" if peak else "")
            for name, (seconds, peak) in self.stages.items()
        ]


class Conditions:
    """The text features and first frames of a list, a file each, in the folder `conditions` of the outputs.

    Args:
        folder: of the outputs, which all processes share.
        text_encoder, codec: what makes them, of JSON types: a file is taken for nothing else.
    """

    def __init__(self, folder: Path, *, text_encoder: Any, codec: Any) -> None:
        self._folder, self._text_encoder, self._codec = folder / "conditions", text_encoder, codec

    def encode(self, jobs: Sequence[Job], settings: SamplingSettings, loaders: Loaders, device: torch.device) -> None:
        """Makes what is not there yet of the jobs' conditions; models are loaded only if there is something to do.

        Raises:
            InputError: a text, an image or a model cannot be used.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        # All images are looked at first, so that a wrong one is found before anything is loaded.
        images = [path for path in _images(jobs) if not self._frame_path(read_first_frame(path, settings)).exists()]
        texts = [text for text in _texts(jobs, settings) if not self._text_path(text).exists()]
        if texts:
            encoder = loaders.text_encoder()
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                feature_BLC, mask_BL = encoder(batch := texts[start : start + _TEXTS_AT_ONCE])
                for text, feature_LC, mask_L in zip(batch, feature_BLC, mask_BL, strict=True):
                    _save(self._text_path(text), {"features": feature_LC[mask_L].cpu()})
            del encoder
        codec = loaders.image_codec() if images else None
        for path in images:
            pixels = read_first_frame(path, settings)
            _save(self._frame_path(pixels), {"latent": encode_first_frame(codec, pixels, device).latent})

    def texts(self, jobs: Sequence[Job], settings: SamplingSettings) -> dict[str, Tensor]:
        """Returns the features [L, C] of the jobs' texts and of the negative prompt, on the CPU."""
        return {text: _load(self._text_path(text), "features") for text in _texts(jobs, settings)}

    def first_frames(self, jobs: Sequence[Job], settings: SamplingSettings) -> dict[Path, FirstFrame]:
        """Returns the first frames of the jobs that start with an image, by its path."""
        pixels = {path: read_first_frame(path, settings) for path in _images(jobs)}
        return {path: FirstFrame(frame, _load(self._frame_path(frame), "latent")) for path, frame in pixels.items()}

    def _text_path(self, text: str) -> Path:
        return self._folder / f"text-{_key(text, self._text_encoder)}.safetensors"

    def _frame_path(self, pixels: Tensor) -> Path:
        digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        return self._folder / f"first-frame-{_key(digest, list(pixels.shape), self._codec)}.safetensors"


class Sampling:
    """Samples lists of videos, as one of all processes that do.

    Args:
        settings: of all videos. outputs, conditions: their files. loaders: of the models. workers: the processes.
        device: of this process.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        outputs: Outputs,
        conditions: Conditions,
        loaders: Loaders,
        workers: Workers,
        device: torch.device,
    ) -> None:
        self._settings, self._outputs, self._conditions = settings, outputs, conditions
        self._loaders, self._workers, self._device = loaders, workers, device

    def run(self, jobs: Sequence[Job], batch: int = 1) -> Timer:
        """Samples the videos that are not there yet; all processes call it together. Returns what each stage took.

        Args:
            batch: videos that a replica samples at once.

        Raises:
            InputError: something that was given cannot be used.
        """
        workers, timer = self._workers, Timer(self._device)
        finished, sampled = map(set, workers.first(lambda: self._there(jobs)))
        pending = [job for job in jobs if job.number not in finished]
        unsampled = [job for job in pending if job.number not in sampled]
        if unsampled:
            with timer.stage("conditions"):
                workers.first_then_all(lambda: self._encode(unsampled) if workers.leads else None)
            with timer.stage("latents"):
                own = unsampled[workers.replica :: workers.replicas]
                self._sample([own[start : start + batch] for start in range(0, len(own), batch)])
        workers.attempt(lambda: None)  # latents that another replica has made are there
        if pending:
            with timer.stage("pixels"):
                self._decode(pending[workers.replica :: workers.replicas])
        workers.attempt(lambda: None)
        return timer

    def _there(self, jobs: Sequence[Job]) -> tuple[list[int], list[int]]:
        """Returns the numbers of the videos that are finished, and of those others whose latents are there."""
        finished = {job.number for job in jobs if self._outputs.finished(job)}
        sampled = [job.number for job in jobs if job.number not in finished and self._outputs.has_latent(job)]
        return sorted(finished), sampled

    def _encode(self, jobs: Sequence[Job]) -> None:
        with files_named(self._outputs.folder):
            self._conditions.encode(jobs, self._settings, self._loaders, self._device)

    def _sample(self, batches: Sequence[Sequence[Job]]) -> None:
        """Samples and saves the latents of this replica's videos."""
        denoiser = self._loaders.denoiser()
        for number, jobs in enumerate(batches):
            texts = self._conditions.texts(jobs, self._settings)
            frames = self._conditions.first_frames(jobs, self._settings)
            latents = partial(self._denoise, denoiser, jobs, texts, frames)
            if number == 0:
                self._measure_options(latents)
            begin = time.perf_counter()
            made = latents(self._settings)
            for job, latent in zip(jobs, made, strict=True):
                if not latent.isfinite().all():
                    raise InputError(
                        f"{job.name}: the DiT made latents that are not finite: its weights are damaged, or overflow"
                    )
            if self._workers.writes:
                seconds = time.perf_counter() - begin
                print(f"{', '.join(job.name for job in jobs)}: sampled in {seconds:.1f} s", flush=True)
                for job, latent in zip(jobs, made, strict=True):
                    self._outputs.save_latent(job, latent, frames[job.image].image if job.image else None)

    def _denoise(
        self,
        denoiser: Denoiser,
        jobs: Sequence[Job],
        texts: Mapping[str, Tensor],
        frames: Mapping[Path, FirstFrame],
        settings: SamplingSettings,
    ) -> list[Tensor]:
        """Samples one batch with what the settings reuse."""
        with ExitStack() as stack:
            stack.enter_context(reuse.hold_text(denoiser.module))
            if settings.first_block_cache is not None:
                cache = reuse.FirstBlockCache(settings.first_block_cache, denoiser.total)
                stack.enter_context(reuse.reuse_blocks(denoiser.module, cache))
            return denoise(denoiser.call, jobs, settings, texts, frames, device=self._device, pair=self._workers.pair)

    def _measure_options(self, latents: Callable[[SamplingSettings], list[Tensor]]) -> None:
        """Prints what each option that is not exact changes and saves, on the first batch of this replica."""
        exact_settings = replace(self._settings, guidance_interval=None, first_block_cache=None)
        options = {
            "--guidance-interval": replace(exact_settings, guidance_interval=self._settings.guidance_interval),
            "--first-block-cache": replace(exact_settings, first_block_cache=self._settings.first_block_cache),
        }
        options = {name: chosen for name, chosen in options.items() if chosen != exact_settings}
        if not options:
            return
        latents(replace(exact_settings, steps=1))  # compiles, where that is asked for
        exact, exact_seconds = _timed(lambda: latents(exact_settings))
        for name, chosen in options.items():
            made, seconds = _timed(partial(latents, chosen))
            error = sum(float((a - b).norm() / b.norm()) for a, b in zip(made, exact, strict=True)) / len(exact)
            if self._workers.writes:
                print(
                    f"{name} on the first prompt: latents off by {error:.2%} of their norm, {seconds:.1f} s instead of "
                    f"{exact_seconds:.1f} s",
                    flush=True,
                )

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Decodes and writes this replica's videos, all of its processes together."""
        decode = self._loaders.decode()
        for job in jobs:
            saved = read_latent_file(self._outputs.path(job, LATENT_SUFFIX))
            still_first = self._settings.still_first
            parts = video_parts(decode, saved.latent.to(self._device), still_first=still_first, image=saved.image)
            if self._workers.writes:
                self._outputs.save_video(job, parts, self._settings.output_fps)
            else:
                for _ in parts:
                    pass


def _timed(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], float]:
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


def write_contact_sheet(jobs: Sequence[Job], outputs: Outputs) -> Path:
    """Writes `contact_sheet.png` with the first video of each prompt, up to 32; returns its path."""
    shown = [job for job in jobs if job.draw == 0][:_SHOWN]
    path = outputs.folder / "contact_sheet.png"
    try:
        contact_sheet(path, ((job.prompt, read_some_frames(outputs.path(job, ".mp4"))) for job in shown))
    except ValueError as error:
        raise InputError(f"{error}; delete it, and it is made anew of its latents") from error
    return path


def _images(jobs: Sequence[Job]) -> list[Path]:
    return list(dict.fromkeys(job.image for job in jobs if job.image is not None))


def _texts(jobs: Sequence[Job], settings: SamplingSettings) -> list[str]:
    """Returns the different texts that the jobs need features of."""
    return list(dict.fromkeys([settings.negative_prompt, *(job.prompt + settings.prompt_suffix for job in jobs)]))


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with write_atomically(path) as stream:
        stream.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _load(path: Path, name: str) -> Tensor:
    try:
        return load(read_bytes_file(path, _MAX_CONDITION_BYTES))[name]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --out must be a folder that all hosts share") from error
    except (SafetensorError, KeyError):
        raise InputError(f"{path}: is damaged; delete it, and it is made anew") from None
