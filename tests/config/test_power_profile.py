"""The profile's exponent and width against each other and the paper; names of averages."""

import pytest

from mugv_ds.config.power_profile import MAX_SIGMA_REL, exponent, kind_name, kind_sigma_rel


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_of_the_paper(sigma_rel, gamma):
    assert exponent(sigma_rel) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("gamma", [1e-3, 0.5, 1, 7, 17, 1000])
def test_the_width_of_the_profile_gives_its_exponent(gamma):
    """The profile is a beta distribution with parameters (γ + 1, 1); its variance is in every table."""
    variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
    assert exponent(variance**0.5) == pytest.approx(gamma, rel=1e-9)


def test_the_widest_profile_is_the_mean_of_all_steps():
    assert exponent(MAX_SIGMA_REL) == pytest.approx(0, abs=1e-9)


def test_names_lead_back_to_the_width():
    assert kind_name(0.05) == "ema_0.050"
    assert kind_sigma_rel(kind_name(0.123)) == 0.123
    assert [kind_sigma_rel(kind) for kind in ("weight", "exp_avg", "ema_0.05", "ema_0.0500", "xema_0.050")] == [
        None
    ] * 5
