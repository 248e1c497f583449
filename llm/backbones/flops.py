"""Parameter counts and training FLOPs of a backbone, from its configuration alone.

Published budgets of masked diffusion models rest on 6ND with two different N, so both are given:
- `label`: 12 * layers * width^2, the name under which MDM-Prime-v2's scaling models go. A gated feed-forward layer of
  hidden size 4 * width has 16 * layers * width^2, so this is 4/3 too small for them.
- `non_embedding`: every parameter outside the input table and the head, the N that we mean by default.
D counts tokens, never sub-tokens.
"""

from dataclasses import dataclass

from llm.backbones.config import InputSpec, ModelConfig
from llm.backbones.dit import FREQUENCIES
from llm.backbones.inputs import table_shape


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters. A tied head counts 0: its matrix is the input table."""

    input_table: int
    non_embedding: int
    head: int
    label: int  # 12 * layers * width^2

    @property
    def total(self) -> int:
        return self.input_table + self.non_embedding + self.head


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """FLOPs of forward and backward by three rules."""

    six_nd: float  # 6 * non_embedding * tokens
    six_nd_label: float  # 6 * label * tokens, the rule of the published budgets
    full: float  # six_nd plus head and attention; the rule for MFU


def count_parameters(config: ModelConfig, *, input_layer: InputSpec, num_classes: int, causal: bool) -> ParameterCount:
    """Exact counts of `build(config, ...)`. A dit's adaLN layers are non-embedding parameters, as in its papers."""
    rows, columns = table_shape(input_layer, config.width)
    block = _attention(config) + (_dit_block(config, causal) if config.kind == "dit" else _llama_block(config))
    outside = config.width  # the final norm
    head = 0 if config.tied else config.width * num_classes
    if config.kind == "dit":
        head += num_classes
        if not causal:
            cond = config.cond_dim
            outside += (FREQUENCIES + 1) * cond + (cond + 1) * cond + (cond + 1) * 2 * config.width
    return ParameterCount(
        input_table=rows * columns,
        non_embedding=config.layers * block + outside,
        head=head,
        label=12 * config.layers * config.width**2,
    )


def training_flops(
    config: ModelConfig, *, input_layer: InputSpec, num_classes: int, causal: bool, length: int, tokens: float
) -> TrainingFlops:
    """FLOPs to train on `tokens` tokens in sequences of `length`.

    full = 6 D (N + V d) + 12 D layers d L for bidirectional attention, half of the last term for causal. The head is
    charged at every position, tied or not, although a masked-diffusion loss may skip the visible ones.
    """
    count = count_parameters(config, input_layer=input_layer, num_classes=num_classes, causal=causal)
    visible = length / 2 if causal else length
    head = 6 * tokens * num_classes * config.width
    attention = 12 * tokens * config.layers * config.width * visible
    six_nd = 6 * tokens * count.non_embedding
    return TrainingFlops(six_nd=six_nd, six_nd_label=6 * tokens * count.label, full=six_nd + head + attention)


def _attention(config: ModelConfig) -> int:
    q_and_out = 2 * config.width**2
    k_and_v = 2 * config.width * config.num_kv_heads * config.head_dim
    return q_and_out + k_and_v + (2 * config.head_dim if config.qk_norm else 0)


def _llama_block(config: ModelConfig) -> int:
    return 3 * config.width * config.ffn_width + 2 * config.width


def _dit_block(config: ModelConfig, causal: bool) -> int:
    mlp = 2 * config.width * config.ffn_width + config.ffn_width + config.width
    modulation = 0 if causal else (config.cond_dim + 1) * 6 * config.width
    return mlp + 2 * config.width + modulation
