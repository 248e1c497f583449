"""Fit down projections to what the experts of a cluster, or the whole layer, put out on calibration tokens.

What has to be averaged is outputs, not parameters (the idea of MergeMoE, arXiv 2510.14436). With gate and up projection
of a merged expert fixed, its output is linear in the down projection W, so the best W for a target solves normal
equations. They are shrunk towards the down projection W_0 of the start, never towards 0: the objective on the
calibration tokens cannot rise, and equal members give back W_0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llm.moe.choices import check_choice
from llm.moe.experts import Experts, LayerTokens, MergedLayer, RoutingRule, merged_output, mixture, route

Target = Literal[
    "mixture",  # sum over j in C of g_j E_j(x), on tokens that reach the cluster
    "coefficients",  # sum over j in C of alpha_j E_j(x), on all tokens
    "layer",  # what is missing to y(x), on tokens that reach the cluster: members, other clusters, pruned experts
]

RIDGE = (1e-4,)
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates: the one that fits tokens best which the solution did not see."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NormalEquations:
    """Sums over weighted tokens of features z [n] and residuals e [d] of the start; they add over batches and ranks.

    The objective of a change D of the start is sum |e - D z|^2.
    """

    gram: Tensor  # float64 [n, n]: of z z^T
    cross: Tensor  # float64 [d, n]: of e z^T
    start: Tensor  # float64 []: of |e|^2, the objective without a change
    energy: Tensor  # float64 []: of |t|^2, the objective of an output of 0

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def objective(self, change: Tensor) -> float:
        """For a change float64 [d, n] of the start."""
        return float(self.start - 2 * (change * self.cross).sum() + ((change @ self.gram) * change).sum())

    def summed(self, reduce: "Reduce") -> "NormalEquations":
        return NormalEquations(**{f.name: reduce(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Fit:
    """For the report: sums of squares over the calibration tokens."""

    before: float
    after: float  # never above `before`
    energy: float  # of the target
    ridge: float  # as a share of the mean diagonal of the Gram matrix; 0 where the start was kept


Reduce = Callable[[Tensor], Tensor]
"""Sum over ranks, as `Runtime.all_reduce_sum`."""


def equations(features: Tensor, residual: Tensor, target: Tensor) -> NormalEquations:
    """Of features [T, n], residuals and targets [T, d], all weighted by the root of the tokens' weights."""
    z, e = features.double(), residual.double()
    return NormalEquations(gram=z.T @ z, cross=e.T @ z, start=e.square().sum(), energy=target.double().square().sum())


def solve(total: NormalEquations, ridge: float) -> Tensor:
    """The change D = cross (gram + lambda I)^-1, float64 [d, n], with lambda = ridge x the mean of gram's diagonal."""
    shrinkage = ridge * total.gram.diagonal().mean()
    if float(shrinkage) == 0:
        return torch.zeros_like(total.cross)
    shifted = total.gram.clone()
    shifted.diagonal().add_(shrinkage)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if not int(failed):
        return torch.cholesky_solve(total.cross.T, factor).T
    values, vectors = torch.linalg.eigh(total.gram)  # rounding made the Gram matrix indefinite
    return ((total.cross @ vectors) / (values.clamp_min(0) + shrinkage)) @ vectors.T


def best_change(seen: NormalEquations, unseen: NormalEquations | None, ridges: Sequence[float]) -> tuple[Tensor, Fit]:
    """The change that all tokens ask for, with the ridge that serves `unseen` best when only `seen` is known.

    One ridge is taken as it is. No change if none lowers the objective, of unseen and of all tokens.
    """
    ridge, helps = ridges[0], True
    if unseen is not None:
        losses = [unseen.objective(solve(seen, ridge)) for ridge in ridges]
        ridge, helps = ridges[losses.index(min(losses))], min(losses) < float(unseen.start)
        seen = seen + unseen
    change = solve(seen, ridge)
    before, after, energy = float(seen.start), seen.objective(change), float(seen.energy)
    if not (helps and after < before):
        return torch.zeros_like(change), Fit(before=before, after=before, energy=energy, ridge=0.0)
    return change, Fit(before=before, after=max(after, 0.0), energy=energy, ridge=ridge)


