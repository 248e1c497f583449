"""Put the inner features of a cluster's experts into one order before they are averaged.

An expert does not change when its inner features are permuted, gate rows, up rows and down columns alike, so experts of
one function may have weights whose average is of none. M-SMoE (arXiv 2310.01334) and REAM (arXiv 2604.04356) undo that.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from llm.moe.choices import check_choice
from llm.moe.experts import Experts
from llm.moe.matching import ClusterTokens, Ingredients, similarity
from llm.moe.merging import members, unset_experts, weighted_experts


@torch.no_grad()
def permutations(
    experts: Experts, labels: Tensor, dominant: Tensor, tokens: ClusterTokens, ingredients: Ingredients = "both"
) -> Tensor:
    """order, int64 [E, f]: feature order[j, p] of expert j belongs beside feature p of its cluster's dominant expert.

    dominant: int64 [r]. "activations" maximises the correlation on the cluster's tokens; "weights" minimises the
    distance of the weights, as Git Re-Basin does; "both" maximises the sum of the correlations. Exact, by
    `linear_sum_assignment`: f^2 numbers of float64 and up to f^3 steps, seconds for f = 1536.
    """
    check_choice("ingredients", ingredients, Ingredients)
    order = torch.arange(experts.inner_width).repeat(len(experts), 1)
    for label, cluster in enumerate(members(labels)):
        leader = int(dominant[label])
        sample = None if ingredients == "weights" or len(cluster) == 1 else tokens.of(cluster)
        for member in cluster.tolist():
            if member != leader:
                gain = (
                    _inner_products(experts, leader, member)
                    if ingredients == "weights"
                    else similarity(experts, leader, member, sample, ingredients)
                )
                order[member] = torch.from_numpy(linear_sum_assignment(gain.cpu().double().numpy(), maximize=True)[1])
    return order


def permuted(experts: Experts, order: Tensor) -> Experts:
    """The same functions, with feature order[j, p] of expert j at place p. order: int64 [E, f]."""
    order = order.to(experts.down.device)
    both = torch.cat([order, order + experts.inner_width], dim=1)  # [E, 2f]
    return Experts(
        gate_up=experts.gate_up.gather(1, both[:, :, None].expand_as(experts.gate_up)),
        down=experts.down.gather(2, order[:, None, :].expand_as(experts.down)),
    )


def aligned_average(experts: Experts, labels: Tensor, order: Tensor, alpha: Tensor) -> Experts:
    """`weighted_experts` of `permuted` experts, with copies of one cluster at a time."""
    clusters = members(labels)
    merged = unset_experts(len(clusters), experts)
    for label, cluster in enumerate(clusters):
        aligned = permuted(experts.take(cluster), order[cluster])
        average = weighted_experts(aligned, torch.zeros_like(cluster), alpha[cluster])
        merged.gate_up[label], merged.down[label] = average.gate_up[0], average.down[0]
    return merged


def _inner_products(experts: Experts, first: int, second: int) -> Tensor:
    """<theta_p, theta_q> [f, f]. Norms do not depend on the order, so its best assignment has the least distance."""
    gate, up, down = (side.to(torch.promote_types(side.dtype, torch.float32)) for side in _sides(experts, first))
    other = [side.to(gate.dtype) for side in _sides(experts, second)]
    return gate @ other[0].T + up @ other[1].T + down.T @ other[2]


def _sides(experts: Experts, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    return experts.gate[expert], experts.up[expert], experts.down[expert]
