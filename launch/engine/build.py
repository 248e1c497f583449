"""The engine that a configuration asks for."""

from collections.abc import Callable
from typing import Any

from launch.engine.base import Engine, EngineConfig, OptimizerConfig
from launch.engine.ddp import DDP
from launch.engine.fsdp2 import FSDP2
from launch.engine.zero import ZeRO
from launch.runtime import Runtime

ENGINES = {"ddp": DDP, "fsdp2": FSDP2, "zero1": ZeRO, "zero2": ZeRO, "zero3": ZeRO}


def build_engine(
    build_model: Callable[[], Any],
    config: EngineConfig,
    optimizer: OptimizerConfig,
    runtime: Runtime,
    *,
    seed: int,
) -> Engine:
    """Collective. Build the model (a `TrainableModel`), initialise it from `seed`, wrap it, and prove the wrapping."""
    engine: Engine = ENGINES[config.strategy](build_model, config, optimizer, runtime, seed)
    engine.describe()
    return engine
