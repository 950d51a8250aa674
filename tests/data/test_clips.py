"""The videos and images of the VideoVAE's training: the CSV, the clips that are cut, and what steps hold."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.vae_schema import VaeDataSection
from mugv_ds.data.clips import ClipData, ClipIndex, Clips, cover_and_crop
from mugv_ds.data.paths import ManifestError, PathError
from mugv_ds.data.video import read_clip, read_mp4, read_still, write_mp4
from mugv_ds.files.tensor_file import SampleError
from tests.helpers.vae import FRAMES, SIZE, write_videos


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    return write_videos(tmp_path_factory.mktemp("videos"), count=4)


def section(manifest: Path, **more) -> VaeDataSection:
    values = {
        "manifest": str(manifest),
        "size": (SIZE, SIZE),
        "lengths": ({"frames": 1, "share": 0.25}, {"frames": 16, "share": 0.75}),
        "global_batch_size": 2,
    }
    return VaeDataSection.model_validate(values | more)


def test_the_csv_is_read(manifest):
    index = ClipIndex.read(manifest)
    assert index.ids == ("train-0", "train-1", "train-2", "train-3", "train-image")
    assert index.frames.tolist() == [FRAMES] * 4 + [1]
    assert index.content == hashlib.sha256(manifest.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("row", "error", "complaint"),
    [
        ("a,v.mp4", ManifestError, "2 values, the header has 3"),
        (" ,v.mp4,8", ManifestError, "blank sample_id"),
        ("a,v.mp4,", ManifestError, "num_frames = ''"),
        ("a,v.mp4,0", ManifestError, "num_frames = '0'"),
        ("a,v.mp4,8.5", ManifestError, r"num_frames = '8\.5'"),
        ("a,/v.mp4,8", PathError, "absolute"),
        ("a,../v.mp4,8", PathError, "leads out"),
        ("a,https://v.mp4,8", PathError, "a URL or pipe"),
        ("a,,8", PathError, "must name a file"),
        ("a,v.mp4,8\na,w.mp4,8", ManifestError, "duplicate sample_id"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, row, error, complaint):
    (tmp_path / "list.csv").write_text(f"sample_id,video_path,num_frames\n{row}\n")
    with pytest.raises(error, match=rf"list\.csv:[23]: .*{complaint}"):
        ClipIndex.read(tmp_path / "list.csv")


def test_other_files_are_no_list(tmp_path):
    (tmp_path / "list.csv").write_text("sample_id,latent_path\na,b\n")
    with pytest.raises(ManifestError, match="missing column 'video_path'"):
        ClipIndex.read(tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("sample_id,video_path,num_frames\n")
    with pytest.raises(ManifestError, match="only a header"):
        ClipIndex.read(tmp_path / "list.csv")
    with pytest.raises(ManifestError, match="no such file"):
        ClipIndex.read(tmp_path / "none.csv")


def test_a_clip_of_a_file_is_that_of_all_its_frames(manifest):
    path = manifest.parent / "train-0.mp4"
    whole, _ = read_mp4(path)
    assert np.array_equal(read_clip(path, 5, 9), whole[5:14])
    with pytest.raises(ValueError, match=f"has {FRAMES} frames, 19 are wanted"):
        read_clip(path, 10, 9)


def test_only_common_containers_are_opened(tmp_path, manifest):
    """A playlist would have ffmpeg open what it names."""
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{manifest.parent / 'train-0.mp4'}\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_bytes((tmp_path / "list.m3u8").read_bytes())
    for name in ("list.m3u8", "list.mp4"):
        with pytest.raises(ValueError, match="not a readable video"):
            read_clip(tmp_path / name, 0, 1)
    with pytest.raises(FileNotFoundError):
        read_clip(tmp_path / "none.mp4", 0, 1)


def test_a_damaged_image_is_the_files_fault(tmp_path, manifest):
    whole = (manifest.parent / "train.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.png").write_bytes(b"no image")
    for name in ("cut.png", "no.png"):
        with pytest.raises(ValueError, match="not a readable image"):
            read_still(tmp_path / name)


def test_a_clip_is_a_function_of_seed_sample_and_visit(manifest):
    index = ClipIndex.read(manifest)
    clips = Clips(index, 9, (16, 16), seed=3)
    (first,), (again,) = clips.read(1, 4), Clips(index, 9, (16, 16), seed=3).read(1, 4)
    assert torch.equal(first.frames, again.frames) and torch.equal(first.noise, again.noise)
    assert first.frames.shape == (9, 16, 16, 3) and first.noise.shape == (24, 2, 2, 2) and first.weight == 1
    visits = [clips.read(1, visit)[0] for visit in range(4)]
    assert len({visit.frames.numpy().tobytes() for visit in visits}) == 4, "other times and places"
    assert len({visit.noise.numpy().tobytes() for visit in visits}) == 4
    assert clips.read(1, None)[0].weight == 0


def test_a_cut_clip_is_of_the_file(manifest):
    """Without a crop in space, the clip is ten consecutive frames; all starts come."""
    index = ClipIndex.read(manifest)
    whole, _ = read_mp4(manifest.parent / "train-2.mp4")
    starts = set()
    for visit in range(40):
        frames = Clips(index, 16, (SIZE, SIZE), seed=0).read(2, visit)[0].frames.numpy()
        starts |= {start for start in range(FRAMES - 15) if np.array_equal(frames, whole[start : start + 16])}
    assert starts == {0, 1, 2}


def test_held_out_clips_are_the_beginning_and_the_middle(tmp_path):
    video = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
    write_mp4(tmp_path / "a.mp4", video, 8.0)
    (tmp_path / "list.csv").write_text("sample_id,video_path,num_frames\na,a.mp4,9\n")
    (clip,) = Clips(ClipIndex.read(tmp_path / "list.csv"), 8, (32, 32), seed=0, held_out=True).read(0, 0)
    assert np.array_equal(clip.frames.numpy(), read_mp4(tmp_path / "a.mp4")[0][:8, :, 8:40])


def test_frames_cover_the_size_and_keep_their_proportions():
    """A horizontal ramp stays one: of 10 × 40 pixels scaled to 20 × 80, the crop's columns rise by half a step."""
    ramp = np.broadcast_to(np.arange(0, 160, 4, dtype=np.uint8)[None, None, :, None], (2, 10, 40, 3))
    found = cover_and_crop(np.ascontiguousarray(ramp), (20, 30), (0.0, 0.5)).numpy().astype(int)
    assert found.shape == (2, 20, 30, 3)
    assert (found == found[:1, :1, :, :1]).all()
    assert set(np.diff(found[0, 0, :, 0])) == {2}
    assert found[0, 0, 0, 0] == pytest.approx(4 * ((25 + 0.5) / 2 - 0.5), abs=1)  # 25 columns of 80 are cut on the left
    same = np.ascontiguousarray(ramp[:, :10, :10])
    assert np.array_equal(cover_and_crop(same, (10, 10), (0.7, 0.2)).numpy(), same)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999999, 1.0])
