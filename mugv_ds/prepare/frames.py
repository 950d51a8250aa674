"""Reads frames of video files by their presentation times, in the colours and the shape in which they are shown.

The files are somebody else's: only regular files in containers of videos are opened, and nothing that they refer to.
Shape suffixes: H height, W width.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular
from mugv_ds.data.containers import OPTIONS

# FFmpeg's numbers of matrices (AVColorSpace) → those of its scaler. What is not here is taken as untagged.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}
_NAMES = {
    Colorspace.ITU709: "bt709",
    Colorspace.ITU601: "bt601",
    Colorspace.FCC: "fcc",
    Colorspace.SMPTE240M: "smpte240m",
    Colorspace.BT2020: "bt2020",
}
_HD_LINES = 720  # from which on an untagged video is taken as BT.709, else as BT.601
_EARLIER_S = 2.0  # seconds by which seeking goes further back, when it came out too late; doubled each time
_LONGEST_SIDE = 1 << 15  # of a frame with square pixels: a sample aspect ratio of 1:1000 is a slip or an attack


class VideoError(InputError):
    """A video cannot be used.

    Args:
        reason: its name in reports, such as unreadable. detail: what was found. path: of the video.
    """

    def __init__(self, reason: str, detail: str, path: str | Path | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if path is None else f"{path}: {reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Crop(NamedTuple):
    """Lines of a decoded frame that are cut away at each side, before it is turned."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


_NONE = Crop()


@dataclass(frozen=True)
class Shape:
    """How decoded frames become those that are shown.

    Attributes:
        height, width: of decoded frames. sample_aspect: width ÷ height of their pixels.
        rotation: degrees counter-clockwise by which they are turned: 0, 90, 180 or 270.
    """

    height: int
    width: int
    sample_aspect: Fraction = Fraction(1)
    rotation: int = 0

    def shown(self, crop: Crop = _NONE) -> tuple[int, int]:
        """Returns height and width of what is shown. Pixels are made square by shrinking one side, never enlarging.

        Raises:
            ValueError: the crop leaves nothing.
        """
        height, width = self.height - crop.top - crop.bottom, self.width - crop.left - crop.right
        if min(height, width) < 1 or min(crop) < 0:
            raise ValueError(f"a crop of {tuple(crop)} of {self.height}×{self.width} pixels leaves nothing")
        if self.sample_aspect >= 1:
            height = max(round(height / self.sample_aspect), 1)
        else:
            width = max(round(width * self.sample_aspect), 1)
        return (width, height) if self.rotation in (90, 270) else (height, width)


def shape_of(stream: av.VideoStream, frame: av.VideoFrame) -> Shape:
    """Returns the shape of a stream's frames, by its first one."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, 16) <= aspect <= 16:
        aspect = Fraction(1)  # no such film was ever made
    return Shape(frame.height, frame.width, aspect, round(frame.rotation / 90) * 90 % 360)


@contextmanager
def open_video(
    path: str | Path, threads: int = 1, max_pixels: int | None = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a video file: its container and its first video stream that is no cover picture.

    Args:
        path: of a regular file. threads: that decode; 0 for as many as there are cores.
        max_pixels: of a frame, beyond which the decoder refuses. Opening may decode a larger one, to learn its size.

    Raises:
        VideoError: not_a_video, unreadable, no_video_stream or crashed (there was too little memory); from the body
            also decode_error, of what FFmpeg raises there. OSError: the file is missing, or the file system failed.
    """
    with open_regular(path) as file:
        try:
            container = av.open(file, options=OPTIONS, metadata_errors="replace")
        except av.error.ArgumentError as error:  # how FFmpeg says that a format is not among those of the list
            raise VideoError("not_a_video", f"of a format that is not read ({error.strerror})", path) from None
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(*_failure("unreadable", error), path) from None
        with container:
            pictures = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
            if not streams:
                raise VideoError("no_video_stream", "holds no video stream", path)
            if streams[0].codec_context is None:
                raise VideoError("unreadable", "there is no decoder for its codec", path)
            streams[0].codec_context.thread_count = threads
            streams[0].thread_type = "AUTO" if threads != 1 else "NONE"
            if max_pixels is not None:
                streams[0].codec_context.options = {"max_pixels": str(max_pixels)}
            try:
                yield container, streams[0]
            except av.error.FFmpegError as error:
                raise VideoError(*_failure("decode_error", error), path) from None


