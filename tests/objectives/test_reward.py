"""The objective of learning from a reward, against closed forms."""

import pytest
import torch

from mugv_ds.objectives import reward

BETA = 0.7


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(velocity, old, target, r, weight=1 / 6):
    return reward.nft_loss(*reward.nft_errors(velocity, old, target, torch.tensor(weight), BETA), r)


def test_the_loss_is_that_of_the_two_implicit_policies():
    velocity, old, target = draw(2, 6), draw(2, 6, seed=1), draw(2, 6, seed=2)
    r = torch.tensor([0.2, 0.9], dtype=torch.float64)
    plus, minus = (1 - BETA) * old + BETA * velocity, (1 + BETA) * old - BETA * velocity
    expected = r * (plus - target).square().mean(1) + (1 - r) * (minus - target).square().mean(1)
    torch.testing.assert_close(loss_of(velocity, old, target, r), expected)


@pytest.mark.parametrize("r", [0.0, 0.3, 0.5, 1.0])
def test_the_gradient_is_the_closed_form(r):
    velocity, old, target = draw(1, 6).requires_grad_(), draw(1, 6, seed=1), draw(1, 6, seed=2)
    loss_of(velocity, old, target, torch.tensor([r], dtype=torch.float64)).sum().backward()
    expected = 2 * BETA * ((2 * r - 1) * (old - target) + BETA * (velocity.detach() - old)) / 6
    torch.testing.assert_close(velocity.grad, expected)


def test_with_beta_1_and_sure_of_it_the_loss_of_a_good_rollout_is_the_flow_loss():
    velocity, old, target = draw(3, 6), draw(3, 6, seed=1), draw(3, 6, seed=2)
    positive, _ = reward.nft_errors(velocity, old, target, torch.tensor(1 / 6), 1.0)
    torch.testing.assert_close(positive, (velocity - target).square().mean(1))


def test_the_best_velocity_of_a_mixture_moves_by_the_difference_of_good_and_bad():
    """Minimised over samples of one x_t: v* = v_old + mean((2r − 1)·(v − v_old)) / β."""
    old, targets = draw(1, 6), draw(8, 6, seed=1)
    r = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    best = old + ((2 * r - 1)[:, None] * (targets - old)).mean(0) / BETA
    velocity = best.clone().requires_grad_()
    loss_of(velocity.expand(8, 6), old.expand(8, 6), targets, r).sum().backward()
    torch.testing.assert_close(velocity.grad, torch.zeros_like(velocity), atol=1e-12, rtol=0)


def test_the_shares_of_a_samples_elements_add_up():
    velocity, old, target, weight = draw(2, 6), draw(2, 6, seed=1), draw(2, 6, seed=2), torch.rand(2, 6).double()
    whole = reward.nft_errors(velocity, old, target, weight, BETA)
    parts = [reward.nft_errors(velocity[:, at], old[:, at], target[:, at], weight[:, at], BETA) for at in (
        slice(0, 4), slice(4, 6))]  # fmt: skip
    for i in range(2):
        torch.testing.assert_close(whole[i], parts[0][i] + parts[1][i])


def test_advantages_are_within_a_prompt_and_without_a_unit():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    found = reward.advantages(rewards)
    assert found[1].eq(0).all() and found[0].sum() == 0
    torch.testing.assert_close(found[0, 1], torch.tensor(0.5 / (0.25 * 4 / 8) ** 0.5))
    torch.testing.assert_close(reward.advantages(1000 * rewards + 3), found)
    assert reward.advantages(torch.full((2, 3), 7.0)).eq(0).all()


def test_optimality_lies_in_0_to_1_and_weighs_the_rewards():
    rewards = {"a": torch.tensor([[0.0, 1.0]]), "b": torch.tensor([[10.0, -10.0]])}

    def found(a: float, b: float, clip: float) -> list[list[float]]:
        return reward.optimality(reward.total_advantages(rewards, {"a": a, "b": b}), clip).tolist()

    assert found(1.0, 0.0, 1.0) == [[0.0, 1.0]]
    assert found(1.0, 1.0, 1.0) == [[0.5, 0.5]]
    assert found(1.0, -1.0, 4.0) == [[0.25, 0.75]]


def test_the_terms_are_sums():
    terms = reward.nft_terms(*(torch.tensor([1.0, 2.0]) * k for k in (1, 10, 100)))
    assert {name: float(value) for name, value in terms.items()} == {
        "rollouts": 2.0, "positive": 3.0, "negative": 30.0, "moved": 300.0}  # fmt: skip
    assert tuple(terms) == reward.REWARD_TERMS


def test_diversity_of_copies_and_of_strangers():
    strangers = draw(4, 5000)
    assert reward.diversity(strangers[:1].expand(4, -1)) == 0
    assert abs(float(reward.diversity(strangers)) - 1) < 0.02
    alike = strangers + 2 * draw(1, 5000, seed=9)  # what they have in common makes them no more different
    assert abs(float(reward.diversity(alike)) - 1 / 5**0.5) < 0.02
    pairs = [(a - b).square().mean() for i, a in enumerate(alike) for b in alike[:i]]
    expected = (sum(pairs) / len(pairs)).sqrt() / (2 * alike.square().mean()).sqrt()
    torch.testing.assert_close(reward.diversity(alike), expected)
