"""A run's evaluations are measures of what the sampler makes, on all ranks together, and leave training as it is."""

import csv
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.config import load_config
from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import open_index
from mugv_ds.data.video import to_frames
from mugv_ds.evaluation.measures import measure
from mugv_ds.models.codec import LinearCodec
from mugv_ds.prepare.demo.judge import demo_measures
from mugv_ds.train import train
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.distributed import run_ranks

SHAPES = [(2, 4, 4), (3, 4, 6), (2, 4, 4)]
CAPTIONS = ["a red circle moving left", "a penguin", "a red circle moving right"]
STEPS = [2, 3]  # every second, and the last


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root, [(2, 4, 4)] * 8)
    write_dataset(root, SHAPES, "held_out")
    LinearCodec().save(root / "codec.safetensors")
    header, *rows = csv.reader((root / "held_out.csv").open())
    with (root / "held_out.csv").open("w", newline="") as file:
        captioned = [[*row, caption] for row, caption in zip(rows, CAPTIONS, strict=True)]
        csv.writer(file).writerows([[*header, "caption"], *captioned])
    for name in ("train.csv", "held_out.csv"):
        open_index(root / name)
    return root


def configure(folder: Path, data: Path, layout: tuple[int, int, int] = (1, 1, 1), *, evaluated: bool = True):
    """Previews of the same rows and settings write their latents."""
    sampled = {
        "every": 2,
        "manifest": str(data / "held_out.csv"),
        "count": 3,
        "steps": 2,
        "guidance": 3.0,
        "first_frame": True,
    }
    path = write_config(
        folder,
        data / "train.csv",
        model={"precision": "fp32", "attention": "sdpa"},
        parallel=dict(zip(("data", "sequence", "pipeline"), layout, strict=True)),
        schedule={"steps": 3},
        checkpoint={"save_every": 0},
        logging={"every": 1},
        preview=sampled | {"dir": str(folder / "previews")},
        **({"evaluation": sampled | {"codec": str(data / "codec.safetensors")}} if evaluated else {}),
    )
    return load_config(path)


def run(config: TrainConfig) -> None:
    assert train(config) == 0


def scalars(folder: Path, prefix: str) -> dict[str, dict[int, float]]:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    names = [name for name in found.Tags()["scalars"] if name.startswith(prefix)]
    return {name: {event.step: event.value for event in found.Scalars(name)} for name in names}


def expected(folder: Path, data: Path, step: int) -> dict[str, float]:
    """The means of the measures of the previews' latents, decoded."""
    codec, found = LinearCodec.load(data / "codec.safetensors"), {}
    for path, caption in zip(sorted((folder / f"previews/step-{step:06d}").iterdir()), CAPTIONS, strict=True):
        frames = to_frames(codec.decode(load_file(path)["latent"][None]))[0].numpy()
        for name, value in (measure(frames, frames[0]) | demo_measures(frames, caption)).items():
            found.setdefault(f"evaluation/{name}", []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


LAYOUTS = [
    pytest.param((2, 1, 1), id="dp2"),  # three rows on two replicas
    pytest.param((1, 2, 2), id="sp2-pp2", marks=pytest.mark.long),
    pytest.param((4, 1, 1), id="dp4", marks=pytest.mark.long),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_curves_are_the_measures_of_what_is_sampled(layout, data, tmp_path):
    ranks = int(np.prod(layout))
    run_ranks(ranks, run, configure(tmp_path / "with", data, layout))
    curves = scalars(tmp_path / "with", "evaluation/")
    for step in STEPS:
        means = expected(tmp_path / "with", data, step)
        assert {name: curve[step] for name, curve in curves.items()} == pytest.approx(means, rel=1e-5, abs=1e-6)
    assert {"evaluation/motion", "evaluation/first_frame_psnr", "evaluation/right"} <= curves.keys()
    assert all(sorted(curve) == STEPS for curve in curves.values())
    run_ranks(ranks, run, configure(tmp_path / "without", data, layout, evaluated=False))
    assert scalars(tmp_path / "with", "train/loss") == scalars(tmp_path / "without", "train/loss") != {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifest": None}, "evaluation.manifest: required when evaluation.every > 0"),
        ({"codec": None}, "evaluation.codec: required when evaluation.every > 0"),
        ({"ema": 0.2}, "evaluation.ema = 0.2: must be one of"),
        ({"dir": "x"}, "evaluation.dir"),
    ],
)
def test_configs_that_cannot_be_evaluated(change, message, data, tmp_path):
    given = {"every": 1, "manifest": str(data / "held_out.csv"), "codec": str(data / "codec.safetensors")} | change
    path = write_config(tmp_path, data / "train.csv", evaluation=given)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
