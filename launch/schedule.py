"""The learning rate as a pure function of the step: nothing to save, nothing to advance, nothing to get out of step."""

import math
from dataclasses import dataclass
from typing import Literal

from launch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    kind: Literal["constant", "cosine", "wsd"] = (
        "cosine"  # after the warm-up: flat, one half cosine, or flat then linear
    )
    lr: float = 3e-4  # peak learning rate
    final_lr: float = 0.0  # learning rate at the last step (cosine, wsd)
    warmup_steps: int = 0  # linear from 0 to lr
    decay_fraction: float = 0.2  # wsd: the share of all steps that the final linear decay takes

    def check(self, path: str) -> None:
        if self.lr <= 0 or not 0 <= self.final_lr <= self.lr:
            raise ConfigError(
                f"{path}: lr = {self.lr} and final_lr = {self.final_lr}; need 0 <= final_lr <= lr and lr > 0"
            )
        if self.warmup_steps < 0:
            raise ConfigError(f"{path}.warmup_steps = {self.warmup_steps}; the smallest is 0")
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError(f"{path}.decay_fraction = {self.decay_fraction}; need 0 < decay_fraction <= 1")


def learning_rate(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning rate of the update that is number `step`, counted from 0, of `total_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return config.lr
    if config.kind == "wsd":
        decay_steps = max(1, round(config.decay_fraction * total_steps))
        progress = max(0.0, (step + 1 - (total_steps - decay_steps)) / decay_steps)
        return config.lr + min(1.0, progress) * (config.final_lr - config.lr)
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    return config.final_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr - config.final_lr)
