"""Averages made after training: the fit against quadrature and tracked averages, the sums against closed forms."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mugv_ds.config import InputError
from mugv_ds.config.power_profile import exponent, kind_name
from mugv_ds.engine.ema import PowerEma
from mugv_ds.weights.average import Average, Term, ensemble, reconstruct
from mugv_ds.weights.coefficients import decay_coefficients, fit_profile

SIGMAS = (0.05, 0.10)


class Memory:
    """A checkpoint in memory."""

    def __init__(self, step: int, kinds: dict[str, dict[str, torch.Tensor]]) -> None:
        self.folder = Path(f"run/step-{step:08d}")
        self.manifest = SimpleNamespace(step=step, kinds=list(kinds), text_encoder=None)
        self._tensors = kinds

    def names(self):
        return self._tensors["weight"].keys()

    def shape(self, name):
        return self._tensors["weight"][name].shape

    def read(self, name, kind):
        return self._tensors[kind][name]


def grid(steps: int, count: int) -> list[tuple[int, float]]:
    return [(steps * (i + 1) // count, sigma) for i in range(count) for sigma in SIGMAS]


@pytest.mark.parametrize("count", [1, 4, 40, 400])
@pytest.mark.parametrize("sigma_rel", SIGMAS)
def test_a_stored_profile_is_found_again(count, sigma_rel):
    stored = grid(100_000, count)
    fit = fit_profile(stored, 100_000, sigma_rel)
    wanted = [float(profile == (100_000, sigma_rel)) for profile in stored]
    assert fit.coefficients == pytest.approx(wanted, abs=1e-6)
    assert fit.error < 1e-7


@pytest.mark.parametrize("sigma_rel", [0.03, 0.08, 0.2])
def test_the_fit_is_the_least_squares_one(sigma_rel):
    """Against the profiles themselves on a fine grid, where least squares needs no formula for their products."""
    stored = grid(1000, 5)
    tau = (np.arange(400_000) + 0.5) / 400

    def profile(t, sigma):
        gamma = exponent(sigma)
        return np.where(tau <= t, (gamma + 1) / t * np.minimum(tau / t, 1) ** gamma, 0)

    columns, wanted = np.stack([profile(*p) for p in stored], axis=1), profile(1000, sigma_rel)
    solution, *_ = np.linalg.lstsq(columns, wanted)
    solution /= solution.sum()
    fit = fit_profile(stored, 1000, sigma_rel)
    assert fit.coefficients == pytest.approx(solution.tolist(), abs=1e-4)
    assert fit.error == pytest.approx(np.linalg.norm(columns @ solution - wanted) / np.linalg.norm(wanted), rel=1e-4)


@pytest.mark.parametrize(
    ("stored", "sigma_rel", "error"),
    [
        *((grid(100_000, 16), sigma, 0.01) for sigma in (0.04, 0.08, 0.12, 0.15)),
        *((grid(100_000, 8), sigma, 0.03) for sigma in (0.04, 0.08, 0.12, 0.15)),
        ([(step, sigma) for step in (99_800, 99_900, 100_000) for sigma in SIGMAS], 0.08, 0.05),
        ([(step, sigma) for step in (99_800, 99_900, 100_000) for sigma in SIGMAS], 0.15, 0.25),
    ],
)
def test_errors_are_those_that_the_readme_gives(stored, sigma_rel, error):
    assert fit_profile(stored, 100_000, sigma_rel).error <= 1.15 * error


def test_what_fp32_cannot_show_is_not_read():
    coefficients = fit_profile(grid(100_000, 40), 100_000, 0.07).coefficients
    assert sum(coefficients) == pytest.approx(1, abs=1e-12)
    assert coefficients[0] == 0 and coefficients[-1] != 0


def random_walk(steps: int, every: int, tracked: float) -> tuple[list[Memory], torch.Tensor]:
    """Checkpoints of a noisy trajectory, and its directly tracked average."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.zeros(1000)
    ema = PowerEma([weights], [*SIGMAS, tracked])
    kept = []
    for step in range(1, steps + 1):
        weights.add_(torch.randn(1000, generator=generator))
        ema.update(step)
        if step % every == 0:
            kinds = {kind_name(sigma): {"w": ema.averages[kind_name(sigma)][0].clone()} for sigma in SIGMAS}
            kept.append(Memory(step, {"weight": {"w": weights.clone()}} | kinds))
    return kept, ema.averages[kind_name(tracked)][0]


