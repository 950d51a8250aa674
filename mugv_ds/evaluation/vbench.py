"""VBench-I2V: the videos that its protocol asks for, the results of its package, and the published formula.

Sources: Huang et al., "VBench++" (arXiv 2411.13503); of github.com/Vchitect/VBench the folder vbench2_beta_i2v for the
protocol, and scripts/constant.py and scripts/cal_i2v_final_score.py for the formula. The package is vbench 0.1.5.
"""

import csv
import hashlib
import io
import json
import math
import os
import unicodedata
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular, read_bytes_file, read_text_file
from mugv_ds.files.atomic import write_atomically
from mugv_ds.sampling.jobs import Job

SAMPLES = 5
IMAGES, PAIRS = 355, 1118
# Width ÷ height of the crops that the suite's images come in.
CROPS = {"1-1": 1.0, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}
CAMERA = ("pans left", "pans right", "tilts up", "tilts down", "zooms in", "zooms out", "static")

_MAX_INFO_BYTES = 1 << 24
_MAX_RESULT_BYTES = 1 << 26
_MAX_NAME_BYTES = 255  # of Linux's file systems


@dataclass(frozen=True)
class Dimension:
    """One of the nine things that are judged.

    Attributes:
        name: of the package. short: of the published tables. pairs: of image and prompt that it is judged on.
        low, high: what its result is normalised by. weight: in the mean of its group.
        weights: files and folders that the package reads for it, in its cache.
    """

    name: str
    short: str
    pairs: int
    weights: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0

    def normalised(self, result: float) -> float:
        """Returns (result − low) / (high − low), which is not clipped, as in the published script."""
        return (result - self.low) / (self.high - self.low)


