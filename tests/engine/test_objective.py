"""What the last stage minimises, in one process: the two ways to reduce a sample's error to a number."""

import pytest
import torch

from mugv_ds.config.post_training_schema import PreferenceSection
from mugv_ds.engine.objective import Objective
from mugv_ds.objectives.flow import loss_weight
from mugv_ds.parallel.pipeline import Labels, labels

BETA, POINT = 30.0, 0.004
SHAPE = (2, 4, 4)
WHOLE, HALF = 24 * 2 * 4 * 4, 24 * 4 * 4  # elements of a latent, and of one whose first frame is given


def section(objective: str, reduction: str, beta: float) -> PreferenceSection:
    sources = ({"name": "a", "manifest": "a.csv"},)
    weights = {"bad_weight": 1.5} if objective == "kto" else {}
    return PreferenceSection(objective=objective, reduction=reduction, beta=beta, sources=sources, **weights)


def given(first_frames: list[bool]) -> Labels:
    """Four samples, good and bad in turns; the first frame of some is given clean."""
    x_mask = torch.ones(4, 2, dtype=torch.bool)
    x_mask[:, 0] = ~torch.tensor(first_frames)
    target = torch.randn(4, 24, *SHAPE, generator=torch.Generator().manual_seed(0))
    return labels(
        target,
        loss_weight(x_mask, 24, *SHAPE[1:]),
        timestep=torch.full((4,), 500.0),
        scale=torch.tensor([1.0, 1.0, 2.0, 2.0]),
        role=torch.tensor([1, -1, 1, -1], dtype=torch.int8),
        reference=torch.tensor([1.02, 1.0, 0.99, 1.03]),
        optimality=torch.zeros(4),
        token_n=torch.arange(2 * 2 * 2 + 2),
    )


def minimised(preference: PreferenceSection, what: Labels, point: float) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, gradient, and the samples' mean errors."""
    objective = Objective(preference, None, None, 1)
    objective.kl_reference_point = point
    noise = torch.randn(what.target_BnPC.shape, generator=torch.Generator().manual_seed(1))
    velocity = (what.target_BnPC + noise).requires_grad_()
    loss, _ = objective(velocity, what)
    loss.backward()
    with torch.no_grad():
        plain = Objective(None, None, None, 1)
        plain(velocity, what)
    return loss.item(), velocity.grad, plain.recorded[0]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize(("first_frames", "elements"), [([False] * 4, WHOLE), ([True] * 4, HALF)])
def test_sums_with_a_beta_smaller_by_their_number_are_the_means(objective, first_frames, elements):
    what = given(first_frames)
    assert what.elements.tolist() == [elements] * 4
    mean = minimised(section(objective, "mean", BETA), what, POINT)
    total = minimised(section(objective, "sum", BETA / elements), what, POINT * elements)
    assert total[0] == pytest.approx(mean[0], rel=1e-5)
    torch.testing.assert_close(total[1], mean[1], rtol=1e-4, atol=1e-9)
    other = minimised(section(objective, "sum", BETA), what, POINT * elements)
    assert other[0] != pytest.approx(mean[0], rel=1e-3), "with the same β, sums are another objective"


def test_the_sum_counts_the_noised_elements_of_each_sample():
    """DPO by hand, one side of each pair with its first frame given: the errors are summed over unlike numbers."""
    what, beta = given([True, False, False, True]), BETA / WHOLE
    loss, _, mean = minimised(section("dpo", "sum", beta), what, 0.0)
    gain = (what.reference - mean) * torch.tensor([HALF, WHOLE, WHOLE, HALF])
    margin = beta / 2 * (gain[0::2] - gain[1::2])
    assert loss == pytest.approx((torch.log1p(torch.exp(-margin)) * torch.tensor([1.0, 2.0])).mean().item(), rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_sft_loss_of_better_samples_is_their_mean_error(objective, reduction):
    """It comes on top of the preference's loss, whatever that one's reduction, weighed by the samples' weights."""
    what, preference = (
        given([True, True, False, False]),
        section(objective, reduction, BETA if reduction == "mean" else BETA / WHOLE),
    )
    alone, alone_gradient, error = minimised(preference, what, POINT)
    loss, gradient, _ = minimised(preference.model_copy(update={"better_sft_weight": 0.7}), what, POINT)
    items = 2 if objective == "dpo" else 4  # pairs, or samples
    assert loss - alone == pytest.approx(0.7 * (error[0] + 2 * error[2]).item() / items, rel=1e-4)
    added = gradient - alone_gradient
    torch.testing.assert_close(added[1::2], torch.zeros_like(added[1::2]), rtol=0, atol=1e-9)
    assert added[0::2].any()
