"""What a run is told of its steps before it starts, and the short runs that predictions are held to."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mugv_ds.config import load_config
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.loop import Trainer
from mugv_ds.engine.metrics import Expected
from mugv_ds.parallel.layout import Layout
from mugv_ds.plan import predict
from mugv_ds.plan.cost import sample_cost
from mugv_ds.plan.memory import GIB
from mugv_ds.plan.predict import predict_host_memory, predict_record, predict_steps
from mugv_ds.plan.records import read_record
from mugv_ds.plan.search import Limits, Planner
from mugv_ds.plan.steps import kinds_of
from mugv_ds.plan.timing import Timing
from tests.helpers.dataset import write_config
from tests.helpers.machine import ideal_machine
from tests.plan.test_balance import BUDGET, MIXTURE, ROWS, write_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    manifest = write_manifest(folder / "train.csv", [shape for shape, n in ROWS.items() for _ in range(n)])
    data = {"budget": BUDGET, "mixture": MIXTURE, "global_batch_size": 32, "micro_batch_size": 16}
    config = load_config(write_config(folder, manifest, data=data, model={"precision": "bf16"}))
    return config, RunData(config, sample_cost(config), 2)


def test_a_run_is_told_what_the_planner_says(run, monkeypatch):
    config, data = run
    monkeypatch.setattr(predict, "calibration_of", lambda card: ideal_machine())
    steps = predict_steps(config, Layout(2, 1, 1), data, "Ideal H200")
    timing = Timing(ideal_machine())
    planner = Planner(config, kinds_of(data.plan, config.schedule.steps), timing, Limits(GIB, GIB))
    way = planner.as_set(2)
    assert steps.by_kind.keys() == {(bucket.stream, bucket.shape) for bucket in way.buckets}
    for bucket, time in zip(way.buckets, way.times, strict=True):
        assert steps.by_kind[bucket.stream, bucket.shape].seconds == pytest.approx(time.total)
    assert max(step.peak_gib for step in steps.by_kind.values()) == pytest.approx(way.memory.peak / GIB)
    assert steps.line.startswith("predicted: ") and f"{way.seconds:.3g} s a step on average" in steps.line


def test_host_memory_holds_what_waits_in_it(run):
    config, data = run
    layout, blocks = Layout(2, 1, 1), config.model.dit().depth
    taken = {}
    for offload in ("none", "attention_output", "all"):
        parallel = config.parallel.model_copy(update={"activation_checkpointing": "attention", "offload": offload})
        taken[offload] = predict_host_memory(config.model_copy(update={"parallel": parallel}), layout, data)
    tokens = max(bucket.micro * bucket.tokens for bucket in predict._planned(config, layout, data)[0])
    tensor = 2 * tokens * config.model.dit().hidden_size
    assert taken["all"] - taken["attention_output"] == pytest.approx(blocks * tensor)
    assert taken["attention_output"] - taken["none"] == pytest.approx(blocks * tensor * (1 + 1 / 36))


def test_without_times_memory_is_told_alone(run, monkeypatch):
    config, data = run
    steps = predict_steps(config, Layout(2, 1, 1), data, "Unheard-of 1")
    assert {step.seconds for step in steps.by_kind.values()} == {None}
    assert steps.line.endswith("no time: no calibration of Unheard-of 1 is shipped")
    monkeypatch.setattr(predict, "calibration_of", lambda card: ideal_machine(collectives=()))
    assert "no time: calibration" in predict_steps(config, Layout(2, 1, 1), data, "Ideal H200").line


def test_the_loop_hands_on_what_was_predicted_of_the_kind_of_step_that_it_took(run):
    config, data = run
    planned = data.plan.step(0)
    noted = []
    recorder = SimpleNamespace(expect=noted.append, step=lambda *args, **kwargs: None)
    engine = SimpleNamespace(get_additional_losses=dict)
    expected = Expected(3.0, 2.0)
    for kind in ((planned.stream, planned.shape), ("other", planned.shape)):
        trainer = SimpleNamespace(config=config, engine=engine, expected={kind: expected})
        Trainer._note(trainer, planned, torch.tensor(1.0), recorder)
    assert noted == [expected]


@pytest.mark.long
def test_short_runs_leave_records(tmp_path):
    command = [sys.executable, "kernels/bench/plan_runs.py", "--toy", "--gpus", "1", "2", "--attention", "sdpa"]
    command += ["--out", str(tmp_path / "records"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    records = {path.stem: read_record(path) for path in (tmp_path / "records").glob("*.json")}
    assert records.keys() == {"toy-1", "toy-1-again", "toy-2", "toy-2-again"}
    for name, record in records.items():
        steps = {"toy-1": 4, "toy-2-again": 2}.get(name, 3)  # of the first one is profiled
        assert len(record.measured.steps) == len(record.measured.losses) == steps
        assert record.measured.step_seconds == record.measured.steps[min(2, steps - 1)]
        is_first = not name.endswith("again")  # of its process: only then its host memory is its own
        assert (record.measured.host_gib is not None) == is_first and record.measured.peak_gib is None
        prediction = predict_record(record, Timing(ideal_machine()))
        assert prediction.time.total > 0 and prediction.memory.peak > 0
    assert records["toy-2-again"].train_config().parallel.pipeline == 2
