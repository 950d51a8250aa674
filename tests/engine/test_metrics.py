"""What a run reports of itself."""

import io
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.config import console
from mugv_ds.config.schema import LoggingSection
from mugv_ds.engine import metrics
from mugv_ds.engine.metrics import Expected, OptimizerProbe, Recorder, peak_tflops
from mugv_ds.objectives.flow import loss_by_quartile
from tests.helpers.distributed import run_ranks


def record_two_steps(folder: Path) -> None:
    """One process: two steps, one without an update, long validations between them; then what the optimizer holds."""
    dist.init_process_group("gloo")
    weights = torch.nn.Parameter(torch.arange(10.0))
    optimizer = torch.optim.AdamW([weights], lr=0.1)
    metrics._CHUNK = 3  # several chunks, the last one shorter
    probe = OptimizerProbe(optimizer, parameters=8, replicas=1)  # two of the ten are padding
    section = LoggingSection(dir=str(folder), every=2, progress=False, peak_tflops=1.0)
    recorder = Recorder(section, rank=0, world_size=1, start=0, steps=2, peak=peak_tflops(section, torch.device("cpu")))
    for loss, t in ((1.0, 100.0), (float("nan"), 100.0), (3.0, 900.0)):
        terms = loss_by_quartile(torch.tensor([loss]), torch.tensor([t]))
        recorder.step(
            torch.tensor(loss), terms, stream="train", samples=4, tokens=40, model_flops=1e9, hardware_flops=1.25e9
        )
        recorder.expect(Expected(loss * 2 if loss == loss else 2.0, 10 * t))
        with recorder.excluded():
            time.sleep(1)
    probe.armed = True
    weights.grad = torch.tensor([0.0, 1, 0, 2, 3, 4, 5, 6, 0, 0])
    optimizer.step()
    recorder.record(2, rate=0.5, norm=7.0, probe=probe, waited=0.25)
    recorder.close()
    assert probe.read() == {}, "no step since, as when DeepSpeed skips one"


@pytest.fixture(scope="module")
def scalars(tmp_path_factory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("events")
    run_ranks(1, record_two_steps, folder)
    events = EventAccumulator(str(folder))
    events.Reload()
    assert all([event.step for event in events.Scalars(tag)] == [2] for tag in events.Tags()["scalars"])
    return {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}


def test_losses_are_means_over_the_window_and_by_quartile(scalars):
    assert scalars["train/loss"] == 2.0
    assert scalars["train/loss_t0-250"] == 1.0 and scalars["train/loss_t750-1000"] == 3.0
    assert "train/loss_t250-500" not in scalars, "no sample, no mean"


def test_speed_does_not_count_what_is_excluded(scalars):
    seconds = scalars["speed/seconds_per_step"]
    assert 0 < seconds < 0.5
    assert scalars["speed/samples_per_second"] == pytest.approx(4 / seconds, rel=1e-4)
    assert scalars["speed/tokens_per_second"] == pytest.approx(40 / seconds, rel=1e-4)
    assert scalars["speed/model_tflops_per_device"] == pytest.approx(1e-3 / seconds, rel=1e-4)
    assert scalars["speed/mfu"] == pytest.approx(1e-3 / seconds, rel=1e-4)  # of a peak of 1 TFLOP/s
    assert scalars["speed/hfu"] == pytest.approx(1.25e-3 / seconds, rel=1e-4)


def test_what_was_predicted_stands_beside_what_was_measured(scalars):
    assert scalars["plan/step_seconds"] == pytest.approx((2 + 2 + 6) / 3)
    assert scalars["plan/peak_gib"] == 9000
    assert 0.05 < scalars["memory/host_gib"] < 1000, "of this process"


def test_the_rest_is_passed_on(scalars):
    assert (scalars["train/lr"], scalars["train/grad_norm"], scalars["speed/data_wait_seconds"]) == (0.5, 7.0, 0.25)


def test_waiting_for_data_is_a_share_of_what_counts_for_the_speed(scalars):
    assert scalars["speed/data_wait_share"] == pytest.approx(0.25 / (3 * scalars["speed/seconds_per_step"]), rel=1e-4)


def test_the_optimizer_probe_sees_weights_and_gradients_without_the_padding(scalars):
    assert scalars["train/param_norm"] == pytest.approx(sum(i * i for i in range(10)) ** 0.5)
    assert scalars["train/grad_zero_share"] == pytest.approx((4 - 2) / 8)


def recorded(monkeypatch, stream: io.StringIO, **section) -> None:
    """Records one step of a run of four, with what `record` measures given."""
    monkeypatch.setattr(console.CONSOLE, "_streams", (stream, stream))
    speeds = {"speed/tokens_per_second": 12345.6, "speed/data_wait_share": 0.07, "speed/seconds_per_step": 30.0}
    monkeypatch.setattr(Recorder, "_speeds", lambda self, waited: speeds | {"speed/mfu": 0.41})
    given = LoggingSection(dir="unused", trackers=(), every=1, **section)
    recorder = Recorder(given, rank=0, world_size=1, start=0, steps=4, peak=None)
    recorder.step(torch.tensor(1.5), {}, stream="train", samples=1)
    recorder._means = lambda sums: {}
    recorder.record(1, rate=0.5, norm=1.0, probe=OptimizerProbe(torch.optim.AdamW([torch.zeros(1)]), 1, 1), waited=0)
    recorder.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_for_each_record_and_no_bar(monkeypatch):
    recorded(monkeypatch, stream := io.StringIO())
    assert stream.getvalue() == (
        "step 1/4: loss 1.5000, lr 5.00e-01, tokens/s 12,346, mfu 41.0%, wait 7%, 01:30 left\n"
    )


def test_a_terminal_has_a_bar_with_the_same_and_no_colour(monkeypatch):
    recorded(monkeypatch, stream := Terminal())
    shown = stream.getvalue()
    assert "1/4" in shown and "loss=1.5000" in shown and "tokens/s=12,346" in shown and "mfu=41.0%" in shown
    assert "wait=7%" in shown and "step 1/4:" not in shown and "\x1b[3" not in shown


def test_progress_can_be_switched_off(monkeypatch):
    recorded(monkeypatch, stream := Terminal(), progress=False)
    assert stream.getvalue() == ""


def test_the_peak_of_an_unknown_device_is_not_made_up():
    assert peak_tflops(LoggingSection(dir="unused"), torch.device("cpu")) is None


@pytest.mark.regression
@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_cards_of_one_chip_have_their_own_peaks(monkeypatch, name, peak):
    """From NVIDIA's data sheets; a slice of a card has none that is known."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(LoggingSection(dir="unused"), torch.device("cuda")) == peak
    assert peak_tflops(LoggingSection(dir="unused", peak_tflops=5.0), torch.device("cuda")) == 5


@pytest.mark.regression
def test_peak_memory_is_that_since_the_last_record(monkeypatch):
    """Three records: much at first, as while starting; then little, then a bit more."""
    in_use = iter([[4, 1], [1, 2], [3, 1]])
    highest = [0]

    def allocate() -> None:
        for gib in next(in_use):
            highest[0] = max(highest[0], gib)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: highest[0] * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: highest.__setitem__(0, 0))
    peaks = []
    for _ in range(3):
        allocate()
        peaks.append(metrics.take_peak_gib(torch.device("cuda")))
    assert peaks == [4, 2, 3]
    assert metrics.take_peak_gib(torch.device("cpu")) == 0
