"""What merging does to each layer, on held-out text: the error of its output, and what its router still does.

Inputs of a layer are those of the original model, so that errors of different layers do not add up and each can be read
on its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm.moe.experts import DROPPED, Experts, LayerTokens, MergedLayer, RoutingRule, merged_output, mixture, route
from llm.moe.merge import load_layer
from llm.moe.source import Source
from llm.moe.walk import start_walk


@dataclass(frozen=True, kw_only=True)
class LayerFidelity:
    """One MoE layer, over T held-out tokens."""

    layer: int
    experts: int  # r that are left
    largest_cluster: int  # experts that became one
    singletons: int  # experts that stayed alone
    relative_error: float  # |Y - Y~| / |Y|, Frobenius norms over all tokens
    distinct_experts: float  # mean merged experts that a token reaches; k without collisions
    collisions: float  # share of tokens with two selected experts in one cluster
    dropped_mass: float  # mean probability on experts that the router may no longer select


def judge_layers(
    source: Source, merged: Path, blocks: dict[int, Tensor], device: torch.device
) -> Iterator[LayerFidelity]:
    """Layer by layer, in the memory of one original and one merged layer. blocks: token ids int64 [L] by number."""
    walk = start_walk(source, blocks, device)
    for index in range(source.shape.num_layers):
        if index not in source.shape.moe_layers:
            walk.layer(index, None)
            continue
        experts, layer = source.experts(index).to(device), load_layer(merged, index).to(device)
        seen: list[LayerTokens] = []
        walk.look(index, lambda _, tokens, seen=seen: seen.append(tokens))
        yield judge_layer(index, experts, layer, seen, source.shape.rule)
        walk.layer(index, experts)


@torch.no_grad()
def judge_layer(
    index: int, experts: Experts, layer: MergedLayer, batches: list[LayerTokens], rule: RoutingRule
) -> LayerFidelity:
    error = norm = distinct = collided = dropped = 0.0
    count = 0
    kept = None if bool(layer.kept.all()) else layer.kept
    for batch in batches:
        before = mixture(experts, batch.hidden, route(batch.logits, rule)).double()
        after = merged_output(layer, batch, rule).double()
        error += float((before - after).square().sum())
        norm += float(before.square().sum())
        slots = layer.expert_map[route(batch.logits, rule, kept=kept).selected].sort(-1).values  # [T, k]
        reached = 1 + (slots[:, 1:] != slots[:, :-1]).sum(-1)
        distinct += float(reached.sum())
        collided += float((reached < slots.shape[1]).sum())
        dropped += float(batch.logits.float().softmax(-1)[:, layer.expert_map == DROPPED].sum())
        count += len(batch.hidden)
    sizes = torch.bincount(layer.expert_map[layer.kept], minlength=len(layer.experts))
    return LayerFidelity(
        layer=index,
        experts=len(layer.experts),
        largest_cluster=int(sizes.max()),
        singletons=int((sizes == 1).sum()),
        relative_error=(error / norm) ** 0.5 if norm else 0.0,
        distinct_experts=distinct / count,
        collisions=collided / count,
        dropped_mass=dropped / count,
    )
