"""The one decoding pass over a video: everything is measured, and nothing decided.

Every frame is measured at a small size, and one every `probe.interval` seconds at a larger one. Where a video is cut,
which clips it has and what they score (`split`, `scores`) follow from these numbers alone, so that changed bounds take
seconds. A bad video is a row with `error` and `detail`.
"""

import json
import math
import time
from array import array
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.config.regular_file import NotRegularError
from mugv_ds.data.pictures import Flow, dis_flow, sharpness
from mugv_ds.files.fingerprint import fingerprint
from mugv_ds.prepare.css import Lagged, decide
from mugv_ds.prepare.frames import (
    Shape,
    VideoError,
    decode,
    full_range,
    is_out_of_memory,
    matrix_of,
    open_video,
    shape_of,
    to_array,
)
from mugv_ds.prepare.measures import Shift, borders, difference, fitted, hashes, light, small
from mugv_ds.prepare.rows import VIDEO
from mugv_ds.prepare.scan import Source
from mugv_ds.prepare.units import Step
from mugv_ds.prepare.views import WeightsError
from mugv_ds.prepare.workers import allow, run_isolated

STEP = Step("probe", 1, ("probe", "decode.max_side", "decode.max_pixels", "decode.max_frames"))

SIDE = 256  # at which every frame is measured
_CSS_SIDE = 128
_INTERLACED_FRAMES = 50  # the first, of which it is asked
_HDR = (16, 18)  # AVColorTransferCharacteristic: PQ, HLG
_FLOW_S = 0.25  # to which flow is scaled, whatever the frames' times
_PER_SAMPLE = {"sample": "i", "sharp": "f", "flow": "f", "phash": "Q", "phash_mirror": "Q"}
_BORDERS = ("border", "border_level", "border_edge")


def probe(path: str | Path, relative: str, sha256: str, config: PrepareConfig) -> dict[str, Any]:
    """Decodes a video once and measures it.

    Memory does not grow with the video but for about 80 bytes a frame, of which there are at most decode.max_frames.

    Args:
        path: of the file. relative: its path in the folder of videos, for the row. sha256: of its content, in hex.
        config: its sections probe and decode count.

    Returns:
        a row of `rows.VIDEO`; where something is wrong with the video, `error` and `detail` say what.
    """
    row: dict[str, Any] = dict.fromkeys(VIDEO.names) | {"video": sha256, "path": relative}
    try:
        before = Path(path).stat()
        row["bytes"] = before.st_size
        row |= _measure(path, config)
        after = Path(path).stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise VideoError(
                "changed_while_reading", "its size or time changed meanwhile; start again when it is complete"
            )
    except VideoError as error:
        row |= {"error": error.reason, "detail": error.detail}
    except OSError as error:
        row |= {"error": "unreadable", "detail": error.strerror or str(error)}
    except NotRegularError as error:
        row |= {"error": "unreadable", "detail": str(error).removeprefix(f"{path}: ")}
    return row


def probe_isolated(folder: Path, source: Source, config: PrepareConfig) -> dict[str, Any]:
    """Does the work of `probe` in a process of its own, which the file may crash or keep busy for ever.

    Args:
        folder: of videos. source: the file. config: see `probe`.

    Returns:
        as `probe`; where the process was killed or its memory was full, `error` is crashed or timed_out, and where the
        file is not what was scanned, changed_while_reading.
    """
    path = folder / source.path
    arguments = {
        "path": str(path),
        "relative": source.path,
        "sha256": source.video,
        "config": config.model_dump(mode="json"),
    }
    limits = config.decode
    found = run_isolated(probe_table, arguments, wall_s=limits.wall_extra, memory_gb=limits.memory_gb)
    changed = not source.is_still(path)  # asked last: that nothing changed while it was read, `probe` has seen to
    if isinstance(found, pa.Table) and not changed:
        return found.to_pylist()[0]
    row = dict.fromkeys(VIDEO.names) | {"video": source.video, "path": source.path, "bytes": source.bytes}
    if changed:
        return row | {"error": "changed_while_reading", "detail": "it is not the file that was scanned any more"}
    return row | {"error": "timed_out" if found.kind == "timed_out" else "crashed", "detail": found.detail}


