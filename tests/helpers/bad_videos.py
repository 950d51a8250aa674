"""Files that lie among somebody's videos: small ones, each wrong in its own way, and what must be said of each."""

import io
import os
import random
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from mugv_ds.prepare.demo.footage import write_video
from tests.helpers.film import draw_film

SIZE = (48, 64)  # height and width
FPS = 8
FRAMES = 24
SECRET = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
    "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
}


def good_film(key: str, frames: int = FRAMES) -> np.ndarray:
    return draw_film(key, frames, SIZE, step=2.0)


def good(path: Path, key: str | None = None) -> Path:
    """Writes a video that is accepted; of other content for each key, which is the name by default."""
    return write_video(path, good_film(key or path.name), fps=FPS)


def remuxed(path: Path, change: Callable[[int, av.Packet], object] = lambda *_: None, **options: str) -> Path:
    """Writes the packets of a good video, each changed, into a container with other options."""
    source = io.BytesIO(good(path.with_name(f".{path.stem}.mp4"), path.name).read_bytes())
    path.with_name(f".{path.stem}.mp4").unlink()
    with av.open(source) as given, av.open(str(path), "w", options=options) as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for number, packet in enumerate(given.demux(video=0)):
            if packet.dts is not None:
                change(number, packet)
                packet.stream = stream
                container.mux(packet)
    return path


def patched(path: Path, box: bytes, at: int, content: bytes) -> None:
    """Writes a good mp4, and other bytes `at` bytes after the name of a box."""
    data = bytearray(good(path).read_bytes())
    place = data.index(box) + 4 + at
    data[place : place + len(content)] = content
    path.write_bytes(data)


def pictures(path: Path, content: bytes, claimed: tuple[int, int] = SIZE) -> None:
    """Writes a video in PNG whose header claims a height and width, and whose packets hold whatever is given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", FPS)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "rgb24"
        for number in range(4):
            packet = av.Packet(content)
            packet.stream, packet.time_base = stream, Fraction(1, FPS)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, True
            container.mux(packet)
    true, said = (struct.pack(">HH", *size[::-1]) for size in (SIZE, claimed))
    path.write_bytes(path.read_bytes().replace(true, said))


def picture(form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(good_film("picture", 1)[0]).save(stream, form)
    return stream.getvalue()


def png_of(height: int, width: int, depth: int = 8, colours: int = 2) -> bytes:
    """A PNG whose header claims more than its data hold. colours: PNG's number of their kind, 6 for RGBA."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    data = bytearray(picture())
    data[12:33] = header + struct.pack(">I", zlib.crc32(header))
    return bytes(data)


