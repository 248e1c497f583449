"""Intervals of fitted quantities by bootstrap, and ratios of compute between families at equal loss.

`parametric` adds normal noise to what was fitted (parabolas or a surface), as large as the residuals or the points'
standard errors say, whichever is more. It is the default: a curve of four sizes has no points to spare.
`case` draws points with replacement within each budget (seeds of one size are points), and draws again where fewer than
3 sizes are left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from launch import random
from launch.errors import DataError
from llm.scaling.isoflop import FEWEST, Array, IsoFlop, Points, fit_isoflop
from llm.scaling.surface import Surface, allocate, fit_surface, flops_for

Kind = Literal["parametric", "case"]
LEVEL = 0.95
USABLE = 0.5  # share of replicates that must have a value for an interval to be given


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Percentiles of the replicates around an estimate; nan where too few replicates have a value."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Compute that family B needs for the loss that family A has at `flops`, as a multiple of `flops`."""

    flops: float
    loss: float
    ratio: Interval
    extrapolated: bool  # the loss lies outside the measured minima of A or B, or an optimal size outside their sizes


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The lowest losses of a family by its surface."""

    points: Points
    surface: Surface
    cost: float | Callable[[float], float]  # FLOPs of a product N D, see `allocate`
    replicates: Sequence[Surface]


def bootstrap(
    points: Points,
    statistic: Callable[[Points], Array],
    *,
    draws: int,
    seed: int,
    kind: Kind = "parametric",
    around: Surface | None = None,
) -> Array:
    """float64 [draws, K]: `statistic` [K] of resampled points, the same for the same seed.

    Parametric noise is added to the losses of `around`, or to those of the parabolas.
    """
    source = generator(seed, "bootstrap", kind)
    if kind == "case":
        return np.stack([statistic(_resample(points, source)) for _ in range(draws)])
    fitted, sigma = noise(points, around)
    noisy = (np.maximum(fitted + sigma * source.standard_normal(len(points)), 1e-6) for _ in range(draws))
    return np.stack([statistic(replace(points, loss=loss)) for loss in noisy])


def noise(points: Points, around: Surface | None = None) -> tuple[Array, Array]:
    """Fitted losses and standard deviations [P]: all residuals pooled, or the standard error if it is larger.

    Without a surface the fits are parabolas; points of a budget that has none stand for themselves.
    """
    if around is not None:
        fitted, degrees = around(points.parameters, points.tokens), len(points) - 5
    else:
        fitted, degrees = points.loss.copy(), 0
        for parabola in fit_isoflop(points).parabolas:
            rows = points.budgets == parabola.budget
            fitted[rows] = parabola(points.parameters[rows])
            degrees += int(rows.sum()) - 3
    pooled = np.sqrt(((points.loss - fitted) ** 2).sum() / degrees) if degrees else 0.0
    return fitted, np.maximum(pooled, np.nan_to_num(points.standard_error))


def interval(estimate: float, replicates: Array, *, level: float = LEVEL) -> Interval:
    """Percentile interval of replicates [R]."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) < max(2, USABLE * len(replicates)):
        return Interval(estimate=estimate, low=float("nan"), high=float("nan"))
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=estimate, low=float(low), high=float(high))


def isoflop_values(fit: IsoFlop, budgets: Array) -> Array:
    """[3 B + 6]: N_opt, D_opt and L_min at each budget, coefficient and exponent of each law; nan where missing."""
    sound = {parabola.budget: parabola for parabola in fit.sound}
    rows = [sound.get(float(budget)) for budget in budgets]
    minima = [[getattr(row, name) if row else np.nan for row in rows] for name in ("parameters", "tokens", "loss")]
    laws = [
        value
        for law in (fit.parameters, fit.tokens, fit.loss)
        for value in ((law.coefficient, law.exponent) if law else (np.nan, np.nan))
    ]
    return np.array([*minima[0], *minima[1], *minima[2], *laws])


def surface_values(
    points: Points, around: Surface, flops: float, flops_per_product: float | Callable[[float], float]
) -> Array:
    """[8]: E, A, B, a, b of a refit that starts from `around`, then N*, D* and the predicted loss at `flops`."""
    e, size, token, a, b = (
        around.irreducible,
        around.size_scale,
        around.token_scale,
        around.size_exponent,
        around.token_exponent,
    )
    n, d = np.exp(np.log(points.parameters).mean()), np.exp(np.log(points.tokens).mean())
    # The valley is long: besides the best fit, two starts along it, with the terms unchanged at the centre of the data.
    starts = [(e, size * n**shift, token * d**-shift, a + shift, b - shift) for shift in (0.0, 0.08, -0.08)]
    usable = np.array([start for start in starts if min(start[3:]) > 0])
    fit = fit_surface(points.parameters, points.tokens, points.loss, starts=usable)
    best = allocate(fit, flops, flops_per_product)
    parameters = (fit.irreducible, fit.size_scale, fit.token_scale, fit.size_exponent, fit.token_exponent)
    return np.array([*parameters, best.parameters, best.tokens, best.loss])


