"""Ways of merging side by side: every recipe at every number of experts on every model, judged by the same text.

COMPARISON/
    comparison.json           calibration, judging and recipes; a later call goes on only if they are the same
    GROUP/MODEL/
        statistics/           of `unmask moe calibrate`
        NAME-r4/merged/       of `unmask moe merge`, removed once judged
        NAME-r4/result.json   written last; a later call leaves it alone

A model that was trained several times, from different seeds, is listed once a seed: spreads are over these.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from launch import config as configs
from launch.errors import ConfigError
from launch.runtime import Runtime
from llm.moe.assemble import load_whole, with_merged
from llm.moe.calibrate import calibrate
from llm.moe.calibration_text import CalibrationConfig, build_text
from llm.moe.clustering import check_clusters
from llm.moe.files import save_json
from llm.moe.judge import Generation, Likelihood, judge_generation, judge_likelihood
from llm.moe.merge import load_layer, merge
from llm.moe.recipe import MergeConfig
from llm.moe.source import Source, check_length, open_source

ORIGINAL = "original"
FORMAT = "unmask-moe-comparison-1"
_MANIFEST = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class JudgingConfig:
    """What models are judged by."""

    data: tuple[str, ...] = ()  # as of the calibration; empty: the same, in its test split
    blocks: int = 32  # held-out blocks for the likelihood
    block_length: int = 256  # tokens of each
    continuations: int = 32  # texts that each model writes; 0 for none
    beginning: int = 32  # held-out tokens that a text begins with
    length: int = 64  # tokens that are written
    tasks: tuple[str, ...] = ()  # of the harness, as in `unmask eval --tasks`
    limit: int | None = None  # documents of each task

    def check(self, path: str) -> None:
        for name, least in (("blocks", 1), ("block_length", 2), ("continuations", 0), ("beginning", 1), ("length", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{path}.{name} = {getattr(self, name)}; the smallest is {least}")
        if self.continuations > self.blocks:
            raise ConfigError(
                f"{path}.continuations = {self.continuations}, and each begins like one of {path}.blocks = "
                f"{self.blocks}; raise the latter"
            )
        if self.beginning > self.block_length:
            raise ConfigError(
                f"{path}.beginning = {self.beginning}, but held-out blocks have {path}.block_length = "
                f"{self.block_length} tokens; lower the former"
            )


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """Models, numbers of experts and recipes."""

    models: dict[str, Any]  # group of models that differ by their seed alone: list of their folders
    experts: tuple[int, ...]  # numbers to go down to
    recipes: dict[str, Any]  # name: keys of a recipe, without `experts`
    calibration: CalibrationConfig
    judging: JudgingConfig = field(default_factory=JudgingConfig)

    def check(self, path: str) -> None:
        if not self.models or not self.experts or not self.recipes:
            raise ConfigError("a comparison names models, numbers of experts and recipes; one of them is empty")
        if ORIGINAL in self.recipes:
            raise ConfigError(f"recipes.{ORIGINAL}: the name stands for the model itself; choose another")
        for group, listed in self.models.items():
            if not isinstance(listed, list) or not listed or not all(isinstance(folder, str) for folder in listed):
                raise ConfigError(f"models.{group} = {listed!r}; it is a list of folders, such as [models/seed0]")
            names = [Path(folder).name for folder in listed]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ConfigError(
                    f"models.{group} has {len(twice)} folders called {twice[0]!r}, and results are kept by that name; "
                    "rename them"
                )
        for name, keys in self.recipes.items():
            if not isinstance(keys, dict):
                raise ConfigError(f"recipes.{name} = {keys!r}; it holds keys of a recipe, such as {{linkage: average}}")
            for count in self.experts:
                self.recipe(name, count)

    def recipe(self, name: str, experts: int) -> MergeConfig:
        return configs.from_dict(MergeConfig, {**self.recipes[name], "experts": experts}, source=f"recipes.{name}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model, merged one way or not at all."""

    model: str  # the group
    folder: str
    recipe: str
    experts: int
    likelihood: Likelihood
    generation: Generation | None
    tasks: dict[str, float]  # accuracies
    task_errors: dict[str, float]
    parameters: int
    seconds: float  # of merging, calibration aside


def compare(config: ComparisonConfig, out: Path, runtime: Runtime) -> list[Result]:
    """Train nothing, merge and judge what has no result yet; all results. One process."""
    folders = [(group, Path(folder)) for group, listed in config.models.items() for folder in listed]
    sources = {folder: open_source(folder) for _, folder in folders}
    for source in sources.values():
        for count in config.experts:
            check_clusters(count, source.shape.num_experts)
        judging, length = config.judging, config.calibration.block_length
        check_length(source, length, f"calibration.block_length = {length}")
        check_length(source, judging.block_length, f"judging.block_length = {judging.block_length}")
        written = judging.beginning + judging.length
        check_length(source, written, f"judging.beginning + judging.length = {written}")
    _begin(config, out)
    jobs = [(ORIGINAL, 0)] + [(name, count) for count in config.experts for name in config.recipes]
    results = []
    with tqdm(total=len(folders) * len(jobs), desc="compare", unit="merge") as bar:
        for group, folder in folders:
            place = out / group / folder.name
            judge = None
            for name, count in jobs:
                file = place / (name if name == ORIGINAL else f"{name}-r{count}") / "result.json"
                if not file.exists():
                    judge = judge or _Judge(config, sources[folder], place, runtime)
                    save_json(configs.to_dict(judge.result(group, name, count, file.parent)), file)
                if (merged := file.with_name("merged")).exists():  # or a kill has left it behind its result
                    shutil.rmtree(merged)
                result = read_result(file)
                if Path(result.folder).resolve() != folder.resolve():
                    raise ConfigError(
                        f"{file} is of {result.folder}, not of {folder}; choose another folder than {out}"
                    )
                results.append(result)
                bar.update()
    return results


