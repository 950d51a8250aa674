"""FLOPs in closed form against the matrix products that PyTorch runs."""

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mugv_ds.config import PRESETS
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.post_training_schema import LoraSection
from mugv_ds.config.schema import Level, TrainConfig
from mugv_ds.models.dit import Embedders, patchify
from mugv_ds.models.flops import (
    RECOMPUTED,
    block_flops,
    block_parts,
    layer_flops,
    recomputed_flops,
    step_flops,
    train_flops,
)
from mugv_ds.models.layers import Block, CaptionEmbedder, Condition, FinalLayer
from mugv_ds.models.lora import add_adapters
from mugv_ds.models.rope import patch_grid

CONFIG = DiTConfig(144, 2, 3, caption_channels=16)
N, L, D = 10, 6, CONFIG.hidden_size
TEXT_PROJECTION = 4 * L * D**2  # the keys and values of cross-attention, which the closed form leaves out
LAST_PROJECTION = 2 * N * D**2  # eager PyTorch does not run it again where its output is needed by nothing


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Self-attention in matrix products, which the counter sees."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.mT, dim=-1) @ v).transpose(1, 2)


# Matrix products inside our operators, of which the counter sees the shapes alone.
def of_weights(x, *weights) -> int:
    """Of x with each of the weights, or factors of adapters, that are there."""
    return sum(2 * x[1] * weight[0] * weight[1] for weight in weights if weight is not None)


def of_linear(x, shift, scale, clean, weight, bias, a, b, **_) -> int:
    return of_weights(x, weight, a, b)


def of_linear_backward(d, x, shift, scale, clean, weight, a, b, needs_x, needs_rows, needs_weight, *_, **__) -> int:
    """The gradient of x by each factor, of the weight, of A and B; and x·Aᵀ again."""
    return of_weights(x, weight, a, b) + of_weights(x, a, b, a) + needs_weight * of_weights(x, weight)


def of_mlp(x, shift, scale, clean, w1, b1, w2, *factors, **_) -> int:
    return of_weights(x, w1, w2, *factors)


def of_mlp_backward(d, x, shift, scale, clean, w1, w2, a1, b1, a2, b2, inner, needs_x, needs_rows, *needs, **_) -> int:
    again = of_weights(x, w1, w2, a1, b1, a2, b2) + of_weights(x, a1, b1, a1, a2, b2, a2)
    return again + sum(need * of_weights(x, weight) for need, weight in zip(needs, (w1, w2), strict=True))


OPERATORS = {
    torch.ops.mugv.modulated_linear: of_linear,
    torch.ops.mugv.modulated_linear_backward: of_linear_backward,
    torch.ops.mugv.modulated_mlp: of_mlp,
    torch.ops.mugv.modulated_mlp_backward: of_mlp_backward,
}


def counted_flops(recompute: str, lora: LoraSection | None = None) -> tuple[int, int]:
    """Of a block's forward pass, and of both; the counter does not see the CPU's fused cross-attention."""
    block = Block(CONFIG)
    if lora is not None:
        add_adapters(block, lora)
    condition = Condition(
        torch.randn(1, 2, 6 * D, requires_grad=lora is None),
        torch.randn(1, 2, D),
        torch.randn(1, L, D, requires_grad=lora is None),
        torch.ones(1, L, dtype=torch.bool),
        torch.arange(N)[None] < 3,
        *torch.randn(2, 1, N, 36),
    )
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as counter:
        out = block(torch.randn(1, N, D, requires_grad=True), condition, plain_attention, recompute)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops()


def test_forward_flops_are_those_that_run():
    assert counted_flops("off")[0] == block_flops(CONFIG, N, text_tokens=0) + TEXT_PROJECTION


def test_flops_with_adapters_are_those_that_run():
    """The counter sees no product of cross-attention, and of the text's projection the forward pass and its adapter's.

    Beside, x·Aᵀ is computed again in the operators' backward pass: 2·N·r·(3·D + 4·D) of qkv, q, fc1 and fc2.
    """
    lora = LoraSection(rank=5)
    forward, both = counted_flops("off", lora)
    text_adapter = 2 * L * 5 * (D + 2 * D)
    assert forward == sum(block_parts(CONFIG, N, 0, lora).values()) + TEXT_PROJECTION + text_adapter
    again = 2 * N * 5 * (D + D + D + 4 * D)
    # Nothing wants the gradient of the text: of its adapter only those of A and B are computed, from that of x·Aᵀ.
    text = TEXT_PROJECTION + text_adapter + (2 * L * 5 * 2 * D) + (2 * L * 5 * D) + (2 * L * 5 * 2 * D)
    block = (train_flops(CONFIG, N, 0, lora=lora) - of_ends(lora)) / CONFIG.depth
    assert both == block + again + text


def of_ends(lora: LoraSection) -> float:
    """What the closed form has for embedders, forward alone, and the final layer, whose weight is frozen."""
    embed, *_, final = layer_flops(CONFIG, N, 0, lora)
    return embed + 2 * final


def test_adapters_of_the_10b_save_nearly_a_third():
    ten = PRESETS["mugdit_10b"]
    ratio = train_flops(ten, 4_000, 300, lora=LoraSection()) / train_flops(ten, 4_000, 300)
    assert 2 / 3 < ratio < 0.75


