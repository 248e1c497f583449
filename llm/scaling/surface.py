"""The loss surface L(N, D) = E + A / N^a + B / D^b, and the allocation of compute that it calls for.

The third approach of Hoffmann et al. (Chinchilla, arXiv 2203.15556, section 3.3): Huber's loss of log residuals. The
objective has a long flat valley, and a fit in linear space started at A = B = 400 never moves A and B, because their
derivatives are a millionth of the others': exponents and "compute-optimal" sizes are then those of the start. Here
log E, log A and log B are fitted with analytic gradients from many starts, and a fit that few starts reach says so.
`method="official"` repeats the stuck fit of the released code of MDM-Prime-v2, for comparison with its tables only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize

from launch import random
from llm.scaling.isoflop import Array

DELTA = 1e-3  # Huber's threshold, in log residuals
STARTS = 300
REQUIRED = 3  # starts that must end at the best objective
REACHED = 1e-3  # relative difference of objectives that counts as the same; other minima of the valley differ by more
STEEPEST = 5.0  # limit of both exponents
OFFICIAL_START = (1.69, 400.0, 400.0, 0.34, 0.34)

Method = Literal["converged", "official"]


@dataclass(frozen=True, kw_only=True)
class Surface:
    """E, A, B, a, b, and how far they can be trusted."""

    irreducible: float  # E, nats per token
    size_scale: float  # A
    token_scale: float  # B
    size_exponent: float  # a
    token_exponent: float  # b
    objective: float  # sum of Huber losses
    starts: int
    reached: int  # starts that ended at the best objective

    @property
    def flaw(self) -> str | None:
        """Why the parameters are not to be trusted."""
        if self.reached < REQUIRED:
            return f"not converged: {self.reached} of {self.starts} starts reached the best objective, {REQUIRED} must"
        if max(self.size_exponent, self.token_exponent) > 0.99 * STEEPEST:
            return "an exponent ran to its limit: the data do not determine it"
        smallest = min(self.irreducible, self.size_exponent, self.token_exponent)
        return "a term of the surface vanished: the data do not determine it" if smallest < 1e-3 else None

    def __call__(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Loss [P], nats per token."""
        size = self.size_scale * np.power(parameters, -self.size_exponent)
        return self.irreducible + size + self.token_scale * np.power(tokens, -self.token_exponent)


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How to spend `flops`."""

    flops: float
    parameters: float
    tokens: float
    loss: float


def fit_surface(
    parameters: Array, tokens: Array, loss: Array, *, method: Method = "converged", starts: Array | None = None, seed=0
) -> Surface:
    """Fit arrays [P] of at least 5 models. `starts` [S, 5] of (E, A, B, a, b) replace the 300 seeded ones."""
    if len(loss) < 5:
        raise ValueError(f"a surface has 5 parameters, there are {len(loss)} points")
    if method == "official":
        return _fit_official(parameters, tokens, loss)
    centre = np.array([np.log(parameters).mean(), np.log(tokens).mean()])
    inits = draw_starts(loss, STARTS, seed) if starts is None else _centred(starts, centre)
    ends = [_descend(init, np.log(parameters) - centre[0], np.log(tokens) - centre[1], np.log(loss)) for init in inits]
    objectives = np.array([value for value, _ in ends])
    best_value, best = ends[int(objectives.argmin())]
    e, u, v, a, b = best
    log_a, log_b = u + a * centre[0], v + b * centre[1]
    return Surface(
        irreducible=float(np.exp(e)),
        size_scale=float(np.exp(log_a)),
        token_scale=float(np.exp(log_b)),
        size_exponent=float(a),
        token_exponent=float(b),
        objective=float(best_value),
        starts=len(ends),
        reached=int((objectives <= best_value * (1 + REACHED) + 1e-12).sum()),
    )


def huber_objective(theta: Array, log_n: Array, log_d: Array, log_loss: Array) -> tuple[float, Array]:
    """Sum of Huber losses, and its gradient [5] in theta = (log E, log A, log B, a, b). Logs are arrays [P]."""
    e, log_a, log_b, a, b = theta
    terms = np.stack([np.full_like(log_n, e), log_a - a * log_n, log_b - b * log_d])
    top = terms.max(0)
    exponentials = np.exp(terms - top)
    total = exponentials.sum(0)
    residual = top + np.log(total) - log_loss
    size = np.abs(residual)
    value = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)).sum()
    pull = (
        exponentials / total * np.clip(residual, -DELTA, DELTA)
    )  # share of each term, times the slope of Huber's loss
    by_e, by_a, by_b = pull.sum(1)
    return float(value), np.array([by_e, by_a, by_b, -(pull[1] @ log_n), -(pull[2] @ log_d)])


def draw_starts(loss: Array, count: int, seed: int) -> Array:
    """[count, 5] of (log E, log of the size and token terms at the centre of the data, a, b), over what is possible.

    E is a part of the smallest loss, and the two terms share what is left of the mean one.
    """
    import torch

    key = random.stream_key(seed, "surface-starts")
    part, share, a, b = random.uniform(key, torch.arange(count), 4, torch.float64).numpy().T
    irreducible = loss.min() * (0.1 + 0.88 * part)
    rest = loss.mean() - irreducible
    share = 0.05 + 0.9 * share
    columns = [np.log(irreducible), np.log(rest * share), np.log(rest * (1 - share)), 0.05 + 0.95 * a, 0.05 + 0.95 * b]
    return np.stack(columns, axis=1)


def allocate(surface: Surface, flops: float, flops_per_product: float | Callable[[float], float] = 6.0) -> Allocation:
    """The best N and D with flops = k N D. k: a constant, or a function of N where head or attention is charged."""
    a, b = surface.size_exponent, surface.token_exponent
    if callable(flops_per_product):
        rule = flops_per_product

        def loss_at(log_n: float) -> float:
            n = float(np.exp(log_n))
            return float(surface(n, flops / (rule(n) * n)))

        limits = (0.0, float(np.log(flops)))
        found = optimize.minimize_scalar(loss_at, bounds=limits, method="bounded", options={"xatol": 1e-6})
        parameters = float(np.exp(found.x))
        product = flops / rule(parameters)
    else:
        product = flops / flops_per_product
        scale = (a * surface.size_scale / (b * surface.token_scale)) ** (1 / (a + b))
        parameters = float(scale * product ** (b / (a + b)))
    tokens = product / parameters
    return Allocation(flops=flops, parameters=parameters, tokens=tokens, loss=float(surface(parameters, tokens)))


def flops_for(surface: Surface, loss: float, flops_per_product: float | Callable[[float], float] = 6.0) -> float:
    """The compute whose best allocation has this loss; infinite where the loss is not above E."""
    if loss <= surface.irreducible:
        return float("inf")

    def excess(log_flops: float) -> float:
        return allocate(surface, float(np.exp(log_flops)), flops_per_product).loss - loss

    low, high = np.log(1e3), np.log(1e40)
    if excess(low) < 0 or excess(high) > 0:
        return float("nan")
    root: float = optimize.brentq(excess, low, high, xtol=1e-4)  # type: ignore[assignment]
    return float(np.exp(root))


def _centred(starts: Array, centre: Array) -> Array:
    e, size, token, a, b = np.asarray(starts, dtype=np.float64).T
    return np.stack([np.log(e), np.log(size) - a * centre[0], np.log(token) - b * centre[1], a, b], axis=1)


def _descend(init: Array, log_n: Array, log_d: Array, log_loss: Array) -> tuple[float, Array]:
    """Objective and parameters where L-BFGS-B ends. Scaled, as the stopping rule is absolute for values below 1."""

    def scaled(theta: Array) -> tuple[float, Array]:
        value, gradient = huber_objective(theta, log_n, log_d, log_loss)
        return value / DELTA**2, gradient / DELTA**2

    bounds = [(-20, 5), (-40, 10), (-40, 10), (0, STEEPEST), (0, STEEPEST)]
    options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-10, "gtol": 1e-6}
    end = optimize.minimize(scaled, init, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return float(end.fun) * DELTA**2, end.x


def _fit_official(parameters: Array, tokens: Array, loss: Array) -> Surface:
    log_n, log_d, log_loss = np.log(parameters), np.log(tokens), np.log(loss)

    def logs(x: Array) -> Array:
        return np.concatenate([np.log(x[:3]), x[3:]])

    def objective(x: Array) -> float:
        return huber_objective(logs(x), log_n, log_d, log_loss)[0]

    end = optimize.minimize(objective, OFFICIAL_START, method="L-BFGS-B")
    return Surface(
        irreducible=float(end.x[0]),
        size_scale=float(end.x[1]),
        token_scale=float(end.x[2]),
        size_exponent=float(end.x[3]),
        token_exponent=float(end.x[4]),
        objective=objective(end.x),
        starts=1,
        reached=1,
    )
