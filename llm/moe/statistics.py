"""What a calibration pass keeps of one MoE layer: sums over tokens, so that parts of the text and ranks just add up.

Everything is float64, but for the passes through the experts themselves. The sums serve every representation,
clustering, merge and saliency that needs no single token, for any later number of experts.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launch.errors import DataError
from llm.moe.experts import Experts, LayerTokens, RoutingRule, route
from llm.moe.files import save_tensors

FORMAT = "unmask-moe-statistics-1"
_OUTPUTS = 1 << 24  # numbers of all experts' outputs that are held at once: 128 MiB of float64
_WEIGHTS = 1 << 22  # and of all experts' weights: 32 MiB


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    """Sums over T calibration tokens; g are gates, p probabilities over all experts, S(x) the selected ones."""

    tokens: Tensor  # [1]: T
    output_sum: Tensor  # [E, d]: of E_j(x) over all tokens, whoever is selected (HC-SMoE, section 3.2)
    routed_output_sum: Tensor  # [E, d]: the same over tokens with j in S(x)
    selections: Tensor  # [E]: tokens with j in S(x)
    top2_selections: (
        Tensor  # [E]: tokens with j among the 2 largest logits, which the official code counts for all models
    )
    gate_sum: Tensor  # [E]: of g_j(x)
    probability_sum: Tensor  # [E]: of p_j(x)
    logit_gram: Tensor  # [E, E]: of z_i(x) z_j(x)
    output_gram: Tensor  # [E, E]: of <E_i(x), E_j(x)>
    cosine_sum: Tensor  # [E, E]: of cos(E_i(x), E_j(x))
    routed_norm_sum: Tensor  # [E]: of |E_j(x)| over tokens with j in S(x)
    gated_norm_sum: Tensor  # [E]: of g_j(x) |E_j(x)|
    joint_selections: Tensor  # [E, E]: tokens with both i and j in S(x)
    gate_gram: Tensor  # [E, E]: of g_i(x) g_j(x)

    @property
    def num_experts(self) -> int:
        return self.selections.shape[0]

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        return LayerStatistics(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def mean_output(self) -> Tensor:
        """o_j, float64 [E, d]."""
        return self.output_sum / self.tokens

    def frequency(self, *, top2: bool = False) -> Tensor:
        """Share of all selections that fall on each expert, float64 [E], sum 1."""
        counts = self.top2_selections if top2 else self.selections
        return counts / counts.sum()


def no_statistics(num_experts: int, width: int) -> LayerStatistics:
    """Sums over no tokens."""
    square, wide = (num_experts, num_experts), (num_experts, width)
    shapes = {"tokens": (1,), "output_sum": wide, "routed_output_sum": wide}
    squares = ("logit_gram", "output_gram", "cosine_sum", "joint_selections", "gate_gram")
    shapes |= dict.fromkeys(squares, square)
    return LayerStatistics(
        **{
            f.name: torch.zeros(shapes.get(f.name, (num_experts,)), dtype=torch.float64)
            for f in fields(LayerStatistics)
        }
    )


@torch.no_grad()
def measure(experts: Experts, batch: LayerTokens, rule: RoutingRule) -> LayerStatistics:
    """The sums over the tokens of `batch`: every expert runs on every token."""
    count, width = len(experts), experts.width
    routing = route(batch.logits, rule)
    gates = routing.dense_gates().double()  # [T, E]
    chosen = torch.zeros_like(gates).scatter_(1, routing.selected, 1.0)
    top2 = torch.zeros_like(gates).scatter_(1, batch.logits.topk(min(2, count), dim=-1).indices, 1.0)
    logits = batch.logits.double()
    sums = {f.name: getattr(no_statistics(count, width), f.name).to(gates.device) for f in fields(LayerStatistics)}
    rows = max(1, min(len(batch.hidden), _OUTPUTS // (count * width)))
    every = torch.empty(count, rows, width, dtype=torch.float64, device=gates.device)
    for start in range(0, len(batch.hidden), rows):
        part = slice(start, start + rows)
        outputs = every[:, : len(batch.hidden[part])]  # [E, t, d]
        for j, output in enumerate(outputs):
            output.copy_(experts.output(j, batch.hidden[part]))
            norms = output.norm(dim=-1)  # [t]
            sums["output_sum"][j] += output.sum(0)
            sums["routed_output_sum"][j] += chosen[part, j] @ output
            sums["routed_norm_sum"][j] += norms @ chosen[part, j]
            sums["gated_norm_sum"][j] += norms @ gates[part, j]
        sums["output_gram"] += _gram(outputs)
        for output in outputs:
            output.div_(output.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
        sums["cosine_sum"] += _gram(outputs)
    sums["tokens"] += len(batch.hidden)
    sums["selections"] += chosen.sum(0)
    sums["top2_selections"] += top2.sum(0)
    sums["gate_sum"] += gates.sum(0)
    sums["probability_sum"] += routing.probabilities.double().sum(0)
    sums["logit_gram"] += logits.T @ logits
    sums["joint_selections"] += chosen.T @ chosen
    sums["gate_gram"] += gates.T @ gates
    return LayerStatistics(**{name: value.cpu() for name, value in sums.items()})


def weight_gram(experts: Experts) -> Tensor:
    """<theta_i, theta_j> of all parameters of the experts, float64 [E, E], a slice of the columns at a time."""
    total = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for tensor in (experts.gate_up, experts.down):
        flat = tensor.flatten(1)
        for part in flat.split(max(1, _WEIGHTS // len(experts)), dim=1):
            wide = part.double()
            total += (wide @ wide.T).cpu()
    return total


def save_statistics(statistics: LayerStatistics, weights: Tensor, path: Path) -> None:
    """One safetensors file; weights: `weight_gram` [E, E]. CheckpointError if the disk does not take it."""
    tensors = {f.name: getattr(statistics, f.name) for f in fields(statistics)}
    save_tensors(tensors | {"weight_gram": weights}, path, metadata={"format": FORMAT})


def load_statistics(path: Path) -> tuple[LayerStatistics, Tensor]:
    """The sums and the Gram matrix of the weights. DataError if it is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise DataError(f"{path} holds no statistics of this version ({FORMAT}); run `unmask moe calibrate`")
            names = [f.name for f in fields(LayerStatistics)]
            return LayerStatistics(**{n: file.get_tensor(n) for n in names}), file.get_tensor("weight_gram")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and run `unmask moe calibrate` again") from None


def _gram(vectors: Tensor) -> Tensor:
    """[E, E]: inner products over tokens and features of [E, t, d]."""
    flat = vectors.flatten(1)
    return flat @ flat.T
