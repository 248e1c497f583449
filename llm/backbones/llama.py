"""A Llama-style transformer, causal or bidirectional: pre-norm RMSNorm, rotary positions, SwiGLU, no biases.

Two families of published models are the same network up to a few switches: the encoder of MDM-Prime-v2's 1.1B runs
(TinyLlama's shape) and the model of its scaling laws (Megatron's, with QK-norm). Neither is told the noise time: masked
diffusion does not need it, the number of masks says the same (MDLM, arXiv 2406.07524).

Shapes: B batch, L positions, l digits per token, D width, V classes.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.engine import Split
from llm.backbones.attention import Attention, RMSNorm, Rotary, rotary_table, sdpa_mask
from llm.backbones.config import InputSpec, ModelConfig
from llm.backbones.inputs import InputLayer

T = TypeVar("T")
Readout = Callable[[Tensor, Tensor, Tensor | None], T]


def weight_std(config: ModelConfig, name: str) -> float:
    """Standard deviation of the initial normal weights of the matrix `name`.

    tinyllama: sqrt(2 / 5D), and 1 / (layers sqrt(D)) for the matrices that write to the residual stream.
    megatron: 0.02, and 0.02 / sqrt(2 layers) for those.
    """
    writes = name.endswith(("attention.out.weight", "mlp.down.weight"))
    if config.init == "megatron":
        return 0.02 / (2 * config.layers) ** 0.5 if writes else 0.02
    return config.width**-0.5 / config.layers if writes else (2 / (5 * config.width)) ** 0.5


def no_decay(name: str) -> bool:
    """Weight decay is for the matrices of blocks and head: not for norms, biases and the input table."""
    return name.endswith("bias") or "norm" in name or name.startswith("input.")


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, causal=causal, dropout=config.dropout)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.ffn_width)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None) -> Tensor:
        x = x + self._drop(self.attention(self.attention_norm(x), rotary, mask))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Llama(nn.Module):
    """The whole network. It has no buffers, so a copy built on the meta device is complete once its parameters are."""

    def __init__(self, config: ModelConfig, *, input_layer: InputSpec, num_classes: int, causal: bool) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.num_classes = num_classes
        self.input = InputLayer(input_layer, config.width)
        self.blocks = nn.ModuleList(Block(config, causal=causal) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        # A tied head is no second name for the table but no module at all, so that a checkpoint has one copy.
        self.head = None if config.tied else nn.Linear(config.width, num_classes, bias=False)

    def forward(self, inputs: Tensor, readout: Readout[T], *, attention_mask: Tensor | None = None) -> T:
        """`readout(hidden [B, L, D], weight [V, D], None)` and return what it returns.

        inputs: int64, ids [B, L] or digits [B, L, l]. attention_mask: bool [B, L], True = real token, None = all are.
        The logits are left to `readout` so that they need never exist at once, and it is called in here because this is
        where a sharded weight is whole.
        """
        length, device = inputs.shape[1], inputs.device
        rotary = rotary_table(length, self.config.head_dim, self.config.rope_base, device)
        mask = sdpa_mask(attention_mask, causal=self.causal)
        x = self.input(inputs)
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, rotary, mask)
        weight = self.input.weight[: self.num_classes] if self.head is None else self.head.weight
        return readout(self.norm(x), weight, None)

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the full tensor of parameter `name` in place; `generator` lives on the device of `tensor`."""
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, weight_std(self.config, name), generator=generator)

    def no_decay(self, name: str) -> bool:
        return no_decay(name)

    def tensor_parallel_plan(self) -> dict[str, Split]:
        """Attention by heads, feed-forward by hidden features; table, norms and head stay whole."""
        plan: dict[str, Split] = {}
        for i in range(len(self.blocks)):
            plan[f"blocks.{i}.attention"] = "random-region" if self.config.dropout else "region"
            plan |= {f"blocks.{i}.attention.{name}": "column" for name in ("q", "k", "v")}
            plan[f"blocks.{i}.attention.out"] = "row"
            plan[f"blocks.{i}.mlp"] = "region"
            plan |= {f"blocks.{i}.mlp.{name}": "column" for name in ("gate", "up")}
            plan[f"blocks.{i}.mlp.down"] = "row"
        return plan
