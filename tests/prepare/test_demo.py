import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mugv_ds.data.manifest import Index, open_index
from mugv_ds.data.sample import read_row, read_text
from mugv_ds.data.video import read_mp4
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import NEGATIVE_PROMPT, PROMPT_SUFFIX, HashTextEncoder
from mugv_ds.prepare import demo

TOOL = Path(__file__).parents[2] / "tools" / "make_demo_data.py"
CLIPS, HELD_OUT = 40, 4
ARGUMENTS = {"clips": CLIPS, "held_out": HELD_OUT, "seed": 3}


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "demo"
    result = run_tool("--out", folder, "--clips", CLIPS, "--held-out", HELD_OUT, "--seed", 3)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def samples(folder) -> dict[str, list]:
    def read_all(index: Index) -> list:
        sizes = {"channels": demo.TEXT_CHANNELS, "max_text_tokens": demo.MAX_TEXT_TOKENS}
        return [read_row(index, i, **sizes) for i in range(len(index))]

    return {split: read_all(open_index(folder / f"{split}.csv")) for split in ("train", "val")}


def drawn(subject: demo.Subject, radius: float = 12.0) -> np.ndarray:
    return demo.render(demo.Clip("x", subject, (24.0, 24.0), radius))


def cover(frames: np.ndarray) -> np.ndarray:
    """Share of each pixel that the shape covers, of a white shape: [F, H, W]."""
    white, background = demo.COLOURS["white"][0], demo.BACKGROUND[0]
    return (frames[..., 0].astype(float) - background) / (white - background)


@pytest.mark.parametrize(
    ("shape", "area"), [("circle", np.pi), ("square", 1.7**2), ("triangle", 3 * 3**0.5 * 0.575**2)]
)
def test_shapes_have_their_area_in_every_frame(shape, area):
    areas = cover(drawn(demo.Subject(shape, "white", "left"), radius=12.0)).sum(axis=(1, 2))
    np.testing.assert_allclose(areas, area * 12**2, rtol=0.03)