def fit_frontier(
    points: Points, surface: Surface, cost: float | Callable[[float], float], *, draws: int, seed: int
) -> Frontier:
    """The surface with its bootstrap replicates."""
    flops = float(points.budgets.max())
    rows = bootstrap(points, lambda p: surface_values(p, surface, flops, cost), draws=draws, seed=seed, around=surface)
    names = ("irreducible", "size_scale", "token_scale", "size_exponent", "token_exponent")
    replicates = [replace(surface, **dict(zip(names, map(float, row[:5]), strict=True))) for row in rows]
    return Frontier(points=points, surface=surface, cost=cost, replicates=replicates)


def frontier_ratio(a: Frontier, b: Frontier, flops: float) -> Ratio:
    """C_B / C_A at the loss of A's frontier at C_A = `flops`, by the surfaces, whose losses have a floor."""
    loss = allocate(a.surface, flops, a.cost).loss
    estimate = flops_for(b.surface, loss, b.cost) / flops
    pairs = zip(a.replicates, b.replicates, strict=True)
    ratios = [flops_for(of_b, allocate(of_a, flops, a.cost).loss, b.cost) / flops for of_a, of_b in pairs]
    extrapolated = _is_outside(loss, fit_isoflop(a.points), fit_isoflop(b.points))
    for one, spent in ((a, flops), (b, estimate * flops)):
        sizes = one.points.parameters
        if (
            not np.isfinite(spent)
            or not sizes.min() <= allocate(one.surface, spent, one.cost).parameters <= sizes.max()
        ):
            extrapolated = True
    return Ratio(flops=flops, loss=loss, ratio=interval(estimate, np.array(ratios)), extrapolated=extrapolated)


def compute_ratio(a: Points, b: Points, flops: float, *, draws: int, seed: int, kind: Kind = "parametric") -> Ratio:
    """C_B / C_A at the loss of A's frontier at C_A = `flops`, by the power laws of the minima, which have no floor.

    For families without a surface: the further the losses are from the smallest measured, the less it is worth.
    `Points` holds valid estimates only, so there is no ratio of anything else. DataError if a family has no frontier.
    """
    fits = fit_isoflop(a), fit_isoflop(b)
    if fits[0].loss is None or fits[1].loss is None:
        raise DataError(
            f"a ratio of compute needs minima inside the measured sizes at {FEWEST} budgets of both families; "
            "train more sizes"
        )
    loss = fits[0].loss(flops)

    def laws(points: Points) -> Array:
        law = fit_isoflop(points).loss
        return np.array([law.coefficient, law.exponent] if law else [np.nan, np.nan])

    left = bootstrap(a, laws, draws=draws, seed=random.stream_key(seed, "a"), kind=kind)
    right = bootstrap(b, laws, draws=draws, seed=random.stream_key(seed, "b"), kind=kind)
    losses = left[:, 0] * flops ** left[:, 1]
    ratios = (losses / right[:, 0]) ** (1 / right[:, 1]) / flops
    estimate = fits[1].loss.inverse(loss) / flops
    extrapolated = _is_outside(loss, *fits)
    return Ratio(flops=flops, loss=loss, ratio=interval(estimate, ratios), extrapolated=extrapolated)


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """The numpy stream called `names` under `seed`."""
    return np.random.Generator(np.random.Philox(key=random.stream_key(seed, *names) & (2**63 - 1)))


def _is_outside(loss: float, *fits: IsoFlop) -> bool:
    """Whether some family never had this loss at a sound minimum."""
    ranges = [[parabola.loss for parabola in fit.sound] for fit in fits]
    return any(not losses or not min(losses) <= loss <= max(losses) for losses in ranges)


def _resample(points: Points, source: np.random.Generator) -> Points:
    rows = []
    for budget in np.unique(points.budgets):
        (members,) = np.nonzero(points.budgets == budget)
        wanted = min(3, len(np.unique(points.parameters[members])))
        while len(np.unique(points.parameters[drawn := source.choice(members, len(members))])) < wanted:
            pass
        rows.append(drawn)
    chosen = np.concatenate(rows)
    fields = ("budgets", "parameters", "tokens", "flops", "loss", "standard_error")
    return replace(points, **{name: getattr(points, name)[chosen] for name in fields})
