"""Who computes more slowly than the others."""

import time

import pytest
import torch

from mugv_ds.engine.guard.stragglers import Stopwatch, Stragglers


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        ([1.0, 1.0, 1.0, 3.0], [(3, 3.0)]),
        ([1.0, 3.0], [(1, 3.0)]),
        ([1.0, 2.0, 1.0], []),
        ([3.0, 3.0, 3.0, 1.0], []),
        ([0.0, 0.0], []),
    ],
)
def test_a_rank_is_compared_with_the_median(seconds, named):
    stragglers = Stragglers(2.0, 3)
    assert [stragglers.note(seconds) for _ in range(6)] == [[], [], named, [], [], named]


def test_one_slow_step_is_no_straggler():
    stragglers = Stragglers(2.0, 3)
    assert [stragglers.note(step) for step in ([1.0, 1.0], [1.0, 50.0], [1.0, 1.0])] == [[]] * 3


def test_only_the_layer_is_timed():
    class Sleep(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return x

    layer = Sleep()
    watch = Stopwatch(layer, torch.device("cpu"))
    assert watch.read() == 0.0
    layer(torch.zeros(1))
    time.sleep(0.2)
    layer(torch.zeros(1))
    layer.eval()(torch.zeros(1))  # evaluation is not compared
    assert 0.1 <= watch.read() < 0.3 and watch.read() == 0.0


def test_a_pass_that_breaks_off_does_not_count():
    """As the recomputation of a checkpointed layer does, once it has what it needs."""

    class Break(torch.nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                raise KeyError
            return x

    layer = Break()
    watch = Stopwatch(layer, torch.device("cpu"))
    with pytest.raises(KeyError):
        layer(torch.ones(1))
    time.sleep(0.05)
    layer(torch.zeros(1))
    assert 0 < watch.read() < 0.05
