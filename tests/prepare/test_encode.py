"""Latents are the codec's of the frames that a naive computation picks, and follow from their unit alone."""

import shutil
from fractions import Fraction

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import BucketSection, EncodeSection
from mugv_ds.models.codec import LinearCodec
from mugv_ds.prepare.encode import (
    Encoder,
    check_room,
    encode_key,
    extend_plan,
    fit_clips,
    latent_bytes,
    unit_of,
    units_in,
)
from mugv_ds.prepare.rows import ENCODE_PLAN
from tests.helpers.film import clip_row, draw_film, tables, video_row, write_film
from tests.helpers.prepared import fit_codec

BUCKET = BucketSection(height=32, width=48, frames=16)
STILL = BucketSection(height=32, width=48, frames=1)
SECTION = EncodeSection(buckets=(BUCKET, STILL), largest_only=False, device="cpu", least_area=0.7)


@pytest.fixture(scope="module")
def codec() -> LinearCodec:
    return fit_codec([draw_film(f"fit {i}", 16, (32, 48)) for i in range(8)])


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Films of 30, 24, 20 and varying frames a second and one of narrow pixels, and their rows."""
    root = tmp_path_factory.mktemp("films")
    varying = np.cumsum([0.0] + [1 / 60 if i % 3 else 1 / 30 for i in range(59)])
    kinds = {
        "30.mp4": (np.arange(40) / 30, (64, 96), None, (0, 0, 0, 0)),
        "24.mp4": (np.arange(40) / 24, (64, 80), None, (4, 0, 0, 8)),
        "20.mp4": (np.arange(40) / 20, (64, 96), None, (0, 0, 0, 0)),
        "vfr.mp4": (varying, (64, 96), None, (0, 0, 0, 0)),
        "narrow.mp4": (np.arange(40) / 24, (64, 96), Fraction(4, 3), (0, 0, 0, 0)),
    }
    videos, clips = [], []
    for name, (times, size, aspect, crop) in kinds.items():
        frames = draw_film(name, len(times), size)
        video = video_row(write_film(root / name, frames, times, aspect))
        height, width = size[0] - crop[0] - crop[1], size[1] - crop[2] - crop[3]
        height = round(height / (aspect or 1))  # pixels become square by shrinking
        videos.append(video)
        clips.append(clip_row(video, (height, width), crop=crop, first=2))
    return root, tables(videos, clips)


@pytest.fixture(scope="module")
def fragments(films):
    _, rows = films
    return rows | {"fit": fit_clips(rows["clips"], rows["videos"], SECTION)}


def planned(fragments, section=SECTION, plan=None) -> pa.Table:
    return extend_plan(plan or ENCODE_PLAN.empty_table(), [(0, fragments["fit"])], section)


def units_of(plan, fragments, section=SECTION, **options):
    return [
        unit_of(rows, lambda step, part, columns: fragments[step].select(columns), section, **options)
        for _, rows in units_in(plan)
    ]


def naive(path, clip, fps, frames, late=0) -> np.ndarray:
    """The frames of a sample, or those `late` frames later, by OpenCV's arithmetic alone: uint8 [F, 32, 48, 3]."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = [
            (frame.pts, frame.reformat(format="rgb24", interpolation="AREA", dst_color_range="JPEG", threads=1))
            for frame in container.decode(stream)
        ]
        aspect = stream.sample_aspect_ratio or 1
    decoded = [(pts, frame.to_ndarray()) for pts, frame in decoded if clip["first_pts"] <= pts <= clip["last_pts"]]
    base = float(stream.time_base)
    picked = []
    for j in range(frames):
        time = decoded[0][0] * base + j / fps
        distances = [round(abs(pts * base - time), 6) for pts, _ in decoded]
        picked.append(decoded[min(distances.index(min(distances)) + late, len(decoded) - 1)][1])
    top, bottom, left, right = (clip[f"crop_{side}"] for side in ("top", "bottom", "left", "right"))
    shown = []
    for picture in picked:
        picture = picture[top : picture.shape[0] - bottom, left : picture.shape[1] - right]
        height, width = picture.shape[0], round(picture.shape[1] * aspect)
        scale = max(32 / height, 48 / width)
        covering = (max(round(width * scale), 48), max(round(height * scale), 32))
        picture = cv2.resize(picture, covering, interpolation=cv2.INTER_AREA)
        y, x = (covering[1] - 32) // 2, (covering[0] - 48) // 2
        shown.append(picture[y : y + 32, x : x + 48])
    return np.stack(shown)


