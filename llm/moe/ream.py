"""REAM (arXiv 2604.04356): the most salient experts absorb those like them, and the router forgets the absorbed ones.

Between pruning and merging: a few large groups, many experts that stay alone, and a router of r rows, which only ever
selects centroids. The published procedure goes layer by layer, each calibrated behind the merged layers below it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from launch.errors import ConfigError
from llm.moe.experts import DROPPED
from llm.moe.merging import normalised
from llm.moe.representations import Array, router_similarity
from llm.moe.saliency import most_salient, saliency
from llm.moe.statistics import LayerStatistics


@dataclass(frozen=True, kw_only=True, eq=False)
class Groups:
    """Which experts REAM averages, and with which shares."""

    labels: Tensor  # int64 [E]
    centroids: Tensor  # int64 [r], rising: centroid c has label c
    shares: Tensor  # float64 [E], in proportion to REAP's saliency, sum 1 in each group

    @property
    def expert_map(self) -> Tensor:
        """int64 [E]: the router keeps the rows of the centroids alone."""
        expert_map = torch.full_like(self.labels, DROPPED)
        expert_map[self.centroids] = torch.arange(len(self.centroids))
        return expert_map


def ream_similarity(statistics: LayerStatistics) -> Array:
    """Mean of how alike outputs and router logits are, float64 [E, E], in [0, 1].

    Outputs: mean over tokens of (cos + 1) / 2; the published code takes the cosine of the mean gated outputs. Router
    logits: distances between the experts' unit vectors of logits over tokens, 1 at distance 0 and 0 at the largest.
    """
    outputs = (statistics.cosine_sum / statistics.tokens + 1).numpy() / 2
    distance = np.sqrt(1 - router_similarity(statistics))  # (cos + 1) / 2 = 1 - distance^2 / 4
    return (outputs + outputs.T) / 4 + (1 - distance / (distance.max() or 1.0)) / 2


def ream_groups(statistics: LayerStatistics, count: int, *, group_size: int = 16) -> Groups:
    """Groups around the `count` experts of highest REAP saliency; from the most salient on, each takes the most similar
    of those left until it has `group_size`, itself included. ConfigError if that cannot hold all experts.
    """
    scores = saliency(statistics, "reap")
    chosen = most_salient(scores, count)
    if count * group_size < len(scores):
        raise ConfigError(
            f"{count} groups of at most {group_size} cannot hold {len(scores)} experts; keep at least "
            f"{-(-len(scores) // group_size)} experts or raise the group size"
        )
    (centroids,) = chosen.nonzero(as_tuple=True)
    labels = torch.full((len(scores),), DROPPED)
    labels[centroids] = torch.arange(count)
    similarity = torch.from_numpy(ream_similarity(statistics))
    for label in scores[centroids].argsort(descending=True, stable=True).tolist():
        (left,) = (labels == DROPPED).nonzero(as_tuple=True)
        nearest = similarity[centroids[label], left].argsort(descending=True, stable=True)
        labels[left[nearest[: group_size - 1]]] = label
    return Groups(labels=labels, centroids=centroids, shares=normalised(labels, scores))
