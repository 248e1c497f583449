"""IsoFLOP fits: a parabola for each budget, and power laws through the minima.

The second approach of Hoffmann et al. (Chinchilla, arXiv 2203.15556, section 3.2). Models of one budget trade size
against tokens, so their loss has a minimum; where it lies, as a function of the budget, is the compute-optimal size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from llm.diffusion.likelihood import ValidName

Array = NDArray[np.float64]
Flaw = Literal["extrapolated", "not convex"]
FEWEST = 3  # sizes of a parabola, and minima of a power law: through fewer, every curve is perfect


@dataclass(frozen=True, kw_only=True)
class Points:
    """Measured models of one family, arrays [P]. TypeError unless `estimate` names a likelihood or a bound on one."""

    estimate: str
    budgets: Array  # nominal FLOPs; equal for the points of one curve
    parameters: Array  # N
    tokens: Array  # D, whole tokens
    flops: Array  # attained
    loss: Array  # nats per token
    standard_error: Array  # of loss

    def __post_init__(self) -> None:
        if self.estimate not in get_args(ValidName):
            raise TypeError(
                f"{self.estimate} bounds no likelihood, so it is not fitted; {', '.join(get_args(ValidName))}"
            )

    def __len__(self) -> int:
        return len(self.loss)


@dataclass(frozen=True, kw_only=True)
class Parabola:
    """loss = c2 x^2 + c1 x + c0 with x = log10 N, and its minimum, which is sound if it lies inside the measured N."""

    budget: float
    coefficients: tuple[float, float, float]  # c2, c1, c0
    parameters: float  # N_opt; nan if the parabola is not convex
    tokens: float  # D_opt, by interpolation of log D in log N between the measured models
    loss: float  # at the minimum
    flaw: Flaw | None  # why the minimum is not to be trusted

    def __call__(self, parameters: Array) -> Array:
        return np.polyval(self.coefficients, np.log10(parameters)).astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """y = coefficient * x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x: float) -> float:
        return self.coefficient * x**self.exponent

    def inverse(self, y: float) -> float:
        """The x at which the law is y."""
        return (y / self.coefficient) ** (1 / self.exponent)


@dataclass(frozen=True, kw_only=True)
class IsoFlop:
    """All parabolas of a family, and power laws of the budget C through those without flaw (None for fewer than 3)."""

    estimate: str
    parabolas: tuple[Parabola, ...]  # by budget; budgets of fewer than 3 sizes have none
    parameters: PowerLaw | None  # N_opt(C)
    tokens: PowerLaw | None  # D_opt(C)
    loss: PowerLaw | None  # L_min(C), without an irreducible term

    @property
    def sound(self) -> tuple[Parabola, ...]:
        return tuple(parabola for parabola in self.parabolas if parabola.flaw is None)


def fit_parabola(parameters: Array, tokens: Array, loss: Array, *, budget: float) -> Parabola:
    """Least squares over at least 3 sizes."""
    if len(np.unique(parameters)) < FEWEST:
        raise ValueError(f"a parabola needs {FEWEST} sizes, budget {budget:.3g} has {len(np.unique(parameters))}")
    x = np.log10(parameters)
    centre = x.mean()  # powers of centred values: log10 N is about 8, so its own are nearly collinear
    design = np.stack([(x - centre) ** 2, x - centre, np.ones_like(x)], axis=1)
    c2, c1, c0 = (float(c) for c in np.linalg.lstsq(design, loss, rcond=None)[0])
    coefficients = (c2, c1 - 2 * c2 * centre, c0 - c1 * centre + c2 * centre**2)
    if c2 <= 0:
        nan = float("nan")
        return Parabola(
            budget=budget, coefficients=coefficients, parameters=nan, tokens=nan, loss=nan, flaw="not convex"
        )
    lowest = centre - c1 / (2 * c2)
    order = np.argsort(x)
    flaw = None if x.min() <= lowest <= x.max() else "extrapolated"
    return Parabola(
        budget=budget,
        coefficients=coefficients,
        parameters=float(10.0 ** np.clip(lowest, -300, 300)),
        tokens=float(np.exp(np.interp(lowest, x[order], np.log(tokens)[order]))) if flaw is None else float("nan"),
        loss=c0 - c1 * c1 / (4 * c2),
        flaw=flaw,
    )


def fit_power_law(x: Array, y: Array) -> PowerLaw:
    """Least squares of log y in log x."""
    log_x, log_y = np.log(x), np.log(y)
    centred = log_x - log_x.mean()
    exponent = float(centred @ log_y / (centred @ centred))
    return PowerLaw(coefficient=float(np.exp(log_y.mean() - exponent * log_x.mean())), exponent=exponent)


def fit_isoflop(points: Points) -> IsoFlop:
    """One parabola for every budget with at least 3 sizes."""
    parabolas = []
    for budget in np.unique(points.budgets):
        rows = points.budgets == budget
        if len(np.unique(points.parameters[rows])) >= FEWEST:
            parabolas.append(
                fit_parabola(points.parameters[rows], points.tokens[rows], points.loss[rows], budget=float(budget))
            )
    sound = [parabola for parabola in parabolas if parabola.flaw is None]

    def law(value: Callable[[Parabola], float]) -> PowerLaw | None:
        if len(sound) < FEWEST:
            return None
        return fit_power_law(np.array([p.budget for p in sound]), np.array([value(p) for p in sound]))

    return IsoFlop(
        estimate=points.estimate,
        parabolas=tuple(parabolas),
        parameters=law(lambda p: p.parameters),
        tokens=law(lambda p: p.tokens),
        loss=law(lambda p: p.loss),
    )
