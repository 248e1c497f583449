"""Parabolas and power laws against published points, whose fits were computed by other code."""

import dataclasses

import numpy as np
import pytest

from llm.scaling.isoflop import fit_isoflop, fit_parabola, fit_power_law
from tests.llm.scaling import published_points as data


@pytest.mark.parametrize(
    ("family", "sizes", "minima"),
    [
        (
            "arm",
            [111.2, 156.8, 219.0, 385.0, 572.2, 801.7, 1220],
            [3.3975, 3.2465, 3.1530, 2.9737, 2.8933, 2.7886, 2.6258],
        ),
        (
            "mdm",
            [55.1, 75.6, 97.2, 181.8, 239.3, 411.6, 734.0],
            [3.9595, 3.7911, 3.6807, 3.4546, 3.3852, 3.2940, 3.0810],
        ),
    ],
)
def test_parabolas_of_the_published_points_have_the_known_minima(family, sizes, minima) -> None:
    fit = fit_isoflop(data.published(family))
    assert [p.budget for p in fit.parabolas] == data.BUDGETS.tolist()
    assert [p.parameters / 1e6 for p in fit.parabolas] == pytest.approx(sizes, rel=0.005)
    assert [p.loss for p in fit.parabolas] == pytest.approx(minima, abs=0.00006)
    assert all(p.tokens == pytest.approx(p.budget / (6 * p.parameters), rel=1e-9) for p in fit.parabolas)


@pytest.mark.parametrize(
    ("family", "size", "scale", "token", "loss"),
    [("arm", 0.535, 0.01451, 0.465, -0.0547), ("mdm", 0.567, 0.001679, 0.433, -0.0527)],
)
def test_power_laws_of_the_published_points_have_the_known_exponents(family, size, scale, token, loss) -> None:
    fit = fit_isoflop(data.published(family))
    assert fit.parameters and fit.tokens and fit.loss
    assert fit.parameters.exponent == pytest.approx(size, abs=0.0006)
    assert fit.parameters.coefficient == pytest.approx(scale, rel=0.0005)
    assert fit.tokens.exponent == pytest.approx(token, abs=0.0006)
    assert fit.loss.exponent == pytest.approx(loss, abs=0.00006)


def test_power_laws_through_the_retracted_minima_have_the_known_exponents() -> None:
    size = fit_power_law(data.BUDGETS, data.JOINT_NO_LIKELIHOOD_SIZES)
    tokens = fit_power_law(data.BUDGETS, data.BUDGETS / (6 * data.JOINT_NO_LIKELIHOOD_SIZES))
    assert (size.exponent, size.coefficient) == (pytest.approx(0.545, abs=0.0006), pytest.approx(0.003805, rel=0.02))
    assert tokens.exponent == pytest.approx(0.455, abs=0.0006)
    assert fit_power_law(data.BUDGETS, data.JOINT_NO_LIKELIHOOD_MINIMA).exponent == pytest.approx(-0.0657, abs=0.0001)


def test_the_joint_loss_cannot_be_fitted() -> None:
    with pytest.raises(TypeError, match="loss_ce_joint bounds no likelihood"):
        dataclasses.replace(data.published("mdm"), estimate="loss_ce_joint")


def test_an_exact_parabola_is_recovered_and_its_flaws_are_named() -> None:
    sizes = np.array([1e6, 3e6, 1e7, 2e7])
    x = np.log10(sizes)
    fit = fit_parabola(sizes, 1e18 / sizes, 0.2 * (x - 6.6) ** 2 + 3, budget=6e18)
    assert (np.log10(fit.parameters), fit.loss) == (pytest.approx(6.6), pytest.approx(3))
    assert fit.flaw is None and fit.coefficients == pytest.approx((0.2, -2.64, 11.712))
    outside = fit_parabola(sizes, 1e18 / sizes, 0.2 * (x - 8) ** 2 + 3, budget=6e18)
    assert outside.flaw == "extrapolated" and np.log10(outside.parameters) == pytest.approx(8)
    assert fit_parabola(sizes, 1e18 / sizes, -0.2 * (x - 6.6) ** 2 + 3, budget=6e18).flaw == "not convex"


def test_a_flawed_budget_or_one_of_two_sizes_takes_no_part_in_the_laws() -> None:
    points = data.published("arm")
    rows = (points.budgets > 3e18) | (points.parameters > 200e6)  # the first budget keeps its rising branch only
    fields = ("budgets", "parameters", "tokens", "flops", "loss", "standard_error")

    def take(rows):
        return dataclasses.replace(points, **{name: getattr(points, name)[rows] for name in fields})

    fit = fit_isoflop(take(rows))
    assert fit.parabolas[0].flaw and len(fit.sound) == 6 and fit.parameters is not None
    few = fit_isoflop(take((points.budgets == 3e18) & (points.parameters < 60e6)))
    assert few.parabolas == () and few.loss is None
