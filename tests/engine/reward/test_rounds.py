"""Rounds in the engine: the loss's own gradient under every layout, and rounds that are killed at every phase."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.checkpoint.fragments import fragments, refresh_weights
from mugv_ds.config import ConfigError, load_config
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.reward.old_policy import OldPolicy
from mugv_ds.engine.reward.rounds import Rounds, claim_folder
from mugv_ds.models.flops import SampleCost
from mugv_ds.objectives.flow import flow_loss, loss_weight
from mugv_ds.objectives.reward import nft_errors, nft_loss
from mugv_ds.sampling.sampler import sample_latents
from mugv_ds.weights.codec import load_codec
from tests.engine.reward.conftest import BETA, BETA1, DATA_WEIGHT, configure, policy
from tests.helpers.distributed import run_ranks
from tests.helpers.launcher import finish, launch
from tests.helpers.trainer import TestTrainer

LAYOUTS = {"one": (1, 1, 1), "dp2": (2, 1, 1), "sp2-pp2": (1, 2, 2)}
OLD = 1.01  # times the trained weights: an old policy that differs is what the loss is for


def make_trainer(path: Path) -> TestTrainer:
    """A trainer whose old policy is not the trained one."""
    config = load_config(path)
    trainer = TestTrainer(config)
    old = OldPolicy([piece.tensors["weight"] for piece in fragments(trainer.engine)], 0.0, 0.0)
    torch._foreach_mul_(old.kinds["old_policy"], OLD)
    trainer.rounds = Rounds(
        config,
        trainer.process,
        trainer.engine.module,
        trainer.evaluator,
        trainer.data,
        old=old,
        refresh=partial(refresh_weights, trainer.engine),
        sample=sample_latents,
        load_codec=load_codec,
        distance=lambda: 0.0,
    )
    return trainer


def train_one_step(path: Path, again: bool = False) -> None:
    """A round and one step; every rank writes loss and gradients. again: loses part of the round and makes it again."""
    trainer = make_trainer(path)
    ready = partial(trainer._complete, 0, 0, trainer.rounds.end_of(0), trainer.recorder)
    ready()
    if again:
        lose_a_part(path.parent / "rounds/round-000000", ready)
    results = {"losses": trainer.train(1), "gradients": trainer.first_gradients(BETA1)}
    torch.save(results, path.parent / f"rank{trainer.process.rank}.pt")


def lose_a_part(folder: Path, ready: Callable[[], None]) -> None:
    """A round of which a part is lost has the same bytes when it is ready again, and what was kept is not made anew."""
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    rewards = json.loads(whole["rewards-judge.json"])
    kept_rewards = {name: rewards[name] | {"a": 100.0} for name in list(rewards)[:3]}  # as nobody would answer now
    (folder / "rewards-judge.json").write_text(json.dumps(kept_rewards))
    for name in ("rollout-00001.safetensors", "rollout-00006.safetensors", "rollout-00002.mp4", "round.json"):
        (folder / name).unlink()
    kept = {file.name: file.stat().st_mtime_ns for file in folder.glob("rollout-*")}
    ready()
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    same = {name for name, content in whole.items() if (folder / name).read_bytes() == content}
    assert whole.keys() - same <= {"rewards-judge.json", "round.json"}, whole.keys() - same
    assert json.loads((folder / "rewards-judge.json").read_text()) == rewards | kept_rewards
    (folder / "rewards-judge.json").write_bytes(whole["rewards-judge.json"])
    ready()
    assert all((folder / name).read_bytes() == content for name, content in whole.items())


def expected(path: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step by the formulas: plain model, whole batch at once."""
    config = load_config(path)
    data = RunData(config, SampleCost.of(config), 1)
    found = json.loads((path.parent / "rounds/round-000000/round.json").read_text())
    sources, step = data.readers_of(data.plan.round(0), found["optimality"]), data.plan.step(0)

    def predicted(model, batch):
        return model(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)[:, :24]

    model, old, batch = policy(), policy(), sources(step.refs)
    torch._foreach_mul_([p.data for p in old.parameters()], OLD)
    with torch.no_grad():
        old_velocity = predicted(old, batch)
    weight = loss_weight(batch.x_mask, *batch.target.shape[1:2], *batch.target.shape[3:])
    errors = nft_errors(predicted(model, batch), old_velocity, batch.target, weight, BETA)
    real = sources(step.companions)
    flow = flow_loss(predicted(model, real), real.target, real.x_mask).mean()
    loss = nft_loss(*errors, batch.optimality).mean() + DATA_WEIGHT * flow
    loss.backward()
    assert batch.optimality.unique().numel() > 1
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def results(root) -> dict[str, list[dict]]:
    paths = {name: configure(root / name, root, layout) for name, layout in LAYOUTS.items()}
    run_ranks(1, train_one_step, paths["one"], True)
    for name, (data, sequence, pipeline) in list(LAYOUTS.items())[1:]:
        # What was rolled out and judged under one layout serves the others, which make what is lost.
        shutil.copytree(root / "one/rounds", root / name / "rounds")
        for suffix in (".safetensors", ".mp4"):
            (root / name / f"rounds/round-000000/rollout-00003{suffix}").unlink()
        (root / name / "checkpoints").mkdir(exist_ok=True)
        shutil.copy(root / "one/checkpoints/reward.run", root / name / "checkpoints")
        run_ranks(data * sequence * pipeline, train_one_step, paths[name])
    return {
        name: [torch.load(file, weights_only=True) for file in sorted((root / name).glob("rank*.pt"))] for name in paths
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_the_formula(root, results, layout):
    loss, gradients = expected(root / layout / "config.json")
    for rank in results[layout]:
        assert rank["losses"] == pytest.approx([loss], rel=1e-5)
    found = {name: gradient for rank in results[layout] for name, gradient in rank["gradients"].items()}
    assert found.keys() == gradients.keys()
    errors = {name: float((found[name] - g).norm() / g.norm()) for name, g in gradients.items()}
    assert max(errors.values()) <= 1e-5, max(errors.items(), key=lambda item: item[1])


def test_a_round_has_prompts_of_one_shape_and_steps_that_take_each_rollout_as_often_as_asked(root):
    config = load_config(configure(root / "plan", root))
    plan = RunData(config, SampleCost.of(config), 1).plan
    assert plan.steps_per_round == config.steps_per_round == 4
    seen = set()
    for number in range(6):
        played = plan.round(number)
        items = [rollout.item for rollout in played.rollouts]
        assert items == list(range(8 * number, 8 * number + 8))
        assert [rollout.draw for rollout in played.rollouts] == [0, 1, 2, 3] * 2
        steps = [plan.step(position) for position in range(4 * number, 4 * number + 4)]
        assert all(step.shape == played.shape and len(step.companions) == 4 for step in steps)
        taken = [ref.item for step in steps for ref in step.refs]
        assert sorted(taken[:8]) == sorted(taken[8:]) == items and taken[:8] != taken[8:]
        starts = {(rollout.row, rollout.visit, rollout.draw) for rollout in played.rollouts}
        assert not starts & seen  # none starts from the noise of another
        seen |= starts


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def rounds(folder: Path) -> list[dict]:
    """What was found in each round, without the paths."""
    found = [json.loads(path.read_text()) for path in sorted((folder / "rounds").glob("round-*/round.json"))]
    for one in found:
        for rollout in one["rollouts"]:
            del rollout["video"]
    return found


RUN = {"schedule": {"kind": "constant", "steps": 10, "warmup_steps": 0}, "logging": {"every": 1}}


@pytest.fixture(scope="module")
def straight(root) -> Path:
    """A run of two and a half rounds that nobody disturbs."""
    path = configure(root / "straight", root, **RUN)
    status, output = finish(launch(path, 1))
    assert status == 0, output
    return path.parent


def killed(path: Path, at: str, monkeypatch) -> Path:
    """Has a run die where it is told to, and then go on."""
    mark = path.parent / "died"
    monkeypatch.setenv("MUGV_TEST_DIE_AT", at)
    monkeypatch.setenv("MUGV_TEST_DIED", str(mark))
    status, output = finish(launch(path, 1, script="tests/engine/reward/dying.py"))
    assert mark.exists() and status != 0, output
    before = {file: file.stat().st_mtime_ns for file in path.parent.glob("rounds/round-*/rollout-*")}
    status, output = finish(launch(path, 1))
    assert status == 0, output
    assert all(file.stat().st_mtime_ns == made for file, made in before.items()), "a rollout was paid twice"
    return path.parent


PHASES = ["rollout 5", "video 3", "reward 2", "old_policy 3", "step 6"]


@pytest.mark.long
@pytest.mark.parametrize("at", PHASES)
def test_killed_in_any_phase_a_run_ends_with_the_same_rewards_and_losses(root, straight, at, monkeypatch):
    folder = killed(configure(root / at.replace(" ", "-"), root, **RUN), at, monkeypatch)
    assert len(rounds(straight)) == 3 and rounds(folder) == rounds(straight)
    for tag in ("train/loss", "train/moved", "reward/a", "reward/diversity", "reward/distance"):
        assert scalars(folder, tag) == scalars(straight, tag), tag
    assert scalars(straight, "train/moved")[10] > 0 and scalars(straight, "reward/distance")[8] > 0


def test_rounds_of_another_run_are_refused(tmp_path):
    mark, folder = tmp_path / "run/checkpoints/reward.run", tmp_path / "rounds"
    claim_folder(folder, mark)
    claim_folder(folder, mark)
    (folder / "round-000000").mkdir()
    claim_folder(folder, mark)
    for other in (tmp_path / "other/checkpoints/reward.run", mark):
        if other == mark:  # the checkpoints were removed, to start afresh
            mark.unlink()
        with pytest.raises(ConfigError, match=r"reward\.dir = .*rounds: holds the rounds of another run"):
            claim_folder(folder, other)


@pytest.mark.long
def test_a_judge_that_gives_up_ends_the_run_with_one_line_and_loses_nothing(root, straight, tmp_path):
    """It answers once and then lies; repaired, the run asks only for what is missing."""
    path = configure(tmp_path, root, **RUN)
    config = json.loads(path.read_text())
    command = config["reward"]["functions"][0]["command"]
    calls = tmp_path / "calls"
    lying = f"import pathlib; c = pathlib.Path({str(calls)!r}); n = len(c.read_text()) if c.exists() else 0; "
    lying += f"c.write_text('x' * (n + 1)); n and exit(print('nonsense')); {command[2]}"
    config["reward"]["functions"][0] |= {"command": [*command[:2], lying], "retries": 1}
    path.write_text(json.dumps(config))
    status, output = finish(launch(path, 1))
    assert status == 2, output
    assert "reward.functions.judge: answered no JSON: b'nonsense" in output and "asked 2 times" in output
    assert calls.read_text() == "xxx"
    kept = json.loads((tmp_path / "rounds/round-000000/rewards-judge.json").read_text())
    assert len(kept) == 3
    config["reward"]["functions"][0]["command"] = [*command[:2], f"open({str(calls)!r}, 'a').write('y'); {command[2]}"]
    path.write_text(json.dumps(config))
    status, output = finish(launch(path, 1, "--set", "schedule.steps=1"))
    assert status == 0, output
    assert calls.read_text() == "xxxyy"  # five videos were left, three to a request
    assert rounds(tmp_path)[0] == rounds(straight)[0]
