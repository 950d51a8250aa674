"""The prediction against peaks measured on 4 × H200; docs/performance.md has the runs."""

from dataclasses import replace

import pytest

from mugv_ds.config import PRESETS
from mugv_ds.engine.describe import layer_parameters
from mugv_ds.models.memory import GIB, predict_memory


@pytest.mark.parametrize(
    ("depth", "tokens", "recompute", "measured_gib"), [(56, 54_002, "light", 115.8), (4, 579_602, "selective", 44.1)]
)
def test_prediction_is_within_a_tenth_of_what_was_measured(depth, tokens, recompute, measured_gib):
    config = replace(PRESETS["mugdit_10b"], depth=depth)
    memory = predict_memory(
        config,
        parameters=sum(layer_parameters(config)),
        blocks=depth,
        replicas=4,
        tokens_held=-(-tokens // 4),
        in_flight=1,
        recompute=recompute,
        fp32_accumulation=False,
        averages=0,
    )
    assert memory.peak / GIB == pytest.approx(measured_gib, rel=0.1)


def test_what_is_recomputed_and_sharded_is_not_held():
    config = PRESETS["mugdit_10b"]
    common = {
        "parameters": 10**10,
        "blocks": 56,
        "tokens_held": 13_501,
        "in_flight": 1,
        "fp32_accumulation": False,
        "averages": 2,
    }
    peaks = [
        predict_memory(config, replicas=4, recompute=recompute, **common).backward
        for recompute in ("full", "selective", "light", "off")
    ]
    assert peaks == sorted(peaks)
    by_replicas = [predict_memory(config, replicas=n, recompute="full", **common).resident for n in (1, 2, 64)]
    assert by_replicas[0] - by_replicas[1] == pytest.approx(20 * 10**10 / 2)
    assert by_replicas[2] == pytest.approx(2e10 + 20e10 / 64)
