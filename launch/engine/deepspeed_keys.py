"""Which keys of DeepSpeed's own configuration a user may set, and which follow from ours."""

from collections.abc import Mapping
from typing import Any

from launch.errors import ConfigError

# Keys of DeepSpeed's configuration that follow from ours, and the key of ours that sets them.
OWNED = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "bf16": "engine.precision",
    "fp16": "engine.precision (there is no fp16)",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "communication_data_type": "engine.precision",
    "prescale_gradients": "nothing: gradients are sums",
    "gradient_predivide_factor": "nothing: gradients are sums",
    "activation_checkpointing": "engine.activation_checkpointing",
    "compile": "engine.compile",
    "checkpoint": "checkpoint.*",
    "load_universal": "checkpoint.*",
    "zero_optimization.stage": "engine.strategy",
    "zero_optimization.offload_optimizer": "engine.cpu_offload",
    "zero_optimization.offload_param": "engine.cpu_offload",
}


def check_deepspeed_keys(raw: Mapping[str, Any], path: str) -> None:
    """Refuse raw DeepSpeed keys that this engine sets itself; `path` is the key that holds them."""
    flat = {*raw, *(f"{k}.{inner}" for k, v in raw.items() if isinstance(v, Mapping) for inner in v)}
    for key in sorted(flat & OWNED.keys()):
        raise ConfigError(f"{path} holds {key!r}, which is set by {OWNED[key]}; remove it there and use that")
