"""Reads and writes video files, and makes contact sheets and GIFs to look at.

Shape suffixes: B batch, F frames, H height, W width; the last dimension of 3 is RGB.
"""

import io
import itertools
import math
import re
import struct
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.regular_file import open_regular
from mugv_ds.data.containers import OPTIONS
from mugv_ds.files.atomic import write_changed

# A crf of 18 is called visually lossless; small clips of flat colour show losses sooner, and bits are cheap here.
# mbtree is off because with it x264's AVX-512 code was measured to write other bytes and pixels at each run.
_X264_OPTIONS = {"crf": "10", "x264-params": "mbtree=0"}
_NAME_LENGTH = 60
_GIF_SIDE, _GIF_FPS = 320, 16.0
# Colours are converted in one thread: for every frame PyAV would start as many threads as there are cores, which takes
# several times as long as converting a small frame.
_THREADS = 1
_SHEET_FRAME_WIDTH = 128  # frames of small videos are enlarged to about this many pixels
_SHEET_LARGEST = 320  # and those of large ones made smaller to this many, on their longer side
_SHEET_FRAMES = 6
_SHEET_CAPTION = 500  # characters
_SHEET_GAP = 4
_FONT_SIZE = 13
_SMALLEST_IMAGE = 8  # pixels a side
_MOST_PIXELS = 1 << 26  # of an image; it is read in a second and 400 MB
_MOST_CROPPED = 64  # times the area of a video's frame, to which an image may have to be scaled


