"""A merged model in memory, without a checkpoint of its own: to judge many merges of one model in a row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launch.errors import ConfigError
from llm.moe import modeling
from llm.moe.experts import MergedLayer
from llm.moe.source import Source


def load_whole(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model in evaluation mode, and its tokenizer. Code that comes with the folder is not run."""
    from transformers import AutoModelForCausalLM

    modeling.register()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    return model.to(device).eval().requires_grad_(False), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """ConfigError if transformers finds none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} has no tokenizer that transformers opens ({str(error).splitlines()[0]}); texts are made with "
            "the model's own"
        ) from None


def with_merged(original: Any, source: Source, layers: Mapping[int, MergedLayer]) -> Any:
    """The compact model of these merged layers. What is not merged is shared with `original`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    modeling.register()
    fields = source.config.to_dict()
    fields.pop("model_type")
    counts = [len(layers[n].experts) if n in layers else 0 for n in range(source.shape.num_layers)]
    model_type = f"hcsmoe_{source.shape.architecture.model_type}"
    config = AutoConfig.for_model(model_type, **fields, merged_experts_per_layer=counts)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    device = next(original.parameters()).device
    state = {name: tensor for name, tensor in original.state_dict().items() if ".mlp.experts." not in name}
    for layer, merged in layers.items():
        prefix = f"model.layers.{layer}.mlp."
        experts = merged.experts.to(device).to(next(original.parameters()).dtype)
        state[f"{prefix}experts.gate_up_proj"], state[f"{prefix}experts.down_proj"] = experts.gate_up, experts.down
        state[f"{prefix}gate.expert_map"] = merged.expert_map.to(device)
    model.load_state_dict(state, strict=True, assign=True)
    model.model.rotary_emb = original.model.rotary_emb  # its buffers are in no state
    return model.eval().requires_grad_(False)
