"""From clips to shards of latents: which clips a bucket takes, the plan of the units, and a unit's encoding.

A unit is the clips of one bucket that make a shard. What it becomes follows from its clips and the codec alone: each
clip is encoded by itself, and the order is that of the ids.

Shape suffixes: F video frames, H and W video height and width, T latent frames, h = H/8, w = W/8.
"""

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS, LATENT_STRIDE
from mugv_ds.config.prepare_schema import BucketSection, EncodeSection
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.shards import write_shard
from mugv_ds.data.storage import Folder
from mugv_ds.files.tensor_file import SampleError
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.videovae import VideoVAE, check_conv3d
from mugv_ds.prepare.buckets import Misfit, fit
from mugv_ds.prepare.frames import Crop, read_frames
from mugv_ds.prepare.rows import ENCODE, ENCODE_PLAN, FIT, SIDES
from mugv_ds.prepare.scan import Source
from mugv_ds.prepare.units import Step, digest

Codec = LinearCodec | VideoVAE
Read = Callable[[str, int, Sequence[str]], pa.Table]  # of a step's fragment of a unit, some columns

FIT_STEP = Step(
    "fit",
    1,
    ("encode.buckets", "encode.largest_only", "encode.least_area", "encode.most_repeated"),
    reads=("videos", "clips"),
)
ENCODE_VERSION = 1  # raised whenever latents would differ

_MIB = 1 << 20
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_ROOM = 1.05  # of the bytes that latents take: headers, and what else is written


def fit_clips(clips: pa.Table, videos: pa.Table, section: EncodeSection) -> pa.Table:
    """Returns the buckets of the clips of a unit of videos, as rows of `FIT`; rows with a reason are passed over.

    Args:
        clips: of `CLIP`. videos: of `VIDEO`, with the videos of all clips.
    """
    known = {row["video"]: row for row in videos.select(["video", "time_base", "pts"]).to_pylist()}
    columns = ["clip", "video", "reason", "first_pts", "last_pts", "height", "width"]
    rows = []
    for clip in clips.select(columns).to_pylist():
        if clip["reason"] is not None:
            continue
        video = known[clip["video"]]
        pts = np.asarray(video["pts"], np.int64)
        pts = pts[np.searchsorted(pts, clip["first_pts"]) : np.searchsorted(pts, clip["last_pts"], side="right")]
        found = fit((clip["height"], clip["width"]), pts * video["time_base"], section)
        if isinstance(found, Misfit):
            rows.append({"clip": clip["clip"], **vars(found)})
            continue
        rows += [
            {
                "clip": clip["clip"],
                "bucket": one.bucket.name,
                "area": one.area,
                "time_error": one.times.error,
                "repeated": one.times.repeated,
                "pts": pts[list(one.times.picked)].tolist(),
            }
            for one in found
        ]
    return pa.Table.from_pylist(rows, FIT)


