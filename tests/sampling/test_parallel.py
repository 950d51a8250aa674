"""Several processes sample together what one samples alone."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mugv_ds.cli.sample import main
from mugv_ds.data.video import read_mp4
from mugv_ds.models import DiTConfig
from tests.helpers.distributed import run_ranks
from tests.helpers.published import read_i2v, toy_dit, write_dit, write_vae

CONFIG = DiTConfig(144, 2, 2, caption_channels=16)
LAYOUTS = {
    "replicas": (2, []),  # three videos on two replicas, of which one has two
    "sequence": (2, ["--sequence", "2"]),
    "guidance": (2, ["--guidance-parallel"]),
    "pipeline": (2, ["--pipeline", "2"]),
    "guidance-sequence": (4, ["--guidance-parallel", "--sequence", "2"]),
}
NAMES = ["00-red", "01-green", "02-blue"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_dit(folder, toy_dit(CONFIG).state_dict(), CONFIG)
    write_vae(folder, *read_i2v("i2v"))
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "first.png")
    (folder / "list.csv").write_text("prompt,image,seed\nred,first.png,1\ngreen,,2\nblue,,\n")
    return folder


def arguments(weights: Path, out: Path, *more: str) -> list[str]:
    models = ["--weights", weights, "--codec", weights / "vae.pt", "--text-encoder", "hash", "--max-text-tokens", 40]
    video = ["--frames", 57, "--height", 16, "--width", 24, "--steps", 2, "--prompts", weights / "list.csv"]
    return [*map(str, [*models, *video, "--out", out]), *more]


def sample(argv: list[str]) -> None:
    assert main(argv) == 0


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory) -> dict[str, tuple[torch.Tensor, np.ndarray]]:
    out = tmp_path_factory.mktemp("alone")
    sample(arguments(weights, out))
    return read(out)


def test_a_list_goes_on_though_a_replica_has_no_video(weights, alone, tmp_path):
    """It has a share in what all processes do at the start of a stage; without it the others would wait for ever."""
    sample(arguments(weights, tmp_path))
    for path in tmp_path.glob("01-green.*"):
        path.unlink()
    shutil.rmtree(tmp_path / "conditions")
    run_ranks(2, sample, arguments(weights, tmp_path))
    latent, frames = read(tmp_path)["01-green"]
    assert float((latent - alone["01-green"][0]).norm() / alone["01-green"][0].norm()) <= 1e-5
    assert frames.shape == (57, 16, 24, 3)


def read(out: Path) -> dict[str, tuple[torch.Tensor, np.ndarray]]:
    return {
        name: (load_file(out / f"{name}.latent.safetensors")["latent"], read_mp4(out / f"{name}.mp4")[0])
        for name in NAMES
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_videos_are_those_of_one_process(layout, weights, alone, tmp_path):
    ranks, options = LAYOUTS[layout]
    run_ranks(ranks, sample, arguments(weights, tmp_path, *options))
    for name, (latent, frames) in read(tmp_path).items():
        expected_latent, expected_frames = alone[name]
        assert float((latent - expected_latent).norm() / expected_latent.norm()) <= 1e-5, name
        # The encoder makes more of the few pixels that round to the next level; a frame out of place is off by tens.
        assert frames.shape == (57, 16, 24, 3) and np.abs(frames.astype(int) - expected_frames).mean() < 0.1, name
