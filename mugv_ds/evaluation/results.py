"""The folder of an evaluation: the same prompts sampled from several weights, and what is there of them.

    OUT/evaluation.json                     which weights and videos it is of, and what makes each
    OUT/text_encoder.json
    OUT/first_frames/<job>.png              the image that videos start with, at their size
    OUT/text_features/<job>_text.pt         if they are kept: once a prompt, under the name of its first job
    OUT/<weights>/<job>.{mp4,json}          a video, and all that made it
    OUT/<weights>/latents/<job>.pt          if they are kept: [24, T, H, W], normalised

A video counts once its JSON, which is written last, says what `evaluation.json` does: files of other settings, and of
weights that have changed since, are not there.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.files.atomic import write_changed

INDEX_NAME = "evaluation.json"
WEIGHTS_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
RESERVED = ("conditions", "first_frames", "text_features")  # folders of an evaluation that are of no weights
_MAX_INDEX_BYTES = 1 << 28
_MAX_MADE_BYTES = 1 << 22

WeightsName = Annotated[str, Field(pattern=f"^{WEIGHTS_NAME}$")]
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,127}$")]


class ListedJob(BaseModel):
    """A video that every one of the weights makes.

    Attributes:
        name: of its files, without their endings.
        made: what makes it, whatever the weights: prompt, seed, draw and the image's name and fingerprint.
        image, text: names of the jobs whose first frame and text features it has; None where it has no image.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: FileName
    made: dict[str, Any]
    image: FileName | None
    text: FileName


class Listing(BaseModel):
    """What an evaluation is of, `evaluation.json`.

    Attributes:
        weights: by their names, in the order that they were given: what makes all of their videos.
        jobs: the videos of each.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weights: dict[WeightsName, dict[str, Any]]
    jobs: tuple[ListedJob, ...]


@dataclass(frozen=True)
class Result:
    """A video that is there.

    Attributes:
        weights: name of the weights. job: name of the video, the same for all weights.
        prompt, seed, draw: its noise is keyed by them, see `sampling.jobs.Job`.
        image: PNG of the first frame that it was given; None where it starts freely.
        video: mp4. made: all that made it, of JSON types.
        latent: [24, T, H, W], normalised, as data sets have them; None where it was not kept.
        text_features: of the prompt with its suffix, as data sets have them; None where they were not kept.
    """

    weights: str
    job: str
    prompt: str
    seed: int
    draw: int
    image: Path | None
    video: Path
    made: dict[str, Any]
    latent: Path | None
    text_features: Path | None


def weights_folder(folder: Path, weights: str) -> Path:
    """Returns the folder of the videos of some weights."""
    return folder / weights


def latent_path(folder: Path, weights: str, job: str) -> Path:
    """Returns the path of a video's latent, if it is kept."""
    return folder / weights / "latents" / f"{job}.pt"


def first_frame_path(folder: Path, job: str) -> Path:
    """Returns the path of the first frame that has the name of this job."""
    return folder / "first_frames" / f"{job}.png"


def text_features_path(folder: Path, job: str) -> Path:
    """Returns the path of the text features that have the name of this job."""
    return folder / "text_features" / f"{job}_text.pt"


def write_listing(folder: Path, listing: Listing) -> None:
    """Writes `evaluation.json`.

    Raises:
        OSError: the file system failed.
    """
    write_changed(folder / INDEX_NAME, (json.dumps(listing.model_dump(mode="json"), indent=2) + "\n").encode())


def read_listing(folder: Path) -> Listing:
    """Reads `evaluation.json`.

    Raises:
        InputError: it is missing, or is not that of an evaluation.
    """
    path = folder / INDEX_NAME
    if not path.exists():
        raise InputError(f"{folder}: holds no {INDEX_NAME}; name the folder that `make eval` wrote")
    try:
        listing = Listing.model_validate_json(read_text_file(path, _MAX_INDEX_BYTES))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}") from None
    for job in listing.jobs:
        if not isinstance(job.made.get("prompt"), str) or type(job.made.get("seed")) is not int:
            raise InputError(f"{path}: job {job.name} has no prompt or no seed; evaluate anew")
    return listing


def read_results(folder: str | Path) -> list[Result]:
    """Returns the videos of an evaluation that are there: of each of the weights in their order, the jobs in theirs.

    Raises:
        InputError: the folder is of no evaluation, or a file of it cannot be read.
    """
    folder = Path(folder)
    listing = read_listing(folder)
    return [
        result
        for weights, made in listing.weights.items()
        for job in listing.jobs
        if (result := _read(folder, weights, made, job)) is not None
    ]


def _read(folder: Path, weights: str, made: dict[str, Any], job: ListedJob) -> Result | None:
    """Returns one video; None where it is not there."""
    video = weights_folder(folder, weights) / f"{job.name}.mp4"
    record = video.with_suffix(".json")
    if not video.is_file() or not record.is_file() or _read_json(record) != made | job.made:
        return None
    latent, text = latent_path(folder, weights, job.name), text_features_path(folder, job.text)
    return Result(
        weights=weights,
        job=job.name,
        prompt=job.made["prompt"],
        seed=job.made["seed"],
        draw=job.made.get("draw", 0),
        image=None if job.image is None else first_frame_path(folder, job.image),
        video=video,
        made=made | job.made,
        latent=latent if latent.is_file() else None,
        text_features=text if text.is_file() else None,
    )


def _read_json(path: Path) -> Any:
    """Returns what a file holds; None where that is no JSON."""
    try:
        return json.loads(read_text_file(path, _MAX_MADE_BYTES))
    except (ValueError, RecursionError):
        return None