def _failure(reason: str, error: Exception) -> tuple[str, str]:
    """Returns reason and detail of what FFmpeg raised."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if is_out_of_memory(error):
        return "crashed", f"{words}; decode.memory_gb allows more"
    return reason, words


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether FFmpeg was refused memory, which says nothing about whether the video is right."""
    return getattr(error, "errno", None) == errno.ENOMEM


def decode(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    on_packet: Callable[[av.Packet], None] | None = None,
) -> Iterator[av.VideoFrame]:
    """Yields frames in the order of presentation. Those without a time, and those not later than the one before, which
    cannot be found again by their times, are left out.

    Args:
        container, stream: see `open_video`. on_packet: is shown every packet before it is decoded.

    Raises:
        av.error.FFmpegError: decoding failed.
    """
    last = None
    for packet in container.demux(stream):
        if on_packet is not None:
            on_packet(packet)
        for frame in packet.decode():
            if frame.pts is not None and (last is None or frame.pts > last):
                last = frame.pts
                yield frame


def matrix_of(frame: av.VideoFrame) -> tuple[Colorspace, str]:
    """Returns the matrix of a frame's colours, also by name. Untagged ones have BT.601 below 720 lines, else BT.709."""
    untagged = Colorspace.ITU709 if frame.height >= _HD_LINES else Colorspace.ITU601
    matrix = _MATRICES.get(int(frame.colorspace), untagged)
    return matrix, _NAMES[matrix]


def full_range(frame: av.VideoFrame) -> bool:
    """Returns whether luma goes from 0 to 255, not from 16 to 235. Untagged ones do so by the name of their format."""
    return frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")


def to_array(
    frame: av.VideoFrame, form: str = "rgb24", size: tuple[int, int] | None = None, interpolation: str = "AREA"
) -> np.ndarray:
    """Converts a decoded frame, by the matrix and range of its source, to full range.

    Args:
        form: rgb24, bgr24 or gray. size: height and width; None for the frame's own. interpolation: of the scaler.

    Returns:
        uint8 [H, W, 3], or [H, W] of gray.
    """
    height, width = size or (frame.height, frame.width)
    matrix, _ = matrix_of(frame)
    return frame.reformat(
        width=width,
        height=height,
        format=form,
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=ColorRange.JPEG if full_range(frame) else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG,
        interpolation=interpolation,
        threads=1,  # PyAV starts a thread a core for every frame, which takes longer than converting a small one
    ).to_ndarray()


def iterate_frames(
    path: str | Path,
    pts: Sequence[int],
    *,
    crop: Sequence[int] = _NONE,
    size: tuple[int, int] | None = None,
    threads: int = 1,
) -> Iterator[np.ndarray]:
    """Yields the frames of a video at presentation times, as shown; one decoded frame is held at a time.

    They are cropped, then turned and given square pixels, and scaled in the same single step (area interpolation).

    Args:
        path: of the video.
        pts: of the wanted frames, exactly, in units of the stream's time base; they rise, and may repeat.
        crop: lines cut away at top, bottom, left and right of the decoded frame.
        size: height and width to scale to, not larger than what is shown; the picture covers it, and what reaches over
            is cut away evenly. None for the size as shown.
        threads: that decode; 0 for as many as there are cores.

    Yields:
        uint8 RGB [H, W, 3], one for each of `pts`.

    Raises:
        VideoError: it cannot be decoded, or has no frame at one of the times. OSError: see `open_video`.
        ValueError: times fall, the crop leaves nothing, or `size` would enlarge.
    """
    if any(later < earlier for earlier, later in pairwise(pts)):
        raise ValueError(f"{path}: times of frames must rise, got {list(pts)}")
    if not len(pts):
        return
    crop = Crop(*crop)
    with open_video(path, threads) as (container, stream):
        frames = _from(path, container, stream, pts[0])
        frame = next(frames, None)
        view = None if frame is None else _View(shape_of(stream, frame), crop, size)
        last, shown = None, None
        for wanted in pts:
            if wanted != last:
                while frame is not None and frame.pts < wanted:
                    frame = next(frames, None)
                if frame is None or frame.pts != wanted:
                    raise VideoError("decode_error", f"has no frame at pts {wanted}; was it replaced?", path)
                last, shown = wanted, view.of(frame)
            yield shown


