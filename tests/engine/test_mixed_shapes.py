"""Images and clips of six shapes mixed, under deep pipelines: no layout hangs, and none changes a loss."""

import pytest
import torch

from tests.helpers import trainer
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.distributed import run_ranks

SHAPES = [(1, 4, 4), (1, 6, 4), (1, 4, 7), (2, 4, 6), (3, 4, 4), (2, 6, 5)]
STEPS = 100
LAYOUTS = {"one": (1, 1, 1), "pp4": (1, 1, 4), "sp2-pp2": (1, 2, 2)}


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[list[float]]]:
    """By layout, each rank's losses of the same 100 steps."""
    root = tmp_path_factory.mktemp("mixed")
    rows = [SHAPES[int(i)] for i in torch.randint(len(SHAPES), (60,), generator=torch.Generator().manual_seed(0))]
    manifest = write_dataset(root, rows)
    found = {}
    for name, (data, sequence, pipeline) in LAYOUTS.items():
        config = write_config(
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
        run_ranks(data * sequence * pipeline, trainer.run, config, root / name / "out", STEPS)
        found[name] = [torch.load(file, weights_only=True)["losses"] for file in (root / name / "out").iterdir()]
    return found


@pytest.mark.parametrize("layout", ["pp4", "sp2-pp2"])
def test_mixed_shapes_train_alike_under_pipelines(losses, layout):
    (expected,) = losses["one"]
    assert len(expected) == STEPS and len(losses[layout]) == 4
    for rank in losses[layout]:
        assert rank == pytest.approx(expected, rel=1e-5)


def test_the_steps_were_of_every_shape(tmp_path):
    """What the test above rests on: all six shapes, micro-batches and accumulations of several sizes."""
    from mugv_ds.config import load_config
    from mugv_ds.data.run_data import RunData
    from mugv_ds.models.flops import SampleCost

    manifest = write_dataset(tmp_path, SHAPES * 5)
    budget = {"shape": [2, 6, 5], "multiple": 2, "device_tokens": 64}
    config = load_config(write_config(tmp_path, manifest, data={"micro_batch_size": 4, "budget": budget}))
    plan = RunData(config, SampleCost.of(config), 1).plan
    steps = [plan.step(i) for i in range(STEPS)]
    assert {step.shape for step in steps} == set(SHAPES)
    assert len({step.micro for step in steps}) > 1 and len({step.counts(1) for step in steps}) > 1
