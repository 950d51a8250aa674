"""Seconds of a step on a machine that obeys formulas, against the same worked out by hand."""

from dataclasses import replace

import pytest

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import DiTConfig
from mugv_ds.parallel.layout import Layout
from mugv_ds.plan.calibration import BlockPoint
from mugv_ds.plan.cost import Setup, layer_parameters, step_time
from mugv_ds.plan.steps import Bucket
from mugv_ds.plan.timing import Cluster, Timing
from tests.helpers import machine
from tests.helpers.machine import ideal_machine

DIT = DiTConfig(288, 4, 8, caption_channels=16)
TOKENS = 10_002
BUCKET = Bucket("train", (10, 50, 80), 5, TOKENS, samples=1, micro=1, accumulation=1)
SETUP = Setup(
    dit=DIT,
    trained=layer_parameters(DIT),
    text_tokens=6,
    layout=Layout(),
    levels=("off",) * DIT.depth,
    offload="none",
    gradients="fp32",
    averages=0,
    bucket=10**9,
    typical_tokens=TOKENS,
)


@pytest.fixture(scope="module")
def timing():
    return Timing(ideal_machine())


def terms(timing, bucket=BUCKET, **changes):
    time = step_time(replace(SETUP, **changes), bucket, timing)
    assert time.total == pytest.approx(sum(time.terms.values()))
    return time.terms


def test_one_device(timing):
    """Between the lengths and with the heads that were measured: every term by its formula."""
    found = terms(timing, bucket=BUCKET._replace(accumulation=3), averages=2)
    attention, linear = machine.attention(TOKENS, 4), machine.products(288, TOKENS)
    kernels = 3 * machine.KERNELS * 288 * TOKENS
    parameters = sum(layer_parameters(DIT))
    assert found["products"] == pytest.approx(3 * 8 * 3 * linear)
    assert found["attention forward"] == pytest.approx(3 * 8 * attention)
    assert found["attention backward"] == pytest.approx(3 * 8 * 2.5 * attention)
    assert found["kernels"] == pytest.approx(3 * (8 * kernels + 2 * machine.ENDS * TOKENS))
    assert found["exchange"] == found["gather"] == found["offload"] == 0
    # Each micro-batch's gradient is copied in bf16 and added in fp32: 4 + 10 bytes; a copy of n bytes moves 2n.
    assert found["reduction"] == pytest.approx(3 * 7 * parameters / machine.MEMORY)
    update = machine.UPDATE
    assert found["optimizer"] == pytest.approx((sum(update.values()) + update["average_s"]) * parameters)


@pytest.mark.parametrize("level", ["light", "selective", "attention", "full"])
def test_what_levels_run_again(timing, level):
    off, found = terms(timing), terms(timing, levels=(level,) * DIT.depth)
    again = {name: found[name] - off[name] for name in off}
    forward = machine.products(288, TOKENS)
    light = level == "light"
    assert again.pop("products") == pytest.approx(8 * (machine.products(288, TOKENS, 3) if light else forward))
    assert again.pop("kernels") == pytest.approx(0 if light else 8 * machine.KERNELS * 288 * TOKENS, abs=1e-9)
    assert again.pop("attention forward") == pytest.approx(8 * machine.attention(TOKENS, 4) * (level == "full"))
    assert not any(again.values())


