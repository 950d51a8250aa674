"""From prompts to video files: what the command writes, and what conditions it."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mugv_ds.data.video import read_image, read_mp4
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.dit import init_weights
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.sampling.sampler import sample_videos
from tools.sample import main

ROOT = Path(__file__).parents[2]
CONFIG = DiTConfig(144, 2, 1, caption_channels=16)
SIZE = {"frames": 16, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def codec() -> LinearCodec:
    return LinearCodec.fit(2 * torch.rand(20, 3, 16, 16, 24, generator=torch.Generator().manual_seed(0)) - 1)


@pytest.fixture(scope="module")
def model() -> DiT:
    """Initial weights, but for the projections that start at zero: with those at zero no prompt would matter."""
    model = DiT(CONFIG)
    init_weights(model, "", seed=0)
    generator = torch.Generator().manual_seed(0)
    for projection in (model.final_layer.linear, model.blocks[0].cross_attn.proj):
        torch.nn.init.normal_(projection.weight, std=0.2, generator=generator)
    return model


def videos(model: DiT, codec: LinearCodec, prompts: list[str], **options) -> torch.Tensor:
    options = SIZE | {"fps": 8.0, "seed": 0, "steps": 3} | options
    return sample_videos(model, codec, HashTextEncoder(16, 60), prompts, **options)


def test_a_video_depends_on_its_prompt_and_seed_and_not_on_its_neighbours(model, codec):
    both = videos(model, codec, ["a red circle", "a green square"])
    assert both.shape == (2, 16, 16, 24, 3) and both.dtype == torch.uint8
    alone = videos(model, codec, ["a green square"])
    assert (both[1].int() - alone[0].int()).abs().max() <= 1  # another batch size may round otherwise
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(videos(model, codec, ["a green square"], seed=1), alone)


def test_draws_of_a_prompt_differ_and_do_not_depend_on_the_batch(model, codec):
    three = videos(model, codec, ["a red circle"] * 3, draws=[0, 1, 2])
    assert len({video.numpy().tobytes() for video in three}) == 3
    for draw, options in ((0, {}), (2, {"draws": [2]})):
        alone = videos(model, codec, ["a red circle"], **options)
        assert (three[draw].int() - alone[0].int()).abs().max() <= 1  # another batch size may round otherwise
    with pytest.raises(ValueError, match="zip"):
        videos(model, codec, ["a red circle"], draws=[0, 1])


def test_the_prompt_reaches_the_model(model, codec):
    """Same noise, other caption: guidance against the negative prompt changes the video."""
    noise_only = videos(model, codec, ["a red circle"], guidance=0.0)
    assert not torch.equal(videos(model, codec, ["a red circle"], guidance=4.0), noise_only)


def test_the_image_is_the_first_latent_frame(model, codec):
    image = 2 * torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1)) - 1
    out = videos(model, codec, ["a red circle"], image=image)
    still = codec.decode(codec.encode(image[None, :, None].expand(-1, -1, 8, -1, -1))).clamp(-1, 1)
    expected = ((still[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(out[0, :8], expected)
    assert not torch.equal(out[0, 8:], videos(model, codec, ["a red circle"])[0, 8:])


@pytest.mark.parametrize("option", [{"frames": 12}, {"height": 20}, {"width": 0}])
def test_sizes_must_be_multiples_of_eight(model, codec, option):
    with pytest.raises(ValueError, match="multiples of 8"):
        videos(model, codec, ["a red circle"], **option)


def test_an_image_of_another_size_is_refused(model, codec):
    with pytest.raises(ValueError, match=r"\[3, 16, 24\]"):
        videos(model, codec, ["a red circle"], image=torch.zeros(3, 8, 8))


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/sample.py", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, timeout=120)


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n\n", "no prompts"), (b"caf\xe9\n", "not UTF-8"), (None, "No such file")]
)
def test_a_file_of_prompts_that_cannot_be_used(tmp_path, content, message, capsys):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["--weights", "w", "--codec", "c", "--out", "o", "--prompts", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error


def test_the_command_writes_videos_and_a_contact_sheet(tmp_path, model, codec, capsys):
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    (tmp_path / "config.json").write_text(json.dumps(asdict(CONFIG)))
    codec.save(tmp_path / "codec.safetensors")
    Image.fromarray(np.full((40, 30, 3), 200, np.uint8)).save(tmp_path / "first.png")
    weights = [
        "--weights",
        str(tmp_path),
        "--codec",
        str(tmp_path / "codec.safetensors"),
        "--out",
        str(tmp_path / "out"),
    ]
    sizes = ["--frames", "16", "--height", "16", "--width", "24", "--fps", "12", "--steps", "2"]
    prompts = ["--prompt", "A red circle!", "--prompt", "../../escape", "--image", str(tmp_path / "first.png")]
    done = run_tool(*weights, *sizes, *prompts)
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["00-a-red-circle.mp4", "01-escape.mp4", "contact_sheet.png"]
    frames, fps = read_mp4(tmp_path / "out" / "00-a-red-circle.mp4")
    assert frames.shape == (16, 16, 24, 3) and fps == 12
    assert read_image(tmp_path / "out" / "contact_sheet.png", 16, 24).shape == (3, 16, 24)

    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square \n")
    repeated = ["--prompts", str(tmp_path / "prompts.txt"), "--repeat", "2", "--batch", "3"]  # batches of 3 and 1
    assert main([*weights[:-1], str(tmp_path / "repeated"), *sizes, *repeated]) == 0
    assert "4 videos" in capsys.readouterr().out
    written = sorted((tmp_path / "repeated").glob("*.mp4"))
    names = ["00-a-red-circle", "01-a-red-circle", "02-a-blue-square", "03-a-blue-square"]
    assert [path.stem for path in written] == names
    assert len({read_mp4(path)[0].tobytes() for path in written}) == 4

    done = run_tool(*weights, *sizes, "--prompt", "x", "--image", str(tmp_path / "nowhere.png"))
    assert done.returncode == 2 and "nowhere.png" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "config.json").unlink()
    done = run_tool(*weights, *sizes, "--prompt", "x")
    assert done.returncode == 2 and "config.json" in done.stderr and "Traceback" not in done.stderr
