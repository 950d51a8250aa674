"""With what coefficients stored weights make an average.

Source of the fit: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.2
and appendix C (equation 151, algorithm 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mugv_ds.config.power_profile import exponent


def decay_coefficients(count: int, gamma: float) -> list[float]:
    """γ^(N−i) / Σ γ^(N−i) for i = 1 … N: a checkpoint weighs γ times what the one after it does."""
    powers = [gamma ** (count - i) for i in range(1, count + 1)]
    return [power / sum(powers) for power in powers]


@dataclass(frozen=True)
class Fit:
    """How stored profiles combine to a wanted one.

    Attributes:
        coefficients: one for each stored profile; their sum is 1.
        error: L2 distance of the combination to the wanted profile, relative to the norm of the latter.
    """

    coefficients: list[float]
    error: float


def fit_profile(stored: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> Fit:
    """The least-squares combination of stored power-function profiles that is nearest to the one wanted.

    As the authors' code does, the coefficients are scaled to the sum of 1, so that equal weights average to themselves.
    Those that together are below fp32's resolution are set to 0, so that their checkpoints need not be read.

    Args:
        stored: (step, σ_rel) of each average at hand.
        step, sigma_rel: of the average that is wanted.
    """
    times = np.array([t for t, _ in stored] + [step], dtype=np.float64) / step
    gammas = np.array([exponent(sigma) for _, sigma in stored] + [exponent(sigma_rel)])
    products = _inner_products(times, gammas)
    norms = np.sqrt(products.diagonal())
    cosines = products / np.outer(norms, norms)
    # Least squares again, and not a plain solve, because profiles of neighbouring steps are nearly the same.
    solution, *_ = np.linalg.lstsq(cosines[:-1, :-1], cosines[:-1, -1])
    coefficients = solution * norms[-1] / norms[:-1]
    coefficients[np.abs(coefficients) < np.finfo(np.float32).eps / len(stored)] = 0
    coefficients /= coefficients.sum()
    difference = np.append(coefficients * norms[:-1] / norms[-1], -1)
    error = np.sqrt(max(difference @ cosines @ difference, 0.0))  # rounding may leave −1e-16 of 0
    return Fit(coefficients.tolist(), float(error))


def _inner_products(times: np.ndarray, gammas: np.ndarray) -> np.ndarray:
    """∫ p_a(τ) p_b(τ) dτ of all pairs of profiles, where p(τ) = (γ + 1) / t · (τ / t)^γ on [0, t], and 0 beyond."""
    earlier, later = np.minimum.outer(times, times), np.maximum.outer(times, times)
    later_gamma = np.where(times[:, None] <= times, gammas, gammas[:, None])
    scale = np.outer(gammas + 1, gammas + 1) / (np.add.outer(gammas, gammas) + 1)
    return scale * (earlier / later) ** later_gamma / later
