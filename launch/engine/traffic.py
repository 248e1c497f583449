"""What each strategy sends in a step: collectives between GPUs, and copies to and from host memory.

Ring algorithms: of `size` bytes over n ranks, a gather or a reduce-scatter sends (n - 1) / n each, an all-reduce twice
that. A flat ring that spans machines crosses from one to the next once for every rank it has on a machine.
"""

from dataclasses import dataclass
from typing import Any

from launch.engine.base import EngineConfig, data_world_size
from launch.engine.memory import FP32, Units


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Bytes that one GPU sends in a step."""

    what: str
    within: float = 0.0  # over links inside a machine
    between: float = 0.0  # over its share of the links between machines
    host: float = 0.0  # to and from host memory
    overlaps: bool = True  # beside computation


def transfers(
    config: EngineConfig, units: Units, *, world_size: int, per_node: int, micro_steps: int, all_reduced: int
) -> list[Transfer]:
    """Everything that a GPU sends in a step. all_reduced: bytes that tensor parallelism adds up in a micro-step."""
    elements = sum(shape.numel() for unit in units for shape in unit)  # of this rank of its tensor group
    inside_blocks = elements - sum(shape.numel() for shape in units[-1])
    compute = 2 if config.precision == "bf16" else FP32

    def ring(
        what: str, size: float, ranks: int, *, stride: int = 1, passes: int = 1, overlaps: bool = True
    ) -> Transfer:
        sent = passes * (ranks - 1) / ranks * size
        neighbours = max(1, min(ranks, per_node // stride))  # ranks of the group on one machine
        if ranks * stride <= per_node:
            return Transfer(what=what, within=sent, overlaps=overlaps)
        return Transfer(what=what, within=sent if neighbours > 1 else 0.0, between=sent / neighbours, overlaps=overlaps)

    gradients, weights = FP32 * elements, compute * elements
    match config.strategy:
        case "ddp":
            made = [ring("all-reduce of gradients", gradients, world_size, passes=2)]
        case "fsdp2":
            split = config.tensor_parallel
            shards = data_world_size(config, world_size) // config.replicas
            again = compute * inside_blocks if config.reshard_after_forward else 0  # in the backward; the root stays
            made = [
                ring("gather of weights", micro_steps * (weights + again), shards, stride=split),
                ring("reduce-scatter of gradients", gradients, shards, stride=split),
                ring("all-reduce of shards", gradients / shards, config.replicas, stride=split * shards, passes=2),
                ring("all-reduce of activations", micro_steps * all_reduced, split, passes=2, overlaps=False),
            ]
            if config.cpu_offload:
                gathers = micro_steps * FP32 * (elements + (inside_blocks if config.reshard_after_forward else 0))
                made.append(Transfer(what="weights and gradients", host=(gathers + gradients) / shards))
        case "zero1" | "zero2":
            times = 1 if config.strategy == "zero1" else micro_steps
            made = [
                ring("all-reduce of gradients", times * gradients, world_size, passes=2),
                ring("gather of weights", weights, world_size, overlaps=False),
            ]
        case "zero3":
            raw: dict[str, Any] = config.deepspeed.get("zero_optimization", {})
            live = min(elements, int(raw.get("stage3_max_live_parameters", 1e9)))  # kept for the backward
            made = [
                ring("gather of weights", micro_steps * compute * (2 * elements - live), world_size),
                ring("reduce-scatter of gradients", micro_steps * gradients, world_size),
            ]
    if config.cpu_offload:
        owners = data_world_size(config, world_size) // config.replicas
        if config.strategy != "fsdp2":
            made.append(Transfer(what="weights and gradients", host=(weights + gradients) / owners))
        # AdamW reads weights, gradients and moments, and writes all but the gradients: 7 x 4 bytes an element.
        made.append(Transfer(what="AdamW in host memory", host=7 * FP32 * elements / owners, overlaps=False))
    return [transfer for transfer in made if transfer.within or transfer.between or transfer.host]