def test_sequence_ranks_share_tokens_and_heads_and_exchange(timing):
    alone, found = terms(timing), terms(timing, layout=Layout(1, 4, 1))
    rows = -(-TOKENS // 4)
    assert found["products"] == pytest.approx(alone["products"] * rows / TOKENS)
    assert found["attention forward"] == pytest.approx(alone["attention forward"] / 4)
    # q, k and v with their spaces, and o, to three of four ranks; o is copied once. In each pass.
    tensor = 2 * rows * 288
    once = (3 * 80 / 72 + 1) * tensor * 3 / 4 / machine.LINK + tensor / machine.MEMORY
    assert found["exchange"] == pytest.approx(8 * 2 * once)
    repeated = terms(timing, layout=Layout(1, 4, 1), levels=("attention",) * DIT.depth)
    assert repeated["exchange"] == pytest.approx(8 * 3 * once)


def test_the_bubble_is_that_of_1f1b(timing):
    for accumulation in (1, 4):
        found = terms(timing, bucket=BUCKET._replace(accumulation=accumulation), layout=Layout(1, 1, 4))
        work = ("products", "attention forward", "attention backward", "kernels")
        busy = sum(found[name] for name in work)
        assert found["pipeline bubble"] / (busy + found["pipeline bubble"]) == pytest.approx(3 / (accumulation + 3))
        sent = 2 * 288 * (TOKENS + 14 + 6)
        assert found["exchange"] == pytest.approx(2 * (accumulation + 3) * sent / machine.LINK)


def test_the_backward_pass_hides_the_reduction_but_for_its_last_bucket(timing):
    parameters = sum(layer_parameters(DIT))
    whole = 2 * parameters * 3 / 4 / machine.LINK
    added = (2 + 5 / 4) * parameters / machine.MEMORY
    layout = Layout(4, 1, 1)
    in_one = terms(timing, layout=layout)
    assert in_one["reduction"] == pytest.approx(whole + added)
    # In ten buckets nine are hidden, beside which computing gets a quarter slower.
    setup = replace(SETUP, layout=layout, bucket=parameters / 10)
    in_ten = step_time(setup, BUCKET, timing)
    assert in_ten.terms["reduction"] == pytest.approx((0.1 + 0.25 * 0.9) * whole + added)
    assert in_ten.hidden["reduction"] == pytest.approx(0.75 * 0.9 * whole)
    # Nothing hides what takes longer than the backward pass.
    short = BUCKET._replace(tokens=300, shape=(1, 34, 34))
    found = step_time(setup, short, timing)
    assert found.terms["reduction"] > 0.3 * whole
    assert found.terms["gather"] == pytest.approx(whole - _shorter(whole, parameters))


def _shorter(whole, parameters):
    """What AdamW hides of a gather of eight parts, of which the last is waited for."""
    update = machine.UPDATE
    adamw = (update["adamw_s"] + update["norm_s"] + update["cast_s"]) * parameters / 4
    return min(adamw, 7 / 8 * whole)


def test_offload_is_waited_for_only_where_it_takes_longer_than_a_block(timing):
    setup = replace(SETUP, levels=("attention",) * DIT.depth, offload="all")
    moved = (2 + 1 / 36) * 2 * TOKENS * 288
    quick = step_time(setup, BUCKET, timing)
    assert quick.terms["offload"] == 0
    assert quick.hidden["offload"] == pytest.approx(8 * 2 * moved / machine.HOST)
    slow = Timing(ideal_machine(copies=tuple(_slower(point, 1e3) for point in ideal_machine().copies)))
    found = step_time(setup, BUCKET, slow)
    forward = machine.block(288, TOKENS)[0] + machine.attention(TOKENS, 4)
    backward = machine.block(288, TOKENS, "selective")[1] + 2.5 * machine.attention(TOKENS, 4)
    waited = 8 * (2 * 1e3 * moved / machine.HOST - forward - backward)
    assert found.terms["offload"] == pytest.approx(waited)
    assert found.hidden["offload"] == pytest.approx(8 * (forward + backward))


def _slower(point, times):
    return point.model_copy(update={"seconds": point.seconds * times})


def test_preferences_run_forward_once_more(timing):
    plain = terms(timing, bucket=BUCKET._replace(accumulation=4, preferred=3))
    kto = terms(timing, bucket=BUCKET._replace(accumulation=4, preferred=3), reference_passes=1)
    forward = 8 * (machine.block(288, TOKENS)[0] + machine.attention(TOKENS, 4)) + machine.ENDS * TOKENS
    assert kto.pop("reference") == pytest.approx(3 * forward)
    assert kto == plain


def test_frozen_linears_have_no_gradients_of_weights(timing):
    plain, adapted = terms(timing), terms(timing, is_adapted=True)
    assert plain["products"] - adapted["products"] == pytest.approx(8 * machine.products(288, TOKENS))


def test_beyond_a_host_the_slower_of_links_and_network_counts():
    timing = Timing(ideal_machine(), Cluster(gpus_per_host=4, network=1e9))
    count = 1e8
    assert timing.collective("reduce_scatter", 4, count) == pytest.approx(count * 3 / 4 / machine.LINK)
    # Rings of 8 leave each host over four GPUs' network; of an all-to-all half is for the other host.
    assert timing.collective("reduce_scatter", 8, count) == pytest.approx(count * 7 / 8 / 4 / 1e9)
    assert timing.collective("all_reduce", 8, count) == pytest.approx(2 * count * 7 / 8 / 4 / 1e9)
    assert timing.collective("all_to_all", 8, count) == pytest.approx(count / 2 / 1e9)
    fast = Timing(ideal_machine(), Cluster(gpus_per_host=4, network=1e15))
    assert fast.collective("all_gather", 8, count) == pytest.approx(count * 7 / 8 / machine.LINK)
    assert timing.send(count, 3) == pytest.approx(count / machine.LINK)
    assert timing.send(count, 4) == pytest.approx(count / 1e9)


def test_a_whole_block_that_takes_longer_than_its_pieces_scales_them():
    ideal = ideal_machine()
    forward, backward = machine.block(288, 4096)
    whole = forward + backward + 3.5 * machine.attention(4096, 4)
    sizes = {"width": 288, "batch": 1, "tokens": 4096, "level": "off", "attention": True}
    point = BlockPoint(**sizes, forward_s=0.4 * whole, backward_s=0.7 * whole, kept_bytes=0, peak_bytes=0)
    slower = Timing(ideal.plus("blocks", point))
    alone, scaled = terms(Timing(ideal)), terms(slower)
    for name in ("products", "attention forward", "attention backward"):
        assert scaled[name] == pytest.approx(1.1 * alone[name])


def test_more_samples_cost_their_texts_too():
    ideal = ideal_machine()
    for level in ("off", "light", "selective"):
        forward, backward = machine.block(288, 4096, level)
        sizes = {"width": 288, "batch": 16, "tokens": 256, "level": level, "attention": False}
        point = BlockPoint(**sizes, forward_s=forward + 15e-6, backward_s=backward + 30e-6, kept_bytes=0, peak_bytes=0)
        ideal = ideal.plus("blocks", point)
    bucket = BUCKET._replace(micro=5)
    plain, more = (terms(Timing(m), bucket=bucket, text_tokens=300)["kernels"] for m in (ideal_machine(), ideal))
    assert more - plain == pytest.approx(8 * 4 * 3e-6)


def test_what_was_not_measured_is_named():
    with pytest.raises(InputError, match="has no products, optimizer"):
        Timing(ideal_machine(products=(), optimizer=()))
    alone = Timing(ideal_machine(collectives=()))
    assert terms(alone)["exchange"] == 0
    with pytest.raises(InputError, match="no all_to_all was measured"):
        terms(alone, layout=Layout(1, 2, 1))
