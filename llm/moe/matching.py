"""Merges that match the inner features of experts before they average them: Fix-Dominant and ZipIt.

An inner feature q of an expert is a row of its gate, the same row of its up and a column of its down projection. Both
merges send every feature of every member to one of f places, and average there (HC-SMoE, arXiv 2410.08589, section 3.3;
ZipIt: Stoica et al., arXiv 2305.03053). They differ in how they choose the places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from launch.random import random_bits, stream_key
from llm.moe.choices import check_choice
from llm.moe.experts import Experts, LayerTokens, RoutingRule, route
from llm.moe.merging import members, unset_experts

Ingredients = Literal[
    "activations",  # correlate what the features yield on the tokens of the cluster
    "weights",  # correlate their weights; reads no tokens
    "both",  # the sum of both correlations
]
DownScale = Literal[
    "mean",  # average the down columns at a place, as the official code does
    "sum_over_members",  # add them, divided by the number of members: the mean of experts whose features agree
]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterTokens:
    """The tokens that the router sends to a cluster: once for every member that is selected."""

    batches: Sequence[LayerTokens]  # gone through once for every cluster
    rule: RoutingRule
    limit: int = 16_384  # of (token, member) pairs kept of a cluster; the paper has 50,000 for Mixtral
    seed: int = 0

    def of(self, cluster: Tensor) -> Tensor:
        """Inputs [n, d], n <= limit, for members int64 [|C|]: a uniform sample, whatever the size of the batches."""
        key = stream_key(self.seed, "moe-cluster-tokens")
        kept, keys, offset = [], [], 0
        for batch in self.batches:
            selected = route(batch.logits, self.rule).selected  # [T, k]
            token, slot = torch.isin(selected, cluster.to(selected.device)).nonzero(as_tuple=True)
            pair = (token + offset) * batch.logits.shape[1] + selected[token, slot]
            kept.append(batch.hidden[token])
            keys.append(random_bits(key, pair, 1)[:, 0])
            offset += len(batch.hidden)
            if sum(map(len, keys)) > 2 * self.limit:
                kept, keys = self._smallest(kept, keys)
        kept, _ = self._smallest(kept, keys)
        return kept[0]

    def _smallest(self, kept: list[Tensor], keys: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        every = torch.cat(keys)
        order = every.argsort()[: self.limit]
        return [torch.cat(kept)[order]], [every[order]]


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation [p, q] of the columns of [n, p] and [n, q]; 0 where a column is constant."""
    return _standardised(first).T @ _standardised(second)


def similarity(experts: Experts, first: int, second: int, tokens: Tensor | None, ingredients: Ingredients) -> Tensor:
    """Correlation [f, f] of the features of two experts; tokens: [n, d], None for "weights"."""
    by_weights = correlation(_weights(experts, first), _weights(experts, second)) if ingredients != "activations" else 0
    if tokens is None:
        return torch.as_tensor(by_weights)
    return by_weights + correlation(experts.inner(first, tokens), experts.inner(second, tokens))


@torch.no_grad()
def fix_dominant(
    experts: Experts,
    labels: Tensor,
    dominant: Tensor,
    alpha: Tensor,
    tokens: ClusterTokens,
    *,
    ingredients: Ingredients = "activations",
    down_scale: DownScale = "mean",
) -> Experts:
    """r experts: each feature of a member joins the feature of the dominant expert that it correlates with most.

    labels: int64 [E]; dominant: int64 [r], a member of each cluster; alpha: [E], the weights in a place, of which only
    the ratios within a cluster matter. Memory beyond the result: about
    4 n f + 2 f^2 numbers of float32, n <= tokens.limit.
    """
    check_choice("ingredients", ingredients, Ingredients)
    check_choice("down_scale", down_scale, DownScale)
    merged = unset_experts(int(labels.max()) + 1, experts)
    for label, cluster in enumerate(members(labels)):
        leader = int(dominant[label])
        sample = None if ingredients == "weights" or len(cluster) == 1 else tokens.of(cluster)
        places = torch.arange(experts.inner_width).repeat(len(cluster), 1)  # [|C|, f]
        for row, member in enumerate(cluster.tolist()):
            if member != leader:
                found = similarity(experts, leader, member, sample, ingredients).cpu()
                # A feature without variance correlates with nothing; it keeps its index.
                places[row] = torch.where(found.abs().amax(0) > 0, found.argmax(0), places[row])
        _average_in_places(experts, cluster, places, alpha[cluster], down_scale, merged, label)
    return merged


