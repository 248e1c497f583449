"""HC-SMoE as its authors published it (arXiv 2410.08589), with the whole model in memory: the other side of
`bench_moe_merge.py`, written from a description of the official code.

A hook stores the whole input of every MoE layer; every expert runs on all of it, and its mean output stands for it.
Average linkage searches all pairs of clusters anew at every step. Merging scales the members' weights by how often they
are among the two largest logits, and lets the names of all members point to one expert.

What is not official makes this side faster or smaller: one pass of the text serves means and frequencies; weights rest
in bfloat16, as there, but multiply in float32, an expert at a time, because bfloat16 products are far slower on most
CPUs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from llm.moe.source import Source

_EPSILON = 1e-7  # of the published divisor


class Expert(nn.Module):
    """Weights rest in their own type."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(w, requires_grad=False) for w in (gate, up, down))

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up, down = (w.to(hidden.dtype) for w in (self.gate, self.up, self.down))
        return functional.linear(functional.silu(functional.linear(hidden, gate)) * functional.linear(hidden, up), down)


class ExpertList(nn.ModuleList):
    """In the place of transformers' fused experts."""

    def forward(self, hidden: Tensor, selected: Tensor, gates: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for number in selected.unique().tolist():
            rows, slots = (selected == number).nonzero(as_tuple=True)
            output.index_add_(0, rows, self[number](hidden[rows]) * gates[rows, slots, None].to(hidden.dtype))
        return output


@dataclass
class Seen:
    """What the hook of a layer stores."""

    inputs: list[Tensor] = field(default_factory=list)  # [T, d] of each batch
    top2: Tensor | None = None  # [E]: tokens with the expert among the 2 largest logits


def load(source: Source) -> Any:
    """The whole model: its experts as they are stored, everything else in float32."""
    from transformers import AutoModelForCausalLM

    source.config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(source.config)
    architecture = source.shape.architecture

    def read(name: str) -> Tensor:
        with safe_open(source.folder / source.shards[name], framework="pt") as file:
            return file.get_tensor(name).clone()

    for layer in source.shape.moe_layers:
        model.model.layers[layer].mlp.experts = ExpertList(
            Expert(*(read(architecture.expert(layer, number, matrix)) for matrix in ("gate", "up", "down")))
            for number in range(source.shape.num_experts)
        )
    others = {
        n.replace(f".{architecture.block}.", ".mlp."): read(n).float() for n in source.shards if not source.is_expert(n)
    }
    if source.config.tie_word_embeddings:
        others["lm_head.weight"] = others["model.embed_tokens.weight"]
    absent, surplus = model.load_state_dict(others, strict=False, assign=True)
    assert not surplus and all(".experts." in name for name in absent), (absent, surplus)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=source.config)  # its buffers are in no file
    return model.eval()


@torch.no_grad()
def calibrate(model: Any, source: Source, blocks: Iterable[Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Mean outputs [E, d] and top-2 counts [E] by MoE layer."""
    seen = {layer: Seen() for layer in source.shape.moe_layers}
    hooks = [model.model.layers[layer].mlp.gate.register_forward_hook(_store(found)) for layer, found in seen.items()]
    for block in blocks:
        model.model(block[None])
    for hook in hooks:
        hook.remove()
    means = {}
    for layer, found in seen.items():
        inputs = torch.cat(found.inputs)
        means[layer] = torch.stack([expert(inputs).mean(0) for expert in model.model.layers[layer].mlp.experts])
    return means, {layer: found.top2 for layer, found in seen.items() if found.top2 is not None}


def _store(seen: Seen) -> Any:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
        seen.inputs.append(inputs[0].flatten(0, -2).clone())
        logits = found[0]
        counts = logits.topk(2, dim=-1).indices.flatten().bincount(minlength=logits.shape[-1])
        seen.top2 = counts if seen.top2 is None else seen.top2 + counts

    return hook


def cluster(means: Tensor, clusters: int) -> list[list[int]]:
    """Average linkage of vectors [E, d], in the order of the first members."""
    squares = (means * means).sum(-1)
    distances = (squares[:, None] - 2 * means @ means.T + squares).clamp_min(0).sqrt()
    groups = [[expert] for expert in range(len(means))]
    while len(groups) > clusters:
        least, pair = torch.inf, (0, 0)
        for a in range(len(groups)):
            for b in range(a + 1, len(groups)):
                distance = float(distances[groups[a]][:, groups[b]].mean())
                if distance < least:
                    least, pair = distance, (a, b)
        groups[pair[0]] += groups.pop(pair[1])
    return [sorted(group) for group in groups]


@torch.no_grad()
def merge(experts: ExpertList, groups: list[list[int]], counts: Tensor) -> None:
    """By frequency, in the type of the weights; all members of a group become one module."""
    frequencies = counts / counts.sum()
    for group in groups:
        if len(group) == 1:
            continue
        first = experts[group[0]]
        for matrix in ("gate", "up", "down"):
            scaled = [getattr(experts[number], matrix) * frequencies[number] for number in group]
            getattr(first, matrix).copy_(torch.stack(scaled).sum(0) / (frequencies[group].sum() + _EPSILON))
        for number in group[1:]:
            experts[number] = first