def write_mp4(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Writes an H.264 (yuv420p) mp4 file; see `write_mp4_parts`.

    Args:
        frames: uint8 RGB [F, H, W, 3].
    """
    write_mp4_parts(path, [frames], fps)


def write_mp4_parts(path: str | Path, parts: Iterable[np.ndarray], fps: float) -> None:
    """Writes an H.264 (yuv420p) mp4 file of frames that come in parts, of which one is held at a time.

    Args:
        path: file to write; its folder must exist.
        parts: uint8 RGB [F, H, W, 3] each, of one size, H and W even (yuv420p halves the colour planes).
        fps: frames a second.

    Raises:
        ValueError: there are no frames, they have another shape or dtype or odd sides, or `fps` is not positive.
    """
    if not fps > 0:
        raise ValueError(f"{path}: fps must be positive, got {fps}")
    parts = iter(parts)
    frames = next(parts, np.empty(0))
    _check_frames(path, frames, None)
    size = frames.shape[1:3]
    with av.open(str(path), "w", format="mp4") as container:
        # Rates such as 30000/1001 come back exactly.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = size
        stream.pix_fmt, stream.options = "yuv420p", dict(_X264_OPTIONS)
        # Players guess the matrix of an untagged file by its size, so that colours would shift with the resolution.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        for part in itertools.chain([frames], parts):
            _check_frames(path, part, size)
            for frame in part:
                container.mux(stream.encode(_to_yuv(frame)))
        container.mux(stream.encode())


def _check_frames(path: str | Path, frames: np.ndarray, size: tuple[int, int] | None) -> None:
    """Raises ValueError unless the frames are uint8 RGB of even sides, and of this size if one is given."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) == 0:
        raise ValueError(f"{path}: frames must be uint8 [F, H, W, 3] with F ≥ 1, got {frames.dtype} {frames.shape}")
    _, height, width, _ = frames.shape
    if size not in (None, (height, width)):
        raise ValueError(f"{path}: frames of {height}×{width} after some of {size[0]}×{size[1]}")
    if height % 2 or width % 2:
        raise ValueError(f"{path}: height and width must be even for yuv420p, got {height}×{width}: crop or resize")


def _to_yuv(frame: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=_THREADS
    )


def read_mp4(path: str | Path) -> tuple[np.ndarray, float]:
    """Reads all frames of a video file.

    Returns:
        uint8 RGB frames [F, H, W, 3], and the mean frames a second.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded as video.
    """
    with _opened(path) as (container, stream):
        frames = [frame.to_ndarray(format="rgb24", threads=_THREADS) for frame in container.decode(stream)]
        rate = stream.average_rate
    if not frames or not rate:
        raise ValueError(f"{path}: its video stream holds no frames")
    return np.stack(frames), float(rate)


def read_some_frames(path: str | Path, count: int = _SHEET_FRAMES) -> np.ndarray:
    """Reads frames of a video file, evenly spaced from the first to the last; no others are held.

    Returns:
        uint8 RGB [count, H, W, 3]; a video with fewer frames repeats some.

    Raises:
        FileNotFoundError: there is no such file. ValueError: the file cannot be decoded as video.
    """
    with _opened(path) as (container, stream):
        wanted = spaced(stream.frames, count) if stream.frames else [0]
        kept = {
            number: frame.to_ndarray(format="rgb24", threads=_THREADS)
            for number, frame in enumerate(container.decode(stream))
            if number in wanted
        }
    if not kept.keys() >= {*wanted}:
        raise ValueError(f"{path}: its video stream does not hold the {stream.frames} frames that it claims")
    return np.stack([kept[number] for number in wanted])


def spaced(frames: int, count: int) -> list[int]:
    """Returns `count` of the numbers from 0 to frames − 1, evenly spaced from the first to the last."""
    return np.linspace(0, frames - 1, count).round().astype(int).tolist()


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple]:
    """Opens a video file: the container, and its first video stream. What cannot be decoded is a ValueError."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video stream")
            yield container, container.streams.video[0]
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise ValueError(f"{path}: not a readable video ({error.strerror})") from error


def read_clip(path: str | Path, start: int, count: int) -> np.ndarray:
    """Reads `count` frames of a video file from frame `start` on; what comes before is decoded and not converted.

    Only containers of common video files are opened: a playlist would lead to other files.

    Returns:
        uint8 RGB frames [count, H, W, 3].

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it cannot be decoded as video, or has fewer frames.
    """
    try:
        with av.open(str(path), options=dict(OPTIONS)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video stream")
            wanted = islice(container.decode(container.streams.video[0]), start, start + count)
            frames = [frame.to_ndarray(format="rgb24", threads=_THREADS) for frame in wanted]
    except av.error.FFmpegError as error:
        if isinstance(error, OSError) and not isinstance(error, ValueError):
            raise
        raise ValueError(f"{path}: not a readable video ({error.strerror})") from error
    if len(frames) < count:
        raise ValueError(f"{path}: has {start + len(frames)} frames, {start + count} are wanted")
    return np.stack(frames)


def read_still(path: str | Path) -> np.ndarray:
    """Reads an image file as one frame, uint8 RGB [1, H, W, 3], turned as its EXIF data say and on white.

    Raises:
        InputError: it is not an image, is damaged, or has more than 2**26 pixels. OSError: it is missing, or the file
            system failed.
    """
    return np.array(_read_upright(path))[None]


def to_frames(video: Tensor) -> Tensor:
    """Converts pixels [B, 3, F, H, W], clamped to [−1, 1], to uint8 RGB frames [B, F, H, W, 3]."""
    return ((video.clamp(-1, 1).permute(0, 2, 3, 4, 1) + 1) * 127.5).round().to(torch.uint8)


def video_name(number: int, caption: str) -> str:
    """Makes a file name without its ending of a number and a caption's Latin letters and digits: 00-a-red-circle."""
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower())
    return f"{number:02d}-{words.strip('-')[:_NAME_LENGTH]}".strip("-")


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """Encodes frames as a small animated GIF for pages that show images: at most 320 pixels a side, 16 frames a second.

    Args:
        frames: uint8 RGB [F, H, W, 3]. fps: frames a second.
    """
    every = math.ceil(fps / _GIF_FPS)
    images = [Image.fromarray(frame) for frame in frames[::every]]
    for image in images:
        image.thumbnail((_GIF_SIDE, _GIF_SIDE))
    file = io.BytesIO()
    images[0].save(
        file, format="GIF", save_all=True, append_images=images[1:], duration=round(1000 * every / fps), loop=0
    )
    return file.getvalue()


def contact_sheet(
    path: str | Path, videos: Iterable[tuple[str, np.ndarray]], frames_per_video: int = _SHEET_FRAMES
) -> None:
    """Writes a PNG with one row a video: the caption, and below it frames evenly spaced from the first to the last.

    Args:
        path: file to write as a whole; it is not touched if it is that already.
        videos: (caption, uint8 RGB frames [F, H, W, 3]) pairs, of which one is held at a time; sizes may differ. Small
            frames are enlarged by a whole factor without smoothing, large ones are made smaller.
        frames_per_video: frames in a row; a video with fewer frames repeats some.

    Raises:
        ValueError: there are no videos.
        OSError: the file system failed.
    """
    rows = [_sheet_row(caption, frames, frames_per_video) for caption, frames in videos]
    if not rows:
        raise ValueError(f"{path}: a contact sheet needs at least one video")
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_changed(Path(path), content.getvalue())


