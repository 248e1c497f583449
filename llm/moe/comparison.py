"""Ways of merging side by side: every recipe at every number of experts on every model, judged by the same text.

COMPARISON/MODEL/
    statistics/               of `unmask moe calibrate`
    NAME-r4/merged/           of `unmask moe merge`, removed once judged
    NAME-r4/result.json       written last; a later call leaves it alone

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
from llm.moe.judge import Generation, Likelihood, judge_generation, judge_likelihood
from llm.moe.merge import load_layer, merge
from llm.moe.recipe import MergeConfig
from llm.moe.source import Source, open_source

ORIGINAL = "original"
FORMAT = "unmask-moe-comparison-1"


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
        for name in self.recipes:
            self.recipe(name, self.experts[0])

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
                    result = judge.result(group, name, count, file.parent)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    partial = file.with_name("result.json.tmp")
                    partial.write_text(json.dumps(configs.to_dict(result), indent=1) + "\n")
                    partial.replace(file)
                results.append(read_result(file))
                bar.update()
    return results


def read_result(file: Path) -> Result:
    return configs.from_dict(Result, json.loads(file.read_text()), source=str(file))


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
        if judging.continuations > len(self._blocks):
            raise ConfigError(
                f"judging.continuations = {judging.continuations}, and each begins like one of judging.blocks = "
                f"{len(self._blocks)}; raise the latter"
            )

    def result(self, group: str, name: str, experts: int, folder: Path) -> Result:
        seconds, model = 0.0, self._original
        if name != ORIGINAL:
            begin = time.monotonic()
            recipe, merged = self._config.recipe(name, experts), folder / "merged"
            merge(self._source, self._place / "statistics", recipe, merged, self._runtime)
            seconds = time.monotonic() - begin
            layers = {n: load_layer(merged, n) for n in self._source.shape.moe_layers}
            model = with_merged(self._original, self._source, layers)
            shutil.rmtree(merged)
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
