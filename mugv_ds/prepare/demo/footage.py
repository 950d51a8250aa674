"""Draws a folder of raw videos, one for each thing that can be wrong with footage, and tells what must come of each.

They are small, and the same bytes each time. `SOURCES` is the table.

Shape suffixes: F frames, H height, W width.
"""

import csv
import io
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

from mugv_ds.prepare.demo.drawn import DrawnScene
from mugv_ds.prepare.demo.joins import dissolve, fade, wipe

HEIGHT, WIDTH, FPS = 180, 320, 24
_FRAMES = 60  # of a source, and of each shot of those with several
_DISSOLVE, _FADE, _BLACK, _WIPE = 25, 12, 6, 20  # frames
_BAR, _PILLAR = 24, 40  # lines of borders at each side
_UNIT = Fraction(1, 24000)  # seconds; 23.976, 24, 25 and 30 a second are whole
_CSV = "sources.csv"


@dataclass(frozen=True)
class Expectation:
    """What must come of a source.

    Attributes:
        reason: an error of the video, or a reason of all its clips; None where a clip of it is accepted.
        step: optional step without which the reason is not found, and a clip is accepted.
        values: column of `rows.CLIP` or `rows.VIDEO` → least and largest value that it may have.
        mixed: first and last second of each transition, of which no clip may have a frame; a cut has one time twice.
    """

    reason: str | None = None
    step: str | None = None
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    mixed: tuple[tuple[float, float], ...] = ()


def draw_sources(folder: Path) -> None:
    """Draws all sources into a folder, which must exist, and `sources.csv`, the table of licences, beside them."""
    for name, (draw, _) in SOURCES.items():
        draw(folder / name)
    with (folder / _CSV).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "licence", "allowed", "consent", "origin", "note"])
        writer.writerow(["unlicensed.mp4", "", "", "", "drawn", "nobody knows whose it is"])
        writer.writerow(["*", "CC0-1.0", "yes", "not needed", "drawn", ""])


def expectations() -> dict[str, Expectation]:
    """Returns what must come of each source, by its name."""
    return {name: expectation for name, (_, expectation) in SOURCES.items()}


def shot(seed: int, frames: int = _FRAMES, height: int = HEIGHT, width: int = WIDTH, fps: float = FPS) -> np.ndarray:
    """Draws a moving shot, uint8 RGB [F, H, W, 3]."""
    scene = DrawnScene(seed, height, width)
    return np.stack([scene.frame(number / fps) for number in range(frames)])


def write_video(
    path: Path,
    frames_FHWC: Sequence[np.ndarray],
    *,
    fps: float = FPS,
    times: Sequence[float] | None = None,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    aspect: Fraction | None = None,
    transfer: int | None = None,
) -> Path:
    """Writes a video file, of the same bytes each time.

    Args:
        path: whose ending decides the container. frames_FHWC: uint8 RGB [H, W, 3] each.
        fps: that the header claims, and that there are if no `times` are given. times: of the frames, in seconds.
        codec, pixel_format, options: of the encoder. aspect: of the pixels. transfer: AVColorTransferCharacteristic.
    """
    times = [number / fps for number in range(len(frames_FHWC))] if times is None else times
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_FHWC[0].shape[:2]
        context = stream.codec_context
        # One thread: the rate control of several depends on how many there are.
        context.thread_count, context.flags = 1, context.flags | av.codec.context.Flags.bitexact
        stream.pix_fmt, context.time_base = pixel_format, _UNIT
        stream.options = dict(
            {"crf": "16", "preset": "veryfast", "x264-params": "mbtree=0"} if options is None else options
        )
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        if transfer is not None:
            context.color_trc = transfer
        for picture, time in zip(frames_FHWC, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format=pixel_format, threads=1)
            frame.pts, frame.time_base = round(time / _UNIT), _UNIT
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _moving(path: Path) -> None:
    write_video(path, shot(1))


def _cuts(path: Path) -> None:
    write_video(path, np.concatenate([shot(seed) for seed in (2, 3, 4)]))


def _still(path: Path) -> None:
    write_video(path, [shot(5, 1)[0]] * _FRAMES)


def _blurred(path: Path) -> None:
    write_video(path, [cv2.GaussianBlur(frame, None, 3.0) for frame in shot(6)])