def _sheet_row(caption: str, frames: np.ndarray, count: int) -> Image.Image:
    """Draws one row of a contact sheet."""
    picked = frames[spaced(len(frames), count)]
    zoom = max(1, _SHEET_FRAME_WIDTH // frames.shape[2])
    smaller = max(1.0, max(frames.shape[1:3]) / _SHEET_LARGEST)
    height, width = (max(round(side * zoom / smaller), 1) for side in frames.shape[1:3])
    resampling = Image.Resampling.BOX if smaller > 1 else Image.Resampling.NEAREST
    row_width = count * (width + _SHEET_GAP) + _SHEET_GAP
    # The default font is about half as wide as it is high.
    text = "\n".join(textwrap.wrap(caption[:_SHEET_CAPTION], max(8, 2 * (row_width - 2 * _SHEET_GAP) // _FONT_SIZE)))
    text_height = (text.count("\n") + 1) * (_FONT_SIZE + 5) + _SHEET_GAP

    row = Image.new("RGB", (row_width, text_height + height + _SHEET_GAP), "white")
    font = ImageFont.load_default(size=_FONT_SIZE)
    ImageDraw.Draw(row).multiline_text((_SHEET_GAP, _SHEET_GAP), text, fill="black", font=font)
    for index, frame in enumerate(picked):
        image = Image.fromarray(frame).resize((width, height), resampling)
        row.paste(image, (_SHEET_GAP + index * (width + _SHEET_GAP), text_height))
    return row


def read_image(path: str | Path, height: int, width: int) -> Tensor:
    """Reads an image as the first frame of a video: scaled to cover height × width, then cropped around its centre.

    The arithmetic is that of the published sampler: bicubic with antialiasing to the rounded covering size, then a crop
    at whole pixels. Ours is that the image is turned as its EXIF data say, and that what is transparent becomes white.

    Returns:
        float32 [3, height, width] in [−1, 1].

    Raises:
        InputError: the file is not an image, has fewer than 8 pixels a side or more than 2**26, or is so narrow that
            scaled it would be more than 64 times as large as the video's frames. OSError: it is missing, or the file
            system failed.
    """
    rgb = _read_upright(path)
    if min(rgb.size) < _SMALLEST_IMAGE:
        raise InputError(f"{path}: an image of {rgb.width}×{rgb.height} pixels; give one of at least 8×8")
    by_height, by_width = height / rgb.height, width / rgb.width
    covering = (round(rgb.width * by_height), height) if by_height > by_width else (width, round(rgb.height * by_width))
    if math.prod(covering) > _MOST_CROPPED * height * width:
        raise InputError(
            f"{path}: {rgb.width}×{rgb.height} pixels are too far from the video's {width}×{height}; crop it before"
        )
    left, top = (round((have - want) / 2) for have, want in zip(covering, (width, height), strict=True))
    fitted = rgb.resize(covering, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1


def _read_upright(path: str | Path) -> Image.Image:
    """Reads an image file in RGB, turned as its EXIF data say, on white where it is transparent.

    Raises:
        InputError: it is not an image, is damaged, or has more than 2**26 pixels. OSError: it is missing, or the file
            system failed.
    """
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, and of sizes that are refused here
            image = Image.open(file)
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are more than {_MOST_PIXELS:,}; make it smaller")
            return _over_white(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a readable image: of no format that Pillow knows") from None
    except (Image.DecompressionBombError, SyntaxError, ValueError, struct.error) as error:
        raise InputError(f"{path}: not a readable image: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{path}: not a readable image: {error}") from error  # how Pillow says that a file is cut


def _over_white(image: Image.Image) -> Image.Image:
    """Returns the image in RGB, what is transparent in white; 16 bits become 8, which Pillow would clip them to.

    Raises:
        ValueError: its numbers have no agreed range.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits a pixel in one channel; give 8 or 16")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
