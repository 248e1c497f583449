"""Transformer backbones: `build` makes one from its configuration, on the device that is current (meta included)."""

from llm.backbones.config import (
    InputKind,
    InputSpec,
    ModelConfig,
    check_input,
    check_tensor_parallel,
    resolve_input_kind,
)
from llm.backbones.dit import DiT
from llm.backbones.flops import ParameterCount, TrainingFlops, count_parameters, training_flops
from llm.backbones.llama import Llama

__all__ = [
    "InputKind",
    "InputSpec",
    "ModelConfig",
    "ParameterCount",
    "TrainingFlops",
    "build",
    "check_tensor_parallel",
    "count_parameters",
    "resolve_input_kind",
    "training_flops",
]


def build(config: ModelConfig, *, input_layer: InputSpec, num_classes: int, causal: bool) -> Llama | DiT:
    """A backbone with UNINITIALISED norms and tables: the caller fills every parameter by `init_parameter`.

    Raises ConfigError where the numbers contradict each other.
    """
    check_input(config, input_layer, num_classes)
    model = DiT if config.kind == "dit" else Llama
    return model(config, input_layer=input_layer, num_classes=num_classes, causal=causal)