def latent_shape(bucket: BucketSection) -> tuple[int, int, int, int]:
    """Returns [24, T, h, w] of a bucket's latents; a still has one latent frame."""
    frames = -(-bucket.frames // LATENT_STRIDE)
    return LATENT_CHANNELS, frames, bucket.height // LATENT_STRIDE, bucket.width // LATENT_STRIDE


def latent_bytes(bucket: BucketSection, section: EncodeSection) -> int:
    """Returns the bytes of a latent."""
    return int(np.prod(latent_shape(bucket))) * _DTYPES[section.dtype].itemsize


def extend_plan(plan: pa.Table, parts: Iterable[tuple[int, pa.Table]], section: EncodeSection) -> pa.Table:
    """Returns the plan with the clips that it lacks, in new units at its end; its rows stay as they are.

    Clips of one unit of videos stay together, so that a unit of encoding reads few fragments.

    Args:
        plan: of `ENCODE_PLAN`; its `schema.empty_table()` at the beginning.
        parts: unit of videos, and of `FIT` the clips of it that are to be encoded; in ascending order.
    """
    found = found_in((part, fits.select(["clip", "bucket"])) for part, fits in parts)
    tables, unit = [plan], next_unit(plan)
    for bucket in section.buckets:
        of_bucket, known = (rows.filter(pc.equal(rows["bucket"], bucket.name)) for rows in (found, plan))
        size = section.shard_mb * _MIB // latent_bytes(bucket, section)
        for rows in cut_units(of_bucket, known["clip"], size):
            numbers, names = ([value] * len(rows) for value in (unit, bucket.name))
            tables.append(pa.table([numbers, names, rows["clip"], rows["part"]], schema=ENCODE_PLAN))
            unit += 1
    return pa.concat_tables(tables).combine_chunks()


def next_unit(plan: pa.Table) -> int:
    """Returns the number that the next unit of a plan has."""
    return 0 if plan.num_rows == 0 else pc.max(plan["unit"]).as_py() + 1


def found_in(parts: Iterable[tuple[int, pa.Table]]) -> pa.Table:
    """Returns the rows of all units of videos, with the unit as `part`."""
    tables = [rows.append_column("part", pa.repeat(pa.scalar(part, pa.int32()), len(rows))) for part, rows in parts]
    empty = pa.schema([("clip", pa.string()), ("bucket", pa.string()), ("part", pa.int32())]).empty_table()
    return pa.concat_tables([empty.select(tables[0].column_names) if tables else empty, *tables])


def cut_units(found: pa.Table, known: pa.ChunkedArray, size: int) -> Iterator[pa.Table]:
    """Yields the rows of new units, `size` at a time and sorted by the clips' ids.

    Args:
        found: with `clip` and `part`. known: clips that have a unit.
    """
    new = found.filter(pc.invert(pc.is_in(found["clip"], value_set=known.combine_chunks())))
    new = new.sort_by([("part", "ascending"), ("clip", "ascending")])
    for start in range(0, len(new), max(size, 1)):
        yield new.slice(start, max(size, 1)).sort_by("clip")


def check_room(units: Iterable[tuple[BucketSection, int]], section: EncodeSection, out: Path) -> int:
    """Returns the bytes of the latents that are to be written, and refuses a file system that cannot hold them.

    Args:
        units: bucket and number of clips of each. out: folder of the set, which exists.

    Raises:
        InputError: there is less room. OSError: the file system failed.
    """
    needed = int(_ROOM * sum(count * latent_bytes(bucket, section) for bucket, count in units))
    free = shutil.disk_usage(out).free
    if needed > free:
        raise InputError(
            f"{out}: the latents will take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; name a larger "
            "file system, or fewer or smaller encode.buckets"
        )
    return needed


@dataclass(frozen=True)
class Shot:
    """One clip that is to be encoded.

    Attributes:
        path: of the video, relative to the folder of videos. pts: of the frames. crop: of decoded frames.
        error: why it is not to be encoded, such as withdrawn.
        source: the file as it was scanned, which it must still be; None where nobody knows.
    """

    clip: str
    path: str
    pts: tuple[int, ...]
    crop: Crop
    error: str | None = None
    source: Source | None = None


@dataclass(frozen=True)
class EncodeUnit:
    """The clips of a shard, in the order of their ids."""

    number: int
    bucket: BucketSection
    shots: tuple[Shot, ...]

    @property
    def shard(self) -> str:
        """Returns the shard's path, relative to the folder of the set."""
        return f"latents/{self.bucket.name}/u{self.number:06d}.safetensors"


def encode_key(rows: pa.Table, weights: str, section: EncodeSection) -> str:
    """Returns the key of the fragment of a unit; a clip's id stands for its pixels.

    Args:
        rows: of `ENCODE_PLAN`, those of the unit. weights: fingerprint of the codec.
    """
    bucket, clips = bucket_of(rows, section), rows["clip"].to_pylist()
    return digest("encode", ENCODE_VERSION, weights, section.dtype, bucket.model_dump(mode="json"), clips)


def bucket_of(rows: pa.Table, section: EncodeSection) -> BucketSection:
    """Returns the bucket of a unit of the plan."""
    name = rows["bucket"][0].as_py()
    return next(bucket for bucket in section.buckets if bucket.name == name)


def units_in(plan: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """Yields the number and the rows of each unit of a plan."""
    numbers = plan["unit"].to_numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(numbers)]):
        yield int(numbers[start]), plan.slice(start, stop - start)


def unit_of(
    rows: pa.Table,
    read: Read,
    section: EncodeSection,
    withdrawn: frozenset[str] = frozenset(),
    sources: Callable[[int], Mapping[str, Source]] | None = None,
) -> EncodeUnit:
    """Returns a unit of the plan with all that its encoding needs.

    Args:
        rows: of `ENCODE_PLAN`, those of the unit.
        read: of the steps "videos", "clips" and "fit", by unit of videos.
        withdrawn: ids of videos that may no longer be used.
        sources: unit of videos → its videos' files of the last scan; None: they lie where they were probed.
    """
    name = rows["bucket"][0].as_py()
    found: dict[str, Shot] = {}
    crops = [f"crop_{side}" for side in SIDES]
    for part in pc.unique(rows["part"]).to_pylist():
        videos = read("videos", part, ["video", "path"])
        paths = dict(zip(videos["video"].to_pylist(), videos["path"].to_pylist(), strict=True))
        now = None if sources is None else sources(part)
        fits = read("fit", part, ["clip", "bucket", "pts"])
        fits = fits.filter(pc.and_(pc.equal(fits["bucket"], name), pc.is_in(fits["clip"], rows["clip"])))
        pts = dict(zip(fits["clip"].to_pylist(), fits["pts"].to_pylist(), strict=True))
        clips = read("clips", part, ["clip", "video", *crops])
        for clip in clips.filter(pc.is_in(clips["clip"], fits["clip"])).to_pylist():
            video, source = clip["video"], None if now is None else now.get(clip["video"])
            error = "no file has this content any more" if now is not None and source is None else None
            error = "withdrawn" if video in withdrawn else error
            path = paths[video] if source is None else source.path
            crop = Crop(*(clip[side] for side in crops))
            found[clip["clip"]] = Shot(clip["clip"], path, tuple(pts[clip["clip"]]), crop, error, source)
    ids = rows["clip"].to_pylist()
    shots = [found.get(clip) or Shot(clip, "", (), Crop(), "is no clip any more") for clip in ids]
    return EncodeUnit(rows["unit"][0].as_py(), bucket_of(rows, section), tuple(shots))


