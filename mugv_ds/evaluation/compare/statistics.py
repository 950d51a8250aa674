"""What votes say and how sure one may be: pure functions of counts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_Z = 1.959963984540054  # quantile of the normal distribution at 97.5%
_MOST_STEPS = 100_000
_CONVERGED = 1e-10


def sign_test(first: int, second: int) -> float:
    """Returns the two-sided p-value of the exact sign test: how likely counts as uneven are if both are as likely.

    It is min(1, 2·P(X ≥ max)) for X of the binomial distribution with n = first + second and 1/2 (Conover 1999,
    Practical Nonparametric Statistics, section 3.4). Ties do not count.
    """
    n, most = first + second, max(first, second)
    tail = term = 1  # the binomial coefficients from n over n down to n over most, exact
    for k in range(n, most, -1):
        term = term * k // (n - k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """Returns the 95% score interval of a share (Wilson 1927); from 0 to 1 where there is nothing to count."""
    if not n:
        return 0.0, 1.0
    share, z2 = successes / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)


@dataclass(frozen=True)
class Strengths:
    """Strengths of the Bradley–Terry model, natural logarithms with mean 0.

    Attributes:
        strength: float64 [k]. error: standard errors of each from the mean, float64 [k].
        covariance: float64 [k, k]. regularised: whether half a win was added to each side of every pair.
    """

    strength: np.ndarray
    error: np.ndarray
    covariance: np.ndarray
    regularised: bool

    def interval(self, i: int) -> tuple[float, float]:
        """Returns the 95% interval of one strength, by the normal approximation."""
        reach = _Z * self.error[i]
        return float(self.strength[i] - reach), float(self.strength[i] + reach)


def bradley_terry(wins: np.ndarray) -> Strengths:
    """Fits P(i beats j) = πᵢ / (πᵢ + πⱼ) (Bradley and Terry 1952) by the MM algorithm of Hunter (2004, section 3).

    The likelihood has a maximum only if, however the k are split in two groups, some of each group has beaten some of
    the other (Ford 1957). Where that fails, half a win is added to both sides of every pair that met, as in the
    logit of Haldane (1955) and Anscombe (1956), and to every pair if those that met do not connect all.
    Covariances are the pseudo-inverse of the Fisher information, which is singular along the mean.

    Args:
        wins: how often i beat j, float64 [k, k], a tie as half a win of both; the diagonal is ignored.
    """
    wins = np.array(wins, np.float64)
    np.fill_diagonal(wins, 0.0)
    regularised = not _strongly_connected(wins > 0)
    if regularised:
        met = (wins + wins.T) > 0
        wins += 0.5 * (met if _strongly_connected(met) else ~np.eye(len(wins), dtype=bool))
    games, won = wins + wins.T, wins.sum(axis=1)
    strength = np.zeros(len(wins))
    for _ in range(_MOST_STEPS):
        power = np.exp(strength)
        following = np.log(won / (games / (power[:, None] + power[None, :])).sum(axis=1))  # Hunter's eq. 3
        following -= following.mean()
        moved, strength = np.abs(following - strength).max(), following
        if moved < _CONVERGED:
            break
    chance = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
    weight = games * chance * (1 - chance)
    information = np.diag(weight.sum(axis=1)) - weight
    covariance = np.linalg.pinv(information, hermitian=True)
    return Strengths(strength, np.sqrt(np.diag(covariance)), covariance, regularised)


def _strongly_connected(edges: np.ndarray) -> bool:
    """Tells whether every one of k reaches every other along edges, bool [k, k]."""
    reach = edges | np.eye(len(edges), dtype=bool)
    for _ in range(len(edges).bit_length()):
        reach = (reach.astype(np.int64) @ reach) > 0
    return bool(reach.all())


def cohen_kappa(pairs: Iterable[tuple[str, str]]) -> float | None:
    """Returns the agreement of two raters beyond chance, (pₒ − pₑ) / (1 − pₑ) (Cohen 1960).

    Args:
        pairs: what the two say of each item that both rated.

    Returns:
        At most 1; None where there is no such item, or chance alone would make all agree.
    """
    pairs = list(pairs)
    if not pairs:
        return None
    firsts, seconds = ([pair[side] for pair in pairs] for side in (0, 1))
    observed = sum(one == other for one, other in pairs) / len(pairs)
    expected = sum(firsts.count(value) * seconds.count(value) for value in set(firsts)) / len(pairs) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(ratings: Sequence[Sequence[int]]) -> float | None:
    """Returns the agreement of several raters beyond chance (Fleiss 1971).

    Args:
        ratings: how many raters gave each of the categories, int [items, categories], with one sum ≥ 2 for all items.

    Returns:
        At most 1; None where there is no item, or chance alone would make all agree.
    """
    counts = np.asarray(ratings, np.float64)
    if not len(counts):
        return None
    raters = counts[0].sum()
    observed = ((counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))).mean()
    expected = ((counts.sum(axis=0) / counts.sum()) ** 2).sum()
    return None if expected == 1 else float((observed - expected) / (1 - expected))


def krippendorff_alpha(ratings: Sequence[Sequence[int]]) -> float | None:
    """Returns Krippendorff's alpha of categories, 1 − Dₒ/Dₑ; raters may have left out items (Krippendorff 2011).

    Args:
        ratings: how many raters gave each of the categories, int [items, categories]; items with fewer than two are
            ignored.

    Returns:
        At most 1; None where no item has two, or all raters always say the same.
    """
    counts = np.asarray([row for row in ratings if sum(row) >= 2], np.float64)
    if not len(counts):
        return None
    raters, totals = counts.sum(axis=1), counts.sum(axis=0)
    n = totals.sum()
    observed = ((raters**2 - (counts**2).sum(axis=1)) / (raters - 1)).sum() / n
    expected = (n**2 - (totals**2).sum()) / (n * (n - 1))
    return None if expected == 0 else float(1 - observed / expected)
