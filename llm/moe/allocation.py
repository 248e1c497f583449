"""How many clusters each layer keeps, at r per layer on average.

Numbers that differ between layers fit the compact format only: a stock configuration has one number of experts.
"""

import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np

from launch.errors import ConfigError
from llm.moe.choices import check_choice
from llm.moe.clustering import Dendrogram, check_clusters
from llm.moe.representations import Array

Allocation = Literal[
    "uniform",  # r in every layer: the paper's main tables
    "frequency",  # more where selections spread over more experts
    "dendrogram",  # the nearest clusters of all layers merge first
    "official_frequency",  # the threshold of the published Mixtral code: not exactly r L, and a layer may get 0
]


def allocate(
    allocation: Allocation,
    clusters: int,
    frequencies: Array,
    dendrograms: Sequence[Dendrogram] = (),
    *,
    alone: int = 0,
) -> list[int]:
    """Clusters of each of L layers. frequencies: [L, E], `LayerStatistics.frequency`; dendrograms: L, for that choice.

    alone: experts of each layer that merge with none, which takes a cluster for each and one for the others.
    ConfigError for another allocation, a number that no layer can have, a choice without its dendrograms, or a layer
    left with too few clusters.
    """
    check_choice("allocation", allocation, Allocation)
    layers, experts = frequencies.shape
    fewest = min(alone + 1, experts)
    check_clusters(clusters, experts, fewest)
    if allocation == "uniform":
        return [clusters] * layers
    if allocation == "frequency":
        return by_frequency(frequencies, clusters, fewest=fewest)
    if allocation == "dendrogram":
        if not dendrograms:
            raise ConfigError("allocation = 'dendrogram' goes by trees, and k-means grows none; cluster by a linkage")
        return by_dendrogram(dendrograms, clusters)
    found = by_official_threshold(frequencies, clusters)
    if min(found) < fewest:
        raise ConfigError(
            f"allocation = {allocation!r} leaves layer {found.index(min(found))} (of those with experts) {min(found)} "
            f"clusters, and it needs {fewest}; use 'frequency', which sees to that"
        )
    return found


def by_frequency(frequencies: Array, clusters: int, *, fewest: int = 1) -> list[int]:
    """Each layer's number of experts among the r L most frequent ones of all layers, exactly r L in total.

    `fewest` or ceil(r / 4) of every layer, whichever is more, come first. Of equal frequencies the earlier layer, then
    the earlier expert.
    """
    layers, _ = frequencies.shape
    first = max(fewest, -(-clusters // 4))
    beyond = -np.sort(-frequencies, axis=1)[:, first:]  # what a layer offers after its minimum, most frequent first
    order = np.argsort(-beyond, axis=None, kind="stable")[: (clusters - first) * layers]
    owners = order // max(1, beyond.shape[1])
    return (first + np.bincount(owners, minlength=layers)).tolist()


def by_official_threshold(frequencies: Array, clusters: int) -> list[int]:
    """Each layer's number of experts at or above the frequency at position r L (from 0) of all, falling."""
    falling = -np.sort(-frequencies, axis=None)
    threshold = falling[min(clusters * len(frequencies), falling.size - 1)]
    return (frequencies >= threshold).sum(1).tolist()


def by_dendrogram(dendrograms: Sequence[Dendrogram], clusters: int) -> list[int]:
    """What is left of each layer when the lowest merge of all layers comes next, until r L clusters are left.

    Outputs grow with depth, so heights count in units of their layer's mean distance (after REAP, arXiv 2510.13999).
    Of equal heights the earlier layer. ConfigError if experts that stay alone leave too few merges.
    """
    left = [tree.experts for tree in dendrograms]
    target, possible = clusters * len(left), sum(tree.fewest for tree in dendrograms)
    if target < possible:
        raise ConfigError(
            f"{clusters} clusters per layer are {target} in {len(left)} layers, but experts that stay alone leave at "
            f"least {possible}; ask for {-(-possible // len(left))} or more, or let fewer stay alone"
        )

    def height(layer: int, step: int) -> float:
        return dendrograms[layer].rows[step, 2] / (dendrograms[layer].mean_distance or 1.0)

    following = [(height(layer, 0), layer) for layer, tree in enumerate(dendrograms) if len(tree.rows)]
    heapq.heapify(following)
    for _ in range(sum(left) - target):
        _, layer = heapq.heappop(following)
        left[layer] -= 1
        step = dendrograms[layer].experts - left[layer]
        if step < len(dendrograms[layer].rows):
            heapq.heappush(following, (height(layer, step), layer))
    return left
