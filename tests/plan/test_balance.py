"""tools/balance.py against what the manifest and the plan say."""

import csv
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from mugv_ds.cli.balance import main
from mugv_ds.config import load_config
from mugv_ds.data.manifest import REQUIRED_COLUMNS
from mugv_ds.data.plan import PlannedStep
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import SampleCost
from mugv_ds.plan import balance
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, write_config

COLUMNS = [*REQUIRED_COLUMNS, "num_frames", "height", "width", "pair_id", "rank"]
RANKS = 4
# Latent shapes and how many rows have them; the last is more than a device may hold, and of no group.
ROWS = {(1, 6, 10): 300, (1, 8, 8): 100, (2, 6, 10): 150, (5, 6, 10): 90, (5, 12, 20): 40, (9, 12, 20): 3}
BUDGET = {"shape": [5, 12, 20], "multiple": 4, "device_tokens": 400}
MIXTURE = [
    {"name": "images", "kind": "image", "share": [[0, 0.6], [400, 0.1]]},
    {"name": "clips", "frames": [2, 6], "share": [[0, 0.4], [400, 0.9]]},
]


def write_manifest(path, rows, pairs=False):
    """rows: latent shapes; without files, but for one more row whose size is not given and cannot be read."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i, (t, h, w) in enumerate(rows):
            preference = (f"p{i // 2}", i % 2) if pairs else ("", "")
            writer.writerow([f"s{i}", "generated", f"{i}.pt", f"{i}_text.pt", 8 * t, 8 * h, 8 * w, *preference])
        if not pairs:
            writer.writerow(["missing", "generated", "missing.pt", "missing_text.pt", *[""] * 5])
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("balance")
    rows = np.random.default_rng(0).permutation([shape for shape, n in ROWS.items() for _ in range(n)])
    return write_config(
        root,
        write_manifest(root / "train.csv", rows.tolist()),
        data={"budget": BUDGET, "mixture": MIXTURE, "global_batch_size": 32, "micro_batch_size": 16},
        schedule={"steps": 500},
    )


def printed(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def percent(text, name):
    return float(re.search(rf"^{re.escape(name)}.*?([0-9.]+)%$", text, re.MULTILINE)[1]) / 100


def table(text):
    """The other columns by (stream, latent), as numbers."""
    cells = [line.split() for line in text.splitlines() if "×" in line]
    return {(name, latent): [float(cell.replace(",", "")) for cell in rest] for name, latent, *rest in cells}


def flops(shape):
    """Model FLOPs of a sample: three times the forward pass of the tests' model, as `models.flops` documents it."""
    t, h, w = shape
    n, d, text = t * -(-h // 2) * -(-w // 2) + 2, 144, TEXT_TOKENS
    blocks = 2 * n * (28 * d**2 + 4 * n * d + 4 * text * d)
    return 3 * (blocks + 2 * n * 96 * d + 2 * text * d * (CHANNELS + d) + 2 * n * d * 2 * 96)


def plan_of(path, overrides=(), ranks=1):
    config = load_config(path, overrides)
    return RunData(config, SampleCost.of(config), ranks).plan


def test_what_is_printed_is_what_the_plan_does(config, capsys):
    text, plan = printed(capsys, "--config", config, "--data-ranks", RANKS), plan_of(config, ranks=RANKS)
    steps = [plan.step(position) for position in range(500)]
    samples = {(step.stream, "×".join(map(str, step.shape))): step for step in steps}
    lines = table(text)
    assert lines.keys() == samples.keys() and len(lines) == 5
    costs = {key: step.samples * flops(step.shape) for key, step in samples.items()}
    for key, (rows, tokens, a_step, micro, accumulation, tflop, relative) in lines.items():
        step, (t, h, w) = samples[key], samples[key].shape
        assert (rows, tokens) == (ROWS[step.shape], t * -(-h // 2) * -(-w // 2) + 2)
        assert (a_step, micro) == (step.samples, step.micro) and a_step == RANKS * micro * accumulation
        assert tflop == pytest.approx(costs[key] / 1e12, abs=6e-4)
        assert relative / lines["clips", "5×12×20"][-1] == pytest.approx(
            costs[key] / costs["clips", "5×12×20"], abs=2e-3
        )

    assert percent(text, "imbalance between 4 data ranks") == 0
    looked = int(re.search(r"steps looked at: ([0-9]+) of 500", text)[1])
    assert looked == np.ceil(sum(ROWS[step.shape] / step.samples for step in samples.values()))
    total = sum(ROWS.values()) + 1
    assert "rows that are never played: 3 of 684, 0.44%" in text and total == 684
    assert "rows whose latent could not be read: 1, 0.15%" in text
    assert 0 < percent(text, "imbalance between steps") < 0.2


def test_shares_are_shown_over_the_run(config, capsys):
    text, plan = printed(capsys, "--config", config, "--steps", 10), plan_of(config)
    (line,) = (line for line in text.splitlines() if line.startswith("clips") and "(" in line)
    given, asked = np.array(re.findall(r"([0-9.]+)% \(([0-9.]+)%\)", line), float).T / 100
    for part in range(5):
        positions = range(100 * part, 100 * part + 100)
        wanted = np.mean([np.interp(position, [0, 400], [0.4, 0.9]) for position in positions])
        steps = [plan.step(position) for position in positions]
        clips = sum(step.samples for step in steps if step.stream == "clips")
        assert asked[part] == pytest.approx(wanted, abs=1e-3)
        # Printed by the mean step of each stream; the steps of a hundred positions are not quite that.
        assert given[part] == pytest.approx(clips / sum(step.samples for step in steps), abs=0.03)
    assert "0–99" in text and "400–499" in text


def test_the_figures_are_those_of_the_steps_looked_at(config, capsys):
    overrides = ["data.mixture=[]", "data.budget.device_tokens=10000"]
    options = [word for override in overrides for word in ("--set", override)]
    text, plan = printed(capsys, "--config", config, "--steps", 60, *options), plan_of(config, overrides)
    steps = [plan.step(position) for position in range(60)]
    cost = np.array([len(step.refs) * flops(step.shape) for step in steps])
    assert percent(text, "imbalance between steps") == pytest.approx(np.abs(cost / cost.mean() - 1).max(), abs=1e-4)
    for (_, latent), values in table(text).items():
        shape = tuple(map(int, latent.split("×")))
        assert values[-1] == pytest.approx(values[2] * flops(shape) / cost.mean(), abs=1e-3)
    assert "steps looked at: 60 of 500, from 0 to 59" in text and "share of samples" not in text


def test_ranks_that_are_loaded_unevenly_show(config, capsys, monkeypatch):
    """It is counted from what each rank takes: here one takes half of another's."""
    whole = PlannedStep.micro_batches

    def uneven(step, rank, ranks):
        own = [ref for batch in whole(step, rank, ranks) for ref in batch]
        return [own[: len(own) // 2]] if rank == 1 else [own]

    monkeypatch.setattr(PlannedStep, "micro_batches", uneven)
    text = printed(capsys, "--config", config, "--data-ranks", 2, "--steps", 20)
    assert percent(text, "imbalance between 2 data ranks") == pytest.approx(1 / 0.75 - 1, abs=1e-4)


def test_steps_are_spread_over_a_run_whose_shares_change(config):
    plan = plan_of(config)
    positions = balance.choose_positions(plan, 500, 50)
    assert (positions // 10 == np.arange(50)).all()
    assert len(set((positions % 10).tolist())) > 5
    assert (balance.choose_positions(plan, 30, 50) == np.arange(30)).all()


def test_preference_runs_count_what_comes_along_and_what_never_does(tmp_path, capsys):
    """Two sources of pairs, and an SFT set with a shape that no pair has."""
    sources = []
    for name, shape in (("a", (2, 6, 10)), ("b", (5, 6, 10))):
        write_manifest(tmp_path / f"{name}.csv", [shape] * 20, pairs=True)
        sources.append({"name": name, "manifest": str(tmp_path / f"{name}.csv")})
    sft = write_manifest(tmp_path / "sft.csv", [(2, 6, 10)] * 10 + [(5, 6, 10)] * 10 + [(7, 6, 10)] * 5)
    path = write_config(
        tmp_path,
        sft,
        data={"global_batch_size": 8, "micro_batch_size": 2},
        preference={"objective": "dpo", "sources": sources},
    )
    text = printed(capsys, "--config", path, "--data-ranks", 2)
    assert "steps looked at: 5 of 10" in text and "rows that are never played: 5 of 66, 7.58%" in text
    assert percent(text, "imbalance between 2 data ranks") == 0
    rows = [line.split() for line in text.splitlines() if line[:1] in "ab" and "×" in line]
    assert [row[4:7] for row in rows] == [["8", "+", "4"]] * 2
    for row, shape in zip(rows, ((2, 6, 10), (5, 6, 10)), strict=True):
        assert row[7:9] == ["2", "3"] and float(row[9]) == pytest.approx(12 * flops(shape) / 1e12, abs=6e-4)


def test_a_stream_that_has_no_share_is_never_played(config, capsys):
    groups = json.loads(json.dumps(MIXTURE))
    groups[0]["share"] = [[0, 0.0], [500, 0.0], [600, 1.0]]  # only after the run
    text = printed(capsys, "--config", config, "--set", f"data.mixture={json.dumps(groups)}")
    assert "rows that are never played: 403 of 684" in text


def test_errors_are_one_line(config, capsys, caplog):
    with caplog.at_level(logging.ERROR):
        assert main(["--config", str(config), "--data-ranks", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: data.budget.multiple = 4: must be a multiple of the 3 data ranks")


@pytest.mark.parametrize("mixture", [(), [{"name": "images", "kind": "image", "share": [[0, 0.9], [50_000, 0.5]]}]])
def test_the_10b_is_balanced_on_64_data_ranks(tmp_path, capsys, mixture):
    """Images, and clips of 2 to 5 s, at 360p and 720p in three aspect ratios; the bars are those of the README."""
    random = np.random.default_rng(0)
    frames = random.choice([1, 6, 9, 12, 15], 4000, p=[0.3, 0.175, 0.175, 0.175, 0.175])
    sizes = random.choice([(45, 80), (80, 45), (60, 60), (90, 160), (160, 90)], 4000, p=[0.45, 0.2, 0.2, 0.1, 0.05])
    manifest = write_manifest(tmp_path / "train.csv", np.column_stack([frames, sizes]).tolist())
    if mixture:
        mixture = [*mixture, {"name": "clips", "share": [[0, 0.1], [50_000, 0.5]]}]
    settings = {
        "data.manifest": str(manifest),
        "data.global_batch_size": 128,
        "data.micro_batch_size": 64,
        "data.budget": {"shape": [15, 90, 160], "multiple": 64, "device_tokens": 13501},
        "data.mixture": mixture,
    }
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    text = printed(
        capsys,
        "--config",
        Path(__file__).parents[2] / "ds_configs/base.json",
        "--data-ranks",
        64,
        "--steps",
        60,
        *options,
    )
    assert percent(text, "imbalance between 64 data ranks") < 0.02
    assert 0 < percent(text, "imbalance between steps") < 0.1
    assert percent(text, "rows that are never played") < 0.005
