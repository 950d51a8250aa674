"""Images and clips of six shapes mixed, under deep pipelines: no layout hangs, and none changes a loss."""

import math
from pathlib import Path

import pytest
import torch

from mugv_ds.config import load_config
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import SampleCost
from tests.helpers import trainer
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.distributed import run_ranks

SHAPES = [(1, 4, 4), (1, 6, 4), (1, 4, 7), (2, 4, 6), (3, 4, 4), (2, 6, 5)]
STEPS = 40
LAYOUTS = {"one": (1, 1, 1), "pp4": (1, 1, 4), "sp2-pp2": (1, 2, 2)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Holds the data set, and a config for each layout."""
    root = tmp_path_factory.mktemp("mixed")
    rows = [SHAPES[int(i)] for i in torch.randint(len(SHAPES), (60,), generator=torch.Generator().manual_seed(0))]
    manifest = write_dataset(root, rows)
    for name, (data, sequence, pipeline) in LAYOUTS.items():
        write_config(
            root / name,
            manifest,
            model={"depth": 4},
            data={
                "global_batch_size": 4,
                "micro_batch_size": 4,
                "budget": {"shape": [2, 6, 5], "multiple": 2, "device_tokens": 64},
                "mixture": [
                    {"name": "image", "kind": "image", "share": [[0, 0.7], [STEPS, 0.2]]},
                    {"name": "video", "kind": "video", "share": [[0, 0.3], [STEPS, 0.8]]},
                ],
            },
            parallel={"data": data, "sequence": sequence, "pipeline": pipeline},
            optimizer={"lr": 1e-4, "eps": 1e-6},
            schedule={"kind": "constant", "steps": STEPS, "warmup_steps": 10},
            logging={"every": 50},
        )
    return root


@pytest.fixture(scope="module")
def losses(root) -> dict[str, list[list[float]]]:
    """By layout, each rank's losses of the same 40 steps."""
    found = {}
    for name, layout in LAYOUTS.items():
        run_ranks(math.prod(layout), trainer.run, root / name / "config.json", root / name / "out", STEPS)
        found[name] = [torch.load(file, weights_only=True)["losses"] for file in (root / name / "out").iterdir()]
    return found


@pytest.mark.long
@pytest.mark.parametrize("layout", ["pp4", "sp2-pp2"])
def test_mixed_shapes_train_alike_under_pipelines(losses, layout):
    (expected,) = losses["one"]
    assert len(expected) == STEPS and len(losses[layout]) == 4
    for rank in losses[layout]:
        assert rank == pytest.approx(expected, rel=1e-5)


def test_the_steps_were_of_every_shape(root):
    """What the test above rests on: its runs met all six shapes, micro-batches and accumulations of several sizes."""
    config = load_config(root / "one" / "config.json")
    plan = RunData(config, SampleCost.of(config), 1).plan
    steps = [plan.step(i) for i in range(STEPS)]
    assert {step.shape for step in steps} == set(SHAPES)
    assert {step.stream for step in steps} == {"image", "video"}
    assert len({step.micro for step in steps}) > 1 and len({step.counts(1) for step in steps}) > 1
