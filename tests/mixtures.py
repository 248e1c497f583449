"""Mixture-of-experts models of 33k to 64k parameters, one of each architecture, and slow, obvious merged forms."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from llm.moe import modeling
from llm.moe.experts import Experts, LayerTokens, MergedLayer, RoutingRule, merged_output

ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
VOCAB_SIZE = 97
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # so that experts matter and routers have preferences
    "bos_token_id": None,
    "eos_token_id": None,
}
_CONFIGS = {
    "mixtral": (transformers.MixtralConfig, {"intermediate_size": 48, "num_local_experts": 8}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "intermediate_size": 40,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
        },
    ),
}


def mixture(architecture: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model in evaluation mode, the same at every call. changes: fields of its configuration."""
    kind, fields = _CONFIGS[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind(**{**_COMMON, **fields, **changes}))
    return model.eval().requires_grad_(False)


def blocks_of(model: transformers.PreTrainedModel) -> dict[int, nn.Module]:
    """The mixture-of-experts blocks by their layer."""
    return {i: layer.mlp for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")}


def experts_of(block: nn.Module) -> Experts:
    return Experts(gate_up=block.experts.gate_up_proj.detach(), down=block.experts.down_proj.detach())


def tokens(rows: int = 2, length: int = 16) -> Tensor:
    """int64 [rows, length]"""
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, inputs: Tensor | None = None) -> Tensor:
    """float32 [B, L, V]"""
    with torch.no_grad():
        return model(tokens() if inputs is None else inputs).logits


def groups(num_experts: int, num_groups: int, seed: int = 0) -> Tensor:
    """A random map int64 [E] to groups that all have members."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.arange(num_experts) % num_groups)[torch.randperm(num_experts, generator=generator)]


def merge_means(block: nn.Module, expert_map: Tensor) -> MergedLayer:
    """The experts of each group of `expert_map` averaged; those mapped to -1 are dropped."""
    experts, count = experts_of(block), int(expert_map.max()) + 1
    gate_up = torch.stack([experts.gate_up[expert_map == c].mean(0) for c in range(count)])
    down = torch.stack([experts.down[expert_map == c].mean(0) for c in range(count)])
    return MergedLayer(expert_map=expert_map, experts=Experts(gate_up=gate_up, down=down))


def plant_duplicates(model: transformers.PreTrainedModel, num_groups: int) -> dict[int, MergedLayer]:
    """Make the experts of each of `num_groups` groups a layer equal, in place; the lossless merge of each layer."""
    merged = {}
    for layer, block in blocks_of(model).items():
        labels = groups(block.experts.num_experts, num_groups, seed=layer)
        merged[layer] = merge_means(block, labels)
        block.experts.gate_up_proj.copy_(merged[layer].experts.gate_up[labels])
        block.experts.down_proj.copy_(merged[layer].experts.down[labels])
    return merged


def compact(model: transformers.PreTrainedModel, layers: Mapping[int, MergedLayer]) -> transformers.PreTrainedModel:
    """The model of llm.moe.modeling with these merged layers, made without any file."""
    modeling.register()
    fields = model.config.to_dict()
    kind = type(transformers.AutoConfig.for_model(f"hcsmoe_{fields.pop('model_type')}"))
    counts = [len(layers[i].experts) if i in layers else 0 for i in range(model.config.num_hidden_layers)]
    new = transformers.AutoModelForCausalLM.from_config(kind(**fields, merged_experts_per_layer=counts))
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mlp.experts." not in name}
    for layer, merged in layers.items():
        prefix = f"model.layers.{layer}.mlp"
        state[f"{prefix}.experts.gate_up_proj"] = merged.experts.gate_up
        state[f"{prefix}.experts.down_proj"] = merged.experts.down
        state[f"{prefix}.gate.expert_map"] = merged.expert_map
    new.load_state_dict(state, strict=True)
    return new.eval().requires_grad_(False)


class _Loop(nn.Module):
    """The definition of a merged layer in place of a block's router and experts: one expert at a time."""

    def __init__(self, block: nn.Module, merged: MergedLayer, rule: RoutingRule) -> None:
        super().__init__()
        self.router, self.merged, self.rule = block.gate, merged, rule

    def forward(self, hidden: Tensor, *_: Tensor) -> Tensor:
        found = LayerTokens(hidden=hidden, logits=nn.functional.linear(hidden, self.router.weight))
        return merged_output(self.merged, found, self.rule)


def with_loops(model: transformers.PreTrainedModel, layers: Mapping[int, MergedLayer]) -> transformers.PreTrainedModel:
    """`model`, changed in place so that its blocks compute what the definition says."""
    normalise = getattr(model.config, "norm_topk_prob", True)
    rule = RoutingRule(top_k=model.config.num_experts_per_tok, normalise=normalise)
    for layer, merged in layers.items():
        block = model.model.layers[layer].mlp
        block.experts = _Loop(block, merged, rule)
    return model
