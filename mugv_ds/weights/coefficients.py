"""Coefficients with which stored weights make an average.

The fit of power-function profiles is that of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", section 3.2 and appendix C (equation 151, algorithm 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mugv_ds.config.power_profile import exponent


def decay_coefficients(count: int, gamma: float) -> list[float]:
    """Returns γ^(N−i) / Σ γ^(N−i) for i = 1 … N: a checkpoint weighs γ times what the one after it does."""
    powers = [gamma ** (count - i) for i in range(1, count + 1)]
    return [power / sum(powers) for power in powers]


@dataclass(frozen=True)
class Fit:
    """The combination of stored profiles that fits a wanted one.

    Attributes:
        coefficients: one for each stored profile; their sum is 1.
        error: L2 distance of the combination from the wanted profile, relative to the norm of the latter.
    """

    coefficients: list[float]
    error: float


def fit_profile(stored: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> Fit:
    """Finds the least-squares combination of stored power-function profiles that is nearest to the wanted one.

    As in the authors' code, the coefficients are scaled to sum to 1, so that equal weights average to themselves. Those
    that together are below fp32's resolution are set to 0, so that their checkpoints need not be read.

    Args:
        stored: (step, σ_rel) of each average at hand.
        step, sigma_rel: those of the wanted average; no stored step is later.
    """
    times = np.array([t for t, _ in stored] + [step], dtype=np.float64) / step
    gammas = np.array([exponent(sigma) for _, sigma in stored] + [exponent(sigma_rel)])
    products = _inner_products(times, gammas)
    norms = np.sqrt(products.diagonal())
    cosines = products / np.outer(norms, norms)
    # The normal equations are solved by least squares, because profiles of neighbouring steps are nearly the same.
    solution, *_ = np.linalg.lstsq(cosines[:-1, :-1], cosines[:-1, -1])
    coefficients = solution * norms[-1] / norms[:-1]
    coefficients[np.abs(coefficients) < np.finfo(np.float32).eps / len(stored)] = 0
    coefficients /= coefficients.sum()
    difference = np.append(coefficients * norms[:-1] / norms[-1], -1)
    error = np.sqrt(max(difference @ cosines @ difference, 0.0))  # rounding may leave −1e-16 of 0
    return Fit(coefficients.tolist(), float(error))


def _inner_products(times: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """Returns ∫ p_a(τ) p_b(τ) dτ of all pairs of profiles, p(τ) = (γ + 1) / t · (τ / t)^γ on [0, t] and 0 beyond."""
    earlier, later = np.minimum.outer(times, times), np.maximum.outer(times, times)
    later_gamma = np.where(times[:, None] <= times, gammas, gammas[:, None])
    scale = np.outer(gammas + 1, gammas + 1) / (np.add.outer(gammas, gammas) + 1)
    return scale * (earlier / later) ** later_gamma / later
