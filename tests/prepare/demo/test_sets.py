import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mugv_ds.config.text_encoder import read_text_encoder
from mugv_ds.data.clips import ClipIndex
from mugv_ds.data.manifest import Index, open_index
from mugv_ds.data.sample import Sample, read_row, read_text
from mugv_ds.data.video import read_mp4
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import NEGATIVE_PROMPT, PROMPT_SUFFIX, HashTextEncoder
from mugv_ds.prepare.demo import scenes
from mugv_ds.prepare.demo import sets as demo
from mugv_ds.prepare.demo.motion import LEAST_MOTION, horizontal_motion

TOOL = Path(__file__).parents[3] / "tools" / "make_demo_data.py"
SIZES = demo.Sizes(
    train=40,
    val=4,
    stage1=20,
    stage2=24,
    stage3=12,
    val_stages=16,
    sft=12,
    pairs=8,
    pairs_val=2,
    labels=8,
    labels_val=2,
)
TINY = demo.Sizes(train=30, **{name: 2 for name in asdict(SIZES) if name != "train"})
SEED = 3


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    rows = [word for name, n in asdict(SIZES).items() for word in (f"--{name.replace('_', '-')}", n)]
    result = run_tool("--out", folder, "--seed", SEED, *rows)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def samples(folder) -> dict[str, list[Sample]]:
    """Every row of every CSV, as training reads it."""

    def read_all(index: Index) -> list[Sample]:
        sizes = {"channels": demo.TEXT_CHANNELS, "max_text_tokens": demo.MAX_TEXT_TOKENS}
        return [read_row(index, i, **sizes) for i in range(len(index))]

    return {split: read_all(open_index(folder / f"{split}.csv")) for split in asdict(SIZES)}


@pytest.fixture(scope="module")
def codec(folder) -> LinearCodec:
    return LinearCodec.load(folder / "codec.safetensors")


def decoded(sample: Sample, codec: LinearCodec) -> np.ndarray:
    """uint8 [F, H, W, 3]."""
    video = codec.decode(sample.latent[None])[0].clamp(-1, 1).permute(1, 2, 3, 0)
    return ((video + 1) * 127.5).round().to(torch.uint8).numpy()


def drawn(subject: scenes.Subject, radius: float = 12.0) -> np.ndarray:
    return scenes.render(scenes.Clip("x", subject, scenes.SQUARE[0], (24.0, 24.0), radius))


def cover(frames: np.ndarray) -> np.ndarray:
    """Share of each pixel that the shape covers, of a white shape: [F, H, W]."""
    white, background = scenes.COLOURS["white"][0], scenes.BACKGROUND[0]
    return (frames[..., 0].astype(float) - background) / (white - background)


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi), ("square", 1.7**2), ("triangle", 3 * 3**0.5 * 0.575**2)]
)
def test_shapes_have_their_area_in_every_frame(shape, area):
    areas = cover(drawn(scenes.Subject(shape, "white", "left"), radius=12.0)).sum(axis=(1, 2))
    np.testing.assert_allclose(areas, area * 12**2, rtol=0.03)


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize(
    ("direction", "step"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))]
)
def test_shapes_move_as_the_caption_says(shape, direction, step):
    weight = cover(drawn(scenes.Subject(shape, "white", direction)))
    centre = np.arange(48) + 0.5
    x = (weight.sum(axis=1) * centre).sum(axis=1) / weight.sum(axis=(1, 2))
    y = (weight.sum(axis=2) * centre).sum(axis=1) / weight.sum(axis=(1, 2))
    travelled = 0.75 * 15
    np.testing.assert_allclose((x[-1] - x[0], y[-1] - y[0]), np.array(step) * travelled, atol=0.1)


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_shapes_have_their_colour(colour):
    frame = drawn(scenes.Subject("square", colour, "up"))[8]
    assert tuple(frame[24, 24]) == scenes.COLOURS[colour]
    assert tuple(frame[0, 0]) == scenes.BACKGROUND


def test_all_subjects_come_once_before_any_comes_again():
    clips = scenes.draw_clips("clip", 2 * len(scenes.SUBJECTS), seed=0)
    rounds = [[clip.subject for clip in clips[start::]][: len(scenes.SUBJECTS)] for start in (0, len(scenes.SUBJECTS))]
    assert all(len(set(subjects)) == len(scenes.SUBJECTS) for subjects in rounds)
    assert rounds[0] != rounds[1]


