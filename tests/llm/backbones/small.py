"""Small backbones with all their parameters filled, for the tests beside this file."""

from typing import Any

import torch
from torch import Tensor, nn

from launch.random import generator, stream_key
from llm.backbones import InputSpec, ModelConfig, build


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plainest readout: [B, L, V]."""
    return nn.functional.linear(hidden, weight, bias)


def initial(model: Any, name: str, shape: torch.Size) -> Tensor:
    """The full tensor of one parameter, as an engine makes it: from a generator of its own."""
    tensor = torch.empty(shape)
    model.init_parameter(name, tensor, generator(stream_key(0, "init", name)))
    return tensor


def small(kind: str = "llama", *, causal: bool = False, spec: InputSpec | None = None, **numbers: Any) -> Any:
    """A filled model with 2 layers, width 32, 4 heads, 12 symbols and 11 classes, unless `numbers` says otherwise."""
    numbers = {"layers": 2, "heads": 4, "width": 32, "init": "mdlm" if kind == "dit" else "tinyllama"} | numbers
    config = ModelConfig(kind=kind, **numbers)  # type: ignore[arg-type]
    model = build(config, input_layer=spec or InputSpec(num_symbols=12), num_classes=11, causal=causal)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(model, name, parameter.shape))
    return model


def shaken(*args: Any, **numbers: Any) -> Any:
    """As `small`, but with every weight moved off its initial value, since a new dit is blind to its input."""
    model = small(*args, **numbers)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    return model
