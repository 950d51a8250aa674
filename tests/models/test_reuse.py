"""What a sampler reuses: the text's keys and values exactly, and blocks as the threshold says."""

from unittest.mock import patch

import pytest
import torch

from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.layers import CrossAttention
from mugv_ds.models.reuse import FirstBlockCache, hold_text, reuse_blocks
from tests.helpers.published import toy_dit


@pytest.fixture(scope="module")
def model() -> DiT:
    return toy_dit(DiTConfig(144, 2, 3, caption_channels=16)).eval().requires_grad_(False)


def inputs(batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, text and mask; the second text is shorter."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 9, dtype=torch.bool)
    mask[-1, 4:] = False
    return torch.randn(batch, 24, 2, 4, 6, generator=generator), torch.randn(batch, 9, 16, generator=generator), mask


def predict(model: DiT, t: float, batch: int = 2) -> torch.Tensor:
    x, text, mask = inputs(batch)
    return model(x * t / 1000, torch.full((batch,), t), text, mask)


def test_text_is_projected_once_and_nothing_changes(model):
    wanted = {(t, batch): predict(model, t, batch) for t in (900.0, 500.0) for batch in (2, 1)}
    calls = []
    real = CrossAttention.keys_values
    with patch.object(CrossAttention, "keys_values", lambda self, text: calls.append(len(text)) or real(self, text)):
        with hold_text(model):
            for (t, batch), value in wanted.items():
                assert torch.equal(predict(model, t, batch), value)
        assert sorted(calls) == [1] * 3 + [2] * 3  # three blocks, once for each batch size
        predict(model, 500.0)
        assert len(calls) == 9  # let go


def test_other_texts_count_once_the_hold_is_over(model):
    with hold_text(model):
        predict(model, 900.0)
    x, text, mask = inputs(seed=1)
    t = torch.tensor([900.0, 900.0])
    with hold_text(model):
        assert torch.equal(model(x, t, text, mask), model(x, t, text, mask))
        held = model(x, t, text, mask)
    assert torch.equal(held, model(x, t, text, mask))


def test_text_is_let_go_after_an_error(model):
    with pytest.raises(RuntimeError, match="stop"), hold_text(model):
        predict(model, 900.0)
        raise RuntimeError("stop")
    assert model.held_text is None and all(block.cross_attn.held is None for block in model.blocks)


def test_blocks_are_left_out_by_the_relative_change_of_the_first(model):
    times = [900.0, 890.0, 500.0]
    first = [added_by_first_block(model, t) for t in times]
    change = [float((first[i] - first[0]).abs().mean() / first[0].abs().mean()) for i in range(3)]
    assert 0 < change[1] < change[2]
    exact = [predict(model, t) for t in times]
    for threshold, skipped in ((0.0, 0), ((change[1] + change[2]) / 2, 1), (change[2] * 1.01, 2)):
        cache = FirstBlockCache(threshold)
        with reuse_blocks(model, cache):
            got = [predict(model, t) for t in times]
        assert (cache.calls, cache.skipped) == (3, skipped)
        assert [torch.equal(a, b) for a, b in zip(got, exact, strict=True)] == [True, skipped < 1, skipped < 2]
    assert torch.equal(predict(model, 500.0), exact[2])


def added_by_first_block(model: DiT, t: float) -> torch.Tensor:
    kept = {}

    def only_first(blocks, x, condition, attention, recompute):
        kept["added"] = blocks[0](x, condition, attention, recompute) - x
        return x

    with reuse_blocks(model, only_first):
        predict(model, t)
    return kept["added"]


def test_all_ranks_decide_by_the_sum_of_their_parts(model):
    """Here all of the change is on another rank, which this one only sees in the sum."""
    seen = []

    def total(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.tolist())
        return x + torch.tensor([1e9, 0.0])

    with reuse_blocks(model, cache := FirstBlockCache(1e3, total)):
        predict(model, 900.0)
        predict(model, 900.0)
    assert cache.skipped == 0 and len(seen) == 1 and seen[0][0] == 0 < seen[0][1]


def test_another_shape_starts_anew(model):
    with reuse_blocks(model, cache := FirstBlockCache(1e9)):
        predict(model, 900.0, batch=2)
        predict(model, 900.0, batch=1)
    assert cache.skipped == 0
