import io
import wave
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from mugv_ds.config.errors import InputError
from mugv_ds.data.video import (
    contact_sheet,
    encode_gif,
    read_image,
    read_mp4,
    read_some_frames,
    to_frames,
    video_name,
    write_mp4,
)

COLOURS = [(230, 40, 40), (40, 200, 60), (50, 90, 240), (240, 220, 40), (16, 16, 24), (255, 255, 255)]


def flat(levels: list[int], height: int = 32, width: int = 48) -> np.ndarray:
    """One grey frame for each level."""
    return np.repeat(np.array(levels, np.uint8), height * width * 3).reshape(-1, height, width, 3)


@pytest.mark.parametrize("fps", [8, 24.0, 30000 / 1001])
@pytest.mark.parametrize("size", [(32, 48), (720, 1280)])
def test_colours_order_and_rate_survive(tmp_path, fps, size):
    frames = np.stack([np.full((*size, 3), colour, np.uint8) for colour in COLOURS])
    write_mp4(tmp_path / "x.mp4", frames, fps)
    back, back_fps = read_mp4(tmp_path / "x.mp4")
    assert back.shape == frames.shape and back.dtype == np.uint8
    assert np.abs(back.astype(int) - frames).max() <= 4
    assert Fraction(back_fps).limit_denominator(1001) == Fraction(fps).limit_denominator(1001)


def test_the_same_frames_give_the_same_file(tmp_path):
    """A disc that moves 0.75 pixels a frame: x264's macroblock tree writes a file of its own in one of a few runs."""
    y, x = np.mgrid[:48, :48] + 0.5
    distance = np.stack([np.hypot(x - 29.6 + 0.75 * frame, y - 24) for frame in range(16)])
    cover = np.clip(12.5 - distance, 0, 1)[..., None]
    frames = ((16, 16, 24) + cover * (214, 24, 16)).round().astype(np.uint8)
    path = tmp_path / "x.mp4"
    files = set()
    for _ in range(40):
        write_mp4(path, frames, 8)
        files.add(path.read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (flat([0]).astype(np.float32), 8, "must be uint8"),
        (flat([0])[0], 8, "must be uint8"),
        (flat([0])[..., :1], 8, "must be uint8"),
        (flat([]), 8, "F ≥ 1"),
        (flat([0], height=31), 8, "must be even.*31×48"),
        (flat([0]), 0, "fps must be positive"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path, frames, fps, message):
    path = tmp_path / "x.mp4"
    with pytest.raises(ValueError, match=f"x.mp4: .*{message}"):
        write_mp4(path, frames, fps)
    assert not path.exists()


def write_sound(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))


def write_cut_off(path):
    write_mp4(path, flat([10] * 20), 8)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("not a video\n" * 100),
        lambda path: path.write_bytes(b""),
        write_cut_off,
        write_sound,
    ],
    ids=["text", "empty", "cut off", "sound"],
)
def test_files_that_are_no_videos(tmp_path, write):
    path = tmp_path / "x.mp4"
    write(path)
    with pytest.raises(ValueError, match=r"x\.mp4: "):
        read_mp4(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_mp4(tmp_path / "none.mp4")


def test_the_range_of_a_video_is_that_of_bytes():
    video = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 6)
    frames = to_frames(video)
    assert frames.shape == (2, 5, 4, 6, 3) and frames.dtype == torch.uint8
    assert frames[1, :, 2, 3, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("caption", "name"),
    [("A red Circle!", "07-a-red-circle"), ("../../x", "07-x"), ("红色", "07"), ("a" * 99, "07-" + "a" * 60)],
)
def test_a_caption_names_a_file(caption, name):
    assert video_name(7, caption) == name


@pytest.mark.parametrize(
    ("size", "fps", "shown", "levels", "milliseconds"),
    [
        ((32, 48), 8, (32, 48), [0, 60, 120, 180, 240], 120),  # GIF counts hundredths of a second
        ((720, 1280), 30, (180, 320), [0, 120, 240], 60),
    ],
)
def test_a_gif_is_small_and_as_fast_as_the_video(size, fps, shown, levels, milliseconds):
    with Image.open(io.BytesIO(encode_gif(flat([0, 60, 120, 180, 240], *size), fps))) as image:
        assert (image.height, image.width, image.n_frames) == (*shown, len(levels))
        for frame, level in enumerate(levels):
            image.seek(frame)
            assert image.info["duration"] == milliseconds
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - level).max() <= 4


