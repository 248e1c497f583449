"""The transformer of MDLM and MDM-Prime (arXiv 2406.07524, 2505.18495), and its causal twin for the baseline.

LayerNorm without bias, a GELU feed-forward layer with biases, and adaptive layer norm (DiT, arXiv 2212.09748). The
noise time is not used: adaLN is driven by the embedding of sigma = 0, a constant that still trains. All adaLN layers
and the head start at zero, so the first output is uniform and the first loss is ln V. The causal twin has no adaLN.

Shapes: B batch, L positions, l digits per token, D width, C conditioning width, V classes.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.backbones.attention import Attention, Rotary, rotary_table, sdpa_mask
from llm.backbones.config import InputSpec, ModelConfig
from llm.backbones.inputs import InputLayer
from llm.backbones.llama import Readout, no_decay

T = TypeVar("T")

FREQUENCIES = 256  # size of the sinusoidal embedding of sigma


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias; torch accumulates in float32 whatever the type of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), None, self.eps)


class Conditioning(nn.Module):
    """The vector [1, C] that all adaLN layers read: an MLP of the sinusoidal embedding of sigma = 0."""

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(FREQUENCIES, cond_dim)
        self.second = nn.Linear(cond_dim, cond_dim)

    def forward(self) -> Tensor:
        weight = self.first.weight
        cosines, sines = weight.new_ones(1, FREQUENCIES // 2), weight.new_zeros(1, FREQUENCIES // 2)
        return F.silu(self.second(F.silu(self.first(torch.cat((cosines, sines), dim=-1)))))


class MLP(nn.Module):
    """down(gelu(up(x))), tanh form of GELU, with biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + gate * attention(modulate(norm(x))), then so the MLP; the causal twin has no gate and no modulation."""

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = LayerNorm(config.width, config.norm_eps)
        self.attention = Attention(config, causal=causal, dropout=0.0)
        self.mlp_norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config.width, config.ffn_width)
        self.modulation = None if causal else nn.Linear(config.cond_dim, 6 * config.width)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, condition: Tensor | None) -> Tensor:
        """x [B, L, D], condition [1, C] or None -> [B, L, D]."""
        if self.modulation is None:
            x = x + self._drop(self.attention(self.attention_norm(x), rotary, mask))
            return x + self._drop(self.mlp(self.mlp_norm(x)))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).chunk(6, dim=-1)  # each [1, D]
        x = x + gate_a * self._drop(self.attention(modulate(self.attention_norm(x), shift_a, scale_a), rotary, mask))
        return x + gate_m * self._drop(self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class DiT(nn.Module):
    """The whole network; no buffers. Bidirectional with adaLN, or causal without."""

    def __init__(self, config: ModelConfig, *, input_layer: InputSpec, num_classes: int, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.input = InputLayer(input_layer, config.width)
        self.conditioning = None if causal else Conditioning(config.cond_dim)
        self.blocks = nn.ModuleList(Block(config, causal=causal) for _ in range(config.layers))
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.modulation = None if causal else nn.Linear(config.cond_dim, 2 * config.width)
        self.head = nn.Linear(config.width, num_classes)

    def forward(self, inputs: Tensor, readout: Readout[T], *, attention_mask: Tensor | None = None) -> T:
        """`readout(hidden [B, L, D], weight [V, D], bias [V])` and return what it returns; arguments as in `Llama`."""
        rotary = rotary_table(inputs.shape[1], self.config.head_dim, self.config.rope_base, inputs.device)
        mask = sdpa_mask(attention_mask, causal=self.causal)
        condition = None if self.conditioning is None else self.conditioning()
        x = self.input(inputs)
        for block in self.blocks:
            x = block(x, rotary, mask, condition)
        x = self.norm(x)
        if self.modulation is not None:
            x = modulate(x, *self.modulation(condition).chunk(2, dim=-1))
        return readout(x, self.head.weight, self.head.bias)

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the full tensor of parameter `name` in place; `generator` lives on the device of `tensor`.

        torch's defaults, uniform within +-1 / sqrt(fan in) for matrices, biases and the input table alike, but zeros
        for adaLN and head.
        """
        if "norm" in name:
            tensor.fill_(1.0)
        elif "modulation" in name or name.startswith("head."):
            tensor.zero_()
        else:
            bound = (tensor.shape[1] if tensor.ndim == 2 else self._fan_in_of_bias(name)) ** -0.5
            tensor.uniform_(-bound, bound, generator=generator)

    def _fan_in_of_bias(self, name: str) -> int:
        # By name, because a sharded engine may have emptied the weight next to it.
        config = self.config
        sizes = {
            "mlp.up.bias": config.width,
            "mlp.down.bias": config.ffn_width,
            "conditioning.first.bias": FREQUENCIES,
            "conditioning.second.bias": config.cond_dim,
        }
        return next(size for suffix, size in sizes.items() if name.endswith(suffix))

    def no_decay(self, name: str) -> bool:
        return no_decay(name)
