"""Evaluates weights: samples the same prompts from each of them, keeps what is asked for, and measures the videos.

Every part is done where it is not there yet, and done anew where what made it has changed.
"""

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.config.text_encoder import TEXT_ENCODER_NAME, TextEncoderInfo
from mugv_ds.data.video import read_image, read_mp4, read_still, to_frames
from mugv_ds.evaluation.measures import VERSION, measure
from mugv_ds.evaluation.results import (
    RESERVED,
    WEIGHTS_NAME,
    ListedJob,
    Listing,
    Result,
    first_frame_path,
    latent_path,
    read_listing,
    read_results,
    text_features_path,
    weights_folder,
    write_listing,
)
from mugv_ds.files.atomic import write_atomically, write_changed
from mugv_ds.models.text import save_features
from mugv_ds.sampling.jobs import Job
from mugv_ds.sampling.outputs import LATENT_SUFFIX, Outputs, read_latent_file
from mugv_ds.sampling.run import Conditions, Loaders, Workers
from mugv_ds.sampling.settings import SamplingSettings

_MAX_MEASURES_BYTES = 1 << 16

More = Callable[[np.ndarray, str], dict[str, float]]  # uint8 RGB frames [F, H, W, 3], prompt → measures


def parse_weights(given: Sequence[str]) -> dict[str, Path]:
    """Reads NAME=PATH of weights, in their order.

    Raises:
        InputError: one is written otherwise, has a name that is no folder's or is there twice, or is not there.
    """
    weights: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not re.fullmatch(WEIGHTS_NAME, name) or name in RESERVED or not path:
            raise InputError(
                f"--weights {text[:200]}: must be NAME=PATH; a name has letters, digits, '.', '_' and '-', "
                f"and is none of {', '.join(RESERVED)}"
            )
        if name in weights:
            raise InputError(f"--weights {name}: is there twice; give each its own name")
        if not Path(path).exists():
            raise InputError(f"--weights {name}: {path}: there is no such file or folder")
        weights[name] = Path(path)
    return weights


def check_jobs(jobs: Sequence[Job]) -> None:
    """Checks that no two videos of a list would be the same.

    Raises:
        InputError: two have one prompt, noise and image.
    """
    seen: dict[Any, Job] = {}
    for job in jobs:
        same = seen.setdefault((job.prompt, job.seed, job.draw, job.image), job)
        if same is not job:
            raise InputError(
                f"prompt {job.prompt[:80]!r}: videos {same.number + 1} and {job.number + 1} of the list are the same; "
                "leave one out, or give it another seed"
            )


class KeptOutputs(Outputs):
    """The videos of some weights, and their latents as data sets have them if they are kept.

    A latent belongs to the video beside it: it is written, or an older one removed, before the video is.

    Args:
        folder: of the evaluation. weights: name of the weights. made: see `Outputs`. keep: whether latents are kept.
    """

    def __init__(self, folder: Path, weights: str, made: dict[str, dict[str, Any]], *, keep: bool) -> None:
        super().__init__(weights_folder(folder, weights), made, overwrite=True)
        self._kept = lambda job: latent_path(folder, weights, job.name)
        self._keep = keep

    def save_latent(self, job: Job, latent: Tensor, image: np.ndarray | None) -> None:
        """Writes a video's latents; see `Outputs.save_latent`."""
        self._kept(job).unlink(missing_ok=True)
        super().save_latent(job, latent, image)
        if self._keep:
            self._write_kept(job, latent)

    def complete(self, jobs: Iterable[Job]) -> None:
        """Writes those latents that are to be kept and are not there, of videos that are.

        Raises:
            InputError: what they would be made of is gone, or of another video.
        """
        for job in jobs if self._keep else ():
            if self._kept(job).exists():
                continue
            path = self.path(job, LATENT_SUFFIX)
            if not self.has_latent(job):
                raise InputError(f"{path}: is gone; delete {job.name}.json beside it, and the video is made anew")
            self._write_kept(job, read_latent_file(path).latent)

    def _write_kept(self, job: Job, latent: Tensor) -> None:
        self._kept(job).parent.mkdir(exist_ok=True)
        with write_atomically(self._kept(job)) as stream:
            torch.save(latent.float().contiguous().clone(), stream)


