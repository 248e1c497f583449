"""A router of r rows for r merged experts, so that a stock model class can load the result.

The merged layer adds up the gates of a cluster's members, G_c(x), which no linear router of r rows does in general: the
sum of exponentials is not the exponential of a linear function, a token may select a cluster several times, and a
softmax over r rows has another denominator. So all of this is approximate, except: clusters of one expert; clusters of
which one member alone is ever selected, with that member's row; and s equal members with equal rows in every cluster,
with a top k of k / s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from llm.moe.choices import check_choice
from llm.moe.experts import DROPPED, LayerTokens, RoutingRule, route
from llm.moe.merging import members, normalised

RouterPolicy = Literal[
    "representative",  # the row of the most frequent member: what pruning does
    "mean",  # mean row of the members
    "frequency_mean",  # mean weighted by how often each is selected
    "fit",  # "router-fit": from frequency_mean on, by gradients, towards G_c(x) on the calibration text
]
_UNREACHED = -1e4  # stands for the logarithm of no probability, and keeps gradients finite


def small_rule(rule: RoutingRule, num_experts: int) -> RoutingRule:
    """The rule for a router of `num_experts` rows: no more than all of them can be selected."""
    return RoutingRule(top_k=min(rule.top_k, num_experts), normalise=rule.normalise)


def router_rows(weight: Tensor, expert_map: Tensor, policy: RouterPolicy, frequency: Tensor) -> Tensor:
    """The router [r, d] of the merged experts, in the type of `weight` [E, d]: for "fit" where `fit_router` starts.

    expert_map: int64 [E] of 0..r-1 or DROPPED. frequency: [E], how often each expert is selected.
    """
    check_choice("router policy", policy, RouterPolicy)
    clusters = members(expert_map)
    if policy == "representative":
        return weight[[int(cluster[frequency[cluster].argmax()]) for cluster in clusters]]
    shares = normalised(expert_map, torch.ones_like(frequency) if policy == "mean" else frequency)
    rows = [shares[cluster].to(weight.device) @ weight[cluster].double() for cluster in clusters]
    return torch.stack(rows).to(weight.dtype)


def cluster_gates(tokens: LayerTokens, expert_map: Tensor, rule: RoutingRule) -> Tensor:
    """G_c(x), float32 [T, r]: the gate that each merged expert gets under the router of E rows."""
    expert_map = expert_map.to(tokens.logits.device)
    kept = expert_map != DROPPED
    gates = route(tokens.logits, rule, kept=kept).dense_gates()
    clusters = gates.new_zeros(len(gates), int(expert_map.max()) + 1)
    return clusters.index_add_(1, expert_map[kept], gates[:, kept])


def fit_router(
    start: Tensor, batches: Sequence[LayerTokens], expert_map: Tensor, rule: RoutingRule, *, iterations: int = 100
) -> Tensor:
    """Rows [r, d] whose softmax is nearest to G_c(x) on the calibration tokens; the start itself if nothing is nearer.

    Cross-entropy of the cluster gates, by L-BFGS over all tokens at once: deterministic. Gates that do not sum to 1
    (`normalise` is False) leave the rest to the clusters that no gate reaches, so that they are matched as they are.
    """
    targets = [cluster_gates(batch, expert_map, rule) for batch in batches]
    count = sum(map(len, targets))
    rows = start.float().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([rows], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> float:
        """The mean over all tokens, its gradient left with `rows`."""
        optimizer.zero_grad()
        total = 0.0
        for batch, gates in zip(batches, targets, strict=True):
            part = _cross_entropy(batch.hidden.float() @ rows.T, gates) / count
            part.backward()
            total += part.item()
        return total

    before = loss()
    optimizer.step(loss)
    return rows.detach().to(start.dtype) if loss() < before else start


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -sum_c G_c log q_c - (1 - sum_c G_c) log(sum of q_c where G_c = 0), q = softmax(logits)."""
    log_q = functional.log_softmax(logits, dim=-1)  # [T, r]
    reached = targets > 0
    unreached = log_q.masked_fill(reached, _UNREACHED).logsumexp(-1)
    rest = (1 - targets.sum(-1)).clamp_min(0) * ~reached.all(-1)
    return -((targets * log_q).sum(-1) + rest * unreached).sum()


@dataclass(frozen=True, kw_only=True)
class RouterAgreement:
    """How near a router of r rows comes to the merged layer's own, means over tokens."""

    misplaced: float  # share of the gates that go to another merged expert: 0 where the router is exact, at most 1
    divergence: float  # KL(G / sum G || softmax over r rows), nats; above 0 for an exact router that selects k < r
    top1: float  # share of tokens with the same cluster of largest gate
    gate_ratio: float  # sum of G / sum of the new gates; 1 where gates are normalised


@torch.no_grad()
def router_agreement(
    rows: Tensor, batches: Sequence[LayerTokens], expert_map: Tensor, rule: RoutingRule
) -> RouterAgreement:
    """Compare the router `rows` [r, d] with the exact one on tokens, which had better not be those of a fit."""
    total = torch.zeros(4, dtype=torch.float64)
    for batch in batches:
        targets = cluster_gates(batch, expert_map, rule).double()
        logits = batch.hidden.float() @ rows.float().T
        found = route(logits, small_rule(rule, len(rows))).dense_gates().double()
        mass, found_mass = targets.sum(-1, keepdim=True), found.sum(-1, keepdim=True)
        shares, log_q = targets / mass, functional.log_softmax(logits.double(), dim=-1)
        misplaced = (shares - found / found_mass).abs().sum() / 2
        divergence = (torch.xlogy(shares, shares) - shares * log_q).sum()
        agreed = (targets.argmax(-1) == logits.argmax(-1)).sum()
        total += torch.stack([misplaced, divergence, agreed, (mass / found_mass).sum()]).cpu()
    misplaced, divergence, top1, gate_ratio = (total / sum(len(batch.hidden) for batch in batches)).tolist()
    return RouterAgreement(misplaced=misplaced, divergence=divergence, top1=top1, gate_ratio=gate_ratio)