def test_crops_stay_inside(share):
    assert cover_and_crop(np.zeros((1, 17, 31, 3), np.uint8), (8, 8), (share, share)).shape == (1, 8, 8, 3)


def test_steps_have_clips_of_one_length_in_the_given_shares(manifest):
    data = ClipData(section(manifest))
    steps = [data.plan.step(position) for position in range(40)]
    assert sum(step.stream == "1_frames" for step in steps) == 10
    for step in steps:
        assert step.shape == ((1 if step.stream == "1_frames" else 16), SIZE, SIZE) and step.samples == 2
    seen = [ref.item for step in steps if step.stream == "16_frames" for ref in step.refs]
    assert all(seen.count(item) == 15 for item in range(4)) and 4 not in seen, "an image is no clip of 16 frames"
    stills = {ref.item for step in steps if step.stream == "1_frames" for ref in step.refs}
    assert stills == set(range(5)), "images, and frames of videos"
    read = data.readers(steps[0].refs)
    assert read.frames.shape[0] == 2 and read.pixels(torch.device("cpu")).shape[:2] == (2, 3)


def test_lengths_that_no_video_has_are_refused(manifest):
    with pytest.raises(ConfigError, match="has no video of 24 frames, at most 18"):
        ClipData(section(manifest, lengths=({"frames": 24, "share": 1.0},)))
    with pytest.raises(ConfigError, match=r"data\.val_frames = 17: .* has shorter videos, train-image of 1 frames"):
        ClipData(section(manifest, val_manifest=str(manifest), val_frames=17))


def test_files_that_cannot_be_used_are_named(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "still.png")
    (tmp_path / "list.csv").write_text("sample_id,video_path,num_frames\na,still.png,9\nb,missing.mp4,9\n")
    clips = Clips(ClipIndex.read(tmp_path / "list.csv"), 9, (32, 32), seed=0)
    with pytest.raises(SampleError, match=r"still\.png: an image, and 9 frames are wanted"):
        clips.read(0, 0)
    with pytest.raises(SampleError, match=r"missing\.mp4: No such file"):
        clips.read(1, 0)
    assert issubclass(SampleError, InputError)
    (filler,) = clips.fillers(0)
    assert filler.weight == 0 and filler.frames.shape == (9, 32, 32, 3) and filler.noise.shape == (24, 2, 4, 4)
