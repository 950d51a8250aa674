"""Learning from a reward online, on the forward process: from the rewards of rollouts to a flow loss.

DiffusionNFT: Zheng et al. 2025 (arXiv 2509.16117). For a rollout x0 of the old policy with optimality probability r,
noised to x_t, with the target v = x0 − ε and the old policy's prediction v_old at the same x_t:

    v⁺ = (1 − β)·v_old + β·v_θ     v⁻ = (1 + β)·v_old − β·v_θ
    L = r·‖v⁺ − v‖² + (1 − r)·‖v⁻ − v‖²

Its gradient is 2β·[(2r − 1)·(v_old − v) + β·(v_θ − v_old)]: good rollouts draw the velocity towards themselves, bad
ones push it away, and the policy is held at a distance from the old one that shrinks as β grows. No likelihoods, no
solver and no guidance take part. With the flow loss on real data beside it, as in DDRL (arXiv 2512.04332), the policy
keeps to the data.

Shape suffixes: P prompts, K rollouts of each, B batch, x the dimensions of a latent.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mugv_ds.objectives.flow import weighted_error

# The keys of `nft_terms`, in their order.
REWARD_TERMS = ("rollouts", "positive", "negative", "moved")


def advantages(rewards_PK: Tensor) -> Tensor:
    """Returns by how much each rollout beats the mean of its prompt, in units of the spread within prompts, [P, K].

    The spread is the root mean square of what is left of all rewards without their prompts' means: prompts whose
    rollouts are all alike count for nothing. It is taken over all prompts, as the paper's Z_c is, because a handful of
    rollouts say little of their own. Where all rewards are their prompt's mean, the advantages are 0.
    """
    centred_PK = rewards_PK - rewards_PK.mean(dim=1, keepdim=True)
    spread = centred_PK.square().mean().sqrt()
    return centred_PK / spread if spread > 0 else torch.zeros_like(centred_PK)


def total_advantages(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Returns the weighted sum A of the `advantages` of rewards, [P, K]: no weight depends on its reward's unit.

    Args:
        rewards: [P, K] by name. weights: of each name; a negative one asks for less.
    """
    return sum(weight * advantages(rewards[name]) for name, weight in weights.items())


def optimality(advantages_PK: Tensor, clip: float) -> Tensor:
    """Returns the optimality probabilities r = ½ + ½·clip(A / clip, −1, 1) of rollouts, in [0, 1], [P, K].

    Source: Zheng et al. 2025, Algorithm 1, with the clip of the released code.

    Args:
        advantages_PK: A. clip: that from which on a rollout counts as wholly good, or wholly bad.
    """
    return 0.5 + 0.5 * (advantages_PK / clip).clamp(-1, 1)


def nft_errors(velocity: Tensor, old: Tensor, target: Tensor, weight: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Returns ‖v⁺ − v‖² and ‖v⁻ − v‖² of each sample, each [B] and weighed as `objectives.flow.weighted_error` does.

    Args:
        velocity: v_θ, [B, …]. old: v_old of that shape, without gradient. target: v of that shape.
        weight: broadcasts to that shape. beta: β > 0.
    """
    step = beta * (velocity - old)
    return weighted_error(old + step, target, weight), weighted_error(old - step, target, weight)


def nft_loss(positive: Tensor, negative: Tensor, optimality: Tensor) -> Tensor:
    """Returns r·‖v⁺ − v‖² + (1 − r)·‖v⁻ − v‖² of each sample (Zheng et al. 2025, theorem 3.2, eq. 5), [B].

    Args:
        positive, negative: [B], see `nft_errors`. optimality: r [B], see the function of that name.
    """
    return optimality * positive + (1 - optimality) * negative


def nft_terms(positive: Tensor, negative: Tensor, moved: Tensor) -> dict[str, Tensor]:
    """Returns what a run reports of rollouts, as sums over samples, so that ranks and micro-batches can add theirs up.

    Args:
        positive, negative: [B], see `nft_errors`. moved: ‖v_θ − v_old‖² [B].
    Returns:
        Scalars without gradient, keyed by `REWARD_TERMS` in that order; rollouts is their number.
    """
    values = (torch.ones_like(moved), positive, negative, moved)
    return {name: value.detach().sum() for name, value in zip(REWARD_TERMS, values, strict=True)}


def diversity(latents_Kx: Tensor) -> Tensor:
    """Returns how different the rollouts of a prompt are: 0 where they are all one, about 1 where nothing relates them.

    It is the root mean square distance of two of them over √2 times the root mean square of the latents, which is their
    distance where they are independent and of mean zero.

    Args:
        latents_Kx: [K ≥ 2, …], normalised latents.
    """
    flat_Kx = latents_Kx.flatten(1).double()
    # Σ over the pairs of ‖a − b‖² is K times the sum of the squares about the mean.
    about_mean = (flat_Kx - flat_Kx.mean(dim=0)).square().sum() / (len(flat_Kx) - 1)
    return (about_mean / flat_Kx.square().sum() * len(flat_Kx)).sqrt()
