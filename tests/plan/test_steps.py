"""The kinds of steps that are planned, against those that a run's plan has; and budgets by seconds."""

from collections import Counter

import numpy as np
import pytest

from mugv_ds.cli.balance import main as balance
from mugv_ds.config import ConfigError, load_config
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import SampleCost
from mugv_ds.plan.cost import SampleSeconds, sample_cost
from mugv_ds.plan.steps import PUBLISHED, expected_shapes, given_kinds, kinds_of, missing_manifests
from mugv_ds.plan.timing import Timing
from tests.helpers import machine
from tests.helpers.dataset import write_config
from tests.helpers.machine import ideal_machine
from tests.plan.test_balance import BUDGET, MIXTURE, ROWS, write_manifest

RANKS = 4
SMALL = {"preset": "mugdit_debug", "hidden_size": 288, "num_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    rows = np.random.default_rng(0).permutation([shape for shape, n in ROWS.items() for _ in range(n)])
    write_manifest(folder / "train.csv", rows.tolist())
    write_manifest(folder / "pairs.csv", [shape for shape in list(ROWS)[:3] for _ in range(40)], pairs=True)
    (folder / "machine.json").write_text(ideal_machine().to_json())
    return folder


def config_of(folder, **data):
    sections = {"data": {"budget": BUDGET, "mixture": MIXTURE, "global_batch_size": 32, "micro_batch_size": 16} | data}
    return load_config(write_config(folder / "run", folder / "train.csv", schedule={"steps": 500}, **sections))


def seconds(folder) -> dict:
    return BUDGET | {"by": "seconds", "machine": str(folder / "machine.json")}


def test_buckets_are_the_steps_of_the_plan_and_their_shares(folder):
    config = config_of(folder)
    cost = sample_cost(config)
    plan = RunData(config, cost, RANKS).plan
    steps = [plan.step(position) for position in range(500)]
    met = {(step.stream, step.shape): step for step in steps}
    times = Counter((step.stream, step.shape) for step in steps)
    buckets = [kind.bucket(config, config.data, cost, RANKS) for kind in kinds_of(plan, 500)]
    assert {(bucket.stream, bucket.shape) for bucket in buckets} == met.keys()
    assert sum(bucket.share for bucket in buckets) == pytest.approx(1)
    for bucket in buckets:
        step = met[bucket.stream, bucket.shape]
        assert (bucket.samples, bucket.micro) == (step.samples, step.micro)
        assert bucket.accumulation == sum(step.counts(RANKS))
        assert bucket.share == pytest.approx(times[bucket.stream, bucket.shape] / 500, abs=0.02)


def test_a_preference_run_has_pairs_and_companions(folder):
    source = {"name": "motion", "manifest": str(folder / "pairs.csv"), "reference": "none.parquet"}
    path = write_config(
        folder / "preference",
        folder / "train.csv",
        data={"global_batch_size": 16, "micro_batch_size": 4},
        flow={"caption_drop": 0.0},
        preference={"objective": "dpo", "sft_ratio": 0.5, "sources": [source]},
    )
    config = load_config(path)
    cost = sample_cost(config)
    plan = RunData(config, cost, 2).plan
    step = plan.step(0)
    found = [kind.bucket(config, config.data, cost, 2) for kind in kinds_of(plan, 10)]
    expected = [kind.bucket(config, config.data, cost, 2) for kind in given_kinds(config, [step.shape])]
    for (bucket,) in ([b for b in found if b.shape == step.shape], expected):
        assert (bucket.samples, bucket.companions, bucket.micro) == (16, len(step.companions), step.micro)
        assert (bucket.preferred, bucket.accumulation) == (step.counts(2)[0], sum(step.counts(2)))


def test_what_is_missing_and_what_is_planned_in_its_place(folder):
    assert missing_manifests(config_of(folder)) == []
    assert missing_manifests(config_of(folder, manifest="data/none.csv")) == ["data/none.csv"]
    assert expected_shapes(config_of(folder)) == [tuple(BUDGET["shape"])]
    assert expected_shapes(config_of(folder, budget=None)) == [PUBLISHED]


def test_a_budget_by_seconds_has_steps_of_equal_seconds(folder):
    """On a machine whose attention is as quick as its products the two budgets differ, as seconds count kernels too."""
    config, by_flops = config_of(folder, budget=seconds(folder)), config_of(folder)
    costs = sample_cost(config)
    assert isinstance(costs, SampleSeconds) and type(sample_cost(by_flops)) is SampleCost
    kinds = kinds_of(RunData(config, costs, RANKS).plan, 500)
    budget = 32 * costs.cost(tuple(BUDGET["shape"]))
    for kind in kinds:
        step = kind.bucket(config, config.data, costs, RANKS).samples
        cost = costs.cost(kind.shape)
        assert abs(step * cost - budget) <= max(BUDGET["multiple"] / 2 * cost, 0.03 * budget)
    steps = {kind.shape: kind.bucket(config, config.data, costs, RANKS).samples for kind in kinds}
    others = {kind.shape: kind.bucket(by_flops, by_flops.data, sample_cost(by_flops), RANKS).samples for kind in kinds}
    assert steps != others


def test_a_sample_costs_what_its_blocks_take_whatever_the_layout(folder):
    settings = ["model.hidden_size=288", "model.num_heads=4", f"data.budget.machine={folder / 'machine.json'}"]
    path = write_config(folder / "wide", folder / "train.csv", data={"budget": seconds(folder)}, model=SMALL)
    config, other = (load_config(path, [*settings, f"parallel.sequence={n}"]) for n in (1, 2))
    shape = (5, 100, 100)  # 12,502 tokens: one fills what samples are counted by
    tokens = 12_502
    forward, backward = machine.block(288, tokens)
    expected = 2 * (forward + backward + 3.5 * machine.attention(tokens, 4))
    assert sample_cost(config).cost(shape) == sample_cost(other).cost(shape) == pytest.approx(expected, rel=1e-5)
    assert sample_cost(config).tokens(shape) == 2 * sample_cost(other).tokens(shape)
    # Of short ones as many as make 16,384 tokens go together: 190 of 86.
    together = sum(machine.block(288, 16_340)) + Timing(ideal_machine()).attention(86, 4, 190).both
    assert sample_cost(config).cost((1, 13, 24)) == pytest.approx(2 * together / 190, rel=1e-5)


def test_the_order_of_a_run_knows_what_its_budget_counted(folder):
    """A run that would be balanced otherwise has other steps, and says so."""
    plans = [
        RunData(config, sample_cost(config), 1).plan.identity()
        for config in (config_of(folder), config_of(folder, budget=seconds(folder)))
    ]
    assert [key for key in plans[0] if plans[0][key] != plans[1][key]] == ["the batch sizes"]


def test_the_balance_counts_seconds_where_the_budget_does(folder, capsys):
    config_of(folder, budget=seconds(folder))
    assert balance(["--config", str(folder / "run/config.json"), "--data-ranks", str(RANKS)]) == 0
    text = capsys.readouterr().out
    assert "device seconds a step" in text and "TFLOP" not in text


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"by": "seconds"}, 'data.budget.machine: required when data.budget.by = "seconds"'),
        ({"machine": "nvidia-h200-torch2.11"}, "has no effect otherwise"),
    ],
)
def test_a_machine_goes_with_seconds(folder, budget, said):
    with pytest.raises(ConfigError, match=said):
        config_of(folder, budget=BUDGET | budget)
