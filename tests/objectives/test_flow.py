"""The flow objective against closed forms."""

import math

import pytest
import torch

from mugv_ds.models.dit import patch_pixels
from mugv_ds.objectives import flow


def test_shift_of_720p_five_seconds():
    assert flow.resolution_shift(720, 1280, 15) == pytest.approx(math.sqrt(720 * 1280 / 512**2) * math.sqrt(15))
    assert flow.resolution_shift(512, 512, 1) == 1.0


def test_shift_moves_time_towards_noise_and_keeps_the_ends():
    u = torch.linspace(0, 1, 11)
    assert torch.equal(flow.shift_time(u, 1.0), u)
    shifted = flow.shift_time(u, 7.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > u[1:-1]).all()
    assert shifted[5].item() == pytest.approx(7 * 0.5 / (1 + 6 * 0.5))


def test_drawn_times_have_the_shifted_logit_normal_median():
    """The median of sigmoid(n) is 1/2, and the shift is monotone: r/(r+1) of the way."""
    n = torch.randn(100_001, generator=torch.Generator().manual_seed(0))
    for shift in (0.5, 1.0, 7.0):
        t = flow.draw_time(n, shift)
        assert t.min() > 0 and t.max() < 1000
        assert t.median().item() == pytest.approx(1000 * shift / (1 + shift), abs=5)


def test_interpolation_ends_at_data_and_noise_and_its_slope_is_the_velocity():
    x0, noise = torch.randn(2, 2, 24, 1, 2, 2, dtype=torch.float64).unbind(0)
    ends = [flow.interpolate(x0, noise, torch.full((2,), t, dtype=torch.float64)) for t in (0.0, 1000.0)]
    assert torch.equal(ends[0], x0) and torch.equal(ends[1], noise)
    t = torch.tensor([250.0, 900.0], dtype=torch.float64)
    slope = (flow.interpolate(x0, noise, t - 1) - flow.interpolate(x0, noise, t)) * 1000
    torch.testing.assert_close(slope, flow.velocity(x0, noise))


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 48, 4, 3, 5, generator=generator)
    target = torch.randn(3, 24, 4, 3, 5, generator=generator)
    x_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    return prediction, target, x_mask


def test_loss_is_the_mean_over_noised_frames_of_each_sample():
    prediction, target, x_mask = batch()
    loss = flow.flow_loss(prediction, target, x_mask)
    for b in range(3):
        error = (prediction[b, :24] - target[b])[:, x_mask[b]]
        assert loss[b].item() == pytest.approx(error.square().mean().item(), rel=1e-6)


def test_loss_ignores_clean_frames_and_unused_channels():
    prediction, target, x_mask = batch()
    loss = flow.flow_loss(prediction, target, x_mask)
    prediction[:, 24:] = torch.nan
    prediction = torch.where(x_mask[:, None, :, None, None], prediction, 99.0)
    assert torch.equal(flow.flow_loss(prediction, target, x_mask), loss)


def test_loss_over_tokens_in_parts_sums_to_the_loss():
    """The weighted sum over any split of the patches, odd sides padded, is the loss."""
    prediction, target, x_mask = batch()
    weight = flow.loss_weight(x_mask, 24, 3, 5)
    parts = zip(*(patch_pixels(t).split(7, dim=1) for t in (prediction[:, :24], target, weight)), strict=True)
    total = sum(flow.weighted_error(*part) for part in parts)
    torch.testing.assert_close(total, flow.flow_loss(prediction, target, x_mask), rtol=1e-6, atol=0)


def test_a_sample_without_noised_frames_is_refused():
    with pytest.raises(ValueError, match="no noised frame"):
        flow.loss_weight(torch.tensor([[True, True], [False, False]]), 24, 2, 2)


def test_quartiles():
    loss, t = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([0.0, 249.0, 250.0, 999.0, 1000.0])
    terms = flow.loss_by_quartile(loss, t)
    assert [terms[f"loss_q{q}"].item() for q in range(4)] == [3, 4, 0, 24]
    assert [terms[f"count_q{q}"].item() for q in range(4)] == [2, 1, 0, 2]
