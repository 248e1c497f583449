"""Averages of the experts of a cluster (HC-SMoE, arXiv 2410.08589, section 3.3), a cluster at a time."""

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from llm.moe.choices import check_choice
from llm.moe.experts import Experts
from llm.moe.statistics import LayerStatistics

logger = logging.getLogger(__name__)

Coefficients = Literal[
    "average",  # 1 / |C|
    "frequency",  # by how often the router selects each expert; the paper's choice
    "frequency_top2",  # counting the 2 largest logits whatever k is, as the official code does
    "gate_aware",  # E[g_j G_C] / E[G_C^2], G_C the sum of the cluster's gates
]

_ELEMENTS = 1 << 18  # of a sum at once: 2 MiB of float64, which stay in the cache from one member to the next


def members(labels: Tensor) -> list[Tensor]:
    """The experts of each cluster, int64 [|C|] in rising order, for labels int64 [E] of 0..r-1 or DROPPED."""
    found = [(labels == label).nonzero(as_tuple=True)[0] for label in range(int(labels.max()) + 1)]
    if not found or any(len(cluster) == 0 for cluster in found):
        raise ValueError(f"Labels {sorted(set(labels.tolist()))} leave a cluster without experts.")
    return found


def normalised(labels: Tensor, scores: Tensor) -> Tensor:
    """Scores [E] divided by their sum in each cluster, float64 [E]; 0 for dropped experts.

    A cluster whose scores are all 0 gets equal shares and a warning: the official code makes such an expert all zeros.
    """
    shares = torch.zeros(len(labels), dtype=torch.float64)
    for label, cluster in enumerate(members(labels)):
        score = scores[cluster].double()
        if float(score.sum()) == 0:
            if len(cluster) > 1:
                logger.warning(
                    "No calibration token reaches cluster %d (experts %s): it becomes their plain mean",
                    label,
                    cluster.tolist(),
                )
            score = torch.ones_like(score)
        shares[cluster] = score / score.sum()
    return shares


def coefficients(labels: Tensor, statistics: LayerStatistics, rule: Coefficients) -> Tensor:
    """alpha, float64 [E], sum 1 in each cluster of labels int64 [E].

    "gate_aware" is the alpha that minimises E|sum_j g_j E_j - G_C sum_j alpha_j E_j|^2 if the outputs of the members
    are uncorrelated, of equal energy and independent of the gates. Members that never fire together get shares of
    E[g_j^2].
    """
    check_choice("coefficients", rule, Coefficients)
    return normalised(labels, _SCORES[rule](labels, statistics))


def weighted_experts(experts: Experts, labels: Tensor, alpha: Tensor) -> Experts:
    """The r experts sum over j in C of alpha_j theta_j, gate, up and down alike. labels: int64 [E]; alpha: [E].

    Sums are float64 on the CPU and float32 elsewhere, cast once. Beyond the result, a few MiB are held, however many
    members a cluster has.
    """
    clusters = members(labels)
    merged = unset_experts(len(clusters), experts)
    for label, cluster in enumerate(clusters):
        _write_weighted_sum(merged.gate_up[label], experts.gate_up, cluster, alpha)
        _write_weighted_sum(merged.down[label], experts.down, cluster, alpha)
    return merged


def unset_experts(count: int, like: Experts) -> Experts:
    """`count` experts of the shapes, type and device of `like`, to be written one at a time."""
    gate_up = like.gate_up.new_empty(count, *like.gate_up.shape[1:])
    return Experts(gate_up=gate_up, down=like.down.new_empty(count, *like.down.shape[1:]))


def _write_weighted_sum(target: Tensor, weights: Tensor, cluster: Tensor, alpha: Tensor) -> None:
    """target: [rows, columns]; weights: [E, rows, columns]."""
    if len(cluster) == 1 and float(alpha[cluster]) == 1:
        target.copy_(weights[int(cluster)])
        return
    wide = torch.float64 if weights.device.type == "cpu" else torch.float32
    step = max(1, _ELEMENTS // weights.shape[2])
    total = torch.empty(step, weights.shape[2], dtype=wide, device=weights.device)
    shares = alpha[cluster].tolist()
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        found = total[: len(target[part])].zero_()
        for member, share in zip(cluster.tolist(), shares, strict=True):
            found.add_(weights[member, part].to(wide), alpha=share)
        target[part] = found


def _gate_aware_scores(labels: Tensor, statistics: LayerStatistics) -> Tensor:
    """Sum over tokens of g_j G_C, float64 [E], C the cluster of j."""
    together = labels[:, None] == labels[None, :]
    return (statistics.gate_gram * together).sum(1)


_SCORES: dict[Coefficients, Callable[[Tensor, LayerStatistics], Tensor]] = {
    "average": lambda labels, _: torch.ones(len(labels)),
    "frequency": lambda _, statistics: statistics.selections,
    "frequency_top2": lambda _, statistics: statistics.top2_selections,
    "gate_aware": _gate_aware_scores,
}
