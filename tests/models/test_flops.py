"""FLOPs in closed form against the matrix products that PyTorch runs."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mugv_ds.config import PRESETS
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import ParallelSection, TrainConfig
from mugv_ds.models.dit import Embedders, patchify
from mugv_ds.models.flops import RECOMPUTED, block_flops, layer_flops, recomputed_flops, step_flops, train_flops
from mugv_ds.models.layers import Block, CaptionEmbedder, Condition, FinalLayer
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
def of_linear(x, shift, scale, clean, weight, *_, out_shape=None, **__) -> int:
    return 2 * x[1] * weight[0] * weight[1]


def of_mlp(x, shift, scale, clean, w1, *_, out_shape=None, **__) -> int:
    return 4 * x[1] * w1[0] * w1[1]


OPERATORS = {
    torch.ops.mugv.modulated_linear: of_linear,
    torch.ops.mugv.modulated_linear_backward: lambda d, *args, **kwargs: 2 * of_linear(*args, **kwargs),
    torch.ops.mugv.modulated_mlp: of_mlp,
    torch.ops.mugv.modulated_mlp_backward: lambda d, *args, **kwargs: 2 * of_mlp(*args, **kwargs),
}


def counted_flops(recompute: str) -> tuple[int, int]:
    """Of a block's forward pass, and of both; the counter does not see the CPU's fused cross-attention."""
    block = Block(CONFIG)
    condition = Condition(
        torch.randn(1, 2, 6 * D, requires_grad=True),
        torch.randn(1, 2, D),
        torch.randn(1, L, D, requires_grad=True),
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
    modes = ParallelSection.model_json_schema()["properties"]["activation_checkpointing"]["enum"]
    assert set(modes) == set(RECOMPUTED)


def test_full_recomputation_of_the_10b_costs_a_third_more():
    ratio = train_flops(PRESETS["mugdit_10b"], 54_002, 300, "full") / train_flops(PRESETS["mugdit_10b"], 54_002, 300)
    assert ratio == pytest.approx(4 / 3, rel=1e-3)


def run(objective: str | None, recompute: str) -> TrainConfig:
    preference = {"objective": objective, "sources": ({"name": "a", "manifest": "a.csv"},)}
    return TrainConfig(
        model={"preset": "mugdit_debug"},
        data={"manifest": "m.csv", "null_text_path": "n.pt", "global_batch_size": 8, "max_text_tokens": L},
        schedule={"steps": 1},
        checkpoint={"dir": "c"},
        logging={"dir": "l"},
        parallel={"activation_checkpointing": recompute},
        preference=preference if objective else None,
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