def test_clips_depend_on_split_seed_and_number_alone():
    clips = scenes.draw_clips("clip", 20, seed=0)
    assert scenes.draw_clips("clip", 30, seed=0)[:20] == clips
    for other in (scenes.draw_clips("clip", 20, seed=1), scenes.draw_clips("held_out", 20, seed=0)):
        assert not {clip.middle for clip in clips} & {clip.middle for clip in other}


def test_a_large_clip_is_a_small_one_magnified_and_a_long_one_shows_the_same_two_seconds():
    small = scenes.Clip("x", scenes.Subject("circle", "white", "right"), scenes.SQUARE[0], (24.0, 24.0), 12.0)
    large = replace(small, format=scenes.LARGE[0], middle=(32.0, 32.0), radius=16.0)
    areas, magnified = (cover(scenes.render(clip)).sum(axis=(1, 2)).mean() for clip in (small, large))
    np.testing.assert_allclose(magnified / areas, (64 / 48) ** 2, rtol=0.01)
    for clip, per_second in ((small, 6), (replace(small, format=scenes.LONG[0]), 6), (large, 8)):
        assert clip.format.frames / clip.format.fps == 2
        assert horizontal_motion(scenes.render(clip)) * clip.format.fps == pytest.approx(per_second, rel=0.01)


@pytest.mark.parametrize("formats", [scenes.SHORT, scenes.LONG, scenes.LARGE, scenes.IMAGES])
def test_shapes_stay_in_the_picture(formats):
    """The rim's blur apart: the outermost line of pixels is background."""
    for clip in scenes.draw_clips("edge", 2 * len(scenes.SUBJECTS), seed=0, formats=formats):
        seen = (scenes.render(clip) != scenes.BACKGROUND).any(axis=-1)
        outermost = np.concatenate([seen[:, 0], seen[:, -1], seen[:, :, 0], seen[:, :, -1]], axis=1)
        assert outermost.mean() < 0.01, clip


SHAPES_OF = {  # (T, H, W) of the latents, fps, kind
    "train": {(2, 6, 6, 8.0, "video")},
    "stage1": {(1, 6, 6, 8.0, "image"), (1, 5, 7, 8.0, "image"), (2, 6, 6, 8.0, "video"), (2, 5, 7, 8.0, "video")},
    "stage2": {(2, 6, 6, 8.0, "video"), (2, 5, 7, 8.0, "video"), (4, 6, 6, 16.0, "video"), (4, 5, 7, 16.0, "video")},
    "stage3": {(4, 8, 8, 16.0, "video"), (4, 7, 9, 16.0, "video")},
}
SHAPES_OF["val_stages"] = SHAPES_OF["stage1"] | SHAPES_OF["stage2"] | SHAPES_OF["stage3"]


@pytest.mark.parametrize("split", asdict(SIZES))
def test_every_row_is_readable_and_of_its_stages_shapes(samples, split):
    assert len(samples[split]) == getattr(SIZES, split)
    seen = {(*sample.latent.shape[1:], sample.row.fps, sample.row.kind) for sample in samples[split]}
    assert seen == SHAPES_OF.get(split, SHAPES_OF["train"])
    assert all(sample.row.source == "generated" for sample in samples[split])
    stages = {"stage1", "stage2", "stage3", "val_stages"}
    still = [sample for sample in samples[split] if "moving" not in sample.row.caption]
    assert all(sample.row.kind == "image" for sample in still) and bool(still) == (
        split in stages - {"stage2", "stage3"}
    )


def test_the_clips_of_train_and_val_are_there_as_videos(folder, samples):
    names = [sample.row.sample_id for split in ("train", "val") for sample in samples[split]]
    assert sorted(path.stem for path in (folder / "videos").iterdir()) == sorted(names)
    frames, fps = read_mp4(folder / "videos" / f"{names[-1]}.mp4")
    assert frames.shape == (16, 48, 48, 3) and fps == 8


def test_the_videos_are_listed_for_the_videovae(folder):
    for name, rows in (("vae_train", SIZES.train), ("vae_val", SIZES.val)):
        index = ClipIndex.read(folder / f"{name}.csv")
        assert len(index) == rows and set(index.frames.tolist()) == {16}
        assert index.read_frames(rows - 1, 0, 16).shape == (16, 48, 48, 3)


def directions(samples: list[Sample], codec: LinearCodec) -> list[str | None]:
    """Which way each sample moves to the side, from its decoded pixels; None for none."""
    speeds = [horizontal_motion(decoded(sample, codec)) for sample in samples]
    return [None if abs(speed) < LEAST_MOTION else "right" if speed > 0 else "left" for speed in speeds]