@pytest.mark.parametrize("shape", demo.SHAPES)
@pytest.mark.parametrize(
    ("direction", "step"), [("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1))]
)
def test_shapes_move_as_the_caption_says(shape, direction, step):
    weight = cover(drawn(demo.Subject(shape, "white", direction)))
    centre = np.arange(demo.SIDE) + 0.5
    x = (weight.sum(axis=1) * centre).sum(axis=1) / weight.sum(axis=(1, 2))
    y = (weight.sum(axis=2) * centre).sum(axis=1) / weight.sum(axis=(1, 2))
    travelled = 0.75 * (demo.FRAMES - 1)
    np.testing.assert_allclose((x[-1] - x[0], y[-1] - y[0]), np.array(step) * travelled, atol=0.1)


@pytest.mark.parametrize("colour", demo.COLOURS)
def test_shapes_have_their_colour(colour):
    frame = drawn(demo.Subject("square", colour, "up"))[demo.FRAMES // 2]
    assert tuple(frame[24, 24]) == demo.COLOURS[colour]
    assert tuple(frame[0, 0]) == demo.BACKGROUND


def test_all_subjects_come_once_before_any_comes_again():
    clips = demo.draw_clips("clip", 2 * len(demo.SUBJECTS), seed=0)
    rounds = [[clip.subject for clip in clips[start::]][: len(demo.SUBJECTS)] for start in (0, len(demo.SUBJECTS))]
    assert all(len(set(subjects)) == len(demo.SUBJECTS) for subjects in rounds)
    assert rounds[0] != rounds[1]


def test_clips_depend_on_split_seed_and_number_alone():
    clips = demo.draw_clips("clip", 20, seed=0)
    assert demo.draw_clips("clip", 30, seed=0)[:20] == clips
    for other in (demo.draw_clips("clip", 20, seed=1), demo.draw_clips("held_out", 20, seed=0)):
        assert not {clip.middle for clip in clips} & {clip.middle for clip in other}


def test_every_row_is_readable_and_complete(folder, samples):
    assert (len(samples["train"]), len(samples["val"])) == (CLIPS, HELD_OUT)
    for sample in (*samples["train"], *samples["val"]):
        assert sample.latent.shape == (24, 2, 6, 6)
        assert (sample.row.fps, sample.row.kind, sample.row.source) == (8.0, "video", "generated")
    with (folder / "val.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (row["height"], row["width"], row["num_frames"]) == ("48", "48", "16")
    frames, fps = read_mp4(folder / "videos" / f"{row['sample_id']}.mp4")
    assert frames.shape == (16, 48, 48, 3) and fps == 8


def test_latents_decode_to_the_clips_of_their_captions(folder, samples):
    codec = LinearCodec.load(folder / "codec.safetensors")
    for sample in (*samples["train"][:10], *samples["val"]):
        frames, _ = read_mp4(folder / "videos" / f"{sample.row.sample_id}.mp4")
        video = torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1
        decoded = codec.decode(sample.latent[None])[0]
        assert (decoded - video).square().mean() < 0.02, sample.row.sample_id  # blurred edges, nothing else
        _, colour, *_ = sample.row.caption.split()
        middle = 127.5 * (decoded[:, 7:9, 22:26, 22:26].mean(dim=(1, 2, 3)) + 1)
        nearest = min(demo.COLOURS, key=lambda name: (middle - torch.tensor(demo.COLOURS[name])).square().sum())
        assert nearest == colour, sample.row.caption


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
    for sample in samples["val"]:
        (text,), (mask,) = encode([sample.row.caption + PROMPT_SUFFIX])
        assert torch.equal(sample.text, text) and torch.equal(sample.text_mask, mask)
    negative, _ = read_text(folder / "text_features" / "negative.pt", demo.TEXT_CHANNELS, demo.MAX_TEXT_TOKENS)
    assert torch.equal(negative, encode([NEGATIVE_PROMPT])[0][0])


def test_prompts_are_varied_and_taught():
    prompts = demo.demo_prompts()
    assert len(set(prompts)) == 8
    subjects = [next(subject for subject in demo.SUBJECTS if subject.caption == prompt) for prompt in prompts]
    for key, values in (("shape", demo.SHAPES), ("colour", demo.COLOURS), ("direction", demo.DIRECTIONS)):
        assert {getattr(subject, key) for subject in subjects} == set(values)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".index" not in path.parts)
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_finished_set_is_left_alone(folder):
    before = contents(folder)
    demo.make_demo_data(folder, **ARGUMENTS)
    assert contents(folder) == before


def test_an_interrupted_set_is_made_anew_and_the_same(folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LinearCodec, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.make_demo_data(tmp_path, **ARGUMENTS)
    (tmp_path / "latents" / "stale.pt").touch()
    demo.make_demo_data(tmp_path, **ARGUMENTS)
    made, expected = contents(tmp_path), contents(folder)
    assert made.keys() == expected.keys()
    assert all(made[name][1] == expected[name][1] for name in made if name.endswith((".csv", ".mp4", ".json")))
    for name in ("latents/clip_00000.pt", "latents/held_out_00003.pt"):
        latent, reference = (torch.load(root / name, weights_only=True) for root in (tmp_path, folder))
        torch.testing.assert_close(latent, reference)


def test_other_arguments_replace_the_set(folder, tmp_path):
    demo.make_demo_data(tmp_path, clips=31, held_out=2, seed=0)
    demo.make_demo_data(tmp_path, clips=30, held_out=1, seed=0)
    assert len(open_index(tmp_path / "train.csv")) == 30
    assert len(list((tmp_path / "latents").iterdir())) == len(list((tmp_path / "videos").iterdir())) == 31


def test_other_peoples_files_are_never_touched(tmp_path):
    precious = tmp_path / "latents" / "x.pt"
    precious.parent.mkdir()
    precious.write_bytes(b"precious")
    result = run_tool("--out", tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("make_demo_data: ") and "no demo.json" in result.stderr
    assert precious.read_bytes() == b"precious"


@pytest.mark.parametrize("arguments", [{"clips": 0}, {"held_out": 0}])
def test_numbers_of_clips_below_one(tmp_path, arguments):
    with pytest.raises(ValueError, match="at least 1"):
        demo.make_demo_data(tmp_path / "demo", **arguments)
    assert not (tmp_path / "demo").exists()