_DINO_REPOSITORY, _DINO = "dino_model/facebookresearch_dino_main", "torch/hub/checkpoints/dino_vitbase16_pretrain.pth"
_COTRACKER = ("torch/hub/facebookresearch_co-tracker_main", "torch/hub/checkpoints/cotracker2.pth")
_DREAMSIM = ("dino_vitb16_pretrain.pth", "open_clip_vitb16_pretrain.pth.tar", "clip_vitb16_pretrain.pth.tar")
_AESTHETIC = ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")
I2V = (
    Dimension("camera_motion", "VTCM", 763, _COTRACKER, weight=0.1),
    Dimension("i2v_subject", "VISC", 246, (_DINO_REPOSITORY, _DINO), low=0.1462),
    Dimension(
        "i2v_background", "VIBC", 109, tuple(f"dreamsim/{name}" for name in (*_DREAMSIM, "ensemble_lora")), low=0.2615
    ),
)
QUALITY = (
    Dimension("subject_consistency", "SC", 246, (_DINO_REPOSITORY, _DINO), low=0.1462),
    Dimension("background_consistency", "BC", 109, ("clip_model/ViT-B-32.pt",), low=0.2615),
    Dimension("motion_smoothness", "MS", 246, ("amt_model/amt-s.pth",), low=0.7060, high=0.9975),
    Dimension("dynamic_degree", "DD", 246, ("raft_model/models/raft-things.pth",), weight=0.5),
    Dimension("aesthetic_quality", "AQ", 355, _AESTHETIC),
    Dimension("imaging_quality", "IQ", 355, ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",)),
)
DIMENSIONS = (*I2V, *QUALITY)
# The three of which every pair belongs to one; the others are judged on the pairs of the last two.
_KINDS = ("camera_motion", "i2v_subject", "i2v_background")

# Percent, in the order of `DIMENSIONS`, then I2V, Quality and Total as they were published.
PUBLISHED = {
    "MUG-V 10B": (23.17, 98.82, 99.51, 95.73, 98.52, 98.90, 57.24, 61.37, 68.48, 95.37, 81.55, 88.46),
    "CogVideoX": (67.68, 97.19, 96.74, 94.34, 96.42, 98.40, 33.17, 61.87, 70.01, 94.79, 78.61, 86.70),
    "STIV": (11.17, 98.96, 97.35, 98.40, 98.39, 99.61, 15.28, 66.00, 70.81, 93.48, 79.98, 86.73),
    "Step-Video": (49.23, 97.86, 98.63, 96.02, 97.06, 99.24, 48.78, 62.29, 70.44, 95.50, 81.22, 88.36),
    "Dynamic-I2V": (88.10, 98.83, 98.97, 96.21, 98.39, 98.88, 27.15, 60.10, 69.23, 98.12, 78.78, 88.45),
    "HunyuanVideo": (49.91, 98.53, 97.37, 95.26, 96.70, 99.23, 22.20, 62.55, 70.14, 95.10, 78.54, 86.82),
    "Wan2.1": (34.76, 96.95, 96.44, 94.86, 97.07, 97.90, 51.38, 64.75, 70.44, 92.90, 80.82, 86.86),
    "MAGI-1": (50.85, 98.39, 99.00, 93.96, 96.74, 98.68, 68.21, 64.74, 69.71, 96.12, 82.44, 89.28),
}


class Scores(NamedTuple):
    """The three sums of the leaderboard, as shares of 1."""

    i2v: float
    quality: float
    total: float


def scores(results: Mapping[str, float]) -> Scores:
    """Returns the published sums: weighted means of the normalised results of each group, and the mean of the two.

    I2V = (0.1·VTCM + VISC + VIBC) / 2.1, Quality = (SC + BC + MS + 0.5·DD + AQ + IQ) / 5.5, each normalised first.

    Args:
        results: by the name of each dimension, as the package gives them, shares of 1.

    Raises:
        KeyError: one is missing.
    """
    i2v, quality = (
        sum(one.weight * one.normalised(results[one.name]) for one in group) / sum(one.weight for one in group)
        for group in (I2V, QUALITY)
    )
    return Scores(i2v, quality, (i2v + quality) / 2)


def nearest_crop(height: int, width: int) -> str:
    """Returns the crop whose sides are nearest to a frame's, by the ratio of their ratios."""
    return min(CROPS, key=lambda crop: abs(math.log(CROPS[crop] * height / width)))


@dataclass(frozen=True)
class Pair:
    """A prompt with the image that its videos start with. dimensions: names of those that it is judged by."""

    prompt: str
    image: str
    dimensions: tuple[str, ...]

    @property
    def videos(self) -> list[str]:
        """Returns the names of its videos, as the package looks for them."""
        return [f"{self.prompt}-{number}.mp4" for number in range(SAMPLES)]


@dataclass(frozen=True)
class Suite:
    """The pairs that are sampled and judged. digest: SHA-256 of the file that they are from."""

    digest: str
    pairs: tuple[Pair, ...]

    def first(self, count: int) -> "Suite":
        """Returns the first pairs of each kind (subject, background, camera), to try the whole at less cost."""
        kept = {kind: [pair for pair in self.pairs if kind in pair.dimensions][:count] for kind in _KINDS}
        return Suite(self.digest, tuple(pair for pairs in kept.values() for pair in pairs))

    def of(self, dimension: Dimension) -> list[Pair]:
        """Returns the pairs that a dimension is judged on."""
        return [pair for pair in self.pairs if dimension.name in pair.dimensions]

    @property
    def sampled(self) -> list[Pair]:
        """Returns the pairs without those that repeat another's prompt and image: they share its videos."""
        return list({pair.prompt: pair for pair in self.pairs}.values())

    def check_images(self, folder: Path) -> None:
        """Checks that all images are there.

        Raises:
            InputError: one is missing or no regular file.
        """
        for image in dict.fromkeys(pair.image for pair in self.pairs):
            try:
                open_regular(folder / image).close()
            except OSError as error:
                raise InputError(
                    f"{folder / image}: {error.strerror}; give the suite's folder of crops (crop.zip of VBench-I2V)"
                ) from None

    def write_list(self, path: Path, images: Path, seed: int) -> None:
        """Writes the videos as a list that tools/sample.py takes: prompt, image, seed. Every video has its own seed.

        Args:
            path: CSV to write. images: folder of this crop. seed: of the first video; those after it count on.
        """
        text = io.StringIO(newline="")
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["prompt", "image", "seed"])
        for number, pair in enumerate(pair for pair in self.sampled for _ in range(SAMPLES)):
            rows.writerow([pair.prompt, images.resolve() / pair.image, seed + number])
        with write_atomically(path) as stream:
            stream.write(text.getvalue().encode())

    def write_info(self, path: Path) -> None:
        """Writes what of the suite's file the package reads, and nothing that was not checked."""
        info = [{"prompt_en": one.prompt, "image_name": one.image, "dimension": one.dimensions} for one in self.pairs]
        with write_atomically(path) as stream:
            stream.write(json.dumps(info, indent=1).encode())

    def link(self, jobs: Sequence[Job], samples: Path, folder: Path) -> None:
        """Makes a folder of all videos under the protocol's names: links to the sampled files, and nothing else.

        The package takes the ending of whichever file it is told first for that of all.

        Args:
            jobs: of the list that `write_list` wrote. samples: folder that they were sampled to. folder: to make.

        Raises:
            InputError: the folder holds something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = [name for pair in self.sampled for name in pair.videos]
        if others := sorted({path.name for path in folder.iterdir()} - set(names)):
            raise InputError(f"{folder / others[0]}: is no video of the suite; empty the folder")
        for name, job in zip(names, jobs, strict=True):
            target, link = Path(os.path.relpath(samples / f"{job.name}.mp4", folder)), folder / name
            if not link.is_symlink() or link.readlink() != target:
                temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")
                temporary.symlink_to(target)
                temporary.replace(link)


def read_suite(path: Path, sha256: str | None = None) -> Suite:
    """Reads and checks the suite's `vbench2_i2v_full_info.json`.

    Args:
        path: the file. sha256: that it must have, in hexadecimal; None takes any.

    Raises:
        InputError: it is another file, too large, no such JSON, its counts are not the protocol's, or a prompt or an
            image cannot be the name of a file.
    """
    try:
        content = read_bytes_file(path, _MAX_INFO_BYTES)
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; give vbench2_beta_i2v/vbench2_i2v_full_info.json of github.com/Vchitect/VBench"
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and sha256.lower() != digest:
        raise InputError(f"{path}: its SHA-256 is {digest}, not {sha256}")
    found = _parsed(path, content)
    if not isinstance(found, list):
        raise InputError(f"{path}: must be a list of pairs, and is a {type(found).__name__}")
    suite = Suite(digest, tuple(_pair(f"{path}, pair {number}", one) for number, one in enumerate(found)))
    counted = {"pairs": len(suite.pairs), "images": len({pair.image for pair in suite.pairs})}
    counted |= {f"pairs of {dimension.name}": len(suite.of(dimension)) for dimension in DIMENSIONS}
    wanted = {"pairs": PAIRS, "images": IMAGES}
    wanted |= {f"pairs of {dimension.name}": dimension.pairs for dimension in DIMENSIONS}
    if wrong := [f"{counted[name]} {name} and not {count}" for name, count in wanted.items() if counted[name] != count]:
        raise InputError(f"{path}: is not the suite of VBench-I2V: {', '.join(wrong)}")
    images: dict[str, str] = {}
    for pair in suite.pairs:
        if images.setdefault(pair.prompt, pair.image) != pair.image:
            raise InputError(f"{path}: {pair.prompt[:80]!r} stands for two images, whose videos would have one name")
    return suite


def _pair(where: str, one: Any) -> Pair:
    """Checks one entry of the suite's file."""
    fields = [one.get(key) for key in ("prompt_en", "image_name", "dimension")] if isinstance(one, dict) else [None]
    if None in fields:
        raise InputError(f"{where}: must have prompt_en, image_name and dimension; is the file of another version?")
    prompt, image, dimensions = fields
    if not isinstance(dimensions, list) or not all(isinstance(name, str) for name in dimensions):
        raise InputError(f"{where}: its dimension must be a list of names")
    _check_name(where, "prompt_en", prompt, f"-{SAMPLES - 1}.mp4")
    _check_name(where, "image_name", image)
    if image in (".", "..") or image != image.strip():
        raise InputError(f"{where}: image_name {image!r} cannot be used")
    judged = tuple(dimension.name for dimension in DIMENSIONS if dimension.name in dimensions)
    if "camera_motion" in judged and not any(f"camera {move}" in prompt for move in CAMERA):
        raise InputError(f"{where}: {prompt[:80]!r} does not say how the camera moves, which camera_motion reads in it")
    return Pair(prompt, image, judged)


