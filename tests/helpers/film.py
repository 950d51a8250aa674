"""Small films that move, and the rows that the steps before encoding would write of them."""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa

from mugv_ds.data.noise import generator
from mugv_ds.prepare.frames import decode, open_video
from mugv_ds.prepare.rows import CLIP, SIDES, VIDEO

UNIT = Fraction(1, 12000)  # seconds; 24, 25 and 30 a second are whole


def draw_film(key: str, frames: int, size: tuple[int, int] = (64, 80), step: float = 3.0) -> np.ndarray:
    """Coloured clouds that drift `step` pixels a frame, uint8 RGB [F, H, W, 3]; in a colour of the film's own."""
    draw = generator("film", key)
    height, width = size
    length = int(width + step * frames) + 2
    clouds = cv2.resize(
        draw.integers(0, 256, (max(height // 8, 2), length // 8, 3)).astype(np.float32), (length, height)
    )
    clouds = (0.75 * clouds + draw.integers(0, 64, 3)).clip(0, 255).astype(np.uint8)
    return np.stack([clouds[:, int(step * i) : int(step * i) + width] for i in range(frames)])


def write_film(path: Path, frames: np.ndarray, times: Sequence[float], aspect: Fraction | None = None) -> Path:
    """Writes an mp4 whose frame i is shown at times[i] seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "8", "x264-params": "mbtree=0"}
        stream.codec_context.time_base = UNIT
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for picture, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(time / UNIT), UNIT
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def video_row(path: Path) -> dict:
    """What probing writes of a video, as far as encoding reads it."""
    with open_video(path) as (container, stream):
        pts = [frame.pts for frame in decode(container, stream)]
        base = float(stream.time_base)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"video": digest, "path": path.name, "time_base": base, "pts": pts}


def clip_row(
    video: dict, size: tuple[int, int], first: int = 0, last: int = -1, crop: Sequence[int] = (0, 0, 0, 0)
) -> dict:
    """A clip of frames `first` to `last` of a video; size: height and width as shown."""
    pts = video["pts"]
    name = f"{video['video']} {pts[first]} {pts[last]} {tuple(crop)}"
    return {
        "clip": hashlib.blake2b(name.encode(), digest_size=16).hexdigest(),
        "video": video["video"],
        "first_pts": pts[first],
        "last_pts": pts[last],
        "height": size[0],
        "width": size[1],
        **{f"crop_{side}": lines for side, lines in zip(SIDES, crop, strict=True)},
    }


def tables(videos: Sequence[dict], clips: Sequence[dict]) -> dict[str, pa.Table]:
    """The fragments of the steps videos and clips."""
    return {"videos": pa.Table.from_pylist(list(videos), VIDEO), "clips": pa.Table.from_pylist(list(clips), CLIP)}
