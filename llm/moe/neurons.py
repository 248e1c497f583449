"""Merge by choosing: of the inner features of all members of a cluster, keep the f that together say most.

An average of gate and up rows computes a feature that no expert had. Here every kept feature is one that a member was
trained to compute, and a least-squares down projection lets it also stand for those that go. Two equal features are not
both kept: the choice is greedy, by what a feature adds to those before it (orthogonal least squares: Chen, Billings and
Luo, 1989; for dropped experts' neurons compare DERN, arXiv 2509.10377).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llm.moe.experts import Experts, LayerTokens, MergedLayer, RoutingRule
from llm.moe.least_squares import (
    Fit,
    NormalEquations,
    Reduce,
    added,
    best_change,
    equations,
    gated_sum,
    member_gates,
    reached_tokens,
)

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_BLOCK = 64  # features chosen between two updates of the Gram matrix
_UNCHANGED = Fit(before=0.0, after=0.0, energy=0.0, ridge=0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    """The features among which a cluster chooses, and where the fit of their down columns starts."""

    gate_up: Tensor  # [2n, d]
    down: Tensor  # [d, n]: the columns of a member times its share in the cluster


@torch.no_grad()
def choose_neurons(
    experts: Experts,
    start: MergedLayer,
    batches: Sequence[LayerTokens],
    rule: RoutingRule,
    *,
    pool: int = 3,
    ridges: Sequence[float] = RIDGES,
    reduce: Reduce = lambda values: values,
) -> tuple[MergedLayer, list[Fit]]:
    """r experts of chosen features with fitted down projections, and a `Fit` for each, `before` being the start's.

    The target is sum over j in C of g_j E_j(x) on tokens that reach the cluster. Candidates are the pool x f features
    of members whose gated output has the most energy. A cluster keeps the expert of `start` (a merge with the same
    labels) unless the chosen features have a smaller objective; a cluster of one keeps its expert.
    batches: some thousand tokens each, gone through twice a cluster. Memory: 3 to 6 (pool f)^2 numbers of float64,
    one cluster at a time (0.5 to 1 GiB for f = 1536), so this is not for Mixtral's f = 14336 on a small machine.
    """
    merged = Experts(gate_up=start.experts.gate_up.clone(), down=start.experts.down.clone())
    layer = MergedLayer(expert_map=start.expert_map, experts=merged)
    fits = []
    for label in range(len(merged)):
        cluster = (start.expert_map == label).nonzero(as_tuple=True)[0]
        if len(cluster) == 1:
            fits.append(_UNCHANGED)
            continue
        gates = [member_gates(start, label, batch, rule) for batch in batches]
        candidates = _pool(experts, cluster, gates, batches, pool * experts.inner_width, reduce)
        parts: list[NormalEquations | None] = [None, None]
        begun = torch.zeros((), dtype=torch.float64)
        for batch, gate in zip(batches, gates, strict=True):
            for part, rows in enumerate(reached_tokens(gate, split=len(ridges) > 1)):
                hidden, total = batch.hidden[rows], gate[rows].sum(1, keepdim=True)
                aim = gated_sum(experts, cluster, hidden, gate[rows])
                begun += (aim - total * merged.output(label, hidden)).double().square().sum().cpu()
                side, other = functional.linear(hidden, candidates.gate_up.to(hidden.dtype)).chunk(2, dim=-1)
                parts[part] = added(parts[part], equations(functional.silu(side) * other * total, aim, aim))
        seen, unseen = (part and part.summed(reduce) for part in parts)
        assert seen is not None
        every = seen if unseen is None else seen + unseen
        if float(every.gram.trace()) == 0:  # no token reaches the cluster
            fits.append(_UNCHANGED)
            continue
        chosen = greedy_features(every, experts.inner_width)
        change, fit = best_change(
            _started(seen, chosen, candidates.down),
            None if unseen is None else _started(unseen, chosen, candidates.down),
            ridges,
        )
        before = float(reduce(begun))
        if fit.after < before:
            merged.gate_up[label] = candidates.gate_up[torch.cat([chosen, chosen + candidates.down.shape[1]])]
            merged.down[label] = (candidates.down[:, chosen].double() + change).to(merged.down.dtype)
        fits.append(Fit(before=before, after=min(fit.after, before), energy=fit.energy, ridge=fit.ridge))
    return layer, fits


def greedy_features(total: NormalEquations, count: int, *, block: int = _BLOCK, ridge: float = 1e-4) -> Tensor:
    """The features that lower the objective most, one after the other given those before: int64 [count], rising.

    The sums are those of a start of 0. A block is chosen one by one among 4 x block candidates that look best, then
    taken out of all other features at once: 2 n^2 count steps, in matrix products.
    """
    gram, cross = total.gram.clone(), total.cross.clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    taken = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    while (left := count - int(taken.sum())) > 0:
        gain = cross.square().sum(0) / gram.diagonal()
        size = min(block, left)
        best = gain.masked_fill(taken, -1.0).topk(min(4 * size, int((~taken).sum()))).indices
        new = best[_one_by_one(gram[best][:, best], cross[:, best].T @ cross[:, best], size)]
        taken[new] = True
        factor = torch.linalg.cholesky(gram[new][:, new])
        along = torch.linalg.solve_triangular(factor, gram[new], upper=False)  # [size, n], orthonormal directions
        aim = torch.linalg.solve_triangular(factor, cross[:, new].T, upper=False)  # [size, d]
        gram -= along.T @ along
        cross -= aim.T @ along
    return taken.nonzero(as_tuple=True)[0]


def _one_by_one(gram: Tensor, aims: Tensor, count: int) -> Tensor:
    """Indices [count] of a greedy choice by Gram matrices [m, m] of the features and of their columns of `cross`."""
    chosen: list[int] = []
    floor = gram.diagonal().clone() * 1e-12
    for _ in range(count):
        gain = aims.diagonal() / gram.diagonal().clamp_min(floor)
        gain[chosen] = -1.0
        pivot = int(gain.argmax())
        chosen.append(pivot)
        scale = gram[pivot, pivot].clone()
        along, aim = gram[pivot] / scale.sqrt(), aims[pivot] / scale.sqrt()
        square = aims[pivot, pivot] / scale
        gram = gram - torch.outer(along, along)
        aims = aims - torch.outer(along, aim) - torch.outer(aim, along) + square * torch.outer(along, along)
    return torch.tensor(chosen, device=gram.device)


def _pool(
    experts: Experts, cluster: Tensor, gates: list[Tensor], batches: Sequence[LayerTokens], size: int, reduce: Reduce
) -> _Pool:
    """The features of most energy: sum over tokens of (g_j a_jq |W_d^jq|)^2."""
    energy = torch.zeros(len(cluster), experts.inner_width, dtype=torch.float64, device=experts.down.device)
    together = torch.zeros(len(cluster), dtype=torch.float64, device=experts.down.device)  # sum of g_j G_C
    for batch, gate in zip(batches, gates, strict=True):
        together += (gate * gate.sum(1, keepdim=True)).double().sum(0)
        for row, member in enumerate(cluster.tolist()):
            (rows,) = gate[:, row].nonzero(as_tuple=True)
            inner = experts.inner(member, batch.hidden[rows]) * gate[rows, row, None]
            energy[row] += inner.double().square().sum(0) * experts.down[member].double().square().sum(0)
    energy, together = reduce(energy), reduce(together)
    shares = together / together.sum().clamp_min(1e-300)
    best = energy.flatten().topk(min(size, energy.numel())).indices.sort().values.to(experts.down.device)
    row, feature = best // experts.inner_width, best % experts.inner_width
    member = cluster.to(best.device)[row]
    gate_up = torch.cat([experts.gate[member, feature], experts.up[member, feature]])
    down = experts.down[member, :, feature].T * shares.to(best.device)[row]
    return _Pool(gate_up=gate_up, down=down.to(experts.down.dtype))


def _started(total: NormalEquations, chosen: Tensor, down: Tensor) -> NormalEquations:
    """The sums for the chosen features alone, of residuals of a start with their columns of `down` [d, n]."""
    start = down[:, chosen].double()
    small = NormalEquations(
        gram=total.gram[chosen][:, chosen], cross=total.cross[:, chosen], start=total.start, energy=total.energy
    )
    begun = torch.as_tensor(small.objective(start), dtype=torch.float64)
    return NormalEquations(gram=small.gram, cross=small.cross - start @ small.gram, start=begun, energy=total.energy)
