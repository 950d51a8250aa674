"""What the benches measure against computes the same block."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from mugv_ds.config.model import DiTConfig
from mugv_ds.models.attention import sdpa
from mugv_ds.models.dit import describe_tokens, init_weights
from mugv_ds.models.layers import Block, Condition
from mugv_ds.models.rope import patch_grid, positions


@pytest.fixture
def published(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "kernels" / "bench"))
    yield __import__("baseline").PublishedBlock
    sys.modules.pop("baseline")


def test_published_block(published) -> None:
    config = DiTConfig(depth=1, hidden_size=144, num_heads=2, caption_channels=16)
    block, grid = Block(config), patch_grid(3, 6, 4)
    init_weights(block, "blocks.0.", seed=0)
    torch.nn.init.normal_(block.cross_attn.proj.weight, std=0.02)
    torch.manual_seed(0)
    x_mask, frame_index = torch.tensor([[False, True, True]]), torch.arange(5)[None]
    x = torch.randn(1, grid.tokens, 144, requires_grad=True)
    condition = Condition(
        torch.randn(1, 2, 6 * 144, requires_grad=True),
        torch.randn(1, 2, 144),
        torch.randn(1, 7, 144, requires_grad=True),
        torch.arange(7)[None] < 5,
        *describe_tokens(positions(torch.arange(grid.tokens), grid), x_mask, frame_index),
    )
    gradient, inputs = torch.randn_like(x), [x, condition.modulation_BKD, condition.text_BLD, *block.parameters()]

    def run(call) -> list[torch.Tensor]:
        y = call(x, condition)
        return [y, *torch.autograd.grad(y, inputs, gradient)]

    ours = run(lambda x, condition: block(x, condition, attention=sdpa))
    theirs = run(published(block, SDPBackend.MATH))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
