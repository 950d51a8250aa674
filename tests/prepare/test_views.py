"""Which frames the costly steps see of a clip, and at which size."""

import numpy as np
import pytest

from mugv_ds.data.video import write_mp4
from mugv_ds.prepare.frames import read_frames
from mugv_ds.prepare.views import score_each
from tests.helpers.clip_views import broken_clip, clip_view


def times(count, pts, **options):
    """The times that are asked of the reader."""
    asked = []

    def read(path, pts, *, crop, size):
        asked.extend(pts)
        return [np.zeros((*size, 3), np.uint8) for _ in pts]

    clip_view(0, pts=pts, read=read).frames(count, **options)
    return asked


def test_frames_are_evenly_spaced_in_time_not_in_number():
    pts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 100, 200]
    assert times(3, pts) == [0, 100, 200]
    assert times(1, pts) == [100]
    assert times(5, pts) == [0, 8, 100, 100, 200]  # 50 is as near to 8 as any, 150 to both


def test_parts_divide_the_clip():
    pts = list(range(1000, 1101))
    assert times(3, pts, part=(0, 2)) == [1000, 1025, 1050]
    assert times(3, pts, part=(1, 2)) == [1050, 1075, 1100]


def test_a_clip_of_one_frame_repeats_it():
    assert times(3, [7]) == [7, 7, 7]


@pytest.mark.parametrize(
    ("options", "size"),
    [({"longest": 32}, (18, 32)), ({"shortest": 18}, (18, 32)), ({"longest": 640}, (36, 64)), ({}, (36, 64))],
)
def test_frames_are_made_smaller_and_never_larger(options, size):
    assert clip_view(3).frames(2, **options).shape == (2, *size, 3)


def test_a_real_video_is_read_by_its_times(tmp_path):
    levels = np.arange(12, dtype=np.uint8) * 20
    write_mp4(tmp_path / "0.mp4", np.broadcast_to(levels[:, None, None, None], (12, 32, 48, 3)), 12)
    with_pts = clip_view(0, root=tmp_path, pts=range(0, 12 * 1024, 1024), height=32, width=48, read=read_frames)
    found = with_pts.frames(3, longest=24)
    assert found.shape == (3, 16, 24, 3)
    assert np.abs(found.mean(axis=(1, 2, 3)) - levels[[0, 5, 11]]).max() < 3


def test_a_clip_that_fails_has_a_row_that_does_not_tell_where_the_videos_lie(tmp_path):
    rows = score_each([clip_view(1), broken_clip(2, tmp_path)], lambda clip: {"n": len(clip.frames(2))})
    assert rows == [
        {"clip": f"{1:032x}", "error": None, "n": 2},
        {"clip": f"{2:032x}", "error": "decode_error: 2.mp4: Invalid data"},
    ]


def test_a_folder_of_videos_that_is_gone_is_no_fault_of_a_clip(tmp_path):
    def read(path, pts, *, crop, size):
        raise FileNotFoundError(2, "No such file", str(path))

    def rows(root):
        return score_each([clip_view(1, root=root, read=read)], lambda clip: {"n": len(clip.frames(2))})

    assert rows(tmp_path)[0]["error"] == "[Errno 2] No such file: '1.mp4'"
    with pytest.raises(FileNotFoundError):
        rows(tmp_path / "gone")
