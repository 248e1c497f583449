"""The Chinchilla surface: gradients, known answers, and the published fit that never left its start."""

import numpy as np
import pytest

from llm.scaling.surface import DELTA, Surface, allocate, draw_starts, fit_surface, huber_objective
from tests.llm.scaling.published_points import published

BUDGET = 2.887e20


def grid() -> tuple[np.ndarray, np.ndarray]:
    budgets = np.repeat([1e18, 1e19, 1e20, 1e21], 6)
    sizes = budgets**0.5 * 0.03 * np.tile(np.geomspace(0.2, 5, 6), 4)
    return sizes, budgets / (6 * sizes)


def test_the_gradient_equals_finite_differences_on_both_sides_of_hubers_threshold() -> None:
    sizes, tokens = grid()
    loss = 1.7 + 400 * sizes**-0.34 + 410 * tokens**-0.28
    logs = np.log(sizes), np.log(tokens), np.log(loss)
    for scale in (1e-5, 1e-2):
        centre = np.array([*np.log([1.7, 400, 410]), 0.34, 0.28])
        theta = centre + scale * np.array([1.0, -2.0, 1.5, 0.1, -0.1])
        value, gradient = huber_objective(theta, *logs)
        steps = 1e-7 * np.eye(5)
        numeric = [(huber_objective(theta + h, *logs)[0] - huber_objective(theta - h, *logs)[0]) / 2e-7 for h in steps]
        assert value > 0
        assert gradient == pytest.approx(numeric, rel=1e-5, abs=1e-10)


def test_hubers_loss_is_quadratic_below_and_linear_above_its_threshold() -> None:
    theta, one = np.array([0.0, -50, -50, 0, 0]), np.zeros(1)  # L = 1
    for residual in (0.5 * DELTA, 3 * DELTA):
        value, _ = huber_objective(theta, one, one, np.array([-residual]))
        expected = residual**2 / 2 if residual < DELTA else DELTA * (residual - DELTA / 2)
        assert value == pytest.approx(expected, rel=1e-9)


def test_a_synthetic_surface_is_recovered() -> None:
    sizes, tokens = grid()
    loss = 1.8 + 300 * sizes**-0.32 + 1500 * tokens**-0.36
    fit = fit_surface(sizes, tokens, loss)
    found = [fit.irreducible, fit.size_scale, fit.token_scale, fit.size_exponent, fit.token_exponent]
    assert found == pytest.approx([1.8, 300, 1500, 0.32, 0.36], rel=0.02)
    assert fit.flaw is None and fit.starts == 300


@pytest.mark.parametrize(
    ("family", "surface", "objective", "allocation"),
    [
        ("arm", (2.029, 197.5, 1096, 0.3034, 0.3341), 3.288e-4, (1206e6, 39.9e9)),
        ("mdm", (2.427, 366, 1969, 0.3467, 0.3411), 4.452e-4, (512e6, 93.9e9)),
    ],
)
def test_the_converged_fit_of_the_published_points_is_the_known_one(family, surface, objective, allocation) -> None:
    points = published(family)
    fit = fit_surface(points.parameters, points.tokens, points.loss)
    assert fit.flaw is None and fit.starts == 300 and fit.reached > 100
    assert fit.objective == pytest.approx(objective, rel=2e-4)
    assert (fit.irreducible, fit.size_scale, fit.token_scale) == pytest.approx(surface[:3], rel=1e-3)
    assert (fit.size_exponent, fit.token_exponent) == pytest.approx(surface[3:], abs=1e-4)
    best = allocate(fit, BUDGET)
    assert (best.parameters, best.tokens) == pytest.approx(allocation, rel=2e-3)


@pytest.mark.parametrize(
    ("family", "surface", "objective", "allocation"),
    [
        ("arm", (1.9649, 0.3466, 0.2803), 3.510e-4, (886e6, 54.3e9)),
        ("mdm", (2.2314, 0.3530, 0.2608), 4.900e-4, (378e6, 127.5e9)),
    ],
)
def test_the_official_fit_stays_at_its_start_and_is_called_not_converged(
    family, surface, objective, allocation
) -> None:
    points = published(family)
    fit = fit_surface(points.parameters, points.tokens, points.loss, method="official")
    assert (fit.size_scale, fit.token_scale) == pytest.approx((400, 400), abs=0.005)
    assert (fit.irreducible, fit.size_exponent, fit.token_exponent) == pytest.approx(surface, abs=6e-5)
    assert fit.objective == pytest.approx(objective, rel=2e-4)
    best = allocate(fit, BUDGET)
    assert (best.parameters, best.tokens) == pytest.approx(allocation, rel=3e-3)
    assert fit.flaw and "not converged" in fit.flaw


def test_a_single_start_is_called_not_converged_wherever_it_ends() -> None:
    points = published("arm")
    start = np.array([(1.69, 400, 400, 0.34, 0.34)])
    fit = fit_surface(points.parameters, points.tokens, points.loss, starts=start)
    assert fit.flaw and fit.flaw.startswith("not converged: 1 of 1 starts")


def test_an_exponent_at_its_limit_is_a_flaw() -> None:
    terms = dict(irreducible=2.0, size_scale=1e21, token_scale=90.0, token_exponent=0.3)
    fit = Surface(**terms, size_exponent=5.0, objective=0.0, starts=9, reached=9)
    assert fit.flaw == "an exponent ran to its limit: the data do not determine it"
    assert Surface(**terms, size_exponent=0.3, objective=0.0, starts=9, reached=9).flaw is None


def test_the_allocation_is_a_minimum_and_spends_the_budget() -> None:
    surface = Surface(
        irreducible=2.0,
        size_scale=200,
        token_scale=1000,
        size_exponent=0.3,
        token_exponent=0.33,
        objective=0.0,
        starts=300,
        reached=300,
    )
    for constant in (6.0, 8.0):
        best = allocate(surface, 1e20, constant)
        assert constant * best.parameters * best.tokens == pytest.approx(1e20)
        for factor in (0.9, 1.1):
            n = best.parameters * factor
            assert surface(n, 1e20 / (constant * n)) > best.loss
    numeric = allocate(surface, 1e20, lambda n: 6.0)
    assert numeric.parameters == pytest.approx(allocate(surface, 1e20).parameters, rel=1e-3)
    dear = allocate(surface, 1e20, lambda n: 6.0 + 1e8 / n)  # small models pay for their head: larger ones are better
    assert dear.parameters > numeric.parameters


def test_starts_are_the_same_every_time_and_differ_between_seeds() -> None:
    loss = np.array([3.0, 4.0])
    assert np.array_equal(draw_starts(loss, 300, 0), draw_starts(loss, 300, 0))
    assert not np.array_equal(draw_starts(loss, 300, 0), draw_starts(loss, 300, 1))
