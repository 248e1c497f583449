"""Pruning: the experts that stay are unchanged, the router never selects the others again.

O-prune (NAEE, arXiv 2402.14800) keeps the subset of experts with which the layer's output changes least. A subset is
scored without running it: a token's error is a quadratic form in the change of its gates, and its matrix, the inner
products of the outputs of the experts that any subset could select for it, is made once for all subsets.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from launch.errors import ConfigError
from launch.random import random_bits
from llm.moe.experts import DROPPED, Experts, LayerTokens, RoutingRule

EXHAUSTIVE_LIMIT = 100_000  # subsets; 8 experts have 70, 16 have 12870, 32 have 601 million
_ELEMENTS = 1 << 22  # float64 numbers of one intermediate result: 32 MiB


def pruned_map(kept: Tensor) -> Tensor:
    """The expert map, int64 [E], that keeps the experts `kept` bool [E], in their order."""
    return torch.where(kept, kept.cumsum(0) - 1, DROPPED)


def candidate_subsets(num_experts: int, count: int, *, samples: int | None, key: int) -> Tensor:
    """Subsets of `count` experts, bool [N, E]: `samples` random ones, or all where there are no more or with None.

    Sample i depends on (key, i) alone, and may repeat another. ConfigError for more than `EXHAUSTIVE_LIMIT` of all.
    """
    if not 1 <= count <= num_experts:
        raise ConfigError(f"{count} experts cannot be kept of {num_experts}; ask for 1 to {num_experts}")
    total = math.comb(num_experts, count)
    if samples is not None and samples < total:
        bits = random_bits(key, torch.arange(samples), num_experts)  # [N, E]
        chosen = bits.argsort(-1)[:, :count]
    elif total <= EXHAUSTIVE_LIMIT:
        chosen = torch.tensor(list(itertools.combinations(range(num_experts), count)))
    else:
        raise ConfigError(
            f"{count} of {num_experts} experts can be kept in {total:,} ways, and at most {EXHAUSTIVE_LIMIT:,} are all "
            f"tried; ask for a number of random samples instead"
        )
    return torch.zeros(len(chosen), num_experts, dtype=torch.bool).scatter_(1, chosen, True)


@torch.no_grad()
def subset_errors(experts: Experts, batch: LayerTokens, rule: RoutingRule, subsets: Tensor) -> Tensor:
    """|Y - Y_K| of each subset K (bool [N, E]) over one batch, float64 [N]: Frobenius norms of changes of the output.

    Y is the output of the whole layer, Y_K that with the logits of all others at minus infinity before the softmax. Add
    up the errors of all batches, on all ranks; the subset of the smallest sum is O-prune's.
    """
    num_experts, width = len(experts), experts.width
    kept = subsets.to(batch.hidden.device)
    fewest = int(kept.sum(-1).min())
    reach = min(num_experts, rule.top_k + num_experts - fewest)  # R: no subset selects what a token ranks lower
    probabilities = functional.softmax(batch.logits.double(), dim=-1)  # [T, E]
    ranked = batch.logits.argsort(dim=-1, descending=True, stable=True)[:, :reach]  # [T, R]
    squares = torch.zeros(len(kept), dtype=torch.float64, device=kept.device)
    rows = max(1, _ELEMENTS // (num_experts * width))
    for start in range(0, len(batch.hidden), rows):
        part = slice(start, start + rows)
        tokens, ranks, masses = batch.hidden[part], ranked[part], probabilities[part]
        outputs = torch.stack([experts.output(j, tokens).double() for j in range(num_experts)], dim=1)  # [t, E, d]
        outputs = outputs.gather(1, ranks[..., None].expand(-1, -1, width))  # [t, R, d]
        gram = outputs @ outputs.mT  # [t, R, R]
        whole = _gates(kept.new_ones(1, num_experts), masses, ranks, rule)  # [t, 1, R]
        chunks = kept.split(max(1, _ELEMENTS // ranks.numel()))
        found = [
            ((change := _gates(chunk, masses, ranks, rule) - whole) @ gram * change).sum((0, 2)) for chunk in chunks
        ]
        squares += torch.cat(found)
    return squares.clamp_min(0).sqrt().cpu()


def _gates(kept: Tensor, probabilities: Tensor, ranked: Tensor, rule: RoutingRule) -> Tensor:
    """The gates under each subset `kept` bool [n, E] of the experts that t tokens rank first, float64 [t, n, R].

    probabilities: [t, E]. ranked: int64 [t, R]. The same rule as `experts.route`, for all subsets at once.
    """
    available = kept.T[ranked].mT  # [t, n, R]
    selected = available & (available.cumsum(-1) <= rule.top_k)
    gates = probabilities.gather(1, ranked)[:, None] * selected
    total = gates.sum(-1) if rule.normalise else probabilities @ kept.T.double()  # [t, n]
    return gates / total[..., None]
