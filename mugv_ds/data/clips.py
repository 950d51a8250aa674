"""The videos and images that the VideoVAE learns from: their list, their clips, and what each step holds.

What a clip draws is a function of (seed, sample id, visit) alone, so every process that reads it gets the same.

Shape suffixes: B clips, F frames, H and W height and width, C = 24 latent channels, T latent frames, h = H/8, w = W/8.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import LATENT_CHANNELS, LATENT_STRIDE
from mugv_ds.config.regular_file import open_regular
from mugv_ds.config.vae_schema import VaeDataSection
from mugv_ds.data import noise
from mugv_ds.data.budget import BatchSize
from mugv_ds.data.manifest import hash_csv, read_records, whole_number
from mugv_ds.data.paths import ManifestError, check_lexically, resolve
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.plan import Plan, Stream
from mugv_ds.data.readers import Sources
from mugv_ds.data.storage import Folder
from mugv_ds.data.video import read_clip, read_still
from mugv_ds.files.tensor_file import SampleError

COLUMNS = ("sample_id", "video_path", "num_frames")
_STILLS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ClipBatch(NamedTuple):
    """A micro-batch as it is read: B clips of one length."""

    frames: Tensor  # uint8 RGB [B, F, H, W, 3]
    noise: Tensor  # fp32 [B, C, T, h, w], with which latents are drawn
    weight: Tensor  # fp32 [B], of the clip in the loss; 0 for a filler that counts nowhere

    def pixels(self, device: torch.device) -> Tensor:
        """Returns the frames on a device as fp32 [B, 3, F, H, W] in [−1, 1]."""
        return self.frames.to(device, non_blocking=True).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


@dataclass(frozen=True)
class ClipIndex:
    """The rows of a CSV of videos and images, in memory.

    Attributes:
        root: folder of the CSV. content: hex SHA-256 of the CSV.
        ids, paths: of each row, the paths relative to `root`. frames: int32 [rows], as the CSV says.
    """

    root: Path
    content: str
    ids: tuple[str, ...]
    paths: tuple[str, ...]
    frames: np.ndarray

    @classmethod
    def read(cls, csv_path: str | Path) -> "ClipIndex":
        """Reads a CSV with the columns sample_id, video_path and num_frames; others are ignored.

        Raises:
            ManifestError: it cannot be read, or is no such CSV.
            PathError: a path is absolute or leads out of the CSV's folder.
        """
        csv_path, content = Path(csv_path), hash_csv(Path(csv_path))
        ids: dict[str, int] = {}
        paths, frames = [], array("i")
        for line, record in read_records(csv_path, COLUMNS, (), _convert):
            if (first := ids.setdefault(record["sample_id"], line)) != line:
                raise ManifestError(f"{csv_path}:{line}: duplicate sample_id, first used in line {first}")
            paths.append(record["video_path"])
            frames.append(record["num_frames"])
        if not ids:
            raise ManifestError(f"{csv_path}:1: only a header, no videos")
        return cls(csv_path.parent, content, tuple(ids), tuple(paths), np.frombuffer(frames, np.int32))

    def __len__(self) -> int:
        return len(self.ids)

    def ids_digest(self) -> str:
        """Hex SHA-256 of the sample ids, in their order."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()

    def read_frames(self, row: int, start: int, count: int) -> np.ndarray:
        """Returns frames of a row, uint8 RGB [count, H, W, 3] of its own size.

        Raises:
            SampleError: the file cannot be used. PathError: its path leads somewhere it must not.
            OSError: the file system failed.
        """
        path = resolve(self.root, self.paths[row])
        try:
            open_regular(path).close()  # opening a FIFO would wait for a writer
            if PurePosixPath(self.paths[row]).suffix.lower() in _STILLS:
                if start + count > 1:
                    raise ValueError(
                        f"{path}: an image, and {start + count} frames are wanted; its num_frames must be 1"
                    )
                return read_still(path)
            return read_clip(path, start, count)
        except ValueError as error:
            raise SampleError(str(error)) from error


def _convert(record: dict) -> None:
    """Checks a row's values in place; messages lack the line.

    Raises:
        ManifestError, PathError: one cannot be used.
    """
    if not (record["sample_id"] or "").strip():
        raise ManifestError("blank sample_id")
    check_lexically(record["video_path"] or "", "video_path")
    record["num_frames"] = whole_number("num_frames", record["num_frames"] or "")


