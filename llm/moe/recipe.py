"""A way from E experts to r: which ones go together or go away, and what one expert is made of a group.

    hierarchical, average linkage, output, frequency          HC-SMoE (arXiv 2410.08589), the default
    one_shot                                                  M-SMoE (arXiv 2310.01334)
    prune by frequency, probability, reap, ean; o_prune       F-prune, S-prune, REAP, EAN, NAEE
    ream, permutation                                         REAM (arXiv 2604.04356)
    balanced, neurons, fit to the layer                       what we find best (docs/moe.md)

Groups come from the sums of a calibration alone. Some ways of making one expert of a group, and o_prune, read the
calibration tokens again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from launch.config import unknown_key
from launch.errors import ConfigError
from launch.random import stream_key
from llm.moe import alignment, matching
from llm.moe.allocation import Allocation, allocate
from llm.moe.clustering import Linkage, centres, dendrogram, labels
from llm.moe.experts import Experts, LayerTokens, MergedLayer, RoutingRule
from llm.moe.k_means import k_means
from llm.moe.least_squares import RIDGES, least_squares
from llm.moe.matching import ClusterTokens, Ingredients
from llm.moe.merging import Coefficients, coefficients, weighted_experts
from llm.moe.neurons import choose_neurons
from llm.moe.one_shot import one_shot_labels
from llm.moe.pruning import candidate_subsets, pruned_map, subset_errors
from llm.moe.ream import ream_groups
from llm.moe.representations import Array, Representation, combined, distances, router_similarity
from llm.moe.saliency import Saliency, Scope, keep, most_salient, saliency
from llm.moe.statistics import LayerStatistics

Group = Literal["hierarchical", "k_means", "balanced", "one_shot", "ream", "prune", "o_prune"]
Combine = Literal["average", "permutation", "fix_dominant", "zipit", "neurons"]
Fitted = Literal["none", "mixture", "coefficients", "layer"]


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """How the experts of every layer become fewer."""

    experts: int  # r that each layer keeps, on average where `allocation` or `scope` say so
    group: Group = "hierarchical"  # which experts go together; prune and o_prune drop the others
    representation: str = "output"  # what experts are compared by; or a sum such as 0.5*output+weights
    linkage: Linkage = "average"  # hierarchical: the distance of two clusters
    allocation: Allocation = "uniform"  # how many clusters each layer gets
    protect: int = 0  # experts of highest saliency of a layer that stay as they are
    saliency: Saliency = "reap"  # what prune keeps, balanced groups around, and `protect` protects by
    scope: Scope = "layer"  # prune, one_shot: r experts of each layer lead, or the best of all layers
    shares: Coefficients = "frequency"  # weights of the members of a group
    combine: Combine = "average"  # how a group becomes one expert: an average, of matched features, or a choice of them
    ingredients: Ingredients = "activations"  # permutation, fix_dominant: what features are matched by
    fit: Fitted = "none"  # then down projections by least squares, to the outputs of the group or of the layer
    sweeps: int = 1  # fit = layer: how often each expert is fitted to what the others leave
    group_limit: int | None = None  # experts of the largest group: balanced (E / r), one_shot (none), ream (16)
    subsets: int | None = None  # o_prune: random sets of experts to try; null for all
    sequential: bool = False  # calibrate each layer behind the merged ones before it
    seed: int = 0  # of k_means and of random sets

    def check(self, path: str = "") -> None:
        if self.experts < 1:
            raise ConfigError(f"experts = {self.experts}; a layer keeps at least 1")
        self.terms  # noqa: B018  (raises)
        clusters = self.group in ("hierarchical", "k_means")
        for name, applies, to in (
            ("linkage", self.group == "hierarchical", "group = hierarchical"),
            ("representation", clusters or self.group == "balanced", "group = hierarchical, k_means and balanced"),
            ("allocation", clusters, "group = hierarchical and k_means"),
            ("protect", clusters, "group = hierarchical and k_means"),
            ("scope", self.group in ("prune", "one_shot"), "group = prune and one_shot"),
            ("combine", self.group not in ("prune", "o_prune"), "groups that merge"),
            ("group_limit", self.group in ("balanced", "one_shot", "ream"), "group = balanced, one_shot and ream"),
            ("subsets", self.group == "o_prune", "group = o_prune"),
            ("sweeps", self.fit == "layer", "fit = layer"),
        ):
            if not applies and getattr(self, name) != getattr(_USUAL, name):
                raise ConfigError(
                    f"{name} = {getattr(self, name)} works with {to}, not with group = {self.group}, fit = {self.fit}"
                )
        if self.sweeps < 1:
            raise ConfigError(f"sweeps = {self.sweeps}; the smallest is 1")
        if self.group in ("ream", "prune", "o_prune") and (self.fit == "coefficients" or self.combine == "neurons"):
            raise ConfigError(
                f"combine = {self.combine}, fit = {self.fit}: group = {self.group} sends no token to experts that it "
                "takes away; use combine=average or permutation, and fit=layer"
            )
        if not 0 <= self.protect < self.experts:
            raise ConfigError(f"protect = {self.protect}; of experts = {self.experts} at least one is for all others")
        if self.sequential and self.allocation != "uniform":
            raise ConfigError(
                f"allocation = {self.allocation} compares all layers before the first is merged, and sequential = true "
                "knows a layer only behind the merged ones; use allocation=uniform"
            )

    @property
    def terms(self) -> dict[Representation, float]:
        """Representations and their shares: "output", or "0.5*output+weights"."""
        terms: dict[Any, float] = {}
        for term in self.representation.replace(" ", "").split("+"):
            factor, _, name = term.rpartition("*")
            if name not in get_args(Representation):
                raise unknown_key(name, get_args(Representation), f"representation = {self.representation!r}")
            try:
                terms[name] = float(factor or 1.0)
                if not terms[name] > 0:
                    raise ValueError
            except ValueError:
                raise ConfigError(
                    f"representation = {self.representation!r}: {factor!r} is no positive number; write it like "
                    "0.5*output+weights"
                ) from None
        return terms

    @property
    def reads_tokens(self) -> bool:
        """Whether sums are not enough."""
        matched = self.combine in ("permutation", "fix_dominant") and self.ingredients == "weights"
        by_weights = self.combine == "average" or matched
        return self.group == "o_prune" or not by_weights or self.fit != "none" or self.sequential


_USUAL = MergeConfig(experts=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """What becomes of the experts of a layer, before any weight is touched."""

    expert_map: Tensor  # int64 [E]: as in `MergedLayer`
    labels: Tensor  # int64 [E]: the group of each expert, also where the router forgets it; DROPPED if in none
    shares: Tensor  # float64 [E]: sum 1 in each group
    dominant: Tensor  # int64 [r]: the member that others are matched to


def group_all(config: MergeConfig, layers: Sequence[tuple[LayerStatistics, Tensor]]) -> list[Groups | None]:
    """The groups of every layer by its statistics and `weight_gram`; None where tokens have to decide."""
    if config.group == "o_prune":
        return [None] * len(layers)
    if config.group == "prune":
        scores = torch.stack([saliency(statistics, config.saliency) for statistics, _ in layers])
        return [_pruned(kept) for kept in keep(scores, config.experts, scope=config.scope)]
    if config.group == "ream":
        return [_absorbed(config, statistics) for statistics, _ in layers]
    if config.group in ("one_shot", "balanced"):
        kind = "frequency" if config.group == "one_shot" else config.saliency
        scores = torch.stack([saliency(statistics, kind) for statistics, _ in layers])
        leaders = keep(scores, config.experts, scope=config.scope)
        return [_around(config, *found, leading) for found, leading in zip(layers, leaders, strict=True)]
    return _clustered(config, layers)


def merge_layer(
    config: MergeConfig, experts: Experts, groups: Groups | None, tokens: Sequence[LayerTokens], rule: RoutingRule
) -> MergedLayer:
    """The layer with fewer experts. tokens: those of the calibration, empty unless `config.reads_tokens`."""
    if groups is None:
        key = stream_key(config.seed, "o-prune")
        subsets = candidate_subsets(len(experts), config.experts, samples=config.subsets, key=key)
        errors = torch.stack([subset_errors(experts, batch, rule, subsets) for batch in tokens]).sum(0)
        groups = _pruned(subsets[errors.argmin()])
    merged = _one_each(config, experts, groups, tokens, rule)
    layer = MergedLayer(expert_map=groups.expert_map, experts=merged)
    if config.combine == "neurons":
        layer, _ = choose_neurons(experts, layer, tokens, rule)
    if config.fit == "none":
        return layer
    alpha = groups.shares if config.fit == "coefficients" else None
    return least_squares(
        experts, layer, tokens, rule, target=config.fit, alpha=alpha, ridges=RIDGES, sweeps=config.sweeps
    )[0]


def _one_each(
    config: MergeConfig, experts: Experts, groups: Groups, tokens: Sequence[LayerTokens], rule: RoutingRule
) -> Experts:
    labels, shares, dominant = groups.labels, groups.shares, groups.dominant
    if config.combine in ("average", "neurons"):  # neurons are chosen only where they are better than the average
        return weighted_experts(experts, labels, shares)
    sample = ClusterTokens(batches=tokens, rule=rule, seed=config.seed)
    if config.combine == "permutation":
        order = alignment.permutations(experts, labels, dominant, sample, config.ingredients)
        return alignment.aligned_average(experts, labels, order, shares)
    if config.combine == "fix_dominant":
        return matching.fix_dominant(experts, labels, dominant, shares, sample, ingredients=config.ingredients)
    return matching.zipit(experts, labels, shares, sample)


# --- groups ----------------------------------------------------------------------------------------------------------


def _clustered(config: MergeConfig, layers: Sequence[tuple[LayerStatistics, Tensor]]) -> list[Groups | None]:
    matrices = [_distances(config, statistics, gram) for statistics, gram in layers]
    kept = [_protected(config, statistics) for statistics, _ in layers]
    trees = [
        dendrogram(matrix, config.linkage, keep=alone)
        for matrix, alone in zip(matrices, kept, strict=True)
        if config.group == "hierarchical"
    ]
    frequencies = np.stack([statistics.frequency().numpy() for statistics, _ in layers])
    counts = allocate(config.allocation, config.experts, frequencies, trees, alone=config.protect)
    found: list[Groups | None] = []
    for index, (matrix, (statistics, _), count) in enumerate(zip(matrices, layers, counts, strict=True)):
        if config.group == "hierarchical":
            clusters = labels(trees[index], count)
        else:
            key = stream_key(config.seed, "k-means", index)
            clusters = k_means(matrix, count, key=key, keep=kept[index])
        members = torch.from_numpy(clusters)
        shares = coefficients(members, statistics, config.shares)
        dominant = torch.from_numpy(centres(matrix, clusters))
        found.append(Groups(expert_map=members, labels=members, shares=shares, dominant=dominant))
    return found


def _absorbed(config: MergeConfig, statistics: LayerStatistics) -> Groups:
    groups = ream_groups(statistics, config.experts, group_size=config.group_limit or 16)
    return Groups(expert_map=groups.expert_map, labels=groups.labels, shares=groups.shares, dominant=groups.centroids)


def _around(config: MergeConfig, statistics: LayerStatistics, gram: Tensor, leading: Tensor) -> Groups:
    """Groups around leading experts, bool [E]: by router logits, or balanced ones by a representation."""
    if config.group == "one_shot":
        found = one_shot_labels(router_similarity(statistics), leading, group_limit=config.group_limit)
    else:
        limit = config.group_limit or -(-len(leading) // config.experts)
        found = one_shot_labels(-_distances(config, statistics, gram), leading, group_limit=limit)
    (leaders,) = leading.nonzero(as_tuple=True)
    shares = coefficients(found, statistics, config.shares)
    return Groups(expert_map=found, labels=found, shares=shares, dominant=leaders)


def _pruned(kept: Tensor) -> Groups:
    expert_map = pruned_map(kept)
    (indices,) = kept.nonzero(as_tuple=True)
    return Groups(expert_map=expert_map, labels=expert_map, shares=kept.double(), dominant=indices)


def _distances(config: MergeConfig, statistics: LayerStatistics, gram: Tensor) -> Array:
    if len(config.terms) == 1:
        (name,) = config.terms
        return distances(statistics, gram, name)
    return combined(statistics, gram, config.terms)


def _protected(config: MergeConfig, statistics: LayerStatistics) -> list[int]:
    (indices,) = most_salient(saliency(statistics, config.saliency), config.protect).nonzero(as_tuple=True)
    return indices.tolist()
