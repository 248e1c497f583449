"""The YAML of a ladder: which families of models are trained at which sizes, FLOPs and seeds, and how they are judged.

    experiment: ../tiny/base.yaml           # what all points share; sizes, families and budgets change it
    budgets: [{flops: 1e12}, {flops: 3e12, seeds: [0, 1]}]
    sizes: {s: {model: {layers: 2, heads: 2, width: 48}}, m: {model: {layers: 3, heads: 4, width: 96}}}
    families: {mdm: {diffusion: {family: mdm, objective: mdm}}}

Later sections win over earlier ones: experiment, family, size, budget, `settings`. Steps and learning rate follow from
them (llm/scaling/plan.py).
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launch import config as configs
from launch.config import Count
from launch.errors import ConfigError
from llm.config import EvaluationConfig

FlopsRule = Literal["full", "six_nd", "six_nd_label"]

# Of a point's experiment: what the ladder works out, and where to say it.
_WORKED_OUT = {
    "train.steps": "budgets",
    "schedule.final_lr": "rate.final_fraction",
    "schedule.warmup_steps": "rate.warmup_fraction",
    "run.seed": "seeds",
    "run.name": "families and sizes",
    "evaluation": "the section evaluation of the ladder",
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One IsoFLOP curve: models of different sizes trained with the same FLOPs."""

    flops: float  # of training a model, by the ladder's rule
    sizes: tuple[str, ...] | None = None  # those of the ladder's sizes that are trained; null for all
    seeds: tuple[int, ...] | None = None  # in place of the family's or ladder's
    global_batch: Count | None = None  # sequences per step, in place of the size's or experiment's
    rate_factor: float = 1.0  # on the learning rate


@dataclass(frozen=True, kw_only=True)
class Size:
    """A shape of the model, and how it is held in memory."""

    preset: str | None = None  # experiment file whose sections model, train and engine stand below those here
    model: dict[str, Any] = field(default_factory=dict)  # keys of the section model
    train: dict[str, Any] = field(default_factory=dict)  # keys of the section train: micro_batch, global_batch
    engine: dict[str, Any] = field(default_factory=dict)  # keys of the section engine
    lr: float | None = None  # peak learning rate, in place of the rule of `rate`


@dataclass(frozen=True, kw_only=True)
class Family:
    """A recipe: kind of model and training objective."""

    experiment: str | None = None  # experiment file in place of the ladder's
    diffusion: dict[str, Any] = field(default_factory=dict)  # keys of the section diffusion
    model: dict[str, Any] = field(default_factory=dict)  # keys of the section model
    budgets: tuple[Budget, ...] | None = None  # in place of the ladder's
    sizes: tuple[str, ...] | None = None  # of those that a budget names; null for all of them
    seeds: tuple[int, ...] | None = None  # in place of the ladder's
    rate_factor: float = 1.0  # on the learning rate


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Peak learning rate lr * (width / at_width) ** power, times the factors of family and budget."""

    lr: float | None = None  # null: that of the experiment's schedule
    at_width: Count | None = None  # the width that lr suits; null: every width
    power: float = -0.5  # of the width
    final_fraction: float = 0.1  # last learning rate, as a share of the peak
    warmup_fraction: float = 0.05  # share of a point's own steps

    def check(self, path: str) -> None:
        for name in ("lr", "at_width"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{path}.{name} = {value}; it must be above 0, or null")
        for name in ("final_fraction", "warmup_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{path}.{name} = {getattr(self, name)}; a fraction lies in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Ladder:
    experiment: str  # experiment file that all points share; relative to the file that names it
    flops_rule: FlopsRule = "full"  # full: 6N, head and attention; six_nd: 6ND; six_nd_label: 6D 12 layers width^2
    budgets: tuple[Budget, ...]  # in FLOPs of one training run
    sizes: dict[str, Size]  # by name
    families: dict[str, Family]  # by name
    seeds: tuple[int, ...] = (0,)  # of weights, data order and noise
    rate: Rate = field(default_factory=Rate)
    settings: dict[str, Any] = field(default_factory=dict)  # sections of the experiment that win over all others
    evaluation: EvaluationConfig = field(default_factory=lambda: EvaluationConfig(draws=2))  # at the end of a point
    costly_sequences: Count = 64  # blocks for nll_chain and nelbo_steps, which need a forward per token or step
    joint: bool = True  # also estimate loss_ce_joint of prime models: published, and no likelihood
    keep_checkpoints: Literal["none", "last"] = "last"  # what stays of a finished point beside its small files
    jobs: int = 2  # points that are trained at the same time, one thread each

    def check(self, path: str) -> None:
        del path  # the root
        for kind in ("budgets", "sizes", "families", "seeds"):
            if not getattr(self, kind):
                raise ConfigError(f"{kind} is empty; a ladder needs at least one entry there")
        for kind, names in (("sizes", self.sizes), ("families", self.families)):
            for name in names:
                if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
                    raise ConfigError(f"{kind}.{name}: a name is part of a path; use letters, digits, _ . + and -")
        for where, names in self._sizes_named():
            for name in names:
                if name not in self.sizes:
                    raise configs.unknown_key(name, list(self.sizes), where)
        for where, budgets in self._budgets():
            for i, budget in enumerate(budgets):
                if not budget.flops > 0 or not budget.rate_factor > 0:
                    raise ConfigError(f"{where}[{i}]: flops = {budget.flops}, rate_factor = {budget.rate_factor}; > 0")
        for key in configs.flatten(self.settings):
            if found := next((k for k in _WORKED_OUT if key == k or key.startswith(f"{k}.")), None):
                raise ConfigError(f"settings.{key} is worked out for every point; use {_WORKED_OUT[found]}")
        if self.jobs < 1:
            raise ConfigError(f"jobs = {self.jobs}; the smallest is 1")
        for name, value in (
            ("evaluation.sequences", self.evaluation.sequences),
            ("costly_sequences", self.costly_sequences),
        ):
            if value is not None and value < 2:
                raise ConfigError(f"{name} = {value}; a standard error needs at least 2")

    def _budgets(self) -> Iterator[tuple[str, tuple[Budget, ...]]]:
        yield "budgets", self.budgets
        for name, family in self.families.items():
            if family.budgets is not None:
                yield f"families.{name}.budgets", family.budgets

    def _sizes_named(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        for name, family in self.families.items():
            yield f"families.{name}.sizes", family.sizes or ()
        for where, budgets in self._budgets():
            for i, budget in enumerate(budgets):
                yield f"{where}[{i}].sizes", budget.sizes or ()


def load_ladder(path: Path, overrides: Sequence[str] = ()) -> Ladder:
    """The ladder in `path`; files that it names are found from the file that names them, and made absolute."""
    ladder, sources = configs.load(Ladder, path, overrides)

    def found(file: str | None, key: str) -> str | None:
        if file is None:
            return None
        source = sources.get(key, str(path))
        return str((Path() if source == "override" else Path(source).parent).joinpath(file).resolve())

    sizes = {n: dataclasses.replace(s, preset=found(s.preset, f"sizes.{n}.preset")) for n, s in ladder.sizes.items()}
    families = {
        n: dataclasses.replace(f, experiment=found(f.experiment, f"families.{n}.experiment"))
        for n, f in ladder.families.items()
    }
    experiment = found(ladder.experiment, "experiment")
    assert experiment is not None
    return dataclasses.replace(ladder, experiment=experiment, sizes=sizes, families=families)
