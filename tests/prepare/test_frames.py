"""Frames are found by their times, exactly, whatever the container, the codec and the order of decoding."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest

from mugv_ds.config.errors import InputError
from mugv_ds.prepare.frames import (
    Crop,
    Shape,
    VideoError,
    decode,
    iterate_frames,
    open_video,
    read_frames,
    to_array,
)

HEIGHT, WIDTH, FRAMES = 48, 64, 60


def counting(number: int) -> np.ndarray:
    """A frame that shows its own number in eight columns of black and white."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    return np.repeat(np.tile(np.repeat(np.uint8(bits), WIDTH // 8), (HEIGHT, 1))[..., None], 3, axis=-1)


def number_in(frame: np.ndarray) -> int:
    columns = frame[frame.shape[0] // 2, WIDTH // 16 :: WIDTH // 8, 0]
    return int(sum(int(value > 127) << bit for bit, value in enumerate(columns)))


def write(path, codec="libx264", options=None, times=None, rotation=None, aspect=None, pictures=None, **tags):
    """Writes a video whose frame i is shown at times[i] milliseconds; by default there are 25 a second."""
    times = [40 * number for number in range(FRAMES)] if times is None else times
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        unit = Fraction(1, 25) if codec == "mpeg2video" else Fraction(1, 1000)  # what MPEG-2 allows
        stream.codec_context.time_base = unit
        stream.options = options or {}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for number, time in enumerate(times):
            picture = counting(number) if pictures is None else pictures[number]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = int(time * Fraction(1, 1000) / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def all_pts(path):
    with open_video(path) as (container, stream):
        return [frame.pts for frame in decode(container, stream)]


KINDS = {
    "x.mp4": ("libx264", {"g": "12", "bf": "3"}),
    "open.mp4": ("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "refresh.mp4": ("libx264", {"g": "12", "x264-params": "intra-refresh=1"}),
    "x.mkv": ("libx265", {"x265-params": "keyint=12:bframes=4:open-gop=1:log-level=none"}),
    "x.ts": ("libx264", {"g": "12", "bf": "2"}),
    "x.avi": ("mpeg4", {"g": "12"}),
    "x.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "x.webm": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "x.flv": ("flv", {"g": "12"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_found_by_its_time(tmp_path, name):
    codec, options = KINDS[name]
    path = write(tmp_path / name, codec, options)
    with open_video(path) as (container, stream):
        decoded = {frame.pts: to_array(frame) for frame in decode(container, stream)}
    assert len(decoded) >= FRAMES - 1
    times = list(decoded)
    for position in [0, 1, 11, 12, 13, 23, 24, 35, 47, len(times) - 1]:
        (found,) = read_frames(path, [times[position]])
        assert np.array_equal(found, decoded[times[position]]), position
        assert number_in(found) == position


def test_times_not_numbers_count(tmp_path):
    """Frames at uneven times, in the middle of which two seconds are missing."""
    times = [0, 30, 100, 140, 250, 2250, 2300, 2390]
    path = write(tmp_path / "vfr.mkv", times=times)
    assert all_pts(path) == times
    assert [number_in(frame) for frame in read_frames(path, [2250, 30, 2390, 30])] == [5, 1, 7, 1]
    with pytest.raises(VideoError, match="no frame at pts 1000"):
        read_frames(path, [1000])


def test_one_frame_is_held_at_a_time(tmp_path):
    path = write(tmp_path / "x.mp4")
    times = all_pts(path)
    wanted = [times[3], times[3], times[9]]
    assert [number_in(frame) for frame in iterate_frames(path, wanted)] == [3, 3, 9]
    with pytest.raises(ValueError, match="must rise"):
        next(iterate_frames(path, wanted[::-1]))


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [1, 5, 9], ids=["bt709", "bt601", "bt2020"])
def test_colours_are_those_of_the_source(tmp_path, matrix, full):
    colours = [(200, 30, 40), (30, 180, 60), (40, 50, 220), (240, 240, 240), (8, 8, 8)]
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 2 if full else 1
        for colour in colours:
            picture = np.full((HEIGHT, WIDTH, 3), colour, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=matrix, dst_color_range=2 if full else 1
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for found, colour in zip(read_frames(path, all_pts(path)), colours, strict=True):
        assert np.abs(found.astype(int) - colour).max() <= 4, (found[0, 0], colour)


def test_crop_then_square_pixels(tmp_path):
    path = write(tmp_path / "x.mp4", aspect=Fraction(4, 3))
    assert read_frames(path, [0])[0].shape == (36, 64, 3)
    assert read_frames(path, [0], crop=(4, 8, 10, 6))[0].shape == (27, 48, 3)
    narrow = write(tmp_path / "narrow.mp4", aspect=Fraction(3, 4))
    assert read_frames(narrow, [0])[0].shape == (48, 48, 3)


def test_turned_frames():
    shape = Shape(48, 64, Fraction(4, 3), 90)
    assert shape.shown(Crop(top=12)) == (64, 27)
    assert Shape(48, 64, Fraction(1), 180).shown() == (48, 64)
    with pytest.raises(ValueError, match="leaves nothing"):
        shape.shown(Crop(left=40, right=24))


def test_a_size_is_covered_and_cut_evenly(tmp_path):
    """A grey ramp to the right: what is cut away is cut evenly, and what is left is scaled evenly."""
    ramp = np.tile(np.arange(WIDTH, dtype=np.uint8)[None, :, None] * 3 + 20, (HEIGHT, 1, 3))
    path = write(tmp_path / "x.mkv", options={"crf": "1"}, pictures=[ramp] * FRAMES)
    (found,) = read_frames(path, [0], size=(24, 24))
    assert found.shape == (24, 24, 3)
    expected = ramp[:, 8:56].reshape(24, 2, 24, 2, 3).mean(axis=(1, 3))
    assert np.abs(found - expected).max() <= 3
    with pytest.raises(ValueError, match="cannot fill"):
        read_frames(path, [0], size=(48, 66))


def test_what_is_no_video(tmp_path):
    cases = {
        "empty.mp4": (b"", "unreadable"),
        "page.mp4": (b"<html><body>404</body></html>" * 100, "unreadable"),
        "list.mp4": (b"ffconcat version 1.0\nfile other.mp4\n", "not_a_video"),
        "playlist.mp4": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nx.ts\n", "unreadable"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError) as caught, open_video(tmp_path / name):
            pass
        assert caught.value.reason == reason, name
    os.mkfifo(tmp_path / "fifo.mp4")
    with pytest.raises(InputError, match="a FIFO"), open_video(tmp_path / "fifo.mp4"):
        pass
    with pytest.raises(FileNotFoundError), open_video(tmp_path / "absent.mp4"):
        pass