def encoded(codec, frames) -> torch.Tensor:
    if len(frames) == 1:
        frames = np.repeat(frames, 8, axis=0)
    return codec.encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1)[0]


def test_clips_of_too_few_frames_a_second_are_no_video_and_still_a_picture(films, fragments):
    rows = fragments["fit"].to_pylist()
    slow = films[1]["clips"]["clip"][2].as_py()
    assert [row["bucket"] for row in rows if row["clip"] == slow] == [STILL.name]
    assert all(row["repeated"] == 0 for row in rows)
    only = SECTION.model_copy(update={"buckets": (BUCKET,)})
    refused = fit_clips(films[1]["clips"], films[1]["videos"], only).to_pylist()[2]
    assert (refused["bucket"], refused["name"], refused["high"]) == (None, "fps_too_low", 0.05)
    assert refused["value"] == pytest.approx(2 / 16, abs=0.07)


def test_latents_are_the_codecs_of_the_frames_that_a_naive_computation_picks(films, fragments, codec, tmp_path):
    root, rows = films
    clips = {clip["clip"]: clip for clip in rows["clips"].to_pylist()}
    paths = dict(zip(rows["videos"]["video"].to_pylist(), rows["videos"]["path"].to_pylist(), strict=True))
    seen = set()
    for unit in units_of(planned(fragments), fragments):
        facts = Encoder(codec, root, tmp_path, SECTION)(unit).to_pylist()
        stored = load_file(tmp_path / unit.shard)
        assert list(stored) == sorted(stored) == [row["clip"] for row in facts]
        for row in facts:
            clip = clips[row["clip"]]
            path = root / paths[clip["video"]]
            frames = naive(path, clip, 24, unit.bucket.frames)
            own = (row["luma"] * 255, frames.astype(float) @ [0.299, 0.587, 0.114])
            assert own[0] == pytest.approx(own[1].mean(), abs=1.5), path
            latent = stored[row["clip"]]
            expected = encoded(codec, frames)
            assert latent.dtype == torch.bfloat16 and latent.shape == expected.shape
            # Cropping before or after scaling rounds differently, and a frame later is something else.
            error, late = (
                float((latent.float() - other).square().mean().sqrt())
                for other in (expected, encoded(codec, naive(path, clip, 24, unit.bucket.frames, late=1)))
            )
            assert error < 0.05 or error < 0.4 * late, (path, error, late)
            seen.add((path.name, unit.bucket.frames))
    assert seen == {(name, 16) for name in ("30.mp4", "24.mp4", "vfr.mp4", "narrow.mp4")} | {
        (name, 1) for name in paths.values()
    }


def test_a_unit_gives_the_same_bytes_again_with_any_number_of_threads(films, fragments, codec, tmp_path):
    unit = units_of(planned(fragments), fragments)[0]
    outcomes = []
    for number, threads in enumerate((1, 4)):
        out = tmp_path / str(number)
        rows = Encoder(codec, films[0], out, SECTION, threads=threads)(unit)
        outcomes.append((rows.to_pylist(), (out / unit.shard).read_bytes()))
    assert outcomes[0] == outcomes[1]