def test_contact_sheet_shows_captions_and_frames_from_first_to_last(tmp_path):
    path = tmp_path / "sheet.png"
    contact_sheet(path, [("first", flat([0, 10, 20, 30, 40])), ("second", flat([200, 210]))], frames_per_video=3)
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    zoomed_height, zoomed_width = 2 * 32, 2 * 48  # of 48 × 32 pixels, enlarged to no more than 128
    row_height = image.shape[0] // 2
    for row, levels in enumerate([(0, 20, 40), (200, 200, 210)]):
        part = image[row * row_height : (row + 1) * row_height]
        caption = part[: row_height - zoomed_height - 4]
        assert caption.min() < 100 < caption.mean()  # dark letters on white
        for column, level in enumerate(levels):
            left = 4 + column * (zoomed_width + 4)
            frame = part[row_height - zoomed_height - 4 : row_height - 4, left : left + zoomed_width]
            assert (frame == level).all(), (row, column)


def test_contact_sheet_keeps_large_frames_and_wraps_long_captions(tmp_path):
    frames = flat([7] * 3, height=200, width=300)
    sizes = []
    for caption in ("short", "a long caption " * 20):
        contact_sheet(tmp_path / "sheet.png", [(caption, frames)], frames_per_video=2)
        sizes.append(Image.open(tmp_path / "sheet.png").size)
    assert sizes[0][0] == sizes[1][0] == 2 * (300 + 4) + 4
    assert sizes[0][1] < sizes[1][1]


def test_contact_sheet_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one video"):
        contact_sheet(tmp_path / "sheet.png", [], 3)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (64, 16)])
def test_an_image_covers_the_frame_around_its_centre(tmp_path, height, width):
    picture = np.zeros((90, 90, 3), np.uint8)
    picture[:, :45], picture[:, 45:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(picture).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png", height, width)
    assert image.shape == (3, height, width)
    assert image[:, height // 2, 1].tolist() == pytest.approx([1, -1, -1], abs=0.1)
    assert image[:, height // 2, -2].tolist() == pytest.approx([-1, -1, 1], abs=0.1)


@pytest.mark.regression
@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (4, (-1, 0)), (6, (0, -1)), (8, (-1, 0))]
)
def test_a_photo_is_turned_as_its_exif_orientation_says(tmp_path, orientation, corner):
    """The corner that is stored first is white; the table of the Exif standard (tag 274) says where it belongs."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = 255
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture).save(tmp_path / "x.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "x.jpg", 16, 16)
    for place in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        expected = 1 if place == corner else -1
        assert image[:, place[0], place[1]].tolist() == pytest.approx([expected] * 3, abs=0.15), place


def test_a_file_that_is_no_image(tmp_path):
    path = tmp_path / "x.png"
    path.write_text("not an image")
    with pytest.raises(ValueError, match=r"x\.png: not a readable image"):
        read_image(path, 32, 32)


def test_some_frames_of_a_video_are_those_that_a_contact_sheet_shows(tmp_path):
    write_mp4(tmp_path / "x.mp4", flat(range(0, 200, 10)), 8)
    every, _ = read_mp4(tmp_path / "x.mp4")
    some = read_some_frames(tmp_path / "x.mp4", 3)
    assert np.array_equal(some, every[[0, 10, 19]])
    assert len(read_some_frames(tmp_path / "x.mp4", 30)) == 30
    (tmp_path / "x.mp4").write_bytes((tmp_path / "x.mp4").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"x\.mp4: not a readable video"):
        read_some_frames(tmp_path / "x.mp4")


def test_contact_sheet_makes_large_frames_smaller_and_takes_one_video_after_the_other(tmp_path):
    made = []

    def videos():
        for level in (50, 200):
            made.append(level)
            yield "large", flat([level] * 2, height=720, width=1280)

    contact_sheet(tmp_path / "sheet.png", videos(), frames_per_video=2)
    assert made == [50, 200] and Image.open(tmp_path / "sheet.png").width == 2 * (320 + 4) + 4


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_an_image_of_16_bits_is_scaled_and_not_clipped(tmp_path, ending):
    Image.fromarray(np.full((16, 24), 32768, np.uint16)).save(tmp_path / f"grey.{ending}")
    assert read_image(tmp_path / f"grey.{ending}", 16, 24).abs().max() < 0.01


def test_an_image_of_numbers_without_a_range_or_of_too_many_pixels_is_refused(tmp_path):
    Image.fromarray(np.zeros((16, 24), np.float32)).save(tmp_path / "float.tif")
    Image.new("1", (8200, 8200)).save(tmp_path / "large.png")
    for name, message in (("float.tif", "32 bits a pixel"), ("large.png", "more than 67,108,864")):
        with pytest.raises(InputError, match=message):
            read_image(tmp_path / name, 16, 24)