class Encoder:
    """Encodes units on one device.

    Args:
        codec: on the device. videos: folder of the videos. out: folder of the set. section: of the config.
        threads: that decode beside one another, so that the device is fed.

    Raises:
        InputError: the device computes the codec's convolutions wrong.
    """

    def __init__(self, codec: Codec, videos: Path, out: Path, section: EncodeSection, threads: int = 4) -> None:
        self._codec, self._videos, self._out, self._section = codec, videos, out, section
        self._threads = threads
        self._device = next(codec.buffers()).device
        if isinstance(codec, VideoVAE) and section.dtype == "bfloat16" and self._device.type == "cuda":
            largest = max(section.buckets, key=lambda bucket: bucket.height * bucket.width)
            check_conv3d(self._device, height=largest.height, width=largest.width, config=codec.config)

    def __call__(self, unit: EncodeUnit) -> pa.Table:
        """Writes the shard of a unit, and returns its rows of `ENCODE`.

        Raises:
            TransientError: the file system was away for minutes. OSError: the shard could not be written.
        """
        rows, latents = [], {}
        with ThreadPoolExecutor(self._threads) as threads:
            for shot, pixels in self._decoded(threads, unit):
                row = {"clip": shot.clip, "bucket": unit.bucket.name}
                if isinstance(pixels, str):
                    rows.append(row | {"error": pixels})
                    continue
                frames, luma = pixels
                latent = encode_frames(self._codec, frames.to(self._device, non_blocking=True))
                if not latent.isfinite().all():
                    rows.append(row | {"error": "its latent is not finite"})
                    continue
                latents[shot.clip] = latent.to(_DTYPES[self._section.dtype]).cpu().contiguous()
                rows.append(row | {"luma": luma})
        if latents:
            path = self._out / unit.shard
            path.parent.mkdir(parents=True, exist_ok=True)
            write_shard(path, latents)
            facts = {"shard": unit.shard, **facts_of(path)}
            rows = [row if "error" in row else row | facts for row in rows]
        return pa.Table.from_pylist(rows, ENCODE)

    def _decoded(
        self, threads: ThreadPoolExecutor, unit: EncodeUnit
    ) -> Iterator[tuple[Shot, tuple[Tensor, float] | str]]:
        """Yields the frames of each clip and their mean luma, or what is wrong with it; a few are decoded ahead."""
        ahead: deque[tuple[Shot, Future]] = deque()
        for shot in unit.shots:
            ahead.append((shot, threads.submit(self._read, shot, (unit.bucket.height, unit.bucket.width))))
            if len(ahead) > self._threads:
                first, frames = ahead.popleft()
                yield first, frames.result()
        while ahead:
            first, frames = ahead.popleft()
            yield first, frames.result()

    def _read(self, shot: Shot, size: tuple[int, int]) -> tuple[Tensor, float] | str:
        """Returns frames, uint8 [F, H, W, 3] from where they are copied to a GPU at once, and their mean luma."""
        if shot.error is not None:
            return shot.error
        if shot.source is not None and not shot.source.is_still(self._videos / shot.path):
            return f"{shot.path}: is not the file that was scanned any more"

        def read() -> np.ndarray:
            try:
                return np.stack(read_frames(self._videos / shot.path, shot.pts, crop=shot.crop, size=size))
            except ValueError as error:
                raise SampleError(str(error)) from None

        try:
            frames = read_patiently(read, Folder(self._videos))
        except SampleError as error:
            return str(error)
        pixels = torch.from_numpy(frames)
        return pixels.pin_memory() if self._device.type == "cuda" else pixels, mean_luma(frames)


@torch.no_grad()
def encode_frames(codec: Codec, frames: Tensor) -> Tensor:
    """Returns the normalised latent fp32 [24, T, h, w] of uint8 RGB frames [F, H, W, 3], on the device of the frames.

    A single frame is repeated to the eight frames of one latent frame, as in the published code.
    """
    if len(frames) == 1:
        frames = frames.expand(LATENT_STRIDE, -1, -1, -1)
    pixels = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    # The range is known, so a bright clip without a pixel below 0 is no mistake.
    known = {"allow_nonnegative": True} if isinstance(codec, VideoVAE) else {}
    return codec.encode(pixels, **known)[0]


def mean_luma(frames: np.ndarray) -> float:
    """Returns the mean luma of uint8 RGB frames [F, H, W, 3] in [0, 1], by the weights of BT.601."""
    red, green, blue = np.mean(
        [cv2.mean(frame)[:3] for frame in frames], axis=0
    )  # NumPy's mean takes ten times as long
    return float(0.299 * red + 0.587 * green + 0.114 * blue) / 255


def facts_of(path: Path) -> dict[str, int | str]:
    """Returns bytes and hex SHA-256 of a shard."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def devices_of(device: str) -> list[str]:
    """Returns the devices that encode: of auto, all GPUs, or the CPU."""
    if device != "auto":
        return [device]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
