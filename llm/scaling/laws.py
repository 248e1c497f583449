"""From the results of a study to the laws of each family, under one valid bound at a time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from launch.errors import DataError
from llm.diffusion.likelihood import ValidName
from llm.scaling.bootstrap import bootstrap, isoflop_values
from llm.scaling.isoflop import FEWEST, Array, IsoFlop, Points, fit_isoflop
from llm.scaling.point import COSTLY, Result
from llm.scaling.surface import Method, Surface, fit_surface

FEWEST_POINTS = 6  # for a surface: one more than it has parameters


@dataclass(frozen=True, kw_only=True)
class CostRule:
    """FLOPs of a product N D: 6 + excess N^-power for rules that charge head and attention, a constant for others."""

    constant: float
    excess: float = 0.0
    power: float = 0.0

    def __call__(self, parameters: float) -> float:
        return self.constant + self.excess * parameters**-self.power


@dataclass(frozen=True, kw_only=True)
class Law:
    """All that is known of one family under one bound."""

    family: str
    points: Points
    isoflop: IsoFlop
    surface: Surface | None  # None for too few points
    cost: CostRule  # of the ladder
    budgets: Array  # [B] all nominal budgets
    replicates: Array  # [R, 3 B + 6], `isoflop_values` of the bootstrap
    tokens_per_step: float  # at the largest budget

    @property
    def bound(self) -> str:
        return self.points.estimate

    @property
    def key(self) -> tuple[str, str]:
        return self.family, self.bound

    def is_measured(self, parameters: float) -> bool:
        """Whether a size lies between the smallest and the largest that was trained."""
        return bool(self.points.parameters.min() <= parameters <= self.points.parameters.max())


def choose(results: Sequence[Result], bounds: Sequence[str] | None) -> list[tuple[str, str]]:
    """(family, bound) to fit: every named bound that a family has, or its best. DataError if none is left."""
    pairs = []
    for family in dict.fromkeys(result.point.family for result in results):
        known = {name for result in results if result.point.family == family for name in result.estimates}
        wanted = bounds if bounds is not None else [best_bound(results, family)] if known else []
        pairs += [(family, name) for name in wanted if name in known]
    if not pairs:
        raise DataError(f"no result holds an estimate named {', '.join(bounds or get_args(ValidName))}")
    return pairs


def best_bound(results: Sequence[Result], family: str) -> str:
    """The valid bound of the lowest mean, chosen once for all points of a family, so that it does not follow noise.

    Before that count that most points have it, and that it is not one of those that are judged on other, fewer
    sequences than the rest.
    """
    values: dict[str, list[float]] = {}
    for result in results:
        if result.point.family == family:
            for name, found in result.estimates.items():
                values.setdefault(name, []).append(found.nats_per_token)
    return min(values, key=lambda name: (name in COSTLY, -len(values[name]), np.mean(values[name]), name))


def gather(results: Sequence[Result], family: str, bound: str) -> Points:
    """The points of a family that have the bound."""
    rows = [
        (r.point.budget, r.point.parameters, r.point.tokens, r.point.flops, found.nats_per_token, found.standard_error)
        for r in results
        if r.point.family == family and (found := r.estimates.get(bound)) is not None
    ]
    budgets, parameters, tokens, flops, loss, error = np.array(rows, dtype=np.float64).T
    return Points(
        estimate=bound,
        budgets=budgets,
        parameters=parameters,
        tokens=tokens,
        flops=flops,
        loss=loss,
        standard_error=error,
    )


def fit_law(results: Sequence[Result], family: str, bound: str, *, method: Method, draws: int, seed: int) -> Law:
    """Fit what the points allow: parabolas from 3 sizes, power laws from 3 sound minima, a surface as `lack` says."""
    points = gather(results, family, bound)
    budgets = np.unique(points.budgets)
    steps = [r.point.tokens / r.steps for r in results if (r.point.family, r.point.budget) == (family, budgets[-1])]
    replicates = bootstrap(points, lambda p: isoflop_values(fit_isoflop(p), budgets), draws=draws, seed=seed)
    surface = (
        fit_surface(points.parameters, points.tokens, points.loss, method=method) if lack(points) is None else None
    )
    return Law(
        family=family,
        points=points,
        isoflop=fit_isoflop(points),
        surface=surface,
        cost=fit_cost(points),
        budgets=budgets,
        replicates=replicates,
        tokens_per_step=float(np.median(steps)),
    )


def lack(points: Points) -> str | None:
    """What points are short of for a surface; None if they are enough."""
    counts = (
        (len(np.unique(points.budgets)), FEWEST, "budgets"),
        (len(np.unique(points.parameters)), FEWEST, "sizes"),
        (len(points), FEWEST_POINTS, "points"),
    )
    return ", ".join(f"{have} of {need} {things}" for have, need, things in counts if have < need) or None


def fit_cost(points: Points) -> CostRule:
    """The rule by which the ladder counted, as a function of N, from the points' own FLOPs."""
    product = points.flops / (points.parameters * points.tokens)
    excess = product - 6
    if product.max() < 1.01 * product.min() or excess.min() <= 0:
        return CostRule(constant=float(np.median(product)))
    slope, level = np.polyfit(np.log(points.parameters), np.log(excess), 1)
    return CostRule(constant=6.0, excess=math.exp(level), power=-float(slope))