def read_result(file: Path) -> Result:
    return configs.from_dict(Result, json.loads(file.read_text()), source=str(file))


def _begin(config: ComparisonConfig, out: Path) -> None:
    """Record what results in `out` mean. Further recipes, models and numbers of experts may come later."""
    tree = configs.to_dict(config)
    mine = {"format": FORMAT, **{key: tree[key] for key in ("calibration", "judging", "recipes")}}
    if (out / _MANIFEST).exists():
        found = json.loads((out / _MANIFEST).read_text())
        common = {name: keys for name, keys in found["recipes"].items() if name in mine["recipes"]}
        for key, old, new in (
            ("calibration", found["calibration"], mine["calibration"]),
            ("judging", found["judging"], mine["judging"]),
            *((f"recipes.{name}", keys, mine["recipes"][name]) for name, keys in common.items()),
        ):
            if old != new:
                raise ConfigError(f"{out} holds results of another {key} ({old}); choose another folder, or remove it")
        mine["recipes"] = found["recipes"] | mine["recipes"]
    save_json(mine, out / _MANIFEST)


class _Judge:
    """One model in memory, its calibration, and the held-out text."""

    def __init__(self, config: ComparisonConfig, source: Source, place: Path, runtime: Runtime) -> None:
        self._config, self._source, self._runtime, self._place = config, source, runtime, place
        self._original, self._tokenizer = load_whole(source.folder, runtime.device)
        calibrate(source, lambda: build_text(config.calibration, self._tokenizer), place / "statistics", runtime)
        judging = config.judging
        heldout = CalibrationConfig(
            data=judging.data or config.calibration.data, blocks=judging.blocks, block_length=judging.block_length
        )
        self._blocks = build_text(heldout, self._tokenizer, split="test").blocks.to(runtime.device)

    def result(self, group: str, name: str, experts: int, folder: Path) -> Result:
        seconds, model = 0.0, self._original
        if name != ORIGINAL:
            begin = time.monotonic()
            recipe, merged = self._config.recipe(name, experts), folder / "merged"
            merge(self._source, self._place / "statistics", recipe, merged, self._runtime)
            seconds = time.monotonic() - begin
            layers = {n: load_layer(merged, n) for n in self._source.shape.moe_layers}
            model = with_merged(self._original, self._source, layers)
        judging = self._config.judging
        accuracies = self._tasks(model)
        return Result(
            model=group,
            folder=str(self._source.folder),
            recipe=name,
            experts=experts or self._source.shape.num_experts,
            likelihood=judge_likelihood(model, self._original, self._blocks),
            generation=judge_generation(
                model,
                self._original,
                self._blocks[: judging.continuations, : judging.beginning],
                length=judging.length,
            )
            if judging.continuations
            else None,
            tasks={task: value for task, (value, _) in accuracies.items()},
            task_errors={task: error for task, (_, error) in accuracies.items()},
            parameters=sum(p.numel() for p in model.parameters()),
            seconds=seconds,
        )

    def _tasks(self, model: Any) -> Mapping[str, tuple[float, float]]:
        """Accuracy and standard error of each task."""
        if not self._config.judging.tasks:
            return {}
        from llm.evals.models import HuggingFaceTokenizer, wrap_huggingface
        from llm.evals.run import harness_model, run_tasks
        from llm.evals.scoring import ScoringConfig
        from llm.evals.tasks import select

        selection = select(list(self._config.judging.tasks))
        scorable = wrap_huggingface(model, HuggingFaceTokenizer(self._tokenizer))
        harness = harness_model(scorable, ScoringConfig(), self._runtime)
        found = run_tasks(harness, selection, self._runtime, limit=self._config.judging.limit)["results"]
        return {name: (found[name]["acc,none"], float(found[name]["acc_stderr,none"])) for name in selection.tasks}


def table(results: list[Result]) -> str:
    """Markdown: means over the models of a group; in brackets their standard deviation, or the s.e. of a single one."""
    tasks = list(dict.fromkeys(task for result in results for task in result.tasks))
    head = ["model", "experts", "recipe", "nats/token", "perplexity", "KL to original", "nats of its texts", "entropy"]
    head += ["repeated 4-grams", *tasks, "parameters", "merging (s)"]
    rows = []
    keys = dict.fromkeys((result.model, result.experts, result.recipe) for result in results)
    for key in sorted(keys, key=lambda k: (k[0], -k[1])):
        of = [result for result in results if (result.model, result.experts, result.recipe) == key]
        nats = [result.likelihood.nats_per_token for result in of]
        texts = [result.generation for result in of if result.generation]
        cells = [
            _spread(nats, of[0].likelihood.standard_error),
            f"{np.exp(np.mean(nats)):.2f}",
            _spread([result.likelihood.divergence for result in of], None),
            _spread([g.nats_under_original for g in texts], texts[0].standard_error) if texts else "-",
            f"{np.mean([g.unigram_entropy for g in texts]):.2f}" if texts else "-",
            f"{np.mean([g.repeated_4grams for g in texts]):.3f}" if texts else "-",
            *(_spread([r.tasks[task] for r in of], of[0].task_errors[task], digits=3) for task in tasks),
            f"{of[0].parameters:,}",
            f"{np.mean([result.seconds for result in of]):.1f}",
        ]
        rows.append([key[0], str(key[1]), key[2], *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _spread(values: list[float], alone: float | None, *, digits: int = 4) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        return f"{mean} ({np.std(values, ddof=1):.{digits}f})"
    return mean if alone is None else f"{mean} ({alone:.{digits}f})"
