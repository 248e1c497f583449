"""Small layers with a known structure, for the tests of merges."""

import torch

from llm.moe.experts import Experts, LayerTokens


def random_experts(count=4, *, width=8, inner=6, seed=0, dtype=torch.float64):
    """Experts that have nothing in common."""
    source = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(count, 2 * inner, width, generator=source, dtype=dtype) / width**0.5
    down = torch.randn(count, width, inner, generator=source, dtype=dtype) / inner**0.5
    return Experts(gate_up=gate_up, down=down)


def random_tokens(count=64, *, width=8, experts=4, seed=1, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=source, dtype=dtype)
    return LayerTokens(hidden=hidden, logits=torch.randn(count, experts, generator=source, dtype=dtype))


def shuffled_copies(copies=3, *, seed=2, **shape):
    """Experts of one function: each has the inner features of the first in an order of its own. And these orders."""
    first = random_experts(1, **shape)
    source = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(first.inner_width, generator=source) for _ in range(copies)])
    orders[0] = torch.arange(first.inner_width)
    gate, up, down = first.gate[0], first.up[0], first.down[0]
    gate_up = torch.stack([torch.cat([gate[o], up[o]]) for o in orders])
    return Experts(gate_up=gate_up, down=torch.stack([down[:, o] for o in orders])), orders