@pytest.mark.parametrize(("sigma_rel", "bound"), [(0.08, 1e-4), (0.15, 3e-4), (0.03, 2e-3)])
def test_a_width_that_was_not_stored_is_close_to_the_tracked_one(sigma_rel, bound):
    """Relative distance on a random walk, 20 checkpoints; seen 4.0e-5, 1.4e-4 and 8.6e-4.

    That of the last weights, which are no average at all, was 0.23, 0.36 and 0.13.
    """
    kept, tracked = random_walk(4000, 200, sigma_rel)
    average, fit = reconstruct(kept, sigma_rel, torch.float32)
    error = float((average["w"] - tracked).norm() / tracked.norm())
    trivial = float((kept[-1].read("w", "weight") - tracked).norm() / tracked.norm())
    assert fit.error < 0.03
    assert error < bound < trivial / 50


def test_a_stored_width_is_returned_as_it_is():
    kept, _ = random_walk(400, 100, 0.08)
    average, fit = reconstruct(kept[::-1], 0.1, torch.float32)
    assert torch.equal(average["w"], kept[-1].read("w", "ema_0.100")) and fit.error < 1e-7
    assert json.loads(average.recipe()) == [
        {"checkpoint": "run/step-00000400", "step": 400, "kind": "ema_0.100", "coefficient": pytest.approx(1)}
    ]


def test_ensemble_of_exponentially_changing_weights():
    """θ_i = r^i: Σ γ^(N−i) r^i / Σ γ^(N−i) is a quotient of two geometric series."""
    gamma, ratio, count = 0.9, 1.1, 7
    checkpoints = [Memory(10 * i, {"weight": {"w": torch.full((2, 3), ratio**i)}}) for i in range(1, count + 1)]
    expected = ratio * (ratio**count - gamma**count) / (ratio - gamma) * (1 - gamma) / (1 - gamma**count)
    average = ensemble(checkpoints[::-1], gamma, torch.float32)
    torch.testing.assert_close(average["w"], torch.full((2, 3), expected))
    assert decay_coefficients(4, 1.0) == [0.25] * 4
    steps = [(part["step"], part["kind"]) for part in json.loads(average.recipe())]
    assert steps == [(10 * i, "weight") for i in range(1, count + 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_come_in_the_dtype_that_was_announced(dtype):
    average = ensemble([Memory(1, {"weight": {"w": torch.ones(2)}})], 0.9, dtype)
    assert average.meta("w").dtype == average["w"].dtype == dtype and average.meta("w").shape == (2,)


def plain(step: int, **tensors: torch.Tensor) -> Memory:
    return Memory(step, {"weight": tensors})


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: ensemble([plain(1, w=torch.ones(2)), plain(2, w=torch.ones(3))], 0.9, torch.float32),
         r"step-00000002: w is \[3\], in run/step-00000001 it is \[2\]"),
        (lambda: ensemble([plain(1, w=torch.ones(2)), plain(2, v=torch.ones(2))], 0.9, torch.float32),
         r"step-00000002: w is missing, in run/step-00000001 it is \[2\]"),
        (lambda: ensemble([plain(1, w=torch.ones(2)), plain(1, w=torch.ones(2))], 0.9, torch.float32), "of step 1, as"),
        (lambda: ensemble([plain(1, w=torch.ones(2))], 1.5, torch.float32), "at most 1"),
        (lambda: reconstruct([plain(1, w=torch.ones(2))], 0.3, torch.float32), "below 0.2887"),
        (lambda: reconstruct([plain(1, w=torch.ones(2))], 0.08, torch.float32), "step-00000001: holds no averages"),
    ],
)  # fmt: skip
def test_what_cannot_be_averaged_is_named(make, complaint):
    with pytest.raises(InputError, match=complaint):
        make()


def test_coefficients_that_cancel_lose_nothing():
    """Summed in fp64: in fp32, 1e8 + 1 − 1e8 would be 0."""
    terms = [
        Term(plain(i, w=torch.full((1,), value)), "weight", c)
        for i, (value, c) in enumerate([(1e8, 1.0), (1.0, 1.0), (1e8, -1.0)])
    ]
    assert Average(terms, torch.float32)["w"].item() == 1.0