@pytest.mark.parametrize("recompute", ["light", "selective", "full"])
def test_recomputed_flops_are_those_that_run_again(recompute):
    expected = recomputed_flops(CONFIG, N, 0, recompute) + TEXT_PROJECTION
    if recompute != "full":
        expected -= LAST_PROJECTION
    assert counted_flops(recompute)[1] - counted_flops("off")[1] == expected


@pytest.mark.parametrize(
    ("recompute", "by_width", "by_text", "by_tokens"),
    [("off", 0, 0, 0), ("light", 6, 4, 0), ("selective", 28, 4, 0), ("full", 28, 4, 4)],
)
def test_hardware_flops_add_what_every_block_recomputes(recompute, by_width, by_text, by_tokens):
    for n in (N, 1000):
        again = CONFIG.depth * n * D * (by_width * D + by_text * L + by_tokens * n)
        assert train_flops(CONFIG, n, L, recompute) - train_flops(CONFIG, n, L) == again


def test_every_mode_is_counted():
    assert set(get_args(Level)) == set(RECOMPUTED)


def test_blocks_of_several_levels_run_again_what_each_of_them_does():
    levels = ["full", "light", *["off"] * (CONFIG.depth - 2)]
    again = sum(recomputed_flops(CONFIG, N, L, level) for level in levels)
    assert train_flops(CONFIG, N, L, levels) == pytest.approx(train_flops(CONFIG, N, L) + again)


def test_full_recomputation_of_the_10b_costs_a_third_more():
    ratio = train_flops(PRESETS["mugdit_10b"], 54_002, 300, "full") / train_flops(PRESETS["mugdit_10b"], 54_002, 300)
    assert ratio == pytest.approx(4 / 3, rel=1e-3)


def run(objective: str | None, recompute: str, lora: dict | None = None) -> TrainConfig:
    preference = {"objective": objective, "sources": ({"name": "a", "manifest": "a.csv"},)}
    return TrainConfig(
        model={"preset": "mugdit_debug"},
        data={"manifest": "m.csv", "null_text_path": "n.pt", "global_batch_size": 8, "max_text_tokens": L},
        schedule={"steps": 1},
        checkpoint={"dir": "c"},
        logging={"dir": "l"},
        parallel={"activation_checkpointing": recompute},
        preference=preference if objective else None,
        lora=lora,
    )


@pytest.mark.regression
def test_kto_s_reference_point_is_run_but_no_training():
    """A sample's forward pass is a third of its model FLOPs. KTO's 4 preference samples of 6 run forward once more."""
    shape, debug = (2, 4, 4), PRESETS["mugdit_debug"]
    sample = train_flops(debug, 2 * 2 * 2 + 2, L)
    again = debug.depth * recomputed_flops(debug, 2 * 2 * 2 + 2, L, "full")
    for objective, hardware in ((None, 0), ("dpo", 0), ("kto", 4 * sample / 3)):
        model, off = step_flops(run(objective, "off"), shape, samples=6, companions=2)
        assert (model, off) == pytest.approx((6 * sample, 6 * sample + hardware))
        model, full = step_flops(run(objective, "full"), shape, samples=6, companions=2)
        assert (model, full) == pytest.approx((6 * sample, 6 * sample + hardware + 6 * again))


def test_the_reference_of_a_run_with_adapters_is_run_too():
    """Adapters off, over the preference samples: once more forward; KTO's point is measured with them on."""
    shape, debug, lora = (2, 4, 4), PRESETS["mugdit_debug"], LoraSection(rank=4)
    tokens = 2 * 2 * 2 + 2
    base, adapted = sum(layer_flops(debug, tokens, L)), sum(layer_flops(debug, tokens, L, lora))
    for objective, again in ((None, 0), ("dpo", 4 * base), ("kto", 4 * (base + adapted))):
        model, hardware = step_flops(run(objective, "off", {"rank": 4}), shape, samples=6, companions=2)
        assert model == pytest.approx(6 * train_flops(debug, tokens, L, lora=lora))
        assert hardware - model == pytest.approx(again)


def test_flops_of_the_embedders_and_the_final_layer_are_those_that_run():
    """What the closed form counts of them: patches, captions, and the last linear; not the few rows of a sample."""
    embedders, captions, final = Embedders(CONFIG), CaptionEmbedder(CONFIG.caption_channels, D), FinalLayer(CONFIG)
    x, (expected, *_, last) = torch.randn(1, 24, 2, 4, 4), layer_flops(CONFIG, N, L)
    token_N = torch.arange(N)
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as counter:
        captions(torch.randn(1, L, CONFIG.caption_channels))
        of_captions = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        patches = torch.nn.functional.pad(patchify(x), (0, 0, 1, 1))  # as many rows as there are tokens
        embedders._embed_tokens(patches, token_N[:, None], patch_grid(2, 4, 4))
        of_patches = counter.get_total_flops()
    assert of_captions == 2 * L * (16 * 144 + 144 * 144) and of_patches == 2 * 10 * 96 * 144
    assert expected == of_captions + of_patches
    condition = Condition(None, torch.randn(1, 2, D), None, None, torch.zeros(1, N, dtype=torch.bool), None, None)
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as counter:
        final(torch.randn(1, N, D), condition)
    assert last == counter.get_total_flops() == 2 * 10 * 144 * 192