@dataclass(frozen=True)
class Evaluation:
    """A list of videos that several weights make, in one folder.

    Attributes:
        folder: of the evaluation, which all processes share. jobs: the videos, see `check_jobs`.
        settings: of all. workers: the processes.
    """

    folder: Path
    jobs: Sequence[Job]
    settings: SamplingSettings
    workers: Workers

    def prepare(self, made: Mapping[str, dict[str, Any]], of_jobs: Mapping[str, dict[str, Any]]) -> None:
        """Writes what is known before anything is sampled: what the evaluation is of, and the first frames.

        Args:
            made: by the name of weights, what makes all of their videos. of_jobs: by the name of a job, what makes it.

        Raises:
            InputError: an image cannot be used. OSError: the file system failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        images, texts = self._first("image"), self._first("prompt")
        for path, name in images.items():
            pixels = read_image(path, self.settings.height, self.settings.width)
            content = io.BytesIO()
            Image.fromarray(to_frames(pixels[None, :, None])[0, 0].numpy()).save(content, "png")
            write_changed(first_frame_path(self.folder, name), content.getvalue())
        listed = (
            ListedJob(name=job.name, made=of_jobs[job.name], image=images.get(job.image), text=texts[job.prompt])
            for job in self.jobs
        )
        listing = Listing(weights=dict(made), jobs=tuple(listed))
        self._drop_old_texts(listing)
        write_listing(self.folder, listing)

    def _drop_old_texts(self, listing: Listing) -> None:
        """Removes text features that may be of other texts, or of another encoder, than the listing's."""
        try:
            same = _texts_of(read_listing(self.folder)) == _texts_of(listing)
        except InputError:  # there is none, or it is damaged
            same = False
        if not same:
            shutil.rmtree(text_features_path(self.folder, "").parent, ignore_errors=True)

    def _first(self, attribute: str) -> dict[Any, str]:
        """Returns by each prompt or image of the list the name of the first job that has it."""
        first: dict[Any, str] = {}
        for job in self.jobs:
            if getattr(job, attribute) is not None:
                first.setdefault(getattr(job, attribute), job.name)
        return first

    def keep_texts(self, conditions: Conditions, info: TextEncoderInfo, loaders: Loaders, device: torch.device) -> None:
        """Writes the text features of every prompt with its suffix as data sets have them.

        Args:
            conditions: has them, or makes those that are gone, for which there are the loaders, on the device.
            info: what makes them.
        """
        conditions.encode(self.jobs, self.settings, loaders, device)
        first = self._first("prompt")
        for job in self.jobs:
            if first[job.prompt] == job.name:
                features = conditions.texts([job], self.settings)[job.prompt + self.settings.prompt_suffix]
                content = io.BytesIO()
                save_features(content, features, torch.ones(len(features), dtype=torch.bool))
                write_changed(text_features_path(self.folder, job.name), content.getvalue())
        write_changed(self.folder / TEXT_ENCODER_NAME, info.to_bytes())

    def measure(self, more: More) -> dict[tuple[str, str], dict[str, float]]:
        """Measures the videos that were not measured yet; all processes call it together.

        Args:
            more: measures of who evaluates.

        Returns:
            The measures of every video that is there, by (weights, job); on the process that leads, elsewhere nothing.

        Raises:
            InputError: a video cannot be read.
        """
        results = self.workers.attempt(lambda: read_results(self.folder))
        share = results[self.workers.replica :: self.workers.replicas] if self.workers.writes else []
        self.workers.attempt(lambda: [measured(result, more) for result in share])
        return {(one.weights, one.job): measured(one, more) for one in results} if self.workers.leads else {}


def _texts_of(listing: Listing) -> Any:
    """Returns what the text features of an evaluation are of: encoder, suffix, and by their names the prompts."""
    made = next(iter(listing.weights.values()), {})
    prompts = {job.text: job.made["prompt"] for job in listing.jobs}
    return made.get("text_encoder"), made.get("settings", {}).get("prompt_suffix"), prompts


def measured(result: Result, more: More) -> dict[str, float]:
    """Returns the measures of a video, which lie beside it once they were made.

    Raises:
        InputError: the video or the image cannot be read.
    """
    path = result.video.with_suffix(".measures.json")
    key = hashlib.sha256(json.dumps([VERSION, result.made], sort_keys=True).encode()).hexdigest()
    if (there := _read_measures(path, key)) is not None:
        return there
    try:
        frames, _ = read_mp4(result.video)
        image = None if result.image is None else read_still(result.image)[0]
        found = measure(frames, image) | more(frames, result.prompt)
    except (ValueError, OSError) as error:
        raise InputError(f"{error}; delete {result.video}, and it is made anew of its latents") from error
    with write_atomically(path) as stream:
        stream.write((json.dumps({"key": key, "measures": found}, indent=2) + "\n").encode())
    return found


def _read_measures(path: Path, key: str) -> dict[str, float] | None:
    """Returns what a file of measures says; None unless it is there and of this key."""
    try:
        said = json.loads(read_text_file(path, _MAX_MEASURES_BYTES))
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or said.get("key") != key or not isinstance(said.get("measures"), dict):
        return None
    return said["measures"] if all(type(value) is float for value in said["measures"].values()) else None
