"""The sections that every experiment has, whatever its room, and what a room must bring: a `Task`.

A room's configuration is a dataclass that inherits `Experiment` and adds its own sections; its training module is
three lines that hand this dataclass and its task to `launch.entry.main`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from launch.config import Count, Seconds
from launch.engine import EngineConfig, OptimizerConfig, TrainableModel
from launch.errors import ConfigError
from launch.metrics import MetricsConfig
from launch.runtime import Runtime
from launch.schedule import ScheduleConfig
from launch.watch import GuardConfig, WatchConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"  # for titles and trackers
    dir: str | None = None  # the run folder; null for runs/NAME. The same command in the same folder resumes
    seed: int = 0  # of initial weights, data order and noise
    deterministic: bool = False  # refuse operations without a deterministic implementation (slower on CUDA)

    @property
    def folder(self) -> Path:
        return Path(self.dir if self.dir is not None else f"runs/{self.name}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: Count  # optimizer steps of the whole run
    global_batch: Count  # sequences per optimizer step, over all ranks
    micro_batch: Count  # sequences per rank and forward; the rest is gradient accumulation
    log_every: Count = 10  # steps between lines of metrics.jsonl
    evaluate_every: Count | None = None  # steps between evaluations; null evaluates at the end only
    sample_every: Count | None = None  # steps between samples; null samples at the end only

    def check(self, path: str) -> None:
        for name in ("steps", "global_batch", "micro_batch", "log_every", "evaluate_every", "sample_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{path}.{name} = {value}; the smallest is 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: Count | None = 1000  # steps between checkpoints; null for none but the last
    every: Seconds | None = None  # time between checkpoints, beside every_steps
    keep_last: int = 2  # newest checkpoints that stay
    keep_every: Count | None = None  # checkpoints at multiples of this many steps stay for ever
    verify: Literal["hash", "size"] = "hash"  # what proves a checkpoint whole; hash also finds a flipped byte
    asynchronous: bool = True  # write beside training; only the copy to host memory stops it
    max_failures: int = 3  # failed saves in a row (disk full, say) after which the run stops

    def check(self, path: str) -> None:
        for name in ("every_steps", "every", "keep_last", "keep_every", "max_failures"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{path}.{name} = {value}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    entry: str  # the module that trains, for example llm.train
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


class Task(Protocol):
    """What a room brings. Its methods see one rank's part; reductions over ranks are the trainer's business."""

    @property
    def tokens_per_sample(self) -> int: ...

    def build_model(self) -> TrainableModel:
        """The model, on the current device (possibly meta), uninitialised."""
        ...

    def initial_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """Parameter name and full tensor of weights to start from, the same on every rank; None for random ones."""
        ...

    def batch(self, positions: np.ndarray, step: int) -> Any:
        """The samples at these global positions of the endless order, on the device."""
        ...

    def example_batch(self, size: int) -> Any:
        """Any batch of `size` samples with the shapes, types and most work that one can have; needs no data."""
        ...

    def count(self, batch: Any) -> float:
        """What the sum of the loss is divided by, once added up over all ranks."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss SUM of a micro-batch (differentiable), and [numerator, denominator] of each figure to report."""
        ...

    def evaluate(self, model: nn.Module, runtime: Runtime) -> dict[str, float]:
        """Collective. Figures of merit on held-out data, equal on every rank."""
        ...

    def sample(self, model: nn.Module, runtime: Runtime, step: int, folder: Path) -> None:
        """Collective. Write samples under `folder`."""
        ...

    def keep_files(self, folder: Path) -> None:
        """Copy into the run folder what its checkpoints need and may move elsewhere. Rank 0, at each start."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What must be equal in a checkpoint for it to mean the same (data and codec fingerprints), as JSON."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """Parameters, tokens, FLOPs: the rows of the table printed before the start."""
        ...

    def flops_per_token(self) -> float: ...

    def report_sections(self, run_folder: Path) -> list[tuple[str, str]]:
        """Titles and markdown of this room's part of the report."""
        ...
