"""From a ladder to its points: the configuration of each, with steps and tokens that spend its budget exactly once.

FLOPs are those of the family's own model (llm/backbones/flops.py): a Prime model has another input table than an MDM
of the same shape. A point's schedule ends at its own last step.
"""

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from launch import config as configs
from launch.errors import ConfigError
from llm.backbones import TrainingFlops, count_parameters, training_flops
from llm.config import DiffusionConfig, EvaluationConfig, LanguageConfig
from llm.data.stream import DataConfig, open_datasets
from llm.diffusion.codec import Codec
from llm.scaling.config import Budget, Family, Ladder, Size
from llm.scaling.point import Point


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """A point and everything that decides its result."""

    point: Point
    experiment: dict[str, Any]  # what its training module reads, without a run folder
    judged: dict[str, Any]  # how it is evaluated, beyond the experiment's section
    steps: int
    flops: TrainingFlops  # of the whole run, by every rule
    vocab_size: int
    epochs: float | None  # how often it reads the data; None if they are not here

    @property
    def config_hash(self) -> str:
        """Of what decides the result. Values that the files leave to defaults are not in it: defaults may be added."""
        text = json.dumps(self.identity(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        free = ("entry", "checkpoint", "metrics", "watch", "run.name", "train.log_every")
        flat = configs.flatten({**self.experiment, "judged": self.judged})
        return {k: v for k, v in sorted(flat.items()) if not any(k == f or k.startswith(f"{f}.") for f in free)}


def plan_ladder(ladder: Ladder) -> list[PlannedPoint]:
    """Every point, the cheapest budget first, then by seed, so that a part of a study is a study."""
    planned = [
        _planned(ladder, family_name, size_name, budget, seed)
        for family_name, family in ladder.families.items()
        for budget in (ladder.budgets if family.budgets is None else family.budgets)
        for size_name in _sizes(ladder, family, budget)
        for seed in budget.seeds or family.seeds or ladder.seeds
    ]
    names = [p.point.name for p in planned]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"the ladder has the point {twice} twice; name each budget, size and seed once")
    return sorted(planned, key=lambda p: (p.point.budget, p.point.seed))


def _sizes(ladder: Ladder, family: Family, budget: Budget) -> list[str]:
    wanted = list(ladder.sizes) if budget.sizes is None else budget.sizes
    return [name for name in wanted if family.sizes is None or name in family.sizes]


def _planned(ladder: Ladder, family_name: str, size_name: str, budget: Budget, seed: int) -> PlannedPoint:
    family, size = ladder.families[family_name], ladder.sizes[size_name]
    tree = _experiment(ladder, family, size, budget)
    name = f"{family_name}/{size_name}-{f'{budget.flops:g}'.replace('+', '')}-s{seed}"
    configs.merge(tree, {"run": {"name": name, "seed": seed}, "train": {"steps": 1}})
    config = configs.from_dict(LanguageConfig, tree, source=f"point {name}")
    vocab_size, blocks = _data(config.data)
    codec = _codec(config.diffusion, vocab_size)
    tokens_per_step = config.train.global_batch * config.data.block_length
    per_token = _flops(config, codec, tokens=1)
    steps = max(1, round(budget.flops / (getattr(per_token, ladder.flops_rule) * tokens_per_step)))
    tokens = steps * tokens_per_step
    flops = _flops(config, codec, tokens=tokens)
    log_every = ladder.settings.get("train", {}).get("log_every", max(1, steps // 20))
    configs.merge(tree, {"train": {"steps": steps, "log_every": log_every}})
    configs.merge(tree, {"schedule": _schedule(ladder, family, size, budget, config, steps)})
    count = count_parameters(
        config.model,
        input_layer=config.diffusion.input_spec(config.model, codec),
        num_classes=vocab_size,
        causal=config.diffusion.family == "ar",
    )
    return PlannedPoint(
        point=Point(
            name=name,
            family=family_name,
            size=size_name,
            seed=seed,
            budget=budget.flops,
            parameters=count.non_embedding,
            tokens=tokens,
            flops=getattr(flops, ladder.flops_rule),
            flops_6nd=flops.six_nd,
        ),
        experiment=tree,
        judged={"joint": ladder.joint, "costly_sequences": ladder.costly_sequences},
        steps=steps,
        flops=flops,
        vocab_size=vocab_size,
        epochs=None if blocks is None else tokens / (blocks * config.data.block_length),
    )


def _experiment(ladder: Ladder, family: Family, size: Size, budget: Budget) -> dict[str, Any]:
    """The sections of a point's experiment that do not depend on its number of steps."""
    tree = copy.deepcopy(_read(family.experiment or ladder.experiment))
    quiet = {  # a study has hundreds of points, and each is judged once
        "train": {"evaluate_every": None, "sample_every": None},
        "checkpoint": {"every_steps": None, "every": 300.0, "keep_last": 1},
        "metrics": {"tensorboard": False, "report": False},  # whose pictures take seconds
    }
    preset = {k: v for k, v in (_read(size.preset) if size.preset else {}).items() if k in ("model", "train", "engine")}
    layers = (
        {"diffusion": family.diffusion, "model": family.model},
        preset,
        {"model": size.model, "train": size.train, "engine": size.engine},
        {"train": {} if budget.global_batch is None else {"global_batch": budget.global_batch}},
        quiet,
        ladder.settings,
    )
    for layer in layers:
        configs.merge(tree, copy.deepcopy(layer))
    # As in a file, what is left to defaults is not said: a point must stay itself when a later version has more keys.
    usual = configs.to_dict(EvaluationConfig())
    said = {key: value for key, value in configs.to_dict(ladder.evaluation).items() if value != usual[key]}
    return tree | {"evaluation": said}


def _schedule(
    ladder: Ladder, family: Family, size: Size, budget: Budget, config: LanguageConfig, steps: int
) -> dict[str, Any]:
    rate = ladder.rate
    lr = size.lr or rate.lr or config.schedule.lr
    if size.lr is None and rate.at_width is not None:
        lr *= (config.model.width / rate.at_width) ** rate.power
    lr = float(f"{lr * family.rate_factor * budget.rate_factor:.6g}")
    return {"lr": lr, "final_lr": lr * rate.final_fraction, "warmup_steps": round(rate.warmup_fraction * steps)}


@cache
def _read(path: str) -> dict[str, Any]:
    return configs.read_yaml(path)


@cache
def _codec(diffusion: DiffusionConfig, vocab_size: int) -> Codec:
    """A table of codes changes what digits mean and not what they cost, so a plan does not need the file."""
    codec = replace(diffusion, code=None).codec(vocab_size)
    if diffusion.family != "ar":
        diffusion.objective_for(codec)  # terms that do not suit the masks must not wait for the first point
    return codec


def _flops(config: LanguageConfig, codec: Codec, *, tokens: int) -> TrainingFlops:
    return training_flops(
        config.model,
        input_layer=config.diffusion.input_spec(config.model, codec),
        num_classes=codec.vocab_size,
        causal=config.diffusion.family == "ar",
        length=config.data.block_length,
        tokens=tokens,
    )


@cache
def _data(data: DataConfig) -> tuple[int, int | None]:
    """Tokens of the vocabulary, and blocks of the training split; None where the data are not here."""
    paths = [Path(source.path).expanduser() for source in data.sources]
    if data.vocab_size is not None and not all((path / "manifest.json").exists() for path in paths):
        return data.vocab_size, None
    datasets = open_datasets(data, "train")
    return datasets[0].manifest.vocab_size, sum(map(len, datasets))