def probe_table(path: str, relative: str, sha256: str, config: dict[str, Any]) -> pa.Table:
    """Returns what `probe` returns as a table of one row. config: as JSON's types."""
    parsed = PrepareConfig.model_validate_json(json.dumps(config))
    return pa.Table.from_pylist([probe(path, relative, sha256, parsed)], schema=VIDEO)


def weights(config: PrepareConfig) -> str:
    """Returns a hash of the weights that probing uses, empty if it uses none.

    Raises:
        WeightsError: they are missing.
    """
    files = []
    if config.probe.transnet is not None:
        from mugv_ds.models.transnet import weights_file

        files.append(weights_file(config.probe.transnet))
    files += [Path(config.probe.motion_weights)] if config.probe.motion_method == "raft" else []
    try:
        return fingerprint(files) if files else ""
    except OSError as error:
        raise WeightsError(
            f"{error.filename}: {error.strerror}; probe.transnet and motion_weights name files"
        ) from None


def _measure(path: str | Path, config: PrepareConfig) -> dict[str, Any]:
    """Returns what a row has besides the file. Raises VideoError, InputError, OSError."""
    limits = config.decode
    with open_video(path, max_pixels=limits.max_pixels) as (container, stream):
        claimed = _claimed_seconds(container, stream)
        width, height = stream.codec_context.width, stream.codec_context.height
        if max(width, height) > limits.max_side or width * height > limits.max_pixels:
            raise VideoError("too_large", f"frames of {width}×{height}; decode.max_side and max_pixels allow them")
        if not stream.codec_context.is_open and stream.codec_context.codec is None:
            raise VideoError("unreadable", f"no decoder of {stream.codec_context.name}")
        pass_ = _Pass(stream, config)
        try:
            for frame in decode(container, stream, pass_.count):
                pass_.add(frame)
        except av.error.FFmpegError as error:
            raise pass_.failure(error, claimed, _has_more(container, stream)) from None
        return pass_.row() | {
            "codec": stream.codec_context.name,
            "audio": bool(container.streams.audio),
            "claimed": claimed,
        }


