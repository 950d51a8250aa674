"""Votes to a better model: the CSV trains DPO as it is."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mugv_ds.config import load_config
from tests.engine.test_preference import policy
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.distributed import run_ranks
from tests.helpers.evaluated import write_evaluation
from tests.helpers.trainer import TestTrainer
from tests.helpers.voting import ballot, build, cast, prefer

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools/compare.py"))


def voted(root: Path, name: str, prompts: int) -> Path:
    """Evaluates two weights whose latents differ in one direction, votes for one of them; returns pairs.csv."""
    generator = torch.Generator().manual_seed(len(name))
    direction = torch.sin(torch.arange(24.0)).view(24, 1, 1, 1)

    def latent(weights: str, number: int) -> torch.Tensor:
        return {"dpo": 1.0, "sft": -1.0}[weights] * direction + 0.5 * torch.randn(24, 2, 4, 4, generator=generator)

    results = write_evaluation(
        root / name, ["sft", "dpo"], [f"{name} {number}" for number in range(prompts)], frames=2, latent=latent
    )
    comparison = build(results, root / f"{name}-votes", "sft", "dpo")
    cast(root / f"{name}-votes", ballot(comparison, "Ana", prefer("dpo")))
    assert TOOL["main"](["report", str(root / f"{name}-votes")]) == 0
    return root / f"{name}-votes/preferences/pairs.csv"


def train(path: Path, out: Path, steps: int) -> None:
    """Trains as `make dpo` does; writes what held-out pairs give before and after."""
    trainer = TestTrainer(load_config(path))
    before = trainer.validation.run(lambda: None)
    trainer.train(steps)
    out.write_text(json.dumps([before, trainer.validation.run(lambda: None)]))


@pytest.mark.long
def test_dpo_on_the_votes_raises_the_implicit_reward_of_what_was_preferred_on_held_out_pairs(tmp_path):
    manifest = write_dataset(tmp_path / "sft", [(2, 4, 4)] * 8)
    save_file(policy().state_dict(), tmp_path / "policy.safetensors")
    source = {"name": "votes", "manifest": str(voted(tmp_path, "shown", 24))}
    path = write_config(
        tmp_path / "run",
        manifest,
        data={"global_batch_size": 8, "micro_batch_size": 4},
        flow={"caption_drop": 0.0, "first_frame_share": 0.0},  # as in ds_configs/dpo.json
        checkpoint={"init_from": str(tmp_path / "policy.safetensors")},
        schedule={"kind": "constant", "steps": 20, "warmup_steps": 0},
        preference={
            "objective": "dpo",
            "beta": 20.0,
            "sources": [source | {"val_manifest": str(voted(tmp_path, "held out", 12))}],
        },
    )
    run_ranks(1, train, path, tmp_path / "validation.json", 20)
    before, after = json.loads((tmp_path / "validation.json").read_text())
    of = "validation/preference/votes/"
    assert before[f"{of}margin"] == pytest.approx(0, abs=1e-4)
    assert after[f"{of}margin"] > 0.1 and after[f"{of}accuracy"] >= 0.9
    # Not because the other side was forgotten: the policy has learned what was preferred.
    assert after[f"{of}better_loss"] < before[f"{of}better_loss"]
