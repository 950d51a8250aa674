"""Averages kept in training against integrals in closed form, and in real runs against averages of whole tensors."""

from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from mugv_ds.checkpoint.fragments import fragments
from mugv_ds.config import load_config
from mugv_ds.config.errors import Stopped
from mugv_ds.config.power_profile import exponent
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.ema import PowerEma
from mugv_ds.engine.loop import Trainer
from mugv_ds.engine.process import start_process
from mugv_ds.models.flops import SampleCost
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.distributed import run_ranks, whole_state

SIGMAS = (0.05, 0.10)
SHAPE = (1, 4, 4)


@pytest.mark.parametrize("sigma_rel", SIGMAS)
def test_average_of_a_polynomial_is_the_integral_in_closed_form(sigma_rel):
    """θ(τ) = (τ/T)^k: ∫ θ dp = (γ + 1) / (γ + 1 + k). Steps instead of a curve add less than what θ moves in one."""
    steps, powers = 3000, torch.arange(4, dtype=torch.float64)
    weights = torch.zeros(4, dtype=torch.float64)
    ema = PowerEma([weights], [sigma_rel])
    for step in range(1, steps + 1):
        weights.copy_((step / steps) ** powers)
        ema.update(step)
    (average,) = ema.averages[f"ema_{sigma_rel:.3f}"]
    order = exponent(sigma_rel) + 1

    times = torch.arange(steps + 1, dtype=torch.float64)[:, None] / steps
    exact = ((times[1:] ** order - times[:-1] ** order) * times[1:] ** powers).sum(0)  # of the piecewise constant θ
    torch.testing.assert_close(average, exact, rtol=1e-11, atol=0)
    curve = order / (order + powers)
    assert torch.all((average - curve).abs() <= powers / steps + 1e-11)
    assert average[0] == pytest.approx(1, abs=1e-12)


def test_the_first_step_replaces_the_initial_weights_and_none_is_off():
    weights = torch.zeros(3)
    ema = PowerEma([weights], SIGMAS)
    weights.fill_(2.0)
    ema.update(1)
    assert all(torch.equal(average, weights) for (average,) in ema.averages.values())
    off = PowerEma([weights], ())
    off.update(1)
    assert off.averages == {}


@pytest.mark.parametrize("stopped", [False, True])
def test_an_average_takes_the_place_of_the_weights_for_a_while(stopped):
    """Also where the run is asked to stop meanwhile, and then saves."""
    weights, model = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], []
    ema = PowerEma(weights, SIGMAS)
    average = ema.averages["ema_0.100"]
    for tensor in weights:
        tensor.mul_(1 / 3)
    before = [tensor.clone() for tensor in (*weights, *average)]
    with (
        pytest.raises(Stopped) if stopped else nullcontext(),
        ema.in_model(0.1, lambda: model.append(weights[0].clone())),
    ):
        assert [tensor.tolist() for tensor in weights] == [[1.0, 2.0], [[3.0]]]
        if stopped:
            raise Stopped("step 7")
    assert all(torch.equal(*pair) for pair in zip(before, (*weights, *average), strict=True))
    assert [tensor.tolist() for tensor in model] == [[1.0, 2.0], before[0].tolist()], "refreshed each time"


def test_after_an_error_of_one_rank_nothing_waits_for_the_others():
    weights, refreshed = [torch.zeros(1)], []
    ema = PowerEma(weights, SIGMAS)
    with pytest.raises(OSError, match="gone"), ema.in_model(0.1, lambda: refreshed.append(1)):
        raise OSError("gone")
    assert refreshed == [1]


def train_and_compare(cases: list[Path]) -> None:
    for path in cases:
        config = load_config(path)
        follow_run(config, start_process(config))


def follow_run(config: TrainConfig, process) -> None:
    """Runs the trainer, and beside it the averages of the stage's whole weights, gathered after every step."""
    engine = build_engine(config, process, SHAPE)
    first = next(engine.module.parameters())
    owned = fragments(engine)
    ema = PowerEma([fragment.tensors["weight"] for fragment in owned], config.ema.sigma_rel)
    names, whole = zip(*whole_state(engine, "weight").items(), strict=True)
    expected = PowerEma(whole, config.ema.sigma_rel)
    poison, taken = [], []

    class Compare:
        """Compares where a run would save."""

        state: ClassVar[dict] = {}

        def poll(self) -> None: ...

        def wait(self) -> None: ...

        def save(self, done: int, state: dict) -> None:
            if done:  # the start is saved too
                compare(done)

    def compare(done: int) -> None:
        taken.append(engine.was_step_applied())
        for mine, now in zip(whole, whole_state(engine, "weight").values(), strict=True):
            mine.copy_(now)
        if taken[-1]:
            expected.update(done)
        for kind, averages in ema.averages.items():
            named = dict(zip(names, expected.averages[kind], strict=True))
            for average, piece in zip(averages, owned, strict=True):
                of_whole = named[piece.name].flatten().narrow(0, piece.start, piece.numel)
                assert torch.equal(average, of_whole), (kind, piece.name, done)
        if done == 2:  # the third step's gradient is not finite, and DeepSpeed skips it
            poison.append(first.register_hook(lambda gradient: gradient * torch.nan))
        elif done == 3:
            poison.pop().remove()

    data = RunData(config, SampleCost.of(config), process.layout.data)
    trainer = Trainer(config, process, engine, data=data, reference=None, ema=ema, store=Compare())
    trainer.run(0)
    assert taken == [True, True, False, True, True]
    held = sum(a.numel() for a in ema.averages["ema_0.050"])
    share = sum(p.numel() for p in whole) / process.layout.replicas
    assert abs(held - share) < 0.02 * share, "a rank holds its share, up to alignment"
    moved = [not torch.equal(a, w.tensors["weight"]) for a, w in zip(ema.averages["ema_0.050"], owned, strict=True)]
    assert any(moved), "the weights must move, or the comparison shows nothing"


def test_sharded_averages_equal_those_of_whole_weights_bitwise(tmp_path):
    """ZeRO-1 over data ranks in fp32, and in bf16 (fp32 masters); a skipped step leaves them as they are."""
    manifest = write_dataset(tmp_path / "data", [SHAPE] * 4)
    checkpoint = {"dir": str(tmp_path / "checkpoints"), "save_every": 1}
    common = {"schedule": {"steps": 5, "warmup_steps": 0}, "checkpoint": checkpoint, "optimizer": {"lr": 1e-2}}
    cases = []
    for precision in ("fp32", "bf16"):
        model = {"precision": precision, "attention": "sdpa"}
        cases.append(write_config(tmp_path / precision, manifest, model=model, parallel={"data": 2}, **common))
    run_ranks(2, train_and_compare, cases)