def _check_name(where: str, key: str, name: Any, ending: str = "") -> None:
    """Raises InputError unless a text, with an ending, can be the name of a file."""
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: {key} must be text")
    if "/" in name or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise InputError(f"{where}: {key} {name[:80]!a} cannot be the name of a file")
    if (size := len(f"{name}{ending}".encode())) > _MAX_NAME_BYTES:
        raise InputError(f"{where}: {key} {name[:80]!r} makes a name of {size} bytes, more than {_MAX_NAME_BYTES}")


def missing_weights(cache: Path, dimensions: Iterable[Dimension] = DIMENSIONS) -> list[str]:
    """Returns what of the package's weights is not in its cache."""
    wanted = dict.fromkeys(name for dimension in dimensions for name in dimension.weights)
    return [name for name in wanted if not (cache / name).exists()]


def read_result(path: Path, dimension: Dimension, videos: Sequence[str]) -> float:
    """Reads what the package wrote of one dimension: {name: [mean, …, [{"video_path": …, …}, …]]}.

    Args:
        path: the file. dimension: that it must be of. videos: names of those that must have been judged.

    Returns:
        The mean, a share of 1.

    Raises:
        InputError: the file is missing, too large, or not that.
    """
    found = _parsed(path, read_text_file(path, _MAX_RESULT_BYTES))
    result = found.get(dimension.name) if isinstance(found, dict) and len(found) == 1 else None
    if not isinstance(result, list) or len(result) < 2 or not isinstance(result[-1], list):
        raise InputError(f"{path}: must hold {dimension.name} alone: its mean, and a list of what each video got")
    mean, judged = result[0], result[-1]
    if type(mean) not in (int, float) or not 0 <= mean <= 1:
        raise InputError(f"{path}: {dimension.name} is {str(mean)[:80]}, and must be a number from 0 to 1")
    names = [Path(str(one.get("video_path"))).name if isinstance(one, dict) else "" for one in judged]
    if sorted(names) != sorted(videos):
        raise InputError(f"{path}: {len(names)} videos were judged, and not the {len(videos)} of {dimension.name}")
    return float(mean)


def _parsed(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def table(name: str, results: Mapping[str, float]) -> Iterator[str]:
    """Yields the lines of a table in percent: the results and sums of one model, and below it the published ones."""
    own = tuple(100 * value for value in (*(results[one.name] for one in DIMENSIONS), *scores(results)))
    rows = {name[:40]: own, **PUBLISHED}
    width = max(map(len, rows))
    heads = [*(dimension.short for dimension in DIMENSIONS), "I2V", "Quality", "Total"]
    yield " ".join([" " * width, *(f"{head:>7}" for head in heads)])
    for model, values in rows.items():
        yield " ".join([f"{model:{width}}", *(f"{value:7.2f}" for value in values)])