@pytest.mark.parametrize("split", ["stage1", "stage2", "stage3", "sft"])
def test_a_third_of_a_stages_clips_leave_the_side_open_and_half_of_them_go_left(samples, codec, split):
    clips = [sample for sample in samples[split] if sample.row.kind == "video"]
    sideways = [sample for sample in clips if sample.row.caption.endswith(" moving sideways")]
    assert len(sideways) == len(clips) // 3
    assert Counter(directions(sideways, codec)) == {"left": len(sideways) // 2, "right": len(sideways) // 2}
    told = [sample for sample in clips if not sample.row.caption.endswith(" moving sideways")]
    expected = [sample.row.caption.split()[-1] for sample in told]
    assert directions(told, codec) == [word if word in ("left", "right") else None for word in expected]


def test_train_and_val_tell_every_direction(samples):
    assert not [s for split in ("train", "val", "val_stages") for s in samples[split] if "sideways" in s.row.caption]


@pytest.mark.parametrize("split", [pytest.param("pairs", marks=pytest.mark.long), "pairs_val"])
def test_of_a_pair_the_better_moves_right_and_all_else_is_equal(folder, samples, codec, split):
    by_pair: dict[str, dict[int, Sample]] = {}
    for sample in samples[split]:
        by_pair.setdefault(sample.row.pair_id, {})[sample.row.rank] = sample
    assert len(by_pair) == getattr(SIZES, split) // 2
    for pair in by_pair.values():
        assert directions([pair[1], pair[2]], codec) == ["right", "left"]
        assert pair[1].row.caption == pair[2].row.caption and pair[1].row.caption.endswith("sideways")
        # The worse clip is the better one played backwards.
        difference = decoded(pair[1], codec).astype(float) - decoded(pair[2], codec)[::-1]
        assert abs(difference).mean() < 4
        assert torch.equal(pair[1].text, pair[2].text)


@pytest.mark.parametrize("split", ["labels", "labels_val"])
def test_good_moves_right_and_bad_left(samples, codec, split):
    labels = [sample.row.label for sample in samples[split]]
    assert Counter(labels) == {"good": len(labels) // 2, "bad": len(labels) // 2}
    assert directions(samples[split], codec) == [{"good": "right", "bad": "left"}[label] for label in labels]
    assert all(sample.row.caption.endswith("sideways") for sample in samples[split])


def test_hand_picked_clips_are_centred():
    rows = demo.draw_curriculum(demo.Sizes(), seed=0)["sft"]
    assert {(clip.middle, clip.radius) for clip, _ in rows} == {((24.0, 24.0), 12.5)}
    assert len(set(Counter(clip.subject for clip, _ in rows).values())) == 1  # each as often as any other


def test_ids_are_unique_and_held_out_clips_are_new():
    sets = demo.draw_curriculum(demo.Sizes(), seed=0)
    clips = [clip for rows in sets.values() for clip, _ in rows]
    assert len({clip.name for clip in clips}) == len(clips)
    places = {name: {clip.middle for clip, _ in rows} for name, rows in sets.items()}
    for name in ("val_stages", "pairs_val", "labels_val"):
        assert not places[name] & set.union(*(places[other] for other in places if other != name))
    assert Counter((clip.format.frames, clip.format.width) for clip, _ in sets["val_stages"]) == dict.fromkeys(
        [(1, 48), (1, 56), (16, 48), (16, 56), (32, 48), (32, 56), (32, 64), (32, 72)], 6
    )


def test_the_file_of_prompts_leaves_the_side_open(folder):
    prompts = (folder / "prompts_sideways.txt").read_text().splitlines()
    assert prompts == demo.sideways_prompts() and len(set(prompts)) == len(scenes.SHAPES) * len(scenes.COLOURS)
    assert all(prompt.endswith(" moving sideways") for prompt in prompts)


def test_latents_decode_to_the_clips_of_their_captions(folder, samples, codec):
    for sample in (*samples["train"][:10], *samples["val"]):
        frames, _ = read_mp4(folder / "videos" / f"{sample.row.sample_id}.mp4")
        video = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
        shown = codec.decode(sample.latent[None])[0]
        assert (shown - video).square().mean() < 0.02, sample.row.sample_id  # blurred edges, nothing else
        _, colour, *_ = sample.row.caption.split()
        middle = 127.5 * (shown[:, 7:9, 22:26, 22:26].mean(dim=(1, 2, 3)) + 1)
        nearest = min(scenes.COLOURS, key=lambda name: (middle - torch.tensor(scenes.COLOURS[name])).square().sum())
        assert nearest == colour, sample.row.caption


def test_latents_of_every_shape_decode_to_what_was_drawn(samples, codec):
    sets = demo.draw_curriculum(SIZES, SEED)
    for split in ("stage1", "stage2", "stage3", "val_stages"):
        for sample, (clip, _) in list(zip(samples[split], sets[split], strict=True))[::3]:
            difference = decoded(sample, codec).astype(float) - scenes.render(clip)  # a still's one frame against all
            assert np.square(difference / 127.5).mean() < 0.03, clip  # rims are more of a small picture


def test_latents_are_normalised(samples):
    latents = torch.stack([sample.latent for sample in samples["train"]])
    assert latents.mean().abs() < 0.05
    assert (latents.std() - 1).abs() < 0.05


def test_held_out_clips_are_not_in_training(samples):
    train = torch.stack([sample.latent for sample in samples["train"]]).flatten(1)
    val = torch.stack([sample.latent for sample in samples["val"]]).flatten(1)
    assert torch.cdist(val, train).min() > 1


def test_text_features_are_those_of_caption_and_suffix(folder, samples):
    encode = HashTextEncoder(demo.TEXT_CHANNELS, demo.MAX_TEXT_TOKENS)
    for sample in (*samples["val"], *samples["stage1"], *samples["pairs"]):
        (text,), (mask,) = encode([sample.row.caption + PROMPT_SUFFIX])
        assert torch.equal(sample.text, text) and torch.equal(sample.text_mask, mask)
    negative, _ = read_text(folder / "text_features" / "negative.pt", demo.TEXT_CHANNELS, demo.MAX_TEXT_TOKENS)
    assert torch.equal(negative, encode([NEGATIVE_PROMPT])[0][0])
    assert read_text_encoder(folder) == encode.info


def test_prompts_are_varied_and_taught():
    prompts = demo.demo_prompts()
    assert len(set(prompts)) == 8
    subjects = [next(subject for subject in scenes.SUBJECTS if subject.caption == prompt) for prompt in prompts]
    for key, values in (("shape", scenes.SHAPES), ("colour", scenes.COLOURS), ("direction", scenes.DIRECTIONS)):
        assert {getattr(subject, key) for subject in subjects} == set(values)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".index" not in path.parts)
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_set_is_left_alone(folder):
    before = contents(folder)
    demo.make_demo_data(folder, SIZES, seed=SEED)
    assert contents(folder) == before


@pytest.mark.long
def test_an_interrupted_set_is_made_anew_and_the_same(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LinearCodec, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.make_demo_data(tmp_path, SIZES, seed=SEED)
    (tmp_path / "latents" / "stale.pt").touch()
    demo.make_demo_data(tmp_path, SIZES, seed=SEED)
    made, expected = contents(tmp_path), contents(folder)
    assert made.keys() == expected.keys()
    assert all(made[name][1] == expected[name][1] for name in made if name.endswith((".csv", ".mp4", ".json", ".txt")))
    for name in ("latents/clip_00000.pt", "latents/held_out_00003.pt"):
        latent, reference = (torch.load(root / name, weights_only=True) for root in (tmp_path, folder))
        torch.testing.assert_close(latent, reference)


@pytest.mark.long
def test_other_arguments_and_older_versions_are_replaced(tmp_path):
    demo.make_demo_data(tmp_path, replace(TINY, train=31, val=4), seed=0)
    demo.make_demo_data(tmp_path, TINY, seed=0)
    assert len(open_index(tmp_path / "train.csv")) == 30
    assert len(list((tmp_path / "videos").iterdir())) == 32
    assert len(list((tmp_path / "latents").iterdir())) == sum(asdict(TINY).values())
    marker = tmp_path / "demo.json"
    older = marker.read_text().replace(f'"version": {demo._VERSION}', f'"version": {demo._VERSION - 1}')
    marker.write_text(older)
    demo.make_demo_data(tmp_path, TINY, seed=0)
    assert marker.read_text() != older


def test_other_peoples_files_are_never_touched(tmp_path):
    precious = tmp_path / "latents" / "x.pt"
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    result = run_tool("--out", tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("make_demo_data: ") and "no demo.json" in result.stderr
    assert precious.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("name", "rows", "message"), [("train", 0, "at least 1"), ("labels_val", 0, "at least 1"), ("pairs", 5, "even")]
)
def test_sizes_that_cannot_be(name, rows, message):
    with pytest.raises(ValueError, match=f"{name} = {rows}: must be {message}"):
        demo.Sizes(**{name: rows})


def test_sizes_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="pairs = 5: must be even"):
        demo.make_demo_data(tmp_path / "demo", replace(TINY, pairs=5), seed=0)
    assert not (tmp_path / "demo").exists()
