"""Constants that give a merged expert back what tells its members apart.

A merged expert sees a token, not which of its members the router selected. The router still knows: a vector c_j for
each old expert, weighted by its gate, restores the difference of the means (MoNE, arXiv 2507.00390, replaces whole
experts by such constants). They cost E d numbers a layer beside E 3 d f.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.moe.experts import Experts, LayerTokens, MergedLayer, RoutingRule, merged_output, mixture, route
from llm.moe.least_squares import (
    RIDGES,
    Fit,
    NormalEquations,
    Reduce,
    added,
    best_change,
    equations,
    reached_tokens,
)


@torch.no_grad()
def residual_constants(
    experts: Experts,
    layer: MergedLayer,
    batches: Sequence[LayerTokens],
    rule: RoutingRule,
    *,
    ridges: Sequence[float] = RIDGES,
    reduce: Reduce = lambda values: values,
) -> tuple[Tensor, Fit]:
    """c, float64 [E, d], that minimises the sum over tokens of |y(x) - y~(x) - sum over S(x) of g_j(x) c_j|^2.

    S(x) and g are those of the whole router, also for experts that `layer` drops. One solution for all experts
    together, of E x E normal equations; no constants if they do not help tokens that the fit did not see.
    """
    parts: list[NormalEquations | None] = [None, None]
    for batch in batches:
        routing = route(batch.logits, rule)
        gates, y = routing.dense_gates(), mixture(experts, batch.hidden, routing)
        missing = y - merged_output(layer, batch, rule)
        for part, rows in enumerate(reached_tokens(gates, split=len(ridges) > 1)):
            parts[part] = added(parts[part], equations(gates[rows], missing[rows], y[rows]))
    seen, unseen = (part and part.summed(reduce) for part in parts)
    assert seen is not None
    change, fit = best_change(seen, unseen, ridges)
    return change.T.contiguous(), fit


def constants_output(constants: Tensor, tokens: LayerTokens, rule: RoutingRule) -> Tensor:
    """Sum over S(x) of g_j(x) c_j, [T, d]: what a layer with constants [E, d] adds to its merged output."""
    gates = route(tokens.logits, rule).dense_gates().to(tokens.hidden.dtype)
    return gates @ constants.to(tokens.hidden)
