"""Preference objectives on flow losses: DPO on pairs, KTO on single samples that are labelled good or bad.

ℓ is a sample's flow loss under the policy and ℓ_ref under the frozen reference, for the same timestep and noise; the
two samples of a pair share them too. A sample's implicit reward is its gain g = ℓ_ref − ℓ, times β/2 in DPO and β in
KTO. Whether ℓ is a mean over the elements or their sum is the caller's choice: the β that goes with sums is the one
that goes with means, divided by the number of elements.

DPO: Wallace et al. 2024 (Diffusion-DPO, eq. 14, with the 1/2 of the authors' code), for rectified flow Liu et al. 2025
(Flow-DPO), here with a β that is constant over timesteps.
KTO: Ethayarajh et al. 2024 (eq. 8), for diffusion Li et al. 2024 (Diffusion-KTO).

Tensors are vectors: [pairs] for DPO, [B] samples for KTO.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# The keys of `dpo_terms` and `kto_terms`, in their order.
PREFERENCE_TERMS = (
    "count",
    "correct",
    "margin",
    "better_loss",
    "worse_loss",
    "better_reference",
    "worse_reference",
    "better_count",
    "worse_count",
    "saturated",
)


def dpo_loss(better: Tensor, worse: Tensor, better_ref: Tensor, worse_ref: Tensor, beta: float) -> Tensor:
    """Returns the DPO loss −log σ(−β/2 · [(ℓ(w) − ℓ_ref(w)) − (ℓ(l) − ℓ_ref(l))]) of each pair, [pairs].

    It falls as the policy gains more on the better sample w than on the worse sample l.

    Args:
        better, worse: ℓ(w) and ℓ(l), fp32 [pairs]. better_ref, worse_ref: ℓ_ref(w) and ℓ_ref(l), without gradient.
        beta: β > 0, how strongly a difference of losses counts.
    """
    return -F.logsigmoid(_dpo_margin(better, worse, better_ref, worse_ref, beta))


def kto_loss(
    loss: Tensor,
    reference: Tensor,
    good: Tensor,
    *,
    beta: float,
    kl_reference_point: Tensor,
    good_weight: float,
    bad_weight: float,
) -> Tensor:
    """Returns the KTO loss λ · [1 − σ(s·β·(g − z))] of each sample, [B].

    The gain is g = ℓ_ref − ℓ, and s is 1 for good samples and −1 for bad ones: the loss falls as good samples gain more
    than z, and bad ones less.

    Args:
        loss: ℓ, fp32 [B]. reference: ℓ_ref [B], without gradient. good: bool [B].
        beta: β > 0.
        kl_reference_point: z, a scalar without gradient; see the function of that name.
        good_weight, bad_weight: λ of good and of bad samples.
    """
    margin = _kto_margin(loss, reference, good, beta, kl_reference_point)
    doubt = torch.sigmoid(-margin)  # σ(−x) is 1 − σ(x) without rounding to 0
    return torch.where(good, good_weight * doubt, bad_weight * doubt)


def kl_reference_point(gains: Tensor) -> Tensor:
    """Returns KTO's reference point z = max(0, mean of g), a scalar without gradient.

    It stands for the KL divergence of the policy from the reference, z₀ in Ethayarajh et al. 2024: a sample counts as
    improved only where it gains more than the policy does on average. They estimate z₀ on prompts with the outputs of
    other prompts; this is the mean over the samples themselves.

    Args:
        gains: g = ℓ_ref − ℓ of all samples of the global batch, good and bad; any shape but empty.
    """
    return gains.detach().mean().clamp(min=0)


def dpo_terms(better: Tensor, worse: Tensor, better_ref: Tensor, worse_ref: Tensor, beta: float) -> dict[str, Tensor]:
    """Returns what a run reports of DPO, as sums over the pairs, so that ranks and micro-batches can add theirs up.

    The arguments are those of `dpo_loss`. The margin is the difference of the implicit rewards, the argument of σ.

    Returns:
        Scalars without gradient, keyed by `PREFERENCE_TERMS` in that order:
        count: number of pairs.
        correct: number of pairs with a margin above 0, in which the better sample has the higher implicit reward.
        margin: sum of the margins.
        better_loss, worse_loss, better_reference, worse_reference: sums of ℓ(w), ℓ(l), ℓ_ref(w) and ℓ_ref(l).
        better_count, worse_count: numbers of terms of these sums.
        saturated: number of pairs with σ(margin) outside [0.01, 0.99]. At the upper end the gradient is below 1% of its
            bound; at the lower end it is at its bound, and the policy is far from the preference.
    """
    return _terms(_dpo_margin(better, worse, better_ref, worse_ref, beta), better, worse, better_ref, worse_ref)


def kto_terms(
    loss: Tensor, reference: Tensor, good: Tensor, beta: float, kl_reference_point: Tensor
) -> dict[str, Tensor]:
    """Returns what a run reports of KTO, as sums over the samples without gradient.

    The arguments are those of `kto_loss`. The keys are those of `dpo_terms`, with good samples for better and bad ones
    for worse, whose counts differ. The margin is s·β·(g − z), so that good samples with g above z and bad ones with g
    below it are correct. At both ends a saturated sample's gradient is below 1% of λ·β: it hardly moves the policy any
    more.
    """
    margin = _kto_margin(loss, reference, good, beta, kl_reference_point)
    return _terms(margin, loss[good], loss[~good], reference[good], reference[~good])


def _dpo_margin(better: Tensor, worse: Tensor, better_ref: Tensor, worse_ref: Tensor, beta: float) -> Tensor:
    """Returns the differences of the implicit rewards, [pairs]."""
    return beta / 2 * ((better_ref - better) - (worse_ref - worse))


def _kto_margin(loss: Tensor, reference: Tensor, good: Tensor, beta: float, kl_reference_point: Tensor) -> Tensor:
    """Returns s·β·(g − z), [B]."""
    margin = beta * (reference - loss - kl_reference_point)
    return torch.where(good, margin, -margin)


def _terms(margin: Tensor, better: Tensor, worse: Tensor, better_ref: Tensor, worse_ref: Tensor) -> dict[str, Tensor]:
    """Sums the terms that `dpo_terms` and `kto_terms` share."""
    likelihood = margin.sigmoid()
    values = (
        torch.ones_like(margin),
        margin > 0,
        margin,
        better,
        worse,
        better_ref,
        worse_ref,
        torch.ones_like(better),
        torch.ones_like(worse),
        (likelihood > 0.99) | (likelihood < 0.01),
    )
    sums = (value.detach().sum(dtype=margin.dtype) for value in values)
    return dict(zip(PREFERENCE_TERMS, sums, strict=True))