@dataclass(frozen=True)
class Clips:
    """Reads clips of one length; a `Reader` whose items are the rows of an index.

    Args:
        index: the rows. frames: of a clip. size: height and width of its frames. seed: of what is drawn.
        held_out: the first frames are taken, and the middle of the picture; otherwise both are drawn.
    """

    index: ClipIndex
    frames: int
    size: tuple[int, int]
    seed: int
    held_out: bool = False
    item_size = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns (F, H, W) of a clip."""
        return (self.frames, *self.size)

    @cached_property
    def shapes(self) -> np.ndarray:
        """Returns (F, H, W) of each row's clip, int32 [rows, 3]; (0, 0, 0) where it has too few frames."""
        return np.where(self.index.frames[:, None] >= self.frames, self.shape, 0).astype(np.int32)

    @cached_property
    def _long_enough(self) -> np.ndarray:
        return np.flatnonzero(self.index.frames >= self.frames).astype(np.int32)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Returns (C, T, h, w) of a clip's latent."""
        height, width = self.size
        return LATENT_CHANNELS, -(-self.frames // LATENT_STRIDE), height // LATENT_STRIDE, width // LATENT_STRIDE

    def name(self, item: int) -> str:
        """Sample id."""
        return self.index.ids[item]

    def alike(self, item: int) -> np.ndarray:
        """Returns the rows that have as many frames, ascending."""
        return self._long_enough

    def fetch(self, items: Sequence[tuple[int, int | None]]) -> None:
        """Nothing: videos are decoded from local files as they are read."""

    def read(self, item: int, visit: int | None) -> list[ClipBatch]:
        """One clip, as a `ClipBatch` without the first dimension; visit None marks a filler.

        Raises:
            SampleError: the file cannot be used. TransientError: the file system failed for minutes.
        """
        key = (self.seed, self.name(item), visit or 0)
        draw = noise.generator("clip", *key).random
        start = 0 if self.held_out else int(draw() * (self.index.frames[item] - self.frames + 1))
        frames = read_patiently(lambda: self.index.read_frames(item, start, self.frames), Folder(self.index.root))
        where = (0.5, 0.5) if self.held_out else (draw(), draw())
        weight = torch.tensor(0.0 if visit is None else 1.0)
        return [ClipBatch(cover_and_crop(frames, self.size, where), noise.gaussian(*key, self.latent_shape), weight)]

    def fillers(self, item: int) -> list[ClipBatch]:
        """Returns what stands in for a clip that cannot be read: without content, and of weight 0."""
        frames = torch.zeros(self.frames, *self.size, 3, dtype=torch.uint8)
        return [ClipBatch(frames, torch.zeros(self.latent_shape), torch.tensor(0.0))]

    def time(self, item: int, visit: int) -> float:
        """Not of clips: they have no timestep."""
        return 0.0


def cover_and_crop(frames: np.ndarray, size: tuple[int, int], where: tuple[float, float]) -> Tensor:
    """Scales frames to cover a size, bilinearly and antialiased, and crops them.

    Args:
        frames: uint8 [F, H, W, 3]. size: height and width of the result.
        where: in [0, 1], of what is cut off the share that lies above, and on the left.

    Returns:
        uint8 [F, *size, 3].
    """
    height, width = frames.shape[1:3]
    scale = max(size[0] / height, size[1] / width)
    covering = [max(round(side * scale), least) for side, least in zip((height, width), size, strict=True)]
    x_F3HW = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if covering != [height, width]:
        x_F3HW = F.interpolate(x_F3HW.float(), covering, mode="bilinear", antialias=True, align_corners=False)
        x_F3HW = x_F3HW.round().clamp(0, 255).to(torch.uint8)
    top, left = (
        min(int(share * (side - wanted + 1)), side - wanted)
        for share, side, wanted in zip(where, covering, size, strict=True)
    )
    return x_F3HW[:, :, top : top + size[0], left : left + size[1]].permute(0, 2, 3, 1).contiguous()


class ClipData:
    """The data of a run that trains the VideoVAE.

    Args:
        section: of the config.

    Attributes:
        train, validation: the indexes; validation None: there is none.
        readers: one for each length. plan: the steps of the run. held_out: reads the held-out clips, or None.

    Raises:
        ManifestError, PathError: a CSV cannot be used.
        ConfigError: no row is long enough, or a held-out one is shorter.
    """

    def __init__(self, section: VaeDataSection) -> None:
        self.train = ClipIndex.read(section.manifest)
        self.validation = None if section.val_manifest is None else ClipIndex.read(section.val_manifest)
        readers = tuple(Clips(self.train, length.frames, section.size, section.seed) for length in section.lengths)
        for reader in readers:
            if not reader.shapes.any():
                raise ConfigError(
                    f"data.lengths: {section.manifest} has no video of {reader.frames} frames, at most "
                    f"{self.train.frames.max()}; leave that length out"
                )
        size = BatchSize(section.global_batch_size, section.micro_batch_size)
        streams = [
            Stream(f"{reader.frames}_frames", i, reader.shapes, {reader.shape: size}, share=((0, length.share),))
            for i, (reader, length) in enumerate(zip(readers, section.lengths, strict=True))
        ]
        self.readers, self.plan = Sources(readers), Plan(streams, section.seed)
        self.held_out = self._held_out(section)

    def _held_out(self, section: VaeDataSection) -> Clips | None:
        if self.validation is None:
            return None
        reader = Clips(self.validation, section.val_frames, section.size, section.seed, held_out=True)
        short = np.flatnonzero(self.validation.frames < section.val_frames)
        if len(short):
            raise ConfigError(
                f"data.val_frames = {section.val_frames}: {section.val_manifest} has shorter videos, "
                f"{self.validation.ids[short[0]]} of {self.validation.frames[short[0]]} frames; lower it, or leave "
                "them out"
            )
        return reader

    def order(self) -> dict[str, str]:
        """Names what the order of the clips is a function of beside the position; see `RunData.order`."""
        return {"the sample ids": self.train.ids_digest(), **self.plan.identity()}

    def content(self) -> dict[str, str]:
        """Names what the CSVs hold, as this process sees them: config key → SHA-256."""
        indexes = {"data.manifest": self.train, "data.val_manifest": self.validation}
        return {key: index.content for key, index in indexes.items() if index is not None}