def read_frames(
    path: str | Path,
    pts: Sequence[int],
    *,
    crop: Sequence[int] = _NONE,
    size: tuple[int, int] | None = None,
    threads: int = 1,
) -> list[np.ndarray]:
    """Reads the frames of a video at presentation times in any order; see `iterate_frames`.

    Returns:
        uint8 RGB [H, W, 3], one for each of `pts`; equal times share one array.
    """
    times = sorted(set(pts))
    frames = dict(zip(times, iterate_frames(path, times, crop=crop, size=size, threads=threads), strict=True))
    return [frames[time] for time in pts]


def _from(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream, pts: int
) -> Iterator[av.VideoFrame]:
    """Yields frames, beginning with a key frame not later than `pts`, or with the first of the file.

    Seeking may come out later than asked for (MPEG-TS, or a key frame whose leading pictures are wanted): then it is
    tried from further back, and at last from the start. In MPEG program streams most times are made up by FFmpeg, in
    another way after seeking, so that these are always read from the start.
    """
    earlier = 0.0
    while container.format.name != "mpeg":
        target = pts - int(earlier / stream.time_base)
        if target <= (stream.start_time or 0):
            break
        container.seek(target, stream=stream)
        frames = decode(container, stream)
        # Before a key frame come pictures that refer to what was skipped.
        first = next((frame for frame in frames if frame.key_frame or frame.pts > pts), None)
        if first is not None and first.key_frame and first.pts <= pts:
            yield first
            yield from frames
            return
        earlier = max(2 * earlier, _EARLIER_S)
    with open_video(path, stream.codec_context.thread_count) as (container, stream):
        yield from decode(container, stream)


class _View:
    """Makes of decoded frames what is shown; all of a video's frames must have one shape."""

    def __init__(self, shape: Shape, crop: Crop, size: tuple[int, int] | None) -> None:
        """Raises ValueError if the crop leaves nothing, or the size would enlarge."""
        shown = shape.shown(crop)
        size = size or shown
        if size[0] > shown[0] or size[1] > shown[1] or min(size) < 1:
            raise ValueError(f"frames of {shown[0]}×{shown[1]} as shown cannot fill {size[0]}×{size[1]}")
        self.shape = shape
        turned = shape.rotation in (90, 270)
        # Before turning: the target's size, and the part of the decoded frame that has its shape.
        self.height, self.width = size[::-1] if turned else size
        top, bottom, left, right = crop
        height, width = shape.height - top - bottom, shape.width - left - right
        scale = min(shown[0] / size[0], shown[1] / size[1])
        whole = shown[::-1] if turned else shown
        kept_height = min(round(height * self.height * scale / whole[0]), height)
        kept_width = min(round(width * self.width * scale / whole[1]), width)
        top, left = top + (height - kept_height) // 2, left + (width - kept_width) // 2
        self.rows, self.columns = slice(top, top + kept_height), slice(left, left + kept_width)

    def of(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns what is shown of a frame, uint8 RGB [H, W, 3]."""
        if (frame.height, frame.width) != (self.shape.height, self.shape.width):
            raise VideoError(
                "decode_error",
                f"frames of {self.shape.height}×{self.shape.width} and {frame.height}×{frame.width} in one video",
            )
        kept = to_array(frame)[self.rows, self.columns]
        if kept.shape[:2] != (self.height, self.width):
            kept = cv2.resize(kept, (self.width, self.height), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(np.rot90(kept, self.shape.rotation // 90))
