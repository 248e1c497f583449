"""Which mixture-of-experts models can be merged, and what their checkpoints call things.

A new architecture is a row in `ARCHITECTURES` if its layers look like these: decoder layers `model.layers.N` with a
module `mlp` of a router `gate` and fused `experts` in transformers 5, and one file entry a matrix and expert.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from llm.moe.experts import RoutingRule


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Names on disk and in config.json."""

    model_type: str
    block: str  # of the router and the experts within a layer, on disk
    gate: str  # matrices of an expert, on disk
    up: str
    down: str
    count_keys: tuple[str, ...]  # what config.json calls the number of experts; all of them are written
    inner_key: str  # and an expert's inner width
    always_normalises: bool  # gates sum to 1 whatever norm_topk_prob says

    def expert(self, layer: int, expert: int, matrix: str) -> str:
        """The entry of a matrix ("gate", "up" or "down") of an expert."""
        return f"{self.router_prefix(layer)}experts.{expert}.{getattr(self, matrix)}.weight"

    def router(self, layer: int) -> str:
        return f"{self.router_prefix(layer)}gate.weight"

    def router_prefix(self, layer: int) -> str:
        return f"{layer_prefix(layer)}{self.block}."


_QWEN = {
    "block": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "inner_key": "moe_intermediate_size",
}
ARCHITECTURES = {
    "mixtral": Architecture(
        model_type="mixtral",
        block="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
        count_keys=("num_local_experts",),
        inner_key="intermediate_size",
        always_normalises=True,
    ),
    "qwen2_moe": Architecture(model_type="qwen2_moe", count_keys=("num_experts",), always_normalises=False, **_QWEN),
    # transformers 5 writes num_local_experts alone, transformers 4 reads num_experts alone.
    "qwen3_moe": Architecture(
        model_type="qwen3_moe", count_keys=("num_experts", "num_local_experts"), always_normalises=False, **_QWEN
    ),
}


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """What a merge has to know of a model."""

    architecture: Architecture
    num_layers: int
    moe_layers: tuple[int, ...]  # numbers of the layers that have experts
    num_experts: int
    rule: RoutingRule
    width: int  # d
    inner_width: int  # f of an expert

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        return 3 * self.width * self.inner_width


def read_config(folder: Path) -> Any:
    """The transformers configuration of a local model. ConfigError if the folder holds none, or code of its own."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{folder}/config.json is not one that transformers knows: {_first_line(error)}") from None


def moe_shape(config: Any, folder: Path) -> MoeShape:
    """The shape behind the configuration of `folder`. ConfigError for what cannot be merged, with what is missing."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ConfigError(
            f"{folder} is a {config.model_type!r} model; those of {', '.join(ARCHITECTURES)} can be merged, and others "
            "need their names on disk in llm/moe/architectures.py"
        )
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        method = quantised["quant_method"] if isinstance(quantised, dict) else quantised.quant_method
        raise ConfigError(
            f"{folder} is quantised ({method}), and such weights cannot be averaged; merge the original ones and "
            "quantise the result"
        )
    if config.hidden_act != "silu":
        raise ConfigError(f"{folder} has the activation {config.hidden_act!r}; only silu experts can be merged")
    count = getattr(config, architecture.count_keys[0])
    if not (moe_layers := _moe_layers(config, count)):
        raise ConfigError(
            f"{folder} has no layer with experts ({count} experts in config.json); there is nothing to merge"
        )
    normalise = architecture.always_normalises or bool(config.norm_topk_prob)
    return MoeShape(
        architecture=architecture,
        num_layers=config.num_hidden_layers,
        moe_layers=moe_layers,
        num_experts=count,
        rule=RoutingRule(top_k=config.num_experts_per_tok, normalise=normalise),
        width=config.hidden_size,
        inner_width=getattr(config, architecture.inner_key),
    )


def _moe_layers(config: Any, count: int) -> tuple[int, ...]:
    """As the model classes decide: all layers, but those listed as dense and those that decoder_sparse_step skips."""
    dense = getattr(config, "mlp_only_layers", None) or ()
    step = getattr(config, "decoder_sparse_step", 1)
    return tuple(n for n in range(config.num_hidden_layers) if count > 0 and n not in dense and (n + 1) % step == 0)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