def test_a_plan_is_added_to_and_its_rows_stay(fragments):
    one_a_unit = SECTION.model_copy(update={"shard_mb": 1})
    fits = fragments["fit"]
    first = extend_plan(ENCODE_PLAN.empty_table(), [(0, fits.slice(0, 3))], one_a_unit)
    more = extend_plan(first, [(0, fits.slice(0, 3)), (1, fits.slice(3))], one_a_unit)
    assert more.slice(0, first.num_rows).equals(first)
    assert min(more["unit"].to_pylist()[first.num_rows :]) == max(first["unit"].to_pylist()) + 1
    assert set(more["part"].to_pylist()[first.num_rows :]) == {1}
    pairs = list(zip(more["bucket"].to_pylist(), more["clip"].to_pylist(), strict=True))
    known = fits.filter(pa.compute.is_valid(fits["bucket"]))
    assert sorted(pairs) == sorted(zip(known["bucket"].to_pylist(), known["clip"].to_pylist(), strict=True))
    assert extend_plan(more, [(0, fits.slice(0, 3)), (1, fits.slice(3))], one_a_unit).equals(more)
    for _, rows in units_in(more):
        assert (
            rows["clip"].to_pylist() == sorted(rows["clip"].to_pylist()) and len(set(rows["bucket"].to_pylist())) == 1
        )


def test_shards_are_as_large_as_asked_for():
    bucket = BucketSection(height=720, width=1280, frames=120)
    section = EncodeSection(buckets=(bucket,))
    assert latent_bytes(bucket, section) == 24 * 15 * 90 * 160 * 2
    clips = [{"clip": f"{i:032x}", "bucket": bucket.name} for i in range(250)]
    plan = extend_plan(ENCODE_PLAN.empty_table(), [(0, pa.Table.from_pylist(clips))], section)
    assert [plan["unit"].to_pylist().count(unit) for unit in range(3)] == [103, 103, 44]


def test_a_key_follows_from_codec_bucket_and_clips_alone(fragments):
    video, still = (rows for _, rows in units_in(planned(fragments)))
    keys = {encode_key(video, "a", SECTION), encode_key(video, "b", SECTION), encode_key(still, "a", SECTION)}
    keys.add(encode_key(video, "a", SECTION.model_copy(update={"dtype": "float32"})))
    keys.add(encode_key(video.slice(1), "a", SECTION))
    assert len(keys) == 5
    bounds = SECTION.model_copy(update={"least_area": 0.1, "most_repeated": 0.5, "shard_mb": 7, "device": "cpu"})
    assert encode_key(video, "a", bounds) == encode_key(video, "a", SECTION)


def test_bad_clips_are_rows_and_the_others_are_encoded(films, fragments, codec, tmp_path, monkeypatch):
    monkeypatch.setattr("mugv_ds.files.retry.time.sleep", lambda seconds: None)
    root, rows = tmp_path / "videos", films[1]
    shutil.copytree(films[0], root)
    (root / "30.mp4").unlink()
    (root / "24.mp4").write_bytes(b"no video")
    video = rows["videos"]["video"].to_pylist()
    withdrawn = frozenset([video[4]])
    unit = units_of(planned(fragments), fragments, withdrawn=withdrawn)[1]
    unit = unit.__class__(unit.number, unit.bucket, unit.shots)
    out = {row["clip"]: row for row in Encoder(codec, root, tmp_path / "out", SECTION)(unit).to_pylist()}
    clips = rows["clips"]["clip"].to_pylist()
    assert "30.mp4" in out[clips[0]]["error"] and "24.mp4" in out[clips[1]]["error"]
    assert out[clips[4]]["error"] == "withdrawn"
    good = [clips[2], clips[3]]
    assert all(out[clip]["error"] is None and out[clip]["shard"] == unit.shard for clip in good)
    assert sorted(load_file(tmp_path / "out" / unit.shard)) == sorted(good)
    assert all(out[clip]["shard"] is None for clip in out if clip not in good)


def test_a_full_disk_is_told_before_the_first_latent(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    count = free // latent_bytes(BUCKET, SECTION)
    assert check_room([(BUCKET, 3)], SECTION, tmp_path) >= 3 * latent_bytes(BUCKET, SECTION)
    with pytest.raises(InputError, match=r"will take .* GiB and .* are free"):
        check_room([(BUCKET, count), (BUCKET, 1)], SECTION, tmp_path)
