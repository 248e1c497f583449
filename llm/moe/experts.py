"""The routed experts of one layer, how a router chooses among them, and what a merge makes of both.

Notation of HC-SMoE (arXiv 2410.08589): E experts of inner width f on a model of width d; a router gives logits z(x),
p = softmax(z), S(x) = the k largest, gates g = p on S(x), divided by their sum where the model normalises. The layer is
y(x) = sum over S(x) of g_j(x) E_j(x).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

DROPPED = -1
"""In an expert map: the router never selects this expert again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts:
    """Gated feed-forward experts, fused as in transformers 5: E_j(x) = down_j (silu(gate_j x) * (up_j x)).

    They compute in the type of their tokens, an expert's weights converted when it is its turn: a layer stays in the
    type that it is stored in.
    """

    gate_up: Tensor  # [E, 2f, d]: the f rows of the gate, then the f rows of the up projection
    down: Tensor  # [E, d, f]

    def __len__(self) -> int:
        return self.down.shape[0]

    @property
    def width(self) -> int:
        return self.down.shape[1]

    @property
    def inner_width(self) -> int:
        return self.down.shape[2]

    @property
    def gate(self) -> Tensor:
        """[E, f, d], a view."""
        return self.gate_up[:, : self.inner_width]

    @property
    def up(self) -> Tensor:
        """[E, f, d], a view."""
        return self.gate_up[:, self.inner_width :]

    def inner(self, expert: int, tokens: Tensor) -> Tensor:
        """Inner activations [T, f] of tokens [T, d]."""
        gate, up = functional.linear(tokens, self.gate_up[expert].to(tokens.dtype)).chunk(2, dim=-1)
        return functional.silu(gate) * up

    def output(self, expert: int, tokens: Tensor) -> Tensor:
        """E_j(x) [T, d] of tokens [T, d]."""
        return functional.linear(self.inner(expert, tokens), self.down[expert].to(tokens.dtype))

    def take(self, indices: Tensor) -> "Experts":
        """The experts at `indices` int64 [n], in that order."""
        return Experts(gate_up=self.gate_up[indices], down=self.down[indices])

    def to(self, where: torch.dtype | torch.device) -> "Experts":
        return Experts(gate_up=self.gate_up.to(where), down=self.down.to(where))


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How a layer turns logits into gates."""

    top_k: int
    normalise: bool  # whether the gates of a token sum to 1: always in Mixtral, by norm_topk_prob in Qwen


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """What a router decides for T tokens."""

    logits: Tensor  # [T, E], of all experts
    probabilities: Tensor  # float32 [T, E]
    selected: Tensor  # int64 [T, k], of falling probability
    gates: Tensor  # float32 [T, k]

    def dense_gates(self) -> Tensor:
        """g_j(x), float32 [T, E]: 0 for experts that are not selected."""
        return torch.zeros_like(self.probabilities).scatter_(1, self.selected, self.gates)


def route(logits: Tensor, rule: RoutingRule, *, kept: Tensor | None = None) -> Routing:
    """The routing by logits [T, E]. kept: bool [E]; the others are out before the softmax, as in a pruned model.

    With fewer kept experts than k, all of them are selected.
    """
    top_k = rule.top_k
    if kept is not None:
        logits = logits.masked_fill(~kept, -torch.inf)
        top_k = min(top_k, int(kept.sum()))
    probabilities = functional.softmax(logits.float(), dim=-1)
    gates, selected = probabilities.topk(top_k, dim=-1)
    if rule.normalise:
        gates = gates / gates.sum(-1, keepdim=True)
    return Routing(logits=logits, probabilities=probabilities, selected=selected, gates=gates)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTokens:
    """The calibration tokens of one MoE layer, or a part of them: its input and its router's logits."""

    hidden: Tensor  # [T, d]
    logits: Tensor  # [T, E]


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedLayer:
    """What a method makes of a layer: fewer experts and where each old one went.

    The router keeps its E rows and its top-k over them; a selected expert's gate goes to its merged expert, and two in
    one cluster add their gates: y(x) = sum over S(x) of g_j(x) M_{map(j)}(x) (HC-SMoE, section 3). An expert mapped to
    `DROPPED` loses its logit before the softmax, which is pruning.
    """

    expert_map: Tensor  # int64 [E], values 0..r-1 or DROPPED
    experts: Experts  # r of them

    def __post_init__(self) -> None:
        found = sorted(set(self.expert_map.tolist()) - {DROPPED})
        if found != list(range(len(self.experts))):
            raise ValueError(f"An expert map leads to {found}; it must lead to all of {len(self.experts)} experts.")

    @property
    def kept(self) -> Tensor:
        """bool [E]: the experts that the router may still select."""
        return self.expert_map != DROPPED

    def to(self, device: torch.device) -> "MergedLayer":
        return MergedLayer(expert_map=self.expert_map.to(device), experts=self.experts.to(device))


def mixture(experts: Experts, tokens: Tensor, routing: Routing, expert_map: Tensor | None = None) -> Tensor:
    """y(x) [T, d] of tokens [T, d]; with a map, of the merged layer. The plain loop that all else is tested against."""
    slots = routing.selected if expert_map is None else expert_map[routing.selected]  # [T, k]
    output = torch.zeros_like(tokens)
    for expert in slots.unique().tolist():
        gates = torch.where(slots == expert, routing.gates, 0.0).sum(-1)  # [T]
        (rows,) = gates.nonzero(as_tuple=True)
        found = experts.output(expert, tokens[rows]) * gates[rows, None].to(tokens.dtype)
        output.index_add_(0, rows, found)
    return output


def merged_output(layer: MergedLayer, tokens: LayerTokens, rule: RoutingRule) -> Tensor:
    """y~(x) [T, d] of a merged or pruned layer."""
    kept = None if bool(layer.kept.all()) else layer.kept
    routing = route(tokens.logits, rule, kept=kept)
    return mixture(layer.experts, tokens.hidden, routing, layer.expert_map)
