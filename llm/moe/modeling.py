"""Mixtral and Qwen mixture-of-experts models with fewer experts than their routers have rows.

A layer keeps its router of E rows and the top-k over them; `expert_map` sends each of the E experts to one of r_l
merged ones, and two selected experts with the same merged one add their gates (HC-SMoE, arXiv 2410.08589, section 3).
An expert mapped to -1 is pruned: its logit is -inf before the softmax.

This file is copied next to exported weights, where transformers reads it with `trust_remote_code=True`; therefore it
imports torch and transformers only. Where this package is installed, `register()` makes that needless.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

VERSION = 1  # of this file and of the checkpoints it reads


# --- configurations: those of the original models, whose number of experts stays E ------------------------------------


class HCSMoEMixtralConfig(MixtralConfig):
    model_type = "hcsmoe_mixtral"
    merged_experts_per_layer: list[int] | None = None  # r_l of each decoder layer, 0 where it is dense; None: E
    hcsmoe_version: int = VERSION


class HCSMoEQwen2MoeConfig(Qwen2MoeConfig):
    model_type = "hcsmoe_qwen2_moe"
    merged_experts_per_layer: list[int] | None = None  # r_l of each decoder layer, 0 where it is dense; None: E
    hcsmoe_version: int = VERSION


class HCSMoEQwen3MoeConfig(Qwen3MoeConfig):
    model_type = "hcsmoe_qwen3_moe"
    merged_experts_per_layer: list[int] | None = None  # r_l of each decoder layer, 0 where it is dense; None: E
    hcsmoe_version: int = VERSION


# --- one layer ------------------------------------------------------------------------------------------------------


class _ExpertMap(nn.Module):
    """What makes a router choose among E experts and name merged ones. A subclass of the original router, so that
    transformers goes on to record its logits."""

    always_normalises = False  # whether the gates of a token sum to 1 whatever the configuration says
    gates_as_logits = True  # whether gates have the type of the logits, or float32
    top_k: int
    num_experts: int
    hidden_dim: int
    weight: Tensor  # [E, d]
    expert_map: Tensor  # int64 [E]

    def __init__(self, config: Any, num_merged: int) -> None:
        super().__init__(config)
        self.num_merged = num_merged
        self.normalises = self.always_normalises or config.norm_topk_prob
        self.register_buffer("expert_map", default_expert_map(self.num_experts, num_merged))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], gates [T, k] and merged experts, int64 [T, k], of tokens [.., d]."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = functional.linear(hidden_states, self.weight)  # [T, E]
        logits = logits.masked_fill(self.expert_map < 0, -torch.inf)
        gates, selected = functional.softmax(logits, dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        if self.normalises:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        if self.gates_as_logits:
            gates = gates.to(logits.dtype)
        # With fewer than k experts left, pruned ones fill the top k with gates of 0: any expert may stand for them.
        return logits, gates, self.expert_map[selected].clamp(min=0)


class HCSMoEMixtralRouter(_ExpertMap, MixtralTopKRouter):
    always_normalises = True
    gates_as_logits = False


class HCSMoEQwen2MoeRouter(_ExpertMap, Qwen2MoeTopKRouter):
    pass


class HCSMoEQwen3MoeRouter(_ExpertMap, Qwen3MoeTopKRouter):
    pass


@use_experts_implementation  # transformers looks for this very text before it lets `experts_implementation` be chosen
class MergedExperts(nn.Module):
    """r_l gated feed-forward experts. An expert may be named several times by one token: its gates add up."""

    def __init__(self, config: Any, num_experts: int, inner_width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner_width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, config.hidden_size, inner_width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The `eager` implementation: outputs [T, d] of tokens [T, d], experts [T, k] and gates [T, k]."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            rows, slots = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = functional.linear(hidden_states[rows], self.gate_up_proj[expert]).chunk(2, dim=-1)
            found = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, rows, (found * top_k_weights[rows, slots, None]).to(output.dtype))
        return output


def default_expert_map(num_experts: int, num_merged: int) -> Tensor:
    """int64 [E]. Leads to every merged expert; stands in until the map of a checkpoint is loaded."""
    return torch.arange(num_experts) % num_merged


# --- models ---------------------------------------------------------------------------------------------------------


class _MergedCausalLM(PreTrainedModel):
    """What turns an original model into a merged one."""

    router_class: type[_ExpertMap]
    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.hcsmoe_version > VERSION:
            raise ValueError(
                f"This checkpoint has version {config.hcsmoe_version}, but this code reads up to {VERSION}; use the "
                "modeling file that lies next to the weights (trust_remote_code=True), or a newer release."
            )
        for layer, (decoder, count) in enumerate(zip(self.model.layers, merged_counts(config), strict=True)):
            is_mixture = hasattr(decoder.mlp, "experts")
            if is_mixture != (count > 0):
                kind = "a mixture of experts" if is_mixture else "dense"
                raise ValueError(f"merged_experts_per_layer says {count} for layer {layer}, which is {kind}.")
            if is_mixture:
                inner_width = decoder.mlp.experts.intermediate_dim
                decoder.mlp.gate = self.router_class(config, count)
                decoder.mlp.experts = MergedExperts(config, count, inner_width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config: Any = self.config
        if isinstance(module, MergedExperts):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=config.initializer_range)
        elif isinstance(module, _ExpertMap):
            init.copy_(module.expert_map, default_expert_map(module.num_experts, module.num_merged))

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but weights that are not in the checkpoint are an error: they would be random."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise RuntimeError(
                f"The checkpoint lacks {', '.join(missing[:3])} and {len(missing)} in all; fetch or export it again."
            )
        return (model, info) if output_loading_info else model


class HCSMoEMixtralForCausalLM(_MergedCausalLM, MixtralForCausalLM):
    config_class = HCSMoEMixtralConfig
    router_class = HCSMoEMixtralRouter


class HCSMoEQwen2MoeForCausalLM(_MergedCausalLM, Qwen2MoeForCausalLM):
    config_class = HCSMoEQwen2MoeConfig
    router_class = HCSMoEQwen2MoeRouter


class HCSMoEQwen3MoeForCausalLM(_MergedCausalLM, Qwen3MoeForCausalLM):
    config_class = HCSMoEQwen3MoeConfig
    router_class = HCSMoEQwen3MoeRouter


def merged_counts(config: Any) -> list[int]:
    """r_l of each decoder layer, 0 where it is dense."""
    if config.merged_experts_per_layer is not None:
        return config.merged_experts_per_layer
    dense = getattr(config, "mlp_only_layers", [])
    step = getattr(config, "decoder_sparse_step", 1)
    layers = range(config.num_hidden_layers)
    return [0 if layer in dense or (layer + 1) % step else config.num_experts for layer in layers]


MODELS = (
    (HCSMoEMixtralConfig, HCSMoEMixtralForCausalLM),
    (HCSMoEQwen2MoeConfig, HCSMoEQwen2MoeForCausalLM),
    (HCSMoEQwen3MoeConfig, HCSMoEQwen3MoeForCausalLM),
)


def classes(model_type: str) -> tuple[type, type]:
    """The configuration and the model that stand for an original `model_type`: mixtral, qwen2_moe or qwen3_moe."""
    return next(pair for pair in MODELS if pair[0].model_type == f"hcsmoe_{model_type}")


def register() -> None:
    """Let AutoConfig and AutoModelForCausalLM open these models without `trust_remote_code`, and `save_pretrained` copy
    this file next to the weights."""
    for config_class, model_class in MODELS:
        config_class.register_for_auto_class()
        model_class.register_for_auto_class("AutoModelForCausalLM")
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
