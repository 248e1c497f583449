"""How weights, gradients and optimizer states live on the processes: one class a strategy, one small interface."""

from launch.engine.base import Engine, EngineConfig, OptimizerConfig, Split, StepInfo, TrainableModel
from launch.engine.build import build_engine

__all__ = ["Engine", "EngineConfig", "OptimizerConfig", "Split", "StepInfo", "TrainableModel", "build_engine"]
