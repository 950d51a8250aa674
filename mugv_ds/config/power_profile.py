"""The power-function profiles of weight averages (EMA), and the names of the averages.

They are those of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1
and appendix C. The average at step t weighs the weights of step τ ≤ t by (γ + 1) / t · (τ / t)^γ. The standard
deviation of this distribution over t, σ_rel, says how long the average is, and names it.
"""

import re

import numpy as np

MAX_SIGMA_REL = 12**-0.5  # that of γ = 0, the mean of all steps
_KIND = re.compile(r"ema_(0\.\d{3})")


def exponent(sigma_rel: float) -> float:
    """Returns γ > 0 of the profile of width σ_rel in (0, 12^-½), which solves σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3))."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def kind_name(sigma_rel: float) -> str:
    """Returns the name in a checkpoint of the average of width σ_rel, a multiple of 0.001: "ema_0.050"."""
    return f"ema_{sigma_rel:.3f}"


def kind_sigma_rel(kind: str) -> float | None:
    """Returns σ_rel of a kind of tensors in a checkpoint, None if they are not an average."""
    found = _KIND.fullmatch(kind)
    return float(found[1]) if found else None
