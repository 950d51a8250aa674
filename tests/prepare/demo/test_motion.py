"""Which way a shape moves, from pixels alone; and the command that says it of a folder of videos."""

import numpy as np
import pytest

from mugv_ds.data.video import write_mp4
from mugv_ds.prepare.demo.motion import horizontal_motion
from mugv_ds.prepare.demo.scenes import BACKGROUND, COLOURS, LARGE, LONG, SHAPES, SHORT, Clip, Format, Subject, render
from tools.measure_motion import main


def drawn(direction: str | None, shape: str = "circle", colour: str = "red", size: Format = SHORT[0]) -> np.ndarray:
    subject = Subject(shape, colour, direction)
    return render(Clip("x", subject, size, (size.width / 2 + 0.7, size.height / 2 - 0.4), 12.0 * size.zoom))


def empty(frames: int = 16) -> np.ndarray:
    return np.full((frames, 48, 48, 3), BACKGROUND, np.uint8)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("direction", "speed"), [("right", 0.75), ("left", -0.75), ("up", 0), ("down", 0), (None, 0)])
def test_speed_and_sign(shape, colour, direction, speed):
    assert horizontal_motion(drawn(direction, shape, colour)) == pytest.approx(speed, abs=0.01)


@pytest.mark.parametrize(("size", "speed"), [(SHORT[1], 0.75), (LONG[0], 0.375), (LARGE[1], 0.5)])
def test_any_size(size, speed):
    assert horizontal_motion(drawn("left", size=size)) == pytest.approx(-speed, abs=0.01)


def test_noise_of_the_background_does_not_weigh():
    video = drawn("right")
    noise = np.random.default_rng(0).integers(-40, 41, video.shape)
    noise[..., :24, :] = abs(noise[..., :24, :])  # brighter on the left throughout
    assert horizontal_motion((video + noise).clip(0, 255).astype(np.uint8)) == pytest.approx(0.75, abs=0.05)


def test_frames_that_show_nothing_are_passed_over():
    video = drawn("right")
    video[[0, 5, 6, 15]] = BACKGROUND
    assert horizontal_motion(video) == pytest.approx(0.75, abs=0.01)


def test_nothing_drawn():
    with pytest.raises(ValueError, match="0 of 16 frames show anything"):
        horizontal_motion(empty())
    speck = empty()
    speck[:, 3, 3] = 255
    with pytest.raises(ValueError, match="0 of 16"):
        horizontal_motion(speck)
    with pytest.raises(ValueError, match="1 of 1 frames"):
        horizontal_motion(drawn("right")[:1])


@pytest.mark.parametrize("video", [np.zeros((16, 48, 48, 3), np.float32), np.zeros((48, 48, 3), np.uint8)])
def test_what_is_no_video(video):
    with pytest.raises(ValueError, match="uint8"):
        horizontal_motion(video)


def test_the_command_counts_directions(tmp_path, capsys):
    videos = {"0-a": drawn("right"), "1-b": drawn("left"), "2-c": drawn("right"), "3-d": drawn("up"), "4-e": empty()}
    for name, frames in videos.items():
        write_mp4(tmp_path / f"{name}.mp4", frames, 8)
    assert main(["--videos", str(tmp_path)]) == 0
    *each, total = capsys.readouterr().out.splitlines()
    verdicts = [line.partition(": ")[2].partition(" (")[0] for line in each]
    assert verdicts == ["right", "left", "right", "no motion", "no motion"]
    assert "0 of 16 frames show anything" in each[4]
    assert total == "2 of 5 move right (40%), 1 left, 2 show no motion to the side"


def test_folders_that_cannot_be_measured(tmp_path, capsys):
    assert main(["--videos", str(tmp_path / "missing")]) == 2
    assert "missing: holds no mp4 file" in capsys.readouterr().err
    (tmp_path / "broken.mp4").write_bytes(b"x")
    assert main(["--videos", str(tmp_path)]) == 2
    assert "broken.mp4" in capsys.readouterr().err
