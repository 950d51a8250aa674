"""Preference objectives on flow losses: DPO on pairs, KTO on single samples that are labelled good or bad.

ℓ is a sample's flow loss under the policy and ℓ_ref under the frozen reference, for the same timestep and noise; the
two samples of a pair share them too. A sample's implicit reward is ℓ_ref − ℓ, times β/2 in DPO and β in KTO. Whether ℓ
is a mean over the elements or a sum is the caller's choice: β in the thousands goes with means, in the hundreds with
sums.

DPO: Wallace et al. 2024 (Diffusion-DPO), for rectified flow Liu et al. 2025 (Flow-DPO), here with a constant β.
KTO: Ethayarajh et al. 2024, for diffusion Li et al. 2024 (Diffusion-KTO).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """−log σ(−β/2·[(ℓ(w) − ℓ_ref(w)) − (ℓ(l) − ℓ_ref(l))]) for each pair of a better w and a worse l, [pairs].

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
    """λ·[1 − σ(s·β·(g − z))] for each sample, with g = ℓ_ref − ℓ and s = 1 for good samples, −1 for bad ones.

    Args:
        loss: ℓ, fp32 [B]. reference: ℓ_ref [B], without gradient. good: bool [B].
        beta: β > 0. kl_reference_point: z, see `kl_reference_point`. good_weight, bad_weight: λ.

    Returns:
        [B].
    """
    margin = _kto_margin(loss, reference, good, beta, kl_reference_point)
    doubt = torch.sigmoid(-margin)  # σ(−x) is 1 − σ(x) without rounding to 0
    return torch.where(good, good_weight * doubt, bad_weight * doubt)


def kl_reference_point(gains: Tensor) -> Tensor:
    """KTO's z = max(0, mean of g), a scalar without gradient: how far the policy has moved from the reference.

    Args:
        gains: g = ℓ_ref − ℓ of all samples of the global batch, good and bad, any shape but empty.
    """
    return gains.detach().mean().clamp(min=0)


def dpo_terms(better: Tensor, worse: Tensor, better_ref: Tensor, worse_ref: Tensor, beta: float) -> dict[str, Tensor]:
    """What a run reports of DPO, summed over the pairs, without gradient; arguments as those of `dpo_loss`.

    Keyed by `PREFERENCE_TERMS`, in that order. The margin is the difference of the implicit rewards, the argument of σ.

    Returns:
        count: pairs.
        correct: pairs with a margin above 0: the better one has the higher implicit reward.
        margin: their margins.
        better_loss, worse_loss, better_reference, worse_reference: ℓ(w), ℓ(l), ℓ_ref(w), ℓ_ref(l).
        better_count, worse_count: terms of these sums.
        saturated: pairs with σ(margin) outside [0.01, 0.99]. At the upper end the gradient is below 1% of its bound; at
            the lower end it is at its bound, and the policy is far from the preference.
    """
    return _terms(_dpo_margin(better, worse, better_ref, worse_ref, beta), better, worse, better_ref, worse_ref)


def kto_terms(
    loss: Tensor, reference: Tensor, good: Tensor, beta: float, kl_reference_point: Tensor
) -> dict[str, Tensor]:
    """What a run reports of KTO, summed over the samples, without gradient; arguments as those of `kto_loss`.

    The same names as `dpo_terms`, with good samples for better and bad ones for worse; their counts differ. The margin
    is s·β·(g − z), so that good samples with g above z and bad ones with g below it are correct. At both ends a
    saturated sample's gradient is below 1% of λ·β: it hardly moves the policy any more.
    """
    margin = _kto_margin(loss, reference, good, beta, kl_reference_point)
    return _terms(margin, loss[good], loss[~good], reference[good], reference[~good])


def _dpo_margin(better: Tensor, worse: Tensor, better_ref: Tensor, worse_ref: Tensor, beta: float) -> Tensor:
    """Difference of implicit rewards [pairs]."""
    return beta / 2 * ((better_ref - better) - (worse_ref - worse))


def _kto_margin(loss: Tensor, reference: Tensor, good: Tensor, beta: float, kl_reference_point: Tensor) -> Tensor:
    """s·β·(g − z) [B]."""
    margin = beta * (reference - loss - kl_reference_point)
    return torch.where(good, margin, -margin)


def _terms(margin: Tensor, better: Tensor, worse: Tensor, better_ref: Tensor, worse_ref: Tensor) -> dict[str, Tensor]:
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