def _smaller(frames: np.ndarray) -> list[np.ndarray]:
    return [cv2.resize(frame, (256, 144), interpolation=cv2.INTER_AREA) for frame in frames]


def _duplicate(path: Path) -> None:
    write_video(path, _smaller(shot(1)), options={"crf": "24", "x264-params": "mbtree=0"})


def _mirrored(path: Path) -> None:
    write_video(path, _smaller(shot(1)[:, :, ::-1]))


def _overlaid(path: Path) -> None:
    frames = shot(7)
    for frame in frames:
        for thickness, colour in ((6, (0, 0, 0)), (2, (255, 255, 255))):
            cv2.putText(
                frame, "SUBSCRIBE NOW", (14, 150), cv2.FONT_HERSHEY_SIMPLEX, 1.2, colour, thickness, cv2.LINE_AA
            )
    write_video(path, frames)


def _truncated(path: Path) -> None:
    write_video(path, shot(8, 72))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 4 // 5])


def _odd(path: Path) -> None:
    write_video(path, shot(9, height=181, width=321), pixel_format="yuv444p")


def _film(path: Path) -> None:
    write_video(path, shot(10, fps=24000 / 1001), fps=24000 / 1001)


def _audio(path: Path) -> None:
    tone = (8000 * np.sin(np.arange(16000) * 0.2)).astype(np.int16)
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(tone.tobytes())
    sound.seek(0)
    with av.open(sound) as source, av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("aac", rate=8000)
        for frame in source.decode(audio=0):
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _dark(path: Path) -> None:
    write_video(path, (shot(11) * 0.08).astype(np.uint8))


def _letterbox(path: Path) -> None:
    frames = shot(12)
    frames[:, :_BAR] = frames[:, -_BAR:] = 0
    write_video(path, frames)


def _pillarbox(path: Path) -> None:
    frames = shot(13)
    frames[:, :, :_PILLAR] = frames[:, :, -_PILLAR:] = 0
    write_video(path, frames)


def _dissolve(path: Path) -> None:
    before, after = shot(14, _FRAMES + _DISSOLVE), shot(15, _FRAMES + _DISSOLVE)
    mixed = dissolve(before[_FRAMES:], after[:_DISSOLVE])
    write_video(path, np.concatenate([before[:_FRAMES], mixed, after[_DISSOLVE:]]))


def _fade(path: Path) -> None:
    before, after = shot(16, _FRAMES + _FADE), shot(17, _FRAMES + _FADE)
    black = np.zeros_like(before[:_BLACK])
    out, into = fade(before[_FRAMES:]), fade(after[:_FADE][::-1])[::-1]
    write_video(path, np.concatenate([before[:_FRAMES], out, black, into, after[_FADE:]]))


def _wipe(path: Path) -> None:
    before, after = shot(18, _FRAMES + _WIPE), shot(19, _FRAMES + _WIPE)
    mixed = wipe(before[_FRAMES:], after[:_WIPE], 0)
    write_video(path, np.concatenate([before[:_FRAMES], mixed, after[_WIPE:]]))


