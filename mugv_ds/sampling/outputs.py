"""The files of sampled videos: latents, mp4 and a JSON of what made them; and what of them is there already."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS, LATENT_STRIDE, MAX_LATENT_SIDE
from mugv_ds.config.regular_file import open_regular, read_text_file
from mugv_ds.data.video import write_mp4_parts
from mugv_ds.files.atomic import write_atomically
from mugv_ds.sampling.jobs import Job
from mugv_ds.sampling.settings import FPS_LIMITS

LATENT_SUFFIX = ".latent.safetensors"
_MAX_JSON_BYTES = 1 << 22
_MAX_LATENT_BYTES = 1 << 33
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def files_named(folder: Path) -> Iterator[None]:
    """Turns what the file system says into one line: it names the file, or the folder where it names none.

    Raises:
        InputError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror or error}") from error


@dataclass(frozen=True)
class SavedLatent:
    """What a file of latents holds.

    Attributes:
        latent: fp32 [24, T, h, w].
        image: uint8 RGB [H, W, 3], the frame that the video starts with; None where it starts freely.
        made: what made it, see `Outputs`; empty where the file does not say.
    """

    latent: Tensor
    image: np.ndarray | None
    made: dict[str, Any]

    @property
    def still_first(self) -> bool:
        """Tells whether the first frame has a latent of its own, see `SamplingSettings.still_first`."""
        return self.made.get("settings", {}).get("frames", 0) % LATENT_STRIDE == 1

    @property
    def output_fps(self) -> float | None:
        """Returns the frames a second that the video was to have; None where the file does not say."""
        return self.made.get("settings", {}).get("output_fps")


class Outputs:
    """The files of a list of videos in one folder.

    A video is finished once its JSON is there, which is written last. Files of other settings are never taken for it.

    Args:
        folder: made if it is not there.
        made: by the name of a video, what makes it, of JSON types.
        overwrite: whether files that other settings made are made anew; otherwise they are refused.
    """

    def __init__(self, folder: Path, made: dict[str, dict[str, Any]], *, overwrite: bool = False) -> None:
        self.folder, self._overwrite = folder, overwrite
        self._made = json.loads(json.dumps(made))  # as it reads when it is read again
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, job: Job, suffix: str) -> Path:
        """Returns the path of one of a video's files."""
        return self.folder / f"{job.name}{suffix}"

    def finished(self, job: Job) -> bool:
        """Tells whether a video is there.

        Raises:
            InputError: other settings made what is there, or the JSON cannot be read.
        """
        path = self.path(job, ".json")
        if not path.exists() or not self.path(job, ".mp4").exists():
            return False
        return self._same(path, job, lambda: _read_json(path))

    def has_latent(self, job: Job) -> bool:
        """Tells whether a video's latents are there.

        Raises:
            InputError: other settings made what is there, or the file cannot be read.
        """
        path = self.path(job, LATENT_SUFFIX)
        return path.exists() and self._same(path, job, lambda: read_latent_file(path).made)

    def _same(self, path: Path, job: Job, read: Callable[[], Any]) -> bool:
        """Tells whether what a file says that it was made with is what makes the video."""
        wanted = self._made[job.name]
        try:
            there = read()
        except InputError as error:
            if self._overwrite:
                return False
            raise InputError(f"{error}; delete it, or give --overwrite to make it anew") from None
        if there == wanted:
            return True
        if self._overwrite:
            return False
        there = there if isinstance(there, dict) else {}
        names = ", ".join(sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)))
        raise InputError(f"{path}: made with another {names}; name another --out, or give --overwrite to make it anew")

    def save_latent(self, job: Job, latent: Tensor, image: np.ndarray | None) -> None:
        """Writes a video's latents [24, T, h, w], and the uint8 RGB image [H, W, 3] that it starts with."""
        tensors = {"latent": latent.contiguous()}
        if image is not None:
            tensors["image"] = torch.from_numpy(np.ascontiguousarray(image))
        with write_atomically(self.path(job, LATENT_SUFFIX)) as stream:
            stream.write(save(tensors, metadata={"made": json.dumps(self._made[job.name])}))

    def save_video(self, job: Job, parts: Iterable[np.ndarray], fps: float) -> None:
        """Writes a video's frames, uint8 RGB [F, H, W, 3] in parts, and then what made it."""
        self.path(job, ".json").unlink(missing_ok=True)  # it may be of another video, which is no longer there then
        write_video(self.path(job, ".mp4"), parts, fps)
        with write_atomically(self.path(job, ".json")) as stream:
            stream.write((json.dumps(self._made[job.name], indent=2) + "\n").encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text_file(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not what a video was made with: {error}") from None


def write_video(path: Path, parts: Iterable[np.ndarray], fps: float) -> None:
    """Writes an mp4 file that appears when it is whole; the next part is made while one is written.

    All parts are taken even where the file cannot be written: other ranks may have a share in making them.

    Raises:
        OSError: the file system failed.
    """
    parts = _one_ahead(iter(parts))
    try:
        with write_atomically(path) as stream:
            write_mp4_parts(stream.name, parts, fps)
    finally:
        for _ in parts:
            pass


def _one_ahead(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the parts, of which a thread makes the next while one is used."""
    with ThreadPoolExecutor(1, "decode") as thread:
        following = thread.submit(next, parts, None)
        while (part := following.result()) is not None:
            following = thread.submit(next, parts, None)
            yield part


def read_latent_file(path: Path) -> SavedLatent:
    """Reads what `Outputs.save_latent`, or a preview, wrote.

    Raises:
        InputError: the file is missing or is not that.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
        if size > _MAX_LATENT_BYTES:
            raise InputError(f"{path}: {size:,} bytes are no video's latents")
        with safe_open(path, "pt") as tensors:
            names = set(tensors.keys())
            latent = tensors.get_tensor("latent") if "latent" in names else None
            image = tensors.get_tensor("image") if "image" in names else None
            made = json.loads((tensors.metadata() or {}).get("made", "{}"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a file of latents: {' '.join(str(error).split())[:300]}") from None
    _check_latent(path, latent, image, made)
    return SavedLatent(latent.float(), None if image is None else image.numpy(), made)


def _check_latent(path: Path, latent: Tensor | None, image: Tensor | None, made: Any) -> None:
    """Raises InputError unless the parts of a file of latents fit together."""
    shape = None if latent is None else list(latent.shape)
    if (
        latent is None
        or len(shape) != 4
        or shape[0] != LATENT_CHANNELS
        or 0 in shape
        or max(shape[2:]) > MAX_LATENT_SIDE
    ):
        raise InputError(f"{path}: its latent is {shape}, and must be [24, T, h, w]")
    if latent.dtype not in _DTYPES or not latent.isfinite().all():
        raise InputError(f"{path}: its latent has values that are no finite numbers; sample it anew")
    frame = [8 * shape[2], 8 * shape[3], 3]
    if image is not None and (image.dtype != torch.uint8 or list(image.shape) != frame):
        raise InputError(f"{path}: its image is {image.dtype} {list(image.shape)}, and must be uint8 {frame}")
    settings = made.get("settings", {}) if isinstance(made, dict) else None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: what made it must be a JSON object, and so must its settings")
    frames, fps = settings.get("frames", LATENT_STRIDE * shape[1]), settings.get("output_fps", 1.0)
    fits = type(frames) is int and -(-frames // LATENT_STRIDE) == shape[1]
    if not fits or type(fps) not in (int, float) or not FPS_LIMITS[0] <= fps <= FPS_LIMITS[1]:
        raise InputError(f"{path}: {shape[1]} latent frames, and settings of {frames} frames at {fps} a second")
