"""The preference objectives against closed forms."""

import math

import pytest
import torch

from mugv_ds.objectives.preference import (
    PREFERENCE_TERMS,
    dpo_loss,
    dpo_terms,
    kl_reference_point,
    kto_loss,
    kto_terms,
)

BETA = 500.0


def sigma(x):
    return 1 / (1 + math.exp(-x))


def losses(n, dtype=torch.float64):
    """Four plausible ℓ [n]; β times a difference is of order 1."""
    base, spread = torch.randn(2, 4, n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    return (0.3 + 0.1 * base[:1] + 0.004 * spread).unbind(0)


def test_dpo_starts_at_log_2_with_a_gradient_of_a_quarter_beta():
    better, worse = (x.clone().requires_grad_() for x in losses(3)[:2])
    loss = dpo_loss(better, worse, better.detach(), worse.detach(), BETA)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    loss.sum().backward()
    # Descent lowers the error on the better sample and raises it on the worse one.
    torch.testing.assert_close(better.grad, torch.full_like(loss, BETA / 4))
    torch.testing.assert_close(worse.grad, torch.full_like(loss, -BETA / 4))


def test_dpo_by_hand():
    # The better sample's error fell by 0.25, the worse one's rose by 0.5: margin 4/2·(0.25 + 0.5) = 1.5.
    loss = dpo_loss(*(torch.tensor([x]) for x in (1.0, 2.5, 1.25, 2.0)), beta=4.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_dpo_gradients_are_analytic():
    better, worse, better_ref, worse_ref = losses(50)
    better.requires_grad_()
    worse.requires_grad_()
    dpo_loss(better, worse, better_ref, worse_ref, BETA).sum().backward()
    wrong = torch.sigmoid(BETA / 2 * ((better - better_ref) - (worse - worse_ref))).detach()
    torch.testing.assert_close(better.grad, BETA / 2 * wrong)
    torch.testing.assert_close(worse.grad, -BETA / 2 * wrong)


def test_kto_by_hand():
    # g = 0.5 and −0.25, z = 0.125: margins 4·0.375 = 1.5 for good, −4·(−0.375) = 1.5 for bad.
    loss = kto_loss(
        torch.tensor([1.0, 1.25, 1.0, 1.25]),
        torch.tensor([1.5, 1.0, 1.5, 1.0]),
        torch.tensor([True, False, False, True]),
        beta=4.0,
        kl_reference_point=torch.tensor(0.125),
        good_weight=1.0,
        bad_weight=3.0,
    )
    expected = [1 - sigma(1.5), 3 * (1 - sigma(1.5)), 3 * (1 - sigma(-1.5)), 1 - sigma(-1.5)]
    assert loss.tolist() == pytest.approx(expected)


def test_kto_gradients_are_analytic_and_none_flows_through_the_point():
    loss, reference, *_ = losses(50)
    loss.requires_grad_()
    good = torch.arange(50) % 3 > 0
    z = kl_reference_point(reference - loss)
    assert not z.requires_grad
    kto_loss(loss, reference, good, beta=BETA, kl_reference_point=z, good_weight=1.0, bad_weight=1.3).sum().backward()
    likelihood = torch.sigmoid(BETA * (reference - loss.detach() - z))
    slope = BETA * likelihood * (1 - likelihood)
    # Descent lowers the error on good samples and raises it on bad ones.
    torch.testing.assert_close(loss.grad, torch.where(good, 1.0, -1.3).double() * slope, rtol=1e-6, atol=0)
    assert (loss.grad[good] > 0).all() and (loss.grad[~good] < 0).all()


def test_kto_at_the_reference_is_half_the_weight():
    same = torch.full((2,), 0.3)
    good = torch.tensor([True, False])
    z = kl_reference_point(same - same)
    loss = kto_loss(same, same, good, beta=BETA, kl_reference_point=z, good_weight=1.0, bad_weight=3.0)
    assert loss.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(("gains", "z"), [([0.5, -0.25, 0.5], 0.25), ([-1.0, 0.5], 0.0)])
def test_kl_reference_point_is_the_mean_gain_but_not_below_zero(gains, z):
    assert kl_reference_point(torch.tensor(gains)).item() == z


@pytest.mark.parametrize("gap", [0.01, 1.0, 1e4, 1e30])
def test_huge_margins_stay_finite(gap):
    """fp32, β = 5000: the loss of a pair is linear far from the preference, and gradients are bounded."""
    low = torch.tensor([0.0, gap], requires_grad=True)
    high = torch.tensor([gap, 0.0], requires_grad=True)
    zero = torch.zeros(2)
    dpo = dpo_loss(low, high, zero, zero, 5000.0)
    weights = {"good_weight": 1.0, "bad_weight": 1.0}
    kto = kto_loss(low, zero, low > 0, beta=5000.0, kl_reference_point=torch.tensor(0.0), **weights)
    (dpo.sum() + kto.sum()).backward()
    assert dpo[0].item() == pytest.approx(0, abs=1e-10) and dpo[1].item() == pytest.approx(2500 * gap, rel=1e-5)
    for tensor in (dpo, kto, low.grad, high.grad):
        assert tensor.isfinite().all()
    assert high.grad[1].item() == pytest.approx(-2500)
    assert all(value.isfinite() for value in dpo_terms(low, high, zero, zero, 5000.0).values())
    assert all(value.isfinite() for value in kto_terms(low, zero, low > 0, 5000.0, torch.tensor(0.0)).values())


def test_dpo_terms_are_sums_over_pairs():
    tensors = [tensor.float().requires_grad_() for tensor in losses(200)]
    expected = dict.fromkeys(PREFERENCE_TERMS, 0.0)
    for w, l, w_ref, l_ref in zip(*(tensor.tolist() for tensor in tensors), strict=True):  # noqa: E741
        reward_w, reward_l = BETA / 2 * (w_ref - w), BETA / 2 * (l_ref - l)
        expected["count"] += 1
        expected["correct"] += reward_w > reward_l
        expected["margin"] += reward_w - reward_l
        expected["better_loss"] += w
        expected["worse_loss"] += l
        expected["better_reference"] += w_ref
        expected["worse_reference"] += l_ref
        expected["better_count"] += 1
        expected["worse_count"] += 1
        expected["saturated"] += not 0.01 <= sigma(reward_w - reward_l) <= 0.99
    check(dpo_terms(*tensors, BETA), expected)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_kto_terms_are_sums_over_good_and_bad(share):
    loss, reference = (tensor.float().requires_grad_() for tensor in losses(200)[:2])
    good = torch.arange(200) < share * 200
    z, beta = torch.tensor(0.001), 800.0
    expected = dict.fromkeys(PREFERENCE_TERMS, 0.0)
    for ours, ref, is_good in zip(loss.tolist(), reference.tolist(), good.tolist(), strict=True):
        gain, side = ref - ours, "better" if is_good else "worse"
        margin = (1 if is_good else -1) * beta * (gain - z.item())
        expected["count"] += 1
        expected["correct"] += gain > z.item() if is_good else gain < z.item()
        expected["margin"] += margin
        expected[f"{side}_loss"] += ours
        expected[f"{side}_reference"] += ref
        expected[f"{side}_count"] += 1
        expected["saturated"] += not 0.01 <= sigma(margin) <= 0.99
    check(kto_terms(loss, reference, good, beta, z), expected)


def check(terms, expected):
    assert tuple(terms) == PREFERENCE_TERMS
    assert 0 < expected["saturated"] < expected["count"] and 0 < expected["correct"] < expected["count"]
    for name, value in terms.items():
        assert value.shape == () and value.dtype == torch.float32 and not value.requires_grad, name
        assert value.item() == pytest.approx(expected[name], rel=1e-4, abs=1e-2), name
