"""A tiny policy, prompts and real data to learn from a reward with."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.dit import init_weights
from mugv_ds.prepare.demo.weights import write_codec
from tests.helpers.dataset import CHANNELS, write_config, write_dataset
from tests.parallel.test_layouts import perturb

SHAPES = [(2, 4, 6), (1, 4, 4)]
BETA, DATA_WEIGHT, BETA1 = 0.7, 0.3, 0.9
# Rewards that follow from a rollout's number alone: what is asked of them here is to be the same in every run.
JUDGE = (
    "import json, sys; ids = [video['id'] for video in json.load(sys.stdin)['videos']]; "
    "print(json.dumps({'rewards': {i: {'a': int(i[-2:]) ** 2 % 7, 'b': int(i[-1]) % 3} for i in ids}}))"
)


def policy() -> DiT:
    """What every run starts from; its weights are off their initial zeros."""
    model = DiT(DiTConfig(144, 2, 2, caption_channels=CHANNELS))
    init_weights(model, "", seed=0)
    perturb([("", model)])
    return model


@pytest.fixture(scope="package")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reward")
    write_dataset(root, SHAPES * 6)
    write_dataset(root, SHAPES * 3, "prompts")
    save_file(policy().state_dict(), root / "policy.safetensors")
    write_codec(root / "codec.safetensors")
    return root


def configure(folder: Path, root: Path, layout: tuple[int, int, int] = (1, 1, 1), **sections: dict) -> Path:
    """A run of rounds of 2 prompts × 4 rollouts, each trained on twice, in 4 steps of 4."""
    function = {"name": "judge", "weights": {"a": 1.0, "b": -0.5}, "command": [sys.executable, "-c", JUDGE], "batch": 3}
    path = write_config(
        folder,
        root / "train.csv",
        data={"global_batch_size": 4, "micro_batch_size": 2},
        parallel=dict(zip(("data", "sequence", "pipeline"), layout, strict=True)),
        optimizer={"betas": [BETA1, 0.999], "gradient_clipping": 0.0, "eps": 1e-6},
        reward={
            "manifest": str(root / "prompts.csv"),
            "dir": str(folder / "rounds"),
            "codec": str(root / "codec.safetensors"),
            "functions": [function],
            "prompts": 2,
            "rollouts": 4,
            "passes": 2,
            "steps": 2,
            "sample_batch": 3,
            "beta": BETA,
            "advantage_clip": 2.0,
            "old_decay": 0.5,
            "data_weight": DATA_WEIGHT,
            "data_ratio": 1.0,
        },
    )
    config = json.loads(path.read_text())
    config["checkpoint"] |= {"init_from": str(root / "policy.safetensors"), "save_every": 3}
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    path.write_text(json.dumps(config))
    return path