def _vfr(path: Path) -> None:
    steps = np.tile([0.03, 0.05, 0.04], _FRAMES // 3)
    times = np.concatenate([[0.0], np.cumsum(steps)])[:_FRAMES]
    scene = DrawnScene(20, HEIGHT, WIDTH)
    write_video(path, [scene.frame(time) for time in times], times=times)


def _anamorphic(path: Path) -> None:
    write_video(path, shot(21, width=240), aspect=Fraction(4, 3))


def _hdr(path: Path) -> None:
    write_video(path, shot(22), transfer=16)


def _interlaced(path: Path) -> None:
    scene = DrawnScene(23, HEIGHT, WIDTH)
    frames = [scene.frame(number / FPS) for number in range(_FRAMES)]
    for number, frame in enumerate(frames):
        frame[1::2] = scene.frame((number + 0.5) / FPS)[1::2]
    write_video(path, frames, options={"crf": "16", "preset": "veryfast", "x264-params": "mbtree=0:tff=1"})


def _picture(path: Path) -> None:
    with path.open("wb") as file:
        Image.fromarray(shot(24, 1)[0]).save(file, format="PNG")


def _list(path: Path) -> None:
    path.write_text("ffconcat version 1.0\nfile moving.mp4\n")


def _lying(path: Path) -> None:
    """The header claims twice the frames a second that there are."""
    write_video(path, shot(25), fps=2 * FPS, times=[number / FPS for number in range(_FRAMES)])


def _doubled(path: Path) -> None:
    write_video(path, np.repeat(shot(26, fps=FPS / 2, frames=_FRAMES // 2), 2, axis=0))


def _shaking(path: Path) -> None:
    """Held in a hand that trembles five times a second, by 1.9% of the short side."""
    scene, frames = DrawnScene(31, HEIGHT, WIDTH, contrast=0.8), []
    for number in range(_FRAMES):
        phase = 10 * np.pi * number / FPS
        frames.append(scene.frame(number / FPS, (0.019 * np.sin(phase), 0.019 * np.cos(1.1 * phase))))
    write_video(path, frames)


def _unlicensed(path: Path) -> None:
    write_video(path, shot(28))


def _at(*frames: int) -> tuple[float, ...]:
    return tuple(frame / FPS for frame in frames)


# Name → what draws it, and what must come of it.
SOURCES: dict[str, tuple[Callable[[Path], None], Expectation]] = {
    "moving.mp4": (_moving, Expectation(values={"fps": (23.999, 24.001), "motion": (1, 20), "sharp_min": (200, 2000)})),
    "cuts.mp4": (_cuts, Expectation(mixed=(_at(_FRAMES, _FRAMES), _at(2 * _FRAMES, 2 * _FRAMES)))),
    "still.mp4": (_still, Expectation("still", values={"motion": (0, 0.1), "repeated": (0.8, 1)})),
    "blurred.mp4": (_blurred, Expectation("blurred", values={"sharp_max": (0, 100)})),
    "duplicate.mp4": (_duplicate, Expectation("duplicate_picture")),
    "overlaid.mp4": (_overlaid, Expectation("overlay_text", step="text")),
    "truncated.mkv": (_truncated, Expectation("truncated", values={"claimed": (2.9, 3.1), "duration": (1, 2.5)})),
    "odd.mkv": (_odd, Expectation(values={"width": (321, 321), "height": (181, 181)})),
    "film.mp4": (_film, Expectation(values={"fps": (23.9759, 23.9761)})),
    "audio.mp4": (_audio, Expectation("no_video_stream")),
    "dark.mp4": (_dark, Expectation("too_dark", values={"luma": (0, 0.05)})),
    "letterbox.mp4": (
        _letterbox,
        Expectation(values={"crop_top": (_BAR, _BAR + 2), "crop_bottom": (_BAR, _BAR + 2), "crop_left": (0, 0)}),
    ),
    "dissolve.mp4": (_dissolve, Expectation(mixed=(_at(_FRAMES, _FRAMES + _DISSOLVE),))),
    "fade.mp4": (_fade, Expectation(mixed=(_at(_FRAMES, _FRAMES + 2 * _FADE + _BLACK),))),
    "wipe.mp4": (_wipe, Expectation(mixed=(_at(_FRAMES, _FRAMES + _WIPE),))),
    "vfr.mkv": (_vfr, Expectation(values={"vfr": (0.15, 0.25), "fps": (24.5, 25.5)})),
    "anamorphic.mp4": (_anamorphic, Expectation(values={"width": (240, 240), "height": (135, 135)})),
    "hdr.mkv": (_hdr, Expectation("hdr")),
    "interlaced.mp4": (_interlaced, Expectation("interlaced", values={"interlaced": (0.9, 1)})),
    "picture.mp4": (_picture, Expectation("not_a_video")),
    "list.mp4": (_list, Expectation("not_a_video")),
    "lying.mkv": (_lying, Expectation(values={"fps": (23.9, 24.1)})),
    "doubled.mp4": (_doubled, Expectation("repeated", values={"repeated": (0.4, 0.6)})),
    "pillarbox.mp4": (
        _pillarbox,
        Expectation(values={"crop_left": (_PILLAR, _PILLAR + 2), "crop_right": (_PILLAR, _PILLAR + 2)}),
    ),
    "shaking.mp4": (_shaking, Expectation("shake", values={"shake": (0.01, 0.1)})),
    "mirrored.mp4": (_mirrored, Expectation("duplicate_mirror")),
    "unlicensed.mp4": (_unlicensed, Expectation("no_licence")),
}
