"""One pass measures a video; what is wrong with one is named in its row, and nothing is raised."""

import json
import os
import random
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare import probe as module
from mugv_ds.prepare.demo.drawn import DrawnScene
from mugv_ds.prepare.demo.footage import shot, write_video
from mugv_ds.prepare.frames import decode, open_video, to_array
from mugv_ds.prepare.probe import STEP, probe, probe_isolated, probe_table, weights
from mugv_ds.prepare.rows import VIDEO
from mugv_ds.prepare.scan import Source
from mugv_ds.prepare.workers import end_all

FRAMES = 48


def probed(path: Path, **sections) -> dict:
    config = PrepareConfig.model_validate_json(json.dumps(sections))
    return probe(path, path.name, "ab" * 32, config)


@pytest.fixture(scope="module")
def frames():
    return shot(50, FRAMES)


@pytest.fixture(scope="module")
def video(frames, tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "x.mp4", frames)


@pytest.fixture(scope="module")
def row(video):
    return probed(video)


def remuxed(source: Path, path: Path, **options) -> Path:
    """Writes the packets of a video to another file."""
    with av.open(str(source)) as given, av.open(str(path), "w", options=options) as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return path


def test_a_row_has_every_column_and_as_many_values_as_frames(row):
    table = pa.Table.from_pylist([row], schema=VIDEO)
    assert table.num_rows == 1 and row["error"] is None
    assert (row["frames"], row["codec"], row["width"], row["height"]) == (FRAMES, "h264", 320, 180)
    assert (row["fps"], row["duration"], row["claimed"]) == pytest.approx((24, 2, 2))
    assert (row["matrix"], row["full_range"], row["hdr"], row["audio"]) == ("bt601", False, False, False)
    samples = list(range(0, FRAMES, 6))
    assert row["sample"] == samples
    fields = [field for field in VIDEO if pa.types.is_list(field.type) and field.name != "transnet"]
    of_samples = {"sample", "sharp", "flow", "border", "border_level", "border_edge", "phash", "phash_mirror"}
    for field in fields:
        expected = len(samples) if field.name in of_samples else FRAMES
        assert len(row[field.name]) == expected, field.name
    # There is no score where the video has not gone on for as long as the lag.
    assert [int(np.isnan(np.array(row["css"])[:, lag]).sum()) for lag in range(3)] == [1, 8, 24]


def test_it_is_the_same_each_time(video, row):
    again = pa.Table.from_pylist([probed(video)], schema=VIDEO)
    assert again.to_pydict().__repr__() == pa.Table.from_pylist([row], schema=VIDEO).to_pydict().__repr__()


def test_bits_are_those_of_the_video_stream(video, row):
    with av.open(str(video)) as container:
        size = sum(packet.size for packet in container.demux(video=0))
    assert row["bitrate"] == pytest.approx(8 * size / (FRAMES * 320 * 180))


def pan(frames: int, step: int) -> list[np.ndarray]:
    """A picture of 360 × 640 that moves by whole pixels a frame."""
    wall = DrawnScene(1, 400, 700).frame(0)
    return [wall[20:380, step * number : step * number + 640] for number in range(frames)]


def test_large_frames_are_measured_at_their_sizes(tmp_path):
    """A video of 1080 lines has the sharpness of its 720 lines, and the flow of its 360."""
    large = write_video(tmp_path / "large.mp4", [cv2.resize(frame, (1920, 1080)) for frame in pan(7, 1)])
    found = probed(large)
    with open_video(large) as (container, stream):
        grey = to_array(next(decode(container, stream)), "gray")
    grey = cv2.resize(grey, (1280, 720), interpolation=cv2.INTER_AREA)
    assert found["sharp"][0] == pytest.approx(cv2.Laplacian(grey, cv2.CV_64F).var(), rel=0.03)
    assert found["flow"][0] == pytest.approx(6, rel=0.1)
    assert np.isnan(found["flow"][-1])


def test_flow_is_over_a_quarter_of_a_second_whatever_the_frames(tmp_path):
    """At 10 frames a second samples lie 0.2 or 0.3 s apart; so small a video is measured as if it had 360 lines."""
    path = write_video(tmp_path / "x.mp4", [cv2.resize(frame, (320, 180)) for frame in pan(12, 3)], fps=10)
    assert probed(path)["flow"][:-1] == pytest.approx([7.5] * 4, rel=0.15)