def _has_more(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Returns whether the file goes on after an error, which else comes of its being cut."""
    try:
        return any(packet.size for packet in container.demux(stream))
    except av.error.FFmpegError:
        return False


def _claimed_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """Returns the duration that the stream claims, or else the container; None if neither does."""
    if stream.duration and stream.duration > 0:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration and container.duration > 0 else None


class EveryFrame:
    """Measures what every frame is measured for.

    Args:
        height, width: of frames as they are. lags: see `Lagged`.
    """

    _NAMES = ("content", "luma", "luma_range", "dark", "bright", "difference", "shift_x", "shift_y")

    def __init__(self, height: int, width: int, lags: Sequence[float]) -> None:
        self._columns = {name: array("f") for name in self._NAMES}
        self._scores = array("f")
        self._shift, self._lagged = Shift(height, width), Lagged(lags)
        self._before: tuple[np.ndarray, np.ndarray] | None = None  # the last frame, small and grey, and in HSV

    def add(self, seconds: float, picture: np.ndarray) -> list[tuple[float, float, float] | None]:
        """Measures the next frame, and returns what `Lagged` says of it.

        Args:
            seconds: its time. picture: uint8 BGR [256, 256, 3].
        """
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        now, hues = small(grey), cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)
        moved, changed, content = (0.0, 0.0), math.nan, 0.0
        if self._before is not None:
            before, hues_before = self._before
            moved, changed = self._shift.between(before, now), difference(before, now)
            content = difference(hues_before, hues)  # the content value of PySceneDetect, with its own weights
        self._before = now, hues
        for name, value in zip(self._NAMES, (content, *light(grey), changed, *moved), strict=True):
            self._columns[name].append(value)
        reduced = cv2.resize(grey, (_CSS_SIDE, _CSS_SIDE), interpolation=cv2.INTER_AREA)
        compared = self._lagged.add(seconds, picture, reduced)
        self._scores.extend(math.nan if pair is None else decide(*pair) for pair in compared)
        return compared

    def columns(self) -> dict[str, list]:
        """Returns the columns of `rows.VIDEO` that this measures."""
        return {name: list(values) for name, values in self._columns.items()} | {
            "css": _rows_of(self._scores, len(self._lagged.lags))
        }


class _Pass:
    """Measures frame after frame.

    Args:
        stream: that they are of. config: what is measured, and how many frames there may be.
    """

    def __init__(self, stream: av.VideoStream, config: PrepareConfig) -> None:
        self._stream, self._config, self._start = stream, config, time.monotonic()
        self._time_base: Fraction = stream.time_base
        self._bytes = 0
        self._encrypted = False
        self._interlaced = self._hdr = 0
        self._pts = array("q")
        self._samples = {name: array(kind) for name, kind in _PER_SAMPLE.items()}
        self._borders = {name: array("f") for name in _BORDERS}
        self._transnet = _transnet(config)
        self._flow: Flow = _flow(config)
        self._sampled: tuple[float, np.ndarray] | None = None
        self._next_sample = 0.0
        self._shape: Shape | None = None

    def count(self, packet: av.Packet) -> None:
        """Takes notice of a packet before it is decoded."""
        self._bytes += packet.size
        self._encrypted = self._encrypted or packet.has_sidedata("encryption_info")

    def add(self, frame: av.VideoFrame) -> None:
        """Measures the next frame."""
        if self._shape is None:
            self._begin(frame)
        elif (frame.height, frame.width) != (self._shape.height, self._shape.width):
            raise VideoError(
                "decode_error",
                f"at {self._seconds:.3f} s the frames change from {self._shape.width}×{self._shape.height} to "
                f"{frame.width}×{frame.height}",
            )
        if len(self._pts) == self._config.decode.max_frames:
            raise VideoError("too_long", f"more than {len(self._pts):,} frames; decode.max_frames allows them")
        self._pts.append(frame.pts)
        if len(self._pts) <= _INTERLACED_FRAMES:
            self._interlaced += frame.interlaced_frame
        picture = to_array(frame, "bgr24", (SIDE, SIDE))
        self._every.add(self._seconds, picture)
        if self._transnet is not None:
            self._transnet.add(picture)
        if self._seconds >= self._next_sample - 1e-6:
            self._measure_sample(frame)
            interval = self._config.probe.interval
            self._next_sample = interval * (math.floor(self._seconds / interval + 1e-6) + 1)
        self._extend_time()

    @property
    def _seconds(self) -> float:
        """The time of the last frame since the first."""
        return float((self._pts[-1] - self._pts[0]) * self._time_base) if self._pts else 0.0

    def _begin(self, frame: av.VideoFrame) -> None:
        self._shape = shape_of(self._stream, frame)
        self._every = EveryFrame(frame.height, frame.width, self._config.probe.css_lags)
        self._fixed = {
            "pixel_format": frame.format.name,
            "width": frame.width,
            "height": frame.height,
            "sample_aspect": float(self._shape.sample_aspect),
            "rotation": self._shape.rotation,
            "matrix": matrix_of(frame)[1],
            "full_range": full_range(frame),
            "hdr": int(frame.color_trc) in _HDR,
            "time_base": float(self._time_base),
        }

    def _measure_sample(self, frame: av.VideoFrame) -> None:
        """Measures what only some frames are measured for."""
        options = self._config.probe
        grey = to_array(frame, "gray", fitted(frame.height, frame.width, options.sharp_side))
        height, width = fitted(frame.height, frame.width, options.motion_side)
        colours = to_array(frame, "rgb24", (height, width))
        if self._sampled is not None:
            seconds, earlier = self._sampled
            # In pixels of frames with the full short side, and over the same time, however far the frames lie apart.
            scale = options.motion_side / min(height, width) * _FLOW_S / (self._seconds - seconds)
            self._samples["flow"][-1] = self._flow(earlier, colours) * scale
        self._sampled = self._seconds, colours
        found = borders(grey)
        for name, values in zip(_BORDERS, found, strict=True):
            self._borders[name].extend(values)
        phash, mirrored = hashes(grey)
        values = {
            "sample": len(self._pts) - 1,
            "sharp": sharpness(grey),
            "flow": math.nan,
            "phash": phash,
            "phash_mirror": mirrored,
        }
        for name, value in values.items():
            self._samples[name].append(value)

    def _extend_time(self) -> None:
        """Allows the process its time by what is decoded so far, not by what the header claims."""
        limits = self._config.decode
        decoded = min(self._seconds, float(len(self._pts)))  # a jump of the times is no progress
        left = limits.wall_extra + limits.wall_factor * decoded - (time.monotonic() - self._start)
        allow(max(left, 0.01))

    def failure(self, error: av.error.FFmpegError, claimed: float | None, has_more: bool) -> VideoError:
        """Returns what an error of decoding means, given what the header claims and whether packets follow."""
        if self._encrypted:
            return VideoError("encrypted", "its packets are encrypted")
        if is_out_of_memory(error):
            return VideoError("crashed", f"{error.strerror}; decode.memory_gb allows more")
        if not self._pts and not self._stream.codec_context.width:
            return VideoError("unreadable", "its decoder refuses its frames: damaged, or larger than FFmpeg can do")
        words = f"{error.strerror} at {self._seconds:.3f} s, after {len(self._pts)} frames"
        words += f"; the header claims {claimed:.3f} s" if claimed else ""
        return VideoError("decode_error" if has_more else "truncated", words)

    def row(self) -> dict[str, Any]:
        """Returns what was measured.

        Raises:
            VideoError: there was no frame.
        """
        frames = len(self._pts)
        if not frames:
            if self._encrypted:
                raise VideoError("encrypted", "its packets are encrypted")
            raise VideoError("unreadable", "its video stream holds no frame")
        intervals = np.diff(np.frombuffer(self._pts, np.int64)) * float(self._time_base)
        mean = float(intervals.mean()) if frames > 1 else None
        return (
            self._fixed
            | {
                "duration": self._seconds + (mean or 0.0),
                "frames": frames,
                "fps": 1 / mean if mean else None,
                "vfr": float(intervals.std() / mean) if mean else None,
                "bitrate": 8 * self._bytes / (frames * self._shape.height * self._shape.width),
                "interlaced": self._interlaced / min(frames, _INTERLACED_FRAMES),
                "pts": list(self._pts),
                "transnet": None if self._transnet is None else self._transnet.end(),
            }
            | self._every.columns()
            | {name: list(values) for name, values in self._samples.items()}
            | {name: _rows_of(values, 4) for name, values in self._borders.items()}
        )


def _rows_of(values: array, length: int) -> list[list[float]]:
    return np.frombuffer(values, np.float32).reshape(-1, length).tolist()


def _flow(config: PrepareConfig) -> Flow:
    """Returns the method of optical flow that the config names."""
    if config.probe.motion_method == "dis":
        return dis_flow()
    from mugv_ds.prepare.raft import raft_flow

    return raft_flow(config.probe.motion_weights)


def _transnet(config: PrepareConfig) -> Any:
    """Returns what finds transitions with TransNetV2, if the config asks for it."""
    if config.probe.transnet is None:
        return None
    from mugv_ds.models.transnet import Transitions

    return Transitions(config.probe.transnet)
