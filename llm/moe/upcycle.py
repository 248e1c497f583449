"""A mixture of experts out of a dense model, which computes what the dense model does until it is trained further.

Attention, norms and tables stay as they are.

mixtral    Sparse upcycling (arXiv 2212.05055): every expert starts as the dense feed-forward block, and a random router
           chooses among equals; its gates sum to 1. `noise` disturbs the experts, so that training can tell them apart.
qwen2_moe  The dense block becomes the shared expert, which every token passes. The routed experts are small and new:
           random projections in, none out, so that they begin to count with training.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from launch.checkpoint import publish, read_safetensors, write_safetensors
from launch.errors import ConfigError
from launch.random import generator, stream_key
from llm.moe.architectures import ARCHITECTURES, layer_prefix, read_config
from llm.moe.config import ROW

Kind = Literal["mixtral", "qwen2_moe"]
_ROUTER_DEVIATION = 0.02
_COPIED = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "generation_config.json")
_MATRICES = {"mlp.gate_proj.weight": "gate", "mlp.up_proj.weight": "up", "mlp.down_proj.weight": "down"}


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """What the experts of an upcycled model are."""

    kind: Kind = "mixtral"  # the transformers architecture
    experts: int = 8  # in each layer that has some
    top_k: int = 2  # experts that a token selects
    expert_width: int | None = None  # qwen2_moe: inner width of a routed expert; null: that of the dense block / top_k
    every: int = 1  # qwen2_moe: every n-th layer gets experts, the others stay dense
    noise: float = 0.0  # mixtral: deviation of the experts' disturbance, relative to that of each matrix
    seed: int = 0  # of everything new

    def check(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"--top-k {self.top_k}; a token selects 1 to {self.experts} experts")
        if self.noise < 0:
            raise ConfigError(f"--noise {self.noise}; the smallest is 0, which leaves all experts equal")
        if self.expert_width is not None and self.expert_width < 1:
            raise ConfigError(f"--expert-width {self.expert_width}; the smallest is 1")
        if self.every < 1:
            raise ConfigError(f"--every {self.every}; the smallest is 1, which gives experts to all layers")
        foreign = {"mixtral": {"every": 1, "expert_width": None}, "qwen2_moe": {"noise": 0.0}}[self.kind]
        for name, usual in foreign.items():
            if getattr(self, name) != usual:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} has no meaning for {self.kind}")


def upcycle(dense: Path, to: Path, upcycling: UpcycleConfig) -> dict[str, Any]:
    """Write the mixture to the new folder `to`, in the type of the dense weights; its config.json as a dictionary.

    ConfigError if `dense` is no Llama without biases.
    """
    upcycling.check()
    config = _mixture_config(read_config(dense), dense, upcycling)
    with publish(to) as folder:
        write_safetensors(_tensors(dense, config, upcycling), folder)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for pattern in _COPIED:
            for file in dense.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    return config


def _mixture_config(dense: Any, folder: Path, upcycling: UpcycleConfig) -> dict[str, Any]:
    if dense.model_type != "llama" or dense.hidden_act != "silu" or dense.attention_bias or dense.mlp_bias:
        raise ConfigError(
            f"{folder} is a {dense.model_type!r} model; only a Llama with silu and without biases can be upcycled"
        )
    if upcycling.every > dense.num_hidden_layers:
        raise ConfigError(
            f"--every {upcycling.every} gives experts to none of the {dense.num_hidden_layers} layers of {folder}; the "
            f"largest is {dense.num_hidden_layers}, which gives them to the last"
        )
    architecture = ARCHITECTURES[upcycling.kind]
    kept = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "intermediate_size"),
    )
    config: dict[str, Any] = {key: getattr(dense, key) for key in kept} | {
        "model_type": upcycling.kind,
        "architectures": [{"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}[upcycling.kind]],
        "dtype": str(dense.dtype or torch.float32).removeprefix("torch."),
        "num_experts_per_tok": upcycling.top_k,
        **dict.fromkeys(architecture.count_keys, upcycling.experts),
    }
    if upcycling.kind == "mixtral":
        return config | {"sliding_window": None}
    inner = upcycling.expert_width or dense.intermediate_size // upcycling.top_k
    if inner % ROW:
        raise ConfigError(f"--expert-width {inner}; grouped matrix products take multiples of {ROW}")
    return config | {
        "qkv_bias": False,
        "shared_expert_intermediate_size": dense.intermediate_size,
        "moe_intermediate_size": inner,
        "norm_topk_prob": False,
        "decoder_sparse_step": upcycling.every,
        "mlp_only_layers": [],
    }


def _tensors(dense: Path, config: dict[str, Any], upcycling: UpcycleConfig) -> Iterator[tuple[str, Tensor]]:
    every = upcycling.every
    dtype = torch.float32
    for name, tensor in read_safetensors(dense):
        dtype = tensor.dtype
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        matrix = name.split(".", 3)[-1]
        if layer < 0 or matrix not in _MATRICES or (layer + 1) % every:
            yield name, tensor
        elif upcycling.kind == "mixtral":
            yield from _copies(tensor, layer, _MATRICES[matrix], upcycling)
        else:
            # The gate of the shared expert is sigmoid(0), which halves what comes out.
            doubled = tensor * 2 if matrix == "mlp.down_proj.weight" else tensor
            yield f"{layer_prefix(layer)}mlp.shared_expert.{matrix.removeprefix('mlp.')}", doubled
            yield from _new(tensor, layer, _MATRICES[matrix], config, upcycling)
    architecture = ARCHITECTURES[upcycling.kind]
    for layer in range(every - 1, config["num_hidden_layers"], every):
        router = _normal((upcycling.experts, config["hidden_size"]), upcycling.seed, "router", layer)
        yield architecture.router(layer), (router * _ROUTER_DEVIATION).to(dtype)
        if upcycling.kind == "qwen2_moe":
            yield (
                f"{layer_prefix(layer)}mlp.shared_expert_gate.weight",
                torch.zeros(1, config["hidden_size"], dtype=dtype),
            )


def _copies(tensor: Tensor, layer: int, matrix: str, upcycling: UpcycleConfig) -> Iterator[tuple[str, Tensor]]:
    deviation = upcycling.noise * tensor.float().std()
    for expert in range(upcycling.experts):
        disturbed = tensor.clone()
        if upcycling.noise:
            noise = _normal(tensor.shape, upcycling.seed, matrix, layer, expert)
            disturbed = (tensor.float() + deviation * noise).to(tensor.dtype)
        yield ARCHITECTURES["mixtral"].expert(layer, expert, matrix), disturbed


def _new(
    tensor: Tensor, layer: int, matrix: str, config: dict[str, Any], upcycling: UpcycleConfig
) -> Iterator[tuple[str, Tensor]]:
    width, inner = config["hidden_size"], config["moe_intermediate_size"]
    for expert in range(upcycling.experts):
        if matrix == "down":
            values = torch.zeros(width, inner)
        else:
            values = tensor.float().std() * _normal((inner, width), upcycling.seed, matrix, layer, expert)
        yield ARCHITECTURES["qwen2_moe"].expert(layer, expert, matrix), values.to(tensor.dtype)


def _normal(shape: Any, seed: int, *names: str | int) -> Tensor:
    return torch.randn(shape, generator=generator(stream_key(seed, "upcycle", *names)))