def test_cut_and_damaged_files_are_told_apart(video, tmp_path):
    whole = remuxed(video, tmp_path / "whole.mp4", movflags="faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    assert probed(tmp_path / "cut.mp4")["error"] == "truncated"
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 3000] = random.Random(0).randbytes(3000)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    found = probed(tmp_path / "damaged.mp4")
    assert found["error"] == "decode_error" and " s, after " in found["detail"]
    (tmp_path / "headless.mp4").write_bytes(video.read_bytes()[: len(whole) // 2])
    assert probed(tmp_path / "headless.mp4")["error"] == "unreadable"
    shorter = remuxed(video, tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(shorter[: len(shorter) // 2])
    found = probed(tmp_path / "cut.mkv")  # FFmpeg says nothing: only the durations tell
    assert found["error"] is None and found["duration"] < 0.7 * found["claimed"]


def test_encrypted_videos(video, tmp_path):
    secret = {
        "encryption_key": "76a6c65c5ea762046bd749a2e632ccbb",
        "encryption_kid": "a7e61c373e219033c21091fa607bf3b8",
    }
    path = remuxed(video, tmp_path / "x.mp4", encryption_scheme="cenc-aes-ctr", **secret)
    assert probed(path)["error"] == "encrypted"


def test_large_frames_are_refused_before_anything_is_decoded(video, monkeypatch):
    monkeypatch.setattr(module, "decode", None)
    for limit in ({"max_side": 319}, {"max_pixels": 320 * 180 - 1}):
        found = probed(video, decode=limit)
        assert found["error"] == "too_large" and "320×180" in found["detail"]


@pytest.mark.parametrize(("codec", "name"), [("libvpx-vp9", "x.webm"), ("mpeg4", "x.avi"), ("ffv1", "x.mkv")])
def test_large_frames_are_refused_whatever_finds_their_size(frames, tmp_path, codec, name):
    """Of these FFmpeg knows the size only by the container or by decoding."""
    path = write_video(tmp_path / name, frames[:2], codec=codec, options={})
    found = probed(path, decode={"max_pixels": 320 * 180 - 1})
    assert found["error"] == "too_large" and "320×180" in found["detail"]
    with open_video(path, max_pixels=320 * 180 - 1) as (container, stream), pytest.raises(av.error.FFmpegError):
        list(decode(container, stream))


def test_frames_that_change_their_size(frames, tmp_path):
    parts = [frames[:24], [cv2.resize(frame, (640, 360)) for frame in frames[:24]]]
    paths = [
        write_video(tmp_path / f"{part}.ts", pictures, times=[3 * part + number / 24 for number in range(24)])
        for part, pictures in enumerate(parts)
    ]
    (tmp_path / "x.ts").write_bytes(b"".join(path.read_bytes() for path in paths))
    found = probed(tmp_path / "x.ts")
    assert found["error"] == "decode_error" and "320×180 to 640×360" in found["detail"]


def test_endless_videos_end(video):
    found = probed(video, decode={"max_frames": 20})
    assert found["error"] == "too_long" and "20 frames" in found["detail"]


def test_files_that_change_meanwhile(video, tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"
    path.write_bytes(video.read_bytes())

    def grow(*given):
        with path.open("ab") as file:
            file.write(b"more")
        return decode(*given)

    monkeypatch.setattr(module, "decode", grow)
    assert probed(path)["error"] == "changed_while_reading"


def test_what_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(5000))
    for name in ("fifo.mp4", "folder.mp4", "noise.mp4", "absent.mp4"):
        found = probed(tmp_path / name)
        assert found["error"] == "unreadable" and str(tmp_path) not in found["detail"], name


@pytest.mark.parametrize("size", [(2, 2), (16, 16), (1, 300)])
def test_the_smallest_frames(tmp_path, size):
    pictures = [np.random.default_rng(number).integers(0, 255, (*size, 3), np.uint8) for number in range(10)]
    path = write_video(tmp_path / "x.mkv", pictures, codec="ffv1", pixel_format="bgr0", options={})
    assert probed(path)["error"] is None


def test_a_single_frame(frames, tmp_path):
    found = probed(write_video(tmp_path / "x.mp4", frames[:1]))
    assert (found["error"], found["frames"], found["fps"]) == (None, 1, None)


def test_tags_of_shape_and_colour(frames, tmp_path):
    path = write_video(tmp_path / "x.mkv", frames[:4], aspect=Fraction(4, 3), transfer=18)
    found = probed(path)
    assert found["sample_aspect"] == pytest.approx(4 / 3) and found["hdr"]


def test_a_process_of_its_own_gives_the_same_row(video, row, tmp_path, monkeypatch):
    source = Source(video.name, "ab" * 32, None, video.stat().st_size, video.stat().st_mtime_ns)
    try:
        isolated = probe_isolated(video.parent, source, PrepareConfig())
        config = PrepareConfig().model_dump(mode="json")
        direct = probe_table(str(video), video.name, "ab" * 32, config).to_pylist()[0]
        assert repr(isolated) == repr(direct)
        slow = PrepareConfig.model_validate({"decode": {"wall_extra": 1e-4, "wall_factor": 1e-6}})
        assert probe_isolated(video.parent, source, slow)["error"] == "timed_out"
    finally:
        end_all()


def test_what_its_results_depend_on():
    """The limits of time and memory do not make a fragment stale, and those of frames do."""
    key = STEP.key(PrepareConfig())
    changed = {
        name: STEP.key(PrepareConfig.model_validate({section: {name: value}}))
        for section, name, value in (
            *(("decode", "memory_gb", 8.0), ("decode", "wall_extra", 99.0), ("split", "margin", 9)),
            *(("decode", "max_pixels", 10**6), ("probe", "interval", 0.5)),
        )
    }
    assert {name for name, other in changed.items() if other != key} == {"max_pixels", "interval"}
    assert weights(PrepareConfig()) == ""
