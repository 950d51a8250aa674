"""Every statistic against a published worked example, and at its limits."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from mugv_ds.evaluation.compare.statistics import (
    bradley_terry,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    sign_test,
    wilson_interval,
)

TEAMS = ("Milwaukee", "Detroit", "Toronto", "New York", "Boston", "Cleveland", "Baltimore")
# American League 1987, row beat column (Agresti 2002, Categorical Data Analysis, table 10.10).
BASEBALL = np.array(
    [
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
)


def test_sign_test_of_zar():
    """Zar, Biostatistical Analysis, example 24.11: of ten deer eight have longer hind legs; P = 0.10937."""
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(0.109375, abs=1e-12)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (9, 31), (300, 700)])
def test_sign_test_is_the_binomial_sum(first, second):
    n = first + second
    tail = Fraction(sum(comb(n, k) for k in range(max(first, second), n + 1)), 2**n)
    assert sign_test(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_newcombe(successes, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_bradley_terry_of_agresti():
    """Strengths and errors against Baltimore, as the vignette of R's BradleyTerry2 prints them for the same games."""
    fit = bradley_terry(BASEBALL)
    expected = {
        "Boston": (1.1077, 0.3339),
        "Cleveland": (0.6839, 0.3319),
        "Detroit": (1.4364, 0.3396),
        "Milwaukee": (1.5814, 0.3433),
        "New York": (1.2476, 0.3359),
        "Toronto": (1.2945, 0.3367),
    }
    last = len(TEAMS) - 1
    for team, (strength, error) in expected.items():
        i = TEAMS.index(team)
        variance = fit.covariance[i, i] + fit.covariance[last, last] - 2 * fit.covariance[i, last]
        assert fit.strength[i] - fit.strength[last] == pytest.approx(strength, abs=1e-4)
        assert variance**0.5 == pytest.approx(error, abs=1e-4)
    assert fit.strength.mean() == pytest.approx(0, abs=1e-12) and not fit.regularised
    low, high = fit.interval(0)
    assert high - low == pytest.approx(2 * 1.96 * fit.error[0], rel=1e-4)


def test_bradley_terry_of_two_is_the_logit():
    fit = bradley_terry(np.array([[0, 30], [10, 0]]))
    assert fit.strength[0] - fit.strength[1] == pytest.approx(np.log(3))
    assert fit.covariance[0, 0] * 4 == pytest.approx(1 / 30 + 1 / 10)  # the difference is twice the strength


@pytest.mark.parametrize(
    "wins",
    [
        [[0, 10], [0, 0]],  # one always wins
        [[0, 3, 5], [2, 0, 4], [0, 0, 0]],  # one never does
        [[0, 3, 0], [2, 0, 0], [0, 0, 0]],  # one never met the others
        [[0, 0], [0, 0]],
    ],
)
def test_bradley_terry_stays_finite_where_the_likelihood_has_no_maximum(wins):
    fit = bradley_terry(np.array(wins))
    assert fit.regularised and np.isfinite(fit.strength).all() and np.isfinite(fit.error).all()
    if wins[0][1] == 10:
        assert fit.strength[0] - fit.strength[1] == pytest.approx(np.log(10.5 / 0.5))


def test_cohen_kappa_of_a_2_by_2_table():
    """The table of 50 grant proposals (20 yes–yes, 5 yes–no, 10 no–yes, 15 no–no) of which κ is 0.4."""
    pairs = [("yes", "yes")] * 20 + [("yes", "no")] * 5 + [("no", "yes")] * 10 + [("no", "no")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([]) is None and cohen_kappa([("yes", "yes")] * 3) is None


def test_fleiss_kappa_of_fourteen_raters():
    """Ten subjects, fourteen raters, five categories: κ = 0.210 (the example of Wikipedia's article on the measure)."""
    counts = [
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
    assert fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([]) is None and fleiss_kappa([[3, 0], [3, 0]]) is None


def test_alpha_of_krippendorff():
    """Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, example C: 4 observers, 12 units, 0.743."""
    said = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    counts = [[sum(row[unit] == value for row in said) for value in "12345"] for unit in range(12)]
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([]) is None and krippendorff_alpha([[1, 0]]) is None
    assert krippendorff_alpha([[2, 0], [2, 0]]) is None and krippendorff_alpha([[2, 0], [0, 2]]) == 1
