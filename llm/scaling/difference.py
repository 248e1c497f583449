"""Does a family pay? Its valid bound less that of a reference family at equal compute, and the noise of that number.

Two comparisons: best size to best size at each budget, and size by size. Both go seed by seed over the seeds that the
two have in common, so that what a seed does to both (order of data, noise) cancels. Results hold no values of single
sequences, so the standard errors of the two evaluations are combined as if the texts were different ones. They are the
same, and mostly move both losses together: the standard error of a difference is on the safe side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llm.scaling.laws import best_bound
from llm.scaling.point import Estimated, Result

Verdict = Literal["better", "worse", "within noise"]
Edge = Literal["smallest", "largest", "only"]
Seeds = dict[int, Estimated]
Cells = dict[tuple[float, str], Seeds]  # by budget and size


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Loss of a family less the reference's at one budget, nats per token: below 0 the family is better."""

    family: str
    bound: str
    budget: float
    size: str
    reference_size: str
    value: float  # mean over the seeds that both have
    standard_error: float  # of the two evaluations; more seeds do not lessen it, for they read the same text
    seeds: int
    spread: float | None  # standard deviation over the seeds; None for one
    edge: Edge | None = None  # where the best size lies among the family's own: a better one may lie beyond


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that a study says about its families against one of them."""

    reference: str
    bound: str  # of the reference: its best
    best: tuple[Difference, ...]  # best size to best size, by budget, the lowest first
    sizes: tuple[Difference, ...]  # size by size, by family, size and budget
    unmatched: tuple[str, ...]  # family and budget that the reference, or a seed of it, has not (yet)

    def spread(self, family: str | None = None) -> float | None:
        """Standard deviation of a difference over seeds, pooled over the sizes and budgets of a family, or of all.

        None if no two seeds meet there. One size has two or three seeds, too few to know a spread by themselves.
        """
        repeated = [one for one in self.sizes if one.spread is not None and family in (None, one.family)]
        freedom = sum(one.seeds - 1 for one in repeated)
        squares = sum((one.seeds - 1) * (one.spread or 0.0) ** 2 for one in repeated)
        return (squares / freedom) ** 0.5 if freedom else None

    def noise(self, one: Difference) -> float:
        """Two standard errors plus the spread over seeds of the family, of all families where it has none, or 0."""
        own = self.spread(one.family)
        return 2 * one.standard_error + ((self.spread() if own is None else own) or 0.0)

    def verdict(self, one: Difference) -> Verdict:
        if abs(one.value) <= self.noise(one):
            return "within noise"
        return "better" if one.value < 0 else "worse"


def compare(results: Sequence[Result], pairs: Sequence[tuple[str, str]], reference: str) -> Comparison:
    """Each (family, bound) against the best bound of `reference`, which must be a family of the results."""
    base = best_bound(results, reference)
    theirs = cells(results, reference, base)
    best: list[Difference] = []
    sizes: list[Difference] = []
    unmatched: list[str] = []
    for family, bound in pairs:
        if family == reference:
            continue
        mine = cells(results, family, bound)
        for (budget, size), seeds in mine.items():
            if found := _difference(family, bound, budget, (size, seeds), (size, theirs.get((budget, size), {}))):
                sizes.append(found)
        for budget in dict.fromkeys(budget for budget, _ in mine):
            found = None
            if any(at == budget for at, _ in theirs):
                own, other = best_cell(mine, budget), best_cell(theirs, budget)
                found = _difference(family, bound, budget, own, other, edge=_edge(mine, budget, own[0]))
            if found:
                best.append(found)
            else:
                unmatched.append(f"{family} at {budget:.3g} FLOPs")
    best.sort(key=lambda one: (one.budget, one.value))
    return Comparison(reference=reference, bound=base, best=tuple(best), sizes=tuple(sizes), unmatched=tuple(unmatched))


def cells(results: Sequence[Result], family: str, bound: str) -> Cells:
    """By budget and size, in the order of budget and N: the estimate of each seed."""
    found: Cells = {}
    for r in sorted(results, key=lambda r: (r.point.budget, r.point.parameters, r.point.size, r.point.seed)):
        if r.point.family == family and bound in r.estimates:
            found.setdefault((r.point.budget, r.point.size), {})[r.point.seed] = r.estimates[bound]
    return found


def best_cell(found: Cells, budget: float) -> tuple[str, Seeds]:
    """The size of the lowest mean over its seeds, at a budget that there is."""
    sizes = [(size, seeds) for (at, size), seeds in found.items() if at == budget]
    return min(sizes, key=lambda one: np.mean([e.nats_per_token for e in one[1].values()]))


def _edge(found: Cells, budget: float, best: str) -> Edge | None:
    sizes = [size for at, size in found if at == budget]
    if len(sizes) == 1:
        return "only"
    return "smallest" if best == sizes[0] else "largest" if best == sizes[-1] else None


def _difference(
    family: str,
    bound: str,
    budget: float,
    mine: tuple[str, Seeds],
    theirs: tuple[str, Seeds],
    edge: Edge | None = None,
) -> Difference | None:
    """None without a common seed."""
    seeds = [seed for seed in mine[1] if seed in theirs[1]]
    if not seeds:
        return None
    values = [mine[1][seed].nats_per_token - theirs[1][seed].nats_per_token for seed in seeds]
    errors = [float(np.mean([side[1][seed].standard_error for seed in seeds])) for side in (mine, theirs)]
    return Difference(
        family=family,
        bound=bound,
        budget=budget,
        size=mine[0],
        reference_size=theirs[0],
        value=float(np.mean(values)),
        standard_error=math.hypot(*errors),
        seeds=len(seeds),
        spread=float(np.std(values, ddof=1)) if len(seeds) > 1 else None,
        edge=edge,
    )
