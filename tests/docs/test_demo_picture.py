"""The picture of the demo's videos: all of them side by side, as long as they are."""

import numpy as np
from PIL import Image

from mugv_ds.data.video import write_mp4
from tools import demo_picture


def colours(count: int) -> list[np.ndarray]:
    """Frames of videos of one colour each, which change from dark to light."""
    rise = np.linspace(60, 220, 8, dtype=np.uint8)[:, None, None, None]
    return [
        np.broadcast_to(rise, (8, 16, 32, 3)) * np.uint8([[n >> bit & 1 for bit in range(3)]]) for n in range(count)
    ]


def test_videos_stand_in_rows_of_four_and_move(tmp_path):
    for number, frames in enumerate(colours(6)):
        write_mp4(tmp_path / f"{number}.mp4", frames, 8)
    assert demo_picture.main(["--samples", str(tmp_path), "--out", str(tmp_path / "all.webp")]) == 0
    with Image.open(tmp_path / "all.webp") as picture:
        assert picture.n_frames == 8 and picture.size == (4 * 32 * 3 + 3 * 6, 2 * 16 * 3 + 6)
        red = np.asarray(picture.convert("RGB"))[24, 1 * (32 * 3 + 6) + 48]
        picture.seek(7)
        later = np.asarray(picture.convert("RGB"))[24, 1 * (32 * 3 + 6) + 48]
    assert red[0] > 2 * max(red[1:]) and later[0] > red[0] + 80


def test_no_videos_and_unequal_ones_are_refused(tmp_path, capsys):
    arguments = ["--samples", str(tmp_path), "--out", str(tmp_path / "all.webp")]
    assert demo_picture.main(arguments) == 2 and "no videos" in capsys.readouterr().err
    for number, frames in enumerate((4, 8)):
        write_mp4(tmp_path / f"{number}.mp4", np.zeros((frames, 16, 16, 3), np.uint8), 8)
    assert demo_picture.main(arguments) == 2 and "several sizes or lengths" in capsys.readouterr().err