@torch.no_grad()
def zipit(
    experts: Experts,
    labels: Tensor,
    alpha: Tensor,
    tokens: ClusterTokens,
    *,
    down_scale: DownScale = "mean",
    damping: float = 0.1,
) -> Experts:
    """r experts: the most correlated pair of all |C| f features of a cluster becomes one, until f are left.

    labels: int64 [E]; alpha: [E], the weights in a place, as in `fix_dominant`; damping: how a new feature's
    correlations compare with the smaller ones of its parts (ZipIt's own code has 0.3, the official HC-SMoE 0.1).
    With damping < 1 the third of three equal features may come too late to join the other two. Memory: n N + N^2
    numbers of float32 with N = |C| f, so 3.1 GiB + n for two experts of Mixtral; time: about N^2.
    """
    check_choice("down_scale", down_scale, DownScale)
    merged = unset_experts(int(labels.max()) + 1, experts)
    for label, cluster in enumerate(members(labels)):
        places = torch.arange(experts.inner_width).repeat(len(cluster), 1)
        sample = tokens.of(cluster) if len(cluster) > 1 else ()
        if len(sample) > 0:  # else: a feature keeps its index
            features = _standardised(torch.cat([experts.inner(j, sample) for j in cluster.tolist()], dim=1))
            places = zip_places((features.T @ features).cpu(), experts.inner_width, damping).view_as(places)
        _average_in_places(experts, cluster, places, alpha[cluster], down_scale, merged, label)
    return merged


def zip_places(similarity: Tensor, places: int, damping: float) -> Tensor:
    """The place 0..places-1 of each of N features, int64 [N], by similarity [N, N], which is overwritten.

    Of a pair, the row that changed earlier looks for the later one, and each row keeps its best: a step then reads few
    rows again instead of N^2 numbers. (With both rows looking, nearly all would point to the few features that no merge
    has damped yet, and be read again when these go.)
    """
    count = len(similarity)
    changed = torch.arange(count)  # when
    best = torch.empty(count, dtype=similarity.dtype)
    partner = torch.empty(count, dtype=torch.int64)

    def look(rows: Tensor) -> None:
        later = changed > changed[rows, None]
        best[rows], partner[rows] = similarity[rows].masked_fill_(~later, -torch.inf).max(dim=1)

    for rows in changed.clone().split(256):
        look(rows)
    joined = list(range(count))
    for step in range(count - places):
        row = int(best.argmax())
        kept, gone = sorted((row, int(partner[row])))
        joined[gone] = kept
        new = damping * torch.minimum(similarity[kept], similarity[gone])
        new[gone] = -torch.inf
        similarity[kept], similarity[:, kept] = new, new
        similarity[gone], similarity[:, gone] = -torch.inf, -torch.inf
        changed[kept], changed[gone] = count + step, -1
        best[kept] = best[gone] = -torch.inf
        stale = (partner == kept) | (partner == gone)
        closer = new > best
        closer[kept] = stale[kept] = stale[gone] = False
        best[closer], partner[closer] = new[closer], kept
        look(stale.nonzero(as_tuple=True)[0])
    survivors = {feature: place for place, feature in enumerate(f for f in range(count) if joined[f] == f)}
    for feature in range(count):  # a feature only ever joins one of a smaller index
        joined[feature] = joined[joined[feature]]
    return torch.tensor([survivors[feature] for feature in joined])


def _standardised(columns: Tensor) -> Tensor:
    """Columns of mean 0 and norm 1, at least float32; zeros where a column is constant."""
    wide = columns.to(torch.promote_types(columns.dtype, torch.float32))
    centred = wide - wide.mean(0)
    norm = centred.norm(dim=0)
    noise = 8 * torch.finfo(wide.dtype).eps * wide.norm(dim=0)  # what rounding of the mean leaves
    return torch.where(norm > noise, centred / norm.clamp_min(torch.finfo(wide.dtype).tiny), 0.0)


def _weights(experts: Experts, expert: int) -> Tensor:
    """The weights of each inner feature as a column, [3d, f]."""
    return torch.cat([experts.gate[expert].T, experts.down[expert], experts.up[expert].T])


def _average_in_places(
    experts: Experts, cluster: Tensor, places: Tensor, alpha: Tensor, scale: DownScale, merged: Experts, label: int
) -> None:
    """Writes expert `label` of `merged`: feature q of member j goes to place places[j, q], with weight alpha_j."""
    if len(cluster) == 1:
        merged.gate_up[label], merged.down[label] = experts.gate_up[cluster[0]], experts.down[cluster[0]]
        return
    device = experts.down.device
    wide = torch.float64 if device.type == "cpu" else torch.float32
    places = places.to(device)
    shares = (alpha / alpha.sum()).clamp_min(1e-9).to(device, wide)  # a place of unused members alone is their mean
    total = torch.zeros(experts.inner_width, dtype=wide, device=device)
    for share, place in zip(shares, places, strict=True):
        total.index_add_(0, place, share.expand(len(place)))
    divisor = total if scale == "mean" else shares.sum()
    targets = (
        (experts.gate, merged.gate[label], total),
        (experts.up, merged.up[label], total),
        (experts.down.mT, merged.down[label].mT, divisor.expand_as(total)),
    )
    for source, target, divisors in targets:
        summed = torch.zeros_like(target, dtype=wide)
        for member, share, place in zip(cluster.tolist(), shares, places, strict=True):
            summed.index_add_(0, place, source[member].to(wide) * share)
        target.copy_(summed / divisors[:, None])