@torch.no_grad()
def least_squares(
    experts: Experts,
    start: MergedLayer,
    batches: Sequence[LayerTokens],
    rule: RoutingRule,
    *,
    target: Target = "mixture",
    alpha: Tensor | None = None,
    ridges: Sequence[float] = RIDGE,
    sweeps: int = 1,
    reduce: Reduce = lambda values: values,
) -> tuple[MergedLayer, list[Fit]]:
    """The start with down projections of least squares, and the `Fit` of each step.

    start: any merge or pruning of `experts`; batches: some thousand tokens each, gone through once a step; alpha: [E],
    for "coefficients"; ridges: several, such as `RIDGES`, let the last quarter of each batch choose. A step is a merged
    expert; "layer" goes over them `sweeps` times, fits each to what all the others leave, and keeps outputs [T, d].
    Memory: 4 (f^2 + d f) numbers of float64, twice that for several ridges (one ridge, Mixtral: 8 GiB).
    """
    check_choice("target", target, Target)
    if (target == "coefficients") != (alpha is not None):
        raise ValueError("The target of coefficients, and no other, needs alpha.")
    merged = Experts(gate_up=start.experts.gate_up, down=start.experts.down.clone())
    layer = MergedLayer(expert_map=start.expert_map, experts=merged)
    wanted = missing = None
    if target == "layer":
        wanted = [mixture(experts, batch.hidden, route(batch.logits, rule)) for batch in batches]
        missing = [y - merged_output(layer, batch, rule) for y, batch in zip(wanted, batches, strict=True)]
    fits = []
    for label in list(range(len(merged))) * (sweeps if missing is not None else 1):
        parts: list[NormalEquations | None] = [None, None]
        for index, batch in enumerate(batches):
            gates = member_gates(layer, label, batch, rule, alpha)
            for part, rows in enumerate(reached_tokens(gates, split=len(ridges) > 1)):
                features = gated_features(merged, label, batch.hidden[rows], gates[rows])
                if wanted is not None and missing is not None:
                    aim, residual = wanted[index][rows], missing[index][rows]
                else:
                    cluster = (layer.expert_map == label).nonzero(as_tuple=True)[0]
                    aim = gated_sum(experts, cluster, batch.hidden[rows], gates[rows])
                    residual = aim - functional.linear(features, merged.down[label].to(features.dtype))
                parts[part] = added(parts[part], equations(features, residual, aim))
        seen, unseen = (part and part.summed(reduce) for part in parts)
        assert seen is not None
        change, fit = best_change(seen, unseen, ridges)
        fits.append(fit)
        old = merged.down[label].clone()
        merged.down[label] = (old.double() + change).to(old.dtype)
        if missing is not None:
            for batch, left in zip(batches, missing, strict=True):
                gates = member_gates(layer, label, batch, rule, alpha)
                moved = (merged.down[label].double() - old.double()).to(left.dtype)
                left -= functional.linear(gated_features(merged, label, batch.hidden, gates), moved)
    return layer, fits


def member_gates(
    layer: MergedLayer, label: int, batch: LayerTokens, rule: RoutingRule, alpha: Tensor | None = None
) -> Tensor:
    """Gates [T, |C|] of the members of a cluster, after the softmax over what is kept; or alpha, if given."""
    cluster = layer.expert_map == label
    if alpha is not None:
        return alpha[cluster].to(batch.hidden).expand(len(batch.hidden), -1)
    kept = None if bool(layer.kept.all()) else layer.kept
    return route(batch.logits, rule, kept=kept).dense_gates()[:, cluster].to(batch.hidden.dtype)


def reached_tokens(gates: Tensor, *, split: bool) -> list[Tensor]:
    """The tokens with any gate, int64 [t]; with `split` first those among the first three quarters, then the rest."""
    (rows,) = (gates.sum(1) > 0).nonzero(as_tuple=True)
    last = rows >= len(gates) * 3 // 4
    return [rows[~last], rows[last]] if split else [rows]


def gated_features(experts: Experts, expert: int, hidden: Tensor, gates: Tensor) -> Tensor:
    """G_C(x) a(x), [T, f], for gates [T, |C|]."""
    return experts.inner(expert, hidden) * gates.sum(1, keepdim=True)


def gated_sum(experts: Experts, cluster: Tensor, hidden: Tensor, gates: Tensor) -> Tensor:
    """Sum over members of g_j E_j(x), [T, d], for members int64 [|C|] and gates [T, |C|]."""
    total = torch.zeros_like(hidden)
    for member, gate in zip(cluster.tolist(), gates.T, strict=True):
        (rows,) = gate.nonzero(as_tuple=True)
        total.index_add_(0, rows, experts.output(member, hidden[rows]) * gate[rows, None])
    return total


def added(total: NormalEquations | None, more: NormalEquations) -> NormalEquations:
    return more if total is None else total + more