def audio(path: Path, cover: bool = False) -> None:
    """Writes a second of silence, perhaps with a cover picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        stream.layout = "mono"
        front = None
        if cover:
            front = container.add_stream("mjpeg", 1)
            front.height, front.width = SIZE
            front.pix_fmt = "yuvj420p"
            front.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.rate, frame.pts = 8000, 0
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
        if front is not None:
            packet = av.Packet(picture("JPEG"))
            packet.stream, packet.time_base, packet.pts, packet.dts = front, Fraction(1, FPS), 0, 0
            container.mux(packet)


def looping(path: Path, samples: int) -> None:
    """Writes an mp4 of a few KB whose sample table shows the same frame again and again."""
    data = write_video(path, good_film("loop", 1), fps=FPS, options={"crf": "30", "x264-params": "bframes=0"})
    data = data.read_bytes()
    with av.open(str(path)) as container:
        packet = next(container.demux(video=0))
        place, size = packet.pos, packet.size
    tables = {
        b"stts": struct.pack(">III", 1, samples, 1500),
        b"stsz": struct.pack(">II", size, samples),
        b"stsc": struct.pack(">IIII", 1, 1, 1, 1),
        b"stco": struct.pack(">I", samples) + struct.pack(">I", place) * samples,
    }
    data = data.replace(b"edts", b"free")  # which says how long it is, too
    for name, content in tables.items():
        data = replaced(data, [b"moov", b"trak", b"mdia", b"minf", b"stbl", name], content)
    path.write_bytes(data)


def replaced(data: bytes, names: Sequence[bytes], content: bytes) -> bytes:
    """Gives a box of an mp4 other content after its version and flags; `names` lead to it."""
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == names[0]:
            inner = data[start + 8 : start + size]
            inner = inner[:4] + content if len(names) == 1 else replaced(inner, names[1:], content)
            return data[:start] + struct.pack(">I", len(inner) + 8) + names[0] + inner + data[start + size :]
        start += size
    raise KeyError(names)


def socket_file(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")  # a socket's path has at most 107 characters
        Path(f"{folder}/s").rename(path)


def forbidden(path: Path) -> None:
    good(path).chmod(0)


def of_text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def part_of_good(share: float, **options: str) -> Callable[[Path], object]:
    """Returns what writes the first part of a good video; options: of the container."""

    def write(path: Path) -> None:
        data = remuxed(path, **options).read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return write


def real_pictures(path: Path, claimed: tuple[int, int]) -> None:
    """Writes small pictures that move, under a header that claims another height and width."""
    write_video(path, good_film("l"), fps=FPS, codec="png", pixel_format="rgb24", options={})
    path.write_bytes(path.read_bytes().replace(*(struct.pack(">HH", *size[::-1]) for size in (SIZE, claimed))))


def still(path: Path, times: Sequence[float]) -> None:
    write_video(path, good_film(path.name, len(times)), fps=FPS, times=times)


def without_durations(path: Path) -> None:
    """Writes an mp4 whose frames are shown for no time."""
    data = write_video(path, good_film(path.name), fps=FPS, options={"x264-params": "bframes=0"}).read_bytes()
    names = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts"]
    path.write_bytes(replaced(data, names, struct.pack(">III", 1, FRAMES, 0)))


def backwards(path: Path) -> None:
    """Writes an MPEG-TS whose times begin anew in the middle."""
    data = good(path).read_bytes()
    path.write_bytes(data + data)


# What lies in the folder and is no file that could be read: name → what makes it, and what the scan says.
UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo.mp4": (os.mkfifo, "not a regular file"),
    "socket.mp4": (socket_file, "not a regular file"),
    "link_out.mp4": (lambda path: path.symlink_to("/etc/passwd"), "leads out of the folder of videos"),
    "link_to_device.mp4": (lambda path: path.symlink_to("/dev/zero"), "leads out of the folder of videos"),
    "loop.mp4": (lambda path: path.symlink_to(path), "loop"),
    **({"forbidden.mp4": (forbidden, "Permission denied")} if os.geteuid() else {}),  # root may read everything
    "dangling.mp4": (lambda path: path.symlink_to("nothing.mp4"), "No such file"),
    os.fsdecode(b"not_utf8_\xff.mp4"): (good, "its name is not UTF-8"),
}

# What can be read and not be decoded: name → what makes it, the error, and what its detail says.
BROKEN: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "empty.mp4": (of_text(""), "unreadable", "Invalid data"),
    "html.mp4": (of_text("<html><body>no such page</body></html>"), "unreadable", "Invalid data"),
    "lfs.mp4": (of_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"), "unreadable", ""),
    "noise.mp4": (lambda path: path.write_bytes(random.Random(0).randbytes(5000)), "unreadable", "Invalid data"),
    "zip.mp4": (lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), "unreadable", "Invalid data"),
    "half.mp4": (part_of_good(0.5), "unreadable", "Invalid data"),
    "cut.mp4": (part_of_good(0.67, movflags="faststart"), "truncated", "the header claims 3.000 s"),
    "ffconcat.mp4": (of_text("ffconcat version 1.0\nfile good_1.mp4\n"), "not_a_video", "not read"),
    "hls.mp4": (
        of_text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\ngood_1.mp4\n#EXT-X-ENDLIST\n"),
        "unreadable",
        "",
    ),
    "sdp.mp4": (of_text("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\n"), "unreadable", ""),
    "png.mp4": (lambda path: path.write_bytes(picture()), "not_a_video", "not read"),
    "gif.mp4": (lambda path: path.write_bytes(picture("GIF")), "not_a_video", "not read"),
    "jpeg.mp4": (lambda path: path.write_bytes(picture("JPEG")), "not_a_video", "not read"),
    "svg.mp4": (of_text('<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"/>'), "not_a_video", "not read"),
    "audio.mp4": (audio, "no_video_stream", "holds no video stream"),
    "cover_only.mp4": (lambda path: audio(path, cover=True), "no_video_stream", "holds no video stream"),
    "encrypted.mp4": (lambda path: remuxed(path, **SECRET), "encrypted", "its packets are encrypted"),
    # What a header claims of sizes and counts.
    "samples_2_31.mp4": (lambda path: patched(path, b"stsz", 8, b"\x7f\xff\xff\xff"), "unreadable", ""),
    "sample_size_2_31.mp4": (lambda path: patched(path, b"stsz", 4, b"\x7f\xff\xff\xff"), "unreadable", "no frame"),
    "first_sample_2_31.mp4": (lambda path: patched(path, b"stsz", 12, b"\x7f\xff\xff\xff"), "unreadable", "no frame"),
    "chunks_2_31.mp4": (lambda path: patched(path, b"stsc", 8, b"\x7f\xff\xff\xff" * 2), "unreadable", ""),
    "durations_2_31.mp4": (lambda path: patched(path, b"stts", 4, b"\x7f\xff\xff\xff"), "crashed", "memory_gb"),
    "no_tables.mp4": (lambda path: patched(path, b"stbl", -4, b"free"), "unreadable", "no decoder"),
    # Frames too large to be decoded, however small the file.
    "frames_30000.mov": (
        lambda path: pictures(path, png_of(30000, 30000), (30000, 30000)),
        "unreadable",
        "larger than FFmpeg can do",
    ),
    "frames_8200.mov": (lambda path: pictures(path, png_of(8200, 8200)), "too_large", "8200×8200; decode.max_side"),
    "frames_of_512_MB.mov": (lambda path: pictures(path, png_of(8000, 8000, 16, 6)), "crashed", "decode.memory_gb"),
    "endless.mp4": (lambda path: looping(path, 100_000), "too_long", "more than 100 frames; decode.max_frames"),
}

# What is decoded, and rejected: name → what makes it, and a reason against it.
REJECTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one_frame.mp4": (lambda path: still(path, [0.0]), "too_short"),
    "no_durations.mp4": (without_durations, "low_fps"),
    "gap_of_30_years.mkv": (lambda path: still(path, [*(i / FPS for i in range(16)), 1e9, 1e9 + 1]), "low_fps"),
    "no_time_base.mp4": (lambda path: patched(path, b"mdhd", 12, bytes(4)), "too_short"),
    "cut.mkv": (part_of_good(0.5), "truncated"),
    "header_of_30000.mov": (lambda path: real_pictures(path, (30000, 30000)), "too_small"),
}

# What looks odd and is a good video: name → what makes it.
GOOD: dict[str, Callable[[Path], object]] = {
    "good_1.mp4": lambda path: good(path, "a"),
    "good_2.mp4": lambda path: good(path, "b"),
    "line\nbreak<script>alert(1)</script>.mp4": lambda path: good(path, "c"),
    "\x1b[31mred\x07\r.mp4": lambda path: good(path, "d"),
    f"{'n' * 246}.mp4": lambda path: good(path, "e"),
    ", \"quoted'; DROP TABLE.mp4": lambda path: good(path, "f"),
    "folder.mp4/inside.mp4": lambda path: good(path, "g"),
    "times_that_go_back.ts": backwards,
    "box_beyond_the_file.mp4": lambda path: patched(path, b"moov", -8, b"\x7f\xff\xff\xff"),
}

# Good videos with captions beside them that cannot be used: name → what makes the caption.
BAD_CAPTIONS: dict[str, Callable[[Path], object]] = {
    "caption_not_utf8.mp4": lambda path: path.with_suffix(".txt").write_bytes(b"\xff\xfe clouds"),
    "caption_of_1_MB.mp4": lambda path: path.with_suffix(".txt").write_text("clouds " * 150_000),
    "caption_fifo.mp4": lambda path: os.mkfifo(path.with_suffix(".txt")),
    "caption_link_out.mp4": lambda path: path.with_suffix(".txt").symlink_to("/etc/passwd"),
    "caption_of_brackets.mp4": lambda path: path.with_suffix(".json").write_text("[" * 60_000),
}
