"""How much an expert matters, from sums over calibration tokens, and which experts that keeps.

The same numbers serve pruning (experts of low saliency go), one-shot grouping (those of high frequency dominate) and
REAM (those of high REAP saliency are the centroids).
"""

from typing import Literal

import torch
from torch import Tensor

from launch.errors import ConfigError
from llm.moe.allocation import by_frequency
from llm.moe.choices import check_choice
from llm.moe.statistics import LayerStatistics

Saliency = Literal["frequency", "probability", "gate", "ean", "reap"]
Scope = Literal["layer", "global"]


def saliency(statistics: LayerStatistics, kind: Saliency) -> Tensor:
    """The saliency of each expert of a layer, float64 [E]; an expert that is never selected has 0, or little.

    frequency: share of all selections (F-prune of HC-SMoE, arXiv 2410.08589). probability: mean softmax probability
    over all tokens (its S-prune). gate: mean gate. ean: sum of |E_j(x)| over the tokens that select j (expert
    activation norm). reap: mean of g_j(x) |E_j(x)| over them (REAP, arXiv 2510.13999, equation 9).
    """
    check_choice("saliency", kind, Saliency)
    match kind:
        case "frequency":
            return statistics.frequency()
        case "probability":
            return statistics.probability_sum / statistics.tokens
        case "gate":
            return statistics.gate_sum / statistics.tokens
        case "ean":
            return statistics.routed_norm_sum
        case "reap":
            return statistics.gated_norm_sum / statistics.selections.clamp_min(1)


def most_salient(scores: Tensor, count: int) -> Tensor:
    """bool [..., E]: the `count` experts of highest score [..., E] in each layer; among equals, the first."""
    num_experts = scores.shape[-1]
    if not 0 <= count <= num_experts:
        raise ConfigError(f"{count} experts cannot be kept of {num_experts}; ask for 1 to {num_experts}")
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def keep(scores: Tensor, count: int, *, scope: Scope = "layer") -> Tensor:
    """bool [L, E]: which experts of all layers stay, by their scores [L, E].

    layer: the `count` best of each layer. global: exactly count * L, the best of all layers, but at least a quarter of
    `count` in each (`allocation.by_frequency`); the official code has a threshold instead, which keeps some more or
    fewer and can empty a layer. Global ranks compare scores of different layers, which suits frequency and probability:
    expert outputs grow with depth, and with them ean and reap.
    """
    check_choice("scope", scope, Scope)
    counts = by_frequency(scores.numpy(), count) if scope == "global" else [count] * len(scores)
    return torch.stack([most_salient(layer, number) for layer, number in zip(scores, counts, strict=True)])
